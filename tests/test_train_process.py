"""`python -m memphis_jax train` as a process: killed with SIGKILL, started again, refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_bits, logged, named_leaves

from memphis_jax import checkpoint
from memphis_jax.config import OptimizerConfig, PhaseConfig
from memphis_jax.data import procedural
from memphis_jax.data.prompts import cot_completion
from memphis_jax.train_step import init_state

REPO = Path(__file__).resolve().parents[1]
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    optimizer = dict(learning_rate=1e-3, warmup_ratio=0.1, momentum=0.5)
    phase = dict(batch_size=8, seq_len=96, neftune_alpha=5.0, log_every=10, optimizer=optimizer)
    return ConfigDict(dict(
        model=dict(
            vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        ),
        data=dict(num_train=200, num_validation=1, num_test=1, vocab_size=512),
        compute=dict(remat="none"),
        sft=dict(phase, epochs=12, checkpoint_every=25, mixce_eta=0.75),
        rank=dict(
            phase, epochs=1, rank_weight=5.0, keep_optimizer_state=True,
            optimizer=dict(optimizer, learning_rate=1e-6),
        ),
    ))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer, config, and one uninterrupted run in `whole`."""
    root = tmp_path_factory.mktemp("world")
    procedural.write(root / "data", procedural.generate(200, 1, 1, seed=0), 512)
    (root / "config.py").write_text(CONFIG)
    done = train(root, "whole")
    assert done.returncode == 0, done.stderr
    return root


def command(root: Path, workdir: str, *more: str, phase: str = "sft") -> list[str]:
    data = root / ("pairs.jsonl" if phase == "rank" else "data/train.jsonl")
    words = ["train", "--config", root / "config.py", "--phase", phase, "--data", data]
    if "--init" not in more:
        words += ["--tokenizer", root / "data" / "tokenizer"]
    words += ["--workdir", root / workdir, *more]
    return [sys.executable, "-m", "memphis_jax", *map(str, words)]


def environment(root: Path) -> Mapping[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(root / "xla")}


def train(root: Path, workdir: str, *more: str, phase: str = "sft") -> Any:
    return subprocess.run(
        command(root, workdir, *more, phase=phase),
        cwd=REPO,
        env=environment(root),
        capture_output=True,
        text=True,
    )


def kill_after_first_checkpoint(root: Path, workdir: str, delay: float) -> None:
    """Starts a run and kills it `delay` seconds after a new checkpoint is complete."""
    folder = root / workdir / "checkpoints"

    def complete() -> set[str]:
        found = folder.iterdir() if folder.is_dir() else ()
        return {path.name for path in found if path.name.isdigit()}

    before = complete()
    process = subprocess.Popen(
        command(root, workdir), cwd=REPO, env=environment(root), stderr=subprocess.DEVNULL
    )
    while not complete() - before:
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"


def saved_state(folder: Path) -> Any:
    """The newest weights and train state, as arrays by name."""
    model, _ = checkpoint.restore_model(folder)
    optimizer = OptimizerConfig(momentum=0.5)
    settings = PhaseConfig(epochs=1, batch_size=1, seq_len=1, optimizer=optimizer)
    like = init_state(model, settings, 0).without_model()
    return {"model": model, "train": checkpoint.restore_train(folder, like)}


