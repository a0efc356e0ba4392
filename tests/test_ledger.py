"""Stages run once, and again whenever anything about them is no longer true."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from memphis_jax.rounds.ledger import Ledger, Stage, StageFailed, locked


def copy_stage(workdir: Path, *, command: tuple[str, ...] | None = None) -> Stage:
    source, target = workdir / "in.txt", workdir / "out.txt"
    words = command or ("cp", str(source), str(target))
    return Stage("copy", words, (source,), (target,))


def test_a_finished_stage_is_skipped_and_its_record_tells_what_happened(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one")
    ledger, stage = Ledger(tmp_path, "config"), copy_stage(tmp_path)
    assert ledger.run(stage)
    assert not ledger.run(stage)
    record = ledger.read("copy")
    assert record is not None
    assert record["exit_code"] == 0 and record["command"] == list(stage.command)
    sha256_of_one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert record["inputs"] == {"in.txt": sha256_of_one}
    assert record["outputs"] == {"out.txt": sha256_of_one}


@pytest.mark.parametrize("change", ["input", "output", "output gone", "command", "record gone"])
def test_a_stage_runs_again_when_something_changed(tmp_path: Path, change: str) -> None:
    (tmp_path / "in.txt").write_text("one")
    ledger, stage = Ledger(tmp_path, "config"), copy_stage(tmp_path)
    ledger.run(stage)
    if change == "input":
        (tmp_path / "in.txt").write_text("two")
    elif change == "output":
        (tmp_path / "out.txt").write_text("damaged")
    elif change == "output gone":
        (tmp_path / "out.txt").unlink()
    elif change == "record gone":
        (tmp_path / "ledger" / "copy.json").unlink()
    else:
        stage = copy_stage(tmp_path, command=("cp", "-f", *stage.command[1:]))
    assert ledger.run(stage)
    assert (tmp_path / "out.txt").read_text() == (tmp_path / "in.txt").read_text()


def test_a_workdir_and_an_interpreter_may_move(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    copy = "import shutil, sys; shutil.copy(*sys.argv[1:])"

    def stage(python: str, workdir: Path) -> Stage:
        source, target = workdir / "in.txt", workdir / "out.txt"
        words = (python, "-c", copy, str(source), str(target))
        return Stage("copy", words, (source,), (target,))

    old.mkdir()
    (old / "in.txt").write_text("one")
    assert Ledger(old, "").run(stage(sys.executable, old))
    old.rename(new)
    link = tmp_path / "python3"
    link.symlink_to(sys.executable)
    assert not Ledger(new, "").run(stage(str(link), new))
    (new / "in.txt").write_text("two")
    assert Ledger(new, "").run(stage(sys.executable, new))


def test_a_failed_stage_is_named_and_recorded_and_runs_again(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one")
    ledger = Ledger(tmp_path, "config")
    failing = copy_stage(tmp_path, command=(sys.executable, "-c", "print('why'); exit(3)"))
    with pytest.raises(StageFailed, match=r"stage copy failed .exit code 3.*copy.log"):
        ledger.run(failing)
    assert (tmp_path / "logs" / "copy.log").read_text() == "why\n"
    record = ledger.read("copy")
    assert record is not None and record["exit_code"] == 3
    with pytest.raises(StageFailed):
        ledger.run(failing)
    assert ledger.run(copy_stage(tmp_path))


def test_a_stage_that_was_killed_says_so(tmp_path: Path) -> None:
    killed = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(StageFailed, match=r"\(killed by SIGKILL, often for lack of memory\)"):
        Ledger(tmp_path, "").run(Stage("big", killed, (), ()))


def test_a_stage_that_writes_nothing_has_failed(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one")
    with pytest.raises(StageFailed, match=r"no .*out\.txt"):
        Ledger(tmp_path, "config").run(copy_stage(tmp_path, command=("true",)))


def test_a_prefix_says_where_a_stage_runs(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one")
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    command = ("cp", str(source), str(target))
    stage = Stage("copy", command, (source,), (target,), prefix=("env", "WHERE=there"))
    Ledger(tmp_path, "config").run(stage)
    record = Ledger(tmp_path, "config").read("copy")
    assert record is not None and record["command"] == [*command]
    assert record["prefix"] == ["env", "WHERE=there"]
    elsewhere = replace(stage, prefix=("env", "WHERE=here"), suffix=("--verbose",))
    assert not Ledger(tmp_path, "config").run(elsewhere)  # what was made there is made


def test_only_one_run_uses_a_workdir(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(RuntimeError, match="another run is using"),
        locked(tmp_path, patience=0.3),
    ):
        pass
    with locked(tmp_path, patience=0.3):
        pass


CHILD = "import time; open({ready!r}, 'w').close(); time.sleep(60)"
PARENT = """
from pathlib import Path
from memphis_jax.rounds.ledger import Ledger, Stage, locked
workdir = Path({workdir!r})
with locked(workdir):
    Ledger(workdir, "config").run(Stage("sleep", ({python!r}, "-c", {child!r}), (), ()))
"""


def test_a_killed_run_takes_its_stage_along_and_frees_the_workdir(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = CHILD.format(ready=str(ready))
    script = PARENT.format(workdir=str(tmp_path), python=sys.executable, child=child)
    run = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ready.exists()
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    with locked(tmp_path, patience=20.0):  # free only when the 60 s stage is gone too
        assert not (tmp_path / "ledger" / "sleep.json").exists()


STAGE_THAT_SAVES = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_stage_which_has_time_to_save(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Sent to the recipe alone, as a scheduler does; the stage gets SIGTERM."""
    (tmp_path / "in.txt").write_text("one")
    recipe = f"""
from pathlib import Path
from memphis_jax.errors import Stopped
from memphis_jax.rounds.ledger import Ledger, Stage
words = ({sys.executable!r}, "-c", {STAGE_THAT_SAVES!r})
try:
    Ledger(Path({str(tmp_path)!r}), "").run(Stage("slow", words, (), ()))
except Stopped as stopped:
    raise SystemExit(stopped.exit_code)
"""
    process = subprocess.Popen([sys.executable, "-c", recipe], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (code, "saved")
    record = Ledger(tmp_path, "").read("slow")
    assert record is not None and record["exit_code"] == 75
