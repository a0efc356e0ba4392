"""`memphis data`: what the built folder holds, against counts of its own; killed; trained from."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import logged
from tokenizers import Tokenizer

from memphis_jax import checkpoint
from memphis_jax.data import build, examples, procedural
from memphis_jax.data.loader import Loader, sft_loader
from memphis_jax.data.packing import first_fit
from memphis_jax.data.prepare import data
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import read_jsonl, sha256_file, write_jsonl

REPO = Path(__file__).parents[1]
SEQ_LEN = 96
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    phase = dict(epochs=2, batch_size=4, seq_len={seq_len}, optimizer=dict(learning_rate=1e-3))
    return ConfigDict(dict(
        model=dict(
            vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        ),
        data={data!r}, sft=phase, rank=phase, seed=3,
    ))
"""


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(["seven", "bells", "ring", "twice", "now"], words))


def cot_row(rng: np.random.Generator, number: int, words: int = 8) -> dict[str, str]:
    return {
        "prompt": f"Question {number}: {sentence(rng, words)}?",
        "rationale": sentence(rng, words) + ".",
        "target": str(number % 10),
        "source": f"set{number % 3}",
    }


def chat_row(rng: np.random.Generator, turns: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": sentence(rng, int(rng.integers(1, 9)))}
            for _ in range(turns)
            for role in ("user", "assistant")
        ]
    }


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A mixture of 120 CoT rows and 60 conversations, some of them too long, and a tokenizer."""
    rng = np.random.default_rng(0)
    cot = [cot_row(rng, number, words=200 if number % 20 == 7 else 8) for number in range(120)]
    chat = [chat_row(rng, int(rng.integers(1, 4))) for _ in range(60)]
    write_jsonl(tmp_path / "cot.jsonl", cot)
    write_jsonl(tmp_path / "chat.jsonl", chat)
    texts = [text for row in cot for text in row.values()]
    tokenizer = procedural.train_tokenizer(texts, 512)
    procedural.save_tokenizer(tokenizer, tmp_path / "tokenizer")
    return tmp_path


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    cot = {name: name for name in ("prompt", "rationale", "target", "source")}
    return {
        "source": "mixture",
        "tokenizer": str(world / "tokenizer"),
        "mixture": {
            "mine": {"path": str(world / "cot.jsonl"), "template": "cot", "columns": cot},
            "talk": {
                "path": str(world / "chat.jsonl"),
                "template": "chat",
                "columns": {"messages": "messages"},
            },
        },
        **changes,
    }


def command(world: Path, name: str = "data", seq_len: int = SEQ_LEN, **changes: Any) -> list[str]:
    config = CONFIG.format(data=settings(world, **changes), seq_len=seq_len)
    (world / f"{name}.py").write_text(config)
    return ["--config", str(world / f"{name}.py"), "--out", str(world / name)]


def built(world: Path, name: str = "data", **changes: Any) -> Path:
    data(command(world, name, **changes))
    return world / name


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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


def test_a_finished_folder_stays_and_one_of_other_inputs_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = built(world)
    inode = (out / "manifest.json").stat().st_ino
    capsys.readouterr()
    built(world)
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "manifest.json").stat().st_ino == inode
    before = contents(out)
    with pytest.raises(ValueError, match=r"built from other inputs.* seq_len: 96 -> 95"):
        built(world, seq_len=95)
    with (world / "chat.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "late"}]}\n')
    with pytest.raises(ValueError, match=r"other inputs.* origins\.talk\.sha256\.chat"):
        built(world)
    assert contents(out) == before
    assert not list(world.glob(".*"))


def test_another_number_of_epochs_is_no_other_folder_but_another_format_is(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = built(world)
    words = command(world)
    before = contents(out)
    capsys.readouterr()
    data([*words, "--config.sft.epochs=1"])
    assert "nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(build, "FORMAT", build.FORMAT + 1)
    with pytest.raises(ValueError, match=r"other inputs.* format: 1 -> 2"):
        data(words)
    assert contents(out) == before


def test_the_guard_is_switched_on_from_the_command_line(world: Path) -> None:
    """As docs/data.md has it, over a config that does not name `evaluation`."""
    row = read_jsonl(world / "cot.jsonl")[3]
    write_jsonl(world / "test.jsonl", [{"question": row["prompt"]}])
    data([*command(world), f"--config.data.evaluation=('{world / 'test.jsonl'}',)"])
    record = manifest_of(world / "data")["data_sets"]["mine"]
    assert record["contaminated"] == {"exact": 1}


def test_a_damaged_folder_is_built_again_and_a_foreign_one_is_left_alone(world: Path) -> None:
    out = built(world)
    before = contents(out)
    (out / "sft" / "00000.arrow").write_bytes(b"half")
    built(world)
    assert contents(out) == before
    (world / "foreign").mkdir()
    (world / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="files of something else"):
        built(world, "foreign")
    assert (world / "foreign" / "thesis.txt").read_text() == "mine"


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(world: Path) -> None:
    message = "no example is left of 180 rows; dropped: {'longer than seq_len = 3 tokens': 180}"
    with pytest.raises(ValueError) as error:
        built(world, seq_len=3)
    assert str(error.value) == message
    assert not (world / "data").exists()


def batches(loader: Loader) -> list[str]:
    return [
        hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in loader
    ]


def test_the_folder_gives_the_batches_of_the_rows(world: Path) -> None:
    out = built(world, mixture={"mine": settings(world)["mixture"]["mine"]})
    tokenizer, eos_id = load_tokenizer(out / "tokenizer")
    rows, dropped = examples.read_cot_examples(world / "cot.jsonl", tokenizer, eos_id, SEQ_LEN)
    assert dropped.total() == 6
    mapped, _ = examples.open_built(out)
    sizes: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": 4, "epochs": 2, "seed": 1}
    slots = (mapped.lengths - 1).tolist()
    assert batches(sft_loader(mapped, slots=slots, **sizes)) == batches(sft_loader(rows, **sizes))


def test_a_folder_that_does_not_fit_the_training_is_refused(world: Path) -> None:
    out = built(world)
    examples.check_built(out, out / "tokenizer", SEQ_LEN)
    with pytest.raises(ValueError, match=r"built for sft\.seq_len = 96, but it is 128 now"):
        examples.check_built(out, out / "tokenizer", 128)
    procedural.save_tokenizer(procedural.train_tokenizer(["x"], 300), world / "other")
    with pytest.raises(ValueError, match="another tokenizer than that in"):
        examples.check_built(out, world / "other", SEQ_LEN)
    shutil.copytree(out / "tokenizer", world / "stop")
    config = '{"eos_token": "<|padding|>"}'
    (world / "stop" / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match="another tokenizer than that in"):
        examples.check_built(out, world / "stop", SEQ_LEN)
    shard = out / "sft" / "00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"sft differs from manifest\.json"):
        examples.check_built(out, out / "tokenizer", SEQ_LEN)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        examples.check_built(world, out / "tokenizer", SEQ_LEN)


def process(*words: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "memphis_jax", *map(str, words)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_killed_while_building_nothing_half_is_left_and_the_next_run_finishes(world: Path) -> None:
    rng = np.random.default_rng(1)
    write_jsonl(world / "cot.jsonl", (cot_row(rng, number) for number in range(6_000)))
    out, partial = world / "data", world / ".data.partial"
    moments: list[Callable[[], bool]] = [
        partial.exists,
        (partial / "tokenizer").exists,
        (partial / "sft").exists,
        lambda: any(path.stat().st_size > 100_000 for path in partial.glob("sft/*")),
        (partial / "train.jsonl").exists,
        (partial / "manifest.json").exists,
    ]
    words = command(world)
    for moment in moments:
        for _ in range(5):
            running = process("data", *words)
            while not moment() and running.poll() is None:
                time.sleep(0.001)
            running.kill()
            if running.wait() < 0:
                break
            shutil.rmtree(out)  # it had ended before it was seen, the last moments are short
        assert running.returncode == -signal.SIGKILL
        if moment is not moments[-1]:  # after the last moment comes only the rename
            assert not out.exists()
            assert partial.exists()
    finished = process("data", *words)
    output, _ = finished.communicate()
    assert finished.returncode == 0, output
    assert not partial.exists()
    assert contents(out) == contents(built(world, "undisturbed"))


@pytest.mark.slow
def test_training_from_the_folder_is_training_from_its_rows(world: Path) -> None:
    out = built(world, mixture={"mine": settings(world)["mixture"]["mine"]})
    words = ("--config", world / "data.py", "--phase", "sft")
    running = {
        "folder": process("train", *words, "--workdir", world / "folder", "--data", out),
        "rows": process(
            *("train", *words, "--workdir", world / "rows", "--data", out / "train.jsonl"),
            *("--tokenizer", out / "tokenizer"),
        ),
    }
    runs = {}
    for name, one in running.items():
        output, _ = one.communicate()
        assert one.returncode == 0, output
        runs[name] = logged(world / name)
    assert runs["folder"] == runs["rows"]
    assert len(runs["rows"]) > 0
    identity = checkpoint.read_meta(world / "folder")["identity"]
    assert identity["data_sha256"] == manifest_of(out)["sft_sha256"]
