"""launch/gpu_generate.sh: what it prints before it does anything, and its errors in one line."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from gpu_host import LAUNCH, SCRIPT, Job, Server

from memphis_jax.rounds.ledger import Ledger, Stage, StageFailed

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.slow


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


def test_shellcheck_finds_nothing(tools: None) -> None:
    scripts = [*LAUNCH.glob("*.sh")]
    result = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
