"""Losses: pure functions of arrays, each a (sum, weight) pair in float32.

Sums are added over micro-batches and devices and divided by the added weights once: token losses
per token, the ranking loss per group. Imports nothing of ours.

Axis letters: B batch row, T position, D model, V vocabulary, S segment, G group, R candidate.
"""

import jax
import jax.numpy as jnp

SumWeight = tuple[jax.Array, jax.Array]


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk_size: int = 1024
) -> jax.Array:
    """log softmax(hidden @ head)[targets], without ever holding the [B, T, V] logits.

    Scans over chunks of positions, the same of every row, and recomputes each chunk's logits in the
    backward pass: about chunk_size * V logits exist at once. Rows that lie on several devices stay
    where they are.

    Args:
      hidden: [B, T, D], any float dtype; the matmul runs in it and accumulates in float32.
      head: [D, V].
      targets: [B, T] int32 in [0, V).
      chunk_size: tokens per chunk, of all B rows; at least one position of each is taken.

    Returns:
      [B, T] float32.
    """
    rows, length = targets.shape
    width = min(max(chunk_size // rows, 1), length)  # positions in a chunk
    num_chunks = -(-length // width)
    pad = num_chunks * width - length
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def chunk_logprobs(chunk_hidden: jax.Array, chunk_targets: jax.Array) -> jax.Array:
        logits = jnp.matmul(chunk_hidden, head, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, chunk_targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    if num_chunks == 1:
        return chunk_logprobs(hidden, targets)

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, width, ...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, num_chunks, width, *x.shape[2:]).swapaxes(0, 1)

    _, stacked = jax.lax.scan(
        lambda _, chunk: (None, chunk_logprobs(*chunk)), None, (chunks(hidden), chunks(targets))
    )
    return stacked.swapaxes(0, 1).reshape(rows, -1)[:, :length]


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
