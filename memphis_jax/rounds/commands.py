"""The commands between generation and training: grade, pairs, accuracy. No jax."""

import argparse
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track

from memphis_jax.rounds.audit import audit
from memphis_jax.rounds.choices import check_choice, read_options
from memphis_jax.rounds.files import write_json, write_jsonl
from memphis_jax.rounds.grade import grade as grade_text
from memphis_jax.rounds.pairs import VERDICTS, make_pairs
from memphis_jax.rounds.rows import GRADED, SAMPLED, check_out, read_answers, read_questions_by_id
from memphis_jax.rounds.symbolic import SymbolicEqual

Row = dict[str, Any]

SPLITS = ("validation", "test")
MEASURED = ("id", "verdict", "num_tokens", "finish_reason")  # what an accuracy needs of an answer


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
    audited = check_out(parser, args.out, [args.completions, *args.questions], ".audit.json")
    questions = read_questions_by_id(args.questions)
    meta, rows = read_answers(args.completions, "an answer", SAMPLED)
    if unknown := [row["id"] for row in rows if row["id"] not in questions]:
        raise ValueError(f"{args.completions}: no question has the id {unknown[0]!r}")
    with SymbolicEqual() as equal:
        graded = list(_graded(rows, questions, equal))
    write_json(audited, audit(graded, questions))
    write_jsonl(args.out, [{"meta": meta}, *graded])
    counts = Counter(row["verdict"] for row in graded)
    print("graded: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS), file=sys.stderr)
    if equal.timeouts:
        print(f"{equal.timeouts} comparisons of formulas ran into the limit", file=sys.stderr)


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
    parser.add_argument("--graded", required=True, type=Path, help="as `memphis grade` wrote it")
    parser.add_argument(
        "--questions", required=True, type=Path, help="{id, prompt, rationale, target}"
    )
    parser.add_argument("--out", required=True, type=Path, help="pairs.jsonl; counts: pairs.json")
    parser.add_argument("--max-pairs-per-question", type=int, default=0, help="0 = no limit")
    args = parser.parse_args(argv)
    if (limit := args.max_pairs_per_question) < 0:
        parser.error(f"--max-pairs-per-question {limit} must be 0 (no limit) or more")
    counts = check_out(parser, args.out, [args.graded, args.questions], ".json")
    _, graded = read_answers(args.graded, "a graded answer", GRADED)
    asked = read_questions_by_id([args.questions], ("id", "prompt", "rationale", "target"))
    sampled = {row["id"] for row in graded}
    if unknown := sorted(sampled - asked.keys()):
        raise ValueError(f"{args.graded}: {args.questions} has no question {unknown[0]!r}")
    questions = [row for name, row in asked.items() if name in sampled]
    rows, stats = make_pairs(graded, questions, max_pairs_per_question=limit or None)
    verdicts = {verdict: stats.pop(verdict) for verdict in VERDICTS}
    write_json(counts, {**stats, "verdicts": verdicts})
    write_jsonl(args.out, rows)
    print(
        f"pairs: {len(rows)} from {stats['questions']} questions ({stats['all_correct']} all "
        f"correct, {stats['mixed']} mixed, {stats['all_wrong']} all wrong, "
        f"{stats['no_valid']} without a valid answer)",
        file=sys.stderr,
    )


def _all_answers(path: Path, splits: Sequence[Collection[str]]) -> tuple[Row, list[Row]]:
    """(meta, rows) of graded answers, `num_samples` to every question that was not skipped.

    Raises ValueError where a question has more or fewer: its share would be wrong.
    """
    meta, rows = read_answers(path, "a graded answer", MEASURED)
    num_samples, skipped = meta.get("num_samples"), meta.get("skipped")
    if not isinstance(num_samples, int) or num_samples < 1 or not isinstance(skipped, dict):
        raise ValueError(
            f"{path}, line 1: the header needs num_samples, 1 or more, and skipped {{id: why}}; "
            "`memphis grade` copies it from the sampler's file"
        )
    counts = Counter(row["id"] for row in rows)
    for name in (name for ids in splits for name in ids if name not in skipped):
        if counts[name] != num_samples:
            raise ValueError(
                f"{path}: {counts[name]} answers to the question {name!r}, expected {num_samples}: "
                "sample and grade all questions of --validation and --test"
            )
    return meta, rows


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
    read = {name: getattr(args, name) for name in ("greedy", "sampled", "validation", "test")}
    check_out(parser, args.out, list(read.values()))
    ids = {split: read_questions_by_id([read[split]], ("id",)).keys() for split in SPLITS}
    for split in SPLITS:
        if not ids[split]:
            raise ValueError(f"{read[split]}: no question to measure an accuracy on")
    graded = {kind: _all_answers(read[kind], [*ids.values()]) for kind in ("greedy", "sampled")}

    def rows(split: str, kind: str) -> list[Row]:
        return [row for row in graded[kind][1] if row["id"] in ids[split]]

    def share(split: str, kind: str) -> float:
        """Of all answers that were asked for: a question too long to be asked counts as wrong."""
        correct = sum(row["verdict"] == "correct" for row in rows(split, kind))
        return correct / (len(ids[split]) * graded[kind][0]["num_samples"])

    result: dict[str, float] = {
        f"{split}_{kind}": share(split, kind) for split in SPLITS for kind in ("greedy", "sampled")
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
