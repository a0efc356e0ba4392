"""What starting costs: packages that a command must not import, and how the benchmarks tell it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo import seconds_by_kind
from benchmarks.scaling import Found, Point, in_process
from benchmarks.startup import MEMPHIS, compile_seconds, loads


@pytest.mark.parametrize("words", [[], *([name] for name in ("train", "rounds", "grade", "pairs"))])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert loads([*MEMPHIS, *words, "--help"]) == "none"


def test_imports_of_a_command_are_seen() -> None:
    assert loads([sys.executable, "-c", "import jax"]) == "jax"


def test_metrics_are_written_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from memphis_jax.metrics import MetricsWriter\n"
        f"with MetricsWriter(Path({str(tmp_path)!r}), resume_step=0, num_steps=1, label='') as w:\n"
        "    w.write(1, {'loss': 1.0})\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; torch.ones(1)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tracing_within_tracing_counts_once() -> None:
    log = (
        "Finished tracing silu for jit in 0.5 sec\n"
        "Finished tracing train_step for jit in 2.0 sec\n"
        "Finished jaxpr to MLIR module conversion jit(train_step) in 1.0 sec\n"
        "Finished XLA compilation of jit(train_step) in 8.0 sec\n"
        "Finished XLA compilation of jit(<lambda>) in 2e-1 sec\n"
    )
    assert compile_seconds(log) == {"lower": 3.0, "compile": 8.2}


def test_stages_are_gathered_by_kind_in_the_order_of_their_start(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    stages = [("round1-rank", "3", 5.0), ("sft", "1", 90.0), ("sft-export", "2", 1.0)]
    for stage, started, took in [*stages, ("round1-export", "4", 2.0)]:
        record = {"stage": stage, "started": started, "seconds": took}
        (tmp_path / "ledger" / f"{stage}.json").write_text(json.dumps(record))
    found = seconds_by_kind(tmp_path)
    assert list(found.items()) == [("sft", [90.0]), ("export", [1.0, 2.0]), ("rank", [5.0])]


@pytest.mark.slow
def test_on_two_devices_each_holds_half_of_the_state() -> None:
    def at(devices: int) -> Found:
        return in_process([Point(rows=2, length=128, layers=1, devices=devices)], 1)[0]

    one, two = at(1), at(2)
    assert two.flops == one.flops
    assert 0.5 <= two.arguments / one.arguments < 0.6
