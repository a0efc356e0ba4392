"""Reads a completion's sections and grades it by the answer's verdict.

The text begins right after "### Rationale:\\n" (`memphis_jax.data.prompts` writes the format). A
verdict becomes training data, so nothing is guessed: what is malformed or cut short is "invalid",
and what only a person could judge is "unknown"; neither is used on either side of a pair. Imports
nothing of ours and no jax: the judgement of an answer comes in as an argument (`rounds.answers`,
`rounds.choices`).
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

Verdict = Literal["correct", "incorrect", "invalid", "unknown"]
Check = Callable[[str, str], Verdict]
"""check(answer, ground truth), neither empty. May raise TimeoutError: no verdict in time."""


class Parsed(NamedTuple):
    """The sections of a well-formed completion, neither of them empty."""

    rationale: str
    answer: str


class Graded(NamedTuple):
    """The sections ("" where the completion is malformed), the verdict and what explains it."""

    rationale: str
    answer: str
    verdict: Verdict
    reason: str = ""
    """Why invalid: "truncated", or how it is malformed; "time-out" for such an unknown; else ""."""


_HEADER = re.compile(r"^### (User|Assistant|Rationale|Answer):(.*)$", re.MULTILINE)


def parse(text: str) -> Parsed | None:
    """The two sections of a completion, stripped; None for a malformed completion.

    Well-formed: "{rationale}\\n### Answer:\\n{answer}", where both sections hold something and
    "### Answer:", alone on its line, is the only header in the text (stripping makes none).
    """
    found = _sections(text)
    return found if isinstance(found, Parsed) else None


def _sections(text: str) -> Parsed | str:
    """The sections, or in what way the completion is malformed."""
    text = text.strip()
    headers = list(_HEADER.finditer(text))
    if len(headers) > 1:
        return "several headers"
    if not headers or headers[0][1] != "Answer":
        return "no answer header"
    if headers[0][2].strip():
        return "text beside the answer header"
    rationale, answer = text[: headers[0].start()].strip(), text[headers[0].end() :].strip()
    if not rationale:
        return "empty rationale"
    if _HEADER.match(answer):  # it was indented
        return "several headers"
    return Parsed(rationale, answer) if answer else "empty answer"


def grade(
    text: str, target: str, *, check: Check, source: str = "", finish_reason: str = "stop"
) -> Graded:
    """Parse a completion and judge its answer with `check`.

    finish_reason: anything but "stop" (EOS or the stop string) leaves the answer possibly cut
    short: invalid. Raises ValueError, naming the source, if the ground truth is empty.
    """
    if not target.strip():
        raise ValueError(f"a question of source {source!r} has an empty target: drop the question")
    found = _sections(text)
    if finish_reason != "stop":
        sections = found if isinstance(found, Parsed) else ("", "")
        return Graded(*sections, "invalid", "truncated")
    if isinstance(found, str):
        return Graded("", "", "invalid", found)
    try:
        return Graded(*found, check(found.answer, target))
    except TimeoutError:
        return Graded(*found, "unknown", "time-out")
