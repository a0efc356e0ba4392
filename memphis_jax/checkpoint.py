"""Checkpoints: orbax folders that carry weights, train state, data position, config and tokenizer.

    FOLDER/checkpoints/STEP/params   {leaf name: array}, the weights alone
                            train    {leaf name: array}, optimizer state, step, RNG (trainers only)
                            meta     JSON: {"model": ModelConfig fields, ...}
    FOLDER/tokenizer/                tokenizer.json and its companions

A training workdir and the output of `python -m convert from-hf` are both such a FOLDER, so either
starts a training, feeds the sampler, or is exported. Saved names are plain strings: nothing on disk
depends on flax's or optax's classes, nor on the mesh: all hosts write their parts of an array, and
any mesh reads them. Imports `memphis_jax.config`, `model` and `sharding`.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from memphis_jax.config import ModelConfig, build
from memphis_jax.model import StableLM, abstract, flatten, leaf_name, unflatten
from memphis_jax.sharding import state_sharding

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every step of every save
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # all arrays of a save that has failed


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or cannot be used; the message names the folder."""


_WRITE_AGAIN = "make room on its disk, and the same command goes on from the last whole checkpoint"


class _Writing(ocp.CheckpointManager):
    """Names the folder where saving fails; what fails in the background, at the next save."""

    def save(self, *args: Any, **options: Any) -> bool:
        with _told(f"{self.directory.parent}: a checkpoint cannot be saved", _WRITE_AGAIN):
            return super().save(*args, **options)

    def close(self) -> None:
        with _told(f"{self.directory.parent}: a checkpoint cannot be saved", _WRITE_AGAIN):
            super().close()


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """A CheckpointError of one line for whatever orbax raises."""
    try:
        yield
    except (MemoryError, CheckpointError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of any class, with paths and a description of the array in pages
        told = " ".join(str(error).split()).partition(" [")[0]  # then TensorStore's specification
        told = told if len(told) <= 200 else f"{told[:70]} ... {told[-110:]}"
        raise CheckpointError(f"{what} ({told}): {remedy}") from error


def open_manager(folder: str | Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    """Orbax manager of FOLDER/checkpoints, saving asynchronously; `keep` None opens for reading."""
    path = Path(folder).absolute() / "checkpoints"
    if keep is None:
        return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(read_only=True))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    # Weights hardly compress (by 8 %), which costs every restore and export more than the bytes.
    items = {
        "params": ocp.PyTreeCheckpointHandler(use_compression=False),
        "train": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }
    return _Writing(path, options=options, item_handlers=items)


def latest_step(folder: str | Path) -> int:
    """The newest complete step of FOLDER. Raises CheckpointError where there is none."""
    step = None
    if (Path(folder) / "checkpoints").is_dir():
        with open_manager(folder) as manager:
            step = manager.latest_step()
    if step is None:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint under checkpoints/; make one with "
            f"`python -m convert from-hf HF_FOLDER {folder}` or with `memphis train`"
        )
    return step


def save(
    manager: ocp.CheckpointManager,
    step: int,
    model: StableLM,
    meta: dict[str, Any],
    train: Any = None,
) -> None:
    """Saves in the background; `meta["model"]` is filled in. `train` is any pytree of arrays.

    A chunk of a stacked leaf [L, ...] holds one layer: an export reads one at a time.
    """
    meta = {**meta, "model": dataclasses.asdict(model.config)}
    leaves = flatten(model)
    chunks = {name: _chunks(leaf) for name, leaf in leaves.items()}
    items: dict[str, Any] = {
        "params": ocp.args.PyTreeSave(leaves, save_args=chunks),
        "meta": ocp.args.JsonSave(meta),
    }
    if train is not None:
        items["train"] = ocp.args.StandardSave(name_leaves(train))
    manager.save(step, args=ocp.args.Composite(**items))


def _chunks(leaf: jax.Array) -> ocp.SaveArgs:
    if leaf.ndim < 3:  # a kernel of no layer, or a vector of all
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=leaf.nbytes // len(leaf), shard_axes=(0,))


def read_meta(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The JSON saved beside the weights of FOLDER, at its latest step by default.

    Raises CheckpointError where it cannot be read.
    """
    step = latest_step(folder) if step is None else step
    with reading(folder, step), open_manager(folder) as manager:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(meta.get("model"), dict):
            raise ValueError("its meta names no model")
        return meta


@contextmanager
def reading(folder: str | Path, step: int) -> Iterator[None]:
    """Names FOLDER and the step in a CheckpointError for whatever orbax makes of damage."""
    what = f"{folder}: step {step} cannot be read, it is cut off or damaged"
    gone = Path(folder) / "checkpoints" / str(step)
    with _told(what, f"copy it again, or delete {gone} to use the step before it"):
        yield


def read_model_config(meta: dict[str, Any], folder: str | Path) -> ModelConfig:
    """Of the model that `meta` was saved with. Raises ConfigError where this program lacks it."""
    return build(ModelConfig, meta["model"], f"{folder}: model")


def restore_model(
    folder: str | Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[StableLM, dict[str, Any]]:
    """(model in `dtype`, meta) of the latest step of FOLDER, laid out over `mesh`.

    None is the default device. The mesh it was saved on does not matter: each device reads its own
    parts.

    Raises CheckpointError where FOLDER holds no checkpoint or a damaged one, and ConfigError where
    its model does not fit this program.
    """
    step = latest_step(folder)
    meta = read_meta(folder, step)
    leaves = flatten(abstract(read_model_config(meta, folder)))
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(leaves, device)
    else:
        places = state_sharding(leaves, mesh)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=places[name])
        for name, leaf in leaves.items()
    }
    with reading(folder, step), open_manager(folder) as manager:
        args = ocp.args.Composite(params=ocp.args.StandardRestore(wanted))
        params = manager.restore(step, args=args).params
    return unflatten(read_model_config(meta, folder), params), meta


def restore_train(folder: str | Path, like: Any, step: int | None = None) -> Any:
    """The train state of FOLDER in the structure, shapes, dtypes and shardings of `like`."""
    step = latest_step(folder) if step is None else step
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [leaf_name(path) for path, _ in leaves]
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    }
    with reading(folder, step), open_manager(folder) as manager:
        args = ocp.args.Composite(train=ocp.args.StandardRestore(wanted))
        saved = manager.restore(step, args=args).train
    return jax.tree_util.tree_unflatten(treedef, [saved[name] for name in names])


def has_train(folder: str | Path) -> bool:
    """Whether FOLDER was written by a trainer, rather than converted from Hugging Face."""
    return (Path(folder) / "checkpoints" / str(latest_step(folder)) / "train").is_dir()


def name_leaves(tree: Any) -> dict[str, Any]:
    """Any pytree -> {leaf name: leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copies the tokenizer files found in `source` into FOLDER/tokenizer (replacing it)."""
    source, target = Path(source), Path(folder) / "tokenizer"
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} has no tokenizer.json")
    if source.resolve() == target.resolve():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
