"""Batched sampling with a KV cache in JAX: the embedded generator, and the check on other engines.

Rows are decoded in blocks of tokens; between blocks the host looks for the stop text, and a row
that has ended is given to the next prompt or, when there is none, the batch becomes smaller.
Samples of the same prompt share its computation. What is drawn for a row depends on its key and
its own tokens alone, never on the batch or on when its turn came.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memphis_jax import decode
from memphis_jax.model import StableLM
from memphis_jax.pool import Pool, Row, block_size, least_rows, num_pages

PROMPT_MULTIPLE = 32  # prompt lengths are padded to it, so that few shapes are compiled
PROMPTS = 16  # different prompts computed at once


class Completion(NamedTuple):
    tokens: list[int]  # without EOS; with the stop text, if that ended it
    finish_reason: str  # "stop" (EOS or stop text) or "length"


def _take(
    row: Row, new: list[int], eos_id: int, stops: Callable[[list[int]], bool]
) -> Completion | None:
    """Adds a block of tokens; what became of the row, if that ended it."""
    row.drawn += len(new)
    tokens = row.tokens + (new[: new.index(eos_id)] if eos_id in new else new)
    row.tokens = tokens[: row.limit]
    ended = eos_id in new and len(tokens) < row.limit  # EOS counts as a new token
    if ended or stops(row.tokens):
        return Completion(row.tokens, "stop")
    return Completion(row.tokens, "length") if len(tokens) >= row.limit else None


def sample(
    model: StableLM, prompts: Sequence[Sequence[int]], keys: np.ndarray, **options: Any
) -> list[Completion]:
    """One completion per prompt, in the order given: arguments and errors as those of `stream`.

    Long prompts are decoded first: then a group of prompts needs little padding.
    """
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    if not np.isscalar(options["max_new_tokens"]):
        options["max_new_tokens"] = [options["max_new_tokens"][i] for i in order]
    completions: dict[int, Completion] = {}
    for at, completion in stream(model, [prompts[i] for i in order], keys[order], **options):
        completions[int(order[at])] = completion
    return [completions[i] for i in range(len(prompts))]


def stream(
    model: StableLM,
    prompts: Sequence[Sequence[int]],
    keys: np.ndarray,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int | Sequence[int],
    eos_id: int,
    batch_size: int,
    stops: Callable[[list[int]], bool] = lambda tokens: False,
    dtype: str = "float32",
    on_progress: Callable[[int, int], None] = lambda rows, tokens: None,
    pad: Callable[[int], int] = lambda length: -(-length // PROMPT_MULTIPLE) * PROMPT_MULTIPLE,
    spread: Callable[[Any], Any] = lambda arrays: arrays,
) -> Iterator[tuple[int, Completion]]:
    """(number of the prompt, its completion), as they are finished; begun in the order given.

    Args:
      prompts: token ids, none empty. Equal ones in succession are computed once.
      keys: [len(prompts), 2] uint32, one PRNG key per row (`row_keys`).
      temperature: 0 is greedy, and top_p is then ignored.
      max_new_tokens: of all prompts, or one number for each.
      batch_size: rows decoded at once.
      stops: told a row's tokens between blocks; True ends the row with finish_reason "stop".
      on_progress: called after each block of tokens with (rows, tokens) finished by it.
      pad: the length that prompts are padded to; each one is compiled.
      spread: puts arrays of rows on the devices that the model is on, which divide batch_size.

    Raises ValueError where a prompt is empty, or exceeds max_position_embeddings with its
    max_new_tokens, and RuntimeError where the model's logits are not finite.
    """
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    lengths = [len(prompt) for prompt in prompts]
    group = _group_size(model, batch_size)
    waiting = _prefilled(model, prompts, group, pad, spread, dtype)
    least = least_rows(model)
    num_tokens = block_size(batch_size, least)
    most_pages = _most_pages(model, lengths, limits, num_tokens)
    pool = Pool(batch_size, _devices(model), most_pages, least, num_tokens)
    layers = decode.unstack(model)
    cache = spread(decode.empty(model, batch_size, pool.devices, pool.num_pages, dtype))
    while True:
        arrived = [
            (Row(index, lengths[index], limits[index], place), computed, source)
            for place, (index, computed, source) in zip(pool.free(), waiting, strict=False)
        ]
        pool.rows += [row for row, _, _ in arrived]
        if not pool.rows:
            return
        if change := pool.fit():
            cache = decode.resize(cache, *spread(change))
        cache = _insert(cache, arrived, group, pool, spread)
        cache, block = decode.decode(
            model,
            layers,
            cache,
            spread(pool.arrays(keys)),
            num_tokens=num_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_id=eos_id,
            dtype=dtype,
        )
        drawn, live, finished = _drawn(block), [], []
        for row in pool.rows:
            if completion := _take(row, drawn[row.place], eos_id, stops):
                finished.append((row.index, completion))
            else:
                live.append(row)
        pool.rows = live
        if finished:
            on_progress(len(finished), sum(len(done.tokens) for _, done in finished))
        yield from finished


def _drawn(block: jax.Array) -> list[list[int]]:
    tokens = np.asarray(block)
    if (tokens < 0).any():  # see decode.sample_tokens
        raise RuntimeError(
            "the model's logits are not finite: its weights hold NaN or infinity, or overflow in "
            "this dtype; sample from an earlier checkpoint"
        )
    return tokens.tolist()


def _most_pages(model: StableLM, lengths: Sequence[int], limits: Sequence[int], block: int) -> int:
    """Of the longest prompt with its tokens."""
    most, allowed = 0, model.config.max_position_embeddings
    for length, limit in zip(lengths, limits, strict=True):
        if not length:
            raise ValueError("a prompt has no tokens: there is nothing that a token could follow")
        if length + limit > allowed:
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens = {limit} exceed the "
                f"model's max_position_embeddings = {allowed}"
            )
        most = max(most, num_pages(length, limit, block))
    return most


def _devices(model: StableLM) -> int:
    return len(jax.tree.leaves(model)[0].sharding.device_set)


def _group_size(model: StableLM, batch_size: int) -> int:
    """Prompts computed at once: about PROMPTS, and as many on every device."""
    devices = _devices(model)
    return min(batch_size, -(-PROMPTS // devices) * devices)


def _prefilled(
    model: StableLM,
    prompts: Sequence[Sequence[int]],
    group: int,
    pad: Callable[[int], int],
    spread: Callable[[Any], Any],
    dtype: str,
) -> Iterator[tuple[int, decode.Prompts, int]]:
    """(number of the prompt, a computed group, its place there); computes when asked for more."""
    runs = [list(run) for _, run in groupby(range(len(prompts)), key=lambda i: list(prompts[i]))]
    for start in range(0, len(runs), group):
        chosen = runs[start : start + group]
        lengths = [len(prompts[run[0]]) for run in chosen] + [1] * (group - len(chosen))
        tokens = np.zeros((group, pad(max(lengths))), np.int32)
        for row, run in zip(tokens, chosen, strict=False):
            row[: len(prompts[run[0]])] = prompts[run[0]]
        arrays = spread((tokens, np.array(lengths, np.int32)))
        computed = decode.prefill(model, *arrays, dtype=dtype)
        yield from ((i, computed, place) for place, run in enumerate(chosen) for i in run)


def _insert(
    cache: decode.Cache,
    arrived: Sequence[tuple[Row, decode.Prompts, int]],
    group: int,
    pool: Pool,
    spread: Callable[[Any], Any],
) -> decode.Cache:
    """Copies computed prompts to the rows that they were given, `group` at a time."""
    for _, same in groupby(arrived, key=lambda one: id(one[1])):
        rows = list(same)
        for start in range(0, len(rows), group):
            part = rows[start : start + group]
            computed = part[0][1]
            width = -(-computed.key.shape[3] // decode.PAGE)
            source, target = np.zeros(group, np.int32), np.full(group, pool.size, np.int32)
            pages = np.full((group, width), pool.num_pages, np.int32)
            for at, (row, _, place) in enumerate(part):
                source[at], target[at] = place, row.place
                kept = row.pages[:width]
                pages[at, : len(kept)] = kept
            cache = decode.insert(cache, computed, *spread((source, target, pages)))
    return cache


def row_keys(seed: int, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    """PRNG keys [len(rows), 2] uint32 for (question number, sample number) pairs."""

    def one(question: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), question), number)

    pairs = jnp.asarray(rows, jnp.uint32)
    return np.asarray(jax.vmap(one)(pairs[:, 0], pairs[:, 1]))
