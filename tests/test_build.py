"""`memphis data`: what the built folder holds, against counts of its own."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from built import (
    REPO,
    SEQ_LEN,
    built,
    contents,
    cot_row,
    manifest_of,
    settings,
)
from tokenizers import Tokenizer

from memphis_jax.data import build, examples
from memphis_jax.data.packing import first_fit
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import read_jsonl, sha256_file, write_jsonl

pytest_plugins = ["build_fixtures"]


def by_hand(tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Tokens and mask of a row, from the templates of the model cards and nothing of ours."""
    if "messages" in row:
        turns = [message["content"] for message in row["messages"]]
        pieces = [
            (f"{'' if i == 0 else chr(10)}### User:\n{turns[i]}\n### Assistant:\n", turns[i + 1])
            for i in range(0, len(turns), 2)
        ]
    else:
        answer = f"{row['rationale']}\n### Answer:\n{row['target']}"
        pieces = [(f"### User:\n{row['prompt']}\n### Rationale:\n", answer)]
    tokens: list[int] = []
    mask: list[bool] = []
    for prompt, response in pieces:
        untrained, trained = (tokenizer.encode(text).ids for text in (prompt, response))
        tokens += [*untrained, *trained, 0]  # 0 is <|endoftext|>
        mask += [False] * len(untrained) + [True] * (len(trained) + 1)
    return tokens, mask


def test_every_example_mask_and_count_is_what_the_rows_say(world: Path) -> None:
    out = built(world)
    manifest = manifest_of(out)
    tokenizer, _ = load_tokenizer(world / "tokenizer")
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(out.glob("sft/*.arrow"))]
    found = [row for table in tables for row in table.to_pylist()]
    expected = []
    for name, file in (("mine", "cot.jsonl"), ("talk", "chat.jsonl")):
        rows = read_jsonl(world / file)
        encoded = [(*by_hand(tokenizer, row), row.get("source", name)) for row in rows]
        kept = [one for one in encoded if len(one[0]) <= SEQ_LEN + 1]
        record = manifest["data_sets"][name]
        assert record["rows_in"] == record["items"] == len(rows)
        assert record["rows_dropped"] == {}
        too_long = {f"longer than seq_len = {SEQ_LEN} tokens": len(rows) - len(kept)}
        assert record["items_dropped"] == too_long
        assert record["examples"] == len(kept) < len(rows)
        assert record["tokens"] == sum(len(tokens) for tokens, *_ in kept)
        assert record["trained_tokens"] == sum(sum(mask) for _, mask, _ in kept)
        assert record["longest"] == max(len(tokens) for tokens, *_ in kept)
        assert record["origin"]["sha256"] == {file: sha256_file(world / file)}
        expected += kept
    assert [(row["tokens"], row["loss_mask"], row["source"]) for row in found] == expected
    assert all(row["tokens"][-1] == 0 and row["loss_mask"][-1] for row in found)

    totals = manifest["totals"]
    assert (totals["rows_in"], totals["examples"]) == (180, len(expected))
    assert totals["tokens"] == sum(len(tokens) for tokens, *_ in expected)
    assert totals["trained_tokens"] == sum(sum(mask) for _, mask, _ in expected)
    hashes = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents(out).items()
        if name != "manifest.json"
    }
    assert manifest["files"] == hashes
    slots = [len(tokens) - 1 for tokens, *_ in expected]
    for epoch, packing in enumerate(manifest["packing"]):
        order = np.random.default_rng((3, epoch)).permutation(len(slots))
        rows = len(first_fit([slots[index] for index in order], SEQ_LEN))
        assert packing == {"rows": rows, "efficiency": round(sum(slots) / rows / SEQ_LEN, 6)}
    assert len(manifest["packing"]) == 2


def test_the_longest_row_that_fits_is_kept_and_one_more_token_is_dropped(world: Path) -> None:
    """n tokens take n - 1 slots."""
    tokenizer, _ = load_tokenizer(world / "tokenizer")
    rows = read_jsonl(world / "cot.jsonl")
    length = sorted(len(by_hand(tokenizer, row)[0]) for row in rows)[60]
    same = sum(len(by_hand(tokenizer, row)[0]) == length for row in rows)
    mixture = {"mine": settings(world)["mixture"]["mine"]}
    fits = built(world, "fits", seq_len=length - 1, mixture=mixture)
    short = built(world, "short", seq_len=length - 2, mixture=mixture)
    counts = [manifest_of(folder)["totals"]["examples"] for folder in (fits, short)]
    assert counts[0] - counts[1] == same > 0
    assert manifest_of(fits)["data_sets"]["mine"]["longest"] == length


