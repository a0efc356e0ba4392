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


@pytest.mark.parametrize(("grace", "request_state"), [(0.0, "ACTIVE"), (3.0, "SUSPENDED")])
def test_a_preempted_pod_is_replaced_set_up_and_goes_on(
    pod: Place, grace: float, request_state: str
) -> None:
    """With time to save, and without."""
    with pod.cloud.state() as state:
        state["seconds_of_grace"] = grace
    process = pod.run_and_wait_at(2)
    before = len(pod.cloud.calls())
    pod.cloud.preempt("pod", request_state)
    pod.control()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    pod.check_finished()
    assert len(pod.jobs()) == 2 and "process 0: step 4" in output
    if grace:
        assert "preempted, saved" in output
    verbs = [" ".join(call[2:4]) for call in pod.cloud.calls()[before:]]
    order = ["queued-resources delete", "queued-resources create", "tpu-vm scp"]
    assert [verb for verb in dict.fromkeys(verbs) if verb in order] == order
    assert verbs.count("queued-resources create") == 1
    assert re.search("pod: (node pod is PREEMPTED|SUSPENDED)", errors)


def test_a_lost_host_is_no_reason_for_a_new_pod(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    (victim,) = [start["pid"] for start in pod.starts() if start["process"] == 1]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(pod.jobs()) == 2, "another try")
    pod.control()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    pod.check_finished()
    assert "pod worker 0 lost another one" in errors
    assert "pod worker 1 was killed (exit code 137)" in errors
    assert len(pod.cloud.calls("queued-resources create")) == 1


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
    pod.control()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    pod.check_finished()
    assert len(pod.starts()) == 2
    assert output.splitlines() == [f"process 0: step {n}" for n in range(STEPS)]


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
    assert [line for line in log.read_text().splitlines() if line] == [
        *(f"process 0: step {n}" for n in range(STEPS)),
        "[exit code 0]",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_here_stops_the_job_there(pod: Place, number: signal.Signals) -> None:
    process = pod.run_and_wait_at(2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "a checkpoint is saved" in errors and "stopped; the same command" in errors
    assert not pod.is_running()
    pod.control()
    assert pod.run().returncode == 0
    pod.check_finished()


def test_an_interruption_while_it_waits_for_a_pod(pod: Place) -> None:
    with pod.cloud.state() as state:
        state["queue"] = ["WAITING_FOR_RESOURCES"] * 1000
    pod.ok("tpu_delete.sh", "pod")
    process = pod.start("tpu_run.sh", "pod", "--", *pod.command)
    wait_for(lambda: len(pod.cloud.calls("queued-resources create")) == 2, "the request")
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "there is none" in errors


def test_maintenance_and_a_cloud_that_cannot_be_asked(pod: Place) -> None:
    with pod.cloud.state() as state:
        state["nodes"]["pod"]["state"] = "REPAIRING"
    process = pod.start("tpu_run.sh", "pod", "--", *pod.command)
    assert process.stderr is not None
    assert "node pod is REPAIRING; waiting" in process.stderr.readline()
    pod.control(hold=2)
    describe = "compute tpus queued-resources describe"
    with pod.cloud.state() as state:
        state["nodes"]["pod"]["state"] = "READY"
    wait_for(lambda: pod.steps() == 2, "step 2")
    with pod.cloud.state() as state:
        state["deny"] = {describe: "gcloud crashed (ConnectionError): Network is unreachable"}
    asked = len(pod.cloud.calls(describe))
    wait_for(lambda: len(pod.cloud.calls(describe)) > asked + 1, "two looks in vain")
    with pod.cloud.state() as state:
        state["deny"] = {}
    pod.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    pod.check_finished()
    assert len(pod.jobs()) == 1 and len(pod.cloud.calls("queued-resources create")) == 1


# What gcloud says where the network is gone while its token is renewed.
REFRESH = (
    "There was a problem refreshing your current auth tokens: HTTPSConnectionPool(host='x'): Max "
    "retries exceeded\nPlease run:\n  $ gcloud auth login\n  $ gcloud config set account ACCOUNT"
)


@pytest.mark.parametrize("said", [REFRESH, "gcloud crashed (X): HTTP 503 for project 1403266"])
def test_a_network_outage_is_no_lack_of_permission(pod: Place, said: str) -> None:
    process = pod.run_and_wait_at(2)
    describe = "compute tpus queued-resources describe"
    with pod.cloud.state() as state:
        state["deny"] = {describe: said}
    asked = len(pod.cloud.calls(describe))
    wait_for(lambda: len(pod.cloud.calls(describe)) > asked + 1, "two looks in vain")
    with pod.cloud.state() as state:
        state["deny"] = {}
    pod.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    pod.check_finished()


def test_a_deleted_pod_is_not_requested_again_by_what_ran_there(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    pod.ok("tpu_delete.sh", "pod", "--force")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pod was deleted with launch/tpu_delete.sh" in errors
    assert len(pod.cloud.calls("queued-resources create")) == 1


@pytest.mark.parametrize("command", ["queued-resources create", "accelerator-types list"])
def test_a_pod_deleted_while_it_is_requested_anew_does_not_come_back(
    pod: Place, command: str
) -> None:
    """Its request takes a while to reach the cloud, which has none then: deleting says "gone"."""
    process = pod.run_and_wait_at(2)
    before = len(pod.cloud.calls(command))
    with pod.cloud.state() as state:
        state["pause"] = f"compute tpus {command}"
    pod.cloud.preempt("pod")
    wait_for(lambda: len(pod.cloud.calls(command)) > before, "the call on its way")
    pod.ok("tpu_delete.sh", "pod")
    with pod.cloud.state() as state:
        state["pause"] = ""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pod was deleted with launch/tpu_delete.sh" in errors
    with pod.cloud.state() as state:
        assert not state["requests"]
    if "create" not in command:
        assert len(pod.cloud.calls("queued-resources create")) == 1
    pod.control()
    assert pod.run().returncode == 0  # given after it, the same command requests the pod again


def test_a_worker_that_cannot_be_reached_is_not_called_stopped(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    process.kill()
    process.communicate(timeout=10)
    with pod.cloud.state() as state:
        state["deny"] = {"compute tpus tpu-vm ssh": "no route to host"}
    stopped = pod.call("tpu_run.sh", "pod", "--stop")
    assert stopped.returncode == 1 and "pod worker 0 cannot be reached" in stopped.stderr
    deleted = pod.call("tpu_delete.sh", "pod")
    assert deleted.returncode == 1 and "is not known, it cannot be reached" in deleted.stderr
    assert pod.is_running()


def test_a_request_in_vain_is_repeated(pod: Place) -> None:
    create = "compute tpus queued-resources create"
    process = pod.run_and_wait_at(2)
    with pod.cloud.state() as state:
        state["deny"] = {create: "UNAVAILABLE: The service is currently unavailable."}
    pod.cloud.preempt("pod", "SUSPENDED")
    wait_for(lambda: len(pod.cloud.calls(create)) > 1, "a request in vain")
    with pod.cloud.state() as state:
        state["deny"] = {}
    pod.control()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    pod.check_finished()


def test_stop(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    process.kill()
    process.communicate(timeout=10)
    assert "nothing runs on pod" in pod.ok("tpu_run.sh", "pod", "--stop").stderr
    assert not pod.is_running()


def test_tries_are_bounded_unless_there_is_a_new_checkpoint(pod: Place) -> None:
    pod.control(code=76)
    result = pod.run("--tries", "2")
    assert result.returncode == 76
    assert "gave up after 2 tries without a new checkpoint" in result.stderr
    assert len(pod.jobs()) == 2
    process = pod.run_and_wait_at(1, "--tries", "1")
    pod.control(code=76)
    wait_for(lambda: len(pod.jobs()) == 4, "the try after a checkpoint")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 76 and "gave up after 1 tries" in errors


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
