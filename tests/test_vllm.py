"""vLLM for real, on the CPU, in .venv-vllm: the two engines agree, and nothing is lost or doubled.

One group: the trained model is made once, and vLLM gets one of the test machine's two workers.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gpu_host import running_server
from helpers import tiny_model

from convert.to_hf import to_hf
from memphis_jax import checkpoint
from memphis_jax.rounds.files import read_completions, read_jsonl

pytest_plugins = ["gpu_fixtures"]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm")]

REPO = Path(__file__).parents[1]
PYTHON = REPO / ".venv-vllm" / "bin" / "python"
MEMPHIS = [sys.executable, "-m", "memphis_jax"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
# vLLM's attention on a CPU takes head_dim 32 and up.
SHAPE: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.25},
    **{"max_position_embeddings": 256, "use_qkv_bias": False, "qk_layernorm": False},
}


class Model(NamedTuple):
    checkpoint: Path
    hf: Path
    data: Path  # the folder of `memphis data`


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    if not PYTHON.is_file():
        told = f"{PYTHON} is missing: `make vllm` builds it"
        pytest.fail(told) if os.environ.get("MEMPHIS_CI") else pytest.skip(told)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo's model after a short SFT: right sometimes, wrong often."""
    folder = tmp_path_factory.mktemp("trained")
    config = ["--config", str(REPO / "configs" / "tiny.py"), "--config.data.num_train=6000"]
    config += ["--config.sft.epochs=3", "--config.data.num_test=500"]
    model = Model(folder / "sft", folder / "hf", folder / "data")
    run_ok([*MEMPHIS, "data", *config, "--out", str(model.data)])
    arguments = ["--workdir", str(model.checkpoint), "--tokenizer", str(model.data / "tokenizer")]
    arguments += ["--data", str(model.data / "train.jsonl")]
    run_ok([*MEMPHIS, "train", *config, "--phase", "sft", *arguments])
    to_hf(model.checkpoint, model.hf)
    return model


@pytest.fixture(scope="module")
def untrained(trained: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("untrained"), trained)


def random_model(folder: Path, like: Model, **options: Any) -> Model:
    """A random model with the tokenizer of another one."""
    model = tiny_model(**{**SHAPE, **options})
    with checkpoint.open_manager(folder / "checkpoint", keep=1) as manager:
        checkpoint.save(manager, 0, model, {})
        manager.wait_until_finished()
    checkpoint.copy_tokenizer(like.data / "tokenizer", folder / "checkpoint")
    to_hf(folder / "checkpoint", folder / "hf")
    return Model(folder / "checkpoint", folder / "hf", like.data)


def run_ok(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def command(model: Model, out: Path, *options: str, questions: str = "test") -> list[str]:
    words = ["--model", str(model.hf), "--questions", str(model.data / f"{questions}.jsonl")]
    words += ["--out", str(out), "--max-new-tokens", "48", "--dtype", "float32"]
    return [str(PYTHON), "-m", "memphis_jax.rounds.generate", *words, *options]


def start(words: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **variables},
        cwd=REPO,
    )


def fails(words: list[str]) -> str:
    """The last line of a run that must fail with code 1."""
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def parity(model: Model, out: Path, *options: str) -> dict[str, Any]:
    words = ["--checkpoint", str(model.checkpoint), "--completions", str(out / "completions.jsonl")]
    words += ["--questions", str(model.data / "test.jsonl"), "--out", str(out / "parity.json")]
    run_ok([*MEMPHIS, "parity", *words, *options])
    return json.loads((out / "parity.json").read_text())


def rows_of(out: Path) -> list[tuple[str, int]]:
    return [(row["id"], row["sample"]) for row in read_completions(out / "completions.jsonl")[1]]


def sample_with_jax(model: Model, out: Path, *options: str) -> list[dict[str, Any]]:
    words = ["--checkpoint", str(model.checkpoint), "--questions", str(model.data / "test.jsonl")]
    words += ["--out", str(out), "--max-new-tokens", "48", "--batch-size", "128"]
    run_ok([*MEMPHIS, "sample", *words, *options])
    return read_completions(out / "completions.jsonl")[1]


