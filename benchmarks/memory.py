"""Peak memory: token logprobs in chunks against full logits, Adalite against AdamW, what fits.

The compiler's account needs no run, so it is of the real shape, [8, 4096] x 2560 x 50304, for this
CPU and for a TPU v5e. Time and resident memory are measured here, at shapes whose full logits fit.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import (
    REPO,
    Served,
    finish,
    machine,
    parser,
    ratio,
    seconds,
    serve,
    spread,
    table,
    take_turns,
)
from memphis_jax.config import ModelConfig, OptimizerConfig, PhaseConfig, RunConfig, load

PATHS = ("chunked", "full logits")
HEADS = ("frozen", "trained")
VOCAB = 50304


class Shape(NamedTuple):
    """Of the hidden states; full logits of float32 are rows x length x 50304 x 4 bytes."""

    rows: int
    length: int
    dim: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.length}] x {self.dim}"


REAL = Shape(8, 4096, 2560)  # the 3B's
# Full logits take three arrays of 4 bytes a logit here: 20 GB at REAL. These take seconds a turn.
MEASURED = (Shape(2, 4096, 256), Shape(1, 2048, 2560))
SLICE = "v5e:2x4"
ROWS = (2, 4, 8)  # per chip, compiled with Adalite; AdamW, compiled at the first, adds its moments


def main(argv: list[str]) -> None:
    if argv[:1] == ["serve"]:
        path, head, *numbers = argv[1:]
        return measure(path, head, Shape(*map(int, numbers)))
    os.environ["JAX_PLATFORMS"] = "cpu"
    args = parser("memory", __doc__, repeats=3).parse_args(argv)
    before = machine()
    tables = [compiler_table(), *(time_table(shape, args.repeats) for shape in MEASURED)]
    tables += [optimizer_table(), fit_table()]
    finish(args, "memory", "Memory: chunked logprobs, optimizer state, what fits", before, tables)


def loss_and_gradients(path: str, head: str) -> Callable[..., Any]:
    """MixCE of (hidden, head, targets), differentiated by hidden, and by a head that is trained."""
    import jax
    import jax.numpy as jnp

    from memphis_jax.losses import mixce, token_logprobs

    def full_logits(hidden: Any, head: Any, targets: Any) -> Any:
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    logprobs = token_logprobs if path == "chunked" else full_logits

    def loss(hidden: Any, head: Any, targets: Any) -> Any:
        total, weight = mixce(logprobs(hidden, head, targets), jnp.ones(targets.shape, bool), 0.75)
        return total / weight

    return jax.value_and_grad(loss, (0,) if head == "frozen" else (0, 1))


def arguments(shape: Shape, dtype: str) -> list[Any]:
    """Shapes of hidden [B, T, D], head [D, V] (parameters are float32) and targets [B, T]."""
    import jax

    rows, length, dim = shape
    return [
        jax.ShapeDtypeStruct((rows, length, dim), dtype),
        jax.ShapeDtypeStruct((dim, VOCAB), "float32"),
        jax.ShapeDtypeStruct((rows, length), "int32"),
    ]


def account(path: str, head: str, platform: str) -> tuple[int, int]:
    """(bytes of temporaries, bytes with arguments and results) by the compiler, at REAL."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from memphis_jax.plan_chips import parse_slice, slice_devices

    cpu = platform == "cpu"
    device = jax.devices()[0] if cpu else slice_devices(parse_slice(platform))[0]
    step = jax.jit(
        loss_and_gradients(path, head),
        in_shardings=SingleDeviceSharding(device),
        out_shardings=SingleDeviceSharding(device),
    )
    traced = step.trace(*arguments(REAL, "float32" if cpu else "bfloat16"))
    lowered = traced.lower(lowering_platforms=("cpu" if cpu else "tpu",))
    found = lowered.compile().memory_analysis()
    temporary = found.temp_size_in_bytes
    return temporary, temporary + found.argument_size_in_bytes + found.output_size_in_bytes


def compiler_table() -> dict[str, Any]:
    rows = []
    for platform, name in (("v5e:2x4", "TPU v5e, bfloat16"), ("cpu", "this CPU, float32")):
        for head in HEADS:
            ours, full = (account(path, head, platform) for path in PATHS)
            for what, a, b in zip(("temporaries", "in all"), ours, full, strict=True):
                cells = (f"{a / 1e9:.2f}", f"{b / 1e9:.2f}", f"{b / a:.1f}x")
                rows.append((f"{name}, head {head}: {what}", *cells))
    columns = ("GB of loss and gradients", *PATHS, "less")
    logits = 4 * REAL.rows * REAL.length * VOCAB / 1e9
    note = (
        f"By the compiler. Full logits alone are {logits:.1f} GB in float32. "
        "In all: with hidden states, head and their gradients, which both paths have."
    )
    return table(f"Token logprobs of {REAL} x {VOCAB}", columns, rows, note)


