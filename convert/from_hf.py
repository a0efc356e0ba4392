"""HF folder -> checkpoint folder (see `memphis_jax.checkpoint`), or straight to a model.

The bits and the dtype of the source are kept. The checkpoint is written leaf by leaf: memory holds
one stacked leaf (of the 3B: the 1.1 GB of 32 bfloat16 `up_proj`) and one tensor, not the model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from convert.hf_folder import DTYPES, Progress, Stored, bits, open_folder, published
from convert.mapping import Place, by_leaf, places, transpose_into
from memphis_jax.checkpoint import copy_tokenizer, read_meta
from memphis_jax.model import StableLM, unflatten


def from_hf(
    hf: str | Path, checkpoint: str | Path, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Writes the model (and the tokenizer, where there is one) of an HF folder as step 0.

    Returns {"leaves", "tensors", "bytes", "dtype", "tokenizer"} of what was written. An existing
    `checkpoint` is replaced only if it is an earlier conversion. Raises ConfigError or ConvertError
    before anything is written.
    """
    hf, checkpoint = Path(hf), Path(checkpoint)
    config, stored = open_folder(hf)
    leaves = by_leaf(places(config))
    dtypes = sorted({DTYPES[tensor.dtype].name for tensor in stored.values()})
    tokenizer = (hf / "tokenizer.json").is_file()
    meta = {
        "model": dataclasses.asdict(config),
        "converted_from": {"hf_folder": str(hf.resolve()), "dtypes": dtypes},
    }
    with published(checkpoint, is_conversion, "an earlier conversion") as folder:
        if tokenizer:
            copy_tokenizer(hf, folder)
        _save(folder, leaves, stored, meta, progress)
    return {
        "leaves": len(leaves),
        "tensors": len(stored),
        "bytes": sum(int(np.prod(t.shape)) * DTYPES[t.dtype].itemsize for t in stored.values()),
        "dtype": " and ".join(dtypes),
        "tokenizer": tokenizer,
    }


def load_hf(folder: str | Path, dtype: str = "float32") -> StableLM:
    """The model of an HF folder with parameters in `dtype`, on the default device.

    Raises ConfigError or ConvertError for a folder that `from_hf` would refuse.
    """
    config, stored = open_folder(folder)
    leaves = by_leaf(places(config))
    arrays = {
        leaf: jnp.asarray(stack(table, stored)).astype(dtype) for leaf, table in leaves.items()
    }
    return unflatten(config, arrays)


def stack(table: dict[str, Place], stored: dict[str, Stored]) -> np.ndarray:
    """One leaf, in the dtype of its tensors; `table` holds that leaf's tensors and no others."""
    dtype, shape = _leaf_kind(table, stored)
    out = np.empty(shape, f"u{dtype.itemsize}")
    for name, place in table.items():
        value = bits(stored[name].read())
        if place.transposed:
            transpose_into(out[place.index], value)
        else:
            out[place.index] = value
    return out.view(dtype)


def is_conversion(checkpoint: Path) -> bool:
    """Whether a folder is what `from_hf` wrote, without any training since."""
    steps = checkpoint / "checkpoints"
    if not steps.is_dir() or [path.name for path in steps.iterdir()] != ["0"]:
        return False
    return "converted_from" in read_meta(checkpoint, 0)


def _leaf_kind(table: dict[str, Place], stored: dict[str, Stored]) -> tuple[np.dtype, tuple]:
    name, place = list(table.items())[-1]  # the last has the highest index on every axis
    rest = place.shape[::-1] if place.transposed else place.shape
    return DTYPES[stored[name].dtype], (*(i + 1 for i in place.index), *rest)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Stands for an array in the tree given to orbax, which asks for `load()` when it writes it."""

    load: Callable[[], np.ndarray]


class _OneLeafAtATime(type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, fed with one array after another instead of all at once."""

    async def serialize(
        self,
        values: Sequence[_Leaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> list[ocp.future.Future]:
        for leaf, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            for write in await super().serialize([leaf.load()], [info], arg and [arg]):
                write.result()
        return []  # nothing is left to wait for


def _save(
    folder: Path,
    leaves: dict[str, dict[str, Place]],
    stored: dict[str, Stored],
    meta: dict[str, Any],
    progress: Progress,
) -> None:
    done = 0

    def load(table: dict[str, Place]) -> np.ndarray:
        nonlocal done
        progress(done, len(leaves))
        done += 1
        return stack(table, stored)

    handler = _OneLeafAtATime(deepcopy_host_arrays=False)
    registry = type_handlers.create_type_handler_registry((_Leaf, handler))
    # Weights hardly compress; without compression, writes need no second copy and are faster.
    params = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    items = {"params": params, "meta": ocp.JsonCheckpointHandler()}
    # Not asynchronous: the handler above waits for its writes.
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    tree = {leaf: _Leaf(partial(load, table)) for leaf, table in leaves.items()}
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta))
    manager = ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=items)
    with manager:
        manager.save(0, args=args)
    progress(len(leaves), len(leaves))
