"""Adalite against the original's numbers, in every layout in which we store a tensor."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import GOLDEN, assert_close

from memphis_jax.adalite import adalite, scale_by_adalite

NUMBERS = dict(np.load(GOLDEN / "adalite.npz"))
CASES: dict[str, dict[str, Any]] = json.loads(NUMBERS["meta"].tobytes())
PARAMETERS = ("kernel", "tall", "square", "vector")
NAMES = {"Lambda": "lambda_", "momentum_beta": "momentum"}
STEPS = 12


def options(case: str) -> dict[str, Any]:
    given = {NAMES.get(name, name): value for name, value in CASES[case].items()}
    assert given.pop("steps") == STEPS
    return {"learning_rate": given.pop("lr"), **given}


def trajectory(params: Any, gradients: list[Any], **given: Any) -> list[Any]:
    """Parameters after each step."""
    tx = adalite(**given)

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)
    run = jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[1])
    path = jax.tree.map(np.asarray, run(params, stacked))
    return [jax.tree.map(lambda leaf, t=t: leaf[t], path) for t in range(len(gradients))]


def golden(case: str, key: str) -> dict[str, np.ndarray]:
    """{parameter: array} in our [in, out] layout; `key` is init, gradT or paramT."""
    return {name: NUMBERS[f"{case}/{name}/{key}"].T for name in PARAMETERS}


@pytest.mark.parametrize("case", CASES)
def test_golden_numbers(case: str) -> None:
    gradients = [golden(case, f"grad{t}") for t in range(STEPS)]
    path = trajectory(golden(case, "init"), gradients, **options(case))
    for t, params in enumerate(path):
        assert_close(params, golden(case, f"param{t}"))


@pytest.mark.parametrize("case", ["default", "momentum"])
def test_golden_numbers_of_leaves_stored_out_first(case: str) -> None:
    def stored(key: str) -> dict[str, np.ndarray]:
        return {name: array.T for name, array in golden(case, key).items()}

    gradients = [stored(f"grad{t}") for t in range(STEPS)]
    path = trajectory(stored("init"), gradients, out_first=True, **options(case))
    assert_close(path[-1], stored(f"param{STEPS - 1}"))
    mixed = dict.fromkeys(PARAMETERS, True) | {"square": False}
    other = trajectory(stored("init"), gradients, out_first=mixed, **options(case))[-1]
    assert_close(other["tall"], path[-1]["tall"])
    assert np.abs(other["square"] - path[-1]["square"]).max() > 1e-3


@pytest.mark.parametrize("case", ["default", "momentum"])
def test_stacked_layers_are_separate_layers(case: str) -> None:
    """Layer 0 is the golden one; the others are of another size and direction."""
    sources = (case, "lambda0", "decay05")
    scales = (1.0, 7.0, 0.01)

    def layers(key: str) -> list[dict[str, np.ndarray]]:
        return [
            jax.tree.map(lambda array, s=scale: np.float32(s) * array, golden(source, key))
            for source, scale in zip(sources, scales, strict=True)
        ]

    def stack(key: str) -> dict[str, np.ndarray]:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *layers(key))

    gradients = [stack(f"grad{t}") for t in range(STEPS)]
    stacked = trajectory(stack("init"), gradients, stacked=True, **options(case))[-1]
    first = jax.tree.map(lambda array: array[0], stacked)
    assert_close(first, golden(case, f"param{STEPS - 1}"))
    for number in range(3):
        alone = trajectory(
            layers("init")[number],
            [layers(f"grad{t}")[number] for t in range(STEPS)],
            **options(case),
        )[-1]
        assert_close(jax.tree.map(lambda array, n=number: array[n], stacked), alone)
    # Stacked twice, as the norms of qk_layernorm by head and layer.
    twice = trajectory(
        {"vector": stack("init")["vector"][None]},
        [{"vector": gradient["vector"][None]} for gradient in gradients],
        stacked=lambda params: {"vector": 2},
        **options(case),
    )[-1]
    assert_close(twice["vector"][0], stacked["vector"])


def test_state_holds_one_number_per_output_feature() -> None:
    params = {
        "kernel": jnp.ones((5, 7)),
        "vector": jnp.ones(6),
        "layers": {"kernel": jnp.ones((3, 5, 7)), "vector": jnp.ones((3, 6))},
        "embedding": jnp.ones((11, 4)),
    }
    stacked = {"kernel": 0, "vector": 0, "layers": True, "embedding": 0}  # a prefix of the tree
    out_first = {"kernel": False, "vector": False, "layers": False, "embedding": True}
    state = scale_by_adalite(stacked=stacked, out_first=out_first).init(params)
    assert jax.tree.map(jnp.shape, state.second_moment) == {
        "kernel": (7,),
        "vector": (),
        "layers": {"kernel": (3, 7), "vector": (3,)},
        "embedding": (11,),
    }
    assert state.momentum is None
    with_momentum = scale_by_adalite(momentum=0.5, stacked=stacked).init(params)
    assert jax.tree.map(jnp.shape, with_momentum.momentum) == jax.tree.map(jnp.shape, params)


def test_zero_gradients_and_zero_parameters_stay_finite() -> None:
    ones, zeros = jnp.ones((4, 3)), jnp.zeros((4, 3))
    tilted = jnp.arange(12.0).reshape(4, 3)
    params = {"no_gradient": tilted, "no_parameter": zeros, "constant_gradient": tilted}
    # A gradient equal for all inputs of an output is nothing once it is centralised.
    gradients = {"no_gradient": zeros, "no_parameter": tilted, "constant_gradient": ones}
    tx = scale_by_adalite()
    directions, state = tx.update(gradients, tx.init(params), params)
    np.testing.assert_array_equal(directions["no_gradient"], zeros)
    np.testing.assert_array_equal(directions["constant_gradient"], zeros)
    # Without a parameter norm there is no trust ratio: the clipped update, whose RMS is 1.
    rms = float(jnp.sqrt(jnp.mean(jnp.square(directions["no_parameter"]))))
    assert rms == pytest.approx(1.0, rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_learning_rate_may_be_a_schedule() -> None:
    gradients = [golden("default", f"grad{t}") for t in range(2)]
    given = options("default") | {"learning_rate": lambda step: 0.01 * (step == 1)}
    first, second = trajectory(golden("default", "init"), gradients, **given)
    for name, array in golden("default", "init").items():
        np.testing.assert_array_equal(first[name], array)
    assert np.abs(second["kernel"] - first["kernel"]).max() > 0


def test_bfloat16_parameters_get_float32_state() -> None:
    params = {"kernel": jnp.ones((4, 3), jnp.bfloat16)}
    tx = scale_by_adalite(momentum=0.9)
    directions, state = tx.update(params, tx.init(params), params)
    assert directions["kernel"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1:])} == {jnp.dtype("float32")}


def test_bfloat16_is_computed_with_as_float32() -> None:
    rng = np.random.default_rng(0)
    params, gradients = (
        {"kernel": jnp.asarray(rng.standard_normal((64, 3)), jnp.bfloat16)} for _ in range(2)
    )
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (params, gradients)]
    tx = scale_by_adalite()
    directions, _ = tx.update(gradients, tx.init(params), params)
    expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    np.testing.assert_array_equal(directions["kernel"], expected["kernel"])


def test_update_without_parameters_is_an_error() -> None:
    tx = adalite(0.1)
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="params are missing"):
        tx.update(params, tx.init(params))
