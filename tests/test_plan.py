"""`memphis plan`: the search, what it prints, wrong inputs, the real compiler on a small model."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memphis_jax import config as configs
from memphis_jax import plan, plan_table
from memphis_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from memphis_jax.plan_chips import parse_slice
from memphis_jax.plan_compile import GIB, Compiled, Request, compile_step
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

REPO = Path(__file__).resolve().parents[1]
CARD = str(REPO / "configs" / "memphis_cot.py")
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


def test_a_slice_that_cannot_hold_it_gets_a_no_by_how_much() -> None:
    job = card_job(name="v5e:1x1")
    search = Search(job, lambda job, c: told(job, c, LIMIT + 16.5 * GIB))
    assert search.run(4) is None
    text = plan_table.render(
        [search], [None], work=plan.Work(10, 10, "assumed"), mfu=0.4, price=None, markdown=False
    )
    assert (
        "NO: v5e:1x1 cannot hold sft: the smallest way tried (mesh 1x1x1, 128 x 1 rows, remat full)"
        " needs 32.25 GB on a device, 16.50 GB more than the 15.75 GB that the compiler may use;"
        " take a larger slice"
    ) in text


def test_a_no_to_one_way_names_another_that_should_fit() -> None:
    """As --as-configured does: one way compiled, of a slice that holds the model otherwise."""
    job = card_job(name="v5e:4x4")
    one = job.candidate(MeshConfig(), 4, "none")
    search = Search(job, told)
    search.found[one] = told(job, one, 48.3 * GIB)
    text = plan_table.render(
        [search], [None], work=plan.Work(10, 10, "assumed"), mfu=0.4, price=None, markdown=False
    )
    assert "needs 48.30 GB" in text and "larger slice" not in text
    assert "may use; mesh 1x16x1, 1 x 8 rows, remat full should fit: leave out" in text


def test_the_table_is_what_the_numbers_say() -> None:
    """2 s of compute at peak: tokens/s, MFU, hours and cost follow by hand."""
    searches, best = [], []
    for phase in ("sft", "rank"):
        job = card_job(phase)
        chosen = job.candidate(MeshConfig(), 1, "full")
        found = dataclasses.replace(told(job, chosen, 3 * GIB), flops=2 * 16 * 197e12)
        search = Search(job, told)
        search.found[chosen] = found
        searches.append(search)
        best.append(chosen)
    work = plan.Work(1800, 900, "given")
    text = plan_table.render(searches, best, work=work, mfu=0.4, price=1.5, markdown=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    memory = next(row for row in rows if row[:2] == ["v5e:4x4", "sft"])
    assert memory[2:] == [
        "1 x 16 x 1", "1 x 8", "full", "1.00", "0.00", "1.00", "1.00", "3.00", "15.75", "yes",
    ]  # fmt: skip
    speed = [row for row in rows if row[:2] == ["v5e:4x4", "sft"]][1]
    assert speed[6:11] == ["2.000", "0.001", "0.010", "compute", "262,144"]
    needed = searches[0].job.model_flops(best[0])
    assert speed[11] == f"{needed / (2 * 16 * 197e12):.0%}"
    hours = next(row for row in rows if row[:2] == ["v5e:4x4", "16"])
    assert hours[2:5] == ["1.00", "0.50", "1.50"]
    at_mfu = (1800 * needed + 900 * searches[1].job.model_flops(best[1])) / (0.4 * 16 * 197e12)
    assert hours[5:] == [f"{at_mfu / 3600:.2f}", f"{at_mfu / 3600 * 16 * 1.5:,.2f}"]


def test_recipe_sizes(tmp_path: Path) -> None:
    """Steps of the card's recipe from tokens, from a built folder, and assumed ones say so."""
    config = configs.load(CARD)
    work = plan.recipe(config, None, 128 * 4096 * 3 + 1, 1000)
    assert work[:2] == (2 * 4, 4 * 8)  # 2 epochs of 3 batches and a bit; 4 rounds of 1000 / 128
    assert "(--tokens)" in work.told and "assumed" not in work.told
    assert "(assumed)" in plan.recipe(config, None, None, plan.PAIRS).told
    (tmp_path / "manifest.json").write_text(json.dumps({"totals": {"tokens": 4096}}))
    assert plan.recipe(config, tmp_path, None, 128)[:2] == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "'v9' is not one of v4, v5e, v5p, v6e, tpu7x"),
        (["--topology=v3:4x4"], "splash) does not compile for v3"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=32"],
         "v5e:4x4: mesh {'data': 1, 'fsdp': 32, 'model': 1} needs 32 devices, there are 16"),
        (["--topology=v5e:4x4", "--config.mesh.model=3"], "16 devices do not divide by 3"),
        (["--topology=v5e:8x8"], "sft: a micro-batch of 16 (batch_size 128 / accumulation 8) is "
         "not divisible by mesh.data x mesh.fsdp = 64; change batch_size, accumulation"),
        (["--topology=v4:8x8x8", "--config.mesh.model=64", "--phase=sft"],
         "num_attention_heads = 32 is not divisible by mesh.model = 64"),
        (["--topology=v5e:4x4", "--tokens=0"], "--tokens 0 must be 1 or more"),
        (["--topology=v5e:4x4", "--data=/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named with value and fix, before anything is compiled."""
    from memphis_jax.__main__ import main

    def never(*_: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(SystemExit) as caught:
        main(["plan", f"--config={CARD}", "--as-configured", *arguments])
    code = caught.value.code  # a text is what Python prints, with exit code 1
    (line,) = (code if isinstance(code, str) else capsys.readouterr().err).splitlines()
    assert code
    assert message in line


def test_a_batch_that_no_mesh_divides() -> None:
    config = configs.load(CARD, ["--config.sft.batch_size=120"])
    with pytest.raises(ConfigError, match=r"sft.batch_size = 120 does not divide over the 256 dev"):
        Search(Job(config, "sft", parse_slice("v5e:16x16"), 1, 512), lambda *_: None)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from memphis_jax import plan_chips

    monkeypatch.setattr(plan_chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'memphis-jax\[tpu\]'"):
        plan_chips.slice_devices(parse_slice("v5e:4x4"))


def small_config(batch_size: int = 4) -> RunConfig:
    """Two layers, head_dim 80, rows of 256."""
    config = configs.load(CARD)
    phase = {"batch_size": batch_size, "accumulation": 1, "seq_len": 256}
    return dataclasses.replace(
        config,
        model=ModelConfig(
            vocab_size=512,
            hidden_size=160,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        sft=dataclasses.replace(config.sft, **phase),
        rank=dataclasses.replace(config.rank, **phase),
        mesh=MeshConfig(1, 4, 1),
    )


@pytest.mark.slow
def test_the_real_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank step for v5e:2x2: fits, moves its parameters, and is not compiled a second time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = small_config()
    said = compile_step(config, Request("rank", "v5e:2x2", 1, rows=4, groups=4))
    assert said.fits and said.limit == 15.75 * GIB
    layers = 2 * (4 * 160**2 + 3 * 160 * 256)
    assert said.gradients / 4 * 4 == pytest.approx(layers * 4 / 4, rel=0.02)  # norms are whole
    assert said.parameters == said.gradients + 2 * 512 * 160 * 4 / 4
    assert said.flops > 3 * 2 * 4 * 256 * layers
    # Each device takes in at least the weights in bfloat16, forward and backward, of 3 others.
    assert said.wire > 2 * 2 * layers * 3 / 4
    # Nor is the same program of a checkout elsewhere, whose lines have moved.
    shutil.copytree(REPO / "memphis_jax", tmp_path / "other" / "memphis_jax")
    attention = tmp_path / "other" / "memphis_jax" / "attention.py"
    attention.write_text("# a line more\n" + attention.read_text())
    monkeypatch.chdir(tmp_path / "other")
    again = compile_step(config, Request("rank", "v5e:2x2", 1, rows=4, groups=4))
    assert again == said  # its seconds too: the first one's
    assert len(list((tmp_path / "memphis_jax" / "plan").glob("*.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slices"), [("tpu7x:2x2x1", 1), ("v5e:2x2", 2)])
def test_the_real_compiler_on_networks(
    name: str, slices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that the SparseCore gathers, gradients that go to another slice: both are seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = Job(small_config(8), "sft", parse_slice(name), slices, 512)
    said = compile_step(*job.request(job.candidate(MeshConfig(data=slices), 1, "full")))
    layers = 2 * (4 * 160**2 + 3 * 160 * 256)
    shards = job.where.num_devices
    assert said.collectives["all-gather"]["payload"] > 2 * 2 * layers
    # A chip takes in what its devices' groups lack, once; their own parts it has.
    on_chip = job.where.chip.devices
    assert said.ici > (2 * 2 + 4) * layers * (shards - on_chip) / shards
    if slices == 1:
        assert said.dcn == 0
    else:  # float32 gradients of the parameters that are trained, of each device
        assert said.dcn == pytest.approx(said.gradients, rel=0.35)
        assert said.dcn == said.collectives["all-reduce between slices"]["wire"]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """From a config to the tables, as a user runs it; one chip, nothing to search."""
    path = tmp_path / "config.json"
    config = dataclasses.replace(small_config(), mesh=MeshConfig(1, 1, 1))
    path.write_text(json.dumps(dataclasses.asdict(config)))
    done = subprocess.run(
        [sys.executable, "-m", "memphis_jax", "plan", f"--config={path}", "--topology=v5e:1x1",
         "--phase=sft", "--as-configured"],
        capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"v5e:1x1 sft \[1/1\] mesh 1x1x1, 1 x 4 rows, remat full .* fits", done.stderr)
    assert re.search(r"v5e:1x1 +sft +1 x 1 x 1 +1 x 4 +full", done.stdout)
