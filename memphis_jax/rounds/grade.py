"""Reads a completion's sections and checks its answer against the ground truth.

The text begins right after "### Rationale:\\n" (`memphis_jax.data.prompts` writes the format). The
kind of question (number, choice, yes/no, formula, free text) follows from the form of the ground
truth. A verdict becomes training data, so nothing is guessed: there is no fallback to the last
number or to a substring, and an answer that only a person could judge is "unknown", which is used
on neither side of a pair. Model output is never evaluated as code. Imports nothing of ours and no
jax; math-verify (sympy) is loaded only when a formula comes up.
"""

import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

Verdict = Literal["correct", "incorrect", "invalid", "unknown"]


class Parsed(NamedTuple):
    """The sections of a well-formed completion, neither of them empty."""

    rationale: str
    answer: str


class Graded(NamedTuple):
    """The sections ("" where the completion is malformed) and the verdict."""

    rationale: str
    answer: str
    verdict: Verdict


_HEADER = re.compile(r"^### (User|Assistant|Rationale|Answer):(.*)$", re.MULTILINE)


def parse(text: str) -> Parsed | None:
    """The two sections of a completion, stripped; None for a malformed completion.

    Well-formed: "{rationale}\\n### Answer:\\n{answer}", where both sections hold something and
    "### Answer:", alone on its line, is the only header in the text.
    """
    text = text.strip()
    headers = list(_HEADER.finditer(text))
    if len(headers) != 1 or headers[0][1] != "Answer" or headers[0][2].strip():
        return None
    rationale, answer = text[: headers[0].start()].strip(), text[headers[0].end() :].strip()
    return Parsed(rationale, answer) if rationale and answer else None


def grade(text: str, target: str, *, source: str = "", finish_reason: str = "stop") -> Graded:
    """Parse a completion and judge its answer.

    finish_reason: anything but "stop" (EOS or the stop string) leaves the answer possibly cut
    short: invalid. Raises ValueError, naming the source, if the ground truth is empty.
    """
    if not target.strip():
        raise ValueError(f"a question of source {source!r} has an empty target: drop the question")
    parsed = parse(text)
    if parsed is None:
        return Graded("", "", "invalid")
    return Graded(
        *parsed, check_answer(parsed.answer, target) if finish_reason == "stop" else "invalid"
    )


def check_answer(answer: str, target: str) -> Verdict:
    """Judge an answer as a careful person would who sees only this answer and the ground truth.

    Numbers: 1,000 = 1000 = "$1,000" = "1000 dollars"; 0.5 = 1/2; one number in a short plain
    sentence counts. A percent sign in the answer alone is a unit (50% = 50), in the target it is a
    percentage (50% = 0.5 = 50). Two different numbers, or a denied one ("not 12"), are incorrect.
    Choices: one letter, with or without its option's text. Yes/no: true = yes. Formulas:
    math-verify. Free text: equal words; an answer that shares words with the target is unknown.
    """
    if answer.strip() == target.strip():
        return "correct"
    if max(len(answer), len(target)) > 2000:  # an essay, or an attack on the patterns below
        return "unknown"
    answer, goal = _plain(answer), _goal(target)
    if answer == goal.text:
        return "correct"
    if goal.number is not None:
        return _check_number(answer, goal.text, goal.number)
    answer = _LEAD_IN.sub("", answer, count=1)
    if goal.kind == "choice":
        return _check_choice(answer, goal.text.strip("().: ").upper())
    if goal.kind == "yes/no":
        return _check_yes_no(answer, _YES_NO[goal.text.casefold()])
    if goal.kind == "formula":
        return _check_formula(answer, goal.text)
    return _check_words(answer, goal.text)


class _Number(NamedTuple):
    value: Fraction | None  # None: more digits than any answer has, or x/0; equal to nothing
    decimals: float  # digits after the point; infinite for a fraction
    percent: bool
    unit: str  # the currency or the next word, in lower case without a plural s; "" if none


class _Goal(NamedTuple):
    text: str
    kind: str
    number: _Number | None = None


