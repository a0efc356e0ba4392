"""Graded completions -> (correct, incorrect) pairs with the ground truth, for the rank phase.

Imports nothing of ours and no jax. `memphis_jax.data.prompts` owns the format; a test holds this
module's copy of the completion form to it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

VERDICTS = ("correct", "incorrect", "invalid", "unknown")
_HEADER = re.compile(r"^### (?=(?:User|Assistant|Rationale|Answer):)", re.MULTILINE)

Row = Mapping[str, Any]


def make_pairs(
    graded_rows: Iterable[Row],
    questions: Iterable[Row],
    *,
    max_pairs_per_question: int | None = None,
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Zip each question's unique correct completions with its unique incorrect ones.

    In sample order, extras dropped. Two completions are the same when their rationales agree after
    folding whitespace and case; the lower sample stays. Invalid and unknown ones are not used.

    graded_rows: {id, sample, rationale, answer, verdict, ...} in any order;
    questions: {id, prompt, rationale, target, ...}.

    Returns (pairs, stats). pairs: {id, prompt, chosen, rejected, gold} in the order of `questions`,
    the last three as completion texts. stats: questions = all_correct + mixed + all_wrong (by its
    correct and incorrect completions) + no_valid (it has neither); completions per verdict;
    duplicates (correct or incorrect completions left out as repeats); pairs.
    Raises ValueError for a repeated question or sample, a graded row without its question, or an
    unknown verdict.
    """
    by_question = _by_question(graded_rows, questions)
    pairs: list[dict[str, str]] = []
    names = ("questions", "all_correct", "mixed", "all_wrong", "no_valid", "pairs", "duplicates")
    stats = dict.fromkeys((*names, *VERDICTS), 0)
    for question, rows in by_question.values():
        for row in rows:
            stats[row["verdict"]] += 1
        judged = [row for row in rows if row["verdict"] in ("correct", "incorrect")]
        chosen = _unique([row for row in judged if row["verdict"] == "correct"])
        rejected = _unique([row for row in judged if row["verdict"] == "incorrect"])
        stats["questions"] += 1
        stats[_outcome(bool(chosen), bool(rejected))] += 1
        stats["duplicates"] += len(judged) - len(chosen) - len(rejected)
        # zip drops the extras of the longer side
        zipped = list(zip(chosen, rejected, strict=False))[:max_pairs_per_question]
        stats["pairs"] += len(zipped)
        gold = _completion(question["rationale"], question["target"])
        pairs += [
            {
                "id": question["id"],
                "prompt": question["prompt"],
                "chosen": _completion(good["rationale"], good["answer"]),
                "rejected": _completion(bad["rationale"], bad["answer"]),
                "gold": gold,
            }
            for good, bad in zipped
        ]
    return pairs, stats


def _by_question(
    graded_rows: Iterable[Row], questions: Iterable[Row]
) -> dict[str, tuple[Row, list[Row]]]:
    """{question id: (question, its rows by sample)}, in the order of the questions."""
    found: dict[str, tuple[Row, list[Row]]] = {}
    for question in questions:
        if question["id"] in found:
            raise ValueError(f"question {question['id']!r} appears twice: ids must be unique")
        found[question["id"]] = (question, [])
    seen = set()
    for row in graded_rows:
        key = (row["id"], row["sample"])
        if row["id"] not in found:
            raise ValueError(f"graded row {key} has no question: grade with the same questions")
        if key in seen:
            raise ValueError(f"graded row {key} appears twice: generate this round again")
        if row["verdict"] not in VERDICTS:
            raise ValueError(
                f"graded row {key} has verdict {row['verdict']!r}, not one of {VERDICTS}"
            )
        seen.add(key)
        found[row["id"]][1].append(row)
    for _, rows in found.values():
        rows.sort(key=lambda row: row["sample"])
    return found


def _outcome(any_correct: bool, any_incorrect: bool) -> str:
    if any_correct and any_incorrect:
        return "mixed"
    if any_correct:
        return "all_correct"
    return "all_wrong" if any_incorrect else "no_valid"


def _unique(rows: list[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(" ".join(row["rationale"].split()).casefold(), row)
    return list(first.values())


def _completion(rationale: str, answer: str) -> str:
    """The same text as `prompts.cot_completion`, header lines made harmless."""
    rationale, answer = (_HEADER.sub("###  ", text.strip()) for text in (rationale, answer))
    return f"{rationale}\n### Answer:\n{answer}"
