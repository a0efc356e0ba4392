"""Fuzzing the grader: 20,400 cases of five properties, with oracles of its own."""

import re
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphis_jax.rounds.answers import check_answer
from memphis_jax.rounds.choices import check_choice, read_options
from memphis_jax.rounds.grade import grade, parse
from memphis_jax.rounds.symbolic import SymbolicEqual

pytestmark = pytest.mark.slow

fuzz = partial(settings, deadline=None, derandomize=True, database=None)

ANSWER_PIECES = [
    *("12", "1,000", "$", "%", "/", "-", " or ", "not ", ".", "yes", "B", "(C)", "=", "x", "half"),
    *(" ", "\n", "e9", "½", "12 apples", "\\frac{1}{2}", "^2", "Paris", "the answer is ", "true"),
]
HEADER_PIECES = [
    *("### Answer:", "\n### Answer:\n", "\n### User:\n", "### Rationale:", "\n### Assistant: hi\n"),
    *("\n###  Answer:\n", "\n### answer:\n", " ### Answer:\n", "\n### Answer: 12\n", "\r\n", "###"),
]
ANSWERS = st.one_of(
    st.text(max_size=12), st.lists(st.sampled_from(ANSWER_PIECES), max_size=6).map("".join)
)
TEXTS = st.one_of(
    ANSWERS,
    st.lists(st.sampled_from(ANSWER_PIECES + HEADER_PIECES), max_size=10).map("".join),
)
TARGETS = st.sampled_from(
    [
        *("12", "-0.5", "1,000", "50%", "$18", "12 apples", "\\frac{1}{2}", "x^2", "(3,4)"),
        *("B", "(C)", "yes", "neutral", "Paris"),
    ]
)
PROMPTS = st.one_of(
    TEXTS,
    st.lists(ANSWERS, max_size=5).map(
        lambda texts: "Options: " + " ".join(f"({'ABCDE'[i]}) {t}" for i, t in enumerate(texts))
    ),
    st.just("Options:\n(A) 12\n(B) 1,000\n(C) Paris\n(D) x^2"),
)


def as_written(a: str, b: str) -> bool:
    """A stand-in for the worker: formulas are equal as they are written."""
    return "".join(a.split()) == "".join(b.split())


def always(a: str, b: str) -> bool:
    """The most lenient equality there is."""
    return True


def is_valid(text: str) -> bool:
    """Whether a completion has a rationale and an answer, line by line from the definition."""
    lines = text.strip().split("\n")
    openings = tuple(f"### {name}:" for name in ("User", "Assistant", "Rationale", "Answer"))
    headers = [i for i, line in enumerate(lines) if line.startswith(openings)]
    if len(headers) != 1 or lines[headers[0]].strip() != "### Answer:":
        return False
    before, after = (
        "\n".join(part).strip() for part in (lines[: headers[0]], lines[headers[0] + 1 :])
    )
    return bool(before) and bool(after) and not after.startswith(openings)


@fuzz(max_examples=5000)
@given(text=TEXTS)
def test_the_parser_never_raises_and_finds_what_is_there(text: str) -> None:
    parsed = parse(text)
    assert (parsed is not None) == is_valid(text)
    if parsed is not None:
        assert parsed.rationale.strip() == parsed.rationale != ""
        assert parsed.answer.strip() == parsed.answer != ""
        rebuilt = f"{parsed.rationale}\n### Answer:\n{parsed.answer}"
        assert parse(rebuilt) == parsed
        folded = "".join(text.split())
        assert folded == "".join(rebuilt.split())  # nothing lost


@fuzz(max_examples=5000)
@given(
    text=TEXTS,
    target=TARGETS,
    prompt=PROMPTS,
    finish_reason=st.sampled_from(["stop", "stop", "length", "abort"]),
)
def test_nothing_without_a_valid_rationale_and_answer_is_ever_correct(
    text: str, target: str, prompt: str, finish_reason: str
) -> None:
    check = partial(check_choice, options=read_options(prompt), equal=always)
    for completion in (text, f"{text}\n### Answer:\n{target}", f"{target}{text}"):
        graded = grade(completion, target, check=check, finish_reason=finish_reason)
        valid = is_valid(completion) and finish_reason == "stop"
        assert (graded.verdict == "invalid") == (not valid)
        assert graded.verdict in ("correct", "incorrect", "invalid", "unknown")
        assert bool(graded.reason) == (not valid)


