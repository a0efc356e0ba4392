"""What launch/ prints: dry runs, --help, refusals of recipe.sh; is the stand-in as strict?"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from fake_gcloud import parser, read_flags
from launched import REPO, Place, error_of

pytest_plugins = ["launch_fixtures"]
pytestmark = pytest.mark.slow

HAS_GCLOUD = shutil.which("gcloud") is not None
needs_gcloud = pytest.mark.skipif(not HAS_GCLOUD, reason="needs the real gcloud on PATH")


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
        ("tpu_delete.sh", ["pod", "--force"]),
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
    assert sum("tpu_remote.sh stop 60" in run for run in runs) == 2  # run --stop, delete --force


def test_a_dry_run_of_a_recipe_needs_no_pod(bare: Place) -> None:
    """All that the first call would do, by a machine that has never heard of the pod."""
    new = ("--type=v4-16", "--bucket=gs://bucket", f"--mount={bare.mount}", "--spot")
    run = ("--config", str(REPO / "configs/tiny.py"), "--workdir", f"{bare.mount}/run")
    result = bare.ok("recipe.sh", "pod", *new, *run, "--delete", "--dry-run")
    calls = [shlex.split(line.removeprefix("+ ")) for line in result.stdout.splitlines()]
    steps = ["create pod", "scp", "memphis_jax rounds", "delete pod"]
    found = [step for call in calls for step in steps if step in " ".join(call)]
    assert list(dict.fromkeys(found)) == steps and found.count("scp") == 2  # two workers
    assert {"--zone=ZONE", "--project=PROJECT", "--force"} <= set(calls[-1])
    assert not bare.cloud.calls() and not (bare.folder / "tpu").exists()
    zone = bare.ok("recipe.sh", "pod", *new, "--zone=z", *run, "--delete", "--dry-run").stdout
    assert "--zone=z" in zone.splitlines()[-1] and "ZONE" not in zone


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
