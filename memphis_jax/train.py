"""The training loop, SFT and rank: steps over the data, saved, resumed, stopped.

A workdir that already holds checkpoints is resumed, to the bit, if its config is the same, and
refused otherwise. `memphis train --help` is the stage that `memphis rounds` runs.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from memphis_jax import checkpoint
from memphis_jax.config import ComputeConfig, ConfigError, PhaseConfig
from memphis_jax.data.loader import Loader
from memphis_jax.errors import Stopped
from memphis_jax.fields import difference
from memphis_jax.metrics import MetricsWriter
from memphis_jax.objectives import Arrays
from memphis_jax.plan_chips import peak_flops
from memphis_jax.plan_cost import model_flops
from memphis_jax.runtime import Preemption, Trace, is_first, same_on_all_hosts
from memphis_jax.sharding import global_batch
from memphis_jax.train_step import TrainState, make_step

MAX_SKIPPED_IN_A_ROW = 3


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and where the last good state is."""


def carry_optimizer(folder: Path, state: TrainState, settings: PhaseConfig) -> TrainState:
    """`state` with the optimizer statistics saved in `folder`, if it holds any.

    Raises ConfigError where they are of another optimizer or of other parameters.
    """
    if not checkpoint.has_train(folder):
        if is_first():
            told = f"keep_optimizer_state: {folder} has no optimizer state, a fresh one is used"
            print(told, file=sys.stderr, flush=True)
        return state
    saved_settings = checkpoint.read_meta(folder)["identity"]["settings"]["optimizer"]
    for name in ("name", "freeze_embeddings", "momentum"):
        if (old := saved_settings[name]) != (new := getattr(settings.optimizer, name)):
            raise ConfigError(
                f"keep_optimizer_state: {folder} was trained with optimizer.{name} = {old!r}, this "
                f"phase has {new!r}; make them equal or set keep_optimizer_state = False"
            )
    saved = checkpoint.restore_train(folder, state.without_model())
    return dataclasses.replace(state, opt_state=saved["opt_state"])


