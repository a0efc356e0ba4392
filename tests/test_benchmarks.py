"""benchmarks/: turns, the page, and every stage of the GPU script at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close

from benchmarks import gpu, gpu_case, gpu_torch, gpu_worker, memory
from benchmarks.gpu_case import Case
from benchmarks.harness import REPO, RESULTS, Served, machine, ratio, spread, table, take_turns
from benchmarks.page import page

pytestmark = pytest.mark.xdist_group("benchmarks")


def test_turns_run_forwards_then_backwards() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    found = take_turns(calls, 3)
    assert "".join(order) == "abccbaabc"
    assert found == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_spread_and_ratio_are_of_medians() -> None:
    assert spread([30.0, 1000.0, 1200.0]) == "1,000 (30-1,200)"
    assert spread([2.5], ".1f") == "2.5"
    assert ratio([4.0, 6.0, 99.0], [3.0, 2.0, 4.0]) == "2.00"


def test_a_served_process_answers_once_per_call_and_its_death_is_an_error() -> None:
    program = (
        "from benchmarks.harness import serve; n = iter([1.5, 2.5])\n"
        "print('chatter'); serve(lambda: next(n), {'about': 7})"
    )
    with Served([sys.executable, "-c", program]) as served:
        assert (served.ready, served(), served()) == ({"about": 7}, 1.5, 2.5)
        with pytest.raises(RuntimeError, match="exit status 1"):
            served()


def test_page_shows_results_in_order_and_names_what_never_ran(tmp_path: Path) -> None:
    for name in ("rank", "train"):
        one = table("A title", ("what", "tokens/s"), [("ours", "1,200")], "A note.")
        result = {"about": f"About {name}", "command": f"python -m benchmarks {name}"}
        (tmp_path / f"{name}.json").write_text(
            json.dumps({**result, "machine": machine(), "tables": [one]})
        )
    (tmp_path / "train.md").write_text("Tried and found.\n")
    (tmp_path / "gpu.md").write_text("Never run on a GPU.\n")
    text = page(tmp_path)
    shown = ["## About train", "    python -m benchmarks train", "**A title**", "A note."]
    shown += ["Tried and found.", "## About rank", "Never run on a GPU."]
    found = [text.index(part) for part in shown]
    assert found == sorted(found)
    assert "| what | tokens/s |\n|---|---:|\n| ours | 1,200 |" in text
    assert text.rstrip().endswith("startup, demo, scaling, gpu.")
    assert machine()["processor"] in text


PHASES = {"sft": 2, "rank": 2, "sample": 3, "attention": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "phase"),
    [("jax", phase) for phase in PHASES]
    + [("torch", phase) for phase in ("sft", "rank", "sample")],
)
def test_every_stage_of_the_gpu_script_runs_tiny(
    engine: str, phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    measure, about = gpu_worker.prepare(Case(engine, phase, PHASES[phase], "full", tiny=True))
    assert measure() > 0
    assert about == {"device": "cpu", "peak_bytes": None}


@pytest.mark.slow
def test_torch_minimises_what_the_trainer_does() -> None:
    """The same logits give the same loss, SFT and rank, on the batch that both sides get."""
    import jax.numpy as jnp
    import torch

    from memphis_jax import losses

    rng = np.random.default_rng(0)
    for phase in ("sft", "rank"):
        case = Case("torch", phase, 2, tiny=True)
        arrays = gpu_case.batch(case, seed=0)
        assert (arrays["segment_ids"] == 1).all()  # a full row for every text
        assert arrays["tokens"].size == case.micro_tokens
        logits = rng.standard_normal((*arrays["tokens"].shape, 512), "float32")
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        theirs = gpu_torch.loss(torch.from_numpy(logits), tensors, phase)

        logprobs = losses.token_logprobs(jnp.asarray(logits), jnp.eye(512), arrays["targets"])
        eta = 1.0 if phase == "rank" else gpu_case.MIXCE_ETA
        total, weight = losses.mixce(logprobs, arrays["loss_mask"], eta)
        ours = total / weight
        if phase == "rank":
            means = losses.sequence_logprobs(logprobs, arrays["segment_ids"], arrays["rank_mask"])
            scores = means[arrays["candidate_rows"], arrays["candidate_segments"]]
            total, weight = losses.pro(scores, arrays["ranks"])
            ours += gpu_case.RANK_WEIGHT * total / weight
        assert_close({"loss": theirs.numpy()}, {"loss": ours})


def test_a_batch_too_large_is_told_apart_from_a_mistake() -> None:
    assert gpu_worker.describe(RuntimeError("RESOURCE_EXHAUSTED: 9 GB")) == "out of memory"
    assert gpu_worker.describe(RuntimeError("CUDA out of memory. Tried")) == "out of memory"
    assert gpu_worker.describe(ValueError("odd\nmore")) == "ValueError: odd"


def test_gpu_without_one_says_so_in_a_line() -> None:
    words = [sys.executable, "-m", "benchmarks", "gpu", "--log", os.devnull]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPO, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("benchmarks gpu: RuntimeError: JAX finds no GPU")


def test_gpu_tables_of_a_full_log_start_no_process(tmp_path: Path) -> None:
    """Micro-batches grow until one fails, the fastest runs in turns, MFU is by the formula."""
    log = gpu.Log(tmp_path / "log.jsonl", minutes=0)

    def keep(case: Case, turn: int = 0, **figures: object) -> None:
        kept = {"device": "NVIDIA H100 80GB HBM3", "peak_bytes": 40e9, **figures}
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write(json.dumps({"key": log.key(case, turn), "figures": kept}) + "\n")

    case = Case("jax", "sft", remat="full")
    keep(case._replace(rows=1), speed=10_000.0)
    keep(case._replace(rows=2), speed=30_000.0)
    keep(case._replace(rows=2), 1, speed=32_000.0)
    keep(case._replace(rows=2), 2, speed=31_000.0)
    keep(case._replace(rows=4), error="out of memory")
    log = gpu.Log(tmp_path / "log.jsonl", minutes=0)
    tried = gpu.search(log, case, single=False)
    assert [one.rows for one in tried] == [1, 2, 4]
    best = gpu.fastest(tried)
    assert best is not None and best.rows == 2
    speeds = log.turns({"JAX": best}, 3)
    ceiling = {"device": "NVIDIA H100 80GB HBM3", "speed": 700e12}
    (row,) = gpu.step_table("sft", {"JAX": best}, speeds, log, ceiling)["rows"]
    # 6 x 2,537,881,600 + 4 x 128,778,240 + 6 x 32 x 4096 x 2560 FLOP per token, 31,000 a second
    per_token = 6 * 2_537_881_600 + 4 * 128_778_240 + 6 * 32 * 4096 * 2560
    mfu = per_token * 31_000 / 989.4e12
    assert row[:3] == ["JAX", "8 x 2 x 4096", "31,000 (30,000-32,000)"]
    assert row[4:] == [f"{mfu:.1%}", f"{per_token * 31_000 / 700e12:.1%}", "40.0"]
    assert ["JAX", "16,384", "out of memory", ""] in gpu.search_table("sft", {"JAX": tried})["rows"]
    assert log.measure(case._replace(rows=8)) == {"error": "not run: --minutes had passed"}


@pytest.mark.slow
def test_chunked_and_full_logits_are_one_loss_with_one_gradient() -> None:
    """What the memory benchmark compares computes the same."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    inputs = (
        jax.random.normal(keys[0], (2, 700, 16)),
        jax.random.normal(keys[1], (16, 50)),
        jax.random.randint(keys[2], (2, 700), 0, 50),
    )
    for head in memory.HEADS:
        ours, full = (memory.loss_and_gradients(path, head)(*inputs) for path in memory.PATHS)
        assert_close(ours, full)


def test_the_page_is_made_of_the_results() -> None:
    """`python -m benchmarks page` after every new result, and no figure by hand."""
    assert (REPO / "docs" / "performance.md").read_text() == page(RESULTS)
