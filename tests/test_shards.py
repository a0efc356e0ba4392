"""Processes of their own GPUs: one that fails is named, none outlives the command."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memphis_jax.rounds import shards

REPO = Path(__file__).parents[1]
# Says what it was given, writes it to its own file, and does what --then asks of its shard.
SCRIPT = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--out", "--shard", "--then", "--fails"):
    parser.add_argument(name)
args = parser.parse_args()
index, count = args.shard.split("/")
out = Path(args.out)
told = {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "count": count}
(out / f"tmp-{index}").write_text(json.dumps(told))
os.rename(out / f"tmp-{index}", out / f"told-{index}")
print(f"shard {index} at work", flush=True)
if args.fails == index:
    print("loading", "generate: no memory left", "", sep="\\n", file=sys.stderr)
    sys.exit(3)
if args.then == "wait for a failure":
    time.sleep(1.0)
if args.then == "sleep":
    time.sleep(120)
(out / f"done-{index}").write_text("")
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "worker.py").write_text(SCRIPT)
    monkeypatch.setattr(shards, "WORKER", (sys.executable, str(tmp_path / "worker.py")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def told(out: Path, index: int) -> dict[str, str]:
    return json.loads((out / f"told-{index}").read_text())


def test_every_shard_runs_with_the_words_of_the_command(
    out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards.run_shards(["--out", str(out), "--data-parallel", "3"], 3, 1)
    assert [told(out, i)["count"] for i in range(3)] == ["3"] * 3
    assert len({told(out, i)["pid"] for i in range(3)}) == 3
    assert {told(out, i)["gpus"] for i in range(3)} == {""}  # no GPU here, none given
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == [f"[{i}] shard {i} at work" for i in range(3)]


def test_one_failing_is_named_and_stops_no_other(out: Path) -> None:
    argv = ["--out", str(out), "--fails", "1", "--then", "wait for a failure"]
    with pytest.raises(RuntimeError) as caught:
        shards.run_shards(argv, 3, 1)
    assert str(caught.value) == (
        "1 of 3 shards failed: shard 1 (exit code 3: generate: no memory left). The others are "
        "done; the same command samples only what is left"
    )
    assert sorted(path.name for path in out.glob("done-*")) == ["done-0", "done-2"]


@pytest.mark.parametrize(
    ("visible", "count", "each", "split"),
    [
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("4,7,9", 3, 1, ["4", "7", "9"]),
        ("GPU-aa, GPU-bb,GPU-cc", 2, 1, ["GPU-aa", "GPU-bb"]),
    ],
)
def test_no_two_processes_share_a_gpu(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    count: int,
    each: int,
    split: list[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shards.run_shards(["--out", str(out)], count, each)
    assert [told(out, i)["gpus"] for i in range(count)] == split


def test_too_few_gpus_start_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ValueError, match=r"needs 4 GPUs, this machine shows 3"):
        shards.run_shards(["--out", str(out)], 2, 2)
    assert list(out.glob("told-*")) == []


@pytest.mark.parametrize(
    ("value", "names"),
    [("0,2", ["0", "2"]), ("", []), ("-1", []), ("1,-1,2", ["1"]), ("0,1,", ["0", "1"])],
)
def test_visible_gpus_are_read_as_cuda_reads_them(
    monkeypatch: pytest.MonkeyPatch, value: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert shards.visible_gpus() == names


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_shard_outlives_the_command(out: Path, number: signal.Signals) -> None:
    code = f"""
from memphis_jax.errors import one_line
from memphis_jax.rounds import shards
shards.WORKER = {shards.WORKER!r}
with one_line("generate"):
    shards.run_shards(["--out", {str(out)!r}, "--then", "sleep"], 2, 1)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPO)
    try:
        wait_for(lambda: len(list(out.glob("told-*"))) == 2)
        pids = [int(told(out, i)["pid"]) for i in range(2)]
        assert all(map(is_running, pids))
        parent.send_signal(number)
        wait_for(lambda: parent.poll() is not None)
        wait_for(lambda: not any(map(is_running, pids)))
    finally:
        parent.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """A dead process that nobody waited for yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("--a 1 --data-parallel 2 --b", "--a 1 --b"),
        ("--data-parallel=2 --a", "--a"),
        ("--a --data-parallel 2", "--a"),
        ("--data-parallel 2 --data-parallel 4", ""),
        ("--questions a b --data-parallel 2", "--questions a b"),
        ("--data-parallelism 2", "--data-parallelism 2"),
        ("", ""),
    ],
)
def test_the_option_is_taken_out(words: str, left: str) -> None:
    assert shards._without(words.split(), "--data-parallel") == left.split()
