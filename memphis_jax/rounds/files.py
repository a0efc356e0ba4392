"""The files that pass between stages: JSON in UTF-8, published by rename, and their hashes.

Standard library only: the generation host has no jax. One writer per file at a time.
"""

import codecs
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, a user's share, a file's limit


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every row of a JSON Lines file.

    A byte order mark at the start, as Windows writes, is no part of it. Raises ValueError, naming
    file and line, for anything but one object per line.
    """
    # Not splitlines(): U+2028 and others may stand in a JSON text.
    lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()  # the newline that ends the last row
    return [_row(path, number, line) for number, line in enumerate(lines, start=1)]


def _row(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}, line {number}"
    if not line.strip():
        raise ValueError(f"{where}: empty line, expected a JSON object")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{where}: JSON that Python does not read ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, for anything else."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or make it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, a JSON object is needed")
    return value


def read_completions(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(meta, rows) of a completions file, whose first line is {"meta": {...}}.

    Raises ValueError if that line is missing, and as `read_jsonl` does.
    """
    rows = read_jsonl(path)
    if not rows or rows[0].keys() != {"meta"} or not isinstance(rows[0]["meta"], dict):
        raise ValueError(
            f'{path}, line 1: expected the header {{"meta": {{...}}}}, as a sampler or `memphis '
            "grade` writes it"
        )
    return rows[0]["meta"], rows[1:]


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one row per line and publish the file by rename.

    Raises ValueError for a row that JSON cannot hold (NaN too); the old file then stays.
    """
    lines = (_encode(path, row, f" in row {n}") for n, row in enumerate(rows, start=1))
    publish(Path(path), lines)


def write_json(path: str | Path, obj: Any) -> None:
    """Write one indented JSON document and publish it by rename.

    Raises ValueError for what JSON cannot hold (NaN too); the old file then stays.
    """
    publish(Path(path), [_encode(path, obj, "", indent=2)])


def _encode(path: str | Path, obj: Any, where: str, indent: int | None = None) -> bytes:
    try:
        text = json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
        return text.encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written as JSON{where}: {error}") from error


def publish(path: Path, chunks: Iterable[bytes]) -> None:
    """Write to a neighbour, flush to disk, rename.

    A reader sees the old file or the whole new one, whenever this process dies. The error of a
    full disk names the file.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is to be written")
    # One fixed name: what a killed process left behind is overwritten by the next try.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _named(path), temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must reach the disk too
    finally:
        os.close(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place by rename, only on success.

    A caller that removes it leaves `target` as it is. Whether what is there may go, the caller has
    to know. What a kill between the two renames left aside is put back. The error of a full disk
    names `target`.
    """
    target = target.resolve()
    partial, old = partial_of(target), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (partial, old):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _named(target):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not partial.exists():
        return
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A write that finds no room does not say where: its error gets this path."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _NO_ROOM:
            error.filename = str(path)
        raise


def partial_of(target: Path) -> Path:
    """The folder in which `new_folder` lets `target` grow."""
    target = target.resolve()
    return target.with_name(f".{target.name}.partial")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# In a checkpoint, when it was written: the same weights written again are the same folder.
_TIMES = {"_CHECKPOINT_METADATA", "commit_success.txt"}
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder: a save that was cut off


def sha256_folder(path: str | Path) -> str:
    """Hex SHA-256 over (relative name, content hash) of every file below a folder.

    In the order of the names, written with "/"; without orbax's two files that hold nothing but
    the time, and without what it left of a save that was cut off. Raises NotADirectoryError without
    the folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: nothing to hash")
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in _TIMES)
    names = sorted(p.relative_to(folder).as_posix() for p in files)
    names = [name for name in names if _UNFINISHED not in name]
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()
