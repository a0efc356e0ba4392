"""What sampling runs on the device: prompts into a KV cache, rows of it decoded, tokens drawn.

The cache is paged (arXiv 2309.06180): a row holds one sequence, in as many pages as its length
needs, wherever they lie, so that rows may be of any age and none pays for another's length. Every
page is attended to by the row that owns it, and a row's pages are then put together. A page's slots
hold keys that are rotated already: a token's slot need not be its position. A prompt begins at
slot 0, what is drawn at the next multiple of the block: blocks never straddle pages.

While a block of tokens is decoded the cache is only read: new keys and values go to a small
buffer, at the same place for all rows, which is put into the rows' pages when the block ends.

Axis letters: B row, G prompt, T new token, W prompt position, Q device, P page of a device, S slot
of a page, M page of a row, N heads, K kv-heads, R query heads per kv-head, H head dim, V
vocabulary, L layer. A device's rows and pages are numbered from 0.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memphis_jax.layers import causal_attention
from memphis_jax.model import Block, StableLM, project

PAGE = 32  # slots
TOP_P_STEPS = 24  # bisection steps: the cut is exact to 2^-24 of the largest probability


class LayerCache(NamedTuple):
    key: jax.Array  # [Q, P, K, S, H]
    value: jax.Array


class Cache(NamedTuple):
    layers: tuple[LayerCache, ...]  # one by one: read in place, where a stack would be copied
    logits: jax.Array  # [B, V] float32, of each row's next token


class Rows(NamedTuple):
    """What the host knows of the rows in the cache."""

    length: Any  # [B] int32, tokens so far
    drawn: Any  # [B] int32, those that are not of the prompt
    keys: Any  # [B, 2] uint32
    done: Any  # [B] bool, nothing is drawn for them
    pages: Any  # [B, M] int32, of the row, in order; P where it has no more
    owner: Any  # [Q, P] int32, row of the page; any if none
    rank: Any  # [Q, P] int32, the page's place among the row's


class Prompts(NamedTuple):
    """Prompts that were computed, to be copied into rows."""

    key: jax.Array  # [G, L, K, W, H]
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
    cumulative distribution. A row whose logits are not finite gets -1, which is no token.
    """
    drawn = _draw(logits, keys, temperature=temperature, top_p=top_p)
    return jnp.where(jnp.isfinite(logits.max(-1)), drawn, -1).astype(jnp.int32)


def _draw(logits: jax.Array, keys: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1)
    probabilities = jax.nn.softmax(logits / temperature, axis=-1)
    if top_p < 1.0:
        probabilities = jnp.where(top_p_mask(probabilities, top_p), probabilities, 0.0)
    # A float32 cumsum may wobble where nothing is added: an excluded token could be drawn, or none
    # where it ends above all that can be drawn, and argmax would say token 0.
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0.0)
    uniform = jax.vmap(jax.random.uniform)(keys)  # [B], in [0, 1)
    threshold = uniform[:, None] * cumulative.max(-1, keepdims=True)
    return jnp.argmax(cumulative > threshold, axis=-1)


@partial(jax.jit, static_argnames="dtype")
def prefill(model: StableLM, tokens: jax.Array, lengths: jax.Array, *, dtype: str) -> Prompts:
    """tokens [G, W] int32, right-padded, of lengths [G] -> their cache and next logits."""
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
def insert(
    cache: Cache, prompts: Prompts, source: jax.Array, target: jax.Array, pages: jax.Array
) -> Cache:
    """Copies prompts[source] into rows `target`, both [any number] int32; targets >= B are dropped.

    pages [number, pages of the longest prompt]: the row's, on its device; those >= P are dropped.
    What lies behind the prompt is not seen: a row's length says so.
    """
    devices = cache.layers[0].key.shape[0]
    device = target * devices // len(cache.logits)

    def put(into: jax.Array, new: jax.Array, number: int) -> jax.Array:
        new = new[source, number]  # [number, K, W, H]
        new = jnp.pad(new, ((0, 0), (0, 0), (0, -new.shape[2] % PAGE), (0, 0)))
        new = new.reshape(*new.shape[:2], -1, PAGE, new.shape[3]).swapaxes(1, 2)
        return into.at[device[:, None], pages].set(new, mode="drop")

    layers = tuple(
        LayerCache(put(layer.key, prompts.key, i), put(layer.value, prompts.value, i))
        for i, layer in enumerate(cache.layers)
    )
    return Cache(layers, cache.logits.at[target].set(prompts.logits[source], mode="drop"))


