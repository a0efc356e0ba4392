"""launch/tpu_*.sh against a stand-in for the cloud: a pod is created, set up, and deleted.

The cloud has gcloud's strict flags, and ssh to processes of this machine (tests/fake_gcloud).
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from launched import BUCKET, REPO, TYPE, Place, error_of

pytest_plugins = ["launch_fixtures"]
pytestmark = pytest.mark.slow

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
    ("first", "then", "message"),
    [
        ((), ("--spot",), "on demand, not spot"),
        (("--spot",), (), "spot, not on demand"),
        (("--service-account=a@b",), (), "service account a@b, not the default service account"),
        (("--internal-ips",), (), "internal addresses, not external addresses"),
        ((), ("--runtime-version=r",), "runtime tpu-ubuntu2204-base, not runtime r"),
        (
            ("--create-flag=--labels=a=b", "--service-account=a@b"),
            ("--create-flag=--labels=a=c", "--service-account=c@d"),
            "service account a@b, not service account c@d; flags --labels=a=b, not flags "
            "--labels=a=c",
        ),
    ],
)
def test_a_pod_that_exists_is_not_taken_for_another(
    bare: Place, first: tuple[str, ...], then: tuple[str, ...], message: str
) -> None:
    bare.create(*first)
    kept = (bare.kept / "options").read_text()
    other = ("pod", *TYPE, *BUCKET, "--mount", str(bare.mount), *then)
    told = error_of(bare, "tpu_create.sh", *other)
    assert f": pod exists: {message}. Choose another name, or 'launch/tpu_delete.sh pod'" in told
    assert (bare.kept / "options").read_text() == kept  # what it is, is not forgotten
    bare.create(*first)


def test_a_pod_of_another_machine_stays_what_it_is_and_says_so(bare: Place) -> None:
    """As after the loss of the controller: nothing is known here, so the cloud is asked."""
    bare.create("--service-account=a@b")
    same = ("pod", *TYPE, *BUCKET, "--mount", str(bare.mount), "--service-account=a@b")
    forget = bare.kept / "options"
    forget.unlink()
    result = bare.ok("tpu_create.sh", *same)
    assert "note" not in result.stderr and "is ACTIVE" in result.stderr
    forget.unlink()
    result = bare.ok("tpu_create.sh", *same[:-1], "--spot", "--service-account=c@d")
    stays = "it stays so until it is requested anew"
    assert f"note: pod exists, on demand, not spot: {stays}\n" in result.stderr
    assert f"note: pod exists, with service account a@b, not c@d: {stays}\n" in result.stderr
    forget.unlink()
    for other in (("--type", "v4-8"), (*TYPE, "--slices=2")):  # not for one that lost its nodes
        told = error_of(bare, "tpu_create.sh", "pod", *other, *BUCKET)
        wanted = "1 x v4-8" if "v4-8" in other else "2 x v4-16"
        assert f"pod exists: 1 x v4-16, not {wanted}. Choose another name" in told
    assert not bare.cloud.calls("delete")
    assert not forget.exists() and len(bare.cloud.calls("queued-resources create")) == 1


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


def test_what_a_dead_gcsfuse_leaves_is_unmounted_first(pod: Place) -> None:
    """A real mount whose server is gone: "Transport endpoint is not connected", for mkdir too."""
    pod.mount.unlink()
    leave_dead_mount(pod.mount)
    try:
        with pytest.raises(OSError, match="not connected"):
            pod.mount.stat()
        assert "the bucket is not mounted" in pod.ok("tpu_status.sh", "pod").stdout
        run = ("--config", str(REPO / "configs/tiny.py"), "--workdir", f"{pod.mount}/run")
        told = (
            f"fusermount -uz {pod.mount} && gcsfuse --metadata-cache-ttl-secs=0 bucket {pod.mount}"
        )
        assert told in error_of(pod, "recipe.sh", "pod", *run)
        pod.ok("tpu_setup.sh", "pod")
        assert pod.mount.resolve() == pod.bucket
    finally:
        subprocess.run(["umount", "-l", str(pod.mount)], capture_output=True)


def leave_dead_mount(folder: Path) -> None:
    """Mounts a FUSE file system, whose server then goes, as a gcsfuse that was killed."""
    folder.mkdir()
    libc = ctypes.CDLL(None)
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        skip_unless_ci(f"needs FUSE: {error}")
    options = f"fd={server},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    failed = libc.mount(b"bucket", os.fsencode(folder), b"fuse.gcsfuse", 0, options.encode())
    os.close(server)
    if failed:
        skip_unless_ci("needs the right to mount")


def skip_unless_ci(told: str) -> NoReturn:
    (pytest.fail if os.environ.get("MEMPHIS_CI") else pytest.skip)(told)
    raise AssertionError


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
    bare.environment["MEMPHIS_COORDINATOR_PORT"] = str(20000 + 2 * (os.getpid() % 6000))
    bare.create()
    result = bare.call("tpu_setup.sh", "pod")
    assert result.returncode == 1
    assert "8 devices were expected" in result.stderr and "6 devices (cpu)" in result.stderr
    assert "not set up" in bare.ok("tpu_status.sh", "pod").stdout


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
