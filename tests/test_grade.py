"""Facts about grading: the verdict a careful person would give, and that no text breaks the grader.

"unknown" in a table means: a person would want to see the question first.
"""

import json
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphis_jax.rounds.grade import check_answer, grade, parse, symbolic_equal

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/train.jsonl"

ANSWERS = [
    # the same number, written otherwise
    ("1,000", "1000", "correct"),
    ("1000", "1,000", "correct"),
    ("1,234,567.0", "1234567", "correct"),
    ("1 000", "1000", "correct"),
    ("1e3", "1000", "correct"),
    ("0.5", "1/2", "correct"),
    ("1/2", "0.5", "correct"),
    ("2/4", "1/2", "correct"),
    (".5", "0.5", "correct"),
    ("1 1/2", "1.5", "correct"),
    ("12.00", "12", "correct"),
    ("+12", "12", "correct"),
    ("-12", "12", "incorrect"),
    ("\u221212", "-12", "correct"),  # a typographic minus
    ("negative 12", "-12", "correct"),
    ("-$12", "-12", "correct"),
    ("$-12", "-12", "correct"),
    ("\\frac{1}{2}", "0.5", "correct"),
    ("-\\frac12", "-0.5", "correct"),
    ("$\\boxed{12}$.", "12", "correct"),
    ("$1{,}000$", "1000", "correct"),
    ("**12**", "12", "correct"),
    ("twelve", "12", "correct"),
    ("Twenty-five dollars", "25", "correct"),
    ("two hundred", "200", "correct"),
    ("2 million", "2000000", "correct"),
    ("2 million", "2", "incorrect"),
    ("3 dozen", "36", "correct"),
    ("1,00", "100", "unknown"),
    ("\u00bd", "0.5", "unknown"),
    ("half", "0.5", "unknown"),
    ("one hundred and five", "105", "unknown"),
    # other numbers
    ("13", "12", "incorrect"),
    ("120", "12", "incorrect"),
    ("12.4", "12", "incorrect"),
    ("0.33", "1/3", "unknown"),  # rounded
    ("3.33", "3.3333", "unknown"),
    ("0.5", "0.54", "incorrect"),
    ("12/0", "12", "incorrect"),
    # units and money
    ("$18", "18", "correct"),
    ("18$", "18", "correct"),
    ("$18.00", "18", "correct"),
    ("$18.", "18", "correct"),
    ("18 dollars", "18", "correct"),
    ("18 dollars", "$18", "correct"),
    ("$18", "18 dollars", "correct"),
    ("18 euros", "$18", "unknown"),
    ("60 minutes", "1 hour", "unknown"),
    ("12kg", "12", "correct"),
    ("12 km/h", "12", "correct"),
    ("12x", "12", "unknown"),
    ("12k", "12", "unknown"),
    # percent
    ("50%", "50%", "correct"),
    ("50 percent", "50%", "correct"),
    ("50\\%", "50%", "correct"),
    ("1/2", "50%", "correct"),
    ("50", "50%", "correct"),
    ("50%", "50", "correct"),
    ("0.5%", "50%", "incorrect"),
    ("50%", "0.5", "unknown"),
    ("40%", "0.5", "incorrect"),
    # sentences
    ("12.", "12", "correct"),
    ("The answer is 12", "12", "correct"),
    ("The answer is: $12.", "12", "correct"),
    ("Natalia sold 12 clips altogether.", "12", "correct"),
    ("x = 12", "12", "correct"),
    ("48 + 24 = 72", "72", "correct"),
    ("48 + 24 = 72 clips", "72", "correct"),
    ("1,000 + 2 = 1,002", "1002", "correct"),
    ("48 + 24 = 72", "24", "incorrect"),
    ("not 12", "12", "incorrect"),
    ("It is not 12", "12", "incorrect"),
    ("It isn't 12.", "12", "incorrect"),
    ("12 is wrong", "12", "incorrect"),
    ("12 is not the answer", "12", "incorrect"),
    ("12 (incorrect)", "12", "incorrect"),
    ("x != 12", "12", "incorrect"),
    ("more than 12", "12", "incorrect"),
    ("about 12", "12", "unknown"),
    ("maybe 12", "12", "unknown"),
    ("about 10", "12", "incorrect"),
    ("twice 6", "12", "unknown"),
    ("12 and a half", "12", "unknown"),
    ("I don't know", "12", "incorrect"),
    ("apples", "12", "incorrect"),
    ("?", "12", "incorrect"),
    # two answers
    ("12 or 13", "12", "incorrect"),
    ("12 or 13", "13", "incorrect"),
    ("either 12 or 13", "12", "incorrect"),
    ("between 10 and 15", "12", "incorrect"),
    ("12 dollars or 13 dollars", "12", "incorrect"),
    ("12, 13", "12", "incorrect"),
    ("12\n13", "13", "incorrect"),
    ("10 to 12", "12", "incorrect"),
    ("48-24", "24", "unknown"),  # a range or a difference
    ("x = 12 or x = 13", "13", "incorrect"),
    ("12. The answer is 12", "12", "correct"),
    ("48 and then 24, so 72 altogether", "72", "unknown"),
    ("2 hours 30 minutes", "2.5", "unknown"),
    # not quite numbers
    ("48+24", "72", "unknown"),
    ("12 - 12", "12", "unknown"),
    ("5 -10", "-5", "unknown"),
    ("no clips", "0", "unknown"),
    ("cannot be 12", "12", "incorrect"),
    ("anything but 12", "12", "unknown"),
    ("over 12", "12", "unknown"),
    ("12 left over", "12", "correct"),
    ("12 x 12", "12", "unknown"),
    ("9**9**9", "9", "unknown"),
    ("12!", "12", "unknown"),
    ("12:30", "12", "unknown"),
    ("12/05/2020", "12", "unknown"),
    ("x12", "12", "unknown"),
    ("2^3", "8", "correct"),
    ("\\sqrt{144}", "12", "correct"),
    ("\\sqrt{145}", "12", "incorrect"),
    ("9" * 99, "12", "incorrect"),
    ("9" * 1000, "12", "incorrect"),
    ("1e999999999", "12", "unknown"),
    # choices
    ("B", "B", "correct"),
    ("(B)", "B", "correct"),
    ("b", "(B)", "correct"),
    ("B.", "B", "correct"),
    ("Option B", "B", "correct"),
    ("The correct answer is B) 12 apples.", "B", "correct"),
    ("B is correct", "B", "correct"),
    ("C", "B", "incorrect"),
    ("C) B-side", "B", "incorrect"),
    ("B or C", "B", "incorrect"),
    ("A, B", "B", "incorrect"),
    ("not B", "B", "incorrect"),
    ("B is wrong", "B", "incorrect"),
    ("A dog", "A", "unknown"),
    ("A is not correct; B is", "B", "unknown"),
    ("12 apples", "B", "unknown"),
    ("(B) or (C)", "B", "incorrect"),
    # yes and no
    ("Yes", "yes", "correct"),
    ("Yes, because cats purr.", "yes", "correct"),
    ("true", "yes", "correct"),
    ("The answer is no.", "No", "correct"),
    ("no", "yes", "incorrect"),
    ("yes and no", "yes", "incorrect"),
    ("maybe", "yes", "incorrect"),
    ("no idea", "no", "unknown"),
    ("Yes, but no cat can fly", "yes", "unknown"),
    ("not true", "no", "unknown"),
    # formulas
    ("1+x", "x+1", "correct"),
    ("$x + 1$.", "x+1", "correct"),
    ("x+2", "x+1", "incorrect"),
    ("\\frac{\\sqrt{2}}{2}", "1/\\sqrt{2}", "correct"),
    ("pi/2", "\\frac{\\pi}{2}", "correct"),
    ("(4,3)", "(3,4)", "incorrect"),
    ("x+1 or x+2", "x+1", "unknown"),
    ("not x+1", "x+1", "unknown"),
    ("x^{9^{9^9}}", "x+1", "unknown"),
    # words
    ("Paris", "Paris", "correct"),
    ("the paris.", "Paris", "correct"),
    ("The answer is Paris", "Paris", "correct"),
    ("London", "Paris", "incorrect"),
    ("not Paris", "Paris", "incorrect"),
    ("not London, Paris", "Paris", "unknown"),
    ("dogs", "dog", "unknown"),
    ("3/2", "3:2", "unknown"),
    ("Paris, France", "Paris", "unknown"),
    ("C", "C#", "unknown"),
]


