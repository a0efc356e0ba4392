"""Losses: pure functions of arrays, each a (sum, weight) pair in float32.

Sums are added over micro-batches and devices and divided by the added weights once: token losses
per token, the ranking loss per group. Imports nothing of ours.

Axis letters: B batch row, T position, D model, V vocabulary, S segment, G group, R candidate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SumWeight = tuple[jax.Array, jax.Array]


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk_size: int = 512
) -> jax.Array:
    """log softmax(hidden @ head)[targets], without ever holding the [B, T, V] logits.

    Goes through chunks of positions, the same of every row, so that about chunk_size * V logits
    exist at once; rows that lie on several devices stay where they are. Differentiated, no product
    is wasted: where the head is not (frozen), the forward pass keeps

      d logprob / d hidden = head[:, target] - sum_v softmax_v head[:, v]     [B, T, D]

    instead of the hidden states, and the backward pass only scales it. Where the head is trained as
    well, the logits of several chunks are computed again, and the head's gradient is added up in
    float32.

    Args:
      hidden: [B, T, D], any float dtype; matmuls run in it and accumulate in float32.
      head: [D, V].
      targets: [B, T] int32 in [0, V); another gives NaN.
      chunk_size: tokens per chunk, of all B rows; at least one position of each is taken.

    Returns:
      [B, T] float32.
    """
    rows, length = targets.shape
    return _token_logprobs(hidden, head, targets, min(max(chunk_size // rows, 1), length))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, width: int
) -> jax.Array:
    head = head.astype(hidden.dtype)

    def chunk(_: None, x: jax.Array, y: jax.Array) -> tuple[None, jax.Array]:
        return None, _softmax(x, head, y)[0]

    return _scan_chunks(chunk, None, (hidden, targets), width)[1]


class _Saved(NamedTuple):
    """For the backward pass; what it does not need is None."""

    dhidden: jax.Array | None = None  # [B, T, D], of logprobs: the head is frozen
    slope: jax.Array | None = None  # [B, T, V], of logprobs by logits: one chunk has all positions
    inputs: tuple[jax.Array, ...] = ()


def _logprobs_forward(hidden: Any, head: Any, targets: Any, width: int) -> tuple[jax.Array, _Saved]:
    trained, inputs = head.perturbed, (hidden.value, head.value, targets.value)
    hidden, head, targets = inputs
    weights = head.astype(hidden.dtype)
    if trained and width == targets.shape[1]:
        logprobs, slope = _softmax(hidden, weights, targets)
        return logprobs, _Saved(slope=slope, inputs=inputs)
    if trained:
        return _token_logprobs(hidden, head, targets, width), _Saved(inputs=inputs)

    def chunk(_: None, x: jax.Array, y: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logprobs, slope = _softmax(x, weights, y)
        return None, (logprobs, slope.astype(x.dtype) @ weights.T)

    _, (logprobs, dhidden) = _scan_chunks(chunk, None, (hidden, targets), width)
    return logprobs, _Saved(dhidden)


def _logprobs_backward(width: int, saved: _Saved, dy: jax.Array) -> tuple[Any, Any, None]:
    if saved.dhidden is not None:
        return (dy[..., None] * saved.dhidden).astype(saved.dhidden.dtype), None, None
    hidden, head, targets = saved.inputs
    weights = head.astype(hidden.dtype)

    def chunk(dhead: jax.Array, x: jax.Array, y: jax.Array, dy: jax.Array) -> Any:
        slope = _softmax(x, weights, y)[1] if saved.slope is None else saved.slope
        slope = (dy[..., None] * slope).astype(x.dtype)  # [B, width, V]
        dhead += jnp.einsum("btd,btv->dv", x, slope, preferred_element_type=jnp.float32)
        return dhead, slope @ weights.T

    zeros = jnp.zeros(head.shape, jnp.float32)
    dhead, dhidden = _scan_chunks(chunk, zeros, (hidden, targets, dy), width)
    return dhidden, dhead.astype(head.dtype), None


_token_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _softmax(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logprobs [...] of the targets, their derivative by the logits [..., V]), float32."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    top = logits.max(-1, keepdims=True)
    powers = jnp.exp(logits - top)
    total = powers.sum(-1, keepdims=True)
    chosen = jnp.where(hit, logits, 0.0).sum(-1)
    chosen = jnp.where(hit.any(-1), chosen, jnp.nan)
    return chosen - (top + jnp.log(total))[..., 0], hit - powers / total


def _scan_chunks(
    function: Callable[..., tuple[Any, Any]], carry: Any, arrays: tuple[jax.Array, ...], width: int
) -> tuple[Any, Any]:
    """(carry, results) of function(carry, *chunks) over arrays [B, T, ...], `width` positions each.

    The last chunk is filled up with zeros.
    """
    rows, length = arrays[0].shape[:2]
    count = -(-length // width)
    if count == 1:
        return function(carry, *arrays)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, width, ...]
        x = jnp.pad(x, ((0, 0), (0, count * width - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, count, width, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(rows, count * width, *x.shape[3:])[:, :length]

    chunks = tuple(map(cut, arrays))
    carry, results = jax.lax.scan(lambda carry, chunk: function(carry, *chunk), carry, chunks)
    return carry, jax.tree.map(join, results)


def cross_entropy(logprobs: jax.Array, where: jax.Array) -> SumWeight:
    """-log p summed over tokens: (sum of -logprobs, number of tokens) where `where` holds.

    logprobs: any shape, float; where: the same shape, bool.
    """
    return mixce(logprobs, where, 1.0)


def mixce(logprobs: jax.Array, where: jax.Array, eta: float) -> SumWeight:
    """MixCE (arXiv 2305.16958, eq. 8): forward and self-weighted reverse cross entropy, mixed.

    Per token, with q = stop_gradient(exp(logprob)):  -(eta + (1 - eta) * q) * logprob.
    eta = 1 is the cross entropy. Returns (sum, number of tokens) where `where` holds.
    """
    logprobs = logprobs.astype(jnp.float32)
    logprobs = jnp.where(where, logprobs, 0.0)  # before exp: masked values may be anything
    probability = jax.lax.stop_gradient(jnp.exp(logprobs))
    loss = -(eta + (1.0 - eta) * probability) * logprobs
    return loss.sum(), where.sum(dtype=jnp.float32)


def sequence_logprobs(logprobs: jax.Array, segment_ids: jax.Array, where: jax.Array) -> jax.Array:
    """Mean logprob per token of every segment of packed rows (length-normalised).

    Args:
      logprobs: [B, T] token logprobs.
      segment_ids: [B, T] int32, 0 = padding.
      where: [B, T] bool, the tokens that count (a completion's, not its prompt's).

    Returns:
      [B, T + 1] float32, indexed by segment id (a row of T tokens has at most T segments; entries
      of absent segments and of segments with no such token are 0).
    """
    num_segments = segment_ids.shape[1] + 1

    def per_row(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, ids, num_segments)

    where32 = where.astype(jnp.float32)
    sums = jax.vmap(per_row)(jnp.where(where, logprobs.astype(jnp.float32), 0.0), segment_ids)
    counts = jax.vmap(per_row)(where32, segment_ids)
    return sums / jnp.maximum(counts, 1.0)


def pro(logprobs: jax.Array, ranks: jax.Array, average: bool = True) -> SumWeight:
    """Preference ranking loss (PRO, arXiv 2306.17492, eq. 5) on length-normalised logprobs.

    For a candidate i with a worse one in its group (rank_j > rank_i), s = its logprob per token:
      l_i = -log(exp(s_i) / (exp(s_i) + A_i)),
    A_i the mean (average=True, what Memphis uses) or the sum (the paper) of exp(s_j) over the worse
    ones. A group's loss is the sum of its l_i; a group with nothing to compare adds 0.

    Args:
      logprobs: [G, R] float.
      ranks: [G, R] int; 0 is best, negative is padding.

    Returns:
      (sum over groups, number of groups with a candidate that is not padding). A departure from the
      original, whose padding leaks into the loss.
    """
    valid = ranks >= 0
    scores = jnp.where(valid, logprobs.astype(jnp.float32), 0.0)
    worse = (ranks[:, None, :] > ranks[:, :, None]) & valid[:, None, :] & valid[:, :, None]
    count = worse.sum(-1)  # [G, R]
    compared = count > 0
    # A candidate with nothing to compare gets one harmless term, so that no gradient is NaN.
    included = jnp.where(compared[..., None], worse, jnp.eye(ranks.shape[1], dtype=bool))
    log_worse = jax.nn.logsumexp(jnp.where(included, scores[:, None, :], -jnp.inf), axis=-1)
    if average:
        log_worse = log_worse - jnp.log(jnp.maximum(count, 1))
    losses = jnp.where(compared, jax.nn.softplus(log_worse - scores), 0.0)
    return losses.sum(), valid.any(-1).sum(dtype=jnp.float32)
