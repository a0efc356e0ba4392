"""Rows of a data set from where it lies: files on this machine, or the Hugging Face hub. No jax.

Sits below `recipes.py`, which says which columns it wants and what becomes of a row. Only those
columns are read, a batch at a time. Imports `rounds.files` for hashes, nothing else of ours.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from memphis_jax.rounds.files import sha256_file

Row = dict[str, Any]
Columns = Mapping[str, str]  # name -> what it holds, in words

BATCH = 256  # rows read at once: 100,000 characters each would take 25 MB
CSV_BLOCK = 1 << 25  # bytes read at once; no row of a CSV file may be longer
# As file names spell them.
SPLITS = (
    *("train", "validation", "valid", "val", "dev", "test"),
    *("eval", "evaluation", "heldout", "holdout"),
)


class Source(NamedTuple):
    """A data set's rows, read as they are asked for, and where they come from."""

    rows: Iterator[Row]
    origin: dict[str, Any]


def local_copy(root: str | Path, repo: str) -> Path:
    """The folder of a hub data set below `root`: ROOT/OWNER/NAME or ROOT/NAME.

    Raises FileNotFoundError naming both where there is neither.
    """
    places = [Path(root, repo), Path(root, repo.rpartition("/")[2])]
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"no local copy of {repo}: looked for {looked} (an empty root reads from the hub)"
    )


def read_local(path: Path, split: str, columns: Columns) -> Source:
    """Rows of a Parquet, JSON Lines or CSV file, or of the files of `split` in a folder, by name.

    A file whose path has `split` as a word belongs to it; where none has, those that name no other
    split do. CSV fields are all text. Raises FileNotFoundError where nothing is found, and
    ValueError for two formats in one folder, a broken file, or, while reading, a missing column.
    """
    files = [path] if path.is_file() else _files_of(path, split)
    formats = sorted({file.suffix for file in files})
    if len(formats) > 1 or formats[0] not in _READERS:
        raise ValueError(
            f"{path} has {' and '.join(formats)} files for {split}: give one form of "
            f"{', '.join(_READERS)}"
        )
    folder = path.parent if path.is_file() else path
    hashes = {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
    origin = {"path": str(path), "revision": "", "split": split, "sha256": hashes}
    return Source(_read_files(files, columns), origin)


def read_hub(repo: str, revision: str, split: str, columns: Columns) -> Source:
    """Rows of a hub data set at a commit.

    Without a revision, or with a branch, a tag or a short hash, the hub is asked which commit that
    is now, and this commit is read and recorded. Raises RuntimeError when it cannot be loaded,
    ValueError for a missing column.
    """
    # Slow to import, and a local copy needs none of it.
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules.csv.csv import CsvConfig
    from huggingface_hub import HfApi

    try:
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            revision = HfApi().dataset_info(repo, revision=revision or None).sha or ""
        found = load_dataset_builder(repo, revision=revision)
        # Text as it stands, as in `_read_csv`.
        as_text = {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
        options = as_text if isinstance(found.config, CsvConfig) else {}
        table = load_dataset(repo, split=split, revision=revision, **options)
    except Exception as error:  # http client, hub, datasets and arrow each have their own kinds
        raise RuntimeError(
            f"cannot load {repo}, split {split}, revision {revision or 'newest'}, from the hub "
            f"({_first_line(error)}): give a local copy with --config.data.root=FOLDER"
        ) from error
    _require_columns(repo, columns, table.column_names)
    origin = {"repo": repo, "revision": revision, "split": split}
    return Source(iter(table.select_columns(list(columns))), origin)


def _files_of(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    named: list[Path] = []
    nameless: list[Path] = []
    found = sorted(f for f in folder.rglob("*") if f.suffix in _READERS and f.is_file())
    for file in found:
        relative = file.relative_to(folder).as_posix().lower()
        if relative.startswith(".") or "/." in relative:  # what `hf download` leaves behind
            continue
        words = set(re.findall(r"[a-z0-9]+", relative))
        if split.lower() in words:
            named.append(file)
        elif words.isdisjoint(SPLITS):
            nameless.append(file)
    if not named and not nameless:
        names = ", ".join(file.relative_to(folder).as_posix() for file in found) or "none"
        raise FileNotFoundError(
            f"{folder} has no {', '.join(_READERS)} file of split {split!r}; found {names}"
        )
    return named or nameless


def _read_files(files: list[Path], columns: Columns) -> Iterator[Row]:
    for file in files:
        try:
            yield from _READERS[file.suffix](file, columns)
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} cannot be read: {_first_line(error)}") from error


def _read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        _require_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH, columns=list(columns)):
            yield from batch.to_pylist()


def _read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        _require_columns(path, columns, next(csv.reader(file), []))
    with pyarrow.csv.open_csv(
        path,
        pyarrow.csv.ReadOptions(block_size=CSV_BLOCK),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        # Text as it stands: "007" is no number and "NA" no null.
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            strings_can_be_null=False,
        ),
    ) as reader:
        for batch in reader:
            for part in range(0, batch.num_rows, BATCH):
                yield from batch.slice(part, BATCH).to_pylist()


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Row]:
    """A field that a row leaves out is null; a column that every row leaves out is missing."""
    seen: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {row!r:.40} is not a JSON object")
            seen.update(dict.fromkeys(row))
            yield {name: row.get(name) for name in columns}
    _require_columns(path, columns, list(seen))


_READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def _require_columns(where: str | Path, columns: Columns, found: list[str]) -> None:
    if missing := [name for name in columns if name not in found]:
        expected = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise ValueError(
            f"{where} has no column {', '.join(map(repr, missing))}; expected {expected}; "
            f"found {', '.join(found) or 'none'}"
        )
    if twice := [name for name in columns if found.count(name) > 1]:
        raise ValueError(f"{where} has the column {twice[0]!r} more than once: rename one of them")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
