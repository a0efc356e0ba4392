"""Which data sets Memphis was trained on, and what becomes of a row: one table. No jax.

    hub or local copy -> rows -> filters -> prompt and response -> a sample of N rows

`load` gives the items of one entry of the mixture, ready for `prompts.py`, which also keeps text
from opening a section of its own. Rows that cannot be used are dropped, each with a counted reason.
"card" is a model card of euclaise/Memphis-CoT-3B or -scribe-3B; docs/data.md says which choices are
ours. Imports config for the entry, `sources.py` and `fields.py`.
"""

import difflib
import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from memphis_jax.config import MixtureEntry
from memphis_jax.data import sources
from memphis_jax.data.fields import (
    Drop,
    Item,
    clean,
    conversation,
    exchange,
    filled,
    posted,
    require_at_least,
)
from memphis_jax.data.sources import Columns, Row, Source

Convert = Callable[[Row], list[Item]]


class Loaded(NamedTuple):
    """One data set of the mixture.

    `items` are {prompt, rationale, target, source} of template "cot", or {messages, source} of
    "chat". Every one of the `rows_in` rows read is in `items` or counted in `dropped`; a row can
    give several items.
    """

    template: str
    items: list[Item]
    rows_in: int
    dropped: Counter[str]  # reason -> rows
    origin: dict[str, Any]  # where from, at which revision, which filters, hashes of local files


@dataclass(frozen=True)
class Recipe:
    """One data set: where it is, what it must have, and what becomes of a row."""

    repo: str
    revision: str  # commit; "" = the hub's newest, which is recorded
    template: str  # "cot" or "chat"
    columns: Columns
    convert: Convert  # a row -> items; raises Drop
    filters: tuple[str, ...] = ()  # in words, for the manifest
    rows: int = 0  # the card's number, 0 = all
    shortest: bool = False  # take the shortest rows instead of a random sample


def load(name: str, entry: MixtureEntry, root: str, seed: int) -> Loaded:
    """The items of one entry: read, filtered, converted, and `entry.rows` of its rows taken.

    Which rows are taken depends on `seed`, `name` and the rows' content, not on their order or on
    how the files are cut; they stay in file order. Raises ValueError for an unknown name, a missing
    column, or when no row is left; OSError or RuntimeError when the data cannot be read.
    """
    recipe = _recipe(name, entry)
    source = _open(recipe, entry, root)
    dropped: Counter[str] = Counter()
    usable = 0

    def candidates() -> Iterator[tuple[tuple[int, bytes], int, list[Item]]]:
        nonlocal usable
        for row in source.rows:
            try:
                items = recipe.convert(row)
            except Drop as reason:
                dropped[str(reason)] += 1
                continue
            for item in items:
                item.setdefault("source", name)
            usable += 1
            yield _order(items, f"{seed}/{name}", recipe.shortest), usable, items

    limit = entry.rows or recipe.rows
    if limit:
        # Holds `limit` rows at a time, however many there are.
        taken = heapq.nsmallest(limit, candidates(), key=itemgetter(0, 1))
        taken.sort(key=itemgetter(1))
    else:
        taken = list(candidates())
    if not taken:
        raise ValueError(f"{name}: none of its rows can be used; dropped {dict(dropped) or 'none'}")
    rows_in, left = usable + dropped.total(), usable - len(taken)
    if left:
        dropped["not among the shortest" if recipe.shortest else "not sampled"] = left
    items = [item for _, _, items in taken for item in items]
    return Loaded(
        recipe.template, items, rows_in, dropped, source.origin | {"filters": [*recipe.filters]}
    )


def _recipe(name: str, entry: MixtureEntry) -> Recipe:
    if name not in RECIPES:
        if not entry.template:
            near = difflib.get_close_matches(name, RECIPES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(RECIPES)}"
            raise ValueError(
                f"data.mixture.{name} is no recipe ({hint}); a data set of your own needs a "
                "template, columns, and a path or repo (docs/data.md)"
            )
        return _own(entry)
    if entry.template:
        raise ValueError(
            f"data.mixture.{name} is a recipe, which knows its template and columns: leave them "
            "out, or give your own data set another name"
        )
    return RECIPES[name]


def _open(recipe: Recipe, entry: MixtureEntry, root: str) -> Source:
    repo = entry.repo or recipe.repo
    if entry.path:
        return sources.read_local(Path(entry.path), entry.split, recipe.columns)
    if root:
        place = sources.local_copy(root, repo)
        return sources.read_local(place, entry.split, recipe.columns)
    # The recipe's commit is one of the recipe's repo only.
    revision = entry.revision or ("" if entry.repo else recipe.revision)
    return sources.read_hub(repo, revision, entry.split, recipe.columns)


def _order(items: list[Item], salt: str, shortest: bool) -> tuple[int, bytes]:
    """What rows are taken by, the smallest first: a hash, after the length where that decides."""
    content = json.dumps([salt, items], sort_keys=True).encode()
    length = sum(len(turn["content"]) for turn in items[0]["messages"]) if shortest else 0
    return length, hashlib.blake2b(content, digest_size=16).digest()


# --- rows of the eight data sets


def _tinycot(row: Row) -> list[Item]:
    item = {name: filled(row, name) for name in ("prompt", "rationale", "target")}
    if source := clean("source", row["source"]):
        item["source"] = source
    return [item]


def _reddit_instruct(row: Row) -> list[Item]:
    title = filled(row, "post_title")
    if "[" in title or "]" in title:
        raise Drop("brackets in the title")
    text = posted("post_text", clean("post_text", row["post_text"]))  # many posts are a title
    reply = posted("comment_text", filled(row, "comment_text"))
    return [exchange(f"{title}\n\n{text}".strip(), reply)]


