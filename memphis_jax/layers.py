"""The parts of a layer: products, norms, rotary positions, attention, the table of embeddings.

What has a backward pass of its own has it for memory or for rounding, and says so. Compute follows
the dtype of the activations; statistics, angles and softmax are float32. Imports nothing of ours.

Axis letters: B batch, T query position, S key position, N heads, K kv-heads, R query heads per
kv-head, H head dim, D model, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

QUERY_CHUNK = 128  # queries whose attention scores exist at once


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] in x's dtype, with the kernel's gradient in its own.

    So devices and micro-batches add float32 gradients where activations are bfloat16.
    """
    return x @ kernel.astype(x.dtype)


def _linear_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    # The product itself and not `linear`: remat policies look for it.
    return x @ kernel.astype(x.dtype), (x, kernel)


def _linear_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dkernel = jnp.einsum("...i,...o->io", x, dy, preferred_element_type=kernel.dtype)
    return dy @ kernel.astype(dy.dtype).T, dkernel


linear.defvjp(_linear_forward, _linear_backward)


class Linear(nnx.Module):
    """x @ kernel + bias, kernel [in, out]."""

    def __init__(self, key: jax.Array, shape: tuple[int, int], *, std: float, bias: bool = False):
        self.kernel = nnx.Param(std * jax.random.normal(key, shape))
        self.bias = nnx.Param(jnp.zeros(shape[1])) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """LayerNorm over the last axis, statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    centered = x32 - x32.mean(-1, keepdims=True)
    y = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class LayerNormPerHead(nnx.Module):
    """One LayerNorm without bias for every head: scale [heads, H] (qk_layernorm)."""

    def __init__(self, heads: int, head_dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((heads, head_dim)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, heads, H]
        return layer_norm(x, self.scale[...], None, self.eps)


class Rotary:
    """Rotary position embedding on the first `dim` of each head's dimensions, half-split.

    RoFormer (arXiv 2104.09864) with GPT-NeoX's layout: dimension i is rotated with i + dim / 2 by
    the angle position * theta^(-2 i / dim).
    """

    def __init__(self, positions: jax.Array, dim: int, theta: float):  # positions [B, T]
        inverse_frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        angles = positions[..., None, None].astype(jnp.float32) * inverse_frequency
        self.cos, self.sin = jnp.cos(angles), jnp.sin(angles)  # [B, T, 1, dim / 2]

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, heads, H]
        return _rotate(x, self.cos, self.sin)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, heads, H] turned by angles [B, T, 1, dim / 2]; gradients are turned back.

    Derived by jax, the gradient would be pads and sums of every slice.
    """
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], -1)


_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda saved, dy: (_rotate(dy, saved[0], -saved[1]), None, None),
)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v where mask, float32 softmax, kv-heads shared by groups of heads.

    q [B, T, N, H]; k, v [B, K, S, H], the layout in which a matmul reads them fastest; mask
    [B, T, S] bool. Returns [B, T, N, H] in q's dtype. A query without a single allowed key
    (padding) gets the plain mean of v: finite, never used.
    """
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[1], heads // k.shape[1], dim)  # [B, T, K, R, H]
    scores = jnp.einsum("btkrh,bksh->bkrts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * dim**-0.5, -1e30)
    return jnp.moveaxis(_softmax_values(scores, v), 3, 1).reshape(batch, length, heads, dim)


@jax.custom_vjp
def _softmax_values(scores: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(scores [B, K, R, T, S]) v [B, K, S, H] -> [B, K, R, T, H] in v's dtype.

    Its own gradient, for the sum over keys in a softmax's: sum_s p_s dp_s = out . dout, over H
    numbers instead of S (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    return _softmax_values_forward(scores, v)[0]


def _softmax_values_forward(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkrts,bksh->bkrth", weights.astype(v.dtype), v)
    out = checkpoint_name(out, "attention")  # here, where it is also a residual
    return out, (weights, v, out)


def _softmax_values_backward(saved: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, v, out = saved
    inner = (out.astype(jnp.float32) * dout).sum(-1, keepdims=True)
    dweights = jnp.einsum("bkrth,bksh->bkrts", dout, v, preferred_element_type=jnp.float32)
    dv = jnp.einsum("bkrts,bkrth->bksh", weights.astype(v.dtype), dout)
    return weights * (dweights - inner), dv


_softmax_values.defvjp(_softmax_values_forward, _softmax_values_backward)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Causal attention inside segments, computed in chunks of queries that skip later keys.

    q [B, T, N, H]; k, v [B, T, K, H]; segment_ids [B, T] int32 (0 = padding) or None for one
    segment per row. Returns [B, T, N, H].
    """
    length = q.shape[1]
    position = jnp.arange(length)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    outputs = []
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        mask = (position[start:end, None] >= position[None, :end])[None]  # [1, T, S]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        outputs.append(masked_attention(q[:, start:end], k[:, :, :end], v[:, :, :end], mask))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedding(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype | str) -> jax.Array:
    """Rows `tokens` [B, T] of a table [V, D], [B, T, D] in `dtype`.

    The gradient is added up in the table's dtype: thousands of occurrences of one token would be
    lost in a sum of bfloat16.
    """
    return table.astype(dtype)[tokens]


def _embedding_forward(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype | str) -> Any:
    return embedding(table, tokens, dtype), (table, tokens)


def _embedding_backward(_: jnp.dtype | str, kept: Any, gradient: jax.Array) -> Any:
    table, tokens = kept
    return jnp.zeros_like(table).at[tokens].add(gradient.astype(table.dtype)), None


embedding.defvjp(_embedding_forward, _embedding_backward)
