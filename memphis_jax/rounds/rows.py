"""Rows that another command wrote, checked as they are read: what is missing is named. No jax."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memphis_jax.rounds.files import read_completions, read_jsonl
from memphis_jax.rounds.pairs import VERDICTS

Row = dict[str, Any]

NUMBERS = ("sample", "num_tokens")  # whole ones; every other field is text
SAMPLED = ("id", "sample", "text", "finish_reason")
GRADED = ("id", "sample", "rationale", "answer", "verdict")
QUESTION = ("id", "prompt", "target", "source")

MADE_BY = {
    "an answer": "`memphis sample` and `python -m memphis_jax.rounds.generate` make such files",
    "a graded answer": "`memphis grade` makes such files",
    "a question": "`memphis data` makes such files",
}


def read_answers(path: Path, what: str, fields: Sequence[str]) -> tuple[Row, list[Row]]:
    """(meta, rows) of a completions file whose rows have `fields`; `what` as in MADE_BY.

    Raises ValueError, naming file, line and field, for a row that has not, and for a sample of a
    question that is there twice.
    """
    _check_there(path, what)
    meta, rows = read_completions(path)
    seen = set()
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        check_row(row, where, what, fields)
        if "verdict" in fields and row["verdict"] not in VERDICTS:
            raise ValueError(
                f"{where}: verdict {row['verdict']!r:.60} is none of {', '.join(VERDICTS)}; "
                f"{MADE_BY[what]}"
            )
        if "sample" in fields:
            key = (row["id"], row["sample"])
            if key in seen:
                raise ValueError(
                    f"{where}: sample {key[1]} of the question {key[0]!r} is there twice: "
                    "remove one, or sample again"
                )
            seen.add(key)
    return meta, rows


def read_questions_by_id(
    paths: Sequence[str | Path], fields: Sequence[str] = QUESTION
) -> dict[str, Row]:
    """The questions of several files, which have `fields`, and no empty `target`, by id.

    Raises ValueError, naming file and line, for a row that is no such question or whose id was met.
    """
    questions: dict[str, Row] = {}
    for path in paths:
        _check_there(path, "a question")
        for number, row in enumerate(read_jsonl(path), start=1):
            where = f"{path}, line {number}"
            check_row(row, where, "a question", fields)
            if "target" in fields and not row["target"].strip():
                raise ValueError(f"{where}: the target is empty: fill it in or drop the question")
            if row["id"] in questions:
                raise ValueError(f"{where}: the id {row['id']!r} is there twice")
            questions[row["id"]] = row
    return questions


def _check_there(path: str | Path, what: str) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; {MADE_BY[what]}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file in it; {MADE_BY[what]}")


def check_row(row: Mapping[str, Any], where: str, what: str, fields: Sequence[str]) -> None:
    for name in fields:
        value, number = row.get(name), name in NUMBERS
        if isinstance(value, int if number else str) and not isinstance(value, bool):
            continue
        found = f"found {value!r:.60}" if name in row else "which is missing"
        kind = "a whole number" if number else "text"
        raise ValueError(
            f"{where}: {what} needs the field {name!r} as {kind}, {found}; {MADE_BY[what]}"
        )


def check_out(
    parser: argparse.ArgumentParser, out: Path, read: Sequence[str | Path], beside: str = ""
) -> Path:
    """Makes the folder of --out; returns the file beside it whose suffix is `beside`.

    Ends with the parser's error where --out is a folder, or would replace what is read.
    """
    if out.is_dir():
        parser.error(f"--out {out} is a folder: name a file in it")
    companion = out.with_suffix(beside) if beside else out
    if beside and companion == out:
        parser.error(f"--out {out}: the counts go to {companion}; let the name end in .jsonl")
    for path in (out, companion):
        if any(path.resolve() == Path(source).resolve() for source in read):
            parser.error(f"--out {out} would overwrite {path}, which is read: choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    return companion