def _oasst2_curated(row: Row) -> list[Item]:
    return [conversation(row, "messages")]


_TAGS = re.compile(r"(\[[A-Za-z]{2,3}\]\s*)+")  # "[WP]", "[EU] [PI]"


def _writingprompts_curated(row: Row) -> list[Item]:
    tagged = posted("prompt", filled(row, "prompt"))
    tags = _TAGS.match(tagged)
    prompt = tagged[tags.end() :] if tags else tagged
    if not prompt:
        raise Drop("empty prompt")
    story = posted("body", filled(row, "body"))
    return [exchange(f"Write a story based on this prompt:\n\n{prompt}", story)]


def _mathqa_programs(row: Row) -> list[Item]:
    problem, program = filled(row, "problem"), filled(row, "program")
    return [exchange(f"Write a Python snippet that solves this problem:\n\n{problem}", program)]


def _booksum_short(row: Row) -> list[Item]:
    chapter, summary = filled(row, "chapter"), filled(row, "summary_text")
    return [
        exchange(f"Summarize this chapter:\n\n{chapter}", summary),
        exchange(f"Write a chapter that fits this summary:\n\n{summary}", chapter),
    ]


def _mathoverflow_accepted(row: Row) -> list[Item]:
    require_at_least(row, "score", 11)
    title, question = filled(row, "parent_title"), filled(row, "parent_body")
    return [exchange(f"{title}\n\n{question}", filled(row, "body"))]


def _coedit(row: Row) -> list[Item]:
    instruction, text = filled(row, "instruction"), filled(row, "input")
    return [exchange(f"{instruction}\n\n{text}", filled(row, "output"))]


_DELETED = "no post or comment that was deleted"

# Revisions: the newest commits seen whose card or files have these columns (shared/data/SCHEMAS.md
# and huggingface.co, 2023-2025). Only columns that `convert` reads are listed, and required.
RECIPES: dict[str, Recipe] = {
    "tinycot": Recipe(  # card: all rows, and the questions of the rounds
        repo="euclaise/TinyCoT",
        revision="ffc8d3beccd557e7ef9d0605fa669d794f9ae409",
        template="cot",
        columns={"prompt": "text", "rationale": "text", "target": "text", "source": "text"},
        convert=_tinycot,
    ),
    "reddit_instruct": Recipe(
        repo="euclaise/reddit-instruct",
        revision="7ac118fb7d4a6bd7b89dc23774db7c419ce079c9",
        template="chat",
        columns={"post_title": "text", "post_text": "text", "comment_text": "text"},
        convert=_reddit_instruct,
        filters=("no square bracket in the title", _DELETED),
        rows=5000,  # CoT card; scribe card: 10,000
    ),
    "oasst2_curated": Recipe(  # card: all rows
        repo="sablo/oasst2_curated",
        revision="9332b3be073146bffb28bd9045f79581e6515e60",
        template="chat",
        columns={"messages": "list of {role, content}"},
        convert=_oasst2_curated,
        filters=("turns alternate user, assistant and end with assistant",),
    ),
    "writingprompts_curated": Recipe(
        repo="euclaise/WritingPrompts_curated",
        revision="cc9e1df7eca48a81370aa1e5e2ec042eb01fe847",
        template="chat",
        columns={"prompt": "text", "body": "text"},
        convert=_writingprompts_curated,
        filters=(_DELETED,),
        rows=15000,  # scribe card
    ),
    "mathqa_programs": Recipe(
        repo="euclaise/mathqa_programs",
        revision="766ff36e7f340da89cf509dfb5ce2e9811cd4769",
        template="chat",
        columns={"problem": "text", "program": "text"},
        convert=_mathqa_programs,
        rows=4000,  # scribe card
    ),
    "booksum_short": Recipe(
        repo="pszemraj/booksum-short",
        revision="",  # no commit of it was seen
        template="chat",
        columns={"chapter": "text", "summary_text": "text"},
        convert=_booksum_short,
        filters=("the shortest rows, by characters of chapter and summary",),
        rows=3000,  # scribe card; each gives two items
        shortest=True,
    ),
    "mathoverflow_accepted": Recipe(
        repo="euclaise/mathoverflow-accepted",
        revision="6a2e9c83e4735f9e327b76d0eacf8f91ec939f46",
        template="chat",
        columns={
            "parent_title": "text",
            "parent_body": "text",
            "body": "text",
            "score": "number as text",
        },
        convert=_mathoverflow_accepted,
        filters=("the answer's score is above 10",),
        rows=10000,  # scribe card
    ),
    "coedit": Recipe(
        repo="BEE-spoke-data/coedit-reworded-deduped",
        revision="2a9fc08e28aea887872fb2eb380f91f4eee6aeaf",
        template="chat",
        columns={"instruction": "text", "input": "text", "output": "text"},
        convert=_coedit,
        rows=1000,  # scribe card
    ),
}


def _own(entry: MixtureEntry) -> Recipe:
    """The recipe of a data set of one's own: `entry.columns` says which column holds what."""

    def convert(row: Row) -> list[Item]:
        for column, lowest in entry.at_least.items():
            require_at_least(row, column, lowest)
        if "messages" in entry.columns:
            return [conversation(row, entry.columns["messages"])]
        texts = {what: filled(row, column) for what, column in entry.columns.items()}
        return [texts if entry.template == "cot" else exchange(texts["user"], texts["assistant"])]

    kind = "list of {role, content}" if "messages" in entry.columns else "text"
    return Recipe(
        repo=entry.repo,
        revision=entry.revision,
        template=entry.template,
        columns=dict.fromkeys(entry.columns.values(), kind)
        | dict.fromkeys(entry.at_least, "number"),
        convert=convert,
        filters=tuple(f"{column} at least {low:g}" for column, low in entry.at_least.items()),
    )