@pytest.mark.parametrize(("answer", "target", "verdict"), ANSWERS)
def test_the_verdict_of_a_careful_person(answer, target, verdict):
    text = f"Because.\n### Answer:\n{answer}"
    assert grade(text, target).verdict == verdict
    assert check_answer(answer, target) == verdict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "Because.\n12",
        "### Answer:\n12",
        "\n \n### Answer:\n12",
        "Because.\n### Answer:\n",
        "Because.\n### Answer:",
        "Because.\n### Answer: 12",
        "Because. ### Answer:\n12",
        "Because.\n## Answer:\n12",
        "Because.\n###  Answer:\n12",
        "Because.\n### answer:\n12",
        "Because.\n### Answer:\n12\n### Answer:\n12",
        "Because.\n### Answer:\n12\n### Answer: 12",
        "Because.\n### Answer:\n12\n### User:\nNext question",
        "Because.\n### Answer:\n12\n### User:",
        "### User:\nForged\n### Answer:\n12",
        "Because.\n### Rationale:\nAgain.\n### Answer:\n12",
        "Because.\n### Assistant:\nHi\n### Answer:\n12",
    ],
)
def test_malformed_completions_are_invalid_even_with_the_right_number(text):
    assert grade(text, "12") == ("", "", "invalid")


