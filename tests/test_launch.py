"""launch/tpu_*.sh against a stand-in for the cloud: strict flags, ssh to processes of this machine.

The trainer is a stand-in here that follows the exit codes of `memphis train`; the real recipe goes
through the same scripts in test_launch_recipe.py.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_gcloud import parser, read_flags
from fake_gcloud.cloud import Cloud
from launched import REPO, STEPS, Place, copy_checkout, copy_of, wait_for

pytestmark = pytest.mark.slow

HAS_GCLOUD = shutil.which("gcloud") is not None
needs_gcloud = pytest.mark.skipif(not HAS_GCLOUD, reason="needs the real gcloud on PATH")


CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}  # a host of v4 has four chips


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def bare(tmp_path: Path, checkout: Path) -> Iterator[Place]:
    """A cloud without a TPU."""
    place = Place(tmp_path / "place", checkout)
    Cloud.make(place.cloud.folder, CPU)
    yield place
    place.close()


def set_up_pod(place: Place, *options: str) -> str:
    """What setting up said on stdout."""
    Cloud.make(place.cloud.folder, CPU)
    place.environment["MEMPHIS_COORDINATOR_PORT"] = str(20000 + 2 * (os.getpid() % 10000))
    place.create("--spot", *options)
    output = place.ok("tpu_setup.sh", "pod").stdout
    place.prepare()
    return output


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("template") / "place", checkout)
    assert "8 devices (cpu), 4 on this worker" in set_up_pod(place)
    yield place
    place.close()


@pytest.fixture
def pod(template: Place, tmp_path: Path) -> Iterator[Place]:
    """A spot pod of two workers that is set up."""
    place = copy_of(template, tmp_path / "place")
    yield place
    place.close()


# -------------------------------------------------------------------- creating


def test_a_request_waits_in_the_queue_and_a_pod_that_exists_stays(bare: Place) -> None:
    with bare.cloud.state() as state:
        state["queue"] = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    result = bare.create("--spot", "--give-up-after=6h", "--create-flag=--labels=team=a")
    assert "WAITING_FOR_RESOURCES" in result.stderr and "2 workers, 8 devices" in result.stderr
    (call,) = bare.cloud.calls("queued-resources create")
    assert call == [
        *("compute", "tpus", "queued-resources", "create", "pod"),
        *("--zone=us-east5-b", "--project=my-project", "--accelerator-type=v4-16"),
        *("--runtime-version=tpu-ubuntu2204-base", "--node-id=pod", "--spot"),
        *("--valid-until-duration=6h", "--labels=team=a", "--quiet"),
    ]
    again = bare.ok("tpu_create.sh", "pod", "--again")
    assert "is ACTIVE" in again.stderr
    assert len(bare.cloud.calls("queued-resources create")) == 1
    other = ["pod", "--type", "v4-8", "--bucket", "gs://bucket"]
    assert "pod exists: 1 x v4-16 in us-east5-b" in error_of(bare, "tpu_create.sh", *other)
    other = ["pod", "--type", "v4-16", "--slices", "2", "--bucket", "gs://bucket"]
    assert "not 2 x v4-16 in us-east5-b" in error_of(bare, "tpu_create.sh", *other)


@pytest.mark.parametrize(
    ("kind", "runtime"), [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-16", "v2-alpha-tpuv6e")]
)
def test_several_slices_and_the_runtime_of_a_generation(
    bare: Place, kind: str, runtime: str
) -> None:
    result = bare.create("--slices", "2", kind=kind)
    (call,) = bare.cloud.calls("queued-resources create")
    assert {"--node-count=2", "--node-prefix=pod", f"--runtime-version={runtime}"} <= set(call)
    assert "8 workers, 32 devices" in result.stderr


def test_a_request_that_fails_says_why(bare: Place) -> None:
    with bare.cloud.state() as state:
        state["queue"] = [{"failed": "You have reached TPUS-PER-PROJECT limit"}]
    result = bare.call("tpu_create.sh", "pod", "--type", "v6e-8", "--bucket", "gs://bucket")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "pod cannot be had: FAILED: You have reached TPUS-PER-PROJECT limit" in last


def error_of(place: Place, script: str, *words: str) -> str:
    """The one line on stderr of a script that fails before anything is created."""
    before = len(place.cloud.calls("queued-resources create"))
    result = place.call(script, *words)
    assert result.returncode == 1 and result.stdout == "", result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert len(place.cloud.calls("queued-resources create")) == before
    return result.stderr


TYPE, BUCKET = ("--type", "v4-16"), ("--bucket", "gs://bucket")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no name: launch/tpu_create.sh NAME"),
        (("pod", *BUCKET), "no --type"),
        (("pod", *TYPE), "no --bucket"),
        (("Pod_1", *TYPE, *BUCKET), "Pod_1 is no name for a TPU"),
        (("pod", "pod2", *TYPE, *BUCKET), "two names, pod and pod2"),
        (("pod", *TYPE, *BUCKET, "--fast"), "--fast needs a value"),
        (("pod", *TYPE, *BUCKET, "--fast=1"), "unknown option --fast"),
        (("pod", *TYPE, *BUCKET, "--slices", "0"), "--slices 0 is not a number of 1 or more"),
        (("pod", "--type", "v5e", *BUCKET), "--type v5e: expected GENERATION-SIZE"),
        (("pod", "--type", "tpu7x-8", *BUCKET), "through GKE only"),
        (("pod", "--type", "v4-48", *BUCKET), "v4-48 is not among those of zone us-east5-b: v4-8"),
        (("pod", *TYPE, *BUCKET, "--zone", "us-x1-z"), "zone us-x1-z has no TPUs"),
        (("pod", *TYPE, "--bucket", "s3://x"), "--bucket s3://x: expected gs://BUCKET"),
        (("pod", *TYPE, "--bucket", "gs://nothing"), "there is no bucket gs://nothing: gcloud"),
        (("pod", *TYPE, "--bucket", "gs://flat"), "gs://flat has no hierarchical namespace"),
        (("pod", *TYPE, *BUCKET, "--mount", "here"), "--mount here is not an absolute path"),
    ],
)  # fmt: skip
def test_wrong_words_are_said_in_one_line_before_anything_is_created(
    bare: Place, words: tuple[str, ...], message: str
) -> None:
    bare.cloud.add_bucket("flat", hierarchical=False)
    assert message in error_of(bare, "tpu_create.sh", *words)


DENIED = "PERMISSION_DENIED: Permission '{}' denied on resource (or it may not exist)."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"account": ""}, "gcloud has no account: run 'gcloud auth login'"),
        ({"properties": {"compute/zone": "us-east5-b"}}, "no project: give --project"),
        ({"properties": {"project": "my-project"}}, "no zone: give --zone"),
        (
            {"deny": {"compute tpus accelerator-types list": DENIED.format("tpu.locations.get")}},
            "no permission to list TPUs in project my-project",
        ),
        (
            {"deny": {"compute tpus queued-resources describe": DENIED.format("tpu.x.get")}},
            "no permission to look at pod in project my-project",
        ),
        (
            {
                "deny": {
                    "compute tpus accelerator-types list": "PERMISSION_DENIED: Cloud TPU API has "
                    "not been used in project my-project before or it is disabled."
                }
            },
            "gcloud services enable tpu.googleapis.com --project=my-project",
        ),
        (
            {
                "deny": {
                    "storage buckets describe": "[me@example.com] does not have permission to "
                    "access b instance [bucket] (or it may not exist): 403"
                }
            },
            "no permission to read the bucket gs://bucket",
        ),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line_before_anything_is_created(
    bare: Place, change: dict[str, Any], message: str
) -> None:
    with bare.cloud.state() as state:
        state |= change
    assert message in error_of(bare, "tpu_create.sh", "pod", *TYPE, *BUCKET)


def test_a_denied_request_is_said_in_one_line_too(bare: Place) -> None:
    with bare.cloud.state() as state:
        denied = DENIED.format("tpu.queuedResources.create")
        state["deny"] = {"compute tpus queued-resources create": denied}
    result = bare.call("tpu_create.sh", "pod", *TYPE, *BUCKET)
    assert result.returncode == 1
    assert "no permission to create pod in project my-project" in result.stderr
    assert "roles/tpu.admin" in result.stderr.splitlines()[-1]


def test_a_machine_without_gcloud(bare: Place) -> None:
    bare.environment["PATH"] = str(bare.folder / "empty")
    (bare.folder / "empty").mkdir()
    for program in ("bash", "cat", "chmod", "cut", "dirname", "env", "grep", "mktemp", "mkdir",
                    "rm", "sed", "setsid", "sh", "touch", "tr", "sleep"):  # fmt: skip
        found = shutil.which(program)
        assert found, program
        (bare.folder / "empty" / program).symlink_to(found)
    assert "this machine has no gcloud" in error_of(bare, "tpu_create.sh", "pod", *TYPE, *BUCKET)


@pytest.mark.parametrize("script", ["tpu_setup.sh", "tpu_run.sh", "tpu_status.sh", "tpu_delete.sh"])
def test_a_pod_that_is_not_known_here(bare: Place, script: str) -> None:
    assert "nothing is known here of a TPU called nopod" in error_of(
        bare, script, "nopod", "--dry-run"
    )
    assert f"no name: launch/{script} NAME" in error_of(bare, script)


# -------------------------------------------------------------------- setting up


def test_the_wheel_is_installed_and_the_bucket_mounted_once(pod: Place) -> None:
    for worker in (0, 1):
        home = pod.cloud.folder / "nodes" / "pod" / f"w{worker}"
        source = pod.checkout / "memphis_jax" / "errors.py"
        installed = home / "memphis" / "site" / "memphis_jax" / "errors.py"
        assert installed.read_bytes() == source.read_bytes()
        assert (installed.parent / "report.html.jinja").exists()
        assert (home / "memphis" / "site" / "convert").is_dir()
    before = len(pod.cloud.calls())
    assert "pod has this checkout" in pod.ok("tpu_setup.sh", "pod").stderr
    verbs = [call[3] for call in pod.cloud.calls()[before:]]
    assert "scp" not in verbs
    pod.mount.unlink()  # as after a restart of a worker
    pod.mount.mkdir()
    pod.ok("tpu_setup.sh", "pod")
    assert pod.mount.is_symlink()


def test_a_bucket_that_the_workers_may_not_mount(pod: Place) -> None:
    pod.mount.unlink()
    pod.mount.mkdir()
    pod.bucket.rename(pod.bucket.with_name("moved"))
    result = pod.call("tpu_setup.sh", "pod")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "pod worker 0: gcsfuse cannot mount bucket: Error: bucket bucket does not exist" in last


def test_a_missing_device_is_noticed(bare: Place) -> None:
    with bare.cloud.state() as state:
        state["environment"]["JAX_NUM_CPU_DEVICES"] = "3"
    bare.environment["MEMPHIS_COORDINATOR_PORT"] = str(20000 + 2 * (os.getpid() % 10000))
    bare.create()
    result = bare.call("tpu_setup.sh", "pod")
    assert result.returncode == 1
    assert "8 devices were expected" in result.stderr and "6 devices (cpu)" in result.stderr
    assert "not set up" in bare.ok("tpu_status.sh", "pod").stdout


# -------------------------------------------------------------------- running


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


# -------------------------------------------------------------------- deleting


def test_deleting(pod: Place) -> None:
    process = pod.run_and_wait_at(2)
    process.kill()
    process.communicate(timeout=10)
    assert "a job runs on pod worker 0" in error_of(pod, "tpu_delete.sh", "pod")
    result = pod.ok("tpu_delete.sh", "pod", "--force")
    assert "stopping the job" in result.stderr and "pod is deleted" in result.stderr
    assert not pod.is_running() and pod.bucket.is_dir()
    log = pod.cloud.folder / "nodes" / "pod"
    assert not log.exists()
    assert "pod is gone already" in pod.ok("tpu_delete.sh", "pod").stderr
    assert "gone, there is none" in pod.ok("tpu_status.sh", "pod").stdout


# -------------------------------------------------------------------- words


def dry_runs(place: Place) -> list[list[str]]:
    """The commands that every script prints under --dry-run, without the "+"."""
    before, lines = len(place.cloud.calls()), []
    options = ["--type=v5litepod-16", "--bucket=gs://bucket", f"--mount={place.mount}", "--spot"]
    config = ["--config", str(REPO / "configs/tiny.py"), "--workdir", f"{place.mount}/run"]
    for script, words in (
        ("tpu_create.sh", ["new", *options, "--slices=2", "--internal-ips"]),
        ("tpu_create.sh", ["new", *options, "--zone=z", "--project=p", "--service-account=a@b"]),
        ("tpu_setup.sh", ["pod"]),
        ("tpu_run.sh", ["pod", "--env", "A=b c", "--", *place.command]),
        ("tpu_run.sh", ["pod", "--stop"]),
        ("tpu_status.sh", ["pod"]),
        ("tpu_delete.sh", ["pod"]),
        ("recipe.sh", ["pod", *config, "--gpu", "me@gpu1 --port 22", "--delete"]),
    ):
        result = place.ok(script, *words, "--dry-run") if "--" not in words else place.ok(
            script, words[0], "--dry-run", *words[1:]
        )  # fmt: skip
        assert result.stdout.startswith("+ "), script
        lines += result.stdout.splitlines()
    assert len(place.cloud.calls()) == before and not (place.folder / "tpu" / "new").exists()
    assert all(line.startswith("+ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


def test_a_dry_run_prints_every_command_and_contacts_nobody(pod: Place) -> None:
    calls = dry_runs(pod)
    for call in calls:
        if call[0] == "gcloud":
            parser.parse(call[1:])
    runs = [call[-1].removeprefix("--command=") for call in calls if "--worker=1" in call]
    (line,) = [line for line in runs if " run ID " in line and "trainer.py" in line]
    words = shlex.split(line)
    assert words[words.index("--") + 1 :] == pod.command and "A=b c" in words
    (rounds,) = [call for call in calls if "memphis_jax" in call]
    prefix = next(w for w in rounds if w.startswith("--config.executor.train=")).partition("=")[2]
    assert shlex.split(prefix) == [str(pod.checkout / "launch" / "tpu_run.sh"), "pod", "--"]
    generate = next(w for w in rounds if w.startswith("--config.executor.generate="))
    assert generate.endswith("gpu_generate.sh me@gpu1 --port 22 --")
    assert calls[-1][4:6] == ["delete", "pod"]


@needs_gcloud
def test_the_real_gcloud_takes_every_command(pod: Place) -> None:
    calls = [shlex.join(call) for call in dry_runs(pod) if call[0] == "gcloud"]
    verdicts = read_flags.lint(calls)
    wrong = [
        (row["command_string"], row["error_message"]) for row in verdicts if not row["success"]
    ]
    assert not wrong and len(verdicts) == len(set(calls))


@needs_gcloud
def test_the_stand_in_has_the_flags_of_the_real_gcloud() -> None:
    saved = parser.TABLE
    found = json.loads(json.dumps(read_flags.table()))
    for name in read_flags.COMMANDS:
        flags = {leaf["name"] for leaf in parser._leaves(saved[name])}
        assert flags <= {leaf["name"] for leaf in parser._leaves(found[name])}, name


@needs_gcloud
def test_the_commands_of_the_documentation_are_real() -> None:
    text = (REPO / "docs" / "tpu.md").read_text().replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.startswith("    gcloud ")]
    found += re.findall(r"`(gcloud (?:auth|compute|config|services|storage) [^`]*)`", text)
    assert len(found) > 5
    for row in read_flags.lint([re.sub(r"\s+", " ", line) for line in found]):
        assert row["success"], (row["command_string"], row["error_message"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "compute tpus queued-resources create x --accelerator-type=a --node-id=x",
            "argument --runtime-version: Must be specified",
        ),
        (
            "compute tpus queued-resources create x --accelerator-type=a --runtime-version=r",
            "Exactly one of (--node-count | --node-prefix | --node-id) must be specified",
        ),
        (
            "compute tpus queued-resources create x --accelerator-type=a --runtime-version=r "
            "--node-id=x --node-count=2",
            "Exactly one of",
        ),
        ("compute tpus queued-resources delete x --forced", "unrecognized arguments: --forced"),
        ("compute tpus queued-resources delete x y", "unrecognized arguments: y"),
        ("compute tpus tpu-vm ssh x --worker", "expected one argument"),
        ("compute tpus tpu-vm ssh x --strict-host-key-checking=maybe", "Invalid choice"),
        ("compute tpus tpu-vm scp x", "Must be specified"),
        ("compute tpus tpu-vm exec x", "Invalid choice"),
    ],
)
def test_the_stand_in_is_as_strict_as_gcloud(words: str, message: str) -> None:
    with pytest.raises(parser.UsageError, match=re.escape(message)):
        parser.parse(words.split())
    if HAS_GCLOUD and "exec" not in words:
        (verdict,) = read_flags.lint([f"gcloud {words}"])
        assert not verdict["success"]


def test_help_teaches(bare: Place) -> None:
    launch = bare.checkout / "launch"
    for script in sorted([*launch.glob("tpu_*.sh"), launch / "recipe.sh"]):
        if not os.access(script, os.X_OK) or script.name == "tpu_remote.sh":
            continue
        result = bare.ok(script.name, "--help")
        assert result.stdout.startswith(f"usage: launch/{script.name} NAME") and not result.stderr


def test_recipe_refuses_what_cannot_work(bare: Place) -> None:
    config = ("--config", str(REPO / "configs" / "tiny.py"))
    run = ("--workdir", str(bare.mount / "run"))
    new = ("--type", "v4-16", "--bucket", "gs://bucket", "--mount", str(bare.mount))
    for words, message in (
        ((), "no name"),
        (("pod", *run), "no --config"),
        (("pod", "--config", "none.py", *run), "--config none.py: no such file"),
        (("pod", *config), "no --workdir"),
        (("pod", *config, "--workdir", "runs/x", *new), "--workdir runs/x is not below"),
        (("pod", *config, *run, *new), f"{bare.mount} is not mounted on this machine: gcsfuse"),
        (("pod", *config, *run, "--fast=1"), "unknown option --fast"),
    ):
        assert message in error_of(bare, "recipe.sh", *words)


def test_recipe_refuses_a_config_that_does_not_fit_the_pod(bare: Place) -> None:
    bare.mount.symlink_to(bare.bucket)
    new = ("--type", "v4-16", "--bucket", "gs://bucket", "--mount", str(bare.mount))
    run = ("--config", str(REPO / "configs" / "tiny.py"), "--workdir", str(bare.mount / "run"))
    for words, message in (
        (("--config.sft.batch_size=12",), "a micro-batch of 12 (batch_size 12 / accumulation 1)"),
        (("--config.mesh.data=16",), "8 devices do not divide by 16"),
        (("--config.mesh.model=4", "--config.sft.batch_size=8"), "num_attention_heads = 2 is not"),
        (("--config.sft.batchsize=8",), "batchsize"),
        (("--config.start.hf_folder=none",), "there is no none/config.json"),
    ):
        assert message in error_of(bare, "recipe.sh", "pod", *new, *run, *words)
    assert not bare.cloud.calls()


def test_the_stand_in_prints_values_as_gcloud_does(bare: Place) -> None:
    bare.create()
    describe = [str(REPO / "tests/fake_gcloud/bin/gcloud"), "compute", "tpus", "tpu-vm", "describe"]
    form = "--format=value(state,nothing,networkEndpoints[].ipAddress)"
    result = subprocess.run(
        [*describe, "pod", form], env=bare.variables(), capture_output=True, text=True
    )
    with bare.cloud.state() as state:
        ends = [end["ipAddress"] for end in state["nodes"]["pod"]["networkEndpoints"]]
    assert result.stdout == f"READY\t\t{';'.join(ends)}\n"  # seen with gcloud 528's own printer
    assert sys.executable
