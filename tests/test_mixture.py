"""A mixture in a config: data sets of one's own, overrides, and every wrong entry."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import talk, texts, write_file
from recipe_rows import chat

from memphis_jax import config as configs
from memphis_jax.config import ConfigError, MixtureEntry
from memphis_jax.data.recipes import RECIPES, load

REPO = Path(__file__).resolve().parents[1]

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    phase = {"epochs": 1, "batch_size": 1, "seq_len": 64, "optimizer": {}}
    data = {"source": "mixture", "tokenizer": "t", "mixture": %r}
    return ConfigDict({"sft": phase, "rank": phase, "data": data})
"""


def mixture(tmp_path: Path, entries: dict[str, Any], *overrides: str) -> dict[str, MixtureEntry]:
    (tmp_path / "mine.py").write_text(CONFIG % entries)
    config = configs.load(str(tmp_path / "mine.py"), overrides)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(dataclasses.asdict(config)))
    assert configs.load(str(saved)) == config
    return config.data.mixture


def test_a_data_set_of_ones_own_is_one_entry(tmp_path: Path) -> None:
    rows = [{"q": f"q{n}", "a": f"a{n}", "why": f"w{n}", "votes": str(n)} for n in range(20)]
    rows += [{"q": "q", "a": None, "why": "w", "votes": "50"}]
    write_file(tmp_path / "qa.csv", rows, texts("q", "a", "why", "votes"))
    talks = [talk(("user", f"u{n}"), ("assistant", f"b{n}")) for n in range(3)]
    write_file(tmp_path / "talks/x.jsonl", talks, texts("messages"))
    path = str(tmp_path / "qa.csv")
    entries = mixture(
        tmp_path,
        {
            "mine": {
                "path": path,
                "template": "chat",
                "columns": {"user": "q", "assistant": "a"},
                "at_least": {"votes": 10},
                "rows": 4,
            },
            "steps": {
                "path": path,
                "template": "cot",
                "columns": {"prompt": "q", "rationale": "why", "target": "a"},
            },
            "talks": {
                "path": str(tmp_path / "talks"),
                "template": "chat",
                "columns": {"messages": "messages"},
            },
        },
    )
    mine = load("mine", entries["mine"], "", 0)
    assert mine.dropped == {"votes below 10": 10, "empty a": 1, "not sampled": 6}
    assert mine.rows_in == 21 and len(mine.items) == 4
    assert mine.origin["filters"] == ["votes at least 10"]
    number = mine.items[0]["messages"][0]["content"][1:]
    assert mine.items[0] == chat(f"q{number}", f"a{number}", source="mine")
    steps = load("steps", entries["steps"], "", 0)
    assert steps.template == "cot" and len(steps.items) == 20
    assert steps.items[7] == {"prompt": "q7", "rationale": "w7", "target": "a7", "source": "steps"}
    assert load("talks", entries["talks"], "", 0).items[2] == chat("u2", "b2", source="talks")


def test_names_that_are_no_recipe_or_are_taken() -> None:
    with pytest.raises(
        ValueError, match=r"mixture\.tinycott is no recipe \(did you mean 'tinycot'"
    ):
        load("tinycott", MixtureEntry(), "", 0)
    with pytest.raises(ValueError, match=r"is no recipe \(there are tinycot, reddit_instruct"):
        load("xyz", MixtureEntry(path="x"), "", 0)
    own = MixtureEntry(path="x", template="chat", columns={"messages": "m"})
    with pytest.raises(ValueError, match=r"mixture\.coedit is a recipe, which knows its template"):
        load("coedit", own, "", 0)


def test_overrides_reach_the_mixture() -> None:
    overrides = [
        "--config.data.root=/mirror",
        "--config.data.mixture.tinycot.rows=10",
        "--config.data.mixture.reddit_instruct.path=/here",
        "--config.data.evaluation=('a.jsonl','b.jsonl')",
        "--config.data.contamination=keep",
    ]
    data = configs.load(str(REPO / "configs/memphis_cot.py"), overrides).data
    assert (data.source, data.root, data.contamination) == ("mixture", "/mirror", "keep")
    assert data.mixture == {
        "tinycot": MixtureEntry(rows=10),
        "reddit_instruct": MixtureEntry(rows=5000, path="/here"),
        "oasst2_curated": MixtureEntry(),
    }
    assert data.evaluation == ("a.jsonl", "b.jsonl")
    assert set(data.mixture) <= set(RECIPES)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rows": -1}, r"mixture\.x: rows = -1 must be 0 or greater"),
        ({"row": 1}, r"mixture\.x\.row is not a known field; did you mean 'rows'"),
        ({"split": ""}, "split is empty"),
        ({"path": "a", "repo": "b"}, r"path = 'a' is on this machine: leave out repo"),
        ({"path": "a", "revision": "b"}, r"leave out repo and revision"),
        ({"template": "xml", "path": "a"}, r"template = 'xml' is not one of"),
        ({"template": "chat"}, "path and repo are empty"),
        ({"columns": {"user": "q"}}, "columns = {'user': 'q'} needs a template"),
        ({"at_least": {"votes": 1}}, "at_least = {'votes': 1.0} needs a template"),
        (
            {"template": "chat", "path": "a", "columns": {"user": "q"}},
            r"columns = {'user': 'q'} is not 'chat''s: give messages or assistant, user",
        ),
        (
            {"template": "cot", "path": "a", "columns": {"prompt": 3}},
            r"columns\.prompt = 3 must be",
        ),
        (5, r"mixture\.x = 5 must be a section"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture(tmp_path, {"x": entry})


def test_a_mixture_needs_an_entry_and_no_files_of_another_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixture is empty"):
        mixture(tmp_path, {})
    with pytest.raises(ConfigError, match=r"train = 'a\.jsonl' is for source = 'jsonl'"):
        mixture(tmp_path, {"tinycot": {}}, "--config.data.train=a.jsonl")
    with pytest.raises(ConfigError, match="contamination = 'ignore' is not one of"):
        mixture(tmp_path, {"tinycot": {}}, "--config.data.contamination=ignore")
