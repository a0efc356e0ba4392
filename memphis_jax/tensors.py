"""The tensors of an HF folder: read piece by piece, written one after another. No jax.

Reading is safetensors' own (a .bin is a pickle, which is never loaded). Writing is ours, since the
library writes only files that it is given whole. Imports nothing of ours.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
DTYPES = {  # of safetensors -> of numpy
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}
# Buffers of old checkpoints that follow from the config: never read, never written.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file, not yet read."""

    path: Path
    name: str
    dtype: str  # as safetensors writes it: "F32", "BF16"
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    def read(self, rows: slice) -> np.ndarray:
        """Some rows (of the first axis) as they are stored; a scalar is all of its rows.

        The file is mapped only meanwhile: pages that were read leave this process's memory.
        """
        with safe_open(self.path, "numpy") as file:
            return file.get_slice(self.name)[rows] if self.shape else file.get_tensor(self.name)

    def pieces(self, most: int) -> list[slice]:
        """Rows by rows, of at most `most` elements each (or one row)."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, most * rows // max(1, self.size))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """{name: tensor} of all safetensors files of a folder, from their headers.

    Raises ValueError naming at once damaged files, absent shards and tensors that are there twice.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = " (a pickle is never loaded: convert it to safetensors)" if pickles else ""
        raise ValueError(f"{folder} holds no *.safetensors file{hint}")
    problems, found = _absent_shards(folder, {path.name for path in paths}), dict[str, Tensor]()
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    if name in found:
                        problems.append(f"{name} is in {found[name].path.name} and {path.name}")
                    found[name] = Tensor(path, name, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            problems.append(f"{path.name} ({path.stat().st_size} bytes) is damaged: {error}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}; copy or download it again")
    return found


def _absent_shards(folder: Path, there: set[str]) -> list[str]:
    if not (folder / INDEX).is_file():
        return []
    try:
        named = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is not an index of shards: {error!r}") from error
    return [f"{name} is named in {INDEX} and is absent" for name in sorted(named - there)]


def to_float64(stored: np.ndarray) -> np.ndarray:
    """The values, exactly; bfloat16 by its bits, which numpy itself converts slowly."""
    if stored.dtype == ml_dtypes.bfloat16:
        wide = stored.view(np.uint16).astype(np.uint32)
        stored = np.left_shift(wide, 16, out=wide).view(np.float32)
    return stored.astype(np.float64)


def from_float64(values: np.ndarray, dtype: str) -> np.ndarray:
    """Finite values rounded to nearest even in a safetensors dtype, bfloat16 through float32.

    Raises FloatingPointError for a value that is too large for it.
    """
    with np.errstate(over="raise"):
        narrow = values.astype(np.float32 if dtype == "BF16" else DTYPES[dtype])
    if dtype != "BF16":
        return narrow
    bits = narrow.view(np.uint32)
    # Half of the lower 16 bits' range, less one where the upper part is even: a tie goes to even.
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)


def split(
    sizes: Mapping[str, int], limit: int, owners: Mapping[str, int] | None = None
) -> dict[str, list[str]]:
    """{file: its tensors} of {tensor: bytes}, in order, of one owner each.

    A file has at most `limit` bytes; a larger tensor is alone. Files are named as transformers
    names them.
    """
    shards: list[list[str]] = []
    used, owners = 0, owners or dict.fromkeys(sizes, 0)
    for name, size in sizes.items():
        if not shards or used + size > limit or owners[name] != owners[shards[-1][0]]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(shards, 1)}


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Start of a safetensors file of {name: (dtype, shape)} whose bytes follow in this order.

    The format (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes
    little-endian, then the header, JSON padded with spaces to a multiple of 8.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
