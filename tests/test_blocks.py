"""Blocks: damage is seen, other sampling is refused, and a merge holds every answer once."""

import json
from pathlib import Path
from typing import Any

import pytest

from memphis_jax.rounds import blocks
from memphis_jax.rounds.files import read_completions

META: dict[str, Any] = {
    "engine": "vllm",
    "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
    "model": {"config.json": "aa", "model.safetensors": "bb", "tokenizer.json": "cc"},
    "num_samples": 2,
    "seed": 0,
    "sampling": {"temperature": 0.5, "stop": ["\n### User:"]},
}
HERE = {"hardware": {"host": "one"}, "shard": [0, 1]}


def row(name: str, sample: int = 0, text: str = "1 + 1 = 2") -> dict[str, Any]:
    return {"id": name, "sample": sample, "text": text, "num_tokens": 3}


def both(*names: str) -> list[dict[str, Any]]:
    return [row(name, k) for name in names for k in range(2)]


def write(
    out: Path,
    rows: list[dict[str, Any]],
    shard: tuple[int, int] = (0, 1),
    number: int = 0,
    **changes: Any,
) -> Path:
    folder = blocks.shard_folder(out, *shard)
    folder.mkdir(parents=True, exist_ok=True)
    path = blocks.block_path(folder, number)
    blocks.write_block(path, {**META, **HERE, "shard": list(shard), **changes}, rows)
    return path


def test_a_block_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        row("a", text="zwei\u2028Zeilen\r\n\u00e9 \U0001f600 \x00 \x85"),
        {"id": "b", "skipped": "long"},
    ]
    meta, found = blocks.read_block(write(tmp_path, rows))
    assert found == rows and meta == {**META, **HERE}
    assert list(tmp_path.rglob("*.tmp")) == []


def test_what_is_left_of_a_shard(tmp_path: Path) -> None:
    write(tmp_path, both("a"), number=0)
    cut = write(tmp_path, both("b"), number=2)
    cut.write_bytes(cut.read_bytes()[:-9])
    folder, left = blocks.open_shard(tmp_path, 0, 1, 4, META, replace=True)
    assert folder == tmp_path / "blocks-0-of-1" and left == [1, 2, 3]
    folder, left = blocks.open_shard(tmp_path / "new" / "out", 1, 2, 2, META, replace=False)
    assert folder.is_dir() and left == [0, 1]


def test_a_shard_of_other_weights_is_refused_or_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path, both("a"), model={**META["model"], "model.safetensors": "dd"})
    with pytest.raises(blocks.SampledOtherwise, match=r"model\.safetensors"):
        blocks.open_shard(tmp_path, 0, 1, 1, META, replace=False)
    assert other.is_file() and not capsys.readouterr().err
    merged = tmp_path / "completions.jsonl"
    merged.write_text("of the other weights")
    folder, left = blocks.open_shard(tmp_path, 0, 1, 1, META, replace=True)
    assert "sampling all again: " in capsys.readouterr().err
    assert left == [0] and list(folder.iterdir()) == []
    assert not merged.exists()  # a kill before the next merge would leave it to `memphis grade`


def test_every_cut_and_every_changed_byte_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, both("a"))
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # without the last newline it is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(blocks.DamagedBlock, match=r"00000\.jsonl is cut off or altered"):
            blocks.read_block(path)
    body = whole[:-1].rfind(b"\n") + 1
    for at in range(body):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(blocks.DamagedBlock):
            blocks.read_block(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content + b"\n",
        lambda content: content + b'{"id": "c"}\n',
        lambda content: content + content,
        lambda content: b"\x00" * len(content),  # what a lost power supply leaves
        lambda content: b"\xff\xfe\n" + content,
        lambda content: content[:-1] + b"}\n",
        lambda content: b"[]\n[]\n",
        lambda content: b'{"end": 3}\n',
        lambda content: b"",
    ],
)
def test_other_damage(tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, both("a"))
    assert blocks.finished(path.parent, 0, META)
    path.write_bytes(damage(path.read_bytes()))
    assert not blocks.finished(path.parent, 0, META)
    assert f"{path} is cut off or altered: sampling it again" in capsys.readouterr().out


def test_a_row_that_json_cannot_hold_leaves_the_old_block(tmp_path: Path) -> None:
    path = write(tmp_path, both("a"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"block-00000.jsonl: cannot be written as JSON"):
        write(tmp_path, [{**row("a"), "logprobs": [-0.5, float("nan")]}])
    assert path.read_bytes() == before and list(tmp_path.rglob("*.tmp")) == []


def test_a_block_that_is_not_there_is_not_finished(tmp_path: Path) -> None:
    path = write(tmp_path, both("a"))
    assert not blocks.finished(path.parent, 1, META)
    assert not blocks.finished(tmp_path / "absent", 0, META)


def test_another_place_is_the_same_sampling(tmp_path: Path) -> None:
    path = write(tmp_path, both("a"), hardware={"host": "another"}, shard=[3, 4])
    assert blocks.finished(path.parent, 0, META)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed: 1 -> 0"),
        ({"num_samples": 4}, "num_samples: 4 -> 2"),
        ({"new": 1}, "new: 1 -> null"),
        ({"seed": 1, "engine": "jax"}, 'engine: "jax" -> "vllm"; seed: 1 -> 0'),
        ({"engine": "x" * 99}, f'engine: "{"x" * 39}...{"x" * 39}" -> "vllm"'),
        ({"sampling": {**META["sampling"], "temperature": 1}}, '{"temperature": 1} -> {"temp'),
        ({"versions": {"vllm": "0.32.0", "torch": "2.12.0"}}, '{"torch": "2.12.0"} -> {"torch": '),
        # The middle of a long list of files: it must not be cut out of the message.
        (
            {"model": {**META["model"], "model.safetensors": "XX"}},
            'model: {"model.safetensors": "XX"} -> {"model.safetensors": "bb"}',
        ),
        ({"model": {"config.json": "aa"}}, 'model: {} -> {"model.safetensors": "bb", "tok'),
    ],
)
def test_other_sampling_is_refused_by_name(tmp_path: Path, changes: Any, told: str) -> None:
    path = write(tmp_path, both("a"), **changes)
    with pytest.raises(ValueError, match="was sampled otherwise") as caught:
        blocks.finished(path.parent, 0, META)
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert "another --out" in str(caught.value)


