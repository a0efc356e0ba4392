import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from memphis_jax.data.procedural import generate, main
from memphis_jax.data.prompts import cot_completion, cot_prompt, encode_cot, load_tokenizer

STEP = re.compile(r"(?:finds|gets|buys) (\d+) more|(?:loses|gives away) (\d+)|(doubles)")


def solve(prompt: str) -> list[tuple[int, str, int, int]]:
    """(before, operator, operand, after) of every step, read from the story."""
    start = re.match(r"\w+ has (\d+) \w+\.", prompt)
    assert start
    value = int(start[1])
    steps = []
    for added, lost, _ in STEP.findall(prompt):
        operator, operand = (
            ("+", int(added)) if added else ("-", int(lost)) if lost else ("+", value)
        )
        after = value + operand if operator == "+" else value - operand
        steps.append((value, operator, operand, after))
        value = after
    return steps


def test_targets_and_rationales_follow_from_the_prompts() -> None:
    rows = [row for split in generate(400, 50, 50, seed=1).values() for row in split]
    assert len(rows) == 500
    for row in rows:
        steps = solve(row["prompt"])
        assert len(steps) in (4, 5)
        assert 1 <= steps[0][0] <= 9
        assert all(1 <= after <= 16 for *_, after in steps)
        assert row["target"] == str(steps[-1][3])
        assert row["source"] == "procedural"
        if "=" in row["rationale"]:
            assert row["rationale"] == " ".join(f"{a} {op} {b} = {c}." for a, op, b, c in steps)
        else:
            words = row["rationale"].removesuffix(".").replace(",", "").split()
            value, at = int(words[0]), 1
            while at < len(words):
                if words[at] == "doubled":
                    value, at = 2 * value, at + 1
                else:
                    value, at = value + int(words[at] + words[at + 1]), at + 2
            assert value == steps[-1][3]
            assert row["rationale"].count("doubled") == row["prompt"].count("doubles")


def test_the_splits_share_neither_prompts_nor_arithmetic() -> None:
    splits = generate(3000, 300, 300, seed=2)
    rows = [row for split in splits.values() for row in split]
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 3000,
        "validation": 300,
        "test": 300,
    }
    assert len({row["id"] for row in rows}) == 3600
    assert len({row["prompt"] for row in rows}) == 3600
    assert len({tuple(solve(row["prompt"])) for row in rows}) == 3600


def test_six_of_ten_rationales_are_terse_whatever_the_prompt() -> None:
    rows = generate(4000, 0, 0, seed=3)["train"]
    for word in ("She", "doubles", "shells", "gives away"):
        terse = ["=" not in row["rationale"] for row in rows if word in row["prompt"]]
        assert len(terse) > 300
        assert abs(sum(terse) / len(terse) - 0.6) < 0.08


def test_another_seed_gives_other_problems() -> None:
    assert generate(20, 5, 5, seed=0) == generate(20, 5, 5, seed=0)
    assert generate(20, 5, 5, seed=0) != generate(20, 5, 5, seed=1)


@pytest.mark.parametrize("counts", [(-1, 1, 1), (500_000, 1, 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot make"):
        generate(*counts, seed=0)


def run_cli(out: Path, hash_seed: str, seed: int) -> None:
    sizes = ["--train", "500", "--validation", "40", "--test", "40", "--vocab-size", "512"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "memphis_jax.data.procedural",
            "--out",
            str(out),
            "--seed",
            str(seed),
            *sizes,
        ],
        env=os.environ
        | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run of the command."""
    out = tmp_path_factory.mktemp("procedural") / "data"
    run_cli(out, hash_seed="1", seed=7)
    return out


def test_the_command_writes_the_same_bytes_in_every_process(data: Path, tmp_path: Path) -> None:
    run_cli(tmp_path / "again", hash_seed="2", seed=7)
    assert content(tmp_path / "again") == content(data)
    assert set(content(data)) == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
    }
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == generate(500, 40, 40, seed=7)["train"]


def test_the_command_replaces_its_own_output_and_nothing_else(data: Path, tmp_path: Path) -> None:
    arguments = ["--train", "30", "--validation", "1", "--test", "1", "--out"]
    (tmp_path / ".data.partial" / "tokenizer").mkdir(parents=True)  # what a killed run leaves
    for seed in ("0", "1"):
        main([*arguments, str(tmp_path / "data"), "--seed", seed])
    train = (tmp_path / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in train] == generate(30, 1, 1, seed=1)["train"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        main([*arguments, str(tmp_path / "data")])
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"


def test_a_vocabulary_without_room_for_every_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 258"):
        main(["--out", str(tmp_path / "data"), "--train", "10", "--vocab-size", "257"])
    assert list(tmp_path.iterdir()) == []


def test_transformers_loads_the_tokenizer_and_gives_the_same_ids(data: Path) -> None:
    plain = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 0)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|padding|>", 1)
    assert len(loaded) == plain.get_vocab_size() <= 512
    texts = [json.loads(line)["prompt"] for line in (data / "test.jsonl").read_text().splitlines()]
    for text in [
        *texts,
        " two  spaces ,  tabs\t\r\n\n1234.5 ",
        "Größe 七 🙂 ①²",
        "a<|endoftext|>b",
    ]:
        ids = loaded(text).input_ids
        assert ids == plain.encode(text).ids
        assert loaded.decode(ids) == text


@settings(max_examples=200)
@given(text=st.text(st.characters(codec="utf-8")))
def test_decoding_an_encoding_gives_the_text(data: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_numbers_are_single_tokens_and_examples_are_short(data: Path) -> None:
    tokenizer, eos_id = load_tokenizer(data / "tokenizer")
    assert all(len(tokenizer.encode(str(number)).ids) == 1 for number in range(1, 17))
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d\D|\D\d", token)]
    for split in ("train", "validation", "test"):
        for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            completion = cot_completion(row["rationale"], row["target"])
            ids = encode_cot(tokenizer, row["prompt"], completion, eos_id).tokens.tolist()
            assert len(ids) <= 75
            # The same tokens when a sampler encodes its prompt and its answer in one go.
            assert ids == [*tokenizer.encode(cot_prompt(row["prompt"]) + completion).ids, eos_id]
