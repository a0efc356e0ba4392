"""HF folder -> checkpoint folder (see `memphis_jax.checkpoint`), or straight to a model.

The bits and the dtype of the source are kept. A stacked kernel is written layer by layer, each a
chunk of the checkpoint: memory holds two of the largest tensors, never a whole stack.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from convert.direct import NewFile
from convert.hf_folder import DTYPES, Progress, Stored, open_folder, published
from convert.mapping import Place, by_leaf, places, transpose_into
from convert.raw import block_buffer, blocks, in_order, threads, transposed_block
from convert.weights import chunk_file, is_raw
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
    with published(checkpoint, hf, is_conversion, "an earlier conversion") as folder:
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
        if place.transposed:
            transpose_into(out[place.index], stored[name].read())
        else:
            out[place.index] = stored[name].read()
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
    """Stands for an array in the tree given to orbax."""

    table: dict[str, Place]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:  # orbax asks
        return int(np.prod(self.shape))

    @property
    def chunks(self) -> list[list[tuple[str, Place]]]:
        """The tensors of each chunk: one layer of a stacked kernel, or all."""
        tensors = list(self.table.items())
        return [[one] for one in tensors] if tensors[0][1].transposed else [tensors]


class _LeavesAsFiles(type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays: orbax makes their metadata, and the chunks are ours.

    `_open_and_write` is orbax's own; a test restores what was written here by orbax itself.
    """

    def __init__(self, stored: dict[str, Stored], progress: Progress):
        super().__init__(deepcopy_host_arrays=False)
        self._stored, self._progress = stored, progress
        self._opened: list[tuple[_Leaf, Any]] = []

    async def _open_and_write(
        self, value: Any, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        rows = value.shape[0] // len(value.chunks)
        tspec["metadata"]["chunks"] = (rows, *value.shape[1:])
        spec = tensorstore.Spec(tspec)
        store = await tensorstore.open(spec, create=True, open=True, context=ts_context)
        assert is_raw(store), tspec
        self._opened.append((value, store))

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> list[ocp.future.Future]:
        for opening in await super().serialize(values, infos, args):
            opening.result()
        self._write()
        return []  # nothing is left to wait for

    def _write(self) -> None:
        jobs = []
        for leaf, store in self._opened:
            size = leaf.dtype.itemsize * leaf.size // len(leaf.chunks)
            for row, tensors in enumerate(leaf.chunks):
                jobs.append((size, partial(self._write_chunk, tensors, chunk_file(store, row)[0])))
        jobs.sort(key=lambda job: -job[0])  # the largest alone at the end would be waited for
        with threads() as pool:
            for done, _ in enumerate(in_order(pool, jobs, 2 * jobs[0][0])):
                self._progress(done, len(jobs))
        self._progress(len(jobs), len(jobs))

    def _write_chunk(self, tensors: list[tuple[str, Place]], path: Path) -> None:
        with NewFile(path) as file:
            for name, place in tensors:
                value = self._stored[name].read()
                if place.transposed:
                    buffer = block_buffer(value)
                    for columns in blocks(value):
                        file.write(transposed_block(value, columns, buffer))
                else:
                    file.write(value)


def _save(
    folder: Path,
    leaves: dict[str, dict[str, Place]],
    stored: dict[str, Stored],
    meta: dict[str, Any],
    progress: Progress,
) -> None:
    registry = type_handlers.create_type_handler_registry((_Leaf, _LeavesAsFiles(stored, progress)))
    # Not OCDBT: its chunks lie in shared files, which nobody else can read or write.
    params = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, use_ocdbt=False
    )
    items = {"params": params, "meta": ocp.JsonCheckpointHandler()}
    # Not asynchronous: the handler above waits for its writes.
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    tree = {leaf: _Leaf(table, *_leaf_kind(table, stored)) for leaf, table in leaves.items()}
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta))
    manager = ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=items)
    with manager:
        manager.save(0, args=args)
