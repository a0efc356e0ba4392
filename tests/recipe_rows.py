"""What the tests of the recipes share: how rows are loaded, written and made."""

import json
from pathlib import Path

from hub_fixtures import DATA_SETS, Row

from memphis_jax.config import MixtureEntry
from memphis_jax.data.recipes import Loaded, load

ALL = 10**6  # more rows than there are: nothing is sampled
FORMS = [
    (name, form)
    for form in ("parquet", "jsonl", "csv")
    for name in DATA_SETS
    if (name, form) != ("oasst2_curated", "csv")  # a list is no CSV field
]


def load_all(name: str, root: Path, rows: int = ALL, seed: int = 0) -> Loaded:
    return load(name, MixtureEntry(rows=rows), str(root), seed)


def as_jsonl(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str, source: str) -> Row:
    roles = ("user", "assistant") * (len(turns) // 2)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    return {"messages": messages, "source": source}