@lru_cache(maxsize=1024)  # each ground truth is met num_samples times
def _goal(target: str) -> _Goal:
    text = _plain(target)
    quantity = _QUANTITY.fullmatch(text)
    if quantity and (number := _number(quantity)).value is not None:
        return _Goal(text, "number", number)
    if re.fullmatch(r"\(?[A-Ja-j]\)?[.:]?", text):
        return _Goal(text, "choice")
    if text.casefold() in _YES_NO:
        return _Goal(text, "yes/no")
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
    r"(?:(?:so|thus|therefore|hence),?\s+)?"
    r"(?:(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|option|choice|result)(?:\s+is|\s*[:=])?|it\s+is|it's)"
    r"\s*:?\s*(?:(?:option|choice)\s+)?(?=\S)",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """Drop outer emphasis, quotes, the final period and LaTeX around plain numbers and words."""
    text = text.translate(_CHARACTERS)
    for _ in range(3):  # such as **$\boxed{12}$.**
        text = re.sub(r"(?<!\.)\.$", "", text.strip("*`\"' \t\r\n").rstrip(",;"))
        if wrapped := _WRAPPED.fullmatch(text):
            text = next(group for group in wrapped.groups() if group is not None)
    if "\\" in text:
        text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)
        text = re.sub(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r"\1/\2", text)
        text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])", r"\1/\2", text)
        text = re.sub(r"\\text\{([^{}]*)\}", r" \1", text)
        text = re.sub(r"\^\s*\{?\\circ\}?|\\[!,]", "", text)
        text = text.replace(r"\%", "%").replace(r"\$", "$")
    return re.sub(r"[ \t]+", " ", text.replace("{,}", ",")).strip()


# --- numbers ----------------------------------------------------------------------------------

_DIGIT = re.compile("[0-9]")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12, "dozen": 12}
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_NUMBER = re.compile(
    r"""(?<![\w.)])(?<![0-9][,:/])
    (?:(?<![0-9]\ )(?P<sign>(?:negative|minus)\s+|[-+]))?
    (?:(?P<currency>[$€£¥])\ ?(?P<inner_sign>[-+])?)?
    (?:(?:(?P<mixed>[0-9]+)\ )?(?P<top>[0-9]+)\ ?/\ ?(?P<bottom>[0-9]+)
     |(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,3}(?:\ [0-9]{3}){1,9}|[0-9]+)
       (?:\.(?P<decimals>[0-9]+))?|\.[0-9]+)(?:e(?P<exponent>[-+]?[0-9]{1,3}))?)
    (?![0-9]|[.,:/][0-9]|[a-z]\b)        # else part of a date, a time, 12k, 12x, 1,5
    (?P<percent>\ ?%|\ per\ ?cent\b)?
    (?:[ -](?P<scale>hundred|thousand|million|billion|trillion|dozen)s?\b)?
    (?:(?=[ -]?(?P<unit>[a-z]+|[$€£¥]))|)""",
    re.VERBOSE | re.IGNORECASE,
)
_QUANTITY = re.compile(
    rf"{_NUMBER.pattern} (?:(?!\ ?(?:pi|or|and)\b)\ ?[a-z$€£¥]+){{0,2}}",
    re.VERBOSE | re.IGNORECASE,
)
# These four are read with each number replaced by "#".
_OPERATOR = re.compile(
    r"[^\w\s.,;:?'\"()$€£¥&/#-]|_|/(?![a-z]{2}|[hs]\b)|#\s*(?:x|-)\s*#|#\(#", re.I
)
_CHANGED = re.compile(
    r"\b(?:half|halves|thirds?|quarters?|twice|double|triple|squared|cubed|times|plus|minus)\b",
    re.I,
)
_DENIED = re.compile(
    r"""(?:\bnot|n't|\bcannot|\bnever|\bneither|\bthan)\s+(?:\w+\s+){0,2}?\#|(?:≠|!=)\s*\#
    |\#[\s,(-]*(?:\w+\s+){0,2}?
     (?:not\s+(?:right|correct|it|the|true)\b|wrong|incorrect|false|isn't|wasn't|aren't)""",
    re.VERBOSE | re.IGNORECASE,
)
_HEDGED = re.compile(
    r"n't|\b(?:not|no|never|wrong|incorrect|false|wait|actually|maybe|perhaps|possibly|about|around"
    r"|almost|nearly|approximately|roughly|least|most|up to|if|but|except)\b"
    r"|\b(?:over|under|above|below)\s+#",
    re.IGNORECASE,
)


