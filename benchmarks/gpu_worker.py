"""One engine of `python -m benchmarks gpu`, in a process of its own: it builds, warms up, measures.

Weights are random: float32 with bfloat16 compute to train, bfloat16 to sample. jax and torch are
imported by the functions that use them: neither engine has the other one in its memory.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import gpu_case, gpu_torch, harness
from benchmarks.gpu_case import Case, sampling, speed
from memphis_jax.config import ComputeConfig, OptimizerConfig, PhaseConfig

Measure = Callable[[], float]


def main(argv: list[str]) -> None:
    """Serves the case given as JSON; says {"error": ...} instead where it cannot be run."""
    case = Case(*json.loads(argv[0]))
    try:
        measure, about = prepare(case)
    except Exception as error:  # too large a batch, above all: the next process goes on
        print("BENCH", json.dumps({"error": describe(error)}), flush=True)
        return
    harness.serve(measure, about)


def describe(error: Exception) -> str:
    text = str(error)
    if "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text:
        return "out of memory"
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]:.150}"


def prepare(case: Case) -> tuple[Measure, dict[str, Any]]:
    """(what measures once, what is known after the warm-up: device, peak_bytes)."""
    torch_side = {"sft": gpu_torch.train, "rank": gpu_torch.train, "sample": gpu_torch.sample}
    jax_side = {
        **{"sft": jax_train, "rank": jax_train, "sample": jax_sample},
        **{"attention": jax_attention, "": jax_ceiling},
    }
    return (torch_side if case.engine.startswith("torch") else jax_side)[case.phase](case)


def jax_device(case: Case) -> Any:
    """Raises RuntimeError where a full-size case has no GPU."""
    import jax

    from memphis_jax.runtime import start_jax

    start_jax()
    device = jax.devices()[0]
    if device.platform != "gpu" and not case.tiny:
        raise RuntimeError(f"JAX finds no GPU here, only {device.platform}")
    return device


def jax_about(device: Any) -> dict[str, Any]:
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": device.device_kind, "peak_bytes": peak}


def jax_ceiling(case: Case) -> tuple[Measure, dict[str, Any]]:
    """FLOP/s of bfloat16 [n, n] @ [n, n] with float32 sums."""
    import jax
    import jax.numpy as jnp

    device, size = jax_device(case), 256 if case.tiny else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda y: x @ y / size)
    y = jax.block_until_ready(product(x))

    def step() -> None:
        nonlocal y
        y = product(y)

    return lambda: speed(step, lambda: jax.block_until_ready(y), 2 * size**3), jax_about(device)


def jax_train(case: Case) -> tuple[Measure, dict[str, Any]]:
    """The trainer's own step: Adalite, frozen embeddings, MixCE, NEFTune."""
    import jax

    from memphis_jax.model import StableLM
    from memphis_jax.sharding import global_batch, make_mesh, state_sharding
    from memphis_jax.train_step import init_state, make_step

    device = jax_device(case)
    mesh = make_mesh(devices=[device])
    settings = PhaseConfig(
        epochs=1,
        batch_size=case.rows * case.micro_batches,
        accumulation=case.micro_batches,
        seq_len=case.seq_len,
        mixce_eta=gpu_case.MIXCE_ETA,
        neftune_alpha=gpu_case.NEFTUNE_ALPHA,
        rank_weight=gpu_case.RANK_WEIGHT,
        optimizer=OptimizerConfig(learning_rate=gpu_case.LEARNING_RATE),
    )
    compute = ComputeConfig("bfloat16", remat=case.remat)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda k: StableLM(case.model, k), key)
    model = jax.jit(lambda k: StableLM(case.model, k), out_shardings=state_sharding(shapes, mesh))(
        key
    )
    state, step_fn = (
        init_state(model, settings, 0, mesh),
        make_step(case.phase, settings, compute, 1000, mesh),
    )
    del model  # the step donates the state, which holds it
    micro = gpu_case.batches(case)
    arrays = global_batch({k: np.stack([one[k] for one in micro]) for k in micro[0]}, mesh, 0)

    def step() -> None:
        nonlocal state
        state, _ = step_fn(state, arrays)

    def finish() -> None:
        jax.block_until_ready(state)

    for _ in range(2):
        step()
    finish()
    return lambda: speed(step, finish, case.tokens), jax_about(device)


def jax_attention(case: Case) -> tuple[Measure, dict[str, Any]]:
    """Calls a second, forward and backward, of the kernel that compute.attention = "auto" picks."""
    import jax
    import jax.numpy as jnp

    from memphis_jax.attention import pick_attention
    from memphis_jax.sharding import make_mesh

    device, model, length = jax_device(case), case.model, case.seq_len
    heads, head_dim = model.num_attention_heads, model.head_dim
    attention = pick_attention(
        "auto",
        device.platform,
        make_mesh(devices=[device]),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        seq_len=length,
    )
    ids = jnp.arange(length) * case.rows // length + 1  # texts of equal lengths
    ids = jnp.broadcast_to(ids, (gpu_case.ATTENTION_ROWS, length))

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull_back = jax.vjp(lambda *args: attention(*args, ids), q, k, v)
        return pull_back(out)

    step_fn = jax.jit(gradients)
    shape = (*ids.shape, heads, head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    found = jax.block_until_ready(step_fn(*qkv))

    def step() -> None:
        nonlocal found
        found = step_fn(*qkv)

    return lambda: speed(step, lambda: jax.block_until_ready(found), 1), jax_about(device)


def jax_sample(case: Case) -> tuple[Measure, dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from memphis_jax.model import StableLM
    from memphis_jax.sampler import row_keys, sample

    device = jax_device(case)

    @jax.jit
    def make(key: Any) -> StableLM:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), StableLM(case.model, key))

    model, (prompts, new_tokens) = make(jax.random.key(0)), sampling(case)
    turn = 0

    def measure() -> float:
        nonlocal turn
        turn += 1
        begun = time.perf_counter()
        found = sample(
            model,
            prompts,
            row_keys(turn, [(row, 0) for row in range(case.rows)]),
            temperature=gpu_case.TEMPERATURE,
            top_p=gpu_case.TOP_P,
            max_new_tokens=new_tokens,
            eos_id=case.model.vocab_size - 1,  # random weights hardly ever draw it
            batch_size=case.rows,
            dtype="bfloat16",
        )
        return sum(len(one.tokens) for one in found) / (time.perf_counter() - begun)

    measure()
    return measure, jax_about(device)


if __name__ == "__main__":
    main(sys.argv[1:])
