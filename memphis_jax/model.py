"""StableLM, top to bottom: the whole family that Hugging Face's StableLmConfig describes.

Flax NNX as a plain pytree: modules hold only `nnx.Param`; jit, grad, vmap and scan are JAX's own.
Kernels are stored [in, out]; the layers are one `Block` whose parameters carry a leading axis L,
built by vmap and run by scan. Compute follows the dtype of the activations; LayerNorm statistics,
rotary angles, softmax and logits are float32. Imports `memphis_jax.config` only.

Axis letters: B batch, T query position, S key position, N heads, K kv-heads, R query heads per
kv-head, H head dim, D model, F mlp, V vocabulary, L layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from memphis_jax.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
QUERY_CHUNK = 128  # queries whose attention scores exist at once

# attend(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> (output [B,T,N,H], a cache or None)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


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


class Ops(NamedTuple):
    """What a mesh of devices computes another way, or lays out; the values are the same.

    `memphis_jax.parallel` makes those of a mesh; the defaults are for one device.
    """

    # table [V, D], tokens [B, T], dtype -> [B, T, D] in dtype
    lookup: Callable[[jax.Array, jax.Array, jnp.dtype | str], jax.Array] = embedding
    # x, kind of activation -> x, laid out as that kind lies
    constrain: Callable[[jax.Array, str], jax.Array] = lambda x, _: x
    # q [B, T, N, H], k, v [B, T, K, H], segment_ids [B, T] -> [B, T, N, H], causal in segments
    attention: Callable[..., jax.Array] = causal_attention
    num_shards: int = 1  # devices that have rows of their own
    unroll: int = 1  # layers in a turn of the loop


ONE_DEVICE = Ops()


_policies = jax.checkpoint_policies
# Attention's output and what its backward pass needs: named by our kernels, jax's own for cuDNN.
_ATTENTION = _policies.save_from_both_policies(
    _policies.save_only_these_names("attention"),
    lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd"),
)
# What is kept for the backward pass, by the name of the policy (config.REMAT).
POLICIES: dict[str, Any] = {
    "full": None,
    "attention": _ATTENTION,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
}


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        dim, self.head_dim = config.hidden_size, config.head_dim
        kv_dim = config.num_key_value_heads * self.head_dim
        linear = partial(Linear, std=config.initializer_range)
        self.q_proj = linear(keys[0], (dim, dim), bias=config.use_qkv_bias)
        self.k_proj = linear(keys[1], (dim, kv_dim), bias=config.use_qkv_bias)
        self.v_proj = linear(keys[2], (dim, kv_dim), bias=config.use_qkv_bias)
        self.o_proj = linear(keys[3], (dim, dim))
        norm = partial(LayerNormPerHead, head_dim=self.head_dim, eps=config.layer_norm_eps)
        self.q_layernorm = norm(config.num_attention_heads) if config.qk_layernorm else None
        self.k_layernorm = norm(config.num_key_value_heads) if config.qk_layernorm else None

    def __call__(
        self, x: jax.Array, rotary: Rotary, attend: Attend, constrain: Any
    ) -> tuple[jax.Array, Any]:
        def heads(y: jax.Array) -> jax.Array:  # [B, T, heads * H] -> [B, T, heads, H]
            return constrain(y.reshape(*x.shape[:2], -1, self.head_dim), "heads")

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        out, cache = attend(rotary(q), rotary(k), v)
        return self.o_proj(out.reshape(x.shape)), cache


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)): SwiGLU (arXiv 2002.05202) with the activation hidden_act."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        dim, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(keys[0], (dim, inner), std=std)
        self.up_proj = Linear(keys[1], (dim, inner), std=std)
        self.down_proj = Linear(keys[2], (inner, dim), std=std)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array, constrain: Any) -> jax.Array:
        gate, up = self.gate_proj(x), self.up_proj(x)  # [B, T, F]
        return self.down_proj(constrain(ACTIVATIONS[self.hidden_act](gate) * up, "mlp"))


class Block(nnx.Module):
    """Pre-norm decoder layer; with use_parallel_residual, MLP and attention read the same norm."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.self_attn = Attention(config, attention_key)
        self.mlp = MLP(config, mlp_key)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = (
            None
            if config.use_parallel_residual
            else LayerNorm(config.hidden_size, config.layer_norm_eps)
        )

    def __call__(
        self, x: jax.Array, rotary: Rotary, attend: Attend, constrain: Any = ONE_DEVICE.constrain
    ) -> tuple[jax.Array, Any]:
        normed = self.input_layernorm(x)
        attended, cache = self.self_attn(normed, rotary, attend, constrain)
        if self.post_attention_layernorm is None:
            return constrain(x + attended + self.mlp(normed, constrain), "residual"), cache
        x = constrain(x + attended, "residual")
        y = self.mlp(self.post_attention_layernorm(x), constrain)
        return constrain(x + y, "residual"), cache


