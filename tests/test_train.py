"""The loop: what one step changes, what stops it, and that an interruption leaves no trace."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same_bits,
    logged,
    named_leaves,
    random_example,
    random_group,
    tiny_model,
)
from jax.experimental.compilation_cache import compilation_cache

from memphis_jax import checkpoint
from memphis_jax.config import ComputeConfig, ConfigError, OptimizerConfig, PhaseConfig
from memphis_jax.data.loader import Batch, Loader, rank_loader, sft_loader
from memphis_jax.model import StableLM
from memphis_jax.optimizer import cosine_schedule, is_embedding, make_optimizer
from memphis_jax.train import Meter, TrainingStopped, run
from memphis_jax.train_step import TrainState, init_state, make_step, objective, train_step

pytestmark = pytest.mark.slow  # compiles much; `make check` leaves it out

SEQ_LEN = 24
COMPUTE = ComputeConfig(remat="none", logprob_chunk=64)
SETTINGS = PhaseConfig(
    epochs=2,
    batch_size=4,
    accumulation=2,
    seq_len=SEQ_LEN,
    neftune_alpha=5.0,
    rank_weight=5.0,
    checkpoint_every=3,
    keep_checkpoints=2,
    log_every=2,
    optimizer=OptimizerConfig(learning_rate=1e-3, momentum=0.5),
)
SMALL: dict[str, Any] = {"use_qkv_bias": False, "qk_layernorm": False}
EMBEDDINGS = {"embed_tokens", "lm_head/kernel"}


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `memphis train` has one: every run would compile the same step again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.3), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def make_loader(phase: str = "sft") -> Loader:
    """Eight or so steps of unequal examples."""
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "batch_size": SETTINGS.batch_size,
        "accumulation": SETTINGS.accumulation,
        "epochs": SETTINGS.epochs,
        "seed": 1,
    }
    if phase == "rank":
        return rank_loader([random_group(rng, rng.integers(3, 12, 3)) for _ in range(14)], **sizes)
    return sft_loader([random_example(rng, int(n)) for n in rng.integers(3, 25, 30)], **sizes)


def fresh_state(settings: PhaseConfig = SETTINGS) -> TrainState:
    return init_state(tiny_model(**SMALL), settings, seed=3)


def train(workdir: Path, phase: str = "sft", **changes: Any) -> TrainState:
    loader = changes.pop("loader", None) or make_loader(phase)
    settings = dataclasses.replace(SETTINGS, **changes)
    return run(
        phase,
        workdir,
        loader,
        fresh_state(settings),
        settings=settings,
        compute=COMPUTE,
        identity={"settings": dataclasses.asdict(settings)},
    )


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def poisoned(loader: Loader, steps: set[int]) -> Loader:
    """In these steps (from 1) a target lies outside the vocabulary, whose logprob is NaN."""

    def batch_at(step: int) -> Batch:
        batch = loader[step]
        if step + 1 in steps:
            where = np.argwhere(batch["loss_mask"])[0]
            batch["targets"][tuple(where)] = 10_000
        return batch

    return Loader(loader.num_steps, batch_at)


class Crash(Exception):
    pass


def crashing(loader: Loader, at: int) -> Loader:
    def batch_at(step: int) -> Batch:
        if step == at:
            raise Crash
        return loader[step]

    return Loader(loader.num_steps, batch_at)


# --- one step


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_moves_every_trained_leaf_by_rate_times_direction(frozen: bool) -> None:
    optimizer = dataclasses.replace(SETTINGS.optimizer, freeze_embeddings=frozen)
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    num_steps = make_loader().num_steps
    step = make_step("sft", settings, COMPUTE, num_steps)
    before = named_leaves(tiny_model(**SMALL))
    given = fresh_state(settings)
    given = dataclasses.replace(given, step=given.step + 4)
    state, metrics = step(given, make_loader()[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))  # donated
    after = named_leaves(state.model)
    moved = {name for name in before if (after[name] != before[name]).any()}
    assert moved == before.keys() - (EMBEDDINGS if frozen else set())
    rate = float(cosine_schedule(1e-3, num_steps, settings.optimizer.warmup_ratio)(4))
    assert float(metrics["learning_rate"]) == pytest.approx(rate)
    assert int(state.step) == 5
    for name in moved:  # (1 - momentum) * the first direction, whose size is the buffer's
        buffer = named_leaves(state.opt_state)[
            next(key for key in named_leaves(state.opt_state) if key.endswith(f"momentum/{name}"))
        ]
        np.testing.assert_allclose(before[name] - after[name], rate * buffer, atol=2e-7)


def test_gradients_and_the_new_state_are_laid_out() -> None:
    placed: set[type] = set()
    given = objective("sft", SETTINGS, COMPUTE, None)
    given["place"] = lambda tree: placed.add(type(tree)) or tree
    given |= {"optimizer": make_optimizer(SETTINGS.optimizer), "schedule": lambda _: 1e-3}
    step = partial(train_step, **given, freeze=is_embedding)
    jax.eval_shape(step, fresh_state(SETTINGS), make_loader()[0])
    assert placed == {StableLM, TrainState}


def test_noise_differs_by_step_and_by_seed() -> None:
    step = make_step("sft", SETTINGS, COMPUTE, make_loader().num_steps)
    batch = make_loader()[0]

    def loss(seed: int, number: int) -> float:
        state = init_state(tiny_model(**SMALL), SETTINGS, seed)
        state = dataclasses.replace(state, step=state.step + number)
        return float(step(state, batch)[1]["loss"])

    assert loss(3, 0) == loss(3, 0)
    assert len({loss(3, 0), loss(3, 1), loss(4, 0)}) == 3


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    batch = make_loader()[0]
    train(
        tmp_path,
        loader=Loader(30, lambda _: batch),
        optimizer=OptimizerConfig("adamw", 0.03, freeze_embeddings=False),
    )
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


# --- metrics


def test_metrics_of_a_rank_run(tmp_path: Path) -> None:
    train(tmp_path, "rank", log_every=1)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, make_loader("rank").num_steps + 1))
    for row in found:
        assert row["rank_margin"] == pytest.approx(
            row["chosen_logprob"] - row["rejected_logprob"], abs=1e-5
        )
        assert row["loss"] == pytest.approx(row["ce"] + 5 * row["rank_loss"], rel=1e-6)
        assert 0 < row["padding_share"] < 1
        assert row["tokens_per_second"] > 0
        # 6 x 2 layers of (q, o: 2 x 16^2; k, v: 2 x 16 x 8; MLP: 3 x 16 x 24), 4 x the head's 976
        # (frozen), 6 x 2 layers x 24 positions x 16 of attention.
        flops = 6 * 2 * (512 + 256 + 1152) + 4 * 976 + 4608
        assert row["tflops_per_device"] == pytest.approx(row["tokens_per_second"] * flops / 1e12)
        assert row["grad_norm"] > 0
    assert found[-1]["epoch"] == SETTINGS.epochs
    assert any((tmp_path / "tensorboard").iterdir())


def test_speed_is_per_device_and_a_share_of_its_peak() -> None:
    meter = Meter(flops_per_token=8e9, devices=4, peak=1e13)
    meter.count({"tokens": jnp.float32(1000)})
    row = meter.read(epoch=0.5)
    assert row["tflops_per_device"] == pytest.approx(row["tokens_per_second"] * 8e9 / 4 / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops_per_device"] / 10)


# --- steps that are not finite


def test_a_phase_that_trained_nothing_is_no_success(tmp_path: Path) -> None:
    loader = poisoned(Loader(2, make_loader().batch_at), {1, 2})
    for _ in range(2):  # nor when it is started again
        with pytest.raises(TrainingStopped, match="in any of the 2 steps: nothing was trained"):
            train(tmp_path, loader=loader)


def test_a_converted_model_is_no_run(tmp_path: Path) -> None:
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 0, tiny_model(**SMALL), {})
    with pytest.raises(ConfigError, match="holds a converted model and no run"):
        train(tmp_path)


def test_a_poisoned_step_is_skipped_and_counted(tmp_path: Path) -> None:
    loader = make_loader()
    assert loader.num_steps >= 8
    state = train(tmp_path, loader=poisoned(loader, {2, 4, 5}), log_every=1)
    assert int(state.skipped) == 3
    assert int(state.skipped_in_a_row) == 0
    assert all(np.isfinite(leaf).all() for leaf in named_leaves(state.model).values())
    skipped = [row["skipped_steps"] for row in rows(tmp_path)]
    assert skipped == [0, 1, 1, 2, *[3] * (loader.num_steps - 4)]
    lost = [row["step"] for row in rows(tmp_path) if row["loss"] is None]
    assert lost == [2, 4, 5]  # JSON has no NaN


def test_a_skipped_step_changes_nothing_but_the_counters() -> None:
    state, batch = fresh_state(), poisoned(make_loader(), {1})[0]
    before = jax.tree.map(np.array, state)
    after, _ = make_step("sft", SETTINGS, COMPUTE, make_loader().num_steps)(state, batch)
    assert_same_bits(after.model, before.model)
    assert_same_bits(after.opt_state, before.opt_state)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)


def test_three_in_a_row_stop_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    good = train(tmp_path / "good", loader=poisoned(make_loader(), {1}), checkpoint_every=2)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row, up to step 5.*learning rate"):
        train(tmp_path / "bad", loader=poisoned(make_loader(), {1, 3, 4, 5}), checkpoint_every=99)
    assert int(good.skipped) == 1
    assert checkpoint.latest_step(tmp_path / "bad") == 5
    saved, _ = checkpoint.restore_model(tmp_path / "bad")
    assert_same_bits(saved, _state_after_two(poisoned(make_loader(), {1})).model)


def _state_after_two(loader: Loader) -> TrainState:
    step = make_step("sft", SETTINGS, COMPUTE, loader.num_steps)
    state = fresh_state()
    for number in range(2):
        state, _ = step(state, loader[number])
    return state


def test_a_stopped_run_does_not_pass_for_finished(tmp_path: Path) -> None:
    """Three bad steps at the very end: started again, it must not report success."""
    loader = make_loader()
    last = loader.num_steps
    bad = poisoned(loader, {last - 2, last - 1, last})
    for _ in range(2):
        with pytest.raises(TrainingStopped):
            train(tmp_path, loader=bad)


def test_an_absurd_learning_rate_stops_with_finite_weights(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=1e38, warmup_ratio=0.0)
    with pytest.raises(TrainingStopped):
        train(tmp_path, optimizer=optimizer)
    saved, _ = checkpoint.restore_model(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in named_leaves(saved).values())


# --- interruption


@pytest.mark.parametrize("phase", ["sft", "rank"])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, phase: str) -> None:
    loader = make_loader(phase)
    whole = train(tmp_path / "whole", phase)
    for at in (1, 5):  # before the first checkpoint, and between two
        with pytest.raises(Crash):
            train(tmp_path / "cut", phase, loader=crashing(loader, at))
    resumed = train(tmp_path / "cut", phase)
    assert_same_bits(resumed, whole)
    assert_same_bits(checkpoint.restore_model(tmp_path / "cut")[0], whole.model)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_a_half_written_row_of_metrics_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path / "cut", loader=crashing(make_loader(), 5))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(tmp_path / "cut")
    train(tmp_path / "whole")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = train(tmp_path)
    saved = (tmp_path / "metrics.jsonl").read_bytes()
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    again = train(tmp_path)
    assert_same_bits(again, first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == saved
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == steps


def test_another_config_is_refused_and_the_differences_listed(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, loader=crashing(make_loader(), 5))
    optimizer = dataclasses.replace(SETTINGS.optimizer, learning_rate=2e-3)
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, mixce_eta=0.5, optimizer=optimizer)
    for line in ("settings.mixce_eta: 1.0 -> 0.5", "learning_rate: 0.001 -> 0.002"):
        assert line in str(caught.value)
    assert "momentum" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_every=1, keep_checkpoints=2)
    last = make_loader().num_steps
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {last - 1, last}
