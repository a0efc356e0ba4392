"""What tests of several devices and several processes share: sizes, batches, gradients.

As a script it is one of several processes, started with JAX's variables: it computes the gradients
of both phases on every mesh of 8 devices, and process 0 saves them.

    python tests/meshes.py OUT.npz
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers import named_leaves, random_example, random_group, tiny_model
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memphis_jax.config import ComputeConfig, OptimizerConfig, PhaseConfig
from memphis_jax.data.loader import Batch, rank_loader, sft_loader
from memphis_jax.sharding import global_batch, host_share, make_mesh, row_shards, state_sharding
from memphis_jax.train_step import loss_and_gradients, objective

SHAPES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))
PHASES = ("sft", "rank")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
COMPUTE = ComputeConfig(remat="full", logprob_chunk=8)
SETTINGS = PhaseConfig(
    epochs=1,
    batch_size=16,
    accumulation=2,
    seq_len=24,
    rank_weight=5.0,
    mixce_eta=0.75,
    neftune_alpha=5.0,
    optimizer=OptimizerConfig(learning_rate=1e-3, momentum=0.5, freeze_embeddings=False),
)


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def batch(phase: str, mesh: Mesh | None = None) -> Batch:
    """The first batch of a run of unequal examples: all of it, or this process's share."""
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {"seq_len": 24, "batch_size": 16, "accumulation": 2, "epochs": 1}
    sizes["row_multiple"], own = 8, 0
    if mesh is not None:
        own = jax.process_index()
        sizes["row_multiple"] = len(row_shards(mesh)[own])
        sizes["process_index"], sizes["process_count"] = host_share(mesh, own)
    if phase == "rank":
        groups = [random_group(rng, rng.integers(3, 12, 3)) for _ in range(16)]
        return rank_loader(groups, seed=1, **sizes)[0]
    del sizes["row_multiple"]
    examples = [random_example(rng, int(n)) for n in rng.integers(3, 25, 60)]
    return sft_loader(examples, seed=1, **sizes)[0]


def gradients(phase: str, mesh: Mesh | None) -> dict[str, np.ndarray]:
    """{"loss": its sums, leaf name: gradient} of `batch`, whole, on every process.

    Ranking goes without noise: each host packs its own groups, so they lie at other places.
    """
    from dataclasses import replace

    settings = replace(SETTINGS, neftune_alpha=0.0) if phase == "rank" else SETTINGS
    model = tiny_model(**SIZES)
    arrays: Any = batch(phase, mesh)
    if mesh is not None:
        places = state_sharding(model, mesh)
        model = jax.tree.map(
            lambda leaf, place: jax.make_array_from_callback(
                leaf.shape, place, lambda where: np.asarray(leaf)[where]
            ),
            model,
            places,
        )
        arrays = global_batch(arrays, mesh, jax.process_index())
    compute = jax.jit(partial(loss_and_gradients, **objective(phase, settings, COMPUTE, mesh)))
    frozen = jax.tree.map(lambda _: None, model)
    sums, found = compute(model, frozen, arrays, jax.random.PRNGKey(7))
    if jax.process_count() > 1:
        whole = NamedSharding(mesh, PartitionSpec())
        found = jax.jit(lambda tree: tree, out_shardings=whole)(found)
    names = ("token", "rank_loss") if phase == "rank" else ("token",)
    losses = {f"{name} {part}": np.asarray(sums[name][part]) for name in names for part in (0, 1)}
    return losses | named_leaves(found)


def main(out: Path) -> None:
    from memphis_jax.runtime import is_first, start_jax

    start_jax()
    found = {
        f"{phase}|{shape}|{name}": leaf
        for shape in SHAPES
        for phase in PHASES
        for name, leaf in gradients(phase, make_mesh(*shape)).items()
    }
    if is_first():
        np.savez(out, **found)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_default_matmul_precision", "highest")
    main(Path(sys.argv[1]))
