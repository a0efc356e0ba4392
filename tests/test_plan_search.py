"""`memphis plan`: what a candidate is predicted to take, what is compiled, how it is listed."""

import dataclasses
from pathlib import Path

import pytest

from memphis_jax import config as configs
from memphis_jax import plan, plan_table
from memphis_jax.config import ConfigError, MeshConfig, ModelConfig
from memphis_jax.plan_chips import parse_slice
from memphis_jax.plan_compile import GIB, Compiled
from memphis_jax.plan_cost import matmul_parameters
from memphis_jax.plan_search import (
    Candidate,
    Job,
    Search,
    candidates,
    predicted_memory,
    predicted_seconds,
    predicted_traffic,
)

CARD = str(Path(__file__).resolve().parents[1] / "configs" / "memphis_cot.py")
LIMIT = 15.75 * GIB


def card_job(phase: str = "sft", name: str = "v5e:4x4", slices: int = 1) -> Job:
    return Job(configs.load(CARD), phase, parse_slice(name), slices, 512)


def told(job: Job, candidate: Candidate, peak: float, limit: float = LIMIT) -> Compiled:
    """What a compiler that counts the formula's FLOPs and no traffic would say."""
    return Compiled(
        parameters=GIB,
        optimizer=GIB // 1000,
        gradients=GIB,
        peak=peak,
        limit=limit,
        flops=job.model_flops(candidate),
        moved=1e9,
        collectives={
            "all-gather": {"count": 3, "payload": 2e9, "wire": 1e9, "ici": 1e9, "dcn": 0.0}
        },
    )


def test_candidates_divide() -> None:
    """128 rows over 16 chips: 1 to 8 rows at once on each; all of them make 128 rows a step."""
    job = card_job()
    found = list(candidates(job))
    assert {(c.mesh, c.rows, c.accumulation) for c in found if c.mesh[2] == 1} == {
        ((1, 16, 1), rows, 8 // rows) for rows in (1, 2, 4, 8)
    }
    assert {job.tokens(c) for c in found} == {128 * 4096}
    assert {c.mesh for c in found} == {(1, 16, 1), (1, 8, 2), (1, 4, 4), (1, 2, 8)}
    assert {c.mesh[0] for c in candidates(card_job(slices=2))} == {2}
    rank = card_job("rank")
    assert {(c.rows, c.groups) for c in candidates(rank) if c.accumulation == 1} == {
        (4, 8), (8, 16), (16, 32), (32, 64),
    }  # fmt: skip


def test_predictions_near_what_was_measured() -> None:
    """Full remat, 16 chips of v5e: the compiler said 12.6 GB for 8 rows (docs/plan.md)."""
    job = card_job()
    eight = job.candidate(MeshConfig(), 1, "full")
    assert (eight.rows, eight.groups) == (8, 0)
    assert predicted_memory(job, eight) / GIB == pytest.approx(12.6, rel=0.05)


def test_search_compiles_the_best_that_should_fit_and_stops() -> None:
    """As predicted: one compile. Twice what was predicted: it looks again, and finds another."""
    job = card_job()
    search = Search(job, lambda job, c: told(job, c, predicted_memory(job, c)))
    best = search.run(8)
    assert list(search.found) == [best]

    search = Search(job, lambda job, c: told(job, c, 2 * predicted_memory(job, c)))
    best = search.run(8)
    assert best is not None and search.found[best].fits
    assert 2 <= len(search.found) <= 4
    assert not search.found[next(iter(search.found))].fits


def test_two_compiled_make_a_line() -> None:
    job = card_job()
    one, two, eight = (job.candidate(MeshConfig(), n, "full") for n in (8, 4, 1))
    search = Search(job, lambda job, c: told(job, c, 1.0))
    search.found = {one: told(job, one, 3 * GIB), two: told(job, two, 4.5 * GIB)}
    assert search.memory(eight) == 3 * GIB + 7 * 1.5 * GIB


def printed(search: Search, best: Candidate, title: str) -> list[list[str]]:
    """Rows of the table under `title`, its head first."""
    text = plan_table.render(
        [search], [best], work=plan.Work(10, 10, "given"), mfu=0.4, price=None, markdown=True
    )
    lines = text.partition(title)[2].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "---" not in line]


