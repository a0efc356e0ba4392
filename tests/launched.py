"""What the tests of launch/ share: a pod in a stand-in for the cloud, and a trainer for it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_gcloud.cloud import Cloud

REPO = Path(__file__).resolve().parents[1]
PROGRAMS = REPO / "tests" / "fake_gcloud" / "bin"
STEPS = 5

# Follows the contract of `memphis train`: checkpoints, 75 after SIGTERM to any, 76 when another is
# lost, the same command goes on. control.json on the bucket: `hold`: the step before which it
# waits; `fail`: [process, exit code]; `code`: of all, at once; `say`: what all say, once.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
process, count = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
saved = workdir / "checkpoints"
saved.mkdir(parents=True, exist_ok=True)
job = (Path.home() / "memphis/job/id").read_text().strip()
asked, said = [], []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
start = {"process": process, "argv": sys.argv, "job": job, "pid": os.getpid(),
         "cwd": os.getcwd(), "home": str(Path.home()), "environment": dict(os.environ)}
with (here / "starts.jsonl").open("a") as file:
    file.write(json.dumps(start) + "\\n")
(workdir / f"pid-{job}-{process}").write_text(f"{os.getpid()}\\n")
def control(name):
    return json.loads((here / "control.json").read_text()).get(name)
def steps():
    return len(list(saved.iterdir()))
def check():
    if control("code") is not None:
        sys.exit(control("code"))
    if control("say") and control("say") not in said:
        said.append(control("say"))
        print(said[-1], flush=True)
    if control("fail") and control("fail")[0] == process:
        print("\\n".join(f"line {n}" for n in range(40)) + f"\\nProcess {process} cannot go on")
        sys.exit(control("fail")[1])
    if asked:
        (workdir / f"leave-{job}").touch()
    if (workdir / f"leave-{job}").exists():
        print("preempted, saved", flush=True)
        sys.exit(75)
    for path in workdir.glob(f"pid-{job}-*"):
        other = path.name.rpartition("-")[2]
        pid = path.read_text().strip()
        if pid and not lives(pid):
            if not (workdir / f"done-{job}-{other}").exists():
                print(f"lost process {other}", flush=True)
                sys.exit(76)
def lives(pid):
    try:
        return b"trainer.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
check()
step = steps()
while step < STEPS:
    check()
    if process == 0 and control("hold") != step:
        (saved / str(step)).mkdir()
    if steps() > step:
        print(f"process {process}: step {step}", flush=True)
        step += 1
    time.sleep(0.02)
(workdir / f"done-{job}-{process}").touch()
""".replace("STEPS", str(STEPS))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def copy_checkout(folder: Path) -> Path:
    """What launch/ puts on a pod, and launch/ itself: the real files may change meanwhile."""
    for name in ("memphis_jax", "convert", "launch", "requirements", "configs"):
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, folder / name, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    return folder


