"""Facts about the recipes: counts per filter, the items made, and sampling."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_fixtures import DATA_SETS, LONG, Row, talk, write
from recipe_rows import FORMS, chat, load_all

from memphis_jax.config import MixtureEntry
from memphis_jax.data import sources
from memphis_jax.data.recipes import RECIPES, Loaded, load

pytest_plugins = ["recipe_fixtures"]

REPO = Path(__file__).resolve().parents[1]

# --- counts and items


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_row_is_kept_or_counted_with_its_reason(mirror: Path, name: str, form: str) -> None:
    data = DATA_SETS[name]
    loaded = load_all(name, mirror / form)
    assert loaded.rows_in == len(data.rows())
    assert loaded.dropped == {reason: len(rows) for reason, rows in data.bad.items()}
    assert loaded.rows_in - loaded.dropped.total() == len(data.good)
    assert len(loaded.items) == len(data.good) * (2 if name == "booksum_short" else 1)
    assert loaded.template == RECIPES[name].template
    assert loaded.items == load_all(name, mirror / "parquet").items


def test_the_table_of_the_docs_is_the_one_in_code() -> None:
    docs = (REPO / "docs/data.md").read_text()
    table = re.findall(
        r"^\| `(\w+)` \| ([\w/-]+)(?: `(\w{7})`|, not pinned) \| ([\w,]+)", docs, re.M
    )
    found = {
        name: (repo, commit, 0 if rows == "all" else int(rows.replace(",", "")))
        for name, repo, commit, rows in table
    }
    assert found == {
        name: (recipe.repo, recipe.revision[:7], recipe.rows) for name, recipe in RECIPES.items()
    }
    assert {len(recipe.revision) for recipe in RECIPES.values()} == {0, 40}
    assert {name: data.repo for name, data in DATA_SETS.items()} == {
        name: recipe.repo for name, recipe in RECIPES.items()
    }


def test_origin_tells_files_split_and_filters(mirror: Path) -> None:
    origin = load_all("mathoverflow_accepted", mirror / "jsonl").origin
    folder = mirror / "jsonl/euclaise/mathoverflow-accepted"
    assert (origin["path"], origin["split"]) == (str(folder), "train")
    assert origin["filters"] == ["the answer's score is above 10"]
    files = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert origin["sha256"] == {name: sources.sha256_file(folder / name) for name in files}


BY_HAND: list[tuple[str, Row, list[Row]]] = [
    (
        "tinycot",
        {"prompt": " 1+1?\r\n", "rationale": "One\rand one.", "target": "2", "source": "GSM8K"},
        [{"prompt": "1+1?", "rationale": "One\nand one.", "target": "2", "source": "GSM8K"}],
    ),
    (
        "tinycot",
        {"prompt": "p", "rationale": "r", "target": "NA", "source": None},
        [{"prompt": "p", "rationale": "r", "target": "NA", "source": "tinycot"}],
    ),
    (
        "reddit_instruct",
        {"post_title": "Why (so)?", "post_text": "I ask.", "comment_text": "Because."},
        [chat("Why (so)?\n\nI ask.", "Because.", source="reddit_instruct")],
    ),
    (
        "reddit_instruct",
        {"post_title": "Why?", "post_text": None, "comment_text": "No [deleted] here"},
        [chat("Why?", "No [deleted] here", source="reddit_instruct")],
    ),
    (
        "oasst2_curated",
        talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        [chat("a", "b", "c", "d", source="oasst2_curated")],
    ),
    *(
        (
            "writingprompts_curated",
            {"prompt": prompt, "body": "Once."},
            [
                chat(
                    f"Write a story based on this prompt:\n\n{bare}",
                    "Once.",
                    source="writingprompts_curated",
                )
            ],
        )
        for prompt, bare in [
            ("[WP] You wake [up]", "You wake [up]"),
            ("[EU] [PI]A", "A"),
            ("No tag", "No tag"),
            ("[Long tag] A", "[Long tag] A"),
        ]
    ),
    (
        "mathqa_programs",
        {"problem": "what is 1 + 1 ?", "program": "if True:\n    print(2)\n"},
        [
            chat(
                "Write a Python snippet that solves this problem:\n\nwhat is 1 + 1 ?",
                "if True:\n    print(2)",
                source="mathqa_programs",
            )
        ],
    ),
    (
        "booksum_short",
        {"chapter": "It was.", "summary_text": "Short."},
        [
            chat("Summarize this chapter:\n\nIt was.", "Short.", source="booksum_short"),
            chat(
                "Write a chapter that fits this summary:\n\nShort.",
                "It was.",
                source="booksum_short",
            ),
        ],
    ),
    (
        "mathoverflow_accepted",
        {"parent_title": "On $x$", "parent_body": "Is $x$?", "body": "Yes.", "score": "11"},
        [chat("On $x$\n\nIs $x$?", "Yes.", source="mathoverflow_accepted")],
    ),
    (
        "coedit",
        {"instruction": "Fix:", "input": "he go", "output": "he goes"},
        [chat("Fix:\n\nhe go", "he goes", source="coedit")],
    ),
]


@pytest.mark.parametrize(("name", "row", "items"), BY_HAND)
def test_items_by_hand(tmp_path: Path, name: str, row: Row, items: list[Row]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    loaded = load(name, MixtureEntry(path=str(tmp_path / "rows.jsonl")), "", 0)
    assert loaded.items == items


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "target is not text"),
        (True, "target is not text"),
        (["2"], "target is not text"),
        ({"a": 1}, "target is not text"),
        ("\ud83d", "target is not valid Unicode"),
    ],
)
def test_fields_of_the_wrong_type_are_counted(tmp_path: Path, value: Any, reason: str) -> None:
    row = {"prompt": "p", "rationale": "r", "target": "t", "source": "s"}
    lines = [json.dumps(row), json.dumps({**row, "target": value}), json.dumps({"prompt": "p"})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    loaded = load("tinycot", MixtureEntry(path=str(tmp_path)), "", 0)
    assert (loaded.rows_in, len(loaded.items)) == (3, 1)
    assert loaded.dropped == {reason: 1, "empty rationale": 1}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hi", "messages is not a list of turns"),
        ([["user", "Hi"]], "messages is not a list of turns"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "empty turn"),
        ([{"role": "user", "content": 3}], "a turn is not text"),
        ([{"role": ["user"], "content": "a"}] * 2, "roles do not alternate"),
    ],
)
def test_conversations_of_the_wrong_form_are_counted(
    tmp_path: Path, messages: Any, reason: str
) -> None:
    lines = [
        json.dumps(talk(("user", "a"), ("assistant", "b"))),
        json.dumps({"messages": messages}),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    loaded = load("oasst2_curated", MixtureEntry(path=str(tmp_path)), "", 0)
    [(counted, rows)] = loaded.dropped.items()
    assert counted.startswith(reason) and (rows, len(loaded.items)) == (1, 1)


@pytest.mark.parametrize("score", [11, 11.0, 10**30, "1e2"])
def test_scores_may_be_numbers_too(tmp_path: Path, score: Any) -> None:
    row = {"parent_title": "t", "parent_body": "q", "body": "a"}
    lines = [json.dumps({**row, "score": value}) for value in (score, 10, True, [11])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    loaded = load("mathoverflow_accepted", MixtureEntry(path=str(tmp_path)), "", 0)
    assert loaded.dropped == {"score below 11": 1, "score is not a number": 2}


# --- which rows are taken


def test_a_number_that_no_float_holds_is_counted_and_not_a_crash(tmp_path: Path) -> None:
    row = {"parent_title": "t", "parent_body": "q", "body": "a", "score": 12}
    lines = [json.dumps(row), json.dumps({**row, "score": 10**400})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    loaded = load("mathoverflow_accepted", MixtureEntry(path=str(tmp_path)), "", 0)
    assert (len(loaded.items), loaded.dropped) == (1, {"score is not a number": 1})


def questions(loaded: Loaded) -> list[str]:
    return [item["messages"][0]["content"] for item in loaded.items]


def test_a_sample_is_one_of_the_rows_that_pass(mirror: Path) -> None:
    everything = questions(load_all("reddit_instruct", mirror / "parquet"))
    sample = load_all("reddit_instruct", mirror / "parquet", rows=50)
    chosen = questions(sample)
    assert len(set(chosen)) == 50
    assert chosen == [question for question in everything if question in set(chosen)]  # file order
    assert sample.dropped["not sampled"] == len(everything) - 50
    assert sample.rows_in == 50 + sample.dropped.total() == len(DATA_SETS["reddit_instruct"].rows())
    assert chosen == questions(load_all("reddit_instruct", mirror / "csv", rows=50))
    other = set(questions(load_all("reddit_instruct", mirror / "parquet", rows=50, seed=1)))
    assert 0 < len(other & set(chosen)) < 25  # 8 of 50 by chance
    assert set(chosen) < set(questions(load_all("reddit_instruct", mirror / "jsonl", rows=60)))
    # spread over the whole file, not its beginning
    places = [everything.index(question) for question in chosen]
    assert 100 < np.mean(places) < 200


def test_a_sample_does_not_depend_on_order_or_files(tmp_path: Path) -> None:
    data = DATA_SETS["coedit"]
    write(tmp_path / "a" / data.repo, data.rows(), "parquet", data.schema, files=1)
    write(tmp_path / "b" / data.repo, data.rows()[::-1], "jsonl", data.schema, files=7)
    a = questions(load_all("coedit", tmp_path / "a", rows=40))
    b = questions(load_all("coedit", tmp_path / "b", rows=40))
    assert a == b[::-1] and len(a) == 40


def test_booksum_takes_the_shortest_rows(mirror: Path) -> None:
    data = DATA_SETS["booksum_short"]
    rows = [row for row in data.rows() if row in data.good]

    def tidy(text: str) -> str:
        return text.replace("\r\n", "\n").replace("\r", "\n").strip()

    def length(row: Row) -> int:
        return len(tidy(row["chapter"])) + len(tidy(row["summary_text"]))

    longest_taken = sorted(map(length, rows))[39]
    loaded = load_all("booksum_short", mirror / "csv", rows=40)
    assert len(loaded.items) == 80
    assert loaded.dropped["not among the shortest"] == 160
    summaries = [item["messages"][1]["content"] for item in loaded.items[::2]]
    assert summaries == [tidy(row["summary_text"]) for row in rows if length(row) <= longest_taken]


def test_long_rows_are_not_held(tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("w") as file:
        for n in range(300):
            row = {"prompt": f"{n} {LONG}", "rationale": "r", "target": "t", "source": ""}
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    loaded = load("tinycot", MixtureEntry(path=str(tmp_path), rows=5), "", 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.rows_in == 300 and len(loaded.items) == 5
    assert peak < 5e6  # bytes; the file has 30e6
