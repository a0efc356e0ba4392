"""launch/gpu_generate.sh against a real sshd on 127.0.0.1: nothing is lost, redone or half there.

The "GPU host" is a second folder on this machine; the worker there is a stand-in that publishes
and resumes like memphis_jax.rounds.generate, in a process of its own, without vLLM.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from memphis_jax.rounds.files import read_jsonl, write_json
from memphis_jax.rounds.ledger import Ledger, Stage, StageFailed

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="session")
def tools() -> None:
    """sshd, rsync and shellcheck. CI must have them; elsewhere a test without them is skipped."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in ("sshd", "rsync", "shellcheck") if not shutil.which(name)]
    if missing:
        report = pytest.fail if os.environ.get("MEMPHIS_CI") else pytest.skip
        report(f"needs {' '.join(missing)}: apt-get install openssh-server rsync shellcheck")


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


@pytest.fixture(scope="session")
def server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("sshd"), os.environ["PATH"]) as it:
        yield it


@pytest.fixture(scope="session")
def bare_server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A host without rsync, with the stand-in for gcloud; its `path` serves for this side too."""
    folder, programs = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("bin")
    names = """awk basename bash cat chmod cp cut df dirname du env find flock grep head id mkdir
        mktemp mv rm sed setsid sh sha256sum sleep sort ssh tail tar tee touch tr true wc xargs"""
    for name in names.split():
        target = shutil.which(name)
        assert target, name
        (programs / name).symlink_to(target)
    executable(programs / "gcloud", GCLOUD)
    with running_server(folder, str(programs)) as it:
        yield it


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


@pytest.fixture
def job(tmp_path: Path, server: Server) -> Job:
    return Job(tmp_path, server)


def test_the_whole_path_and_a_second_run_sends_nothing(job: Job) -> None:
    job.control(prints=2_500_000)
    result = job.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("x") == 2_500_000
    job.check_complete()
    assert job.sampled() == list(range(job.count))
    assert "block 5 of 6" in result.stdout
    (start,) = job.lines("starts")
    assert f"{job.host}/code/" in start, "the code that was sent is the code that runs"
    assert start.endswith("### User: $(false) 'quoted'")
    assert len(job.models()) == 1 and re.fullmatch("[0-9a-f]{64}", job.models()[0])
    assert list((job.host / "incoming").iterdir()) == []

    sent = [path for kind in ("models", "questions", "code") for path in job.host.glob(f"{kind}/*")]
    times = [path.stat().st_ctime_ns for path in sent]
    shutil.rmtree(job.out)
    again = job.run()
    assert again.returncode == 0, again.stderr
    job.check_complete()
    assert "sending" not in again.stderr and len(job.lines("starts")) == 1
    assert [path.stat().st_ctime_ns for path in sent] == times

    job.out = job.here / "out 2"
    other = job.run()
    assert other.returncode == 0, other.stderr
    job.check_complete()
    assert "sending models" not in other.stderr and len(job.lines("starts")) == 2


def test_a_cut_connection_is_made_again_and_no_block_is_sampled_twice(job: Job) -> None:
    process = job.start_and_wait_at(3)
    assert job.server.cut() > 0
    job.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "lost the connection to 127.0.0.1" in errors
    job.check_complete()
    assert job.sampled() == list(range(job.count)) and len(job.lines("starts")) == 1


def test_a_connection_lost_for_good_leaves_the_job_running(job: Job) -> None:
    job.options += ["--retries", "0"]
    process = job.start_and_wait_at(3)
    job.server.cut()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 255 and "the same command picks it up" in errors
    assert job.is_running()
    assert not (job.out / "completions.jsonl").exists()
    job.control()
    result = job.run()
    assert result.returncode == 0, result.stderr
    job.check_complete()
    assert job.sampled() == list(range(job.count)) and len(job.lines("starts")) == 1


def test_after_kill_9_here_the_same_command_follows_the_job(job: Job) -> None:
    process = job.start_and_wait_at(3)
    process.kill()
    process.communicate(timeout=10)  # returns: nothing that it started keeps the pipes open
    assert job.is_running()
    process = job.start()
    assert process.stderr is not None
    assert "the job runs already" in process.stderr.readline()
    job.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    job.check_complete()
    assert job.sampled() == list(range(job.count)) and len(job.lines("starts")) == 1


def test_two_calls_for_one_out_take_turns(job: Job) -> None:
    first = job.start_and_wait_at(3)
    second = job.start()
    time.sleep(2)  # a second that came too late would prove nothing, not fail
    job.control()
    assert first.wait(timeout=60) == 0
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0 and "finished before" in errors, errors
    first.communicate()
    job.check_complete()


def test_a_host_that_lost_everything_gets_the_blocks_that_are_here(job: Job) -> None:
    process = job.start_and_wait_at(3)
    wait_for(lambda: len(job.blocks_here()) == 3, "the blocks here")
    process.kill()
    process.communicate(timeout=10)
    job.kill_on_host()
    for name in ("models", "questions", "code", "runs"):
        shutil.rmtree(job.host / name)
    (job.host / "sampled").unlink()
    job.control()
    result = job.run()
    assert result.returncode == 0, result.stderr
    job.check_complete()
    assert job.sampled() == list(range(3, job.count))


def test_a_job_killed_on_the_host_is_started_again(job: Job) -> None:
    process = job.start_and_wait_at(3)
    job.kill_on_host()
    job.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "starting it again" in errors and len(job.lines("starts")) == 2
    job.check_complete()
    assert job.sampled() == list(range(job.count))


def test_a_failing_worker_gives_its_exit_code_and_its_last_words(job: Job) -> None:
    job.control(fails_at=3)
    result = job.run()
    assert result.returncode == 7
    tail = result.stderr[result.stderr.index("failed with exit code 7") :]
    assert tail.endswith("block 2 of 6\nout of memory at question 3\n")
    assert len(job.blocks_here()) == 3 and not (job.out / "completions.jsonl").exists()
    engine = (job.host / "engine").read_text()
    wait_for(lambda: not Path(f"/proc/{engine}").exists(), "the end of what the worker left")
    job.control()
    assert job.run().returncode == 0
    job.check_complete()
    assert job.sampled() == list(range(job.count))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_here_stops_the_job_there(job: Job, number: signal.Signals) -> None:
    process = job.start_and_wait_at(3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "stopping the job on 127.0.0.1" in errors and "stopped; the same command" in errors
    assert not job.is_running()
    assert (job.jobs()[0] / "exit").read_text() == "143\n"


def test_ctrl_c_of_a_recipe_stops_the_job_there_too(job: Job) -> None:
    """Ctrl-C reaches both; the recipe ends first and kills the script before it has stopped it."""
    source = (
        "import sys; from pathlib import Path; from memphis_jax.rounds import ledger as l\n"
        "folder, at = Path(sys.argv[1]), sys.argv.index('--') + 1\n"
        "stage = l.Stage('s', tuple(sys.argv[at:]), (), (), tuple(sys.argv[2:at]))\n"
        "l.Ledger(folder, '').run(stage)"
    )
    job.control(waits_at=1)
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(job.here), *job.prefix, *job.command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(job.sampled, "the first block")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=10)
    wait_for(lambda: (job.jobs()[0] / "exit").exists(), "the end of the job")
    assert not job.is_running()
    assert (job.jobs()[0] / "exit").read_text() == "143\n"  # stopped, not killed


@pytest.mark.parametrize("how", ["cut", "kill -9"])
def test_a_model_cut_in_transfer_never_appears_in_place(job: Job, how: str) -> None:
    size = 200_000_000
    with (job.model / "weights").open("r+b") as file:
        file.truncate(size)
    process = job.start()
    incoming = job.host / "incoming"
    wait_for(lambda: [p for p in incoming.glob("weights.*") if p.stat().st_size > 0], "weights")
    if how == "cut":
        assert job.server.cut() > 0
    else:
        process.kill()
        process.communicate(timeout=10)
    wait_for(lambda: [*incoming.glob("*/weights")], "the part that is kept")
    assert all(name.endswith(".partial") for name in job.models())
    if how == "kill -9":
        process = job.start()

    def in_place() -> bool:
        whole = [path for path in job.host.glob("models/*") if path.suffix != ".partial"]
        assert all((path / "weights").stat().st_size == size for path in whole)
        return bool(whole)

    wait_for(in_place, "the model in place")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert how != "cut" or "lost the connection" in errors
    job.check_complete()
    (folder,) = job.host.glob("models/*")
    assert sorted(path.name for path in folder.iterdir()) == ["conversion.json", "weights"]
    assert list(incoming.iterdir()) == []


def test_another_command_for_the_same_out_is_refused_while_a_job_runs(job: Job) -> None:
    process = job.start_and_wait_at(3)
    process.kill()
    process.communicate(timeout=10)
    job.questions[1].write_text('{"id": "new", "prompt": "p"}\n')
    result = job.run()
    assert result.returncode == 1
    assert re.search(r"another command's job .* still runs there; .*kill -- -\d+$", result.stderr)
    job.kill_on_host()


def test_through_a_bucket_without_rsync_on_either_side(tmp_path: Path, bare_server: Server) -> None:
    job = Job(tmp_path, bare_server, environment={"PATH": bare_server.path})
    programs = Path(bare_server.path)
    job.options += ["--bucket", "gs://bucket/some folder/"]
    (job.model / "weights").rename(job.here / "blob")
    (job.model / "weights").symlink_to(job.here / "blob")  # as in a Hugging Face cache
    hold = programs / "hold"
    hold.touch()
    process = job.start()
    wait_for(hold.read_text, "gcloud")
    process.kill()
    process.communicate(timeout=10)
    wait_for(lambda: not Path(f"/proc/{hold.read_text()}").exists(), "the end of gcloud")
    hold.unlink()

    process = job.start_and_wait_at(3)
    wait_for(lambda: len(job.blocks_here()) == 3, "the blocks here")
    process.kill()
    process.communicate(timeout=10)
    job.kill_on_host()
    shutil.rmtree(job.host / "runs")
    shutil.rmtree(programs / "gs/bucket/some folder/runs")
    (job.host / "sampled").unlink()
    job.control()
    result = job.run()
    assert result.returncode == 0, result.stderr
    job.check_complete()
    assert job.sampled() == list(range(3, job.count))
    assert not list(job.host.glob("*/*.partial"))
    log = programs / "gcloud.log"
    before = len(log.read_text())
    assert job.run().returncode == 0
    assert "/models/" not in log.read_text()[before:]


def test_a_dry_run_prints_every_command_and_touches_nothing(job: Job) -> None:
    job.options += ["--dry-run"]
    job.server = Server(job.folder, "", port=1)  # nobody answers there
    result = job.run()
    assert result.returncode == 0
    assert re.fullmatch("(gpu_generate.sh: sending .*\n){3}", result.stderr)
    calls = [shlex.split(line) for line in result.stdout.splitlines()]
    assert {call[0] for call in calls} == {"+"}
    operations = [call[call.index("gpu_remote.sh") + 1] for call in calls if call[1] == "ssh"]
    assert operations == ["hello", "missing", "publish", "start", "poll"]
    copies = [call[-2:] for call in calls if call[1] == "rsync"]
    assert [str(job.model) + "/", f"127.0.0.1:{job.host}/models/"] == [
        copies[0][0],
        re.sub("[0-9a-f]{64}.partial/$", "", copies[0][1]),
    ]
    assert copies[-1][1] == f"{job.out}/.fetch/"
    (start,) = [call for call in calls if "start" in call]
    assert start[-2:] == ["--stop", "### User: $(false) 'quoted'"]
    assert not job.out.exists() and [p.name for p in job.host.iterdir()] == [
        "python",
        "control.json",
    ]


def test_as_the_prefix_of_a_stage(job: Job) -> None:
    ledger = Ledger(job.here, "config")
    prefix = tuple(shlex.split(shlex.join(job.prefix)))
    output = job.out / "completions.jsonl"
    stage = Stage("generate", tuple(job.command), (job.model,), (output,), prefix)
    assert ledger.run(stage)
    job.check_complete()
    assert not ledger.run(stage)
    job.control(fails_at=0)
    failing = Stage("fails", (*job.command, "--stop", "x"), (), (), prefix)
    shutil.rmtree(job.out)
    with pytest.raises(StageFailed, match="exit code 7"):
        ledger.run(failing)
    assert "out of memory at question 0" in (job.here / "logs/fails.log").read_text()


def error_of(job: Job, target: str = "", key: str = "user_key") -> str:
    """The one line on stderr of a run that fails before any job starts."""
    python = [] if "--python" in job.options else ["--python", str(job.host / "python")]
    target = target or f"127.0.0.1:{job.host}"
    call = [str(SCRIPT), target, *job.options, *job.server.options(key), *python, "--"]
    environment = os.environ | job.environment
    result = subprocess.run(
        [*call, *job.command], text=True, capture_output=True, env=environment, timeout=60
    )
    assert result.returncode == 1 and result.stdout == "", result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not job.lines("starts")
    return result.stderr


def test_what_is_wrong_with_the_connection_is_said_in_one_line(job: Job) -> None:
    assert "no such host: nowhere.invalid" in error_of(job, "me@nowhere.invalid")
    assert "127.0.0.1 refuses the login (" in error_of(job, key="stranger_key")
    known = ["--ssh-option", "StrictHostKeyChecking=yes"]
    job.options = [*known, "--ssh-option", "UserKnownHostsFile=/dev/null"]
    assert "run 'ssh 127.0.0.1' once by hand" in error_of(job)
    job.options = ["--port", "1"]
    assert "cannot reach 127.0.0.1 by ssh: " in error_of(job)


def test_what_the_host_lacks_is_said_in_one_line(job: Job, bare_server: Server) -> None:
    job.options = ["--python", str(job.host / "none/python")]
    message = error_of(job)
    assert "none/python" in message and "docs/gpu.md, 'Install'" in message
    job.options = ["--python", "false"]
    assert "does not start, or is older than Python 3.11" in error_of(job)
    job.options = []
    assert "it cannot make the folder /proc/none" in error_of(job, "127.0.0.1:/proc/none")
    with (job.model / "weights").open("r+b") as file:
        file.truncate(10 * 2**40)  # no block of it is on the disk
    assert re.search(r"too full: .* has \d+ MB free, 1048576\d MB are to come", error_of(job))
    job.server = bare_server
    assert "127.0.0.1: it has no rsync: apt-get install rsync there" in error_of(job)
    job.environment = {"PATH": bare_server.path}
    assert "this machine has no rsync" in error_of(job)


def test_a_command_that_cannot_be_sent_is_refused(job: Job) -> None:
    def refused(*words: str) -> str:
        result = subprocess.run([str(SCRIPT), *words], text=True, capture_output=True)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    assert "no host" in refused()
    assert "no command" in refused("gpu", "--")
    assert "unknown option --fast" in refused("gpu", "--fast", "--", *job.command)
    assert "--port needs a value" in refused("gpu", "--port", "--", *job.command)
    assert "--retries x is not a whole number" in refused("gpu", "--retries=x", "--", "a")
    assert "expected gs://BUCKET" in refused("gpu", "--bucket", "s3://x", "--", *job.command)
    assert "not of the form user@host:folder" in refused("gpu:a:b", "--", *job.command)
    assert "must be PYTHON -m memphis_jax.rounds.generate" in refused("gpu", "--", "ls", "-l")
    assert "lacks --model, --questions or --out" in refused("gpu", "--", *job.command[:-3])
    job.questions[1].unlink()
    assert "more;.jsonl: no such file" in refused("gpu", "--", *job.command)
    shutil.rmtree(job.model)
    assert "a model: no such folder" in refused("gpu", "--", *job.command)


def test_a_full_disk_here_is_said_and_the_job_goes_on(job: Job) -> None:
    job.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(job.out)]
    if subprocess.run(mount, capture_output=True).returncode:
        told = "needs the right to mount a tmpfs"
        pytest.fail(told) if os.environ.get("MEMPHIS_CI") else pytest.skip(told)
    try:
        (job.out / "filler").write_bytes(bytes(60_000))
        job.control(waits_at=5)
        _, errors = job.start().communicate(timeout=60)
        assert errors.splitlines()[-1].startswith("gpu_generate.sh: disk full: rsync:")
        assert job.is_running()
        (job.out / "filler").unlink()
        job.control()
        result = job.run()
        assert result.returncode == 0, result.stderr
        job.check_complete()
        assert job.sampled() == list(range(job.count))
    finally:
        subprocess.run(["umount", str(job.out)], check=True)


def test_shellcheck_finds_nothing(tools: None) -> None:
    scripts = [*LAUNCH.glob("*.sh")]
    result = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
