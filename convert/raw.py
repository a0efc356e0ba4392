"""Arrays as plain bytes in files: mapped, transposed block by block in memory that is used again.

A library hands over each tensor in fresh memory, and the kernel takes longer to provide that than
we need to transpose.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from convert.mapping import transpose_into

_BLOCK_BYTES = 4 * 2**20
_LEAST_ROWS = 128  # of a block: fewer would read lines of memory for a part of them
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: all pages at once, not by a fault for each


def mapped(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
    """The array whose bytes lie in a file at `start`, read-only; nothing is copied.

    Its pages count as this process's memory for as long as it lives. Raises OSError where the file
    is too short.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if path.stat().st_size < start + size:
        raise OSError(f"{path} ends before byte {start + size}")
    before = start % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | _POPULATE
    with open(path, "rb") as file:
        pages = mmap.mmap(
            file.fileno(), before + size, flags, mmap.PROT_READ, offset=start - before
        )
    return np.frombuffer(pages, dtype, int(np.prod(shape)), before).reshape(shape)


def blocks(matrix: np.ndarray) -> list[slice]:
    """Columns of a matrix [m, n] that are transposed at a time."""
    step = max(_LEAST_ROWS, _BLOCK_BYTES // (len(matrix) * matrix.itemsize) // 4 * 4)
    return [slice(a, min(a + step, matrix.shape[1])) for a in range(0, matrix.shape[1], step)]


def transposed_block(matrix: np.ndarray, columns: slice, buffer: np.ndarray) -> np.ndarray:
    """Columns of a matrix [m, n] as rows [columns, m], in the memory of `buffer`."""
    shape = (columns.stop - columns.start, len(matrix))
    out = buffer.view(matrix.dtype)[: shape[0] * shape[1]].reshape(shape)
    transpose_into(out, matrix[:, columns])
    return out


def block_buffer(matrix: np.ndarray) -> np.ndarray:
    """Memory for any of the blocks of a matrix."""
    return np.empty((blocks(matrix)[0].stop * len(matrix)) * matrix.itemsize, np.uint8)


def in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[tuple[int, Callable[[], Any]]], limit: int
) -> Iterator[Any]:
    """Results of the (cost, call) in order; those under way cost at most `limit` together.

    One that costs more runs alone. A result is under way until the next is asked for.
    """
    waiting: deque[tuple[int, Future[Any]]] = deque()
    held = 0
    for cost, call in jobs:
        while waiting and held + cost > limit:
            yield waiting[0][1].result()
            held -= waiting.popleft()[0]
        waiting.append((cost, pool.submit(call)))
        held += cost
    while waiting:
        yield waiting[0][1].result()
        waiting.popleft()


def threads() -> ThreadPoolExecutor:
    """Twice as many as cores: some wait for the disk."""
    return ThreadPoolExecutor(2 * (os.cpu_count() or 1))


@contextmanager
def beside() -> Iterator[ThreadPoolExecutor]:
    """One more thread; what it has not begun when an error ends the rest, it never begins."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
