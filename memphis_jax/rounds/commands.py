"""The commands between generation and training: grade, pairs, accuracy. No jax."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track

from memphis_jax.rounds.audit import audit
from memphis_jax.rounds.choices import check_choice, read_options
from memphis_jax.rounds.files import read_completions, read_jsonl, write_json, write_jsonl
from memphis_jax.rounds.grade import grade as grade_text
from memphis_jax.rounds.pairs import VERDICTS, make_pairs
from memphis_jax.rounds.symbolic import SymbolicEqual

Row = dict[str, Any]


def grade(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis grade", description="Check sampled answers against the ground truth."
    )
    parser.add_argument("--completions", required=True, type=Path, help="as a sampler wrote it")
    parser.add_argument(
        "--questions", required=True, nargs="+", help="{id, prompt, target, source}"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="graded.jsonl; beside it .audit.json"
    )
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    questions = _questions(args.questions)
    meta, rows = read_completions(args.completions)
    if unknown := [row["id"] for row in rows if row["id"] not in questions]:
        raise ValueError(f"{args.completions}: no question has the id {unknown[0]!r}")
    with SymbolicEqual() as equal:
        graded = list(_graded(rows, questions, equal))
    write_json(args.out.with_suffix(".audit.json"), audit(graded, questions))
    write_jsonl(args.out, [{"meta": meta}, *graded])
    counts = Counter(row["verdict"] for row in graded)
    print("graded: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS), file=sys.stderr)
    if equal.timeouts:
        print(f"{equal.timeouts} comparisons of formulas ran into the limit", file=sys.stderr)


def _questions(paths: Sequence[str]) -> dict[str, Row]:
    """By id. Raises ValueError, naming file and line, for a row that no answer can be judged by."""
    questions: dict[str, Row] = {}
    for path in paths:
        for number, row in enumerate(read_jsonl(path), start=1):
            where = f"{path}, line {number}"
            for name in ("id", "prompt", "target", "source"):
                if not isinstance(row.get(name), str):
                    raise ValueError(
                        f"{where}: a question needs the field {name!r} as text, found "
                        f"{row.get(name)!r}"
                    )
            if not row["target"].strip():
                raise ValueError(f"{where}: the target is empty: fill it in or drop the question")
            if row["id"] in questions:
                raise ValueError(f"{where}: the id {row['id']!r} is there twice")
            questions[row["id"]] = row
    return questions


def _graded(
    rows: Sequence[Row], questions: Mapping[str, Row], equal: SymbolicEqual
) -> Iterator[Row]:
    """The rows with what the grader says of each, under a progress bar."""
    options = cache(lambda name: read_options(questions[name]["prompt"]))
    console = Console(stderr=True)
    for row in track(rows, "grading", console=console, disable=not console.is_terminal):
        question = questions[row["id"]]
        result = grade_text(
            row["text"],
            question["target"],
            source=question["source"],
            finish_reason=row["finish_reason"],
            check=partial(
                check_choice, options=options(row["id"]), source=question["source"], equal=equal
            ),
        )
        yield {**row, **result._asdict()}


def pairs(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis pairs", description="Pair each correct answer with an incorrect one."
    )
    parser.add_argument("--graded", required=True, type=Path)
    parser.add_argument("--questions", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="pairs.jsonl; counts: pairs.json")
    parser.add_argument("--max-pairs-per-question", type=int, default=0, help="0 = no limit")
    args = parser.parse_args(argv)
    _, graded = read_completions(args.graded)
    sampled = {row["id"] for row in graded}
    questions = [row for row in read_jsonl(args.questions) if row["id"] in sampled]
    limit = args.max_pairs_per_question or None
    rows, stats = make_pairs(graded, questions, max_pairs_per_question=limit)
    verdicts = {verdict: stats.pop(verdict) for verdict in VERDICTS}
    write_json(args.out.with_suffix(".json"), {**stats, "verdicts": verdicts})
    write_jsonl(args.out, rows)
    print(
        f"pairs: {len(rows)} from {stats['questions']} questions ({stats['all_correct']} all "
        f"correct, {stats['mixed']} mixed, {stats['all_wrong']} all wrong, "
        f"{stats['no_valid']} without a valid answer)",
        file=sys.stderr,
    )


def accuracy(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis accuracy", description="Accuracies of graded answers to held-out questions."
    )
    parser.add_argument("--greedy", required=True, type=Path, help="graded greedy answers")
    parser.add_argument("--sampled", required=True, type=Path, help="graded sampled answers")
    parser.add_argument("--validation", required=True, type=Path, help="questions")
    parser.add_argument("--test", required=True, type=Path, help="questions")
    parser.add_argument("--out", required=True, type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    ids = {
        split: {row["id"] for row in read_jsonl(getattr(args, split))}
        for split in ("validation", "test")
    }
    for split in ids:
        if not ids[split]:
            raise ValueError(f"{getattr(args, split)}: no question to measure an accuracy on")
    graded = {kind: read_completions(getattr(args, kind)) for kind in ("greedy", "sampled")}

    def rows(split: str, kind: str) -> list[Row]:
        return [row for row in graded[kind][1] if row["id"] in ids[split]]

    def share(split: str, kind: str) -> float:
        """Of all answers that were asked for: a question too long to be asked counts as wrong."""
        correct = sum(row["verdict"] == "correct" for row in rows(split, kind))
        return correct / (len(ids[split]) * graded[kind][0]["num_samples"])

    result: dict[str, float] = {
        f"{split}_{kind}": share(split, kind)
        for split in ("validation", "test")
        for kind in ("greedy", "sampled")
    }
    sampled = rows("test", "sampled")
    if not sampled:
        raise ValueError(f"{args.sampled}: no answer to any question of {args.test}")
    skipped = {name for meta, _ in graded.values() for name in meta["skipped"]}
    result |= {
        "valid_share": mean(row["verdict"] != "invalid" for row in sampled),
        "mean_tokens": mean(row["num_tokens"] for row in sampled),
        "truncated_share": mean(row["finish_reason"] == "length" for row in sampled),
        "validation_questions": len(ids["validation"]),
        "test_questions": len(ids["test"]),
        "skipped": len(skipped & (ids["validation"] | ids["test"])),
    }
    write_json(args.out, result)
