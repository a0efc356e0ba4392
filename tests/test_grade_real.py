"""The grader on every gold answer of the real sets: right against itself, wrong against others."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.grading import Found, equal_golds, judge, read_sets
from memphis_jax.rounds.answers import check_answer
from memphis_jax.rounds.choices import read_options
from memphis_jax.rounds.symbolic import SymbolicEqual

pytestmark = pytest.mark.slow

QUESTIONS = {
    "gsm8k": 7473,
    "strategyqa": 229,
    "tal-scq5k": 1000,
    "competition_math": 12,
    "aqua dev": 254,
    "aqua test": 254,
    "flan aqua": 2728,
    "flan ecqa": 7112,
    "flan qasc": 1084,
    "flan strategyqa": 2061,
}
WITH_OPTIONS = ("tal-scq5k", "aqua dev", "aqua test", "flan aqua", "flan ecqa", "flan qasc")


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, str]]:
    return read_sets(shared / "data")


@pytest.fixture(scope="module")
def found(rows: list[dict[str, str]]) -> Iterator[Found]:
    with SymbolicEqual() as equal:
        yield judge(rows, equal)


def test_every_gold_answer_is_correct_against_itself(found: Found) -> None:
    assert found.questions == QUESTIONS
    for source, count in QUESTIONS.items():
        for form in ("itself", "in a sentence"):
            assert found.counts[source][form] == {"correct": count}


def test_no_answer_is_judged_otherwise_than_expected(found: Found) -> None:
    """By its option's text or letter, or another question's gold answer."""
    assert found.misjudged == []


def test_another_questions_gold_answer_is_wrong_except_where_equal(found: Found) -> None:
    """A few share a word or a number form with the right one: unknown, never correct."""
    for source, forms in found.counts.items():
        assert "correct" not in forms["another's"], source
        unknown, total = forms["another's"]["unknown"], forms["another's"].total()
        assert unknown <= 0.011 * total or source == "competition_math", source


def test_equal_golds_by_hand() -> None:
    def equal(a: str, b: str) -> bool:
        return equal_golds({"target": a}, b)

    assert equal("(B)", "B") and equal("1,000", "1000") and equal("Yes", "yes")
    assert equal("1/2", "0.5")
    assert not equal("B", "C") and not equal("12", "13") and not equal("cake", "cakes")


def test_options_are_found_in_nearly_every_prompt_that_has_them(rows: list[dict[str, str]]) -> None:
    """The five exceptions repeat each letter inside the option: "(A) (a)  4"."""
    missed = [
        row["prompt"]
        for row in rows
        if bool(read_options(row["prompt"])) != (row["source"] in WITH_OPTIONS)
    ]
    assert len(missed) == 5
    assert all("(A) (a)  4" in prompt for prompt in missed)


def test_gsm8k_with_a_digit_changed_is_incorrect(rows: list[dict[str, str]]) -> None:
    chosen = random.Random(0)
    for row in rows:
        if row["source"] == "gsm8k":
            places = [i for i, c in enumerate(row["target"]) if c.isdigit()]
            at = chosen.choice(places)
            digit = str((int(row["target"][at]) + chosen.randint(1, 9)) % 10)
            wrong = row["target"][:at] + digit + row["target"][at + 1 :]
            check = partial(check_answer, target=row["target"])
            assert check(wrong) == check(f"The answer is ${wrong}.") == "incorrect"
            assert check(f"{row['target']}.5") == "incorrect"
            assert check(f"${row['target']}.00 in all") == "correct"
