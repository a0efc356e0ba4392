"""A training step on this processor, SFT and rank, beside transformers + torch, in turns.

Engines are processes of their own. SFT: all get the same packed rows in float32; torch sees each
row as one text (no segments, the fast causal path of sdpa), takes transformers' own loss and AdamW.
Rank: torch pads every answer to the longest of the batch, as its trainers do. "naive JAX" is the
same model as a step is usually written: whole logits, one-hot cross entropy, AdamW.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness, torch_step, workload
from benchmarks.workload import SIZES, Size

ABOUT = "Training step on a CPU"
ENGINES = ("memphis_jax", "naive JAX", "torch", "torch, compiled")
LARGEST = list(SIZES)[-1]  # four of it at once do not fit into 24 GB
CEILING = 2048  # of the square matmul that says what the machine can do


def main(argv: list[str]) -> None:
    parser = harness.parser("train", __doc__, repeats=7)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(*args.serve)
        return
    before = harness.machine()
    tables = []
    for phase in ("sft", "rank"):
        rows = [row for size in args.sizes for row in compare(phase, size, args.repeats)]
        columns = (
            "model",
            "engine",
            "useful tokens/s",
            "x torch",
            "of its ceiling",
            "ready",
        )
        tables.append(harness.table(f"{phase} step, float32", columns, rows))
    harness.finish(args, "train", ABOUT, before, tables)


def compare(phase: str, size: str, repeats: int) -> list[harness.Row]:
    """A row per engine."""
    engines = ENGINES if phase == "sft" and size != LARGEST else ("memphis_jax", "torch")
    words = [sys.executable, "-m", "benchmarks.train", "--serve"]
    commands = {one: ([*words, one, size, phase], {"JAX_PLATFORMS": "cpu"}) for one in engines}
    served, found = harness.served_turns(commands, repeats)
    torch = max((found[e] for e in found if e.startswith("torch")), key=statistics.median)
    return [
        (
            size if number == 0 else "",
            engine,
            harness.spread(speeds),
            harness.ratio(speeds, torch),
            f"{_share(served[engine].ready, speeds):.0%}",
            f"{served[engine].ready_after:.0f} s",
        )
        for number, (engine, speeds) in enumerate(found.items())
    ]


def _share(ready: dict[str, Any], speeds: list[float]) -> float:
    """Model FLOP/s over the matmul's, both of this engine."""
    return statistics.median(speeds) * ready["flops_per_token"] / ready["ceiling"]


def serve(engine: str, name: str, phase: str) -> None:
    """One engine: warms up, then tells the tokens/s of some steps whenever it is asked."""
    size = SIZES[name]
    batch = workload.sft_batch(size) if phase == "sft" else workload.rank_batch(size)
    useful = int((batch["segment_ids"] > 0).sum())
    if engine.startswith("torch"):
        step = torch_step.prepare(size, phase, compiled=engine.endswith("compiled"))
        ceiling = torch_step.ceiling(CEILING)
    else:
        prepare = our_step if engine == "memphis_jax" else naive_step
        step, ceiling = prepare(size, phase, batch), matmul_ceiling(CEILING)
    for _ in range(3):
        step(1)

    def measure() -> float:
        begun = time.perf_counter()
        step(size.steps)
        return useful * size.steps / (time.perf_counter() - begun)

    harness.serve(measure, {"ceiling": ceiling, "flops_per_token": flops_per_token(size)})


def flops_per_token(size: Size) -> float:
    from memphis_jax.config import ModelConfig
    from memphis_jax.plan_cost import matmul_parameters

    layers, head = matmul_parameters(ModelConfig(**size.shape))
    return 6.0 * layers + (4.0 if size.freeze else 6.0) * head


def our_step(size: Size, phase: str, batch: dict[str, np.ndarray]) -> Callable[[int], None]:
    """The trainer's own step, with MixCE, NEFTune and Adalite."""
    import jax

    from memphis_jax.config import ComputeConfig, ModelConfig, OptimizerConfig, PhaseConfig
    from memphis_jax.model import StableLM
    from memphis_jax.runtime import start_jax
    from memphis_jax.sharding import global_batch, make_mesh
    from memphis_jax.train_step import init_state, make_step

    start_jax()
    settings = PhaseConfig(
        epochs=1,
        batch_size=size.groups if phase == "rank" else size.rows,
        seq_len=size.seq_len,
        mixce_eta=0.75,
        neftune_alpha=5.0,
        rank_weight=5.0,
        optimizer=OptimizerConfig(freeze_embeddings=size.freeze, learning_rate=1e-6),
    )
    mesh = make_mesh(fsdp=1)
    model = jax.device_put(StableLM(ModelConfig(**size.shape), jax.random.key(0)), jax.devices()[0])
    state = init_state(model, settings, 0, mesh)
    step = make_step(phase, settings, ComputeConfig(remat="none"), 10**6, mesh)
    arrays = global_batch({name: value[None] for name, value in batch.items()}, mesh, 0)

    def run(steps: int) -> None:
        nonlocal state
        metrics: Any = None
        for _ in range(steps):
            state, metrics = step(state, arrays)
        jax.block_until_ready((state, metrics))

    return run


def naive_step(size: Size, phase: str, batch: dict[str, np.ndarray]) -> Callable[[int], None]:
    import jax
    import jax.numpy as jnp
    import optax

    from memphis_jax.config import ModelConfig
    from memphis_jax.model import StableLM
    from memphis_jax.optimizer import combine, is_embedding, partition
    from memphis_jax.runtime import start_jax

    start_jax()
    model = StableLM(ModelConfig(**size.shape), jax.random.key(0))
    params, frozen = partition(model, is_embedding if size.freeze else lambda _: False)
    optimizer = optax.adamw(1e-6)

    def loss(params: Any, batch: Any) -> jax.Array:
        model = combine(params, frozen)
        logits = model.logits(batch["tokens"], batch["positions"], batch["segment_ids"])
        one_hot = jax.nn.one_hot(batch["targets"], logits.shape[-1])
        losses = -(one_hot * jax.nn.log_softmax(logits)).sum(-1)
        return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    def update(carried: Any, batch: Any) -> Any:
        params, state = carried
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=0)
    carried = (params, optimizer.init(params))
    arrays = jax.tree.map(jnp.asarray, batch)

    def run(steps: int) -> None:
        nonlocal carried
        for _ in range(steps):
            carried = step(carried, arrays)
        jax.block_until_ready(carried)

    return run


def matmul_ceiling(size: int) -> float:
    """FLOP/s of a float32 product."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    return harness.matmul_ceiling(lambda: jax.block_until_ready(product(x, x)), size)


if __name__ == "__main__":
    main(sys.argv[1:])
