"""launch/tpu_run.sh against a stand-in for the cloud: one job on all workers, and again.

The trainer is a stand-in here that follows the exit codes of `memphis train`; the real recipe goes
through the same scripts in test_launch_recipe.py.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from launched import STEPS, Place, error_of, set_up_pod, wait_for

pytest_plugins = ["launch_fixtures"]
pytestmark = pytest.mark.slow


def test_a_command_runs_on_every_worker_with_its_words_and_its_place(pod: Place) -> None:
    pod.environment["MEMPHIS_HEARTBEAT_SECONDS"] = "7"
    result = pod.run("--env", "XLA_FLAGS=--a b=$(c)")
    assert result.returncode == 0, result.stderr
    pod.check_finished()
    assert result.stdout.splitlines() == [f"process 0: step {n}" for n in range(STEPS)]
    port = pod.environment["MEMPHIS_COORDINATOR_PORT"]
    with pod.cloud.state() as state:
        first = state["nodes"]["pod"]["networkEndpoints"][0]["ipAddress"]
    starts = sorted(pod.starts(), key=lambda start: start["process"])
    assert [start["process"] for start in starts] == [0, 1]
    for number, start in enumerate(starts):
        assert start["argv"] == pod.command[1:]
        assert start["home"].endswith(f"nodes/pod/w{number}")
        environment = start["environment"]
        assert environment["JAX_COORDINATOR_ADDRESS"] == f"{first}:{port}"
        assert environment["JAX_NUM_PROCESSES"] == "2"
        assert environment["MEMPHIS_HEARTBEAT_SECONDS"] == "7"
        assert environment["XLA_FLAGS"] == "--a b=$(c)"
        assert environment["PYTHONPATH"] == f"{start['home']}/memphis/site"
        assert not [name for name in environment if name.startswith("MEGASCALE")]
        (log,) = pod.kept.glob(f"logs/{start['job']}/pod-worker{number}.log")
        assert f"process {number}: step {STEPS - 1}\n" in log.read_text()
        assert f"process {1 - number}" not in log.read_text()
        assert log.read_text().endswith("\n[exit code 0]\n")


def test_two_slices(tmp_path: Path, checkout: Path) -> None:
    place = Place(tmp_path / "place", checkout)
    assert "16 devices (cpu), 4 on this worker" in set_up_pod(place, "--slices", "2")
    result = place.run()
    assert result.returncode == 0, result.stderr
    with place.cloud.state() as state:
        first = state["nodes"]["pod-0"]["networkEndpoints"][0]["ipAddress"]
    starts = sorted(place.starts(), key=lambda start: start["process"])
    homes = [start["home"].split("nodes/")[1] for start in starts]
    assert homes == ["pod-0/w0", "pod-0/w1", "pod-1/w0", "pod-1/w1"]
    for number, start in enumerate(starts):
        environment = start["environment"]
        assert environment["JAX_NUM_PROCESSES"] == "4"
        assert environment["MEGASCALE_NUM_SLICES"] == "2"
        assert environment["MEGASCALE_SLICE_ID"] == str(number // 2)
        assert environment["MEGASCALE_COORDINATOR_ADDRESS"] == f"{first}:8081"


def test_a_lost_host_is_no_reason_for_a_new_pod(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    (victim,) = [start["pid"] for start in pod.starts() if start["process"] == 1]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(pod.jobs()) == 2, "another try")
    _, errors = pod.finish(process)
    assert "pod worker 0 lost another one" in errors
    assert "pod worker 1 was killed by signal 9 (exit code 137), most often for lack of" in errors
    assert len(pod.cloud.calls("queued-resources create")) == 1


# A command as `memphis train` is: a guard, whose child is what takes the memory.
GUARDED = """
import os, sys
from memphis_jax import hosts
child = "import os, time; os.environ['JAX_PROCESS_ID'] == '1' and os.kill(os.getpid(), 9)"
child += "; time.sleep(99)"
sys.exit(hosts.guard(hosts.from_environment(), [sys.executable, "-c", child]))
"""


def test_a_killed_child_of_a_guard_is_named_with_the_likely_cause(pod: Place) -> None:
    (pod.bucket / "guarded.py").write_text(GUARDED)
    result = pod.call(
        "tpu_run.sh", "pod", "--tries", "1", "--", "python", str(pod.mount / "guarded.py")
    )
    assert result.returncode == 76
    (line,) = [line for line in result.stderr.splitlines() if "lost another one" in line]
    told = (
        r"tpu_run.sh: process 1 of 2 \(.+\) was killed by signal 9, most often for lack of memory"
    )
    assert re.match(told, line) and line.count("was killed") == 1


def test_a_job_that_was_killed_whole_is_no_lost_connection(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    job = pod.cloud.folder / "nodes" / "pod" / "w1" / "memphis" / "job"
    os.killpg(int((job / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: len(pod.jobs()) == 2, "another try")
    pod.control()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "pod worker 1 has lost its job: restarted, or all its processes killed" in errors


@pytest.mark.parametrize("ends", [False, True])
def test_a_job_whose_connection_is_lost_is_followed_to_its_end(pod: Place, ends: bool) -> None:
    """A guard says "memphis: ..." as tpu_remote.sh does where it cannot run the job.

    `ends`: the job ends before a new connection is made.
    """
    process = pod.run_and_wait_at(2)
    pod.control(hold=2, say="memphis: process 0 of 2 is gone")
    logs = [pod.kept / "logs" / pod.jobs()[0] / f"pod-worker{number}.log" for number in (0, 1)]
    wait_for(lambda: all("is gone\n" in path.read_text() for path in logs), "the line")
    pod.cloud.pause("compute tpus tpu-vm ssh")
    calls = len(pod.cloud.calls("tpu-vm ssh"))
    wait_for(
        lambda: pod.cloud.cut("pod") is None or len(pod.cloud.calls("tpu-vm ssh")) > calls,
        "the end of gcloud's patience",
    )
    if ends:
        pod.control()
        homes = [pod.cloud.folder / "nodes" / "pod" / f"w{number}" for number in (0, 1)]
        wait_for(lambda: all((home / "memphis/job/exit").exists() for home in homes), "its end")
    pod.cloud.pause("")
    if not ends:
        wait_for(lambda: len(pod.cloud.calls("tpu_remote.sh run")) == 4, "new followers")
    _, errors = pod.finish(process)
    assert "the connection to pod worker 0 was lost" in errors
    assert ("it has ended meanwhile" if ends else "it runs already: following it") in errors
    assert len(pod.starts()) == 2
    lines = [line for line in logs[0].read_text().splitlines() if "is gone" not in line]
    assert lines == [*(f"process 0: step {n}" for n in range(STEPS)), "[exit code 0]"]


def test_an_error_of_the_command_ends_it_with_the_log_of_the_first_that_failed(pod: Place) -> None:
    pod.control(fail=[1, 3])
    result = pod.run()
    assert result.returncode == 3
    assert len(pod.jobs()) == 1
    head, _, tail = result.stderr.partition("pod worker 1 failed with exit code 3")
    assert "logs: " in head and "pod-worker1.log:\n" in tail
    shown = tail.splitlines()[1:]
    assert shown == [
        *(f"line {n}" for n in range(22, 40)),
        "Process 1 cannot go on",
        "[exit code 3]",
    ]


def test_a_cut_connection_starts_nothing_twice(pod: Place) -> None:
    """gcloud runs the command again by itself: that must follow the job, not start another."""
    process = pod.run_and_wait_at(2)
    assert pod.cloud.cut("pod") == 2
    time.sleep(1)
    assert pod.cloud.cut("pod") == 2
    output, _ = pod.finish(process)
    assert len(pod.starts()) == 2
    assert output.splitlines() == [f"process 0: step {n}" for n in range(STEPS)]


def test_what_was_under_way_when_a_connection_was_cut_comes_with_the_next(pod: Place) -> None:
    """Half a line has arrived, and what the job printed after it is lost with the connection."""
    process = pod.run_and_wait_at(1)
    log = pod.kept / "logs" / pod.jobs()[0] / "pod-worker0.log"
    wait_for(lambda: log.read_text() == "process 0: step 0\n", "the first line")
    pod.cloud.stalled.touch()
    pod.control(hold=3)
    wait_for(lambda: pod.steps() == 3, "more lines")
    time.sleep(1)  # they are printed on the worker
    assert pod.cloud.cut("pod") == 2
    pod.cloud.stalled.unlink()
    output, _ = pod.finish(process)
    lines = [f"process 0: step {n}" for n in range(STEPS)]
    assert output.splitlines() == lines
    assert log.read_text().splitlines() == [*lines, "[exit code 0]"]


def test_after_kill_9_here_the_same_command_follows_the_job(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    process.kill()
    process.communicate(timeout=10)  # returns: nothing that it started keeps the pipes open
    assert pod.is_running()
    other = pod.call("tpu_run.sh", "pod", "--", "python", "-m", "other")
    assert (
        other.returncode == 1
        and "another command runs on pod worker 0 pod worker 1" in other.stderr
    )
    assert "a job runs on pod" in pod.call("tpu_setup.sh", "pod").stderr
    assert f"runs job {pod.jobs()[0]}" in pod.ok("tpu_status.sh", "pod").stdout
    process = pod.start("tpu_run.sh", "pod", "--", *pod.command)
    time.sleep(2)
    pod.control()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "it runs already: following it" in errors
    pod.check_finished()
    assert len(pod.starts()) == 2
    log = pod.kept / "logs" / pod.jobs()[0] / "pod-worker0.log"
    assert log.read_text().splitlines() == [
        *(f"process 0: step {n}" for n in range(STEPS)),
        "[exit code 0]",
    ]


def test_paths_that_the_workers_do_not_see_are_refused(pod: Place) -> None:
    outside = pod.folder / "data.jsonl"
    outside.touch()
    for word in (str(outside), f"--data={outside}", "tpu/pod/options"):
        message = error_of(pod, "tpu_run.sh", "pod", "--", "python", word)
        assert f"{word.removeprefix('--data=')} is not below {pod.mount}" in message
    for words in (["--workdir", "runs/new"], ["--workdir=runs/new"], ["--init", "runs/new"]):
        message = error_of(pod, "tpu_run.sh", "pod", "--", "python", *words)
        assert f"runs/new is not below {pod.mount}" in message
    message = error_of(pod, "tpu_run.sh", "pod", "--", "python", "--workdir", "gs://bucket/x")
    assert f"gs://bucket/x: give {pod.mount}/NAME" in message
    assert "must begin with an interpreter" in error_of(pod, "tpu_run.sh", "pod", "--", "ls", "-l")
    assert "no command" in error_of(pod, "tpu_run.sh", "pod", "--")
    assert "--tries 0 is not" in error_of(pod, "tpu_run.sh", "pod", "--tries", "0", "--", "python")
    assert "expected NAME=VALUE" in error_of(pod, "tpu_run.sh", "pod", "--env", "A", "--", "python")