def test_what_else_fits_is_listed_by_the_seconds_it_shows() -> None:
    """One compiled takes 1.2 times what was predicted, another 1.5 times."""
    job = card_job(name="v5e:8x8")
    slow, best = (job.candidate(MeshConfig(), 1, remat) for remat in ("attention", "dots"))
    search = Search(job, told)
    for one, factor in ((slow, 1.5), (best, 1.2)):
        moved = factor * predicted_seconds(job, one) * job.where.chip.hbm_bandwidth
        search.found[one] = dataclasses.replace(
            told(job, one, 3 * GIB), moved=moved, collectives={}
        )
    rows = printed(search, best, "What else fits, fastest first")[1:]
    shown = [float(row[4].strip("~")) for row in rows]
    assert len(rows) == 4 and shown == sorted(shown)
    # Predictions are moved by what was off where the same policy was compiled: comparable rows.
    for row, one in zip(rows, [one for one in search.ranking() if one != best], strict=True):
        off = 1.2 if one.remat == "dots" else 1.5
        if one.remat in ("dots", "attention"):
            assert float(row[4].strip("~")) == pytest.approx(
                off * predicted_seconds(job, one), abs=0.005
            )
    assert search.seconds(best) == search.job.bounds(search.found[best]).seconds
    assert min(shown) > search.seconds(best)


def test_two_slices_bound_the_network_between_them() -> None:
    """25 Gbit/s a v5e chip (6.4 Tbit/s a pod of 256): 6.25 GB from the other slice take 2 s."""
    job = card_job(slices=2)
    chosen = job.candidate(MeshConfig(data=2), 1, "full")
    across = {"count": 1, "payload": 6.25e9, "wire": 6.25e9, "ici": 0.0, "dcn": 6.25e9}
    said = told(job, chosen, 3 * GIB)
    said = dataclasses.replace(
        said, collectives=said.collectives | {"all-reduce between slices": across}
    )
    search = Search(job, told)
    search.found[chosen] = said
    assert job.bounds(said) == pytest.approx((said.flops / (32 * 197e12), 1e9 / 819e9, 0.01, 2.0))
    assert job.bounds(said).name == "DCN"
    precise = dataclasses.replace(job.config.compute, dtype="float32")
    slow = dataclasses.replace(job, config=dataclasses.replace(job.config, compute=precise))
    assert slow.bounds(said).compute == pytest.approx(6 * job.bounds(said).compute)
    head, row = printed(search, chosen, "An optimizer step at best")
    assert (row[0], row[head.index("network s")], row[head.index("DCN s")]) == (
        "2 x v5e:4x4", "0.010", "2.000",
    )  # fmt: skip
    traffic = printed(search, chosen, "Collectives of a step")
    assert traffic[2][2:] == ["all-reduce between slices", "1", "6.25", "6.25"]
    one_slice = card_job()
    alone = Search(one_slice, told)
    best = one_slice.candidate(MeshConfig(), 1, "full")
    alone.found[best] = told(one_slice, best, 3 * GIB)
    assert "DCN s" not in printed(alone, best, "An optimizer step at best")[0]


def test_predicted_traffic_of_several_slices_and_of_two_devices_a_chip() -> None:
    """By hand, for P parameters of the layers: gradients cross slices in every micro-batch.

    On tpu7x both devices of a chip take in 7 of 8 parts of the weights together; where `model` lies
    over them, each takes in 3 of 4 parts of its own half: the same.
    """
    layers, head = matmul_parameters(ModelConfig())
    two = card_job(slices=2)
    ici, dcn = predicted_traffic(two, two.candidate(MeshConfig(data=2), 4, "full"))
    assert ici == pytest.approx(4 * (8 * layers + 4 * head) * 15 / 16)
    assert dcn == pytest.approx(4 * 8 * layers / 16 / 2)
    chip = card_job(name="tpu7x:2x2x2")
    whole = predicted_traffic(chip, chip.candidate(MeshConfig(), 1, "full"))
    halves = predicted_traffic(chip, chip.candidate(MeshConfig(model=2), 1, "full"))
    assert whole == halves == (pytest.approx((8 * layers + 4 * head) * 7 / 8), 0.0)


def test_a_batch_that_no_mesh_divides() -> None:
    config = configs.load(CARD, ["--config.sft.batch_size=120"])
    with pytest.raises(ConfigError, match=r"sft.batch_size = 120 does not divide over the 256 dev"):
        Search(Job(config, "sft", parse_slice("v5e:16x16"), 1, 512), lambda *_: None)