def test_greedy_answers_and_logprobs_of_both_engines(trained: Model, tmp_path: Path) -> None:
    options = ["--temperature", "0", "--num-samples", "1", "--num-questions", "32"]
    run_ok(command(trained, tmp_path / "vllm", *options, "--rescore", "32"))
    theirs = read_completions(tmp_path / "vllm" / "completions.jsonl")[1]
    ours = sample_with_jax(trained, tmp_path / "jax", *options)
    keys = ("id", "sample", "text", "finish_reason", "num_tokens")
    assert [[r[k] for k in keys] for r in theirs] == [[r[k] for k in keys] for r in ours]
    assert len(theirs) == 32 and sum(row["finish_reason"] == "stop" for row in theirs) > 20
    found = parity(trained, tmp_path / "vllm")
    assert found["max_abs_difference"] < 1e-3
    assert found["identical"] == found["completions"] == 32
    assert found["tokens"] > 32 * 10


def test_sampled_accuracy_of_both_engines(trained: Model, tmp_path: Path) -> None:
    """500 questions x 8 at temperature 1; the standard error is that of the questions' means."""
    options = ["--temperature", "1", "--top-p", "1"]
    run_ok(command(trained, tmp_path / "vllm", *options))
    sample_with_jax(trained, tmp_path / "jax", *options)
    means, errors = [], []
    for engine in ("vllm", "jax"):
        graded = tmp_path / engine / "graded.jsonl"
        words = ["--completions", str(tmp_path / engine / "completions.jsonl")]
        words += ["--questions", str(trained.data / "test.jsonl"), "--out", str(graded)]
        run_ok([*MEMPHIS, "grade", *words])
        right: dict[str, list[bool]] = {}
        for row in read_completions(graded)[1]:
            right.setdefault(row["id"], []).append(row["verdict"] == "correct")
        assert len(right) == 500 and {len(values) for values in right.values()} == {8}
        per_question = np.array([np.mean(values) for values in right.values()])
        means.append(per_question.mean())
        errors.append(per_question.std() / np.sqrt(len(per_question)))
    print(f"accuracy: vLLM {means[0]:.4f}, JAX {means[1]:.4f}, standard errors {errors}")
    assert abs(means[0] - means[1]) < 3 * np.hypot(*errors)
    assert means[1] > 0.02  # else there is nothing to compare
    found = parity(trained, tmp_path / "vllm")
    assert found["completions"] == 64 and found["max_abs_difference"] < 1e-3


def test_killed_at_random_moments(trained: Model, tmp_path: Path) -> None:
    """kill -9 five times: each (id, sample) is there once, and a damaged block is done again."""
    moments = random.Random(3)
    words = command(trained, tmp_path, "--temperature", "1", "--batch-questions", "4")
    words += ["--num-questions", "240"]
    blocks = tmp_path / "blocks-0-of-1"
    seen = 0
    for kill in range(5):
        process = start(words)
        # Twice while loading or before the first new block, else after some blocks.
        wanted = seen if kill in (0, 3) else seen + moments.randint(1, 8)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(blocks.glob("block-*.jsonl"))) >= wanted:
                break
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 6) if kill in (0, 3) else moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it ended before it was killed: sample more"
        done = len(list(blocks.glob("block-*.jsonl")))
        assert done >= seen, "a finished block is gone"
        seen = done
    assert 0 < seen < 60
    last = sorted(blocks.glob("block-*.jsonl"))[-1]
    last.write_bytes(last.read_bytes()[:-200])
    output = run_ok(words)
    assert f"{last} is cut off or altered: sampling it again" in output
    assert f"{seen - 1} of 60 blocks are there already" in output
    ids = [row["id"] for row in read_jsonl(trained.data / "test.jsonl")]
    found = rows_of(tmp_path)
    assert set(Counter(found).values()) == {1} and len(found) == 240 * 8
    order = {name: at for at, name in enumerate(ids)}
    assert found == sorted(found, key=lambda row: (order[row[0]], row[1]))
    before = (tmp_path / "completions.jsonl").read_bytes()
    run_ok(words)  # a further start has nothing to do
    assert (tmp_path / "completions.jsonl").read_bytes() == before


