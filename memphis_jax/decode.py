"""What sampling runs on the device: prompts into a KV cache, rows of it decoded, tokens drawn.

A row of the cache holds one sequence, its token at position p in slot p, so that rows may be of any
age. While a block of tokens is decoded the cache is only read: new keys and values go to a small
buffer, at the same place for all rows, which is put into the rows' own slots when the block ends.

Axis letters: B row, G prompt, T new token, P prompt position, S cache slot, N heads, K kv-heads, R
query heads per kv-head, H head dim, V vocabulary, L layer.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memphis_jax.model import Block, StableLM, causal_attention, project

TOP_P_STEPS = 24  # bisection steps: the cut is exact to 2^-24 of the largest probability


class LayerCache(NamedTuple):
    key: jax.Array  # [B, K, S, H]
    value: jax.Array


class Cache(NamedTuple):
    layers: tuple[LayerCache, ...]  # one by one: read in place, where a stack would be copied
    logits: jax.Array  # [B, V] float32, of each row's next token

    @property
    def num_slots(self) -> int:
        return self.layers[0].key.shape[2]


class Rows(NamedTuple):
    """What the host knows of the rows in the cache."""

    length: Any  # [B] int32, slots that are filled
    drawn: Any  # [B] int32, tokens drawn so far
    keys: Any  # [B, 2] uint32
    done: Any  # [B] bool, nothing is drawn for them


class Prompts(NamedTuple):
    """Prompts that were computed, to be copied into rows."""

    key: jax.Array  # [G, L, K, P, H]
    value: jax.Array
    logits: jax.Array  # [G, V] float32


def top_p_mask(probabilities: jax.Array, top_p: float) -> jax.Array:
    """The smallest set of most probable tokens whose probability reaches top_p (nucleus sampling).

    arXiv 1904.09751. probabilities [..., V] float32 -> bool [..., V]. The least kept probability is
    found by bisection, far cheaper than a sort over a large vocabulary; tokens as probable as the
    last one that is needed are kept with it.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the set of p >= low reaches top_p, that of p >= high does not
        middle = 0.5 * (low + high)
        enough = jnp.where(probabilities >= middle, probabilities, 0.0).sum(-1, keepdims=True)
        reached = enough >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    high = probabilities.max(-1, keepdims=True) * 1.0000002  # just above: keeps nothing
    low, _ = jax.lax.fori_loop(0, TOP_P_STEPS, halve, (jnp.zeros_like(high), high))
    return probabilities >= low