def _check_number(answer: str, target: str, goal: _Number) -> Verdict:
    if "\\" in answer or "^" in answer:
        return _check_formula(_LEAD_IN.sub("", answer, count=1), target)
    if not answer.isascii() and any(c.isnumeric() and not c.isascii() for c in answer):
        return "unknown"  # such as one half as a single character
    answer = _right_side(answer.replace("#", " "))  # "#" marks the numbers below
    in_words = not _DIGIT.search(answer)
    if in_words:
        answer = _spelled_out(answer)
    found = list(_NUMBER.finditer(answer))
    rest = _NUMBER.sub("#", answer)
    if not _DIGIT.search(answer):
        return "unknown" if _NUMBER_WORD.search(answer) else "incorrect"
    if not found or _DIGIT.search(rest):
        return "unknown"
    numbers = [_number(match) for match in found]
    words = re.findall(r"[a-z']+", rest.casefold())
    if len({number[:3] for number in numbers}) > 1:
        listed = set(words) <= {"and", "to"} and not _OPERATOR.search(rest)
        offered = not {"or", "either", "between"}.isdisjoint(words) and len(words) <= 8
        # a sentence may well retell the question's numbers: only a person could tell
        return "incorrect" if (listed or offered) and not in_words else "unknown"
    if _DENIED.search(rest) and len(words) <= 12:
        return "incorrect"
    if _OPERATOR.search(rest) or _CHANGED.search(rest) or len(words) > 25 or len(found) > 3:
        return "unknown"
    verdict = _compare(numbers[0], goal)
    return "unknown" if verdict == "correct" and _HEDGED.search(rest) else verdict