def run(
    phase: str,
    workdir: Path,
    loader: Loader,
    state: TrainState,
    *,
    settings: PhaseConfig,
    compute: ComputeConfig,
    identity: dict[str, Any],
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains from `state`, or from the newest checkpoint of `workdir`, to the loader's end.

    Args:
      phase: "sft" or "rank".
      workdir: gets checkpoints/, metrics.jsonl and tensorboard/.
      identity: JSON that must be equal for a resumption, such as config and hashes of inputs; saved
        with every checkpoint.
      mesh: where `state` lies, with the loader of this host's share of its rows; every process of
        the mesh calls this. None is one device.

    Raises:
      ConfigError: `workdir` belongs to another identity; the differing fields are listed.
      TrainingStopped: three steps in a row were not finite; the last good state is saved.
      Stopped: SIGTERM came, here or on another host, or Ctrl-C; the state is saved.
    """
    batches = iter(loader)
    state = resume(workdir, state, batches, identity, mesh)
    step_fn = make_step(phase, settings, compute, loader.num_steps, mesh)
    _check_not_stopped(state, phase, workdir, settings, loader.num_steps)
    step = start = int(state.step)
    with (
        Preemption() as preemption,
        checkpoint.open_manager(workdir, keep=settings.keep_checkpoints) as manager,
        _writer(workdir, start, len(loader), phase) as writer,
        Trace(workdir / "profile", compute.profile_step if is_first() else 0) as trace,
    ):
        meter, ended = _meter(state, settings, mesh), False
        batch = _next_batch(batches, mesh)
        while step < loader.num_steps and not ended:
            step += 1
            trace.before(step)
            state, metrics = step_fn(state, batch)
            position = batches.get_state()
            batch = _next_batch(batches, mesh)  # the next step's, while the devices compute
            meter.count(metrics)
            last = step == loader.num_steps
            if writer and (last or step % settings.log_every == 0):
                writer.write(step, meter.read(step / loader.num_steps * settings.epochs))
            stop = int(metrics["skipped_in_a_row"]) >= MAX_SKIPPED_IN_A_ROW
            ended = preemption.asked(step) or stop
            if last or ended or step % settings.checkpoint_every == 0:
                meta = {"identity": identity, "loader": position, "step": step}
                checkpoint.save(manager, step, state.model, meta, state.without_model())
    _check_not_stopped(state, phase, workdir, settings, loader.num_steps)
    if is_first() and (skipped := int(state.skipped)):
        told = f"{phase}: {skipped} of {step} steps were not finite and changed nothing"
        print(told, file=sys.stderr, flush=True)
    if step < loader.num_steps:
        raise Stopped(
            f"{phase}: stopped; step {step} of {loader.num_steps} is saved in {workdir}, and the "
            "same command goes on from there",
            preemption.exit_code,
        )
    return state


def _next_batch(batches: Iterator[Any], mesh: Mesh | None) -> Any:
    """The next batch on its devices; None behind the last."""
    batch = next(batches, None)
    if batch is None or mesh is None:
        return batch
    return global_batch(batch, mesh, jax.process_index())


def _writer(workdir: Path, start: int, num_steps: int, phase: str) -> Any:
    """The MetricsWriter, on the one process that writes; a context manager of None elsewhere."""
    if not is_first():
        return nullcontext()
    return MetricsWriter(workdir, resume_step=start, num_steps=num_steps, label=phase)


def _check_not_stopped(
    state: TrainState, phase: str, workdir: Path, settings: PhaseConfig, num_steps: int
) -> None:
    """Raises TrainingStopped where the newest or all steps were not finite, also at a new start."""
    if int(state.skipped_in_a_row) >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingStopped(
            f"{phase}: loss, gradient or update was not finite in {MAX_SKIPPED_IN_A_ROW} steps in "
            f"a row, up to step {int(state.step)}; the weights from before are saved in {workdir}. "
            f"Lower the learning rate ({settings.optimizer.learning_rate:g}) or look at the data, "
            "and start in another workdir."
        )
    if 0 < int(state.skipped) == int(state.step) == num_steps:
        raise TrainingStopped(
            f"{phase}: loss, gradient or update was not finite in any of the {num_steps} steps: "
            f"nothing was trained. Lower the learning rate ({settings.optimizer.learning_rate:g}) "
            "or look at the data, and start in another workdir."
        )


def resume(
    workdir: Path,
    state: TrainState,
    batches: Any,
    identity: dict[str, Any],
    mesh: Mesh | None = None,
) -> TrainState:
    """The newest saved state of `workdir` with the data iterator set behind it; else `state`.

    It may have been saved on any mesh.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        step = checkpoint.latest_step(workdir)
    except checkpoint.CheckpointError:  # new, or killed before its first checkpoint
        step = -1
    if same_on_all_hosts(step, f"the newest checkpoint of {workdir}") < 0:
        return state
    meta = checkpoint.read_meta(workdir, step)
    if "identity" not in meta:
        raise ConfigError(f"{workdir} holds a converted model and no run: use another --workdir")
    if lines := difference(*_common(meta["identity"], identity)):
        raise ConfigError(
            f"{workdir} holds a run with another config: use another --workdir, or delete it. "
            "Differing (saved -> given): " + "; ".join(lines)
        )
    batches.set_state(meta["loader"])
    model, _ = checkpoint.restore_model(workdir, mesh=mesh)
    saved = checkpoint.restore_train(workdir, state.without_model(), step)
    return TrainState(model=model, **saved)


def _common(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what only one of them names: other versions had other fields."""
    left, right = {}, {}
    for name in a.keys() & b.keys():
        left[name], right[name] = a[name], b[name]
        if isinstance(a[name], Mapping) and isinstance(b[name], Mapping):
            left[name], right[name] = _common(a[name], b[name])
    return left, right


class Meter:
    """Metrics of the newest step, and the speed since the last reading.

    `tflops_per_device` and `mfu` (a share of the device's published peak, TPUs only) count what
    training needs (`plan_cost.model_flops`) for tokens that are no padding.
    """

    def __init__(self, flops_per_token: float, devices: int = 1, peak: float | None = None) -> None:
        self._flops, self._peak = flops_per_token / devices, peak
        self._time, self._tokens = time.perf_counter(), 0.0
        self._latest: Arrays = {}

    def count(self, metrics: Arrays) -> None:
        self._tokens += float(metrics["tokens"])
        self._latest = metrics

    def read(self, epoch: float) -> dict[str, float]:
        now = time.perf_counter()
        hidden = ("tokens", "skipped_in_a_row", "token")
        row = {name: float(value) for name, value in self._latest.items() if name not in hidden}
        speed = self._tokens / (now - self._time)
        row |= {"tokens_per_second": speed, "tflops_per_device": speed * self._flops / 1e12}
        if self._peak:
            row["mfu"] = speed * self._flops / self._peak
        self._time, self._tokens = now, 0.0
        return row | {"epoch": epoch}


def _meter(state: TrainState, settings: PhaseConfig, mesh: Mesh | None) -> Meter:
    frozen = settings.optimizer.freeze_embeddings
    flops = model_flops(state.model.config, settings.seq_len, frozen_head=frozen)
    devices = [jax.devices()[0]] if mesh is None else mesh.devices.ravel().tolist()
    return Meter(flops, len(devices), peak_flops(devices[0].device_kind))