class StableLM(nnx.Module):
    """StableLM of a ModelConfig with random weights, N(0, initializer_range), in float32."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        std = config.initializer_range
        self.embed_tokens = nnx.Param(std * jax.random.normal(embed_key, shape))  # [V, D]
        layer_keys = jax.random.split(layers_key, config.num_hidden_layers)
        self.layers = jax.vmap(lambda k: Block(config, k))(layer_keys)  # leaves [L, ...]
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(head_key, shape[::-1], std=std)

    def embed(
        self, tokens: jax.Array, dtype: jnp.dtype | str = jnp.float32, ops: Ops = ONE_DEVICE
    ) -> jax.Array:
        """tokens [B, T] int32 -> embeddings [B, T, D] in `dtype`, the dtype of all that follows."""
        return ops.lookup(self.embed_tokens[...], tokens, dtype)

    def rotary(self, positions: jax.Array) -> Rotary:
        return Rotary(positions, self.config.rotary_dim, self.config.rope_theta)

    def hidden(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        *,
        remat: str = "none",
        ops: Ops = ONE_DEVICE,
    ) -> jax.Array:
        """Embeddings [B, T, D] of packed rows through all layers and the final norm, [B, T, D].

        See `causal_attention` for segment_ids; positions [B, T] restart in every segment. `remat`
        names what the backward pass does not recompute (`config.REMAT`).
        """
        rotary = self.rotary(positions)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return ops.attention(q, k, v, segment_ids), None

        def body(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(x, rotary, attend, ops.constrain)

        if remat != "none":
            # Without a loop between them, XLA would find what is computed again to be known.
            body = jax.checkpoint(body, prevent_cse=ops.unroll > 1, policy=POLICIES[remat])
        return self.norm(jax.lax.scan(body, embeddings, self.layers, unroll=ops.unroll)[0])

    def head(self) -> jax.Array:
        """Output projection [D, V]; the transposed embedding where tied."""
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dtype: jnp.dtype | str = jnp.float32,
    ) -> jax.Array:
        """tokens [B, T] int32 -> float32 logits [B, T, V], for checks only: training has none."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = self.hidden(self.embed(tokens, dtype), positions, segment_ids)
        return project(hidden, self.head())


def project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """hidden [..., D] @ head [D, V] -> float32 logits [..., V], operands in hidden's dtype."""
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Key path of a model leaf -> its name, e.g. "layers/self_attn/q_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def abstract(config: ModelConfig) -> StableLM:
    """The model of `config` with ShapeDtypeStruct leaves: nothing is allocated."""
    return jax.eval_shape(lambda: StableLM(config, jax.random.key(0)))


def flatten(model: StableLM) -> dict[str, Any]:
    """{leaf name: array} in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {leaf_name(path): leaf for path, leaf in leaves}


def unflatten(config: ModelConfig, arrays: dict[str, Any]) -> StableLM:
    """StableLM from {leaf name: array}. Raises ValueError naming missing or surplus leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(config))
    names = [leaf_name(path) for path, _ in leaves]
    if set(names) != set(arrays):
        missing, surplus = sorted(set(names) - set(arrays)), sorted(set(arrays) - set(names))
        raise ValueError(f"leaves do not fit the model: missing {missing}, surplus {surplus}")
    return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in names])
