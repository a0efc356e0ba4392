"""A GPU host for the tests of launch/gpu_generate.sh: a real sshd on 127.0.0.1.

The host is a second folder on this machine; the worker there is a stand-in that publishes and
resumes like memphis_jax.rounds.generate, in a process of its own, without vLLM.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memphis_jax.rounds.files import read_jsonl, write_json

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPT = LAUNCH / "gpu_generate.sh"
MODULE = "memphis_jax.rounds.generate"

# Publishes a block per question. control.json may make it wait before a block until the file says
# otherwise, or fail there. Imports the code that was sent: PYTHONPATH decides which.
STAND_IN = """
import argparse, json, os, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
if sys.argv[1] == "-c":
    exec(sys.argv[2])
assert sys.argv[1:3] == ["-m", "memphis_jax.rounds.generate"]
from memphis_jax.rounds import files
add = (parser := argparse.ArgumentParser(allow_abbrev=False)).add_argument
add("--model", type=Path, required=True)
add("--questions", nargs="+", required=True)
add("--out", type=Path, required=True)
add("--stop", required=True)
args = parser.parse_args(sys.argv[3:])
def control(name):
    return json.loads((here / "control.json").read_text()).get(name)
with (here / "starts").open("a") as file:
    file.write(f"{os.getpid()} {files.__file__} {args.stop}\\n")
print("x" * (control("prints") or 0))
weights = (args.model / "weights").read_bytes()
rows = [row for path in args.questions for row in files.read_jsonl(path)]
blocks = args.out / "blocks-0-of-1"
blocks.mkdir(parents=True, exist_ok=True)
for number, row in enumerate(rows):
    path = blocks / f"block-{number:05d}.jsonl"
    if path.exists():
        continue
    while control("waits_at") == number:
        time.sleep(0.02)
    if control("fails_at") == number:
        engine = subprocess.Popen(["sleep", "600"])
        (here / "engine").write_text(str(engine.pid))
        print(f"out of memory at question {number}")
        sys.exit(7)
    files.write_jsonl(path, [{"id": row["id"], "text": weights[:3].decode() + row["prompt"]}])
    with (here / "sampled").open("a") as file:
        file.write(f"{number}\\n")
    print(f"block {number} of {len(rows)}", flush=True)
done = [r for n in range(len(rows)) for r in files.read_jsonl(blocks / f"block-{n:05d}.jsonl")]
files.write_jsonl(args.out / "completions.jsonl", done)
"""

# Takes the flags that the script uses and no others; gs:// is a folder.
GCLOUD = """
import argparse, os, re, shutil, sys, time
from pathlib import Path
here = Path(__file__).parent
if (here / "hold").exists():
    (here / "hold").write_text(str(os.getpid()))
    time.sleep(600)
with (here / "gcloud.log").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
parser = argparse.ArgumentParser(allow_abbrev=False)
commands = parser.add_subparsers(required=True).add_parser("storage").add_subparsers(
    required=True, dest="command")
rsync, cp = commands.add_parser("rsync"), commands.add_parser("cp")
for command in (rsync, cp):
    command.add_argument("source")
    command.add_argument("target")
rsync.add_argument("--recursive", action="store_true", required=True)
rsync.add_argument("--no-clobber", action="store_true")
rsync.add_argument("--no-ignore-symlinks", action="store_true")
rsync.add_argument("--exclude", type=re.compile)
args = parser.parse_args()
if args.source.startswith("gs://") == args.target.startswith("gs://"):
    sys.exit("Local copies not supported")
source, target = (
    here / "gs" / path[5:] if path.startswith("gs://") else Path(path)
    for path in (args.source, args.target))
if args.command == "cp":
    pairs = [(source, target)]
else:
    if not source.is_dir() or not (target.is_dir() or args.target.startswith("gs://")):
        sys.exit("ERROR: (gcloud.storage.rsync) Did not find existing container")
    names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    pairs = [
        (source / n, target / n) for n in names
        if not (args.exclude and args.exclude.match(n))
        and not (args.no_clobber and (target / n).exists())
        and (args.no_ignore_symlinks or not (source / n).is_symlink())]
for old, new in pairs:
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(old, str(new) + "_.gstmp")
    Path(str(new) + "_.gstmp").rename(new)
