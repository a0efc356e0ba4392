"""`memphis sample`: killed and carried on, refused, and counted to the token."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from sampled import CONTEXT, chain_model, save_checkpoint, save_tokenizer, small_model
from sampled import write_questions as write

from memphis_jax.__main__ import main
from memphis_jax.data.prompts import STOP, encode_prompt
from memphis_jax.rounds.files import read_completions, sha256_folder

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def no_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the settings of this process as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("sample") / "checkpoint", small_model())


def words(checkpoint: Path, questions: Path, out: Path, *options: str) -> list[str]:
    places = ["--checkpoint", str(checkpoint), "--questions", str(questions), "--out", str(out)]
    sizes = ["--num-samples", "2", "--max-new-tokens", "24", "--batch-size", "8"]
    return ["sample", *places, *sizes, "--temperature", "1", "--top-p", "1", *options]


def completions(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return read_completions(out / "completions.jsonl")


@pytest.fixture(scope="module")
def sampled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with q.jsonl, five questions, and out, the answers to them."""
    folder = tmp_path_factory.mktemp("sampled")
    main(words(checkpoint, write(folder / "q.jsonl", 5), folder / "out"))
    return folder


def test_the_blocks_size_does_not_change_what_is_drawn(checkpoint: Path, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", 9)
    drawn = []
    for size in (1, 4, 64):
        out = tmp_path / str(size)
        main(words(checkpoint, questions, out, "--batch-questions", str(size)))
        drawn.append(completions(out)[1])
        assert len(list(out.glob("blocks-0-of-1/block-*.jsonl"))) == -(-9 // size)
    assert drawn[0] == drawn[1] == drawn[2]
    assert [(row["id"], row["sample"]) for row in drawn[0]] == [
        (f"q{i}", k) for i in range(9) for k in range(2)
    ]
    assert len({row["text"] for row in drawn[0]}) == 18


def test_a_question_draws_the_same_whatever_else_is_asked(checkpoint: Path, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", 9)
    main(words(checkpoint, questions, tmp_path / "all"))
    main(words(checkpoint, questions, tmp_path / "some", "--num-questions", "3"))
    some = completions(tmp_path / "some")[1]
    assert len(some) == 6
    assert [row for row in completions(tmp_path / "all")[1] if row in some] == some


def test_the_header_tells_how_it_was_sampled(checkpoint: Path, tmp_path: Path) -> None:
    main(words(checkpoint, write(tmp_path / "q.jsonl", 2), tmp_path / "out", "--seed", "7"))
    meta, _ = completions(tmp_path / "out")
    assert (meta["engine"], meta["seed"], meta["num_samples"], meta["shards"]) == ("jax", 7, 2, 1)
    assert (meta["temperature"], meta["top_p"], meta["max_new_tokens"]) == (1.0, 1.0, 24)
    assert (meta["dtype"], meta["skipped"]) == ("float32", {})
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["model_sha256"] == sha256_folder(checkpoint / "checkpoints")
    assert meta["hardware"] == [{"devices": [device.device_kind for device in jax.devices()]}]


def test_bad_questions_are_recorded_and_a_block_of_them_alone_too(
    checkpoint: Path, tmp_path: Path
) -> None:
    questions = write(tmp_path / "q.jsonl", 4, q1=" \n", q2="far too long " * 40)
    main(words(checkpoint, questions, tmp_path / "out", "--batch-questions", "1"))
    meta, rows = completions(tmp_path / "out")
    assert [row["id"] for row in rows] == ["q0", "q0", "q3", "q3"]
    assert "the prompt is empty" in meta["skipped"]["q1"]
    assert f"exceed the context of {CONTEXT}" in meta["skipped"]["q2"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--temperature", "0.5"], "temperature: 1.0 -> 0.5"),
        (["--num-samples", "3"], "num_samples: 2 -> 3"),
        (["--batch-questions", "3"], "batch_questions: 64 -> 3"),
        (["--num-questions", "4"], "prompts_sha256: "),
    ],
)
def test_another_sampling_in_the_same_folder_is_refused(
    checkpoint: Path, sampled: Path, options: list[str], told: str
) -> None:
    questions, out = sampled / "q.jsonl", sampled / "out"
    before = (out / "completions.jsonl").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(words(checkpoint, questions, out, *options))
    assert str(caught.value.code).startswith("memphis sample: ") and told in str(caught.value.code)
    assert len(str(caught.value.code).splitlines()) == 1
    assert (out / "completions.jsonl").read_bytes() == before


def test_answers_to_other_prompts_or_of_other_weights_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    questions, out = write(tmp_path / "q.jsonl", 3), tmp_path / "out"
    main(words(checkpoint, questions, out))
    other = save_checkpoint(tmp_path / "other", small_model(seed=1))
    with pytest.raises(SystemExit, match="model_sha256: "):
        main(words(other, questions, out))
    write(questions, 3, q1="How many pears?")
    with pytest.raises(SystemExit, match="prompts_sha256: "):
        main(words(checkpoint, questions, out))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--num-samples 0", "--num-samples 0 must be 1 or more"),
        ("--batch-size 0", "--batch-size 0 must be 1 or more"),
        ("--batch-questions 0", "--batch-questions 0 must be 1 or more"),
        ("--temperature -1", "--temperature -1.0 must be >= 0"),
        ("--top-p 0", "--top-p 0.0 in 0..1"),
        ("--temperature nan", "--temperature nan must be >= 0"),
        ("--temperature inf", "--temperature inf must be >= 0"),
        ("--seed -1", "--seed -1 must be from 0 to 2^63 - 1"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808 must be from 0"),
        ("--num-questions -5", "--num-questions -5 is under 0"),
    ],
)
def test_an_impossible_option_is_refused(
    options: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words(Path("c"), Path("q"), Path("o"), *options.split()))
    assert told in capsys.readouterr().err


def test_weights_that_give_no_number_answer_nothing(tmp_path: Path) -> None:
    """argmax of NaN is token 0, often EOS: every answer would be empty."""
    broken = jax.tree.map(lambda leaf: leaf.at[..., -1].set(jnp.nan), small_model())
    folder, questions = save_checkpoint(tmp_path / "nan", broken), write(tmp_path / "q.jsonl", 2)
    for temperature in ("0", "1"):
        with pytest.raises(SystemExit, match="logits are not finite: its weights hold NaN"):
            main(words(folder, questions, tmp_path / "out", "--temperature", temperature))
    assert not list(tmp_path.glob("out/**/*.jsonl"))


def says(folder: Path, prompt: str, text: str, end: str) -> tuple[Path, list[int]]:
    """A checkpoint that answers `prompt` with `text`, then EOS or the last token for ever."""
    tokenizer, eos = save_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    path = [encode_prompt(tokenizer, prompt)[-1], *tokens]
    assert len(set(path)) == len(path), "one token decides the next: choose another text"
    path.append(eos if end == "eos" else path[-1])
    return save_checkpoint(folder, chain_model(dict(pairwise(path)))), tokens


@pytest.mark.parametrize(
    ("text", "end", "limit", "expected", "counted", "reason"),
    [
        ("so 12.", "eos", 24, "so 12.", "so 12.", "stop"),
        ("so 12.", "eos", 3, "so 12.", "so 12.", "length"),  # EOS would be the fourth
        ("so 12.", "eos", 2, "so 12", "so 12", "length"),
        (f"so 12.{STOP}hi", "repeat", 24, "so 12.", f"so 12.{STOP}", "stop"),
        (f"so 12.{STOP}", "eos", 24, "so 12.", f"so 12.{STOP}", "stop"),
        (f"so 12.{STOP}", "repeat", 4, "so 12.", f"so 12.{STOP}", "stop"),
        (f"so 12.{STOP}", "repeat", 3, "so 12.\n", "so 12.\n", "length"),
        (f".{STOP}hi", "repeat", 24, ".", f".{STOP}", "stop"),
    ],
)
def test_what_ends_an_answer_and_how_its_tokens_count(
    tmp_path: Path, text: str, end: str, limit: int, expected: str, counted: str, reason: str
) -> None:
    checkpoint, tokens = says(tmp_path / "checkpoint", "Tom has 0 apples and  pears.", text, end)
    tokenizer, _ = save_tokenizer(tmp_path / "same")
    lengths = [n for n in range(len(tokens) + 1) if tokenizer.decode(tokens[:n]) == counted]
    assert len(lengths) == 1, f"{counted!r} does not end with a token of {text!r}"
    questions = write(tmp_path / "q.jsonl", 1)
    limits = ["--temperature", "0", "--max-new-tokens", str(limit), "--num-samples", "1"]
    main(words(checkpoint, questions, tmp_path / "out", *limits))
    _, (row,) = completions(tmp_path / "out")
    assert (row["text"], row["finish_reason"]) == (expected, reason)
    assert row["num_tokens"] == lengths[0]


def test_killed_damaged_and_carried_on_is_the_undisturbed_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, out = write(tmp_path / "q.jsonl", 400), tmp_path / "out"
    options = ["--batch-questions", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "memphis_jax", *words(checkpoint, questions, out, *options)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(there := sorted(out.glob("blocks-0-of-1/block-*.jsonl"))) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "completions.jsonl").exists()
    there = sorted(out.glob("blocks-0-of-1/block-*.jsonl"))
    assert 4 <= len(there) < 200

    damaged, *kept = there
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(b'"sample": 1', b'"sample": 7'))
    times = {path: path.stat().st_mtime_ns for path in kept}
    main(words(checkpoint, questions, out, *options))
    told = capsys.readouterr()
    assert told.out == f"{damaged} is cut off or altered: sampling it again\n"
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    main(words(checkpoint, questions, tmp_path / "undisturbed", *options))
    (meta, rows), (whole, expected) = completions(out), completions(tmp_path / "undisturbed")
    assert rows == expected and len(rows) == 800
    assert {**meta, "hardware": 0} == {**whole, "hardware": 0}
    before = (out / "completions.jsonl").read_bytes()
    main(words(checkpoint, questions, out, *options))  # nothing is left to do
    assert (out / "completions.jsonl").read_bytes() == before
