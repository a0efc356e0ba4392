"""Facts about sections and verdicts of completions; what an answer is worth: test_answers.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memphis_jax.rounds import commands
from memphis_jax.rounds.answers import check_answer
from memphis_jax.rounds.files import write_jsonl
from memphis_jax.rounds.grade import grade, parse
from memphis_jax.rounds.pairs import VERDICTS

NONE, SEVERAL, BESIDE = "no answer header", "several headers", "text beside the answer header"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", NONE),
        ("12", NONE),
        ("Because.\n12", NONE),
        ("### Answer:\n12", "empty rationale"),
        ("\n \n### Answer:\n12", "empty rationale"),
        ("Because.\n### Answer:\n", "empty answer"),
        ("Because.\n### Answer:", "empty answer"),
        ("Because.\n### Answer: 12", BESIDE),
        ("Because. ### Answer:\n12", NONE),
        ("Because.\n## Answer:\n12", NONE),
        ("Because.\n###  Answer:\n12", NONE),
        ("Because.\n### answer:\n12", NONE),
        ("Because.\n### Answer:\n12\n### Answer:\n12", SEVERAL),
        ("Because.\n### Answer:\n12\n### Answer: 12", SEVERAL),
        ("Because.\n### Answer:\n12\n### User:\nNext question", SEVERAL),
        ("Because.\n### Answer:\n12\n### User:", SEVERAL),
        ("### User:\nForged\n### Answer:\n12", SEVERAL),
        ("Because.\n### Rationale:\nAgain.\n### Answer:\n12", SEVERAL),
        ("Because.\n### Assistant:\nHi\n### Answer:\n12", SEVERAL),
        ("Because.\n### Assistant:\n12", NONE),
        ("Because.\n### Answer:\n ### Answer:\n12", SEVERAL),
    ],
)
def test_malformed_completions_are_invalid_even_with_the_right_number(
    text: str, reason: str
) -> None:
    assert grade(text, "12", check=check_answer) == ("", "", "invalid", reason)
    assert parse(text) is None


def test_sections_are_read_without_outer_whitespace() -> None:
    text = "  \nFirst.\n\nSecond: 6 + 6.\n ### Note\n### Answer: \t\r\n\n 12 \n"
    sections = ("First.\n\nSecond: 6 + 6.\n ### Note", "12")
    assert parse(text) == sections
    assert grade(text, "12", check=check_answer) == (*sections, "correct", "")


def test_a_completion_that_was_cut_off_is_invalid() -> None:
    # "12" may be the beginning of "1234"
    graded = grade("Because.\n### Answer:\n12", "12", check=check_answer, finish_reason="length")
    assert graded == ("Because.", "12", "invalid", "truncated")
    graded = grade("Because.\n### Ans", "12", check=check_answer, finish_reason="length")
    assert graded == ("", "", "invalid", "truncated")


def test_no_verdict_in_time_is_unknown_and_says_so() -> None:
    def slow(answer: str, target: str) -> str:
        raise TimeoutError

    graded = grade("Because.\n### Answer:\n12", "12", check=slow)
    assert graded == ("Because.", "12", "unknown", "time-out")


def test_an_empty_ground_truth_is_refused() -> None:
    with pytest.raises(ValueError, match="source 'gsm8k' has an empty target"):
        grade("Because.\n### Answer:\n12", " ", check=check_answer, source="gsm8k")


def test_math_verify_stays_out_of_this_process() -> None:
    """Formulas are the worker's affair: the command that grades imports neither it nor sympy."""
    code = """
import sys
from memphis_jax.rounds import commands
print(sorted(name for name in sys.modules if name in ("sympy", "math_verify", "jax")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({field: None}, f"the field '{field}' as text") for field in ("id", "prompt", "source")),
        ({"target": 5}, "the field 'target' as text, found 5"),
        ({"target": " "}, "the target is empty"),
        ({"id": "q"}, "the id 'q' is there twice"),
    ],
)
def test_a_question_that_no_answer_can_be_judged_by_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    question = {"id": "q", "prompt": "?", "target": "4", "source": "gsm8k"}
    write_jsonl(tmp_path / "questions.jsonl", [question])
    write_jsonl(tmp_path / "broken.jsonl", [{**question, "id": "r"} | change])
    write_jsonl(tmp_path / "completions.jsonl", [{"meta": {}}])
    files = [str(tmp_path / name) for name in ("questions.jsonl", "broken.jsonl")]
    out = ["--completions", str(tmp_path / "completions.jsonl"), "--out", str(tmp_path / "g.jsonl")]
    with pytest.raises(ValueError, match=f"broken.jsonl, line 1: .*{message}"):
        commands.grade([*out, "--questions", *files])


def test_pairs_json_holds_each_count_once(tmp_path: Path) -> None:
    question = {"id": "q", "prompt": "?", "rationale": "r", "target": "4"}
    write_jsonl(tmp_path / "questions.jsonl", [question])
    row = {"id": "q", "rationale": "so", "answer": "4"}
    rows = [row | {"sample": i, "verdict": v} for i, v in enumerate(["correct", "incorrect"])]
    write_jsonl(tmp_path / "graded.jsonl", [{"meta": {}}, *rows])
    files = [("--" + name, str(tmp_path / f"{name}.jsonl")) for name in ("graded", "questions")]
    out = ("--out", str(tmp_path / "pairs.jsonl"))
    commands.pairs([word for pair in (*files, out) for word in pair])
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert found.pop("verdicts") == {"correct": 1, "incorrect": 1, "invalid": 0, "unknown": 0}
    assert found.keys().isdisjoint(VERDICTS) and found["pairs"] == 1
