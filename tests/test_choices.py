"""Facts about multiple choice: options read from prompts, answers judged by the option named."""

import pytest

from memphis_jax.rounds.choices import check_choice, read_options

ABC = (("A", "12"), ("B", "13"), ("C", "a dog"))


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("How many?\nAnswer Choices: (A) 12 (B) 13 (C) a dog", ABC),
        ("How many?\nOptions:\n(A)  12\n(B)  13 \n(C)  a dog", ABC),
        ("How many?\nOptions:\n- (A) 12\n- (B) 13\n- (C) a dog\nThink first.", ABC),
        ("How many? Options: a ) 12 , b ) 13 , c ) a dog", ABC),
        ("How many? A) 12 B) 13 C) a dog", ABC),
        ("How many?\nA. 12\nB. 13\nC. a dog", ABC),
        ("How many? Choices: A. 12 B. 13 C. a dog", ABC),
        ("Options:\n(A) A) 12\n(B) B) 13\n(C) C) a dog", ABC),
        ("See (A) and (B). Options: (A) 12 (B) 13 (C) a dog", ABC),
        ("What?\nOptions:\n- bloody mess\n- cake", (("", "bloody mess"), ("", "cake"))),
        ("What?\nOptions:\n- bloody mess", ()),
        ("Buy:\n- bread\n- cake\nHow many?", ()),  # a list, but no options
        ("(a) Find x. (b) Find y.", ()),  # parts of a question
        ("What is f(A) (B) if A. is B. and so on", ()),
        ("Answer Choices: (A) 12", ()),
        ("Answer Choices: (A) 12 (C) 13", ()),
        ("Answer Choices: (A) 12 (B)", ()),
        ("How many?", ()),
        ("", ()),
    ],
)
def test_options_of_a_prompt(prompt: str, options: object) -> None:
    assert read_options(prompt) == options


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("B", "correct"),
        ("(b)", "correct"),
        ("13", "correct"),
        ("13 apples", "correct"),
        ("thirteen", "correct"),
        ("B) 13", "correct"),
        ("The answer is (B) 13.", "correct"),
        ("B, because 6 + 7 = 13", "unknown"),
        ("B) because the sum says so", "correct"),
        ("A", "incorrect"),
        ("12", "incorrect"),
        ("The dog", "incorrect"),
        ("C) a dog", "incorrect"),
        ("B) 12", "unknown"),  # letter and text disagree
        ("A) 13", "unknown"),
        ("A dog", "incorrect"),  # A, or the dog: neither is right
        ("14", "unknown"),  # none of the options
        ("B or C", "incorrect"),
        ("(B) or (C)", "incorrect"),
        ("not B", "incorrect"),
        ("B is wrong", "incorrect"),
        ("12 or 13", "unknown"),
        ("J", "incorrect"),
        ("", "unknown"),
    ],
)
@pytest.mark.parametrize("target", ["B", "(B)"])
def test_a_letter_is_the_ground_truth(answer: str, verdict: str, target: str) -> None:
    assert check_choice(answer, target, options=ABC, equal=never) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        *("A) 12 is wrong", "A. No, it is B", "A. Actually, B", "A: 12, no wait, B"),
        *("A) 12 is incorrect, it should be 13", "A) not 12", "A) wrong", "A) 12 or 13", "A. B"),
        *("A) 12, 13", "A) 14", "A is right, no, B", "B) No, A"),
    ],
)
@pytest.mark.parametrize("target", ["A", "B"])
def test_a_choice_that_is_denied_or_changed_is_unknown(answer: str, target: str) -> None:
    options = (("A", "12"), ("B", "13"), ("C", "None of these"), ("D", "12.0"))
    assert check_choice(answer, target, options=options, equal=never) == "unknown"


def test_a_yes_that_is_taken_back_is_unknown() -> None:
    options = (("A", "Yes"), ("B", "No"))
    assert check_choice("Yes, because it rains", "A", options=options, equal=never) == "correct"
    for answer in ("Yes, but actually B", "A) Yes, but actually B"):
        assert check_choice(answer, "A", options=options, equal=never) == "unknown"