@dataclass
class Place:
    """A folder with a cloud, a controller's home and a bucket's mount in it."""

    folder: Path
    checkout: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def close(self) -> None:
        """Ends what a test that failed has left."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        for node in (self.cloud.folder / "nodes").glob("*"):
            self.cloud.kill(node.name)

    @property
    def cloud(self) -> Cloud:
        return Cloud(self.folder / "cloud")

    @property
    def mount(self) -> Path:
        return self.folder / "mnt"

    @property
    def bucket(self) -> Path:
        return self.folder / "cloud" / "buckets" / "bucket"

    @property
    def kept(self) -> Path:
        return self.folder / "tpu" / "pod"

    def variables(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "FAKE_CLOUD": str(self.cloud.folder),
            "FAKE_WORKER_PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "MEMPHIS_TPU_HOME": str(self.folder / "tpu"),
            "MEMPHIS_TPU_POLL": "1",
            "MEMPHIS_PYTHON": sys.executable,
            "MEMPHIS_TPU_PYTHON": sys.executable,
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's word for "without": nothing is downloaded
            **self.environment,
        }

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self.checkout / "launch" / script), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.variables(),
            cwd=self.folder,
        )
        self.started.append(process)
        return process

    def call(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *words)
        output, errors = process.communicate(timeout=1200)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def finish(self, process: subprocess.Popen[str]) -> tuple[str, str]:
        """Lets the job run to its end, which is a good one; returns what was said."""
        self.control()
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        self.check_finished()
        return output, errors

    def ok(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        result = self.call(script, *words)
        assert result.returncode == 0, result.stderr + result.stdout
        return result

    def create(self, *words: str, kind: str = "v4-16") -> subprocess.CompletedProcess[str]:
        options = ["--type", kind, "--bucket", "gs://bucket", "--mount", str(self.mount)]
        return self.ok("tpu_create.sh", "pod", *options, *words)

    # ---------------------------------------------------------------- the trainer

    def prepare(self) -> None:
        (self.bucket / "trainer.py").write_text(TRAINER)
        (self.bucket / "starts.jsonl").touch()
        self.control()

    def control(self, **values: Any) -> None:
        path = self.bucket / "control.json"
        path.with_suffix(".tmp").write_text(json.dumps(values))
        path.with_suffix(".tmp").replace(path)

    @property
    def command(self) -> list[str]:
        workdir = self.mount / "it's $(a) run"
        return [
            "/here/python3",
            str(self.mount / "trainer.py"),
            "--workdir",
            str(workdir),
            'a  "b"',
        ]

    def steps(self) -> int:
        return len(list(self.bucket.glob("it's $(a) run/checkpoints/*")))

    def starts(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.bucket / "starts.jsonl").read_text().splitlines()
        ]

    def jobs(self) -> list[str]:
        """The ids of the jobs, in the order of their starts."""
        return list(dict.fromkeys(start["job"] for start in self.starts()))

    def is_running(self) -> bool:
        trainer = str(self.mount / "trainer.py").encode()
        for start in self.starts():
            with contextlib.suppress(OSError):
                if trainer in Path(f"/proc/{start['pid']}/cmdline").read_bytes():
                    return True
        return False

    def run_and_wait_at(self, step: int, *options: str) -> subprocess.Popen[str]:
        self.control(hold=step)
        process = self.start("tpu_run.sh", "pod", *options, "--", *self.command)
        wait_for(lambda: self.steps() == step or process.poll() is not None, f"step {step}")
        assert process.poll() is None, process.communicate()
        newest = self.jobs()[-1]
        wait_for(
            lambda: sum(start["job"] == newest for start in self.starts()) == 2, "both processes"
        )
        return process

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.call("tpu_run.sh", "pod", *options, "--", *self.command)

    def check_finished(self) -> None:
        assert self.steps() == STEPS
        assert not self.is_running()


def copy_of(template: Place, folder: Path) -> Place:
    """A place like `template`, whose pod is set up, in another folder."""
    shutil.copytree(template.folder, folder, symlinks=True, dirs_exist_ok=True)
    place = Place(folder, template.checkout, dict(template.environment))
    place.mount.unlink()
    place.mount.symlink_to(place.bucket)
    for path in (place.kept / "options", place.cloud.folder / "state.json"):
        path.write_text(path.read_text().replace(str(template.folder), str(folder)))
    return place


TYPE, BUCKET = ("--type", "v4-16"), ("--bucket", "gs://bucket")


def error_of(place: Place, script: str, *words: str) -> str:
    """The one line on stderr of a script that fails before anything is created."""
    before = len(place.cloud.calls("queued-resources create"))
    result = place.call(script, *words)
    assert result.returncode == 1 and result.stdout == "", result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert len(place.cloud.calls("queued-resources create")) == before
    return result.stderr


CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}  # a host of v4 has four chips


def set_up_pod(place: Place, *options: str) -> str:
    """What setting up said on stdout."""
    Cloud.make(place.cloud.folder, CPU)
    place.environment["MEMPHIS_COORDINATOR_PORT"] = str(20000 + 2 * (os.getpid() % 6000))
    place.create("--spot", *options)
    output = place.ok("tpu_setup.sh", "pod").stdout
    place.prepare()
    return output