def _number(match: re.Match[str]) -> _Number:
    unit = (match["currency"] or match["unit"] or "").casefold()
    decimals = float("inf") if match["bottom"] else len(match["decimals"] or "")
    percent = match["percent"] is not None
    return _Number(_value(match), decimals, percent, _CURRENCIES.get(unit, unit.removesuffix("s")))


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > 100:  # arithmetic on thousands of digits is slow, and nobody's answer
        return None
    if match["bottom"]:
        if not int(match["bottom"]):
            return None
        value = int(match["mixed"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        digits = match["digits"].replace(",", "").replace(" ", "")
        value = Fraction(f"{digits}e{match['exponent'] or 0}")
    negative = (match["sign"] or match["inner_sign"] or "+") != "+"
    return (-value if negative else value) * _SCALES.get((match["scale"] or "").casefold(), 1)


def _compare(number: _Number, goal: _Number) -> Verdict:
    if number.value is None or goal.value is None:
        return "incorrect"
    if number.unit and goal.unit and number.unit != goal.unit:
        return "unknown"  # 60 minutes against 1 hour, ft against feet
    if goal.percent and not number.percent:
        return "correct" if number.value in (goal.value, goal.value / 100) else "incorrect"
    if number.percent and not goal.percent and abs(goal.value) <= 1:
        # 50% against 0.5, 1% against 1: a ratio or a bare percentage, the question would tell
        return "unknown" if number.value in (goal.value, goal.value * 100) else "incorrect"
    if number.value == goal.value:
        return "correct"
    shared = min(number.decimals, goal.decimals)
    if 2 <= shared <= 100 and round(number.value - goal.value, int(shared)) == 0:
        return "unknown"  # 3.33 against 3.333: rounded differently
    return "incorrect"


def _right_side(answer: str) -> str:
    """The quantity after the last "=" of one chain ("x = 48 + 24 = 72"); else the whole answer."""
    left, _, right = answer.rpartition("=")
    if re.search(r"[\n;!<>~≠]|,(?![0-9]{3})|[0-9][a-z]|\b(?:or|and|not)\b", left, re.IGNORECASE):
        return answer
    return right if _QUANTITY.fullmatch(right.strip()) else answer


_ONES = {
    **{"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7},
    **{"eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13},
    **{"fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18},
    "nineteen": 19,
}
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50}
_TENS |= {"sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_SPELLED = re.compile(
    rf"\b(?:({'|'.join(_TENS)})(?:[ -]({'|'.join(list(_ONES)[1:10])}))?|({'|'.join(_ONES)}))\b",
    re.IGNORECASE,
)
_NUMBER_WORD = re.compile(
    rf"\b(?:{'|'.join(_SCALES)}|half|third|quarter|couple|pair|both|once|twice|none|no|nothing|pi)\b",
    re.IGNORECASE,
)


def _spelled_out(answer: str) -> str:
    """Number words below 100 as digits: "twenty-five" -> "25", "two hundred" -> "2 hundred"."""

    def digits(match: re.Match[str]) -> str:
        tens, ones, alone = (group and group.casefold() for group in match.groups())
        return str(_ONES[alone] if alone else _TENS[tens] + _ONES.get(ones, 0))

    return _SPELLED.sub(digits, answer)


# --- choices, yes/no, words -------------------------------------------------------------------

_YES_NO = {"yes": True, "true": True, "no": False, "false": False}
_PLAIN_YES_NO = re.compile(  # not "no idea", not "true enough"
    r"(?:yes|no|true|false)(?:\s*$|\s*[.,;:!\n-]|\s+(?:because|since|as)\b)", re.IGNORECASE
)
_UNDECIDED = re.compile(r"\b(?:maybe|perhaps|depends|unsure|unknown|don't know)\b", re.IGNORECASE)
_LETTER = re.compile(
    r"\(?([A-J])\)?[.:]?|(?:\(([A-J])\)|([A-J])[).:])\s*(.*)"
    r"|\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b.*",
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


def _check_choice(answer: str, letter: str) -> Verdict:
    refused = _REFUSED.search(answer) and len(re.findall(r"\b[A-J]\b", answer)) == 1
    if refused or _LETTERS.fullmatch(answer):
        return "incorrect"
    match = _LETTER.fullmatch(answer)
    if not match:
        return "unknown"  # perhaps the option's text, which is not known here
    if re.search(r"\([A-Ja-j]\)|\b[A-J]\)|\b(?:or|and) [A-J]\b", match[4] or ""):
        return "unknown"  # the option's text goes on to other options
    given = next(group for group in (match[1], match[2], match[3], match[5]) if group)
    return "correct" if given.upper() == letter else "incorrect"


def _check_yes_no(answer: str, truth: bool) -> Verdict:
    words = re.findall(r"[a-z']+", answer.casefold())
    said = [_YES_NO[word] for word in words if word in _YES_NO]
    if len(set(said)) == 2 and len(words) <= 3:
        return "incorrect"  # "yes and no"
    if not said and _UNDECIDED.search(answer):
        return "incorrect"
    if len(set(said)) != 1 or not _PLAIN_YES_NO.match(answer):
        return "unknown"
    return "correct" if said[0] == truth else "incorrect"


_COMMON_WORDS = frozenset(
    ("a", "an", "the", "of", "in", "on", "to", "it", "and", "not", "neither", "wrong", "incorrect")
) | {"i", "wa"}  # is and was without their s


def _check_words(answer: str, target: str) -> Verdict:
    given, wanted = (re.findall(r"[^\s.,;:!?'\"()]+", t.casefold()) for t in (answer, target))
    given, wanted = (w[1:] if w[:1] in (["a"], ["an"], ["the"]) else w for w in (given, wanted))
    if given == wanted and wanted:
        return "correct"
    # compared loosely from here on: what shares a word may mean the same
    theirs, ours = (
        {word.removesuffix("s") for word in re.findall(r"\w+", text.casefold())} - _COMMON_WORDS
        for text in (answer, target)
    )
    denied = _REFUSED.search(answer) and not _REFUSED.search(target) and theirs == ours
    return "unknown" if (theirs & ours and not denied) or not wanted else "incorrect"


# --- formulas ---------------------------------------------------------------------------------

_COMMAND = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|pi)\b")
_WORD = re.compile(r"[A-Za-z]{3,}|\b(?:or|and|to|is|if|in|no)\b", re.IGNORECASE)
_MATH = re.compile(r"[\\^_=<>+*/|{}]|[0-9]\s?-\s?[a-z0-9]|[0-9][a-z]\b|[\[(].*,.*[\])]|\bpi\b|sqrt")
_EXPENSIVE = re.compile(
    r"(?:\^|\*\*)[^+,]{0,30}(?:\^|\*\*)|(?:\^|\*\*)[\s({]*-?[0-9]{4}"
    r"|[0-9]{40}|[0-9]{3}\s*!|[!)}]\s*!"
)


def _check_formula(answer: str, target: str) -> Verdict:
    if "".join(answer.split()) == "".join(target.split()):
        return "correct"
    if _WORD.search(_COMMAND.sub("", answer)):
        return "unknown"
    equal = symbolic_equal(target, answer)
    return "unknown" if equal is None else "correct" if equal else "incorrect"


def symbolic_equal(a: str, b: str) -> bool | None:
    """Whether two formulas (LaTeX without dollar signs, or plain) are equal by math-verify.

    a is the ground truth. None if either cannot be read, is too expensive to touch, or 3 seconds
    are not enough. The limit rests on SIGALRM: RuntimeError outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("symbolic_equal needs the main thread: its time limit is a signal")
    if any(len(text) > 300 or _EXPENSIVE.search(text) for text in (a, b)):
        return None
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    # unescaped names would be read as products of letters
    latex = [re.sub(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln)\b", r"\\\1", t) for t in (a, b)]
    try:
        gold, given = (
            parse(
                f"${text}$",
                [LatexExtractionConfig()],
                fallback_mode="no_fallback",
                parsing_timeout=3,
                raise_on_error=True,
            )
            for text in latex
        )
        if not gold or not given:
            return None
        return bool(verify(gold, given, timeout_seconds=3, raise_on_error=True))
    except (Exception, TimeoutException):  # the time-out is a BaseException; sympy raises anything
        return None