@pytest.mark.parametrize(
    "text", ["None of these", "not enough information", "12 or 13", "It is wrong"]
)
def test_an_options_text_that_sounds_like_a_denial_is_correct(text: str) -> None:
    options = (("A", "12"), ("B", text))
    for answer in (text, f"B) {text}.", f"The answer is (B) {text.upper()}"):
        assert check_choice(answer, "B", options=options, equal=never) == "correct"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("bloody mess", "correct"),
        ("A bloody mess.", "correct"),
        ("B", "correct"),
        ("B) bloody mess", "correct"),
        ("cake", "incorrect"),
        ("C", "incorrect"),
        ("C) bloody mess", "unknown"),
        ("a mess", "unknown"),
        ("not the cake", "incorrect"),
        ("something else", "incorrect"),  # the question shows what there is
        ("13", "unknown"),
    ],
)
def test_an_option_is_the_ground_truth(answer: str, verdict: str) -> None:
    options = (("A", "pleasure"), ("B", "bloody mess"), ("C", "cake"))
    assert check_choice(answer, "bloody mess", options=options, equal=never) == (
        "unknown" if answer == "A bloody mess." else verdict  # A, or the mess?
    )
    if answer[1:2] not in (")", ""):
        plain = tuple(("", text) for _, text in options)
        assert check_choice(answer, "bloody mess", options=plain, equal=never) == verdict


@pytest.mark.parametrize(
    ("options", "target", "answer", "verdict"),
    [
        # options that read alike: the text is right, the other letter is not known to be
        ((("A", "5"), ("B", "6"), ("C", "5")), "A", "5", "correct"),
        ((("A", "5"), ("B", "6"), ("C", "5")), "A", "C", "unknown"),
        ((("A", "energy"), ("B", "Energy.")), "B", "B) Energy.", "correct"),
        # options that are equal, but do not read alike
        ((("A", "1/3"), ("B", "2/6")), "A", "1/3", "correct"),
        ((("A", "1/3"), ("B", "2/6")), "A", "2/6", "incorrect"),
        ((("A", "1/3"), ("B", "2/6")), "A", "3/9", "unknown"),
        # options that are letters
        ((("A", "I"), ("B", "II"), ("C", "III")), "A", "I", "correct"),
        ((("A", "B"), ("B", "C"), ("C", "A")), "A", "B", "unknown"),
        ((("A", "B"), ("B", "C"), ("C", "A")), "A", "A", "correct"),
        ((("A", "A and B"), ("B", "B and C only")), "B", "B and C only", "correct"),
        ((("A", "A and B"), ("B", "B and C only")), "B", "B) B and C only", "correct"),
        # a ground truth that is none of the options
        ((("A", "5"), ("B", "6")), "E", "E", "correct"),
        ((("A", "5"), ("B", "6")), "7", "7.0", "correct"),
        ((("A", "5"), ("B", "6")), "7", "6", "incorrect"),
        # a number among options
        ((("A", "31 inches"), ("B", "32 inches")), "31 inches", "A", "correct"),
        ((("A", "31 inches"), ("B", "32 inches")), "31 inches", "31", "correct"),
        ((("A", "31 inches"), ("B", "32 inches")), "31 inches", "33", "incorrect"),
        ((("A", "31 inches"), ("B", "32 inches")), "31 inches", "31 feet", "unknown"),
    ],
)
def test_options_that_are_hard_to_tell_apart(
    options: tuple[tuple[str, str], ...], target: str, answer: str, verdict: str
) -> None:
    assert check_choice(answer, target, options=options, equal=never) == verdict


@pytest.mark.parametrize(("target", "verdict"), [("A", "correct"), ("B", "incorrect")])
def test_a_formula_names_the_option_that_it_equals(target: str, verdict: str) -> None:
    half = r"\frac{x}{2}"
    options = (("A", half), ("B", r"\frac{x}{3}"))

    def equal(a: str, b: str) -> bool:
        return (a, b) == (half, "0.5 x")

    assert check_choice("0.5 x", target, options=options, equal=equal) == verdict
    numbers = (("A", "12"), ("B", "13"))  # none of them is the ground truth
    assert check_choice("0.5 x", half, options=numbers, equal=equal) == "correct"
    for source, verdict in (("math", "incorrect"), ("math_qa", "unknown")):  # J, a variable or not
        assert check_choice("n", "J", options=numbers, source=source, equal=equal) == verdict


def never(a: str, b: str) -> None:
    """Formulas are compared as they are written."""
