"""Find training rows that contain questions of evaluation sets.

Called by `memphis data` before rows are tokenised. Imports `rounds.files` (and, for names of the
hub, `datasets`).

The method is that of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): texts are compared
as words without case, punctuation and white space, and one shared run of 13 words marks a row.
What we chose where the paper leaves room, or differently:

- The evaluation side is the question (and its passage), without answer options or answers. A row
  is all its text: `row_text`. So a question quoted in a rationale is found too.
- A question of fewer than 13 words has no run of 13: it is found where it stands alone, as one
  whole line of the row or as the row's first lines. The paper shortens the run to 8 for such sets.
- A marked row is dropped whole. The paper cuts out the match and 200 characters on either side,
  which would leave half an answer here, and forgives runs that more than 10 documents share; we
  forgive none, so a row that repeats the fixed wording of an evaluation set goes as well.
- Words are split at white space and punctuation: scripts without spaces are found only exactly.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memphis_jax.rounds.files import read_jsonl

NGRAM = 13
BLOCK = (NGRAM + 1) // 2
"""Any 13 successive words of a row hold 7 that start at a multiple of 7: looked up first."""
LINE_WORDS = 4
"""A line of fewer words is no evidence: "2 + 3 =" and "2 * 3 =" are the same words."""

NOT_COMPARED = "nothing was compared with it"  # how a warning ends that says so
QUESTION_FIELDS = ("prompt", "question", "problem", "input")

_WORD = re.compile(r"[^\W_]+")
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
_OPTIONS = re.compile(r"\n\s*(?:answer )?(?:options|choices):", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?(?<!\.json)(?<!\.jsonl)")


def words(text: str) -> list[str]:
    """The text's words in NFKC form and folded case; all but letters and digits separates."""
    if text.isascii():  # the same, three times as fast
        return text.translate(_ASCII).split()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(unicodedata.normalize("NFKC", folded))


def row_text(item: Mapping[str, Any]) -> str:
    """What `guard` shall see of a training row: prompt, rationale and target, or all chat turns.

    Raises KeyError for a row of neither form.
    """
    if "messages" in item:
        return "\n".join(message["content"] for message in item["messages"])
    return "\n".join(item[name] for name in ("prompt", "rationale", "target"))


def guard(rows: Iterable[str], evaluation: Iterable[str]) -> Iterator[str]:
    """Why each row is contaminated: "exact", "13-gram", or "" where it is not.

    "exact": an evaluation text equals the row's first lines, however many, or one of its lines.
    "13-gram": the row and an evaluation text share 13 successive words. Rows are taken one by one;
    in memory are the evaluation texts and two 64-bit hashes (some 150 bytes) per word of theirs.
    """
    exact: set[str] = set()
    lengths: set[int] = set()  # spare long rows of many lines most joins
    runs: set[int] = set()
    blocks: set[int] = set()
    for text in evaluation:
        found = words(text)
        if found:
            exact.add(" ".join(found))
            lengths.add(len(found))
            runs.update(_runs(found, NGRAM))
            blocks.update(_runs(found, BLOCK))
    for row in rows:
        found, reason = [], ""
        for line in row.split("\n"):
            here = words(line)
            found += here
            if (len(here) >= LINE_WORDS and " ".join(here) in exact) or (
                len(found) in lengths and " ".join(found) in exact
            ):
                reason = "exact"
                break
        # Most rows end at the blocks: a seventh of the look-ups.
        if not reason and not blocks.isdisjoint(_runs(found, BLOCK, BLOCK)):
            reason = "" if runs.isdisjoint(_runs(found, NGRAM)) else f"{NGRAM}-gram"
        yield reason


def _runs(found: list[str], length: int, step: int = 1) -> Iterator[int]:
    """A hash of every `length` successive words, starting at multiples of `step`."""
    return map(hash, zip(*(found[start::step] for start in range(length)), strict=False))


def read_evaluation(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the questions of all sets, warnings).

    A source is a file of JSON Lines or JSON (a list of rows, or BIG-Bench's {"examples": [...]}), a
    folder of such files, or a data set of the hub as owner/name or owner/name:config, of which
    every split but `train` is read (and `train` where there is no other). A row's question is its
    first non-empty field of QUESTION_FIELDS in any case, after its `passage` if there is one.

    A set that is missing, out of reach or empty, and rows without a question, give a warning that
    names the set. Raises ValueError for a file that is not JSON, and for a set none of whose rows
    has such a field.
    """
    texts: list[str] = []
    warnings: list[str] = []
    for source in sources:
        try:
            rows = _read(source)
        except OSError as error:
            reason = " ".join(str(error).split())
            warnings.append(f"evaluation set {source}: {reason}; {NOT_COMPARED}")
            continue
        found = [text for row in rows if (text := _question(row))]
        if rows and not found:
            raise ValueError(
                f"evaluation set {source}: no row has text in any of {', '.join(QUESTION_FIELDS)}; "
                f"the first has {', '.join(map(str, rows[0])) or 'no fields'}: rename the field"
            )
        if len(found) < len(rows) or not rows:
            warnings.append(
                f"evaluation set {source}: only {len(found)} of {len(rows)} rows hold a question"
            )
        texts += found
    return texts, warnings


def _read(source: str) -> list[dict[str, Any]]:
    path = Path(source)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl"))
    if path.is_file():
        files = [path]
    if files:
        return [row for file in files for row in _read_file(file)]
    if path.exists() or _HUB_NAME.fullmatch(source):
        return list(_load_dataset(source))
    raise FileNotFoundError("no such file, nor owner/name of the hub")


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return read_jsonl(path)  # which names the line
    rows = document.get("examples", [document]) if isinstance(document, dict) else document
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected rows, each a JSON object")
    return rows


def _load_dataset(source: str) -> Iterator[dict[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        configs = [config] if config else datasets.get_dataset_config_names(name)
        for config in configs:
            splits = datasets.get_dataset_split_names(name, config)
            for split in [other for other in splits if other != "train"] or splits:
                yield from datasets.load_dataset(name, config, split=split)
    except ValueError as error:  # such as a config that the set does not have
        raise ValueError(f"evaluation set {source}: {error}") from error
    # RuntimeError: a set that is a script, which `datasets` no longer runs.
    except (datasets.exceptions.DatasetsError, RuntimeError) as error:
        raise OSError(error) from error


def _question(row: Mapping[str, Any]) -> str:
    """The row's question without its list of options, or "" where it has none."""
    fields = {name.lower(): value for name, value in row.items() if isinstance(value, str)}
    found = next((fields[name] for name in QUESTION_FIELDS if fields.get(name, "").strip()), "")
    question = _OPTIONS.split(found, maxsplit=1)[0].strip()
    return "\n".join(filter(None, (fields.get("passage", ""), question))) if question else ""