def test_the_same_inputs_give_the_same_bytes_also_in_two_processes(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHUNK", 16)
    once = contents(built(world))
    assert once == contents(built(world, "again"))
    monkeypatch.setattr(build, "ITEMS_PER_PROCESS", 90)
    monkeypatch.setattr(build, "_cores", lambda: 2)
    assert once == contents(built(world, "parallel"))


def item(number: int) -> dict[str, str]:
    return cot_row(np.random.default_rng(number), number)


def test_a_killed_tokenising_process_ends_the_build_with_one_line(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does when memory runs out. It must not wait for the lost chunk for ever."""
    monkeypatch.setattr(build, "_cores", lambda: 2)
    with (
        pytest.raises(RuntimeError, match="one of 2 tokenising processes was killed") as error,
        build._encoder(world / "tokenizer", SEQ_LEN, 10**6) as encode,
    ):
        # Long to encode and a short reason as the answer: a worker that is killed amid a long one
        # leaves half of it in the pipe, for whose rest concurrent.futures waits for ever.
        slow = {**item(0), "rationale": "so " * 60_000}
        found = iter(encode([[item(0)], *([slow] * 4 for _ in range(40))]))
        assert len(next(found)) == 1
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        workers[0].kill()
        for _ in found:
            pass
    assert "\n" not in str(error.value)
    assert not any(worker.is_alive() for worker in workers)


_PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from memphis_jax.data import build
if __name__ == "__main__":
    build._cores = lambda: 2
    rows = [[dict(prompt="a", rationale="b", target="c")]] * 8
    with build._encoder(Path(sys.argv[1]), 96, 10**6) as encode:
        list(encode(rows))
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


def test_tokenising_processes_end_with_a_build_that_is_killed(world: Path) -> None:
    (world / "parent.py").write_text(_PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(world / "parent.py"), str(world / "tokenizer")],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    # Every worker holds this pipe open until it ends.
    parent.communicate(timeout=60)


def test_shards_are_cut_at_their_size_and_read_as_one(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = examples.open_built(built(world))
    monkeypatch.setattr(build, "CHUNK", 10)
    monkeypatch.setattr(build, "SHARD_TOKENS", 1000)
    out = built(world, "cut")
    parts, manifest = examples.open_built(out)
    shards = [shard for record in manifest["data_sets"].values() for shard in record["shards"]]
    assert shards == sorted(path.relative_to(out).as_posix() for path in out.glob("sft/*"))
    assert len(shards) > 4
    assert len(parts) == len(whole) == len(parts.lengths)
    for index in range(len(whole)):
        for left, right in zip(parts[index], whole[index], strict=True):
            assert (left.dtype, left.tolist()) == (right.dtype, right.tolist())
        assert parts.source(index) == whole.source(index)
        assert len(parts[index].tokens) == parts.lengths[index]
    with pytest.raises(IndexError, match="is not there"):
        parts[len(parts)]


def test_questions_are_held_out_of_training_with_all_their_rows(world: Path) -> None:
    rows = read_jsonl(world / "cot.jsonl")
    write_jsonl(world / "cot.jsonl", [*rows, *({**row, "target": "2"} for row in rows[:40])])
    out = built(world, num_validation=9, num_test=30)
    splits = {
        split: read_jsonl(out / f"{split}.jsonl") for split in ("train", "validation", "test")
    }
    assert [len(splits[split]) for split in ("validation", "test")] == [9, 30]
    questions = {split: {row["prompt"] for row in found} for split, found in splits.items()}
    assert len(questions["validation"] | questions["test"]) == 39
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert len({row["id"] for found in splits.values() for row in found}) == sum(
        map(len, splits.values())
    )
    record = manifest_of(out)["data_sets"]["mine"]
    held = sum(
        row["prompt"] in questions["validation"] | questions["test"] for row in rows + rows[:40]
    )
    assert record["items_dropped"]["held-out question"] == held > 39
    assert record["examples"] == len(splits["train"]) == 160 - sum(record["items_dropped"].values())


def test_conversations_that_ask_a_held_out_question_are_dropped(world: Path) -> None:
    """Every question is asked in a conversation too, with other punctuation, in its second turn."""
    asked = [
        row["prompt"].replace(":", "").replace("?", ".") for row in read_jsonl(world / "cot.jsonl")
    ]
    turns = ("Hello", "Good day", "{}", "I do not know")
    roles = ("user", "assistant") * 2
    write_jsonl(
        world / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": r, "content": t.format(q)} for r, t in zip(roles, turns, strict=True)
                ]
            }
            for q in asked
        ],
    )
    out = built(world, num_validation=9, num_test=30)
    assert manifest_of(out)["data_sets"]["talk"]["items_dropped"]["held-out question"] == 39


@pytest.mark.parametrize("contamination", ["drop", "keep"])
def test_rows_that_hold_an_evaluation_question_are_counted(
    world: Path, contamination: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_jsonl(world / "cot.jsonl")
    write_jsonl(world / "test.jsonl", [{"question": rows[k]["prompt"].upper()} for k in (3, 5)])
    missing = str(world / "missing.jsonl")
    evaluation = (str(world / "test.jsonl"), missing)
    out = built(world, evaluation=evaluation, contamination=contamination)
    assert missing in capsys.readouterr().err
    record = manifest_of(out)["data_sets"]["mine"]
    assert record["contaminated"] == {"exact": 2}
    dropped = {"holds an evaluation question (exact)": 2} if contamination == "drop" else {}
    too_long = {f"longer than seq_len = {SEQ_LEN} tokens": 6}
    assert record["items_dropped"] == too_long | dropped
    trained = {row["prompt"] for row in read_jsonl(out / "train.jsonl")}
    assert (rows[3]["prompt"] in trained) == (contamination == "keep")


def test_a_set_that_was_not_compared_leaves_a_trace(world: Path) -> None:
    """A missing evaluation file stops nothing, but the manifest says so."""
    missing = str(world / "nowhere.jsonl")
    manifest = manifest_of(built(world, "guarded", evaluation=(missing,)))
    assert len(manifest["warnings"]) == 1 and missing in manifest["warnings"][0]
    assert manifest_of(built(world, "free"))["warnings"] == []
