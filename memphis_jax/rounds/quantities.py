"""Numbers in answers: reading them, with units and in words, and comparing them.

Imports `rounds.grade` of ours for the verdicts' type, and no jax.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from memphis_jax.rounds.grade import Verdict


class Number(NamedTuple):
    """A number with what stands beside it."""

    value: Fraction | None  # None: more digits than any answer has, or x/0; equal to nothing
    decimals: float  # digits after the point; infinite for a fraction
    percent: bool
    unit: str  # the currency or the next word, in lower case without a plural s; "" if none


_DIGIT = re.compile("[0-9]")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12, "dozen": 12}
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_MONEY = {*_CURRENCIES.values(), "cent"}
_MONEY_FACTORS = {100}
_FACTORS = {7, 12, 24, 60, 100, 1000, 3600}  # of the usual units
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
    r"[^\w\s.,;:?'\"()$€£¥&/#-]|_|π|/(?![a-z]{2}|[hs]\b)|#\s*(?:x|-)\s*#|#\(#"
    r"|-\s+#",  # a minus, a list's bullet or a dash
    re.I,
)
_CHANGED = re.compile(
    r"\b(?:half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|twelf|twentie|hundred"
    r"|thousand)ths?|twice|double|triple|squared|cubed|roots?|factorial|times|plus|minus|divided"
    r"|multiplied|pi|log|ln|sin|cos|tan|sqrt)\b",
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


def read_quantity(text: str) -> Number | None:
    """The number of a text that is one number with up to two plain words; else None."""
    match = _QUANTITY.fullmatch(text)
    number = _number(match) if match else None
    return number if number and number.value is not None else None


def read_number_words(text: str) -> Number | None:
    """The number of a text that is nothing but number words ("one hundred"); else None."""
    number = None if _DIGIT.search(text) else read_quantity(_spelled_out(text))
    return number if number and not number.unit else None


def check_number(answer: str, goal: Number) -> Verdict:
    """Judge a plain answer (`answers.plain_text`), without LaTeX, by the number it states."""
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
    if {Fraction(_digits(word)) for word in _SPELLED.finditer(rest)} - {numbers[0].value}:
        return "unknown"  # "one and 3/4", "two dollars and 50 cents", "four or 5"
    verdict = _compare(numbers[0], goal)
    return "unknown" if verdict == "correct" and _HEDGED.search(rest) else verdict


def _number(match: re.Match[str]) -> Number:
    unit = (match["currency"] or match["unit"] or "").casefold()
    decimals = float("inf") if match["bottom"] else len(match["decimals"] or "")
    percent = match["percent"] is not None
    return Number(_value(match), decimals, percent, _CURRENCIES.get(unit, unit.removesuffix("s")))


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


def _compare(number: Number, goal: Number) -> Verdict:
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
    if bool(number.unit) != bool(goal.unit) and number.value and goal.value:
        factors = _MONEY_FACTORS if (number.unit or goal.unit) in _MONEY else _FACTORS
        ratio = number.value / goal.value
        if ratio in factors or 1 / ratio in factors:
            return "unknown"  # 60 against 1 hour
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
    rf"\b(?:{'|'.join(_SCALES)}|half|third|quarter|couple|pair|both|once|twice|none|no|nothing|pi"
    r"|january|february|march|april|may|june|july|august|september|october|november|december)\b",
    re.IGNORECASE,
)


def _spelled_out(answer: str) -> str:
    """Number words below 100 as digits: "twenty-five" -> "25", "two hundred" -> "2 hundred"."""
    return _SPELLED.sub(_digits, answer)


def _digits(spelled: re.Match[str]) -> str:
    tens, ones, alone = (group and group.casefold() for group in spelled.groups())
    return str(_ONES[alone] if alone else _TENS[tens] + _ONES.get(ones, 0))
