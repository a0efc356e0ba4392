"""The tensors of a merge: each read twice in pieces, for its angle and for the result, and written.

As many threads work as there are cores; memory holds some pieces, never a tensor. Arithmetic is
float64, the result has the dtype of its parents. How two are combined: `interpolate.py`.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import Progress

from memphis_jax.config import MergeConfig
from memphis_jax.interpolate import NO_SUMS, Sums, blend, cosine, distance, sums, weights
from memphis_jax.rounds.files import write_json
from memphis_jax.tensors import DTYPES, INDEX, Tensor, from_float64, header, split, to_float64

Row = dict[str, Any]

PIECE = 1 << 20  # elements that a thread reads at once
BLOCK = 1 << 17  # elements that are float64 at once, in the processor's cache


def write_tensors(
    folder: Path,
    left: dict[str, Tensor],
    right: dict[str, Tensor],
    ts: dict[str, float],
    how: MergeConfig,
    shard_bytes: int,
) -> dict[str, Row]:
    """The shards and their index; returns for each tensor its row of the report and `stored`."""
    # Wide ones first: every tensor then starts at a multiple of its own item size.
    names = sorted(left, key=lambda name: -DTYPES[left[name].dtype].itemsize)
    shards = split({name: left[name].num_bytes for name in names}, shard_bytes)
    total = sum(tensor.num_bytes for tensor in left.values())
    rows: dict[str, Row] = {}
    console, cores = Console(stderr=True), len(os.sched_getaffinity(0))
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with bar, ThreadPoolExecutor(cores) as pool:
        task = bar.add_task("merging", total=total)
        for file, members in shards.items():
            with open(folder / file, "wb") as out:
                out.write(header({n: (left[n].dtype, left[n].shape) for n in members}))
                for name in members:
                    pair = (left[name], right[name])
                    rows[name] = _merge_tensor(*pair, ts[name], how, pool, out)
                    bar.advance(task, left[name].num_bytes)
                out.flush()
                os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {name: file for file, members in shards.items() for name in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    return rows


def _merge_tensor(
    a: Tensor,
    b: Tensor,
    t: float,
    how: MergeConfig,
    pool: ThreadPoolExecutor,
    out: BinaryIO,
) -> Row:
    pieces = a.pieces(PIECE)
    total = NO_SUMS
    for part in _in_order(pool, partial(_sums, a, b), pieces):
        total = total.plus(part)
    if not all(map(math.isfinite, total)):
        raise ValueError(f"{a.name} of {a.path.parent} or {b.path.parent} holds NaN or infinity")
    by = weights(how.method, t, total, how.threshold)  # type: ignore[arg-type]
    digest = hashlib.sha256()

    def piece(rows: slice) -> np.ndarray:
        if by.branch == "copy":  # to the bit: also a zero's sign
            return _bytes((a if by.first else b).read(rows))
        blocks = [from_float64(blend(x, y, by), a.dtype) for x, y in _blocks(a, b, rows)]
        return _bytes(np.concatenate(blocks))

    try:
        for data in _in_order(pool, piece, pieces):
            out.write(data)
            digest.update(data)
    except FloatingPointError:
        raise ValueError(
            f"{a.name}: the result is too large for {a.dtype}: its parents point in opposite "
            "directions; merge by --method linear, or with a lower --threshold"
        ) from None
    square = by.first**2 * total.aa + by.second**2 * total.bb + 2 * by.first * by.second * total.ab
    return {
        "t": t,
        "branch": by.branch,
        "why": by.why,
        "angle": round(math.degrees(math.acos(cosine(total))), 6),
        "norm_a": math.sqrt(total.aa),
        "norm_b": math.sqrt(total.bb),
        "norm": math.sqrt(max(0.0, square)),
        "distance": distance(total),
        "stored": {
            "dtype": DTYPES[a.dtype].name,
            "shape": list(a.shape),
            "sha256": digest.hexdigest(),
        },
    }


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _sums(a: Tensor, b: Tensor, rows: slice) -> Sums:
    total = NO_SUMS
    for x, y in _blocks(a, b, rows):
        total = total.plus(sums(x, y))
    return total


def _blocks(a: Tensor, b: Tensor, rows: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both tensors' rows as flat float64 arrays of at most BLOCK elements."""
    x, y = a.read(rows).reshape(-1), b.read(rows).reshape(-1)
    for start in range(0, max(1, x.size), BLOCK):
        block = slice(start, start + BLOCK)
        yield to_float64(x[block]), to_float64(y[block])


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[slice], Any], items: Iterable[slice]
) -> Iterator[Any]:
    """Like `pool.map`, with a few results waiting at most."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 4:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
