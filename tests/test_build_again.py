"""A data folder that is there: kept, refused, damaged, killed while it was built, trained from."""

import hashlib
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import (
    SEQ_LEN,
    built,
    command,
    contents,
    cot_row,
    manifest_of,
    process,
    settings,
)
from helpers import logged

from memphis_jax import checkpoint
from memphis_jax.data import build, examples, procedural
from memphis_jax.data.loader import Loader, sft_loader
from memphis_jax.data.prepare import data
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import read_jsonl, write_jsonl

pytest_plugins = ["build_fixtures"]


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
