"""What is saved comes back to the bit, and what cannot is refused by name."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, named_leaves, tiny_model

from convert.weights import open_checkpoint
from memphis_jax import checkpoint
from memphis_jax.checkpoint import CheckpointError
from memphis_jax.config import ConfigError, OptimizerConfig, PhaseConfig
from memphis_jax.model import flatten, unflatten
from memphis_jax.train import carry_optimizer
from memphis_jax.train_step import TrainState, init_state

NAMES = ("adalite", "adamw")


def settings(name: str = "adalite", **options: Any) -> PhaseConfig:
    optimizer = OptimizerConfig(name=name, momentum=0.5, **options)
    return PhaseConfig(epochs=1, batch_size=1, seq_len=8, optimizer=optimizer)


def identity(phase: PhaseConfig) -> dict[str, Any]:
    """The part of what `memphis train` saves that names the optimizer."""
    return {"settings": dataclasses.asdict(phase)}


def filled_state(name: str = "adalite", seed: int = 0) -> TrainState:
    """A state whose every array holds numbers of its own."""
    state = init_state(tiny_model(), settings(name), seed=seed)
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(rng.uniform(1, 99, leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, state)


def save(folder: Path, step: int, state: TrainState, keep: int = 9, **meta: Any) -> None:
    with checkpoint.open_manager(folder, keep=keep) as manager:
        checkpoint.save(manager, step, state.model, meta, state.without_model())


@pytest.mark.parametrize("name", NAMES)
def test_everything_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    state = filled_state(name)
    save(tmp_path, 3, state, note="mine", nested={"a": [1, 2.5, None]})
    model, meta = checkpoint.restore_model(tmp_path)
    assert_same_bits(model, state.model)
    assert model.config == state.model.config
    assert meta["note"] == "mine"
    assert meta["nested"] == {"a": [1, 2.5, None]}
    blank = init_state(tiny_model(seed=1), settings(name), seed=5)
    restored = checkpoint.restore_train(tmp_path, blank.without_model())
    assert_same_bits(restored, state.without_model())
    assert jax.tree.structure(restored) == jax.tree.structure(state.without_model())
    assert checkpoint.has_train(tmp_path)


def test_the_newest_of_the_kept_steps_is_read(tmp_path: Path) -> None:
    states = {step: filled_state(seed=step) for step in (5, 9, 10)}
    for step, state in states.items():
        save(tmp_path, step, state, keep=2, note=step)
    assert checkpoint.latest_step(tmp_path) == 10
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "9"]
    assert_same_bits(checkpoint.restore_model(tmp_path)[0], states[10].model)
    assert checkpoint.read_meta(tmp_path, 9)["note"] == 9
    older = checkpoint.restore_train(tmp_path, states[5].without_model(), 9)
    assert_same_bits(older, states[9].without_model())


def test_bfloat16_weights_are_stored_so_and_read_as_float32(tmp_path: Path) -> None:
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model())
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 0, low, {})
    assert not checkpoint.has_train(tmp_path)
    assert_same_bits(checkpoint.restore_model(tmp_path, dtype="bfloat16")[0], low)
    wide, _ = checkpoint.restore_model(tmp_path)
    assert_same_bits(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low))


def test_saving_does_not_wait_and_is_not_torn(tmp_path: Path) -> None:
    """The next steps donate the arrays while they are being written."""
    state = filled_state()
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 1, state.model, {}, state.without_model())
        for _ in range(5):
            state = overwrite(state)
    assert_same_bits(checkpoint.restore_model(tmp_path)[0], expected.model)
    restored = checkpoint.restore_train(tmp_path, state.without_model())
    assert_same_bits(restored, expected.without_model())


@pytest.mark.parametrize("made", ["nothing", "folder", "checkpoints", "unfinished"])
def test_a_folder_without_a_complete_checkpoint_is_named(tmp_path: Path, made: str) -> None:
    folder = tmp_path / "run"
    if made != "nothing":
        folder.mkdir()
    if made in ("checkpoints", "unfinished"):
        (folder / "checkpoints").mkdir()
    if made == "unfinished":
        (folder / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    for read in (checkpoint.latest_step, checkpoint.restore_model, checkpoint.has_train):
        with pytest.raises(CheckpointError, match=f"{folder} holds no complete checkpoint"):
            read(folder)
    assert folder.exists() == (made != "nothing")  # looking creates nothing


@pytest.mark.parametrize("lost", ["meta", "meta/metadata", "params", "params/_METADATA", "data"])
def test_a_damaged_step_is_named(tmp_path: Path, lost: str) -> None:
    """What a copy that was cut off, or a full disk, leaves: each is another error of orbax."""
    save(tmp_path, 1, filled_state())
    step = tmp_path / "checkpoints" / "1"
    if lost == "data":
        for file in (step / "params").glob("ocdbt.*/d/*"):
            os.truncate(file, 9)
    elif (step / lost).is_dir():
        shutil.rmtree(step / lost)
    else:
        (step / lost).write_text("{}" if lost == "meta/metadata" else "")
    told = f"^{tmp_path}: step 1 cannot be read, .* or delete {step} to use the step before it$"
    with pytest.raises(CheckpointError, match=told):
        checkpoint.restore_model(tmp_path)
    if lost != "data":
        with pytest.raises(CheckpointError, match=told):
            open_checkpoint(tmp_path)


def test_a_save_that_fails_is_named_and_leaves_the_one_before(tmp_path: Path) -> None:
    """A full disk, by the limit of a file's size: orbax hears of it in the background."""
    first, limits = filled_state(), resource.getrlimit(resource.RLIMIT_FSIZE)
    save(tmp_path, 1, first)
    told = f"^{tmp_path}: a checkpoint cannot be saved .* make room on its disk"
    with pytest.raises(CheckpointError, match=told):  # noqa: SIM117
        with checkpoint.open_manager(tmp_path, keep=1) as manager:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
            try:
                checkpoint.save(manager, 2, tiny_model(seed=1), {})
                manager.close()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same_bits(checkpoint.restore_model(tmp_path)[0], first.model)