def sample_tokens(
    logits: jax.Array, keys: jax.Array, *, temperature: float, top_p: float
) -> jax.Array:
    """One token per row: argmax at temperature 0, else softmax(logits / temperature) within top_p.

    logits [B, V] float32, keys [B, 2] uint32 -> [B] int32. One uniform number per row inverts the
    cumulative distribution.
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    probabilities = jax.nn.softmax(logits / temperature, axis=-1)
    if top_p < 1.0:
        probabilities = jnp.where(top_p_mask(probabilities, top_p), probabilities, 0.0)
    cumulative = jnp.cumsum(probabilities, axis=-1)
    uniform = jax.vmap(jax.random.uniform)(keys)  # [B], in [0, 1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    # A float32 cumsum may wobble: without the second condition an excluded token could be drawn.
    return jnp.argmax((cumulative > threshold) & (probabilities > 0), axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames="dtype")
def prefill(model: StableLM, tokens: jax.Array, lengths: jax.Array, *, dtype: str) -> Prompts:
    """tokens [G, P] int32, right-padded, of lengths [G] -> their cache and next logits."""
    rotary = model.rotary(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return causal_attention(q, k, v, None), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    x, (keys, values) = jax.lax.scan(
        lambda x, block: block(x, rotary, attend), model.embed(tokens, dtype), model.layers
    )
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = project(model.norm(last), model.head())
    return Prompts(keys.swapaxes(0, 1), values.swapaxes(0, 1), logits)


@partial(jax.jit, donate_argnames="cache")
def insert(cache: Cache, prompts: Prompts, source: jax.Array, target: jax.Array) -> Cache:
    """Copies prompts[source] into rows `target`, both [any number] int32; targets >= B are dropped.

    Slots after the prompt keep what they held: a row's length says what is seen.
    """

    def put(into: jax.Array, new: jax.Array, number: int) -> jax.Array:
        return into.at[target, :, : new.shape[3]].set(new[source, number], mode="drop")

    layers = tuple(
        LayerCache(put(layer.key, prompts.key, i), put(layer.value, prompts.value, i))
        for i, layer in enumerate(cache.layers)
    )
    return Cache(layers, cache.logits.at[target].set(prompts.logits[source], mode="drop"))


def empty(model: StableLM, batch_size: int, num_slots: int, dtype: str) -> Cache:
    """A cache of zeros."""
    config = model.config
    shape = (batch_size, config.num_key_value_heads, num_slots, config.head_dim)
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    )
    return Cache(layers, jnp.zeros((batch_size, config.vocab_size)))


@partial(jax.jit, static_argnames="num_slots")
def resize(cache: Cache, *, num_slots: int) -> Cache:
    """The cache with more slots, or without its last ones."""

    def change(x: jax.Array) -> jax.Array:
        more = max(0, num_slots - x.shape[2])
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))[:, :, :num_slots]

    return cache._replace(layers=jax.tree.map(change, cache.layers))


@partial(
    jax.jit,
    static_argnames=("num_tokens", "temperature", "top_p", "eos_id", "dtype"),
    donate_argnames="cache",
)
def decode(
    model: StableLM,
    cache: Cache,
    rows: Rows,
    *,
    num_tokens: int,
    temperature: float,
    top_p: float,
    eos_id: int,
    dtype: str,
) -> tuple[Cache, jax.Array]:
    """Draws `num_tokens` more tokens per row: (cache, tokens [B, num_tokens]; EOS after the end).

    Rows that are not done need num_tokens free slots.
    """
    blocks = _unstack(model)
    slots = cache.num_slots
    seen = jnp.arange(slots) < rows.length[:, None]  # [B, S]
    buffer = jax.tree.map(lambda x: jnp.zeros_like(x[:, :, :num_tokens]), cache.layers)
    State = tuple[jax.Array, jax.Array, tuple[LayerCache, ...]]

    def step(state: State, at: jax.Array) -> tuple[State, jax.Array]:
        logits, done, buffer = state
        step_keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.drawn + at)
        tokens = sample_tokens(logits, step_keys, temperature=temperature, top_p=top_p)
        tokens = jnp.where(done, eos_id, tokens)
        block_seen = jnp.broadcast_to(jnp.arange(num_tokens) <= at, (len(tokens), num_tokens))
        mask = jnp.concatenate([seen, block_seen], axis=1)
        x, written = model.embed(tokens[:, None], dtype), []
        rotary = model.rotary((rows.length + at)[:, None])
        for block, old, new in zip(blocks, cache.layers, buffer, strict=True):
            x, new = block(x, rotary, partial(_attend, old, new, at, mask))
            written.append(new)
        logits = project(model.norm(x[:, 0]), model.head())
        return (logits, done | (tokens == eos_id), tuple(written)), tokens

    state = (cache.logits, rows.done, buffer)
    (logits, _, buffer), tokens = jax.lax.scan(step, state, jnp.arange(num_tokens))
    start = jnp.minimum(rows.length, slots - num_tokens)
    put = jax.vmap(lambda into, new, at: jax.lax.dynamic_update_slice(into, new, (0, at, 0)))
    layers = jax.tree.map(lambda into, new: put(into, new, start), cache.layers, buffer)
    return Cache(layers, logits), tokens.T


def _unstack(model: StableLM) -> list[Block]:
    """The layers one by one."""
    number = model.config.num_hidden_layers
    return [jax.tree.map(lambda leaf, i=i: leaf[i], model.layers) for i in range(number)]


def _attend(
    old: LayerCache,
    new: LayerCache,
    at: jax.Array,
    mask: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """One query per row over the cache and the block's buffer, into which it writes at `at`.

    old [B, K, S, H], new [B, K, T, H], mask [B, S + T], q [B, 1, N, H], k and v [B, 1, K, H].
    """
    batch, _, heads, dim = q.shape
    start = (0, 0, at, 0)
    new = LayerCache(
        jax.lax.dynamic_update_slice(new.key, k.swapaxes(1, 2), start),
        jax.lax.dynamic_update_slice(new.value, v.swapaxes(1, 2), start),
    )
    grouped = q.reshape(batch, k.shape[2], -1, dim)  # [B, K, R, H]
    product = partial(jnp.einsum, "bkrh,bksh->bkrs", preferred_element_type=jnp.float32)
    scores = jnp.concatenate([product(grouped, old.key), product(grouped, new.key)], axis=-1)
    scores = jnp.where(mask[:, None, None], scores * dim**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    slots = old.key.shape[2]
    out = jnp.einsum("bkrs,bksh->bkrh", weights[..., :slots], old.value)
    out += jnp.einsum("bkrs,bksh->bkrh", weights[..., slots:], new.value)
    return out.reshape(batch, 1, heads, dim), new
