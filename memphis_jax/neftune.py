"""NEFTune: uniform noise on the embeddings of training examples. Imports nothing of ours.

Axis letters: B batch row, T position, D model.
"""

import jax
import jax.numpy as jnp


def neftune_noise(
    key: jax.Array, embeddings: jax.Array, segment_ids: jax.Array, alpha: float
) -> jax.Array:
    """embeddings + alpha / sqrt(L * D) * U(-1, 1), L the length of each token's own segment.

    NEFTune (arXiv 2310.05914, alg. 1), for packed rows: L is the example's real length, not the
    row's, and padding gets no noise. The original Memphis framework drew U(0, 1) with a fixed
    length; this follows the paper.

    Args:
      key: PRNG key.
      embeddings: [B, T, D]; the noise is drawn in float32 and added in this dtype.
      segment_ids: [B, T] int32, 0 = padding.
      alpha: noise scale; 5 to 15 in the paper.

    Returns:
      [B, T, D] in the dtype of `embeddings`.
    """
    num_segments = segment_ids.shape[1] + 1
    ones = jnp.ones(segment_ids.shape[1], jnp.float32)
    lengths = jax.vmap(lambda ids: jax.ops.segment_sum(ones, ids, num_segments)[ids])(segment_ids)
    scale = alpha * jax.lax.rsqrt(lengths * embeddings.shape[-1])  # [B, T]
    scale = jnp.where(segment_ids > 0, scale, 0.0)
    noise = jax.random.uniform(key, embeddings.shape, jnp.float32, -1.0, 1.0)
    return embeddings + (noise * scale[..., None]).astype(embeddings.dtype)
