"""`memphis plan`: what it prints, wrong inputs, the real compiler on a small model."""

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
from memphis_jax.data.examples import IN_MANIFEST
from memphis_jax.plan_chips import parse_slice, slice_devices
from memphis_jax.plan_compile import GIB, Request, compile_step
from memphis_jax.plan_search import Job, Search
from tests.test_plan_search import CARD, LIMIT, card_job, told

REPO = Path(__file__).resolve().parents[1]


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
    manifest = dict.fromkeys(IN_MANIFEST) | {"totals": {"tokens": 4096}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
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


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from memphis_jax import plan_chips

    monkeypatch.setattr(plan_chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
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
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:2x2", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_a_generation_is_known_by_its_devices(name: str) -> None:
    where = parse_slice(name)
    assert {device.device_kind for device in slice_devices(where)} == {where.chip.kind}


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
