"""The tiny recipe by launch/recipe.sh: two workers, real jax.distributed, preempted, replaced."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_gcloud.cloud import Cloud
from launched import REPO, Place, copy_checkout, wait_for

pytestmark = pytest.mark.slow

SMALL = [  # a few seconds of each stage
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_hidden_layers=2",
    "--config.data.num_train=1200",
    "--config.data.num_validation=12",
    "--config.data.num_test=12",
    "--config.sft.epochs=2",
    "--config.sft.batch_size=8",
    "--config.sft.checkpoint_every=20",
    "--config.sft.log_every=10",
    "--config.mesh.data=4",
    "--config.mesh.fsdp=2",
    "--config.generate.questions_per_round=40",
    "--config.generate.num_samples=4",
    "--config.rounds.num_rounds=1",
    "--config.rounds.eval_samples=2",
]


def new_place(folder: Path, checkout: Path, port: int) -> Place:
    place = Place(folder, checkout)
    # Eight devices in all, four on each of two workers, as v4-16 has. What one pod has compiled,
    # the next finds: most of the time would go to it.
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "xla")
    Cloud.make(place.cloud.folder, environment)
    place.mount.symlink_to(place.bucket)  # mounted here too
    place.environment |= {
        "MEMPHIS_COORDINATOR_PORT": str(port),
        "MEMPHIS_HEARTBEAT_SECONDS": "20",
        "JAX_PLATFORMS": "cpu",
    }
    return place


def words(place: Place) -> list[str]:
    create = ["--type=v4-16", "--bucket=gs://bucket", f"--mount={place.mount}", "--spot"]
    config = ["--config", str(REPO / "configs" / "tiny.py"), "--workdir", f"{place.mount}/run"]
    return ["pod", *create, *config, *SMALL]


def results(place: Place) -> dict[str, Any]:
    found = json.loads((place.bucket / "run" / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def weights(place: Place) -> dict[str, bytes]:
    paths = (place.bucket / "run").rglob("*.safetensors")
    return {str(path.relative_to(place.bucket)): path.read_bytes() for path in paths}


def test_a_recipe_whose_pod_is_preempted_twice_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    port = 10000 + 2 * (os.getpid() % 4900)
    calm, rough = (new_place(tmp_path / name, checkout, port) for name in ("calm", "rough"))
    try:
        result = calm.ok("recipe.sh", *words(calm), "--delete")
        assert "pod is deleted" in result.stderr
        records = json.loads((calm.bucket / "run" / "ledger" / "sft.json").read_text())
        assert records["prefix"] == [str(checkout / "launch" / "tpu_run.sh"), "pod", "--"]
        assert len(weights(calm)) >= 2

        process = rough.start("recipe.sh", *words(rough))
        saved = rough.bucket / "run" / "sft" / "checkpoints"
        for grace in (15.0, 0.0):  # with time to save, and without
            before = {path.name for path in saved.glob("[0-9]*")}
            wait_for(
                lambda before=before: (
                    {p.name for p in saved.glob("[0-9]*")} - before or process.poll() is not None
                ),
                "a checkpoint",
                600,
            )
            with rough.cloud.state() as state:
                state["seconds_of_grace"] = grace
            rough.cloud.preempt("pod", "SUSPENDED" if grace else "ACTIVE")
            wait_for(lambda: process.poll() is not None or is_ready(rough), "the next pod", 300)
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors + output
        assert len(rough.cloud.calls("queued-resources create")) == 3
        assert "was preempted and saved" in errors + output
        assert results(rough) == results(calm)
        assert weights(rough) == weights(calm)

        again = rough.ok("recipe.sh", "pod", *words(rough)[5:])
        assert "pod has this checkout" in again.stderr and "[sft]" in again.stdout
        assert "step" not in again.stdout.partition("[sft]")[2].partition("[")[0]
    finally:
        calm.close()
        rough.close()


def is_ready(place: Place) -> bool:
    with place.cloud.state() as state:
        return state["nodes"].get("pod", {}).get("state") == "READY"
