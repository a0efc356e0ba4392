"""The grading audit of hand-worked rows."""

from typing import Any

import pytest

from memphis_jax.rounds.audit import NUM_SAMPLES, audit

QUESTIONS = {
    name: {"id": name, "prompt": f"P{name}", "target": "4", "source": source, "rationale": "r"}
    for name, source in (("a", "gsm8k"), ("b", "gsm8k"), ("m", "math"))
}


def row(
    name: str, verdict: str, rationale: str = "", reason: str = "", finish: str = "stop"
) -> dict[str, Any]:
    return {
        "id": name,
        "sample": 0,
        "text": f"{rationale}\n### Answer:\n4",
        "finish_reason": finish,
        "num_tokens": 9,
        "rationale": rationale,
        "answer": "4",
        "verdict": verdict,
        "reason": reason,
    }


def test_hand_worked_counts() -> None:
    graded = [
        row("a", "correct", "one"),
        row("a", "correct", " ONE\n"),  # the first again
        row("a", "incorrect", "one"),  # not: another verdict
        row("b", "correct", "one"),  # not: another question
        row("b", "unknown", "one"),
        row("b", "unknown", "one"),  # not counted: used for no pair
        row("b", "unknown", "x", "time-out"),
        row("a", "invalid", "", "no answer header"),
        row("a", "invalid", "", "no answer header"),
        row("a", "invalid", "", "several headers"),
        row("a", "invalid", "", "truncated", "length"),
        row("a", "invalid", "x", "truncated", "abort"),  # stopped, but not by its length
        row("m", "correct", "one"),
    ]
    found = audit(graded, QUESTIONS)
    assert found["sources"] == {
        "gsm8k": {
            "answers": 12,
            "correct": 3,
            "incorrect": 1,
            "unknown": 3,
            "invalid": 5,
            "timeouts": 1,
            "truncated": 1,
            "duplicates": 1,
            "malformed": {"no answer header": 2, "several headers": 1},
        },
        "math": {
            "answers": 1,
            "correct": 1,
            "incorrect": 0,
            "unknown": 0,
            "invalid": 0,
            "timeouts": 0,
            "truncated": 0,
            "duplicates": 0,
            "malformed": {},
        },
    }
    assert {verdict: len(rows) for verdict, rows in found["samples"].items()} == {
        "correct": 4,
        "incorrect": 1,
        "unknown": 3,
        "invalid": 5,
    }
    assert found["samples"]["incorrect"] == [
        {
            "id": "a",
            "sample": 0,
            "source": "gsm8k",
            "prompt": "Pa",
            "target": "4",
            "text": "one\n### Answer:\n4",
            "answer": "4",
            "reason": "",
        }
    ]


def test_samples_are_random_but_fixed_by_the_seed() -> None:
    graded = [row("a", "correct", f"r{i}") for i in range(500)]
    one = audit(graded, QUESTIONS)["samples"]["correct"]
    assert len({sample["text"] for sample in one}) == NUM_SAMPLES == 20
    assert one == audit(graded, QUESTIONS)["samples"]["correct"]
    assert one != audit(graded, QUESTIONS, seed=1)["samples"]["correct"]
    places = [int(sample["text"].split("\n")[0][1:]) for sample in one]
    assert min(places) < 100 and max(places) > 400  # from everywhere


def test_samples_are_drawn_from_each_source_in_turn() -> None:
    graded = [row("a", "correct", f"r{i}") for i in range(500)]
    graded += [row("m", "correct", f"m{i}") for i in range(15)]
    found = audit(graded, QUESTIONS)["samples"]["correct"]
    sources = [sample["source"] for sample in found]
    assert sources.count("gsm8k") == sources.count("math") == 10
    few = audit(graded[:30] + graded[-2:], QUESTIONS)["samples"]["correct"]
    assert [sample["source"] for sample in few].count("math") == 2 and len(few) == NUM_SAMPLES


def test_no_rows() -> None:
    samples = {"correct": [], "incorrect": [], "unknown": [], "invalid": []}
    assert audit([], QUESTIONS) == {"sources": {}, "samples": samples}


def test_a_row_without_its_question_is_refused() -> None:
    with pytest.raises(KeyError):
        audit([row("z", "correct")], QUESTIONS)