def test_a_checkpoint_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, filled_state())
    metadata = next((tmp_path / "checkpoints" / "1" / "meta").glob("metadata"))
    meta = json.loads(metadata.read_text())
    meta["model"]["rope_scalling"] = 2.0
    metadata.write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match=r"model\.rope_scalling is not a known field"):
        checkpoint.restore_model(tmp_path)


def test_leaves_that_do_not_fit_are_named() -> None:
    model = tiny_model()
    arrays = flatten(model)
    assert_same_bits(unflatten(model.config, arrays), model)
    arrays["layers/mlp/surplus"] = arrays.pop("norm/bias")
    with pytest.raises(ValueError, match=r"missing \['norm/bias'\].*\['layers/mlp/surplus'\]"):
        unflatten(model.config, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_statistics_are_carried_into_the_next_phase(tmp_path: Path, name: str) -> None:
    previous = filled_state(name)
    save(tmp_path, 7, previous, identity=identity(settings(name)))
    fresh = init_state(tiny_model(seed=2), settings(name), seed=4)
    carried = carry_optimizer(tmp_path, fresh, settings(name))
    assert_same_bits(carried.opt_state, previous.opt_state)
    for part in ("step", "model", "key", "skipped"):  # the rest is the new phase's
        assert_same_bits(getattr(carried, part), getattr(fresh, part))
    assert int(carried.step) == 0


def test_a_converted_folder_has_no_statistics_to_carry(tmp_path: Path) -> None:
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 0, tiny_model(), {})
    fresh = init_state(tiny_model(), settings(), seed=0)
    assert carry_optimizer(tmp_path, fresh, settings()) is fresh


@pytest.mark.parametrize("other", [settings("adamw"), settings(freeze_embeddings=False)])
def test_statistics_of_another_optimizer_are_refused(tmp_path: Path, other: PhaseConfig) -> None:
    save(tmp_path, 7, filled_state(), identity=identity(settings()))
    fresh = init_state(tiny_model(), other, seed=0)
    with pytest.raises(ConfigError, match=r"keep_optimizer_state: .* was trained with optimizer\."):
        carry_optimizer(tmp_path, fresh, other)


def test_the_tokenizer_is_copied_whole_and_replaced(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        checkpoint.copy_tokenizer(source, folder)
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "model.safetensors").write_text("weights")
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "merges.txt").write_text("stale")
    checkpoint.copy_tokenizer(source, folder)
    copied = sorted(path.name for path in (folder / "tokenizer").iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]
    checkpoint.copy_tokenizer(folder / "tokenizer", folder)  # onto itself: stays
    assert (folder / "tokenizer" / "tokenizer.json").is_file()


def test_every_leaf_has_a_name_of_its_own() -> None:
    state = filled_state().without_model()
    names = checkpoint.name_leaves(state)
    assert len(names) == len(jax.tree.leaves(state))
    assert named_leaves(state).keys() == names.keys()
