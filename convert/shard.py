"""One safetensors file: written, hashed whole and by tensor, and brought to the disk meanwhile."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.direct import NewFile
from convert.raw import block_buffer, blocks, in_order, transposed_block

_UNDER_WAY = 4  # blocks of a tensor
_PIECE = 4 * 2**20  # bytes hashed at once of what need not be transposed


class Shard:
    """A file that grows; see `new_shard`."""

    def __init__(self, file: NewFile, header: bytes, pool: ThreadPoolExecutor):
        self._file, self._pool = file, pool
        self._digest = hashlib.sha256(header)
        file.write(np.frombuffer(header, np.uint8))

    def add(self, value: np.ndarray, transposed: bool) -> str:
        """Appends a contiguous array, or a matrix transposed; returns the hash of its bytes."""
        digest = hashlib.sha256()
        for block in self._blocks(value, transposed):
            # Two hashes and the writing take about as long as each other, without Python's lock.
            hashing = [self._pool.submit(one.update, block.data) for one in (digest, self._digest)]
            self._file.write(block)
            for one in hashing:
                one.result()
        return digest.hexdigest()

    def close(self) -> dict[str, Any]:
        """{"sha256", "size"} of the whole file, which is on the disk by then."""
        self._file.finish()
        return {"sha256": self._digest.hexdigest(), "size": self._file.size}

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
    with NewFile(path) as file:
        yield Shard(file, header, pool)
