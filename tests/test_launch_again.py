"""launch/tpu_run.sh against a stand-in for the cloud: pods that go, interruptions, deletions."""

import re
import signal

import pytest
from launched import Place, wait_for

pytest_plugins = ["launch_fixtures"]
pytestmark = pytest.mark.slow


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
    output, errors = pod.finish(process)
    assert len(pod.jobs()) == 2 and "process 0: step 4" in output
    if grace:
        assert "preempted, saved" in output
    verbs = [" ".join(call[2:4]) for call in pod.cloud.calls()[before:]]
    order = ["queued-resources delete", "queued-resources create", "tpu-vm scp"]
    assert [verb for verb in dict.fromkeys(verbs) if verb in order] == order
    assert verbs.count("queued-resources create") == 1
    assert re.search("pod: (node pod is PREEMPTED|SUSPENDED)", errors)


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
    pod.finish(process)
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
    pod.finish(process)


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
    pod.cloud.pause(f"compute tpus {command}")
    pod.cloud.preempt("pod")
    wait_for(lambda: len(pod.cloud.calls(command)) > before, "the call on its way")
    pod.ok("tpu_delete.sh", "pod")
    pod.cloud.pause("")
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
    pod.finish(process)


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
