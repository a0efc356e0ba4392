"""New files past the page cache: whole at any size, on any file system, and failing as one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.direct import NewFile

MB = 2**20


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """On a disk, and on a file system in memory, which need not know writes past the cache."""
    if request.param == "disk":
        return tmp_path
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no file system in memory at /dev/shm")
    made = memory / f"memphis-{tmp_path.name}"
    made.mkdir()
    request.addfinalizer(lambda: [*(path.unlink() for path in made.iterdir()), made.rmdir()])
    return made


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [4096],
        [4095, 2],
        [2 * MB],
        [2 * MB - 1, 1, 1],
        [5 * MB + 4097],
        [3, 7 * MB, 11, 2 * MB],
    ],
)
def test_a_file_holds_what_was_written(folder: Path, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    with NewFile(folder / "file") as file:
        for part in parts:
            file.write(part)
        assert file.size == sum(sizes)
    assert (folder / "file").read_bytes() == b"".join(part.tobytes() for part in parts)


def test_rows_are_written_as_bytes(tmp_path: Path) -> None:
    with NewFile(tmp_path / "file") as file:
        file.write(np.arange(6, dtype="<u2").reshape(2, 3))
    assert (tmp_path / "file").read_bytes() == bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        NewFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("room", [4 * MB, 5 * MB + 100])  # the second ends inside a sector
def test_a_file_that_finds_no_room_is_an_error(folder: Path, room: int) -> None:
    code = f"""
import resource
import numpy as np
from pathlib import Path
from convert.direct import NewFile
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
with NewFile(Path({str(folder / "file")!r})) as file:
    file.write(np.ones({8 * MB}, np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError: [Errno 27] File too large" in done.stderr
