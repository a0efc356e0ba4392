"""What the grader did, in numbers and in examples to read. Imports nothing of ours and no jax."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

Row = Mapping[str, Any]

VERDICTS = ("correct", "incorrect", "unknown", "invalid")
NUM_SAMPLES = 20  # of each verdict


def audit(
    graded: Iterable[Row], questions: Mapping[str, Row], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Counts per source of the questions, and random samples of each verdict.

    graded: {id, sample, text, finish_reason, rationale, answer, verdict, reason};
    questions: {id: {prompt, target, source}}.

    Returns {"sources": {source: counts}, "samples": {verdict: rows}}. counts: answers; correct,
    incorrect, invalid, unknown; malformed {reason: answers} (extraction failures); timeouts;
    truncated (ended by the length limit, also those that are malformed); duplicates (correct or
    incorrect answers whose rationale repeats an earlier one of the same question and verdict, up
    to whitespace and case). rows: at most 20, from each source in turn, {id, sample, source,
    prompt, target, text, answer, reason}, the same ones for the same rows and seed. Raises KeyError
    for a row without question.
    """
    sources: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str, str]] = set()
    by_verdict: dict[str, list[Row]] = {verdict: [] for verdict in VERDICTS}
    for row in graded:
        counts = sources.setdefault(questions[row["id"]]["source"], _no_counts())
        counts["answers"] += 1
        counts[row["verdict"]] += 1
        counts["timeouts"] += row["reason"] == "time-out"
        counts["truncated"] += row["finish_reason"] == "length"
        if row["verdict"] == "invalid" and row["reason"] != "truncated":
            counts["malformed"][row["reason"]] += 1
        if row["verdict"] in ("correct", "incorrect"):
            key = (row["id"], row["verdict"], " ".join(row["rationale"].split()).casefold())
            counts["duplicates"] += key in seen
            seen.add(key)
        by_verdict[row["verdict"]].append(row)
    chosen = random.Random(seed)
    samples = {
        verdict: [_sample(row, questions[row["id"]]) for row in _draw(rows, questions, chosen)]
        for verdict, rows in by_verdict.items()
    }
    return {"sources": dict(sorted(sources.items())), "samples": samples}


def _draw(
    rows: Sequence[Row], questions: Mapping[str, Row], chosen: random.Random
) -> Iterable[Row]:
    """At most NUM_SAMPLES rows, one of each source in turn while it has any."""
    by_source: dict[str, list[Row]] = {}
    for row in chosen.sample(rows, len(rows)):
        by_source.setdefault(questions[row["id"]]["source"], []).append(row)
    # more sources than samples: which come first must be no matter of their size
    drawn = zip_longest(*chosen.sample(list(by_source.values()), len(by_source)))
    return islice((row for turn in drawn for row in turn if row is not None), NUM_SAMPLES)


def _no_counts() -> dict[str, Any]:
    names = ("answers", *VERDICTS, "timeouts", "truncated", "duplicates")
    return {**dict.fromkeys(names, 0), "malformed": Counter()}


def _sample(row: Row, question: Row) -> dict[str, Any]:
    asked = {name: question[name] for name in ("source", "prompt", "target")}
    given = {name: row[name] for name in ("id", "sample", "text", "answer", "reason")}
    return asked | given
