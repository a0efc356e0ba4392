"""One training step, SFT or rank, as a function of arrays, and the TrainState that it takes on.

`train.py` runs it over the data; `plan_compile.py` compiles it for a TPU that is not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from memphis_jax.config import ComputeConfig, ModelConfig, PhaseConfig
from memphis_jax.model import StableLM, abstract
from memphis_jax.objectives import Arrays, Sums, SumsFn, objective_weights, rank_sums, sft_sums
from memphis_jax.optimizer import combine, cosine_schedule, is_embedding, make_optimizer, partition
from memphis_jax.parallel import make_ops
from memphis_jax.sharding import state_sharding

COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # Without it a TPU's compiler cuts each product with gathered weights into one per device, whose
    # sums go through memory: three times the HBM traffic and 2 GB more (3B, v5e:4x4; docs/plan.md).
    # MaxText sets the same.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    # One product after another, each on all cores (docs/performance.md, "Training step").
    "cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "model", "opt_state", "key", "skipped", "skipped_in_a_row"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32, optimizer steps done, skipped ones counted
    model: StableLM  # float32 parameters
    opt_state: optax.OptState
    key: jax.Array  # raw PRNG key of the run; a step's noise is a function of (key, step)
    skipped: jax.Array  # int32, steps with a loss or gradient that was not finite
    skipped_in_a_row: jax.Array

    def without_model(self) -> dict[str, Any]:
        """What is saved beside the weights."""
        names = ("step", "opt_state", "key", "skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names}


def loss_and_gradients(
    trainable: Any,
    frozen: Any,
    batch: Arrays,
    key: jax.Array,
    *,
    sums_fn: SumsFn,
    coefficients: dict[str, float],
    place: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Sums, Any]:
    """(sums added over the micro-batches [A, ...], gradient of the whole batch's objective).

    The objective is  sum over names of coefficient * sum / weight, each weight the whole batch's,
    so that accumulating A micro-batches equals one batch of all their rows.
    """
    weights = objective_weights(batch)

    def objective(trainable: Any, micro: Arrays, key: jax.Array) -> Any:
        sums = sums_fn(combine(trainable, frozen), micro, key)
        parts = [
            coefficient * sums[name][0] / jnp.maximum(weights[name], 1.0)
            for name, coefficient in coefficients.items()
        ]
        return sum(parts), sums

    def micro_step(micro: Arrays, key: jax.Array) -> tuple[Sums, Any]:
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(trainable, micro, key)
        return sums, place(gradients)

    micro_batches = batch["tokens"].shape[0]
    if micro_batches == 1:
        return micro_step(jax.tree.map(lambda leaf: leaf[0], batch), key)
    keys = jax.random.split(key, micro_batches)
    shapes = jax.eval_shape(micro_step, jax.tree.map(lambda leaf: leaf[0], batch), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro_step(*xs)), None

    return jax.lax.scan(add, zeros, (batch, keys))[0]


def train_step(
    state: TrainState,
    batch: Arrays,
    *,
    sums_fn: SumsFn,
    coefficients: dict[str, float],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    freeze: Callable[[str], bool],
    place: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, Arrays]:
    """One optimizer step on a batch [A, ...]; a step that is not finite changes no weight.

    `place` lays a tree that is named like the state, gradients too, out as the state lies.
    """
    trainable, frozen = partition(state.model, freeze)
    key = jax.random.fold_in(state.key, state.step)
    sums, gradients = loss_and_gradients(
        trainable, frozen, batch, key, sums_fn=sums_fn, coefficients=coefficients, place=place
    )
    metrics = {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in sums.items()}
    loss = jnp.stack([c * metrics[name] for name, c in coefficients.items()]).sum()
    norm = optax.tree.norm(gradients)
    rate = schedule(state.step)
    directions, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    updated = jax.tree.map(lambda p, m: p - rate * m, trainable, directions)

    update_norm = rate * optax.tree.norm(directions)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    bad = (~finite).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        model=combine(jax.tree.map(keep, updated, trainable), frozen),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        key=state.key,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )
    metrics |= {"loss": loss, "grad_norm": norm, "learning_rate": rate}
    counters = {
        "skipped_steps": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
        "tokens": sums["padding_share"][1] - sums["padding_share"][0],
    }
    return place(new_state), metrics | counters


def make_step(
    phase: str,
    settings: PhaseConfig,
    compute: ComputeConfig,
    num_steps: int,
    mesh: Mesh | None = None,
) -> Any:
    """The jitted `train_step` of a phase, "sft" or "rank"; it donates the state it is given.

    (state, batch) -> (state, metrics). On a mesh the state lies as `state_sharding` says, before
    and after, and the batch as `batch_sharding` says; without one, on a single device. The devices
    of the mesh may be those of a TPU that is only compiled for.
    """
    optimizer = settings.optimizer
    step = partial(
        train_step,
        **objective(phase, settings, compute, mesh),
        optimizer=make_optimizer(optimizer),
        schedule=cosine_schedule(optimizer.learning_rate, num_steps, optimizer.warmup_ratio),
        freeze=is_embedding if optimizer.freeze_embeddings else lambda _: False,
    )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(step, donate_argnums=0, compiler_options=COMPILER_OPTIONS.get(platform))


def objective(
    phase: str, settings: PhaseConfig, compute: ComputeConfig, mesh: Mesh | None
) -> dict[str, Any]:
    """What `loss_and_gradients` takes beside arrays: the phase's losses, computed on a mesh."""
    forward: dict[str, Any] = {
        "dtype": compute.dtype,
        "remat": compute.remat,
        "logprob_chunk": compute.logprob_chunk,
        "neftune_alpha": settings.neftune_alpha,
        "mixce_eta": settings.mixce_eta,
        "ops": make_ops(mesh, compute.attention),
    }
    coefficients = {"token": 1.0}
    if phase == "rank":
        coefficients["rank_loss"] = settings.rank_weight
    return {
        "sums_fn": partial(rank_sums if phase == "rank" else sft_sums, **forward),
        "coefficients": coefficients,
        "place": (lambda tree: tree) if mesh is None else partial(_place, mesh=mesh),
    }


def _place(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh))


def init_state(
    model: StableLM, settings: PhaseConfig, seed: int, mesh: Mesh | None = None
) -> TrainState:
    """Step 0 on given weights, with fresh optimizer statistics; on a mesh, laid out over it."""

    def rest(model: StableLM) -> dict[str, Any]:
        freeze = is_embedding if settings.optimizer.freeze_embeddings else lambda _: False
        trainable, _ = partition(model, freeze)
        return {
            "step": jnp.zeros([], jnp.int32),
            "opt_state": make_optimizer(settings.optimizer).init(trainable),
            "key": jax.random.PRNGKey(seed),
            "skipped": jnp.zeros([], jnp.int32),
            "skipped_in_a_row": jnp.zeros([], jnp.int32),
        }

    if mesh is None:
        return TrainState(model=model, **rest(model))
    # Without out_shardings the moments would be whole on every device.
    shardings = state_sharding(jax.eval_shape(rest, model), mesh)
    return TrainState(model=model, **jax.jit(rest, out_shardings=shardings)(model))


def abstract_state(model: ModelConfig, settings: PhaseConfig, mesh: Mesh) -> TrainState:
    """The TrainState of a model on a mesh as ShapeDtypeStruct with shardings: nothing allocated."""
    shapes = jax.eval_shape(lambda m: init_state(m, settings, 0), abstract(model))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )
