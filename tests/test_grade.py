"""Facts about sections and verdicts of completions; what an answer is worth: test_answers.py."""

import subprocess
import sys

import pytest

from memphis_jax.rounds.answers import check_answer
from memphis_jax.rounds.grade import grade, parse

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
