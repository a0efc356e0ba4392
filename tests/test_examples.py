"""Training data that cannot be used: the file, the line and what makes such files are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memphis_jax.config import DataConfig
from memphis_jax.data import examples, procedural
from memphis_jax.data.prepare import data, read_rows
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import write_jsonl

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")
COT = {"prompt": "P", "rationale": "r", "target": "4"}
PAIR = {"prompt": "P", "chosen": "c", "rejected": "d", "gold": "g"}
READERS = {"sft": examples.read_cot_examples, "rank": examples.read_groups}
MAKER = {"sft": "`memphis data --config FILE --out DIR`", "rank": "`memphis pairs`"}
GOOD = {"sft": COT, "rank": PAIR}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    folder = tmp_path_factory.mktemp("tokenizer") / "own"
    procedural.save_tokenizer(procedural.train_tokenizer(["a b"], 300), folder)
    return load_tokenizer(folder)


@pytest.fixture
def read(tmp_path: Path, tokenizer: tuple[Any, int]) -> Callable[..., Any]:
    def read(phase: str, rows: list[dict[str, Any]]) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return READERS[phase](path, *tokenizer, 128)

    return read


@pytest.mark.parametrize("phase", READERS)
def test_what_is_not_there_is_named_with_what_makes_it(
    phase: str, tmp_path: Path, tokenizer: tuple[Any, int], read: Callable[..., Any]
) -> None:
    path = tmp_path / "nope.jsonl"
    with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; .*{MAKER[phase]}"):
        READERS[phase](path, *tokenizer, 128)
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder, .*{MAKER[phase]}"):
        READERS[phase](tmp_path, *tokenizer, 128)
    with pytest.raises(ValueError, match=rf"rows.jsonl is empty: .*{MAKER[phase]}"):
        read(phase, [])


@pytest.mark.parametrize(
    ("phase", "row", "told"),
    [
        ("sft", PAIR, "line 2: no field 'rationale', found prompt, chosen, rejected, gold; "),
        ("sft", {"messages": [{"role": "user"}, {"role": "assistant"}]}, "no field 'content'"),
        ("rank", COT, "line 2: no field 'chosen', found prompt, rationale, target; "),
        ("rank", {}, "line 2: no field 'prompt', found none; "),
    ],
)
def test_a_row_without_a_field_is_named(
    phase: str, row: dict[str, Any], told: str, read: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=f"{told}.*{MAKER[phase]}"):
        read(phase, [GOOD[phase], row])


@pytest.mark.parametrize(
    ("phase", "row", "reason"),
    [
        ("sft", {"messages": 5}, "messages is not a list of {role, content}"),
        ("sft", {"messages": ["hello"]}, "messages is not a list of {role, content}"),
        ("sft", {**COT, "target": 4}, "the target is not text"),
        ("sft", {**COT, "rationale": "half \ud83d"}, "the rationale is not valid Unicode"),
        ("rank", {**PAIR, "chosen": None}, "the completion is not text"),
        ("rank", {**PAIR, "gold": "half \ud83d"}, "the completion is not valid Unicode"),
        ("rank", {**PAIR, "rejected": " "}, "the completion is empty"),
    ],
)
def test_a_row_that_no_tokenizer_takes_is_dropped_and_counted(
    phase: str, row: dict[str, Any], reason: str, read: Callable[..., Any]
) -> None:
    kept, dropped = read(phase, [GOOD[phase], row])
    assert len(kept) == 1 and dropped == {f"{reason}: drop the row": 1}


def test_a_file_without_a_usable_row_is_named(read: Callable[..., Any]) -> None:
    told = r"rows.jsonl: none of its rows .*: 2 the target is empty: drop the row; 1 longer than"
    with pytest.raises(ValueError, match=told):
        read("sft", [{**COT, "target": ""}] * 2 + [{**COT, "prompt": "P " * 999}])
    # Pairs that are all too long rank nothing: the recipe goes on with the weights as they are.
    assert read("rank", [{**PAIR, "prompt": "P " * 999}])[0] == []


# --- a built folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "data"
    sizes = {"num_train": 40, "num_validation": 2, "num_test": 2, "vocab_size": 300}
    options = [f"--config.data.{name}={value}" for name, value in sizes.items()]
    data(["--config", TINY, "--out", str(folder), *options])
    return folder


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks inputs, data_sets, totals, packing, sft_sha256, files"),
        ('{"data_sets": {}}', "lacks inputs, totals, packing, sft_sha256, files"),
    ],
)
def test_a_broken_manifest_is_named(built: Path, tmp_path: Path, text: str, told: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(built, folder)
    (folder / "manifest.json").write_text(text)
    show = ["show", str(folder), "0"]
    for argv in (show, ["--config", TINY, "--out", str(folder), "--config.data.num_train=40"]):
        with pytest.raises(ValueError, match=rf"manifest.json {told}.*: delete .*build it again"):
            data(argv)


@pytest.mark.parametrize("damage", ["cut off", "away", "all away"])
def test_a_damaged_shard_is_named(built: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(built, folder)
    shard = folder / "sft" / "00000.arrow"
    if damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "away":
        shard.unlink()
    else:
        shutil.rmtree(folder / "sft")
    with pytest.raises(ValueError, match=r"00000.arrow cannot be read .*`memphis data`"):
        data(["show", str(folder), "0"])
    with pytest.raises(ValueError, match=r"sft differs from manifest.json: delete .*, build it"):
        examples.check_built(folder, folder / "tokenizer", 128)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_that_is_not_there_is_named_by_its_setting(tmp_path: Path, split: str) -> None:
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")}
    for number, path in enumerate(paths.values()):
        write_jsonl(path, [COT | {"prompt": f"P{number}", "source": "s"}])

    settings = DataConfig(source="jsonl", **paths)
    Path(paths[split]).write_text("")
    with pytest.raises(ValueError, match=rf"{split}.jsonl has no rows: data.{split} needs one or"):
        read_rows(settings)
    Path(paths[split]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^data.{split} = .* is not there: give a JSON"):
        read_rows(settings)
    Path(paths[split]).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"^data.{split} = .* is a folder, not a file"):
        read_rows(settings)
