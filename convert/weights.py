"""The weights of a checkpoint, read from orbax's files piece by piece.

A leaf is cut into chunks. Those of `from_hf` are files of plain bytes, one for each layer, and are
read block by block. Those of a training are the shards of the mesh that saved it, one for each
layer of a kernel, in orbax's own files: reading goes chunk by chunk and keeps only what was asked
for.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from convert.hf_folder import DTYPES, ConvertError, bits
from convert.mapping import Place, transpose_into
from convert.raw import mapped
from memphis_jax.checkpoint import latest_step, read_meta, reading
from memphis_jax.config import ModelConfig, build
from memphis_jax.model import abstract, flatten

CODES = {dtype.name: code for code, dtype in DTYPES.items()}  # "bfloat16" -> "BF16"
_IN_FLIGHT = 32 * 2**20  # bytes of chunks read at once; a larger one is read alone

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The weights in one step of a checkpoint folder, not yet read."""

    folder: Path
    step: int
    config: ModelConfig
    dtypes: dict[str, np.dtype]  # of each leaf

    @property
    def step_folder(self) -> Path:
        return (self.folder / "checkpoints" / str(self.step)).absolute()

    def read(
        self, leaf: str, dtype: np.dtype, transposed: bool = False, rows: range | None = None
    ) -> np.ndarray:
        """The bits of a leaf, or of `rows` of its first axis, contiguous.

        Rounded to nearest even where `dtype` is narrower than the saved one; the last two axes
        swapped if `transposed`. Memory holds the result and one chunk, or 32 MiB of smaller ones.
        """
        store = self.open(leaf)
        rows = rows or range(store.shape[0])
        shape = (len(rows), *store.shape[1:])
        out = np.empty((*shape[:-2], *shape[:-3:-1]) if transposed else shape, f"u{dtype.itemsize}")
        view = out.swapaxes(-1, -2) if transposed else out  # in the leaf's orientation
        source = store if store.dtype.numpy_dtype == dtype else tensorstore.cast(store, dtype)
        for box, value in _read(source, _boxes(store, rows)):
            part = bits(value)
            target = view[slice(box[0].start - rows.start, box[0].stop - rows.start), *box[1:]]
            if transposed:
                for index in np.ndindex(*part.shape[:-2]):
                    transpose_into(target[index].T, part[index])
            else:
                target[...] = part
            del value, part  # before the next arrives
        return out

    def tensors(
        self, table: dict[str, Place], kinds: dict[str, np.dtype]
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """(bits, transposed still?) of HF tensors in the order of `table`, in dtypes of `kinds`.

        What a chunk of plain bytes holds is mapped as it lies in it. Otherwise those that share
        chunks are read at once, transposed by then; the caller lets go of one before the next.
        """
        stores = functools.cache(self.open)

        def chunk(place: Place) -> tuple[str, int]:
            rows = stores(place.leaf).chunk_layout.read_chunk.shape[0]
            return place.leaf, place.index[0] // rows if place.index else 0

        for (leaf, _), group in itertools.groupby(table.values(), chunk):
            members, store, dtype = list(group), stores(leaf), kinds[leaf]
            first, last = members[0].index, members[-1].index
            if store.dtype.numpy_dtype == dtype and is_raw(store):
                path, rows = chunk_file(store, first[0] if first else 0)
                whole = mapped(path, 0, (rows, *store.shape[1:]), f"u{dtype.itemsize}")
                for place in members:
                    at = (place.index[0] % rows, *place.index[1:]) if first else ()
                    yield whole[at], place.transposed
                del whole
                continue
            asked = range(first[0], last[0] + 1) if first else None
            read = self.read(leaf, dtype, members[0].transposed, asked)
            for place in members:
                at = (place.index[0] - first[0], *place.index[1:]) if first else ()
                yield read[at], False
            del read  # before the next is read

    def open(self, leaf: str) -> Any:
        """The leaf's TensorStore."""
        params = self.step_folder / "params"
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{params / leaf}/"}
        if (params / "manifest.ocdbt").is_file():
            kvstore = {"driver": "ocdbt", "base": params.as_uri() + "/", "path": f"{leaf}/"}
        return tensorstore.open({"driver": "auto", "kvstore": kvstore}, read=True).result()


def open_checkpoint(folder: str | Path, step: int | None = None) -> Checkpoint:
    """Opens a step (the latest), checking names and shapes of its leaves against its own config.

    Raises CheckpointError where there is no step or a damaged one, ConfigError for a model that
    this program does not know, ConvertError naming every missing, unknown or misshapen leaf.
    """
    folder = Path(folder)
    step = latest_step(folder) if step is None else step
    config = build(ModelConfig, read_meta(folder, step)["model"], f"{folder}: model")
    handler = ocp.PyTreeCheckpointHandler()
    with reading(folder, step), ocp.Checkpointer(handler) as checkpointer:
        path = (folder / "checkpoints" / str(step) / "params").absolute()
        saved = checkpointer.metadata(path).item_metadata.tree
    wanted = {leaf: tuple(array.shape) for leaf, array in flatten(abstract(config)).items()}
    problems = [f"missing: {leaf}" for leaf in wanted if leaf not in saved]
    problems += [f"unknown: {leaf}" for leaf in saved if leaf not in wanted]
    for leaf in wanted.keys() & saved.keys():
        shape, dtype = tuple(saved[leaf].shape), np.dtype(saved[leaf].dtype)
        if shape != wanted[leaf]:
            problems.append(f"wrong shape: {leaf} is {shape}, the config gives {wanted[leaf]}")
        if dtype.name not in CODES:
            problems.append(f"wrong dtype: {leaf} is {dtype.name}, not one of {', '.join(CODES)}")
    if problems:
        raise ConvertError(f"{folder} step {step} does not fit its config: {'; '.join(problems)}")
    return Checkpoint(folder, step, config, {leaf: np.dtype(saved[leaf].dtype) for leaf in wanted})


def is_raw(store: Any) -> bool:
    """Whether the chunks of a leaf are files of its bytes, each of whole rows of the first axis."""
    spec = store.spec(retain_context=False).to_json()
    metadata = spec.get("metadata", {})
    return (
        (spec["driver"], spec["kvstore"]["driver"]) == ("zarr", "file")
        and not (metadata.get("compressor") or metadata.get("filters"))
        and metadata["order"] == "C"
        and tuple(metadata["chunks"][1:]) == store.shape[1:]
        and (len(store.shape) != 2 or metadata["chunks"][0] == store.shape[0])  # a matrix is whole
    )


def chunk_file(store: Any, row: int) -> tuple[Path, int]:
    """(file, rows in it) of the chunk that holds a row of the first axis of a raw leaf."""
    rows = store.chunk_layout.read_chunk.shape[0]
    name = ".".join(map(str, (row // rows, *(0 for _ in store.shape[1:]))))
    return Path(store.kvstore.path) / name, rows


def _boxes(store: Any, rows: range) -> Iterator[Box]:
    """The parts of `rows` of an array, each inside one chunk."""
    first, *others = store.chunk_layout.read_chunk.shape
    cuts = sorted({rows.start, *range(rows.start // first * first + first, rows.stop, first)})
    axes = [[slice(a, b) for a, b in itertools.pairwise([*cuts, rows.stop])]]
    for size, chunk in zip(store.shape[1:], others, strict=True):
        axes.append([slice(a, min(a + chunk, size)) for a in range(0, size, chunk)])
    return itertools.product(*axes)


def _read(source: Any, boxes: Iterator[Box]) -> Iterator[tuple[Box, np.ndarray]]:
    """The values of all boxes, a few of them under way at once."""
    chunk = int(np.prod(source.chunk_layout.read_chunk.shape)) * source.dtype.numpy_dtype.itemsize
    waiting: deque[tuple[Box, Any]] = deque()
    for box in boxes:
        while waiting and (len(waiting) + 1) * chunk > _IN_FLIGHT:
            yield _arrived(*waiting.popleft())
        waiting.append((box, source[box].read()))
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(box: Box, value: Any) -> tuple[Box, np.ndarray]:
    return box, value.result()