def test_shards_merge_to_the_unsharded_run(
    trained: Model, untrained: Model, tmp_path: Path
) -> None:
    options = ["--num-questions", "41", "--num-samples", "2", "--temperature", "1"]
    both = [
        start(
            command(trained, tmp_path, *options, "--shard", f"{i}/2"),
            VLLM_CPU_OMP_THREADS_BIND=core,
        )
        for i, core in enumerate(map(str, sorted(os.sched_getaffinity(0))[:2]))
    ]
    for process in both:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert not (tmp_path / "completions.jsonl").exists()
    run_ok(command(trained, tmp_path, *options, "--gather", "2"))
    run_ok(command(trained, tmp_path / "whole", *options))
    merged, whole = (
        read_completions(path / "completions.jsonl")[1] for path in (tmp_path, tmp_path / "whole")
    )
    assert rows_of(tmp_path) == rows_of(tmp_path / "whole") and len(merged) == 41 * 2
    # The same seeds: only a near-tie in another batch could make a difference.
    same = sum(a["text"] == b["text"] for a, b in zip(merged, whole, strict=True))
    assert same >= 80

    foreign = tmp_path / "foreign"
    run_ok(command(untrained, foreign, *options, "--shard", "1/2"))
    shutil.copytree(tmp_path / "blocks-0-of-2", foreign / "blocks-0-of-2")
    told = fails(command(trained, foreign, *options, "--gather", "2"))
    assert "was sampled otherwise" in told and "model: " in told
    assert not (foreign / "completions.jsonl").exists()


def test_one_failing_shard_is_named_and_stops_no_other(trained: Model, tmp_path: Path) -> None:
    options = ["--num-questions", "16", "--num-samples", "1", "--data-parallel", "2"]
    (tmp_path / "blocks-1-of-2").write_text("in the way")
    told = fails(command(trained, tmp_path, *options))
    assert told.startswith("generate: 1 of 2 shards failed: shard 1 (exit code 1: ")
    assert "blocks-1-of-2" in told
    assert len(list((tmp_path / "blocks-0-of-2").glob("block-*.jsonl"))) == 1
    (tmp_path / "blocks-1-of-2").unlink()
    run_ok(command(trained, tmp_path, *options))
    assert len(rows_of(tmp_path)) == 16


@pytest.mark.parametrize("option", ["qk_layernorm", "use_parallel_residual"])
def test_members_that_vllm_does_not_know(option: str, trained: Model, tmp_path: Path) -> None:
    """They go through vLLM's transformers backend, and come out right."""
    model = random_model(tmp_path, trained, **{option: True})
    out = tmp_path / "out"
    options = ["--num-questions", "8", "--num-samples", "1", "--temperature", "0"]
    run_ok(command(model, out, *options, "--rescore", "8"))
    meta, _ = read_completions(out / "completions.jsonl")
    assert meta["model_impl"] == "transformers"
    found = parity(model, out)
    assert found["identical"] == 8 and found["max_abs_difference"] < 1e-3


