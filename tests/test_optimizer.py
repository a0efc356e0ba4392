"""Schedule by hand, freezing, and the chain on a real model's tree."""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, named_leaves, tiny_model

from memphis_jax.adalite import scale_by_adalite
from memphis_jax.config import ModelConfig, OptimizerConfig
from memphis_jax.model import abstract
from memphis_jax.optimizer import (
    EMBEDDINGS,
    combine,
    cosine_schedule,
    is_embedding,
    make_optimizer,
    partition,
)


def rates(peak: float, num_steps: int, warmup_ratio: float) -> list[float]:
    schedule = cosine_schedule(peak, num_steps, warmup_ratio)
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in range(num_steps)]


def test_schedule_by_hand() -> None:
    # Two steps up, then a cosine that would be 0 at step 8: cos(pi / 7), cos(2 pi / 7), ...
    half = np.sqrt(2) / 2
    expected = [1.0, 2.0, 1 + half, 1.0, 1 - half]
    assert rates(2.0, 5, 0.4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 97])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_schedule_shape(num_steps: int, ratio: float) -> None:
    warmup = round(ratio * num_steps)
    values = rates(1e-3, num_steps, ratio)
    assert min(values) > 0
    up, down = values[:warmup], values[warmup:]
    np.testing.assert_allclose(up, 1e-3 * np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    assert all(later < earlier for earlier, later in pairwise(down))
    assert all(value < 1e-3 for value in down)
    if len(down) > 5:
        assert values[-1] < 0.1 * 1e-3


def test_partition_and_combine_are_inverse() -> None:
    model = tiny_model()
    trainable, frozen = partition(model, is_embedding)
    assert set(named_leaves(frozen)) == {"embed_tokens", "lm_head/kernel"}
    assert set(named_leaves(trainable)) | set(named_leaves(frozen)) == set(named_leaves(model))
    assert not set(named_leaves(trainable)) & set(named_leaves(frozen))
    both = combine(trainable, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(model), strict=True))


def test_a_tied_head_is_frozen_with_its_embedding() -> None:
    _, frozen = partition(tiny_model(tie_word_embeddings=True), is_embedding)
    assert set(named_leaves(frozen)) == {"embed_tokens"}


def as_single_tensors(name: str, leaf: np.ndarray) -> dict[Any, np.ndarray]:
    """The tensors of a leaf as PyTorch has them, one per layer (and head), matrices [in, out]."""
    if name == "embed_tokens":
        return {(): leaf.T}
    per_head = name.endswith(("q_layernorm/scale", "k_layernorm/scale"))
    stacked = name.startswith("layers/") + per_head
    return {index: leaf[index] for index in np.ndindex(leaf.shape[:stacked])}


@pytest.mark.slow
def test_adalite_treats_every_layer_and_head_as_a_tensor_of_its_own() -> None:
    """Two steps on a whole model equal two steps on all its tensors apart."""
    model = tiny_model()
    rng = np.random.default_rng(0)
    config = OptimizerConfig(eps=1e-3, momentum=0.5)
    sizes = np.logspace(-4, 1, 7)  # layers and heads whose gradients differ in size
    gradients = [
        jax.tree.map(
            lambda p: (
                rng.standard_normal(p.shape)
                * rng.choice(sizes, (*p.shape[:2], *[1] * (p.ndim - 2)))
            ).astype("f"),
            model,
        )
        for _ in range(2)
    ]

    def two_steps(tx: Any, params: Any, gradients: Any) -> Any:
        state = tx.init(params)
        _, state = tx.update(gradients[0], state, params)
        return tx.update(gradients[1], state, params)[0]

    directions = jax.jit(partial(two_steps, make_optimizer(config)))(model, gradients)
    apart = [
        {name: as_single_tensors(name, leaf) for name, leaf in named_leaves(tree).items()}
        for tree in (model, *gradients)
    ]
    alone = scale_by_adalite(eps=1e-3, momentum=0.5)
    expected = jax.jit(partial(two_steps, alone))(apart[0], apart[1:])
    found = {name: as_single_tensors(name, leaf) for name, leaf in named_leaves(directions).items()}
    assert_close(found, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_state_of_the_3b_model_is_below_a_thousandth(frozen: bool) -> None:
    model = abstract(ModelConfig())
    trainable, _ = partition(model, is_embedding if frozen else lambda _: False)
    state = jax.eval_shape(make_optimizer(OptimizerConfig()).init, trainable)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert 2.79e9 < count(model) < 2.80e9
    assert count(state) < 1e-3 * count(trainable)
    # One number per output feature (and the step count): no more, no less.
    per_layer = 4 * 2560 + 2 * 6912 + 2560 + 4
    assert count(state) == 1 + 32 * per_layer + 2 + (0 if frozen else 2 * 50304)


CHANGES: dict[str, Any] = {
    "name": "adamw",
    "clip_norm": 0.5,
    "eps": 1e-2,
    "lambda_": 0.5,
    "beta_decay": 0.3,
    "centralize": False,
    "momentum": 0.9,
    "b1": 0.5,
    "b2": 0.5,
    "adam_eps": 0.5,
    "weight_decay": 0.3,
}
BY_THE_TRAINER = {"learning_rate", "warmup_ratio", "freeze_embeddings"}


@pytest.mark.parametrize("field", CHANGES)
def test_every_optimizer_field_reaches_the_update(field: str) -> None:
    assert CHANGES.keys() | BY_THE_TRAINER == {f.name for f in dataclasses.fields(OptimizerConfig)}
    rng = np.random.default_rng(1)
    params, *gradients = (
        {"layers": {"kernel": rng.standard_normal((2, 4, 3)).astype("f")}} for _ in range(3)
    )
    base = {"name": "adamw"} if field in ("b1", "b2", "adam_eps", "weight_decay") else {}

    def last_direction(config: OptimizerConfig) -> np.ndarray:
        tx = make_optimizer(config)
        state = tx.init(params)
        for gradient in gradients:
            directions, state = tx.update(gradient, state, params)
        return np.asarray(directions["layers"]["kernel"])

    before = last_direction(OptimizerConfig(**base))
    after = last_direction(OptimizerConfig(**{**base, field: CHANGES[field]}))
    assert np.abs(after - before).max() > 1e-4


def test_adamw_by_hand() -> None:
    # First step: m / sqrt(v) is the gradient's sign; decay adds weight_decay * p.
    params, gradient = {"w": jnp.array([2.0, -3.0])}, {"w": jnp.array([0.1, -7.0])}
    tx = make_optimizer(OptimizerConfig(name="adamw", weight_decay=0.1))
    directions, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(directions["w"], [1.2, -1.3], rtol=1e-5)


def test_clipping_is_global() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}  # norm 5
    clipped = make_optimizer(OptimizerConfig(name="adamw", clip_norm=1.0, adam_eps=1.0))
    free = make_optimizer(OptimizerConfig(name="adamw", adam_eps=1.0))
    fifth = jax.tree.map(lambda g: g / 5, gradient)
    ours, _ = clipped.update(gradient, clipped.init(params), params)
    scaled, _ = free.update(fifth, free.init(params), params)
    for name in params:
        np.testing.assert_allclose(ours[name], scaled[name], rtol=1e-6)


def test_embeddings_are_the_input_and_the_output_matrix() -> None:
    assert EMBEDDINGS == ("embed_tokens", "lm_head")
    assert not is_embedding("layers/self_attn/q_proj/kernel")
    assert not is_embedding("norm/scale")
