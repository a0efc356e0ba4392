"""Judges an answer against the ground truth, without the question.

The kind of question (number, choice, label, formula, free text) follows from the form of the ground
truth and the source. There is no fallback to the last number or to a substring; what only a person
could judge is "unknown". Model output is never evaluated as code. No jax; what compares formulas
(`rounds.symbolic`) comes in as an argument.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from memphis_jax.rounds.grade import Verdict
from memphis_jax.rounds.quantities import Number, check_number, read_number_words, read_quantity

Equal = Callable[[str, str], bool | None]
"""equal(ground truth, answer) of two formulas; None: cannot tell. TimeoutError: given up."""

LONGEST = 2000
"""Characters of an answer that are looked at; a longer one is an essay, or an attack."""


def _cannot_tell(target: str, answer: str) -> None:
    """An `Equal` for where no formulas are expected."""


def check_answer(
    answer: str,
    target: str,
    *,
    source: str = "",
    equal: Equal = _cannot_tell,
    among_options: bool = False,
) -> Verdict:
    """Judge an answer as a careful person would who sees only this answer and the ground truth.

    Numbers: 1,000 = 1000 = "$1,000" = "1000 dollars"; 0.5 = 1/2; one number in a short plain
    sentence counts. A percent sign in the answer alone is a unit (50% = 50), in the target it is a
    percentage (50% = 0.5 = 50). Two different numbers, or a denied one ("not 12"), are incorrect.
    Choices: one letter, with or without its option's text. Labels: one word of a closed
    vocabulary; true = yes. Formulas: by `equal`, whose TimeoutError passes through. Free text:
    equal words; another single word is incorrect, and so is any text without a shared word where
    the question shows the ground truth among options (among_options); else unknown. Runs of blanks
    count as one; a line break is not a blank.
    """
    answer, target = _tidy(answer), _tidy(target)
    if answer == target:
        return "correct"
    if max(len(answer), len(target)) > LONGEST:
        return "unknown"
    answer, goal = plain_text(answer), _goal(target, source)
    if answer == goal.text:
        return "correct"
    if goal.number and not ("\\" in answer or "^" in answer):
        return check_number(answer, goal.number)
    answer = _LEAD_IN.sub("", answer, count=1)
    if goal.kind == "choice":
        return _check_choice(answer, goal.text.strip("().: ").upper())
    if goal.kind == "label":
        return _check_label(answer, goal.text.casefold())
    if goal.kind in ("formula", "number"):
        verdict = _check_formula(answer, goal.text, equal)
        # A letter beside a number may be a unit: 72 \frac{km}{h}.
        unit = goal.number and re.search("[A-Za-z]", _COMMAND.sub("", answer))
        return "unknown" if unit and verdict == "incorrect" else verdict
    return _check_words(answer, goal.text, among_options)


class _Goal(NamedTuple):
    text: str
    kind: str
    number: Number | None = None


_FORMULA_SOURCES = {"math", "competition_math", "hendrycks_math", "math-500"}


@lru_cache(maxsize=4096)  # each ground truth is met num_samples times, each option too
def _goal(target: str, source: str = "") -> _Goal:
    text = plain_text(target)
    if number := read_quantity(text):
        return _Goal(text, "number", number)
    if number := read_number_words(text):
        return _Goal(str(number.value), "number", number)
    # where nothing is multiple choice, a letter is a variable
    formulas = source.casefold().rpartition("/")[2] in _FORMULA_SOURCES
    if re.fullmatch(r"\(?[A-Ja-j]\)?[.:]?", text):
        return _Goal(text, "formula" if formulas else "choice")
    if text.casefold() in _LABELS:
        return _Goal(text, "label")
    formula = _MATH.search(text) and not _WORD.search(_COMMAND.sub("", text))
    return _Goal(text, "formula" if formula else "text")


# --- cleaning ---------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2044": "/", "\u00a0": " ", "\u202f": " "}
    | {"\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00b0": None}
)
_WRAPPED = re.compile(
    r"\$\$?([^$]+)\$\$?|\\\(([^()]*)\\\)|\\\[(.*)\\\]"
    r"|\\(?:boxed|text|textbf|mathrm)\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence),?\s+)?"
    r"(?:(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|option|choice|result)(?:\s+is|\s*[:=])?|it\s+is|it's)"
    r"\s*:?\s*(?:(?:option|choice)\s+)?(?=\S)",
    re.IGNORECASE,
)


def _tidy(text: str) -> str:
    """One blank for each run of blanks, none around a line break."""
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def plain_text(text: str) -> str:
    """Drop outer emphasis, quotes, the final period and LaTeX around plain numbers and words."""
    text = _tidy(text)
    text = text.translate(_CHARACTERS)
    for _ in range(3):  # such as **$\boxed{12}$.**
        text = re.sub(r"(?<!\.)\.$", "", text.strip("*`\"' \t\r\n").rstrip(",;"))
        if wrapped := _WRAPPED.fullmatch(text):
            text = next(group for group in wrapped.groups() if group is not None)
    if "\\" in text:
        text = re.sub(r"^-\s+", "-", text)  # in a formula no bullet
        text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)
        text = re.sub(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r"\1/\2", text)
        text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])", r"\1/\2", text)
        text = re.sub(r"\\text\{([^{}]*)\}", r" \1", text)
        text = re.sub(r"\^\s*\{?\\circ\}?|\\[!,]", "", text)
        text = text.replace(r"\%", "%").replace(r"\$", "$")
    text = re.sub(r"[ \t]+", " ", text.replace("{,}", ",")).strip()
    text = re.sub(r"(?<=[0-9]) x (?=10\^)", "*", text)
    return _POWER.sub(_power_in_words, text)


_UNIT = "(mm|cm|dm|m|km|in|inch|inches|ft|feet|yd|yards?|mi|miles?|units?)"
_POWER = re.compile(  # "72 cm^2", "9.8 m/s^{2}", "72 \\mathrm{cm}^3"
    rf"(?<=[0-9]) ?(?:(?:\\mathrm\{{\s*)?{_UNIT}\}}?|{_UNIT}/s) ?\^ ?(?:([23])|\{{([23])\}})$",
    re.IGNORECASE,
)


def _power_in_words(match: re.Match[str]) -> str:
    power = {"2": "square", "3": "cubic"}[match[3] or match[4]]
    return f" {power} {match[1]}" if match[1] else f" {match[2]}/s"


# --- choices, labels, words -------------------------------------------------------------------

_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LABELS = {label: dict(_YES_NO) for label in _YES_NO}  # {label: {each of its set: meaning}}
for _labels in (
    ("entailment", "neutral", "contradiction"),
    ("positive", "neutral", "negative"),
    ("valid", "invalid"),
    ("correct", "incorrect"),
    ("possible", "impossible"),
    ("plausible", "implausible"),
    ("acceptable", "unacceptable"),
):
    for _label in _labels:
        _LABELS.setdefault(_label, {}).update((label, label) for label in _labels)
_PLAIN_LABEL = re.compile(  # not "no idea", not "true enough"
    r"(?:X)(?:\s*$|\s*[.,;:!\n-]|\s+(?:because|since|as)\b)".replace("X", "|".join(_LABELS)),
    re.IGNORECASE,
)
_BOTH_LABELS = re.compile(  # "yes and no"; but "Yes, no doubt" is a yes
    r"(?:either\s+|both\s+)?(?:X)\s*(?:/|,?\s*\band\b|,?\s*\bor\b|,?\s*\band/or\b)\s*(?:X)"
    r"\W*".replace("X", "|".join(_LABELS)),
    re.IGNORECASE,
)
_UNDECIDED = re.compile(r"\b(?:maybe|perhaps|depends|unsure|unknown|don't know)\b", re.IGNORECASE)
_LETTER = re.compile(
    r"\(?([A-J])\)?[.:]?|(?:\(([A-J])\)|([A-J])[).:])\s*(.*)"
    r"|\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b(.*)",
    re.IGNORECASE | re.DOTALL,
)
_LETTERS = re.compile(
    r"(?:either\s+|both\s+)?\(?[A-J]\)?"
    r"(?:\s*(?:,|/|&|\bor\b|\band\b)\s*(?:or\s+|and\s+)?\(?[A-J]\)?)+",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"^(?:not|neither)\b"
    r"|^\W*\w+\W*\s+(?:(?:is|was)\s+(?:not|wrong|incorrect|false)|isn't|wasn't)\b",
    re.IGNORECASE,
)


def named_letter(answer: str) -> tuple[str, str]:
    """(option letter, text beside it) of an answer like "B", "(B) 12" or "Option b is correct".

    ("", the answer without its lead-in) for any other and for a denied one.
    """
    answer = _LEAD_IN.sub("", plain_text(answer), count=1)
    match = _LETTER.fullmatch(answer)
    if not match or _REFUSED.search(answer) or _LETTERS.fullmatch(answer):
        return "", answer
    letter = next(group for group in (match[1], match[2], match[3], match[5]) if group)
    return letter.upper(), (match[4] or match[6] or "").strip()


_DOUBT = re.compile(
    r"n't\b|\b(?:no|not|nor|neither|never|cannot|wrong|incorrect|false|untrue|wait|actually|instead"
    r"|rather|sorry|oops|correction|but|however|though|although|unless|except|or|maybe|perhaps"
    r"|possibly|should)\b",
    re.IGNORECASE,
)
_OTHER_LETTER = re.compile(  # no article ("A dog") and no pronoun ("I"), and not "B-side"
    r"\([A-Ja-j]\)|\b[A-J]\)|(?<![\w-])(?:[B-HJ](?![\w'-])|A(?!\s*[\w'-]))|\b(?:or|and) [A-J]\b"
)


def weighs_options(text: str) -> bool:
    """Whether the text beside a letter names a letter too, denies something or takes it back."""
    return bool(_OTHER_LETTER.search(text) or _DOUBT.search(text))


def _check_choice(answer: str, letter: str) -> Verdict:
    refused = _REFUSED.search(answer) and len(re.findall(r"\b[A-J]\b", answer)) == 1
    if refused or _LETTERS.fullmatch(answer):
        return "incorrect"
    given, said = named_letter(answer)
    if not given or weighs_options(said):
        return "unknown"  # perhaps the option's text, which is not known here
    return "correct" if given == letter else "incorrect"


def _check_label(answer: str, target: str) -> Verdict:
    meaning = _LABELS[target]
    words = re.findall(r"[a-z']+", answer.casefold())
    said = {meaning[word] for word in words if word in meaning}
    if len(said) > 1 and _BOTH_LABELS.fullmatch(answer):
        return "incorrect"
    if not said and target in _YES_NO and _UNDECIDED.search(answer):
        return "incorrect"
    if len(said) != 1 or not _PLAIN_LABEL.match(answer):
        return "unknown"
    return "correct" if meaning[target] in said else "incorrect"


_COMMON_WORDS = frozenset(
    ("a", "an", "the", "of", "in", "on", "to", "it", "and", "not", "neither", "wrong", "incorrect")
) | {"i", "wa"}  # is and was without their s


def _check_words(answer: str, target: str, among_options: bool) -> Verdict:
    given, wanted = (re.findall(r"[^\s.,;:!?'\"()]+", t.casefold()) for t in (answer, target))
    given, wanted = (w[1:] if w[:1] in (["a"], ["an"], ["the"]) else w for w in (given, wanted))
    if given == wanted and wanted:
        return "correct"
    # compared loosely from here on: what shares a word may mean the same
    theirs, ours = (
        {word.removesuffix("s") for word in re.findall(r"\w+", text.casefold())} - _COMMON_WORDS
        for text in (answer, target)
    )
    if _REFUSED.search(answer) and not _REFUSED.search(target) and theirs == ours and wanted:
        return "incorrect"
    in_digits = [bool(re.search("[0-9]", text)) for text in (answer, target)]
    if theirs & ours or not wanted or in_digits[0] != in_digits[1]:  # June, or 6?
        return "unknown"
    # several words may say the same in other ones: "does not exist", "no solution"
    single = len(given) <= 1 and len(wanted) == 1
    return "incorrect" if single or among_options else "unknown"


# --- formulas ---------------------------------------------------------------------------------

_COMMAND = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|pi)\b")
_WORD = re.compile(r"[A-Za-z]{3,}|\b(?:or|and|to|is|if|in|no)\b", re.IGNORECASE)
_MATH = re.compile(r"[\\^_=<>+*/|{}]|[0-9]\s?-\s?[a-z0-9]|[0-9][a-z]\b|[\[(].*,.*[\])]|\bpi\b|sqrt")


def _check_formula(answer: str, target: str, equal: Equal) -> Verdict:
    if "".join(answer.split()) == "".join(target.split()):
        return "correct"
    if _WORD.search(_COMMAND.sub("", answer)):
        return "unknown"
    same = equal(target, answer)
    return "unknown" if same is None else "correct" if same else "incorrect"