def test_sections_are_read_without_outer_whitespace():
    text = "  \nFirst.\n\nSecond: 6 + 6.\n ### Note\n### Answer: \t\r\n\n 12 \n"
    assert parse(text) == ("First.\n\nSecond: 6 + 6.\n ### Note", "12")
    assert grade(text, "12") == (*parse(text), "correct")


def test_a_completion_that_was_cut_off_is_invalid():
    # "12" may be the beginning of "1234"
    graded = grade("Because.\n### Answer:\n12", "12", finish_reason="length")
    assert graded == ("Because.", "12", "invalid")
    assert grade("Because.\n### Ans", "12", finish_reason="length").verdict == "invalid"


def test_an_empty_ground_truth_is_refused():
    with pytest.raises(ValueError, match="source 'gsm8k' has an empty target"):
        grade("Because.\n### Answer:\n12", " ", source="gsm8k")


def test_every_gsm8k_answer_is_correct_against_itself():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not here")
    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()]
    assert len(rows) == 7473
    wrong = []
    for row in rows:
        rationale, target = re.sub(r"<<.*?>>", "", row["answer"]).split("####")
        text = f"{rationale.strip()}\n### Answer:\n{target.strip()}"
        # the comparison itself, not the short cut for equal texts
        other = f"{rationale.strip()}\n### Answer:\nThe answer is ${target.strip()}.00 in all"
        if {grade(text, target).verdict, grade(other, target).verdict} != {"correct"}:
            wrong.append(row)
        more = f"{rationale.strip()}\n### Answer:\n{target.strip()}.5"
        if grade(more, target).verdict != "incorrect":
            wrong.append(row)
    assert wrong == []


HOSTILE = [
    "9**9**9",
    "9^9^9^9",
    "9" * 100_000,
    "-" * 100_000,
    "1," * 50_000,
    "1,111" * 20_000,
    "100 " * 25_000 + "1.1.1",
    "((((" * 25_000,
    "$" * 100_000,
    "\\frac{" * 20_000,
    "\\boxed{" * 300 + "}" * 300,
    "\\text{a{b}" * 180,
    "1/" * 900,
    "not " * 499,
    "A, " * 600,
    "12 " * 660,
    "it is " * 300,
    " " * 100_000 + "x",
    "\n" * 100_000 + "x",
    "99999999!",
    "x^99999999",
    "2^{999}^{999}",
    "\\int_0^1 \\sin(x^{x}) dx",
    "10^{10^{10}}",
    "1e999",
]


@pytest.mark.parametrize("target", ["12", "x+1", "B", "yes", "Paris", "\\sqrt{2}"])
def test_hostile_answers_end_and_are_never_correct(target):
    for answer in HOSTILE:
        assert check_answer(answer, target) in ("incorrect", "unknown"), answer[:50]


def test_hostile_targets_end_too():
    for target in HOSTILE:
        assert check_answer("12", target) in ("incorrect", "unknown"), target[:50]


def test_symbolic_equal_says_none_where_it_cannot_tell():
    assert symbolic_equal("x^2-1", "(x-1)(x+1)") is True
    assert symbolic_equal("x^2-1", "(x-1)(x-1)") is False
    assert symbolic_equal("x+1", "x^+") is None
    assert symbolic_equal("x+1", "9^{9^{9}}") is None
    assert symbolic_equal("x+1", "x" * 400) is None
    assert symbolic_equal("x+1", "\\binom{999999}{99999}") is None  # runs into the time limit


def test_symbolic_equal_refuses_a_thread_where_its_time_limit_would_not_hold():
    errors = []

    def ask():
        try:
            symbolic_equal("x+1", "1+x")
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(errors) == 1


PIECES = [
    "12",
    "1,000",
    "$",
    "%",
    "/",
    "-",
    " or ",
    "not ",
    ".",
    "yes",
    "B",
    "(C)",
    "=",
    "x",
    "half",
]
PIECES += [
    "\n",
    "### Answer:",
    "\n### Answer:\n",
    "\n### User:\n",
    "### Rationale:",
    " ",
    "e9",
    "½",
]
TEXTS = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
TARGETS = st.sampled_from(["12", "-0.5", "1,000", "50%", "$18", "B", "yes", "Paris", "12 apples"])


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(text=TEXTS, answer=TEXTS, target=TARGETS, space=st.sampled_from([" ", "\n", "\t\r\n  "]))
def test_no_text_breaks_the_grader(text, answer, target, space):
    for completion in (text, f"{text}\n### Answer:\n{answer}"):
        graded = grade(completion, target)
        parsed = parse(completion)
        assert graded.verdict in ("correct", "incorrect", "invalid", "unknown")
        assert (graded.verdict == "invalid") == (parsed is None)
        if parsed is not None:
            assert parsed.rationale.strip() and parsed.answer.strip()
            assert graded[:2] == parsed
        assert grade(space + completion + space, target) == graded
        assert grade(completion, target, finish_reason="length").verdict == "invalid"
