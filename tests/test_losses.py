"""Losses against the original's numbers, hand-worked values, and what must not poison them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close

from memphis_jax import losses
from memphis_jax.losses import cross_entropy, mixce, sequence_logprobs, token_logprobs

pro = jax.jit(losses.pro, static_argnums=2)  # one compilation instead of one per operation
NUMBERS = dict(np.load(GOLDEN / "losses.npz"))
PRO_CASES = [name.removesuffix("/ranks") for name in NUMBERS if name.endswith("/ranks")]
ETAS = [name.split("/")[1] for name in NUMBERS if name.endswith("/mask")]


def mean(total_and_weight: Any) -> Any:
    total, weight = total_and_weight
    return total / weight


def mean_and_gradient(loss: Any, logprobs: Any, *rest: Any) -> tuple[Any, np.ndarray]:
    run = jax.jit(jax.value_and_grad(lambda x: mean(loss(x, *rest))))
    value, gradient = run(jnp.asarray(logprobs, jnp.float32))
    return float(value), np.asarray(gradient)


# --- MixCE and cross entropy


@pytest.mark.parametrize("eta", ETAS)
def test_mixce_golden_numbers(eta: str) -> None:
    logprobs, mask, loss, gradient = (
        NUMBERS[f"mixce/{eta}/{name}"] for name in ("logprobs", "mask", "loss", "grad")
    )
    value, ours = mean_and_gradient(mixce, logprobs, mask, float(eta))
    assert value == pytest.approx(float(loss), rel=1e-5)
    assert_close(ours, gradient)


def test_mixce_by_hand() -> None:
    # p = 1/2: -(0.75 + 0.25 / 2) ln(1/2) = 0.875 ln 2; p = 1/4: (0.75 + 0.25 / 4) 2 ln 2.
    logprobs = jnp.log(jnp.array([0.5, 0.25, 0.1]))
    total, weight = mixce(logprobs, jnp.array([True, True, False]), 0.75)
    assert float(total) == pytest.approx((0.875 + 0.8125 * 2) * math.log(2), rel=1e-6)
    assert float(weight) == 2
    # The probability is a constant weight: its derivative does not enter the gradient.
    _, gradient = mean_and_gradient(mixce, logprobs, jnp.array([True, True, False]), 0.75)
    np.testing.assert_allclose(gradient, [-0.875 / 2, -0.8125 / 2, 0.0], rtol=1e-6)


def test_cross_entropy_by_hand() -> None:
    logprobs = jnp.log(jnp.array([[0.5, 0.25], [0.125, 0.1]]))
    total, weight = cross_entropy(logprobs, jnp.array([[True, False], [True, False]]))
    assert (float(total), float(weight)) == (pytest.approx(4 * math.log(2)), 2)
    assert total.dtype == weight.dtype == jnp.float32
    total, weight = cross_entropy(logprobs.astype(jnp.bfloat16), jnp.ones((2, 2), bool))
    assert total.dtype == weight.dtype == jnp.float32


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_tokens_may_hold_anything(poison: float) -> None:
    where = jnp.array([True, False])
    clean, gradient = mean_and_gradient(mixce, [-0.7, -1.0], where, 0.75)
    value, poisoned = mean_and_gradient(mixce, [-0.7, poison], where, 0.75)
    assert value == clean
    np.testing.assert_array_equal(poisoned, gradient)
    assert gradient[1] == 0


# --- PRO


@pytest.mark.parametrize("case", PRO_CASES)
def test_pro_golden_numbers(case: str) -> None:
    logprobs, ranks, loss, gradient = (
        NUMBERS[f"{case}/{name}"] for name in ("logprobs", "ranks", "loss", "grad")
    )
    value, ours = mean_and_gradient(pro, logprobs, ranks, "avg1" in case)
    assert value == pytest.approx(float(loss), rel=1e-5)
    assert_close(ours, gradient)


def test_pro_by_hand() -> None:
    # Probabilities per token 1/2 (best), 1/4 and 1/8 (worse, equal rank): mean 3/16, sum 3/8.
    logprobs, ranks = jnp.log(jnp.array([[0.5, 0.25, 0.125]])), jnp.array([[0, 1, 1]])
    assert float(pro(logprobs, ranks)[0]) == pytest.approx(-math.log(8 / 11), rel=1e-6)
    assert float(pro(logprobs, ranks, False)[0]) == pytest.approx(-math.log(4 / 7), rel=1e-6)
    # In a full order the second is compared as well, with the third alone: 1/4 of 1/4 + 1/8.
    both = -math.log(8 / 11) - math.log(2 / 3)
    assert float(pro(logprobs, jnp.array([[0, 1, 2]]))[0]) == pytest.approx(both, rel=1e-6)
    # A pair of equals: ln 2, and a gradient of half a step each way.
    value, gradient = mean_and_gradient(pro, [[-1.0, -1.0]], jnp.array([[0, 1]]))
    assert value == pytest.approx(math.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], rtol=1e-6)


def test_pro_counts_groups_not_padding() -> None:
    logprobs = jnp.array([[-1.0, -2.0], [-1.0, -3.0], [-1.0, -2.0], [-5.0, -6.0]])
    pair, nothing, filler = [0, 1], [0, 0], [-100, -100]
    total, weight = pro(logprobs, jnp.array([pair, nothing, filler, [0, -100]]))
    alone, _ = pro(logprobs[:1], jnp.array([pair]))
    assert float(total) == float(alone)  # a group with nothing to compare adds 0
    assert float(weight) == 3  # and still is a group; the filler is none


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_padded_candidates_may_hold_anything(poison: float) -> None:
    ranks = jnp.array([[0, 1, -100], [-100, -100, -100], [2, 2, -100]])
    scores = np.array([[-0.5, -0.9, 0.0], [0.0, 0.0, 0.0], [-1.0, -2.0, 0.0]], np.float32)
    clean, gradient = mean_and_gradient(pro, scores, ranks)
    value, poisoned = mean_and_gradient(pro, np.where(ranks < 0, poison, scores), ranks)
    assert value == clean > 0
    np.testing.assert_array_equal(poisoned, gradient)
    assert (gradient[0, :2] != 0).all()
    assert not gradient[1:].any()
    assert not gradient[:, 2].any()


def test_pro_stays_finite_at_extremes() -> None:
    value, gradient = mean_and_gradient(pro, [[-1e4, 0.0], [0.0, -1e4]], jnp.array([[0, 1]] * 2))
    assert value == pytest.approx(1e4 / 2)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5], [0, 0]])


# --- logprobs


def test_sequence_logprobs_are_means_per_segment() -> None:
    logprobs = jnp.array([[-1.0, -2.0, -4.0, -8.0, np.nan], [-1.0, -3.0, -5.0, np.inf, 0.0]])
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 0, 0]])
    where = jnp.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]], bool)
    expected = [[0, -1.5, -8, 0, 0, 0], [0, 0, -4, 0, 0, 0]]
    np.testing.assert_array_equal(sequence_logprobs(logprobs, segments, where), expected)
    gradient = jax.grad(lambda x: sequence_logprobs(x, segments, where).sum())(logprobs)
    np.testing.assert_array_equal(gradient, [[0.5, 0.5, 0, 1, 0], [0, 0.5, 0.5, 0, 0]])


def logprob_inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((2, 13, 8)).astype(np.float32)
    head = rng.standard_normal((8, 29)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(rng.integers(0, 29, (2, 13)))


@pytest.mark.parametrize("differentiated", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("chunk_size", [1, 7, 26, 1000])
def test_token_logprobs_are_log_softmax_whatever_the_chunk(
    chunk_size: int, differentiated: tuple[int, ...]
) -> None:
    """Also by the hidden states alone, the head frozen, where another backward pass runs."""
    hidden, head, targets = logprob_inputs()
    weights = jnp.linspace(-1.0, 2.0, 26).reshape(2, 13)

    def plain(hidden: jax.Array, head: jax.Array) -> Any:
        logprobs = jax.nn.log_softmax(hidden @ head)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        return (weights * chosen).sum(), chosen

    def chunked(hidden: jax.Array, head: jax.Array) -> Any:
        chosen = token_logprobs(hidden, head, targets, chunk_size=chunk_size)
        return (weights * chosen).sum(), chosen

    def derive(function: Any) -> Any:
        run = jax.jit(jax.value_and_grad(function, argnums=differentiated, has_aux=True))
        (_, chosen), gradients = run(hidden, head)
        return {"logprobs": chosen, "gradients": gradients}

    assert_close(derive(chunked), derive(plain))
    assert_close(chunked(hidden, head), plain(hidden, head))  # and where nothing is


def array_sizes(jaxpr: Any) -> set[int]:
    """Sizes of all arrays computed in a jaxpr, inner ones included."""
    sizes = {variable.aval.size for eqn in jaxpr.eqns for variable in eqn.outvars}
    for parameter in jax.tree.leaves([eqn.params for eqn in jaxpr.eqns]):
        inner = getattr(parameter, "jaxpr", parameter)  # a closed jaxpr holds one
        if hasattr(inner, "eqns"):
            sizes |= array_sizes(inner)
    return sizes


@pytest.mark.parametrize("differentiated", [(0,), (0, 1)])
@pytest.mark.parametrize("chunk_size", [4, 16, 32, 64])
def test_logits_exist_for_one_chunk_only(chunk_size: int, differentiated: tuple[int, ...]) -> None:
    """Forward and backward: no array reaches [B T, V]; in a chunk of all tokens it would."""
    tokens, dim, vocabulary = 64, 4, 1009
    hidden, head = jnp.ones((2, tokens // 2, dim)), jnp.ones((dim, vocabulary))
    targets = jnp.ones((2, tokens // 2), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return token_logprobs(hidden, head, targets, chunk_size=chunk_size).sum()

    gradient = jax.grad(loss, argnums=differentiated)
    largest = max(array_sizes(jax.make_jaxpr(gradient)(hidden, head).jaxpr))
    assert largest == max(chunk_size, dim) * vocabulary
    memory = jax.jit(gradient).lower(hidden, head).compile()
    logits_bytes = 4 * tokens * vocabulary
    temporary = memory.memory_analysis().temp_size_in_bytes
    assert (temporary >= logits_bytes) == (2 * chunk_size >= tokens)  # two arrays of a chunk


def products(jaxpr: Any) -> int:
    """How many matrix products a jaxpr has, inner ones included, a loop's body once."""
    found = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    for parameter in jax.tree.leaves([eqn.params for eqn in jaxpr.eqns]):
        inner = getattr(parameter, "jaxpr", parameter)
        found += products(inner) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize(
    ("differentiated", "chunk_size", "number"),
    [((0,), 8, 2), ((0,), 26, 2), ((0, 1), 8, 4), ((0, 1), 26, 3)],
)
def test_only_chunks_of_a_trained_head_cost_a_product_twice(
    differentiated: tuple[int, ...], chunk_size: int, number: int
) -> None:
    """Full logits take two, and three with a head that trains."""
    hidden, head, targets = logprob_inputs()

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return token_logprobs(hidden, head, targets, chunk_size=chunk_size).sum()

    gradient = jax.make_jaxpr(jax.grad(loss, argnums=differentiated))(hidden, head)
    assert products(gradient.jaxpr) == number


def test_logprobs_of_bfloat16_are_float32() -> None:
    hidden, head, targets = logprob_inputs()
    logprobs = token_logprobs(hidden.astype(jnp.bfloat16), head, targets, chunk_size=5)
    assert logprobs.dtype == jnp.float32
    exact = token_logprobs(hidden, head, targets)
    assert 0 < np.abs(logprobs - exact).max() < 0.1


def test_a_target_outside_the_vocabulary_is_nan_and_not_a_silent_loss() -> None:
    logprobs = token_logprobs(jnp.ones((1, 2, 4)), jnp.ones((4, 3)), jnp.array([[0, 3]]))
    assert np.isnan(logprobs).tolist() == [[False, True]]
