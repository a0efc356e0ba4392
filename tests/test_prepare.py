"""The user's own rows: checked before anything is written, and given ids that stay apart."""

from pathlib import Path
from typing import Any

import pytest

from memphis_jax.config import DataConfig
from memphis_jax.data import procedural
from memphis_jax.data.prepare import import_rows
from memphis_jax.rounds.files import read_jsonl, write_jsonl


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    procedural.save_tokenizer(procedural.train_tokenizer(["a b"], 300), tmp_path / "own")
    (tmp_path / "own" / "pytorch_model.bin").write_bytes(b"never copied")
    return tmp_path / "own"


def files(folder: Path, **rows: list[dict[str, Any]]) -> DataConfig:
    paths = {}
    for split in ("train", "validation", "test"):
        paths[split] = str(folder / f"{split}-source.jsonl")
        write_jsonl(paths[split], rows.get(split, [row(f"a question for {split}")]))
    return DataConfig(source="jsonl", **paths)


def row(prompt: str, **changes: Any) -> dict[str, Any]:
    whole = {"prompt": prompt, "rationale": "Because.", "target": "1", "source": "mine"}
    return {**whole, **changes}


def test_rows_get_ids_and_the_tokenizer_comes_along(tmp_path: Path, tokenizer: Path) -> None:
    data = files(tmp_path, train=[row("one", surplus=3), row("two")])
    import_rows(data, tokenizer, tmp_path / "data")
    assert read_jsonl(tmp_path / "data" / "train.jsonl") == [
        {"id": "train-000001", **row("one")},
        {"id": "train-000002", **row("two")},
    ]
    assert read_jsonl(tmp_path / "data" / "test.jsonl")[0]["id"] == "test-000001"
    copied = {path.name for path in (tmp_path / "data" / "tokenizer").iterdir()}
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
    data = files(tmp_path, train=[row("one"), bad])
    with pytest.raises(ValueError, match=message):
        import_rows(data, tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_held_out_question_among_the_training_ones_is_refused(
    tmp_path: Path, tokenizer: Path
) -> None:
    data = files(tmp_path, train=[row("one"), row("two")], test=[row(" two ")])
    with pytest.raises(ValueError, match=r"1 of its questions are also in .* first is 'two'"):
        import_rows(data, tokenizer, tmp_path / "data")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        import_rows(files(tmp_path), tmp_path, tmp_path / "data")
