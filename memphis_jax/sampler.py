"""Batched sampling with a KV cache in JAX: the embedded generator, and the check on other engines.

Prompts are left-padded to a common length, so that every row writes the same cache slot at every
step; decoding runs in blocks of tokens on the device, and between blocks the host looks for the
stop text. What is drawn for a row depends on its key and its own tokens alone, never on the batch.

Axis letters: B row, T query position, S cache slot, N heads, K kv-heads, H head dim, V vocabulary,
L layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memphis_jax.model import QUERY_CHUNK, Block, StableLM, masked_attention, project

PROMPT_MULTIPLE = 32  # prompt lengths are padded to it, so that few shapes are compiled
BLOCK = 16  # tokens decoded between two looks of the host
TOP_P_STEPS = 24  # bisection steps: the cut is exact to 2^-24 of the largest probability


class Completion(NamedTuple):
    tokens: list[int]  # without EOS; with the stop text, if that ended it
    finish_reason: str  # "stop" (EOS or stop text) or "length"


class LayerCache(NamedTuple):
    key: jax.Array  # [B, K, S, H]
    value: jax.Array


Cache = tuple[LayerCache, ...]  # one per layer: updated in place, where a stack would be copied


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


def _unstack(model: StableLM) -> list[Block]:
    """The layers one by one."""
    number = model.config.num_hidden_layers
    return [jax.tree.map(lambda leaf, i=i: leaf[i], model.layers) for i in range(number)]


def _forward(
    model: StableLM,
    blocks: list[Block],
    tokens: jax.Array,
    slots: jax.Array,
    padding: jax.Array,
    cache: Cache,
    dtype: str,
) -> tuple[jax.Array, Cache]:
    """tokens [B, T] into consecutive cache slots [T] -> (logits of the last [B, V], cache)."""
    positions = jnp.maximum(slots[None] - padding[:, None], 0)  # [B, T]
    slot = jnp.arange(cache[0].key.shape[2])
    seen = slot[None, None] <= slots[None, :, None]  # [1, T, S]
    mask = seen & (slot[None, None] >= padding[:, None, None])

    def attend(
        layer: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        start = (0, 0, slots[0], 0)
        keys = jax.lax.dynamic_update_slice(layer.key, k.swapaxes(1, 2), start)
        values = jax.lax.dynamic_update_slice(layer.value, v.swapaxes(1, 2), start)
        outputs = [  # chunks of queries: the scores of a whole prompt would not fit
            masked_attention(q[:, part], keys, values, mask[:, part])
            for part in (slice(i, i + QUERY_CHUNK) for i in range(0, q.shape[1], QUERY_CHUNK))
        ]
        return jnp.concatenate(outputs, axis=1), LayerCache(keys, values)

    x, rotary, written = model.embed(tokens, dtype), model.rotary(positions), []
    for block, layer in zip(blocks, cache, strict=True):
        x, layer = block(x, rotary, partial(attend, layer))
        written.append(layer)
    return project(model.norm(x[:, -1]), model.head()), tuple(written)


class _Rows(NamedTuple):
    """Rows that are being decoded."""

    cache: Cache
    logits: jax.Array  # [B, V] of the next token
    padding: jax.Array  # [B] int32, slots before the prompt
    keys: jax.Array  # [B, 2] uint32
    done: jax.Array  # [B] bool
    drawn: jax.Array  # int32 scalar, tokens drawn so far


@partial(jax.jit, static_argnames=("num_slots", "dtype"))
def _prefill(
    model: StableLM,
    prompts: jax.Array,
    padding: jax.Array,
    keys: jax.Array,
    done: jax.Array,
    *,
    num_slots: int,
    dtype: str,
) -> _Rows:
    """Left-padded prompts [B, P] -> rows whose first token can be drawn."""
    config = model.config
    batch, length = prompts.shape
    shape = (batch, config.num_key_value_heads, num_slots, config.head_dim)
    empty = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    cache = (empty,) * config.num_hidden_layers
    slots = jnp.arange(length)
    logits, cache = _forward(model, _unstack(model), prompts, slots, padding, cache, dtype)
    return _Rows(cache, logits, padding, keys, done, jnp.int32(0))


@partial(
    jax.jit,
    static_argnames=("num_tokens", "prompt_length", "temperature", "top_p", "eos_id", "dtype"),
    donate_argnames=("rows",),
)
def _decode(
    model: StableLM,
    rows: _Rows,
    *,
    num_tokens: int,
    prompt_length: int,
    temperature: float,
    top_p: float,
    eos_id: int,
    dtype: str,
) -> tuple[_Rows, jax.Array]:
    """Draws `num_tokens` more tokens per row: (rows, tokens [B, num_tokens]; EOS after the end)."""
    blocks = _unstack(model)

    def step(rows: _Rows, _: None) -> tuple[_Rows, jax.Array]:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, rows.drawn)
        tokens = sample_tokens(rows.logits, step_keys, temperature=temperature, top_p=top_p)
        tokens = jnp.where(rows.done, eos_id, tokens)
        slots = prompt_length + rows.drawn[None]
        new = tokens[:, None]
        logits, cache = _forward(model, blocks, new, slots, rows.padding, rows.cache, dtype)
        done = rows.done | (tokens == eos_id)
        return _Rows(cache, logits, rows.padding, rows.keys, done, rows.drawn + 1), tokens

    rows, tokens = jax.lax.scan(step, rows, None, length=num_tokens)
    return rows, tokens.T


def sample(
    model: StableLM,
    prompts: Sequence[Sequence[int]],
    keys: np.ndarray,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    eos_id: int,
    batch_size: int,
    stops: Callable[[list[int]], bool] = lambda tokens: False,
    dtype: str = "float32",
    on_progress: Callable[[int, int], None] = lambda rows, tokens: None,
    pad: Callable[[int], int] = lambda length: -(-length // PROMPT_MULTIPLE) * PROMPT_MULTIPLE,
    spread: Callable[[Any], Any] = lambda arrays: arrays,
) -> list[Completion]:
    """One completion per prompt, in the order given.

    Args:
      prompts: token ids, none empty.
      keys: [len(prompts), 2] uint32, one PRNG key per row (`row_keys`).
      temperature: 0 is greedy, and top_p is then ignored.
      batch_size: rows decoded at once; the last batch is filled with rows that are thrown away.
      stops: told a row's tokens between blocks; True ends the row with finish_reason "stop".
      on_progress: called after each batch with (rows, tokens) finished by it.
      pad: the length that prompts are padded to; each one is compiled.
      spread: puts arrays of `batch_size` rows on the devices that the model is on.

    Raises ValueError where the longest prompt and max_new_tokens exceed max_position_embeddings.
    """
    if not prompts:
        return []
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    longest, limit = len(prompts[order[0]]), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the "
            f"model's max_position_embeddings = {limit}"
        )
    completions: list[Completion | None] = [None] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        chosen = order[start : start + batch_size]
        batch = _sample_batch(
            model,
            [prompts[i] for i in chosen],
            keys[chosen],
            batch_size,
            max_new_tokens,
            stops,
            {"temperature": temperature, "top_p": top_p, "eos_id": eos_id, "dtype": dtype},
            pad,
            spread,
        )
        for i, completion in zip(chosen, batch, strict=True):
            completions[i] = completion
        on_progress(len(batch), sum(len(completion.tokens) for completion in batch))
    return [completion for completion in completions if completion is not None]


def _sample_batch(
    model: StableLM,
    prompts: list[Sequence[int]],
    keys: np.ndarray,
    batch_size: int,
    max_new_tokens: int,
    stops: Callable[[list[int]], bool],
    drawing: dict[str, Any],
    pad: Callable[[int], int],
    spread: Callable[[Any], Any],
) -> list[Completion]:
    length = pad(max(map(len, prompts)))
    eos_id = drawing["eos_id"]
    tokens = np.full((batch_size, length), eos_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
    lengths = [len(prompt) for prompt in prompts] + [1] * (batch_size - len(prompts))
    padding = length - np.array(lengths, np.int32)
    row_keys = np.zeros((batch_size, 2), np.uint32)
    row_keys[: len(prompts)] = keys
    done = np.arange(batch_size) >= len(prompts)
    blocks = -(-max_new_tokens // BLOCK)
    rows = _prefill(
        model,
        *spread((tokens, padding, row_keys, done)),
        num_slots=length + blocks * BLOCK,
        dtype=drawing["dtype"],
    )
    texts: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    for _ in range(blocks):
        rows, block = _decode(model, rows, num_tokens=BLOCK, prompt_length=length, **drawing)
        for row, new in enumerate(np.asarray(block)[: len(prompts)].tolist()):
            if done[row]:
                continue
            text = texts[row] + (new[: new.index(eos_id)] if eos_id in new else new)
            ended = eos_id in new and len(text) < max_new_tokens  # EOS counts as a new token
            texts[row] = text[:max_new_tokens]
            if ended or stops(texts[row]):
                reasons[row], done[row] = "stop", True
            elif len(text) >= max_new_tokens:
                done[row] = True
        if done.all():
            break
        rows = rows._replace(done=spread(jnp.asarray(done)))
    return [Completion(text, reason) for text, reason in zip(texts, reasons, strict=True)]


def row_keys(seed: int, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    """PRNG keys [len(rows), 2] uint32 for (question number, sample number) pairs."""

    def one(question: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), question), number)

    pairs = jnp.asarray(rows, jnp.uint32)
    return np.asarray(jax.vmap(one)(pairs[:, 0], pairs[:, 1]))
