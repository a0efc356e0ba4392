"""Training, SFT and rank: TrainState, one step, one loop.

A workdir that already holds checkpoints is resumed, to the bit, if its config is the same, and
refused otherwise. `memphis train --help` is the stage that `memphis rounds` runs.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from memphis_jax import checkpoint
from memphis_jax.config import ComputeConfig, ConfigError, ModelConfig, PhaseConfig
from memphis_jax.data.loader import Loader
from memphis_jax.errors import Stopped
from memphis_jax.fields import difference
from memphis_jax.metrics import MetricsWriter
from memphis_jax.model import StableLM, abstract
from memphis_jax.objectives import Arrays, Sums, SumsFn, objective_weights, rank_sums, sft_sums
from memphis_jax.optimizer import combine, cosine_schedule, is_embedding, make_optimizer, partition
from memphis_jax.parallel import make_ops
from memphis_jax.runtime import Preemption, is_first, same_on_all_hosts
from memphis_jax.sharding import global_batch, state_sharding

MAX_SKIPPED_IN_A_ROW = 3
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # Without it a TPU's compiler cuts each product with gathered weights into one per device, whose
    # sums go through memory: three times the HBM traffic and 2 GB more (3B, v5e:4x4; docs/plan.md).
    # MaxText sets the same.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    # One product after another, each on all cores (docs/performance.md, "Training step").
    "cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
}


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and where the last good state is."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "model", "opt_state", "key", "skipped", "skipped_in_a_row"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32, optimizer steps done, skipped ones counted
    model: StableLM  # float32 parameters
    opt_state: optax.OptState
    key: jax.Array  # raw PRNG key of the run; a step's noise is a function of (key, step)
    skipped: jax.Array  # int32, steps with a loss or gradient that was not finite
    skipped_in_a_row: jax.Array

    def without_model(self) -> dict[str, Any]:
        """What is saved beside the weights."""
        names = ("step", "opt_state", "key", "skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names}


def loss_and_gradients(
    trainable: Any,
    frozen: Any,
    batch: Arrays,
    key: jax.Array,
    *,
    sums_fn: SumsFn,
    coefficients: dict[str, float],
    place: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Sums, Any]:
    """(sums added over the micro-batches [A, ...], gradient of the whole batch's objective).

    The objective is  sum over names of coefficient * sum / weight, each weight the whole batch's,
    so that accumulating A micro-batches equals one batch of all their rows.
    """
    weights = objective_weights(batch)

    def objective(trainable: Any, micro: Arrays, key: jax.Array) -> Any:
        sums = sums_fn(combine(trainable, frozen), micro, key)
        parts = [
            coefficient * sums[name][0] / jnp.maximum(weights[name], 1.0)
            for name, coefficient in coefficients.items()
        ]
        return sum(parts), sums

    def micro_step(micro: Arrays, key: jax.Array) -> tuple[Sums, Any]:
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(trainable, micro, key)
        return sums, place(gradients)

    micro_batches = batch["tokens"].shape[0]
    if micro_batches == 1:
        return micro_step(jax.tree.map(lambda leaf: leaf[0], batch), key)
    keys = jax.random.split(key, micro_batches)
    shapes = jax.eval_shape(micro_step, jax.tree.map(lambda leaf: leaf[0], batch), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro_step(*xs)), None

    return jax.lax.scan(add, zeros, (batch, keys))[0]


def train_step(
    state: TrainState,
    batch: Arrays,
    *,
    sums_fn: SumsFn,
    coefficients: dict[str, float],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    freeze: Callable[[str], bool],
    place: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, Arrays]:
    """One optimizer step on a batch [A, ...]; a step that is not finite changes no weight.

    `place` lays a tree that is named like the state, gradients too, out as the state lies.
    """
    trainable, frozen = partition(state.model, freeze)
    key = jax.random.fold_in(state.key, state.step)
    sums, gradients = loss_and_gradients(
        trainable, frozen, batch, key, sums_fn=sums_fn, coefficients=coefficients, place=place
    )
    metrics = {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in sums.items()}
    loss = jnp.stack([c * metrics[name] for name, c in coefficients.items()]).sum()
    norm = optax.tree.norm(gradients)
    rate = schedule(state.step)
    directions, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    updated = jax.tree.map(lambda p, m: p - rate * m, trainable, directions)

    update_norm = rate * optax.tree.norm(directions)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    bad = (~finite).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        model=combine(jax.tree.map(keep, updated, trainable), frozen),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        key=state.key,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )
    metrics |= {"loss": loss, "grad_norm": norm, "learning_rate": rate}
    counters = {
        "skipped_steps": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
        "tokens": sums["padding_share"][1] - sums["padding_share"][0],
    }
    return place(new_state), metrics | counters


def make_step(
    phase: str,
    settings: PhaseConfig,
    compute: ComputeConfig,
    num_steps: int,
    mesh: Mesh | None = None,
) -> Any:
    """The jitted `train_step` of a phase, "sft" or "rank"; it donates the state it is given.

    (state, batch) -> (state, metrics). On a mesh the state lies as `state_sharding` says, before
    and after, and the batch as `batch_sharding` says; without one, on a single device. The devices
    of the mesh may be those of a TPU that is only compiled for.
    """
    optimizer = settings.optimizer
    step = partial(
        train_step,
        **objective(phase, settings, compute, mesh),
        optimizer=make_optimizer(optimizer),
        schedule=cosine_schedule(optimizer.learning_rate, num_steps, optimizer.warmup_ratio),
        freeze=is_embedding if optimizer.freeze_embeddings else lambda _: False,
    )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(step, donate_argnums=0, compiler_options=COMPILER_OPTIONS.get(platform))


def objective(
    phase: str, settings: PhaseConfig, compute: ComputeConfig, mesh: Mesh | None
) -> dict[str, Any]:
    """What `loss_and_gradients` takes beside arrays: the phase's losses, computed on a mesh."""
    forward: dict[str, Any] = {
        "dtype": compute.dtype,
        "remat": compute.remat,
        "logprob_chunk": compute.logprob_chunk,
        "neftune_alpha": settings.neftune_alpha,
        "mixce_eta": settings.mixce_eta,
        "ops": make_ops(mesh, compute.attention),
    }
    coefficients = {"token": 1.0}
    if phase == "rank":
        coefficients["rank_loss"] = settings.rank_weight
    return {
        "sums_fn": partial(rank_sums if phase == "rank" else sft_sums, **forward),
        "coefficients": coefficients,
        "place": (lambda tree: tree) if mesh is None else partial(_place, mesh=mesh),
    }


def _place(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh))