"""


@dataclass
class Server:
    """A real sshd. `PATH` of what it starts is given, so that a host can lack a program."""

    folder: Path
    path: str
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for name in ("host_key", "user_key", "stranger_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (self.folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nMaxStartups 100\n"
            f"PermitRootLogin yes\nSetEnv PATH={self.path}\n"
        )
        sshd = shutil.which("sshd")
        assert sshd
        self.process = subprocess.Popen(
            [sshd, "-D", "-e", "-f", self.folder / "config"],
            stderr=(self.folder / "log").open("w"),
        )
        wait_for(lambda: "Server listening" in (self.folder / "log").read_text(), "sshd")

    def options(self, key: str = "user_key") -> list[str]:
        words = ["--port", str(self.port), "--identity", str(self.folder / key)]
        for option in (
            f"UserKnownHostsFile={self.folder}/known_hosts",
            "StrictHostKeyChecking=accept-new",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
        ):
            words += ["--ssh-option", option]
        return words

    def connections(self) -> list[int]:
        assert self.process is not None
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def cut(self) -> int:
        """Kills the processes of the connections, not the server; how many."""
        children = self.connections()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return len(children)

    def check_nothing_is_left(self) -> None:
        """No script leaves a connection or its temporary folder behind, however it ended."""
        wait_for(lambda: not self.connections(), "the end of the connections")
        port = f"-p {self.port} "

        def left() -> list[Path]:
            found = []
            for path in Path("/tmp").glob("gpu_generate.*/ssh"):
                with contextlib.suppress(FileNotFoundError):  # gone since
                    found += [path] if port in path.read_text() else []
            return found

        wait_for(lambda: not left(), "the end of the temporary folders")


@contextlib.contextmanager
def running_server(folder: Path, path: str) -> Iterator[Server]:
    server = Server(folder, path)
    try:
        server.start()
        yield server
        server.check_nothing_is_left()
    finally:
        if server.process:
            server.cut()
            server.process.terminate()
            server.process.wait()


def executable(path: Path, source: str) -> None:
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


@dataclass
class Job:
    """A model, questions and --out here, and the folder that plays the host."""

    folder: Path
    server: Server
    count: int = 6
    options: list[str] = field(default_factory=lambda: ["--fetch-every", "0"])
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.here, self.host = self.folder / "it's here", self.folder / "the $(host)"
        self.model, self.out = self.here / "a model", self.here / 'out "1"'
        self.model.mkdir(parents=True)
        self.host.mkdir()
        (self.model / "weights").write_bytes(b"abc" * 1000)
        (self.model / "conversion.json").write_text('{"files": {}}')
        half = self.count // 2
        self.questions = [self.here / "train set.jsonl", self.here / "more;.jsonl"]
        for path, numbers in zip(
            self.questions, (range(half), range(half, self.count)), strict=True
        ):
            lines = [json.dumps({"id": f"q{n}", "prompt": f"p{n}"}) + "\n" for n in numbers]
            path.write_text("".join(lines))
        executable(self.host / "python", STAND_IN)
        self.control()

    def control(self, **values: int) -> None:
        """`waits_at` or `fails_at`: before which block; `prints`: a line of so many letters."""
        write_json(self.host / "control.json", values)

    def start_and_wait_at(self, block: int) -> subprocess.Popen[str]:
        self.control(waits_at=block)
        process = self.start()
        wait_for(lambda: len(self.sampled()) == block, f"block {block - 1}")
        return process

    @property
    def prefix(self) -> list[str]:
        connection = [*self.server.options(), "--python", str(self.host / "python")]
        return [str(SCRIPT), f"127.0.0.1:{self.host}", *connection, *self.options, "--"]

    @property
    def command(self) -> list[str]:
        words = [".venv-vllm/bin/python", "-m", MODULE, "--model", str(self.model)]
        words += ["--questions", *map(str, self.questions)]
        return [*words, f"--out={self.out}", "--stop", "### User: $(false) 'quoted'"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.prefix, *self.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
        )

    def run(self) -> subprocess.CompletedProcess[str]:
        process = self.start()
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def lines(self, name: str) -> list[str]:
        path = self.host / name
        return path.read_text().splitlines() if path.exists() else []

    def sampled(self) -> list[int]:
        return [int(line) for line in self.lines("sampled")]

    def blocks_here(self) -> list[Path]:
        return sorted(self.out.glob("blocks-0-of-1/block-*.jsonl"))

    def jobs(self) -> list[Path]:
        return list(self.host.glob("runs/*"))

    def models(self) -> list[str]:
        return sorted(path.name for path in self.host.glob("models/*"))

    def is_running(self) -> bool:
        pids = [line.split()[0] for line in self.lines("starts")]
        return any(Path(f"/proc/{pid}").exists() for pid in pids)

    def kill_on_host(self) -> None:
        """kill -9 of the worker and of its supervisor, as a restart of the host would."""
        started = [folder / "pid" for folder in self.jobs() if (folder / "pid").exists()]
        os.killpg(int(started[0].read_text()), signal.SIGKILL)  # a refused job has a folder too

    def check_complete(self) -> None:
        rows = [{"id": f"q{n}", "text": f"abcp{n}"} for n in range(self.count)]
        assert read_jsonl(self.out / "completions.jsonl") == rows
        assert len(self.blocks_here()) == self.count
        assert {p.name for p in self.out.iterdir()} == {"blocks-0-of-1", "completions.jsonl"}
