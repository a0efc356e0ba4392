"""How an SFT step's time and memory grow with length, batch, layers and devices, beside theory.

A small model in float32, every block recomputed (remat full), each row one example. Theory of time
is the count of operations in the program that was traced; memory is the compiler's own account.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from benchmarks import harness, workload
from memphis_jax import charts

SHAPE = {
    **workload.SIZES["512 x 8"].shape,
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class Point(NamedTuple):
    rows: int
    length: int
    layers: int = 4
    devices: int = 1


SERIES: dict[str, tuple[str, list[Point]]] = {  # title -> (what grows, points)
    "Length, 4096 tokens in all": (
        "length",
        [Point(4096 // t, t) for t in (128, 256, 512, 1024, 2048)],
    ),
    "Length, 2 rows": ("length", [Point(2, t) for t in (128, 256, 512, 1024, 2048)]),
    "Rows of 256 tokens": ("rows", [Point(b, 256) for b in (1, 2, 4, 8, 16)]),
    "Layers, 4 rows of 256": ("layers", [Point(4, 256, n) for n in (1, 2, 4, 8, 16)]),
    "CPU devices, 8 rows of 512": ("devices", [Point(8, 512, 4, n) for n in (1, 2, 4, 8)]),
}
SLICES = ("v5e:2x2", "v5e:2x4", "v5e:4x4")
SLICE_ROWS = 32  # in all


class Found(NamedTuple):
    seconds: float  # of a step, the median
    flops: float  # in the traced program, of all devices
    temporary: int  # bytes on each device, and the next
    arguments: int


def main(argv: list[str]) -> None:
    if argv[:1] == ["measure"]:
        points = [Point(*one) for one in json.loads(argv[2])]
        print("BENCH", json.dumps(measure(points, int(argv[1]))))
        return
    args = harness.parser("scaling", __doc__, repeats=5).parse_args(argv)
    before = harness.machine()
    every = [point for _, points in SERIES.values() for point in points]
    found: dict[Point, Found] = {}
    for count in sorted({point.devices for point in every}):
        points = [*dict.fromkeys(point for point in every if point.devices == count)]
        found |= zip(points, in_process(points, args.repeats), strict=True)
    tables = [series_table(title, found) for title in SERIES] + [slice_table()]
    for name in ("time", "memory"):
        draw(name, found, harness.RESULTS / f"scaling-{name}.svg")
    harness.finish(args, "scaling", "Scaling", before, tables)


def in_process(points: Sequence[Point], repeats: int) -> list[Found]:
    """Measures points of one number of devices in a new process."""
    command = [sys.executable, "-m", "benchmarks", "scaling", "measure", str(repeats)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(points[0].devices),
    }
    done = subprocess.run(
        [*command, json.dumps(points)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=harness.REPO,
        env=environment,
    )
    return [Found(*one) for one in json.loads(done.stdout.split("BENCH ")[1])]


def measure(points: Sequence[Point], repeats: int) -> list[Found]:
    """Compiles every point, then times single steps in turns."""
    from memphis_jax.runtime import start_jax

    start_jax()
    made = {point: prepare(point) for point in points}
    calls = {point: (lambda run=run: harness.seconds(run)) for point, (run, _) in made.items()}
    for call in calls.values():
        call()
    times = harness.take_turns(calls, repeats)  # type: ignore[arg-type]
    return [Found(statistics.median(times[p]), *made[p][1]) for p in points]  # type: ignore[index]


def prepare(point: Point) -> tuple[Any, tuple[float, int, int]]:
    """(a call that does one step, (FLOPs, temporary bytes, argument bytes))."""
    import jax

    from memphis_jax.config import ComputeConfig, ModelConfig, OptimizerConfig, PhaseConfig
    from memphis_jax.model import StableLM, abstract
    from memphis_jax.plan_cost import jaxpr_flops
    from memphis_jax.sharding import global_batch, make_mesh, state_sharding
    from memphis_jax.train_step import init_state, make_step

    mesh = make_mesh()
    model = ModelConfig(**{**SHAPE, "num_hidden_layers": point.layers})
    settings = PhaseConfig(
        epochs=1,
        batch_size=point.rows,
        seq_len=point.length,
        optimizer=OptimizerConfig(freeze_embeddings=True, learning_rate=1e-6),
    )
    draw = jax.jit(
        lambda key: StableLM(model, key), out_shardings=state_sharding(abstract(model), mesh)
    )
    state = init_state(draw(jax.random.key(0)), settings, 0, mesh)
    made = workload.examples([point.length] * point.rows, model.vocab_size, seed=1)
    packed = workload.pack_rows([[example] for example in made], point.length)
    batch = global_batch({name: value[None] for name, value in packed.items()}, mesh, 0)
    compute = ComputeConfig(dtype="float32", remat="full", logprob_chunk=512)
    traced = make_step("sft", settings, compute, 10**6, mesh).trace(state, batch)
    step = traced.lower().compile()
    memory = step.memory_analysis()
    account = (memory.temp_size_in_bytes, memory.argument_size_in_bytes)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run, (jaxpr_flops(traced.jaxpr.jaxpr), *account)


def series_table(title: str, found: dict[Point, Found]) -> dict[str, Any]:
    what, points = SERIES[title]
    rows, last = [], None
    for point in points:
        one = found[point]
        cells = [
            f"{1e3 * one.seconds:,.0f}{_growth(one.seconds, last and last.seconds)}",
            _growth(one.flops, last and last.flops).strip(" ()"),
            f"{one.temporary / 1e6:,.1f}{_growth(one.temporary, last and last.temporary)}",
            f"{one.arguments / 1e6:,.1f}",
        ]
        rows.append((str(getattr(point, what)), *cells))
        last = one
    columns = (what, "ms of a step", "operations", "MB of temporaries", "MB of arguments")
    return harness.table(title, columns, rows, "In brackets: times the row above.")


def _growth(value: float, before: float | None) -> str:
    return f" ({value / before:.2f}x)" if before else ""


def slice_table() -> dict[str, Any]:
    """Memory of a chip as the plan compiles the step for TPU slices; the batch stays the same."""
    from memphis_jax.config import ModelConfig, load
    from memphis_jax.plan_chips import parse_slice
    from memphis_jax.plan_compile import Request, compile_step

    config = load(f"{harness.REPO}/configs/tiny.py")
    sft = dataclasses.replace(config.sft, batch_size=SLICE_ROWS, seq_len=512)
    compute = dataclasses.replace(config.compute, dtype="bfloat16", remat="full")
    config = dataclasses.replace(config, model=ModelConfig(**SHAPE), sft=sft, compute=compute)
    rows = []
    for name in SLICES:
        one = compile_step(config, Request("sft", name, 1, SLICE_ROWS))
        sizes = (one.parameters, one.gradients, one.activations, one.peak)
        chips = str(parse_slice(name).num_chips)
        rows.append((name, chips, *(f"{size / 1e6:,.1f}" for size in sizes)))
    columns = ("slice", "chips", "parameters, MB", "gradients", "working space", "peak")
    title = f"A TPU's chip by `memphis plan`, {SLICE_ROWS} rows of 512 in all"
    return harness.table(title, columns, rows, "Parameters and rows are divided by fsdp.")


def draw(name: str, found: dict[Point, Found], path: Path) -> None:
    """Measured and expected growth of every series, both axes in powers of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**charts.STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(10, 2.5), layout="constrained")
        panels = figure.subplots(1, len(SERIES))
        for axes, (title, (what, points)) in zip(panels, SERIES.items(), strict=True):
            x = [getattr(point, what) for point in points]
            values = [found[point] for point in points]
            y = [1e3 * v.seconds if name == "time" else v.temporary / 1e6 for v in values]
            axes.plot(x, y, "o-", color=charts.BLUE, markersize=3.5, label="measured")
            if name == "time":
                expected = [y[0] * v.flops / values[0].flops for v in values]
                axes.plot(x, expected, "--", color=charts.ORANGE, label="by operations")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(title, fontsize=8)
        panels[0].set_ylabel("ms of a step" if name == "time" else "MB of temporaries, a device")
        if name == "time":
            panels[0].legend()
        figure.savefig(path, metadata={"Date": None})