def test_a_merge_is_in_the_order_of_the_questions(tmp_path: Path) -> None:
    one, two = {"host": "one"}, {"host": "two"}
    write(tmp_path, [*reversed(both("c")), {"id": "e", "skipped": "too long"}], (0, 2), 0)
    write(tmp_path, both("a"), (0, 2), 1, hardware=one)
    write(tmp_path, both("d", "b"), (1, 2), 0, hardware=two)
    write(tmp_path, both("x"), (0, 1), 0, seed=9)  # of an unsharded run in the same folder
    assert blocks.gather(tmp_path, 2, list("abcde"), META) == 8
    meta, rows = read_completions(tmp_path / "completions.jsonl")
    assert rows == both("a", "b", "c", "d")
    expected = {**META, "hardware": [one, two], "shards": 2, "skipped": {"e": "too long"}}
    assert meta == expected


def test_a_merge_keeps_the_versions_of_the_samplers(tmp_path: Path) -> None:
    """The machine that merges need not have vLLM."""
    write(tmp_path, both("a"))
    other = {**META, "versions": {"vllm": "not installed"}}
    assert blocks.gather(tmp_path, 1, ["a"], other) == 2
    assert read_completions(tmp_path / "completions.jsonl")[0]["versions"] == META["versions"]


FOREIGN = {**META["model"], "model.safetensors": "XX"}


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        (both("b"), {"model": FOREIGN}, 'model: {"model.safetensors": "XX"} -> '),
        (both("b"), {"versions": {"vllm": "0.31.0"}}, "versions: "),
        (both("b"), {"sampling": {}}, "sampling: "),
        ([], {}, "1 of 2 questions lack completions, the first is 'b'"),
        (both("b")[:1], {}, "1 of 2 questions lack completions, the first is 'b'"),
        ([row("b", 0), row("b", 2)], {}, "1 of 2 questions lack completions"),
        ([*both("b"), row("b", 1)], {}, "('b', 1) is there twice"),
        ([*both("b"), row("a", 0)], {}, "('a', 0) is there twice"),
        (both("b", "z"), {}, "1 unknown questions: ['z']"),
        ([*both("b"), {"id": "y", "skipped": "long"}], {}, "1 unknown questions: ['y']"),
    ],
)
def test_a_merge_refuses(
    tmp_path: Path, rows: list[dict[str, Any]], changes: Any, told: str
) -> None:
    write(tmp_path, both("a"), (0, 2))
    write(tmp_path, rows, (1, 2), **changes)
    with pytest.raises(ValueError) as caught:
        blocks.gather(tmp_path, 2, ["a", "b"], META)
    assert told in str(caught.value)
    assert not (tmp_path / "completions.jsonl").exists()


@pytest.mark.parametrize("changes", [{"seed": 5}, {"num_samples": 1}, {"model": FOREIGN}])
def test_a_merge_refuses_what_agrees_but_is_not_what_was_asked_for(
    tmp_path: Path, changes: Any
) -> None:
    write(tmp_path, both("a"), **changes)
    with pytest.raises(ValueError, match="was sampled otherwise"):
        blocks.gather(tmp_path, 1, ["a"], META)


def test_a_merge_refuses_damage_and_an_absent_shard(tmp_path: Path) -> None:
    write(tmp_path, both("a"), (0, 2))
    with pytest.raises(ValueError, match="run the shards that did not finish again"):
        blocks.gather(tmp_path, 2, ["a", "b"], META)
    path = write(tmp_path, both("b"), (1, 2))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path} is cut off or altered: run shard 1/2 again"):
        blocks.gather(tmp_path, 2, ["a", "b"], META)


def test_a_merge_refuses_when_nothing_was_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 1 questions lack completions"):
        blocks.gather(tmp_path, 1, ["a"], META)


def test_chunks() -> None:
    assert blocks.chunks(list(range(5)), 2) == [[0, 1], [2, 3], [4]]
    assert blocks.chunks([], 2) == []


def test_the_end_of_a_block_tells_its_rows(tmp_path: Path) -> None:
    *_, last = write(tmp_path, both("a", "b")).read_text().splitlines()
    assert json.loads(last)["end"]["rows"] == 4
