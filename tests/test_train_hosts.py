"""`memphis train` as several real processes: one killed, all stop; what is saved carries on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_bits, logged, named_leaves

from memphis_jax import checkpoint
from memphis_jax.data import procedural

REPO = Path(__file__).resolve().parents[1]
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    optimizer = dict(learning_rate=1e-3, warmup_ratio=0.1, momentum=0.5)
    phase = dict(batch_size=8, seq_len=96, neftune_alpha=5.0, log_every=1, optimizer=optimizer)
    return ConfigDict(dict(
        model=dict(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        ),
        data=dict(num_train=200, num_validation=1, num_test=1, vocab_size=512),
        compute=dict(remat="none"),
        sft=dict(phase, epochs=2, checkpoint_every=4, mixce_eta=0.75),
        rank=dict(phase, epochs=1),
    ))
"""
STEPS = 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer, config, and an undisturbed run of four processes in `whole`."""
    root = tmp_path_factory.mktemp("world")
    procedural.write(root / "data", procedural.generate(200, 1, 1, seed=0), 512)
    (root / "config.py").write_text(CONFIG)
    assert end(start(root, "whole", 4)) == [0] * 4, said(root, "whole")
    return root


def start(root: Path, workdir: str, processes: int) -> list[subprocess.Popen[bytes]]:
    """The same command on every "host", its output in WORKDIR.PROCESS.log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "MEMPHIS_BARRIER_SECONDS": "120",
        "MEMPHIS_HEARTBEAT_SECONDS": "60",
        "JAX_COMPILATION_CACHE_DIR": str(root / "xla"),
    }
    started = []
    for process in range(processes):
        with (root / f"{workdir}.{process}.log").open("ab") as log:
            started.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "memphis_jax", "train", "--phase", "sft"),
                        *("--config", root / "config.py", "--workdir", root / workdir),
                        *("--data", root / "data/train.jsonl"),
                        *("--tokenizer", root / "data/tokenizer"),
                    ],
                    cwd=REPO,
                    env=env | {"JAX_PROCESS_ID": str(process)},
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def end(started: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(300) for process in started]


def said(root: Path, workdir: str) -> list[str]:
    return [path.read_text() for path in sorted(root.glob(f"{workdir}.*.log"))]


def step_of(root: Path, workdir: str) -> int:
    """The newest step that process 0 has logged."""
    path = root / workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(root: Path, workdir: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while step_of(root, workdir) < step:
        assert time.monotonic() < deadline, said(root, workdir)
        time.sleep(0.02)


def child_of(guard: subprocess.Popen[bytes]) -> int:
    """The process that trains."""
    return int(Path(f"/proc/{guard.pid}/task/{guard.pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def cut(world: Path) -> Path:
    """A run of four processes of which one was killed in the middle; every one has stopped."""
    started = start(world, "cut", 4)
    wait_for_step(world, "cut", 10)
    killed = time.monotonic()
    os.kill(child_of(started[2]), signal.SIGKILL)
    assert end(started) == [76] * 4
    assert time.monotonic() - killed < 60 + 10  # MEMPHIS_HEARTBEAT_SECONDS, the limit
    assert checkpoint.latest_step(world / "cut") in (8, 12)
    return world / "cut"


def test_all_stop_where_one_is_killed_and_name_it(world: Path, cut: Path) -> None:
    for text in said(world, "cut"):
        told = [line for line in text.splitlines() if line.startswith("memphis: ")]
        assert len(told) == 1
        assert re.search(
            r"process 2 of 4 \(.+\) was killed by signal 9: all processes stop", told[0]
        )


def test_the_same_four_go_on_to_the_bit(world: Path, cut: Path) -> None:
    shutil.copytree(cut, world / "again")
    assert end(start(world, "again", 4)) == [0] * 4, said(world, "again")
    assert logged(world / "again") == logged(world / "whole")
    found, _ = checkpoint.restore_model(world / "again")
    assert_same_bits(found, checkpoint.restore_model(world / "whole")[0])


def test_two_go_on_with_the_very_next_sample(world: Path, cut: Path) -> None:
    """Same batches, so the same losses up to the order of additions."""
    shutil.copytree(cut, world / "two")
    assert end(start(world, "two", 2)) == [0] * 2, said(world, "two")
    two, whole = logged(world / "two"), logged(world / "whole")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for found, wanted in zip(two, whole, strict=True):
        assert found["padding_share"] == wanted["padding_share"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    model, expected = (checkpoint.restore_model(world / name)[0] for name in ("two", "whole"))
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_allclose(named_leaves(model)[name], leaf, atol=2e-4 * np.abs(leaf).max())


def test_sigterm_to_one_saves_on_all(world: Path) -> None:
    started = start(world, "term", 2)
    wait_for_step(world, "term", 6)
    started[1].terminate()
    assert end(started) == [75] * 2
    saved = checkpoint.latest_step(world / "term")
    for text in said(world, "term"):
        assert f"sft: stopped; step {saved} of {STEPS} is saved in" in text
    assert saved % 4 or saved == step_of(world, "term")  # at that step, not at the next fourth
    assert end(start(world, "term", 2)) == [0] * 2, said(world, "term")
    assert [row["step"] for row in logged(world / "term")] == list(range(1, STEPS + 1))
    for found, wanted in zip(logged(world / "term"), logged(world / "whole"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_a_workdir_that_hosts_do_not_share_is_refused(world: Path) -> None:
    """Process 1 sees a checkpoint, process 0 does not."""
    code = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
from memphis_jax.runtime import same_on_all_hosts, start_jax
start_jax()
import jax
try:
    same_on_all_hosts(jax.process_index() * 8 - 1, "the newest checkpoint of W")
except RuntimeError as error:
    print(error)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in running:
        told, _ = process.communicate(timeout=120)
        assert "the newest checkpoint of W differs between hosts: [-1, 7]" in told


def test_sizes_that_do_not_fit_are_told_by_every_host_in_one_line(world: Path) -> None:
    text = (world / "config.py").read_text().replace("batch_size=8", "batch_size=9")
    (world / "odd").mkdir()
    (world / "odd/config.py").write_text(text)
    (world / "odd/data").symlink_to(world / "data")
    assert end(start(world / "odd", "run", 2)) == [1, 1]
    for told in said(world / "odd", "run"):
        lines = [line for line in told.splitlines() if line.startswith("memphis train: ")]
        assert len(lines) == 1 and "a micro-batch of 9" in lines[0] and "= 2" in lines[0]
    assert not (world / "odd/run").exists()