def test_the_gate_sees_another_model(trained: Model, tmp_path: Path) -> None:
    """A folder whose config has another rotary base samples without a complaint."""
    model = random_model(tmp_path, trained)
    config = json.loads((model.hf / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0
    (model.hf / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    options = ["--num-questions", "8", "--num-samples", "1", "--temperature", "1"]
    assert "config.json is not what was certified" in fails(command(model, out, *options))
    run_ok(command(model, out, *options, "--uncertified"))
    assert read_completions(out / "completions.jsonl")[0]["certified"] is False
    words = ["--checkpoint", str(model.checkpoint), "--completions", str(out / "completions.jsonl")]
    words += ["--questions", str(model.data / "test.jsonl"), "--out", str(out / "parity.json")]
    told = fails([*MEMPHIS, "parity", *words])
    assert "trainer and sampler are not the same model" in told and "worst: test-" in told


def test_bfloat16_is_within_its_bound(trained: Model, tmp_path: Path) -> None:
    run_ok(command(trained, tmp_path, "--dtype", "bfloat16", "--num-questions", "32"))
    found = parity(trained, tmp_path)  # the gate takes the sampler's dtype
    assert found["dtype"] == "bfloat16"
    assert 1e-4 < found["mean_abs_difference"] < found["bound"] == 0.05
    greedy = ["--dtype", "bfloat16", "--num-questions", "32", "--temperature", "0"]
    run_ok(command(trained, tmp_path / "greedy", *greedy, "--num-samples", "1", "--rescore", "32"))
    assert parity(trained, tmp_path / "greedy")["share_apart"] < 0.01


def test_a_full_disk_publishes_nothing_half(trained: Model, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        told = "needs the right to mount a tmpfs"
        pytest.fail(told) if os.environ.get("MEMPHIS_CI") else pytest.skip(told)
    try:
        out = small / "out"
        told = fails(command(trained, out, "--batch-questions", "8"))
        assert told.startswith("generate: ") and "No space left on device" in told
        files = [path for path in out.rglob("*") if path.is_file()]
        assert files and all(path.match("block-*.jsonl") for path in files)
        for path in files:
            *_, end = read_jsonl(path)
            assert end["end"]["rows"] == 8 * 8
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_unreadable_model(trained: Model, tmp_path: Path) -> None:
    broken = tmp_path / "hf"
    shutil.copytree(trained.hf, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    words = command(trained._replace(hf=broken), tmp_path / "out")
    assert "model.safetensors is not what was certified" in fails(words)
    told = fails([*words, "--uncertified"])
    assert told.startswith(f"generate: vLLM cannot load {broken}: ")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.usefixtures("tools")
def test_on_a_host_behind_ssh_with_a_cut(trained: Model, tmp_path: Path) -> None:
    """launch/gpu_generate.sh, a real sshd and the real worker; the connection is cut once."""
    out = tmp_path / "out"
    words = command(trained, out, "--num-questions", "120", "--batch-questions", "4")
    host = [f"127.0.0.1:{tmp_path / 'host'}", "--python", str(PYTHON), "--fetch-every", "1"]
    script = str(REPO / "launch" / "gpu_generate.sh")
    (tmp_path / "sshd").mkdir()
    with running_server(tmp_path / "sshd", os.environ["PATH"]) as server:
        process = start([script, *host, *server.options(), "--", *words])
        deadline = time.monotonic() + 300
        while not list(out.glob("blocks-0-of-1/block-*.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not (out / "completions.jsonl").exists(), "over before the cut: sample more"
        assert server.cut()
        output, _ = process.communicate()
        assert process.returncode == 0, output
    found = rows_of(out)
    assert len(set(found)) == len(found) == 120 * 8
    assert read_completions(out / "completions.jsonl")[0]["engine"] == "vllm"


def test_the_recipe_through_vllm(tmp_path: Path) -> None:
    """One round from SFT to report, with both parity gates."""
    words = [*MEMPHIS, "rounds", "--config", str(REPO / "configs" / "tiny.py")]
    words += ["--workdir", str(tmp_path / "run"), "--config.generate.engine=vllm"]
    words += [
        "--config.data.num_train=1200",
        "--config.sft.epochs=3",
        "--config.model.num_hidden_layers=2",
    ]
    words += ["--config.data.num_validation=12", "--config.data.num_test=12"]
    words += ["--config.generate.questions_per_round=40", "--config.rounds.num_rounds=1"]
    words += ["--config.rounds.eval_samples=1", f"--config.generate.python={PYTHON}"]
    output = run_ok(words)
    assert (tmp_path / "run" / "report.html").is_file()
    for name in ("start-parity", "round1-parity"):
        found = json.loads((tmp_path / "run" / "parity" / f"{name}.json").read_text())
        assert found["mean_abs_difference"] < 1e-4 and found["engine"] == "vllm"
        assert f"[{name}]" in output
    meta, rows = read_completions(tmp_path / "run" / "round1" / "generate" / "completions.jsonl")
    assert len(rows) == 40 * 8 and meta["certified"] is True
    again = run_ok(words)
    assert again.count("    done before\n") == f"\n{output}".count("\n[")
