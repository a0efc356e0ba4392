"""New files, written past the page cache.

Through it, the kernel takes longer to provide pages than a disk to write their bytes.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np

_BUFFER = 2 * 2**20  # bytes written at once
_SECTOR = 4096  # what is written past the cache is a multiple of it, in address, place and length
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class NewFile:
    """A file that is not there yet, written from start to end; a context manager.

    All is on the disk when it ends without an error. Where the file system does not write past the
    cache, such as a mounted bucket, it is written as usual. Raises FileExistsError.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(path, flags, 0o666)
        self._set(_DIRECT)
        self._memory = mmap.mmap(-1, _BUFFER)  # begins at a page
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._filled = 0
        self.size = 0

    def write(self, value: np.ndarray) -> None:
        """Appends the bytes of a contiguous array."""
        left = value.reshape(-1).view(np.uint8)
        self.size += left.size
        while left.size:
            part = left[: _BUFFER - self._filled]
            self._buffer[self._filled : self._filled + part.size] = part
            self._filled += part.size
            left = left[part.size :]
            if self._filled == _BUFFER:
                self._send(0, _BUFFER)
                self._filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            os.close(self._fd)

    def finish(self) -> None:
        """What has been written so far is on the disk; no more can be."""
        whole = self._filled // _SECTOR * _SECTOR
        self._send(0, whole)
        self._set(0)
        self._send(whole, self._filled)
        self._filled = 0
        os.fsync(self._fd)

    def _send(self, start: int, end: int) -> None:
        while start < end:
            try:
                start += os.write(self._fd, self._buffer[start:end].data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set(0)  # the file system wants it in another way
            if start % _SECTOR:  # cut short, as by a full disk: the rest begins at no sector
                self._set(0)

    def _set(self, direct: int) -> None:
        self._direct = direct
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | direct)
        except OSError:
            self._direct = 0
