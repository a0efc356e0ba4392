"""StableLM, top to bottom: the whole family that Hugging Face's StableLmConfig describes.

Flax NNX as a plain pytree: modules hold only `nnx.Param`; jit, grad, vmap and scan are JAX's own.
Kernels are stored [in, out]; the layers are one `Block` whose parameters carry a leading axis L,
built by vmap and run by scan. Compute follows the dtype of the activations; LayerNorm statistics,
rotary angles, softmax and logits are float32. Imports `config` and `layers` only.

Axis letters: B batch, T query position, S key position, N heads, K kv-heads, R query heads per
kv-head, H head dim, D model, F mlp, V vocabulary, L layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memphis_jax.config import ModelConfig
from memphis_jax.layers import (
    LayerNorm,
    LayerNormPerHead,
    Linear,
    Rotary,
    causal_attention,
    embedding,
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# attend(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> (output [B,T,N,H], a cache or None)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


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
