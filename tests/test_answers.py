"""Facts about answers: the verdict a careful person would give who sees no question.

"unknown" in a table means: a person would want to see the question first.
"""

from collections.abc import Iterator
from functools import partial

import pytest

from memphis_jax.rounds.answers import check_answer
from memphis_jax.rounds.symbolic import SymbolicEqual

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
    ("12", "twelve", "correct"),
    ("2", "two", "correct"),
    ("100", "one hundred", "correct"),
    ("13", "twelve", "incorrect"),
    ("\\sqrt{144}", "twelve", "correct"),
    ("3/4", "three-quarters", "unknown"),
    ("0", "none", "unknown"),
    ("6", "\\text{June}", "unknown"),
    ("June", "6", "unknown"),
    # digits beside what changes them
    ("one hour and 30 minutes", "30", "unknown"),
    ("four or 5", "5", "unknown"),
    ("one and 3/4", "3/4", "unknown"),
    ("two dollars and 50 cents", "50", "unknown"),
    ("five (5)", "5", "correct"),
    ("25π", "25", "unknown"),
    ("The area is 25 pi.", "25", "unknown"),
    ("3 fifths", "3", "unknown"),
    ("square root of 5", "5", "unknown"),
    ("5 divided by two", "5", "unknown"),
    # a minus with a blank: a sign, a bullet or a dash; in LaTeX a sign
    ("- 3", "3", "unknown"),
    ("- 3", "-3", "unknown"),
    ("The answer is - $3", "3", "unknown"),
    ("- \\frac{1}{2}", "1/2", "incorrect"),
    ("- \\frac{1}{2}", "-1/2", "correct"),
    # units with an exponent
    ("72 cm^2", "72", "correct"),
    ("73 cm^2", "72", "incorrect"),
    ("72 cm", "72 cm^2", "unknown"),
    ("72 m^{3}", "72", "correct"),
    ("72\\text{ cm}^2", "72", "correct"),
    ("$72 \\mathrm{cm}^2$", "72", "correct"),
    ("72", "72 \\text{ cm}^2", "correct"),
    ("9.8 m/s^2", "9.8", "correct"),
    ("72 \\frac{km}{h}", "72", "unknown"),
    ("3 x 10^3", "3000", "correct"),
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
    ("60", "1 hour", "unknown"),
    ("150", "$1.50", "unknown"),
    ("0.25", "25 cents", "unknown"),
    ("5", "500 centimeters", "unknown"),
    ("61", "1 hour", "incorrect"),
    ("7", "$1", "incorrect"),
    ("60", "1", "incorrect"),
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
    # a choice that is denied or changed
    ("B. No, it is C", "B", "unknown"),
    ("B: 12, no wait, C", "B", "unknown"),
    ("B) wrong", "B", "unknown"),
    ("B. C", "B", "unknown"),
    ("B is correct, or rather C", "B", "unknown"),
    ("C) No, B", "B", "unknown"),
    # yes and no
    ("Yes", "yes", "correct"),
    ("Yes, because cats purr.", "yes", "correct"),
    ("true", "yes", "correct"),
    ("The answer is no.", "No", "correct"),
    ("no", "yes", "incorrect"),
    ("yes and no", "yes", "incorrect"),
    ("Either yes or no.", "yes", "incorrect"),
    ("yes/no", "no", "incorrect"),
    ("Yes, no doubt", "yes", "unknown"),
    ("No, not true", "no", "unknown"),
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
    ("undefined", "no solution", "unknown"),
    ("no solution", "undefined", "unknown"),
    ("dogs", "dog", "unknown"),
    ("3/2", "3:2", "unknown"),
    ("Paris, France", "Paris", "unknown"),
    ("C", "C#", "unknown"),
    # labels of closed vocabularies
    ("Entailment.", "entailment", "correct"),
    ("The answer is: neutral, because nothing is said", "neutral", "correct"),
    ("contradiction", "entailment", "incorrect"),
    ("neutral or positive", "positive", "incorrect"),
    ("not valid", "invalid", "unknown"),
    ("it depends", "neutral", "unknown"),
    ("incorrect", "correct", "incorrect"),
    ("implausible since pigs walk", "plausible", "incorrect"),
]


@pytest.fixture(scope="module")
def equal() -> Iterator[SymbolicEqual]:
    with SymbolicEqual(seconds=60) as equal:  # verdicts, however slow and traced the worker is
        yield equal


@pytest.mark.parametrize(("answer", "target", "verdict"), ANSWERS)
def test_the_verdict_of_a_careful_person(
    answer: str, target: str, verdict: str, equal: SymbolicEqual
) -> None:
    assert check_answer(answer, target, equal=equal) == verdict


def test_without_an_equality_formulas_are_compared_as_written() -> None:
    assert check_answer("x + 1", "x+1") == "correct"
    assert check_answer("1+x", "x+1") == "unknown"


@pytest.mark.parametrize(
    ("answer", "source", "verdict"),
    [
        ("C", "", "incorrect"),
        ("The answer is (B)", "", "correct"),
        ("n or B", "", "unknown"),
        # in MATH a letter is a variable, and "b" one of its own
        ("C", "hendrycks/competition_math", "incorrect"),
        ("n", "hendrycks/competition_math", "incorrect"),
        ("n", "math_qa", "unknown"),
    ],
)
def test_the_source_says_whether_a_letter_is_a_choice(
    answer: str, source: str, verdict: str, equal: SymbolicEqual
) -> None:
    assert check_answer(answer, "B", source=source, equal=equal) == verdict


@pytest.mark.parametrize(
    ("answer", "target"), [("12 apples", "12 apples"), ("a b", "a b"), ("12 or\n13", "12 or\n13")]
)
@pytest.mark.parametrize("blank", ["  ", "\t", "\u00a0", " \r", " " * 3000])
def test_runs_of_blanks_are_one(answer: str, target: str, blank: str) -> None:
    blurred = blank + answer.replace(" ", blank).replace("\n", f"{blank}\r\n") + blank
    assert check_answer(blurred, target) == "correct"


def test_a_line_break_is_no_blank() -> None:
    assert check_answer("100 200", "100200") == "correct"
    assert check_answer("100\n200", "100200") == "incorrect"


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
def test_hostile_answers_end_and_are_never_correct(target: str, equal: SymbolicEqual) -> None:
    for answer in HOSTILE:
        assert check_answer(answer, target, equal=equal) in ("incorrect", "unknown"), answer[:50]


def test_hostile_targets_end_too(equal: SymbolicEqual) -> None:
    check = partial(check_answer, "12", equal=equal)
    for target in HOSTILE:
        assert check(target) in ("incorrect", "unknown"), target[:50]
