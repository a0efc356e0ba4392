"""Logprobs of continuations: those of one context share a row, and one pass over the context.

A row holds the context and then each continuation, which sees the context and itself. Axis letters:
B row, T position, S key position, N heads, H head dim, P scored token, D model, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memphis_jax.layers import QUERY_CHUNK, masked_attention
from memphis_jax.model import StableLM, project

SCORED_CHUNK = 256  # tokens whose logits exist at once


class Row(NamedTuple):
    """A context and continuations of it, scored in one pass."""

    context: tuple[int, ...]
    continuations: list[tuple[int, list[int]]]  # (number of the request, its tokens)

    @property
    def length(self) -> int:
        """Tokens that go in: a continuation's last one only comes out."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)


def pack(pairs: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """Rows of at most `max_length` tokens for (context, continuation) pairs.

    What is too long loses the start of its context, as in lm-eval's hf engine: the last
    `max_length` + 1 tokens stay. Raises ValueError for an empty continuation or one that is longer
    than `max_length`.
    """
    rows: dict[tuple[int, ...], Row] = {}
    full: list[Row] = []
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens cannot be scored: it must have 1 "
                f"to max_position_embeddings = {max_length}"
            )
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        row = rows.setdefault(kept, Row(kept, []))
        if row.continuations and row.length + len(continuation) - 1 > max_length:
            full.append(row)
            row = rows[kept] = Row(kept, [])
        row.continuations.append((number, continuation))
    return [*full, *rows.values()]


def lay_out(
    rows: Sequence[Row], length: int, count: int
) -> tuple[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray], np.ndarray]:
    """((inputs, targets [P], at [P]), owners [P]) of a batch of `count` rows of `length` tokens.

    Inputs are `tokens`, `positions` and `segments` [B, T] int32: 0 the context, 1, 2, ... the
    continuations, -1 padding. `at` is the place b * T + t whose logits predict each target.
    """
    tokens, positions = (np.zeros((count, length), np.int32) for _ in range(2))
    segments = np.full((count, length), -1, np.int32)
    targets: list[int] = []
    at: list[int] = []
    owners: list[int] = []
    for b, row in enumerate(rows):
        start = len(row.context)
        tokens[b, :start], segments[b, :start] = row.context, 0
        positions[b, :start] = np.arange(start)
        end = start
        for segment, (number, continuation) in enumerate(row.continuations, start=1):
            own = slice(end, end + len(continuation) - 1)
            tokens[b, own], segments[b, own] = continuation[:-1], segment
            positions[b, own] = start + np.arange(len(continuation) - 1)
            targets += continuation
            at += [b * length + t for t in (start - 1, *range(own.start, own.stop))]
            owners += [number] * len(continuation)
            end = own.stop
    inputs = {"tokens": tokens, "positions": positions, "segments": segments}
    return (inputs, np.array(targets, np.int32), np.array(at, np.int32)), np.array(owners)


@partial(jax.jit, static_argnames="dtype")
def score(
    model: StableLM,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    targets: jax.Array,
    at: jax.Array,
    dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """(logprob of each target, whether no token is more probable), [P] float32 and bool.

    See `lay_out` for the arguments; P is a multiple of SCORED_CHUNK.
    """
    rotary = model.rotary(positions)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return _attention(q, k, v, segments), None

    def body(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return block(x, rotary, attend)

    x = model.norm(jax.lax.scan(body, model.embed(tokens, dtype), model.layers)[0])  # [B, T, D]
    picked = x.reshape(-1, x.shape[-1])[at]  # [P, D]

    def chunk(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = project(part[0], model.head())  # [SCORED_CHUNK, V]
        chosen = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == part[1]

    parts = (picked.reshape(-1, SCORED_CHUNK, x.shape[-1]), targets.reshape(-1, SCORED_CHUNK))
    logprobs, best = jax.lax.map(chunk, parts)
    return logprobs.reshape(-1), best.reshape(-1)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention of each continuation to itself and to the context, [B, T, N, H]."""
    length = q.shape[1]
    place = jnp.arange(length)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    outputs = []
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        seen = (place[start:end, None] >= place[None, :end])[None]  # [1, T, S]
        keys = segments[:, None, :end]  # [B, 1, S]
        mask = seen & ((keys == 0) | (keys == segments[:, start:end, None]))
        outputs.append(masked_attention(q[:, start:end], k[:, :, :end], v[:, :, :end], mask))
    return jnp.concatenate(outputs, axis=1)
