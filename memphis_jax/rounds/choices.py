"""Multiple choice: the options in a question's text, and answers judged by the option they name.

    Answer Choices: (A) 12 (B) 13          Options:           Options:
    a ) 12 , b ) 13 below such a header    - (A) DNA          - bloody mess
    A) 12 B) 13, or lines "A. 12"          - (B) birds        - cake

Stands on `rounds.answers`, which judges without a prompt. No jax.
"""

import re
from functools import lru_cache

from memphis_jax.rounds.answers import (
    LONGEST,
    Equal,
    check_answer,
    named_letter,
    plain_text,
    weighs_options,
)
from memphis_jax.rounds.grade import Verdict
from memphis_jax.rounds.quantities import read_quantity

Options = tuple[tuple[str, str], ...]
"""(letter in upper case, text) of each option; the letter is "" in a list without letters."""

_HEADER = re.compile(r"\b(?:choices|options)(?: are)?\s*:", re.IGNORECASE)
_START = r"(?:(?<=\s)|^)(?:[-*] )?"
_LETTERED = (
    re.compile(_START + r"\(([A-J])\)"),
    re.compile(_START + r"([A-J]) ?\)"),
    re.compile(r"^[ \t]*(?:[-*] )?([A-J])[.:](?=\s)", re.MULTILINE),
)
_LETTERED_BELOW_HEADER = (  # where a letter is no point of a triangle and no "(a) find x"
    re.compile(_START + r"\(([A-J])\)", re.IGNORECASE),
    re.compile(_START + r"([A-J]) ?\)", re.IGNORECASE),
    re.compile(_START + r"([A-J])[.:](?=\s)", re.IGNORECASE),
)
_BULLET = re.compile(r"^[ \t]*[-*] +(\S.*)$", re.MULTILINE)


def read_options(prompt: str) -> Options:
    """The options that a prompt ends with; none unless there are two or more in plain sequence.

    The text of the last option ends with its line. A list without letters counts only below a
    header ("Options:", "Answer Choices:", ...).
    """
    headers = list(_HEADER.finditer(prompt))
    below = prompt[headers[-1].end() :] if headers else ""
    for pattern in _LETTERED_BELOW_HEADER if headers else _LETTERED:
        if found := _in_sequence(pattern, below or prompt):
            return found
    bullets = tuple(("", match[1].strip()) for match in _BULLET.finditer(below))
    return bullets if len(bullets) > 1 else ()


def _in_sequence(pattern: re.Pattern[str], text: str) -> Options:
    """The last run A, B, C, ... of marks, each with a text; empty if the run is broken."""
    marks = list(pattern.finditer(text))
    starts = [i for i, mark in enumerate(marks) if mark[1].upper() == "A"]
    marks = marks[starts[-1] :] if starts else []
    letters = "".join(mark[1].upper() for mark in marks)
    if len(marks) < 2 or not "ABCDEFGHIJ".startswith(letters):
        return ()
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    texts = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    texts = [t.rstrip(" ,;") for t in [*texts[:-1], texts[-1].partition("\n")[0]]]
    # "(A) A) 12" in the wild
    texts = [re.sub(rf"^\(?{x}\)\s*", "", t) for x, t in zip(letters, texts, strict=True)]
    return tuple(zip(letters, texts, strict=True)) if all(texts) else ()


def check_choice(
    answer: str, target: str, *, options: Options, source: str = "", equal: Equal
) -> Verdict:
    """`answers.check_answer` by someone who also sees the options.

    A letter, an option's text, or both ("B) 12") name an option. Naming the right one is correct,
    another one incorrect; unknown where letter and text name different ones, where a wrong letter
    stands for the right text, or where words beside the letter deny it or mention another option.
    An answer that names none is judged without options, as is one to a ground truth that is none
    of the options.
    """
    right = _right(target, options, equal)
    plain = check_answer(answer, target, source=source, equal=equal, among_options=bool(right))
    if not right or plain_text(answer) == plain_text(target) or len(answer) > LONGEST:
        return plain
    letter, said = named_letter(answer)
    if letter and all(label != letter for label, _ in options):
        letter, said = "", answer  # "I" where the options are Roman numerals
    by_text = _read_like(said, options) or _read_like(answer, options)
    if not by_text and said:
        if weighs_options(said):
            return "unknown" if letter else plain
        by_text = _mean(said, options, equal)
        if not by_text and letter and (read_quantity(said) or _mentioned(said, options)):
            return "unknown"
    if not by_text and not letter:
        return plain
    named = by_text | {i for i, (label, _) in enumerate(options) if letter and label == letter}
    right_texts = {_folded(options[i][1]) for i in right}
    wrong = {i for i in named if _folded(options[i][1]) not in right_texts}
    if named & right:
        return "unknown" if wrong else "correct"
    return "incorrect" if wrong == named else "unknown"


@lru_cache(maxsize=4096)
def _folded(text: str) -> str:
    return plain_text(text).casefold()


def _read_like(text: str, options: Options) -> set[int]:
    """The options with this text."""
    folded = _folded(text)
    return {i for i, (_, option) in enumerate(options) if folded and _folded(option) == folded}


def _mentioned(text: str, options: Options) -> bool:
    """Whether an option's text is part of a text."""
    return any(
        re.search(rf"(?<!\w){re.escape(_folded(option))}(?!\w)", _folded(text))
        for _, option in options
    )


def _mean(text: str, options: Options, equal: Equal) -> set[int]:
    """The options that mean the same as a text: 12 and "12 days"."""
    found = {i for i, (_, option) in enumerate(options) if _same(text, option, equal)}
    # "A dog" where (A) is no dog: option A, or a dog?
    return found | {0} if found and options[0][0] and text.startswith("A ") else found


@lru_cache(maxsize=4096)
def _right(target: str, options: Options, equal: Equal) -> frozenset[int]:
    """The options that the ground truth names, by its letter or by its text."""
    letter, said = named_letter(target)
    return frozenset(
        i
        for i, (label, text) in enumerate(options)
        if (label == letter if letter and not said else _same(text, target, equal))
    )


def _same(text: str, option: str, equal: Equal) -> bool:
    return check_answer(text, option, equal=equal) == "correct"
