"""Stages as processes with records: what is done is skipped, anything else runs again.

A stage is a command line with input files and output files. Its record, WORKDIR/ledger/NAME.json,
says what went in (hashes), the command, versions, exit code, time, and what came out (hashes). It
is valid while the command and the inputs are the same and every output has its hash. No jax.
"""

import fcntl
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from memphis_jax.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_PREEMPTED, Stopped
from memphis_jax.rounds.files import sha256_file, sha256_folder, write_json
from memphis_jax.rounds.processes import DIE_WITH_PARENT
from memphis_jax.versions import versions

ENDS_WITH: dict[int, int] = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}


class StageFailed(RuntimeError):
    """A stage's process ended with an exit code other than 0."""


@dataclass(frozen=True)
class Stage:
    """One process: reads `inputs`, writes `outputs` (files or folders), paths as in `command`."""

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    # Where and how it runs: words put around the command, which no record is compared with.
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()


class Ledger:
    """The records of one workdir. Paths in records are relative to it where they lie inside."""

    def __init__(self, workdir: Path, config_sha256: str):
        self.workdir, self.config_sha256 = workdir, config_sha256
        (workdir / "ledger").mkdir(parents=True, exist_ok=True)
        (workdir / "logs").mkdir(exist_ok=True)

    def run(self, stage: Stage) -> bool:
        """Runs `stage` unless its record is valid; whether it ran.

        Raises Stopped where its machine was taken away, with the stage's exit code, or where this
        process was sent SIGTERM or SIGINT, which the stage hears of; StageFailed on any other
        failure.
        """
        inputs = {self._relative(path): _hash(path) for path in stage.inputs}
        if self._is_done(stage, inputs):
            return False
        started, clock = datetime.now(UTC), time.perf_counter()
        log = self.workdir / "logs" / f"{stage.name}.log"
        command = [*stage.prefix, *stage.command, *stage.suffix]
        exit_code, signalled = _run_process(command, log)
        seconds = time.perf_counter() - clock
        record = self._record(stage.name, stage.command, exit_code, started, seconds, inputs)
        record |= {"prefix": list(stage.prefix), "suffix": list(stage.suffix)}
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if exit_code == 0 and not missing:
            record["outputs"] = {self._relative(path): _hash(path) for path in stage.outputs}
        self._write(record)
        # 255: ssh, or launch/tpu_run.sh, lost the connection to where the stage runs.
        lost = bool(stage.prefix) and exit_code == 255
        if signalled or lost or exit_code in (EXIT_PREEMPTED, EXIT_PEER_LOST):
            raise Stopped(
                f"stage {stage.name} was interrupted; the same command goes on",
                ENDS_WITH.get(signalled, exit_code),
            )
        if exit_code or missing:
            why = _ending(exit_code) if exit_code else f"no {', '.join(missing)}"
            raise StageFailed(f"stage {stage.name} failed ({why}); its output is in {log}")
        return True

    def note(self, name: str, text: str) -> None:
        """Records a stage that was left out, and why."""
        if (old := self.read(name)) and old["note"] == text:
            return
        self._write(self._record(name, (), 0, datetime.now(UTC), 0.0, {}, note=text))

    def records(self) -> list[dict[str, Any]]:
        """All records in the order in which the stages started."""
        paths = (self.workdir / "ledger").glob("*.json")
        rows = [self.read(path.stem) for path in paths]
        return sorted((row for row in rows if row), key=lambda row: row["started"])

    def read(self, name: str) -> dict[str, Any] | None:
        path = self.workdir / "ledger" / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _is_done(self, stage: Stage, inputs: dict[str, str]) -> bool:
        record = self.read(stage.name)
        if record is None or record["exit_code"] != 0 or record["inputs"] != inputs:
            return False
        workdir = record.get("workdir", str(self.workdir))
        if _plain(record["command"], workdir) != _plain(stage.command, str(self.workdir)):
            return False
        if set(record["outputs"]) != {self._relative(path) for path in stage.outputs}:
            return False
        return all(
            path.exists() and _hash(path) == record["outputs"][self._relative(path)]
            for path in stage.outputs
        )

    def _record(
        self,
        name: str,
        command: Sequence[str],
        exit_code: int,
        started: datetime,
        seconds: float,
        inputs: dict[str, str],
        note: str = "",
    ) -> dict[str, Any]:
        return {
            "stage": name,
            "command": list(command),
            "workdir": str(self.workdir),
            "exit_code": exit_code,
            "started": started.isoformat(timespec="milliseconds"),
            "seconds": round(seconds, 3),
            "config_sha256": self.config_sha256,
            "inputs": inputs,
            "outputs": {},
            "versions": versions(),
            "host": platform.node(),
            "note": note,
        }

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self.workdir / "ledger" / f"{record['stage']}.json", record)

    def _relative(self, path: Path) -> str:
        inside = path.is_relative_to(self.workdir)
        return str(path.relative_to(self.workdir) if inside else path)


def _plain(command: Sequence[str], workdir: str) -> list[str]:
    """The words without where the interpreter and the workdir are: both may move."""
    words = ["." if word == workdir else word.removeprefix(workdir + "/") for word in command]
    if words and Path(words[0]).name.startswith("python"):
        words[0] = "python"
    return words


def _ending(exit_code: int) -> str:
    """What an exit code other than 0 says; one below 0 is a signal, one above 128 a shell's."""
    try:
        name = signal.Signals(-exit_code if exit_code < 0 else exit_code - 128).name
    except ValueError:
        return f"exit code {exit_code}"
    often = ", often for lack of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{often}"


def _hash(path: Path) -> str:
    return sha256_folder(path) if path.is_dir() else sha256_file(path)


def _run_process(command: Sequence[str], log: Path) -> tuple[int, int]:
    """Runs `command` with its output on the terminal and in `log`.

    Returns the exit code, and the signal, SIGTERM or SIGINT, that came meanwhile, or 0: the child
    gets SIGTERM and time to save. A second Ctrl-C ends both. When this process is killed, so is the
    child: a restarted recipe never meets a stage of the killed one still writing.
    """
    signals = [0]

    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            close_fds=False,  # the lock goes along; Python's other files are not inheritable
            preexec_fn=DIE_WITH_PARENT,
        )
        assert process.stdout is not None

        def pass_on(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            process.terminate()  # a terminal sends Ctrl-C to the child as well: not twice

        heard = [n for n in ENDS_WITH if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in heard}
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                print("    " + line.decode(errors="replace"), end="", flush=True)
            return process.wait(), signals[-1]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def locked(workdir: Path, patience: float = 20.0) -> Iterator[None]:
    """Holds WORKDIR/.lock; waits `patience` seconds for a killed run's last child to go.

    The lock is inherited by every child, so it is free only when nothing of a run is left.
    """
    with (workdir / ".lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"another run is using {workdir} (it holds {file.name}): wait for it, or "
                        "use another --workdir"
                    ) from None
                time.sleep(0.2)
        yield
