"""Which tensors of an export go into which file, and which process writes it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convert.hf_folder import DTYPES, ConvertError
from convert.mapping import Place, places
from convert.weights import CODES, Checkpoint
from memphis_jax.tensors import split


@dataclass(frozen=True)
class Plan:
    """What is written, and which process writes it; all make the same plan of a checkpoint."""

    dtype: str  # as asked for
    kinds: dict[str, np.dtype]  # of each leaf, as written
    table: dict[str, Place]  # of every tensor, in the order in which they are written
    sizes: dict[str, int]  # bytes of every tensor
    owners: dict[str, int]  # {tensor: process}
    files: dict[str, list[str]]  # {file: its tensors}, of one owner


def make_plan(source: Checkpoint, dtype: str, max_shard_size: int, processes: int) -> Plan:
    """Divides the tensors over processes and files. Raises ConvertError for an unknown dtype."""
    kinds = {leaf: own if dtype == "keep" else _dtype(dtype) for leaf, own in source.dtypes.items()}
    table = places(source.config)
    # Wide tensors first: every tensor then starts at a multiple of its own item size.
    names = sorted(table, key=lambda name: -kinds[table[name].leaf].itemsize)
    sizes = {n: int(np.prod(table[n].shape)) * kinds[table[n].leaf].itemsize for n in names}
    owners = divide(sizes, processes)
    files = split(sizes, max_shard_size, owners)
    return Plan(dtype, kinds, {name: table[name] for name in names}, sizes, owners, files)


def divide(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """{name: process}, in runs of about equal bytes: even to within the size of one name."""
    owners, before, total = {}, 0, sum(sizes.values())
    for name, size in sizes.items():  # whose share its middle lies in
        owners[name] = min((2 * before + size) * processes // (2 * total), processes - 1)
        before += size
    return owners


def _dtype(name: str) -> np.dtype:
    if name not in ("float32", "bfloat16"):
        raise ConvertError(f"dtype = {name!r} is not one of 'keep', 'float32', 'bfloat16'")
    return DTYPES[CODES[name]]