def empty(model: StableLM, batch_size: int, devices: int, num_pages: int, dtype: str) -> Cache:
    """A cache of zeros with `num_pages` on every device."""
    config = model.config
    shape = (devices, num_pages, config.num_key_value_heads, PAGE, config.head_dim)
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    )
    return Cache(layers, jnp.zeros((batch_size, config.vocab_size)))


@jax.jit
def resize(cache: Cache, rows: jax.Array, pages: jax.Array) -> Cache:
    """The cache of these rows [Q, any number] and pages [Q, any number] of each device."""
    pick = jax.vmap(lambda of, chosen: of[chosen])
    logits = pick(cache.logits.reshape(len(rows), -1, cache.logits.shape[1]), rows)
    layers = jax.tree.map(lambda layer: pick(layer, pages), cache.layers)
    return Cache(layers, logits.reshape(-1, logits.shape[2]))


@partial(
    jax.jit,
    static_argnames=("num_tokens", "temperature", "top_p", "eos_id", "dtype"),
    donate_argnames="cache",
)
def decode(
    model: StableLM,
    unstacked: list[Block],
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

    unstacked: `unstack(model)`; the model's stacked layers are not read. Rows that are not done
    need a page for the tokens. num_tokens, the same in all calls, divides PAGE.
    """
    start = -(-(rows.length - rows.drawn) // num_tokens) * num_tokens  # of what is drawn
    seen = _seen(rows, start)
    config = model.config
    shape = (len(rows.length), config.num_key_value_heads, num_tokens, config.head_dim)
    buffer = jax.tree.map(lambda x: jnp.zeros(shape, x.dtype), cache.layers)
    State = tuple[jax.Array, jax.Array, tuple[LayerCache, ...]]

    def step(state: State, at: jax.Array) -> tuple[State, jax.Array]:
        logits, done, buffer = state
        step_keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.drawn + at)
        tokens = sample_tokens(logits, step_keys, temperature=temperature, top_p=top_p)
        tokens = jnp.where(done, eos_id, tokens)
        x, written = model.embed(tokens[:, None], dtype), []
        rotary = model.rotary((rows.length + at)[:, None])
        for block, old, new in zip(unstacked, cache.layers, buffer, strict=True):
            x, new = block(x, rotary, partial(_attend, old, new, at, seen, rows))
            written.append(new)
        logits = project(model.norm(x[:, 0]), model.head())
        return (logits, done | (tokens == eos_id), tuple(written)), tokens

    state = (cache.logits, rows.done, buffer)
    (logits, _, buffer), tokens = jax.lax.scan(step, state, jnp.arange(num_tokens))
    layers = jax.tree.map(partial(_put, rows, start + rows.drawn), cache.layers, buffer)
    return Cache(layers, logits), tokens.T


def _by_device(x: jax.Array, rows: Rows) -> jax.Array:
    """[B, ...] -> [Q, B / Q, ...]."""
    return x.reshape(len(rows.owner), -1, *x.shape[1:])


def _seen(rows: Rows, start: jax.Array) -> jax.Array:
    """Which slots hold tokens of the page's owner, bool [Q, P, S]; start [B]: of what is drawn."""

    def of_pages(x: jax.Array) -> jax.Array:  # [B] -> [Q, P, 1]
        return jnp.take_along_axis(_by_device(x, rows), rows.owner, axis=1)[..., None]

    slot = rows.rank[..., None] * PAGE + jnp.arange(PAGE)
    drawn = (slot >= of_pages(start)) & (slot < of_pages(start + rows.drawn))
    return drawn | (slot < of_pages(rows.length - rows.drawn))


def _put(rows: Rows, slot: jax.Array, into: jax.Array, new: jax.Array) -> jax.Array:
    """A block's keys or values new [B, K, T, H] in the rows' slots [B]; into [Q, P, K, S, H]."""
    length = new.shape[2]
    parts = into.reshape(*into.shape[:3], -1, length, into.shape[4])  # [Q, P, K, S / T, T, H]
    page = jnp.take_along_axis(rows.pages, slot[:, None] // PAGE, axis=1)[:, 0]
    page = jnp.where(rows.done, into.shape[1], page)  # dropped
    put = jax.vmap(lambda to, page, part, x: to.at[page, :, part].set(x, mode="drop"))
    of_devices = (_by_device(x, rows) for x in (page, slot % PAGE // length, new))
    return put(parts, *of_devices).reshape(into.shape)


@jax.jit
def unstack(model: StableLM) -> list[Block]:
    """The layers one by one, copied once and not in every `decode`."""
    number = model.config.num_hidden_layers
    return [jax.tree.map(lambda leaf, i=i: leaf[i], model.layers) for i in range(number)]


def _attend(
    old: LayerCache,
    new: LayerCache,
    at: jax.Array,
    seen: jax.Array,
    rows: Rows,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """One query per row over its pages and the block's buffer, into which it writes at `at`.

    old [Q, P, K, S, H], new [B, K, T, H], seen [Q, P, S], q [B, 1, N, H], k and v [B, 1, K, H].
    """
    batch, _, heads, dim = q.shape
    place = (0, 0, at, 0)
    new = LayerCache(
        jax.lax.dynamic_update_slice(new.key, k.swapaxes(1, 2), place),
        jax.lax.dynamic_update_slice(new.value, v.swapaxes(1, 2), place),
    )
    grouped = q.reshape(batch, k.shape[2], -1, dim)  # [B, K, R, H]
    block_seen = jnp.arange(new.key.shape[2]) <= at
    queries, block, pages = jax.tree.map(lambda x: _by_device(x, rows), (grouped, new, rows.pages))
    attend = jax.vmap(partial(paged_attention, block_seen))
    out = attend(queries, block, pages, old, rows.owner, seen)
    return out.reshape(batch, 1, heads, dim), new


def paged_attention(
    block_seen: jax.Array,
    q: jax.Array,
    new: LayerCache,
    pages: jax.Array,
    old: LayerCache,
    owner: jax.Array,
    seen: jax.Array,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over a row's pages and its block, float32 softmax.

    block_seen [T], q [B, K, R, H], new [B, K, T, H], pages [B, M], old [P, K, S, H], owner [P],
    seen [P, S] -> [B, K, R, H]. A page's part of the sums is computed where it lies, as in
    flash-decoding: only queries and these parts are copied, never keys.
    """
    product = partial(jnp.einsum, "bkrh,bksh->bkrs", preferred_element_type=jnp.float32)
    old_scores = jnp.where(seen[:, None, None], product(q[owner], old.key), -jnp.inf)
    new_scores = jnp.where(block_seen, product(q, new.key), -jnp.inf)

    def of_rows(x: jax.Array, fill: float) -> jax.Array:  # [P, ...] -> [B, M, ...]
        return x.at[pages].get(mode="fill", fill_value=fill)

    highest = of_rows(old_scores.max(-1), -jnp.inf).max(1)  # [B, K, R]
    highest = jnp.maximum(highest, new_scores.max(-1))

    def sums(scores: jax.Array, highest: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
        weights = jnp.exp((scores - highest[..., None]) * q.shape[-1] ** -0.5)
        out = jnp.einsum("bkrs,bksh->bkrh", weights.astype(q.dtype), value)
        return weights.sum(-1, keepdims=True), out.astype(jnp.float32)

    parts = sums(old_scores, highest[owner], old.value)
    block = sums(new_scores, highest, new.value)
    total, out = (of_rows(x, 0).sum(1) + y for x, y in zip(parts, block, strict=True))
    return (out / total).astype(q.dtype)