BLANKS = st.lists(st.sampled_from([" ", "  ", "\t", " \t ", "\u00a0"]), min_size=1, max_size=4)
BREAKS = st.lists(st.sampled_from(["\n", "\r\n", "\n\n", " \n"]), min_size=1, max_size=4)


@fuzz(max_examples=5000)
@given(
    rationale=ANSWERS,
    answer=ANSWERS,
    target=TARGETS,
    prompt=PROMPTS,
    blanks=BLANKS,
    breaks=BREAKS,
    outer=st.sampled_from(["", " ", "\n", "\t\r\n  "]),
)
def test_the_verdict_does_not_change_with_whitespace(
    rationale: str,
    answer: str,
    target: str,
    prompt: str,
    blanks: list[str],
    breaks: list[str],
    outer: str,
) -> None:
    text = f"{rationale}\n### Answer:\n{answer}"
    count = iter(range(10**6))
    # the blank inside a header is part of the format
    blurred = re.sub(r"(?<!###) +", lambda _: blanks[next(count) % len(blanks)], text)
    blurred = re.sub(r"\r?\n", lambda _: breaks[next(count) % len(breaks)], blurred)
    check = partial(check_choice, options=read_options(prompt), equal=as_written)
    one, two = (grade(t, target, check=check) for t in (text, f"{outer}{blurred}{outer}"))
    assert one.verdict == two.verdict
    assert one.reason == two.reason
    for section, same in zip(one[:2], two[:2], strict=True):
        assert section.split() == same.split()


DIGITS = st.integers(0, 10**6)
NUMBERS = st.one_of(
    DIGITS.map(str),
    DIGITS.map(lambda n: f"-{n + 1}"),
    DIGITS.map(lambda n: f"{n:,}"),
    DIGITS.map(lambda n: f"${n / 100:.2f}"),
    DIGITS.map(lambda n: f"{n / 1000:.3f}"),
    DIGITS.map(lambda n: f"{n % 1000}%"),
    DIGITS.map(lambda n: f"{n} apples"),
    st.tuples(st.integers(1, 999), st.integers(1, 99)).map(lambda n: f"{n[0]}/{n[1]}"),
    st.tuples(st.integers(1, 999), st.integers(1, 99)).map(lambda n: f"\\frac{{{n[0]}}}{{{n[1]}}}"),
    st.tuples(st.integers(1, 99), st.integers(1, 9), st.integers(1, 9)).map(
        lambda n: f"{n[0]} {n[1]}/{n[2]}"
    ),
)


def mutated(gold: str, place: int, by: int) -> str:
    """The gold answer with one digit changed."""
    places = [i for i, c in enumerate(gold) if c in "0123456789"]
    at = places[place % len(places)]
    return gold[:at] + str((int(gold[at]) + by) % 10) + gold[at + 1 :]


@fuzz(max_examples=5000)
@given(
    gold=NUMBERS,
    place=DIGITS,
    by=st.integers(1, 9),
    form=st.sampled_from(["{}", "The answer is {}.", "**{}**", "$\\boxed{{{}}}$", "x = {}"]),
    other=NUMBERS,
)
def test_a_number_with_a_digit_changed_is_not_correct(
    gold: str, place: int, by: int, form: str, other: str
) -> None:
    options = (("A", other), ("B", gold))
    for check in (check_answer, partial(check_choice, options=options)):
        text = f"So.\n### Answer:\n{form.format(mutated(gold, place, by))}"
        assert grade(text, gold, check=partial(check, equal=as_written)).verdict != "correct"
    assert check_answer(gold, gold) == "correct"


FORMULAS = st.tuples(
    st.sampled_from(
        [
            r"\frac{A}{B}\pi",
            r"A+Bi",
            r"x^2+Ax+B",
            r"(A,B)",
            r"A\sqrt{B}",
            r"[A,B)",
            r"x^2=Ax-B",
            r"\{A,x+B\}",
            r"A^{x}+B",
        ]
    ),
    st.integers(1, 99),
    st.integers(101, 199),  # [A, B) is not empty
).map(lambda t: t[0].replace("A", str(t[1])).replace("B", str(t[2])))


def test_a_formula_with_a_digit_changed_is_not_correct() -> None:
    with SymbolicEqual() as equal:

        @fuzz(max_examples=400)
        @given(gold=FORMULAS, place=DIGITS, by=st.integers(1, 9))
        def property_(gold: str, place: int, by: int) -> None:
            other = mutated(gold, place, by)
            assert check_answer(other, gold, equal=equal) != "correct"

        property_()
