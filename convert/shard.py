"""One safetensors file: written, hashed whole and by tensor, and brought to the disk meanwhile."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.raw import block_buffer, blocks, in_order, transposed_block, write

_UNDER_WAY = 4  # blocks of a tensor
_PIECE = 4 * 2**20  # bytes hashed at once of what need not be transposed


class Shard:
    """A file that grows; see `new_shard`."""

    def __init__(self, file: BinaryIO, header: bytes, pool: ThreadPoolExecutor):
        self._file, self._pool = file, pool
        self._digest = hashlib.sha256(header)
        write(file, np.frombuffer(header, np.uint8))
        self._sync: Future[None] = pool.submit(os.fdatasync, file.fileno())

    def add(self, value: np.ndarray, transposed: bool) -> str:
        """Appends a contiguous array, or a matrix transposed; returns the hash of its bytes."""
        digest = hashlib.sha256()
        for block in self._blocks(value, transposed):
            # Two hashes and the writing take about as long as each other, without Python's lock.
            hashing = [self._pool.submit(one.update, block.data) for one in (digest, self._digest)]
            write(self._file, block)
            for one in hashing:
                one.result()
        if self._sync.done():  # while the next is on its way
            self._sync = self._pool.submit(os.fdatasync, self._file.fileno())
        return digest.hexdigest()

    def close(self) -> dict[str, Any]:
        """{"sha256", "size"} of the whole file, which is on the disk by then."""
        self._sync.result()
        os.fsync(self._file.fileno())
        return {"sha256": self._digest.hexdigest(), "size": self._file.tell()}

    def _blocks(self, value: np.ndarray, transposed: bool) -> Iterator[np.ndarray]:
        if not transposed:
            flat = value.reshape(-1).view(np.uint8)
            yield from (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))
            return
        columns = blocks(value)
        ring = [block_buffer(value) for _ in columns[:_UNDER_WAY]]
        jobs = [
            (1, partial(transposed_block, value, part, ring[i % len(ring)]))
            for i, part in enumerate(columns)
        ]
        yield from in_order(self._pool, jobs, len(ring))


@contextmanager
def new_shard(path: Path, header: bytes, pool: ThreadPoolExecutor) -> Iterator[Shard]:
    """A new file that begins with `header`."""
    with open(path, "xb", buffering=0) as file:
        yield Shard(file, header, pool)