def test_killed_and_started_again_is_uninterrupted_to_the_bit(world: Path) -> None:
    delays = random.Random(0)
    for _ in range(2):
        kill_after_first_checkpoint(world, "killed", delays.uniform(0, 0.2))
    total = checkpoint.latest_step(world / "whole")
    assert checkpoint.latest_step(world / "killed") < total
    done = train(world, "killed")
    assert done.returncode == 0, done.stderr
    assert checkpoint.latest_step(world / "killed") == total
    assert_same_bits(saved_state(world / "killed"), saved_state(world / "whole"))
    assert logged(world / "killed") == logged(world / "whole")
    steps = [row["step"] for row in logged(world / "killed")]
    assert steps == [*range(10, total, 10), total]
    assert (world / "killed" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_what_is_done_and_the_command_goes_on(
    world: Path, number: signal.Signals, code: int
) -> None:
    name = f"stopped-{code}"
    process = subprocess.Popen(
        command(world, name), cwd=REPO, env=environment(world), stderr=subprocess.PIPE, text=True
    )
    while not (world / name / "metrics.jsonl").is_file() or not logged(world / name):
        assert process.poll() is None, "the run ended before its first metrics"
        time.sleep(0.005)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code
    step = checkpoint.latest_step(world / name)
    assert step < checkpoint.latest_step(world / "whole")
    assert f"sft: stopped; step {step} of" in told and "Traceback" not in told
    assert (world / name / "tokenizer" / "tokenizer.json").is_file()  # it can be exported
    done = train(world, name)
    assert done.returncode == 0, done.stderr
    assert_same_bits(saved_state(world / name), saved_state(world / "whole"))


@pytest.mark.parametrize("end", [False, True])  # True: the run ends before the trace would
def test_a_profile_is_traced_and_changes_nothing(world: Path, end: bool) -> None:
    """As a process: JAX's profiler crashes where a TPU's compiler was loaded without a TPU."""
    name, first = f"traced-{end}", checkpoint.latest_step(world / "whole") if end else 2
    done = train(world, name, f"--config.compute.profile_step={first}")
    assert done.returncode == 0, done.stderr
    assert list((world / name / "profile").rglob("*.xplane.pb"))
    assert not (world / "whole" / "profile").exists()
    assert_same_bits(saved_state(world / name), saved_state(world / "whole"))


def test_a_finished_run_started_again_does_nothing(world: Path) -> None:
    folder = world / "whole"

    def contents() -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        kept = [path for path in files if "tensorboard" not in path.parts]
        return {str(path): path.read_bytes() for path in kept}

    before = contents()
    done = train(world, "whole")
    assert done.returncode == 0, done.stderr
    assert contents() == before


@pytest.mark.parametrize(
    "changes",
    [
        {
            "--config.sft.mixce_eta=0.5": "settings.mixce_eta: 0.75 -> 0.5",
            "--config.sft.optimizer.eps=0.1": "settings.optimizer.eps: 1e-05 -> 0.1",
            "--config.seed=1": "seed: 0 -> 1",
        },
        {"--config.model.rope_theta=500": "rope_theta: 10000.0 -> 500"},
    ],
    ids=["settings", "model"],
)
def test_a_changed_config_is_refused(world: Path, changes: dict[str, str]) -> None:
    done = train(world, "whole", *changes)
    assert done.returncode == 1
    assert "another config" in done.stderr
    assert "Traceback" not in done.stderr
    for line in changes.values():
        assert line in done.stderr


def test_what_changes_no_result_may_change(world: Path) -> None:
    done = train(world, "whole", "--config.sft.log_every=5", "--config.sft.keep_checkpoints=1")
    assert done.returncode == 0, done.stderr


def test_weights_that_would_not_be_read_are_refused(world: Path) -> None:
    done = train(world, "started", "--config.start.hf_folder=/no/such/folder")
    assert done.returncode == 1
    assert "'/no/such/folder' without --init: convert it" in done.stderr
    assert not (world / "started").exists()


def test_a_buckets_address_is_no_folder(world: Path) -> None:
    done = subprocess.run(
        [*command(world, "unused"), "--workdir", "gs://bucket/run"],
        capture_output=True, text=True, cwd=world, env=environment(world),
    )  # fmt: skip
    assert done.returncode == 1
    assert "mount the bucket and give the path there" in done.stderr
    assert not (world / "gs:").exists()


def test_another_eos_than_the_models_is_refused(world: Path) -> None:
    done = train(world, "eos", "--config.model.eos_token_id=7")
    assert done.returncode == 1
    assert "set --config.model.eos_token_id=0" in done.stderr


def test_another_tokenizer_is_refused(world: Path) -> None:
    """The same rows would be other tokens."""
    procedural.write(world / "other", procedural.generate(200, 1, 1, seed=9), 450)
    shutil.copytree(world / "whole", world / "copy")
    done = train(world, "copy", "--tokenizer", str(world / "other" / "tokenizer"))
    assert done.returncode == 1
    assert "another config" in done.stderr


def test_ranking_starts_from_weights_and_statistics_of_sft(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "data" / "train.jsonl").open()]
    pairs = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "chosen": cot_completion(row["rationale"], row["target"]),
            "rejected": cot_completion("No idea.", "7" + row["target"]),
            "gold": cot_completion(row["rationale"], row["target"]),
        }
        for row in rows[:32]
    ]
    (world / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    init = str(world / "whole")
    done = train(world, "rank", "--init", init, phase="rank")
    assert done.returncode == 0, done.stderr
    sft, rank = saved_state(world / "whole"), saved_state(world / "rank")
    steps = [int(named_leaves(state)["train/step"]) for state in (sft, rank)]
    assert steps[1] == 4

    def count(state: Any) -> int:
        (name,) = (name for name in named_leaves(state) if name.endswith("/count"))
        return int(named_leaves(state)[name])

    assert count(sft) == steps[0]
    assert count(rank) == steps[0] + 4  # the statistics go on
    before, after = named_leaves(sft["model"]), named_leaves(rank["model"])
    for name in ("embed_tokens", "lm_head/kernel"):
        np.testing.assert_array_equal(after[name], before[name])
    distance = np.abs(after["norm/scale"] - before["norm/scale"]).max()
    assert 0 < distance < 0.1

    long = {**pairs[0], "prompt": "word " * 200}
    (world / "pairs.jsonl").write_text(json.dumps(long) + "\n")
    done = train(world, "no rank", "--init", init, phase="rank")
    told = "0 of 1 rows; dropped 1: longer than seq_len = 96 tokens; there is nothing to train on\n"
    assert done.returncode == 1 and done.stderr.endswith(told)