def init_state(
    model: StableLM, settings: PhaseConfig, seed: int, mesh: Mesh | None = None
) -> TrainState:
    """Step 0 on given weights, with fresh optimizer statistics; on a mesh, laid out over it."""

    def rest(model: StableLM) -> dict[str, Any]:
        freeze = is_embedding if settings.optimizer.freeze_embeddings else lambda _: False
        trainable, _ = partition(model, freeze)
        return {
            "step": jnp.zeros([], jnp.int32),
            "opt_state": make_optimizer(settings.optimizer).init(trainable),
            "key": jax.random.PRNGKey(seed),
            "skipped": jnp.zeros([], jnp.int32),
            "skipped_in_a_row": jnp.zeros([], jnp.int32),
        }

    if mesh is None:
        return TrainState(model=model, **rest(model))
    # Without out_shardings the moments would be whole on every device.
    shardings = state_sharding(jax.eval_shape(rest, model), mesh)
    return TrainState(model=model, **jax.jit(rest, out_shardings=shardings)(model))


def abstract_state(model: ModelConfig, settings: PhaseConfig, mesh: Mesh) -> TrainState:
    """The TrainState of a model on a mesh as ShapeDtypeStruct with shardings: nothing allocated."""
    shapes = jax.eval_shape(lambda m: init_state(m, settings, 0), abstract(model))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


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
    ):
        meter, ended = Meter(), False
        while step < loader.num_steps and not ended:
            step += 1
            batch = next(batches)
            if mesh is not None:
                batch = global_batch(batch, mesh, jax.process_index())
            state, metrics = step_fn(state, batch)
            meter.count(metrics)
            last = step == loader.num_steps
            if writer and (last or step % settings.log_every == 0):
                writer.write(step, meter.read(step / loader.num_steps * settings.epochs))
            stop = int(metrics["skipped_in_a_row"]) >= MAX_SKIPPED_IN_A_ROW
            ended = preemption.asked(step) or stop
            if last or ended or step % settings.checkpoint_every == 0:
                meta = {"identity": identity, "loader": batches.get_state(), "step": step}
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
    """Metrics of the newest step, with tokens per second since the last reading."""

    def __init__(self) -> None:
        self._time, self._tokens = time.perf_counter(), 0.0
        self._latest: Arrays = {}

    def count(self, metrics: Arrays) -> None:
        self._tokens += float(metrics["tokens"])
        self._latest = metrics

    def read(self, epoch: float) -> dict[str, float]:
        now = time.perf_counter()
        hidden = ("tokens", "skipped_in_a_row", "token")
        row = {name: float(value) for name, value in self._latest.items() if name not in hidden}
        row |= {"tokens_per_second": self._tokens / (now - self._time), "epoch": epoch}
        self._time, self._tokens = now, 0.0
        return row
