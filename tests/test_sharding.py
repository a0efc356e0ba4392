"""Where arrays lie never changes what is computed: meshes of 8 devices, 2 and 4 processes, one."""

import itertools
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, assert_same_bits, tiny_model
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import COMPUTE, PHASES, SETTINGS, SHAPES, SIZES, batch, gradients, mesh_of

from memphis_jax import checkpoint, parallel, sharding
from memphis_jax.config import ModelConfig, OptimizerConfig
from memphis_jax.layers import embedding
from memphis_jax.model import abstract
from memphis_jax.train_step import TrainState, abstract_state, init_state, make_step

TESTS = Path(__file__).parent
ALL_SHAPES = ((1, 1, 1), *SHAPES)


def model_on(mesh: Mesh) -> Any:
    model = tiny_model(**SIZES)
    return jax.device_put(model, sharding.state_sharding(model, mesh))


def assert_same_gradients(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Loss and every leaf within 1e-5 of the leaf's largest value."""
    assert found.keys() == wanted.keys() and len(wanted) > 10
    for name, leaf in wanted.items():
        size = np.abs(leaf).max()
        assert size > 0, name
        assert np.abs(found[name] - leaf).max() <= 1e-5 * size, name


@cache
def of_one_device(phase: str) -> dict[str, np.ndarray]:
    return gradients(phase, None)


# --- the same loss and gradients


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_mesh_changes_no_gradient(shape: tuple[int, int, int], phase: str) -> None:
    assert_same_gradients(gradients(phase, mesh_of(shape)), of_one_device(phase))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_change_no_gradient(processes: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, TESTS / "meshes.py", tmp_path / "found.npz"],
            env=os.environ
            | {
                "JAX_NUM_CPU_DEVICES": str(8 // processes),
                # Half the time to compile; the code of XLA's own passes stays the same.
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    for process in running:
        _, said = process.communicate(timeout=900)
        assert process.returncode == 0, said
        # What XLA warns of where an activation is gathered whole to change its layout.
        assert "nvoluntary full rematerialization" not in said
    found = np.load(tmp_path / "found.npz")
    for shape, phase in itertools.product(SHAPES, PHASES):
        start = f"{phase}|{shape}|"
        leaves = {k.removeprefix(start): found[k] for k in found.files if k.startswith(start)}
        assert_same_gradients(leaves, of_one_device(phase))


@pytest.mark.slow
def test_a_step_keeps_the_layout_and_follows_one_device() -> None:
    mesh = mesh_of((2, 2, 2))
    data = batch("sft")
    one = init_state(tiny_model(**SIZES), SETTINGS, 3)
    many = init_state(model_on(mesh), SETTINGS, 3, mesh)
    one_step = make_step("sft", SETTINGS, COMPUTE, 10)
    many_step = make_step("sft", SETTINGS, COMPUTE, 10, mesh)
    for _ in range(3):
        one, expected = one_step(one, data)
        many, metrics = many_step(many, sharding.global_batch(data, mesh, 0))
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    wanted = sharding.state_sharding(many, mesh)
    for leaf, place in zip(jax.tree.leaves(many), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.slow
def test_fsdp_gathers_no_layer_outside_the_layer_loop() -> None:
    """Compiled for 8 devices: outside loops only the head is gathered, once, for the loss."""
    mesh, model = mesh_of((1, 8, 1)), ModelConfig(**{**TINY, **SIZES, "num_hidden_layers": 3})
    settings = replace(SETTINGS, accumulation=1, optimizer=OptimizerConfig())
    place = sharding.batch_sharding(mesh)
    arrays = {
        name: jax.ShapeDtypeStruct((1, 16, 24), array.dtype, sharding=place)
        for name, array in batch("sft").items()
    }
    step = make_step("sft", settings, COMPUTE, 10, mesh)
    text = step.lower(abstract_state(model, settings, mesh), arrays).compile().as_text()
    inside, outside = gathered(text)
    assert {(32, 48), (48, 32), (32, 32)} <= inside  # one layer's kernels, each in its turn
    assert outside <= {(32, 64)}  # lm_head
    assert not any(len(shape) > 2 for shape in inside | outside)  # a stack [L, in, out]


def gathered(text: str) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Shapes of the float all-gathers (inside, outside) of the loops of an HLO module."""
    bodies: dict[str, str] = {}
    for chunk in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", chunk):
            bodies[match[1]] = chunk
    looped: set[str] = set()
    queue = re.findall(r"body=%?([\w.\-]+)", text)
    while queue:
        if (name := queue.pop()) not in looped:
            looped.add(name)
            calls = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
            queue += re.findall(calls, bodies[name])
    found: tuple[set[tuple[int, ...]], set[tuple[int, ...]]] = (set(), set())
    for name, chunk in bodies.items():
        for dims in re.findall(
            r"= \(?(?:f32|bf16)\[([\d,]*)\][^=]* all-gather(?:-start)?\(", chunk
        ):
            found[name not in looped].add(tuple(map(int, dims.split(","))))
    return found


# --- where the state lies


@pytest.mark.parametrize("name", ["adalite", "adamw"])
def test_the_whole_state_is_divided(name: str) -> None:
    """Every tensor of parameters and optimizer is an eighth on each device of fsdp."""
    mesh = mesh_of((1, 8, 1))
    settings = replace(SETTINGS, optimizer=OptimizerConfig(name=name, momentum=0.5))
    state = init_state(model_on(mesh), settings, 0, mesh)
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1000]
    assert len(matrices) >= 9 + 7  # the embeddings are frozen and have no moments
    for leaf in matrices:
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    planned = abstract_state(ModelConfig(**{**TINY, **SIZES}), settings, mesh)
    for plan, leaf in zip(jax.tree.leaves(planned), jax.tree.leaves(state), strict=True):
        assert (plan.shape, plan.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.size == 1 or plan.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers/self_attn/q_proj/kernel", (2, 32, 32), P(None, "fsdp", "model")),
        ("model/layers/mlp/down_proj/kernel", (2, 48, 32), P(None, "model", "fsdp")),
        ("opt_state/1/momentum/layers/mlp/up_proj/kernel", (2, 32, 48), P(None, "fsdp", "model")),
        ("opt_state/1/second_moment/layers/mlp/up_proj/kernel", (2, 48), P(None, "model")),
        ("opt_state/1/second_moment/layers/mlp/down_proj/kernel", (2, 32), P(None, "fsdp")),
        ("opt_state/1/second_moment/lm_head/kernel", (64,), P()),
        ("opt_state/1/0/mu/lm_head/kernel", (32, 64), P("fsdp", "model")),
        ("embed_tokens", (64, 32), P("model", "fsdp")),
        ("embed_tokens", (61, 32), P(None, "fsdp")),  # 61 does not divide: whole
        ("layers/self_attn/q_layernorm/scale", (2, 8, 4), P(None, "model", None)),
        ("layers/self_attn/k_proj/bias", (2, 32), P(None, "model")),
        ("norm/scale", (32,), P()),
        ("step", (), P()),
    ],
)
def test_the_table(path: str, shape: tuple[int, ...], spec: P) -> None:
    assert sharding.leaf_spec(path, shape, {"data": 1, "fsdp": 2, "model": 2}) == spec


def test_every_leaf_of_the_model_has_the_rule_of_its_kind() -> None:
    """No matrix of the family is left whole by a name that no rule knows."""
    config = ModelConfig(**{**TINY, **SIZES})
    places = sharding.state_sharding(abstract(config), mesh_of((2, 2, 2)))
    for path, place in jax.tree_util.tree_flatten_with_path(places)[0]:
        name = jax.tree_util.keystr(path)
        assert ("kernel" in name or "embed" in name) <= bool(set(place.spec) - {None}), name


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("vocab_size", [64, 61])
def test_lookup_and_its_gradient(shape: tuple[int, int, int], vocab_size: int) -> None:
    mesh, rng = mesh_of(shape), np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((vocab_size, 16), "float32"))
    tokens = jnp.asarray(rng.integers(0, vocab_size, (8, 16)), jnp.int32)
    weight = jnp.asarray(rng.standard_normal((8, 16, 16), "float32"))

    def total(table: jax.Array, find: Any) -> jax.Array:
        return (find(table, tokens) * weight).sum()

    def on_mesh(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return parallel.lookup(table, tokens, table.dtype, mesh=mesh)

    assert_same_bits({"x": jax.jit(on_mesh)(table, tokens)}, {"x": table[tokens]})
    found = jax.jit(jax.grad(total), static_argnums=1)(table, on_mesh)
    wanted = jax.grad(total)(table, lambda table, tokens: table[tokens])
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_frequent_tokens_gradient_is_not_lost_in_bfloat16(shape: tuple[int, int, int]) -> None:
    mesh, table = mesh_of(shape), jnp.zeros((64, 16))
    tokens = jnp.zeros((8, 512), jnp.int32)  # one token, 4096 times
    weight = np.random.default_rng(0).normal(0.5, 0.5, (8, 512, 16)).astype("float32")

    def total(table: jax.Array, find: Any) -> jax.Array:
        return (find(table, tokens, "bfloat16").astype("float32") * weight).sum()

    finds = (embedding, lambda *args: parallel.lookup(*args, mesh=mesh))
    for find in finds:
        found = jax.jit(jax.grad(total), static_argnums=1)(table, find)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], weight.sum((0, 1)), rtol=0.01)


# --- checkpoints


@pytest.mark.slow
def test_a_checkpoint_of_any_mesh_restores_on_any_other(tmp_path: Path) -> None:
    def state_on(shape: tuple[int, int, int], seed: int) -> TrainState:
        mesh = mesh_of(shape)
        state = init_state(model_on(mesh), SETTINGS, seed, mesh)
        random = jax.tree.map(lambda x: x + seed if x.dtype == jnp.float32 else x, state.opt_state)
        return replace(state, opt_state=random)

    for a in ALL_SHAPES:
        saved = state_on(a, seed=5)
        folder = tmp_path / str(a)
        with checkpoint.open_manager(folder, keep=1) as manager:
            checkpoint.save(manager, 1, saved.model, {}, saved.without_model())
        for b in ALL_SHAPES:
            mesh = mesh_of(b)
            model, _ = checkpoint.restore_model(folder, mesh=mesh)
            rest = checkpoint.restore_train(folder, state_on(b, seed=0).without_model())
            assert_same_bits(model, saved.model)
            assert_same_bits(rest, saved.without_model())
            wanted = jax.tree.leaves(sharding.state_sharding(model, mesh))
            for leaf, place in zip(jax.tree.leaves(model), wanted, strict=True):
                assert leaf.sharding == place
