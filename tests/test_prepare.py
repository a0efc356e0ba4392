"""What `memphis data` reads: checked before anything is written, with ids that stay apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from memphis_jax.config import DataConfig
from memphis_jax.data import procedural
from memphis_jax.data.examples import read_manifest
from memphis_jax.data.prepare import data, hold_out, read_rows
from memphis_jax.rounds.files import read_jsonl, write_jsonl

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    phase = dict(epochs=1, batch_size=2, seq_len=128, optimizer=dict())
    return ConfigDict(dict(sft=phase, rank=phase, data={data!r}))
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    procedural.save_tokenizer(procedural.train_tokenizer(["a b"], 300), tmp_path / "own")
    (tmp_path / "own" / "pytorch_model.bin").write_bytes(b"never copied")
    return tmp_path / "own"


def files(folder: Path, **rows: list[dict[str, Any]]) -> dict[str, str]:
    paths = {"source": "jsonl"}
    for split in ("train", "validation", "test"):
        paths[split] = str(folder / f"{split}-source.jsonl")
        write_jsonl(paths[split], rows.get(split, [row(f"a question for {split}")]))
    return paths


def row(prompt: str, **changes: Any) -> dict[str, Any]:
    whole = {"prompt": prompt, "rationale": "Because.", "target": "1", "source": "mine"}
    return {**whole, **changes}


def build(folder: Path, **settings: Any) -> Path:
    (folder / "config.py").write_text(CONFIG.format(data=settings))
    data(["--config", str(folder / "config.py"), "--out", str(folder / "data")])
    return folder / "data"


def test_rows_get_ids_and_the_tokenizer_comes_along(tmp_path: Path, tokenizer: Path) -> None:
    rows = [row("one", surplus=3), row("two"), row(" ", target="no question"), row("four")]
    out = build(tmp_path, **files(tmp_path, train=rows), tokenizer=str(tokenizer))
    assert read_jsonl(out / "train.jsonl") == [
        {"id": "train-000001", **row("one")},
        {"id": "train-000002", **row("two")},
        {"id": "train-000004", **row("four")},  # what cannot be trained on is no question either
    ]
    assert read_jsonl(out / "test.jsonl")[0]["id"] == "test-000001"
    copied = {path.name for path in (out / "tokenizer").iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "x", "rationale": "y", "target": "1"}, "line 2: field 'source' must be text"),
        (row("x", target=5), r"line 2: field 'target' must be text, found 5"),
        (row("x", rationale=None), "line 2: field 'rationale' must be text, found None"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_published(
    tmp_path: Path, tokenizer: Path, bad: dict[str, Any], message: str
) -> None:
    settings = files(tmp_path, train=[row("one"), bad])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings, tokenizer=str(tokenizer))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "config.py"])


def test_a_held_out_question_among_the_training_ones_is_refused(tmp_path: Path) -> None:
    """Also in another case, with other blanks or other punctuation around its words."""
    for twin in (" two\nbells ", "TWO  bells", "two bells?", "'two' bells."):
        settings = files(tmp_path, train=[row("one"), row("two bells")], test=[row(twin)])
        with pytest.raises(ValueError, match=r"(?i)1 of its questions are also in .* is .*two"):
            read_rows(DataConfig(**settings))


def test_questions_with_other_numbers_or_operators_are_others(tmp_path: Path) -> None:
    train = [row(text) for text in ("What is 1.5 + 3?", "What is 5 - 3?", "What is -5 + 3?")]
    held_out = [row(text) for text in ("What is 15 + 3?", "What is 5 + 3?", "What is 1.5 - 3?")]
    splits, _ = read_rows(DataConfig(**files(tmp_path, train=train, test=held_out)))
    assert len(splits["test"]) == 3


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("  "), "line 2: empty prompt"),
        (row("x", target="\n"), "line 2: empty target"),
        (row("x", rationale="\ud83d"), "line 2: rationale is not valid Unicode"),
    ],
)
def test_a_held_out_row_that_no_round_could_use_is_named_at_once(
    tmp_path: Path, split: str, bad: dict[str, Any], message: str
) -> None:
    settings = files(tmp_path)
    lines = [row(f"one of {split}"), bad]
    Path(settings[split]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"{split}-source.jsonl, {message}"):
        read_rows(DataConfig(**settings))
    Path(settings[split]).write_text("")
    with pytest.raises(ValueError, match=f"{split}-source.jsonl has no rows"):
        read_rows(DataConfig(**settings))


def test_text_is_cleaned_and_half_a_surrogate_pair_drops_a_training_row(
    tmp_path: Path, tokenizer: Path
) -> None:
    settings = files(tmp_path)
    lines = [row("one\r\ntwo\rthree ", rationale="\tBecause.\r\n"), row("x \ud83d"), row("four")]
    Path(settings["train"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = build(tmp_path, **settings, tokenizer=str(tokenizer))
    assert read_jsonl(out / "train.jsonl") == [
        {"id": "train-000001", **row("one\ntwo\nthree")},
        {"id": "train-000003", **row("four")},
    ]
    record = read_manifest(out)["data_sets"]["jsonl"]
    assert record["rows_dropped"] == {"prompt is not valid Unicode": 1}
    assert (record["rows_in"], record["items"], record["examples"]) == (3, 2, 2)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        build(tmp_path, **files(tmp_path), tokenizer=str(tmp_path))


def test_held_out_questions_are_different_ones_drawn_by_the_seed() -> None:
    items = [
        row(prompt) for prompt in ("one", " ONE", "two", "three  x", "Three x", "four", "five")
    ]
    splits, questions = hold_out(items, {"validation": 1, "test": 2}, seed=0)
    assert [len(rows) for rows in splits.values()] == [1, 2]
    drawn = [held for rows in splits.values() for held in rows]
    assert [held["id"] for held in drawn] == ["validation-000001", "test-000001", "test-000002"]
    assert len({" ".join(held["prompt"].split()).casefold() for held in drawn}) == 3
    assert len(questions) == 3
    assert hold_out(items, {"validation": 1, "test": 2}, seed=0) == (splits, questions)
    assert any(hold_out(items, {"validation": 1}, seed)[1] != {"one"} for seed in range(5))
    with pytest.raises(ValueError, match="cannot hold out 5 of 5 CoT questions"):
        hold_out(items, {"validation": 5}, seed=0)
    assert hold_out([], {"validation": 0, "test": 0}, seed=0)[0] == {"validation": [], "test": []}