def measure(path: str, head: str, shape: Shape) -> None:
    """Serves the seconds of one call; says first by how much the first call raised the memory."""
    import jax

    from memphis_jax.runtime import start_jax

    start_jax()
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, weights, targets = arguments(shape, "float32")
    inputs = jax.block_until_ready(
        [
            jax.random.normal(keys[0], hidden.shape),
            0.02 * jax.random.normal(keys[1], weights.shape),
            jax.random.randint(keys[2], targets.shape, 0, VOCAB),
        ]
    )
    step = jax.jit(loss_and_gradients(path, head)).lower(*inputs).compile()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: set-up took memory too
    before = resident("VmRSS")
    loss, _ = jax.block_until_ready(step(*inputs))
    about = {"grown": resident("VmHWM") - before, "loss": float(loss)}
    serve(lambda: seconds(lambda: jax.block_until_ready(step(*inputs))), about)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, what it has, or VmHWM, the most it had since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def time_table(shape: Shape, repeats: int) -> dict[str, Any]:
    rows = []
    for head in HEADS:
        words = (head, *map(str, shape))
        started = [
            Served([sys.executable, "-m", "benchmarks", "memory", "serve", path, *words])
            for path in PATHS
        ]
        found = take_turns(dict(zip(PATHS, started, strict=True)), repeats)
        for one in started:
            one.close()
        ours, full = (one.ready for one in started)
        assert abs(ours["loss"] / full["loss"] - 1) < 1e-5, (ours, full)
        times = [found[path] for path in PATHS]
        cells = (*(spread(values, ".2f") for values in times), ratio(*times))
        rows.append((f"head {head}: seconds", *cells))
        grown = [one["grown"] for one in (ours, full)]
        cells = (*(f"{value / 1e9:.2f}" for value in grown), f"{grown[0] / grown[1]:.2f}")
        rows.append((f"head {head}: resident memory grew by, GB", *cells))
    columns = ("float32 on this CPU", *PATHS, "chunked / full")
    return table(f"Measured: {shape} x {VOCAB}", columns, rows)


def optimizer_table() -> dict[str, Any]:
    """Bytes of optimizer state, every parameter trained: AdamW's moments are float32 too."""
    import jax

    from memphis_jax.model import abstract
    from memphis_jax.train_step import init_state

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    rows = []
    for name, model in (("3B", ModelConfig()), ("demo", load(f"{REPO}/configs/tiny.py").model)):
        for frozen in (True, False):
            shapes = abstract(model)
            cells = [f"{size(shapes) / 1e6:,.2f}"]
            for optimizer in ("adalite", "adamw"):
                options = OptimizerConfig(name=optimizer, freeze_embeddings=frozen)
                settings = PhaseConfig(epochs=1, batch_size=1, seq_len=1, optimizer=options)
                state = jax.eval_shape(lambda m, s=settings: init_state(m, s, 0), shapes)
                share = size(state.opt_state) / size(shapes)
                cells.append(f"{size(state.opt_state) / 1e6:,.2f} ({share:.3%})")
            rows.append((f"{name}, embeddings {'frozen' if frozen else 'trained'}", *cells))
    columns = ("MB", "parameters", "Adalite's state", "AdamW's state")
    return table("Optimizer state, and its share of the parameters' bytes", columns, rows)


@cache
def recipe() -> RunConfig:
    """The card's, on random weights of the 3B: shapes are all that counts."""
    config = load(f"{REPO}/configs/memphis_cot.py")
    return dataclasses.replace(config, model=ModelConfig())


def step_memory(optimizer: str, path: str, rows: int) -> dict[str, float]:
    """What the 3B's SFT step needs on a chip of SLICE, `rows` rows of 4096 tokens on each."""
    from memphis_jax.plan_chips import parse_slice
    from memphis_jax.plan_compile import Request, compile_step

    config, chips = recipe(), parse_slice(SLICE).num_chips
    chunk = config.compute.logprob_chunk if path == "chunked" else rows * config.sft.seq_len
    options = dataclasses.replace(config.sft.optimizer, name=optimizer)
    config = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, logprob_chunk=chunk),
        sft=dataclasses.replace(
            config.sft, optimizer=options, batch_size=rows * chips, accumulation=1
        ),
    )
    found = compile_step(config, Request("sft", SLICE, 1, rows * chips))
    return {"peak": found.peak, "optimizer": found.optimizer, "limit": found.limit}


def fit_table() -> dict[str, Any]:
    """Peak by rows per chip; the most that fit are read off the line through the last two."""
    adamw = step_memory("adamw", PATHS[0], ROWS[0])
    limit, table_rows = adamw["limit"], []
    for path in PATHS:
        peaks = [step_memory("adalite", path, rows)["peak"] for rows in ROWS]
        name = "logits in chunks" if path == PATHS[0] else "all logits at once"
        for optimizer, moments in (("Adalite", 0.0), ("AdamW", adamw["optimizer"])):
            sign = "~" if moments else ""
            cells = [f"{sign}{(peak + moments) / 2**30:.2f}" for peak in peaks]
            if moments and path == PATHS[0]:
                cells[0] = f"{adamw['peak'] / 2**30:.2f}"
            slope = (peaks[-1] - peaks[-2]) / (ROWS[-1] - ROWS[-2])
            most = int(ROWS[-1] + (limit - peaks[-1] - moments) / slope)
            table_rows.append((f"{optimizer}, {name}", *cells, str(most)))
    columns = ("GiB of a chip", *(f"{rows} rows" for rows in ROWS), "most rows")
    note = (
        f"A chip has {limit / 2**30:.2f} GiB: more than that does not fit. ~: Adalite's and the "
        "moments. All logits at once are one chunk: with a frozen head nothing of it stays either."
    )
    title = f"SFT step of the 3B on {SLICE}, by rows of 4096 tokens on each chip"
    return table(title, columns, table_rows, note)
