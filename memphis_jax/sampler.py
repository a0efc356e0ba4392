"""Batched sampling with a KV cache in JAX: the embedded generator, and the check on other engines.

A fixed number of rows is decoded in blocks of tokens; between blocks the host looks for the stop
text, and a row that has ended is given to the next prompt. Samples of the same prompt share its
computation. What is drawn for a row depends on its key and its own tokens alone, never on the batch
or on when its turn came.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memphis_jax import decode
from memphis_jax.model import StableLM

PROMPT_MULTIPLE = 32  # prompt lengths are padded to it, so that few shapes are compiled
PROMPTS = 16  # different prompts computed at once
BLOCK = 8  # tokens decoded between two looks of the host
LEAST_SLOTS = 128  # of a row; then doubled, so that few shapes are compiled


class Completion(NamedTuple):
    tokens: list[int]  # without EOS; with the stop text, if that ended it
    finish_reason: str  # "stop" (EOS or stop text) or "length"


@dataclass
class _Row:
    """A sequence that is being decoded."""

    index: int  # of its prompt
    prompt_length: int
    limit: int  # max_new_tokens
    tokens: list[int] = field(default_factory=list)
    drawn: int = 0

    @property
    def length(self) -> int:
        return self.prompt_length + self.drawn

    def take(
        self, new: list[int], eos_id: int, stops: Callable[[list[int]], bool]
    ) -> Completion | None:
        """Adds a block of tokens; what became of the row, if that ended it."""
        self.drawn += len(new)
        tokens = self.tokens + (new[: new.index(eos_id)] if eos_id in new else new)
        self.tokens = tokens[: self.limit]
        ended = eos_id in new and len(tokens) < self.limit  # EOS counts as a new token
        if ended or stops(self.tokens):
            return Completion(self.tokens, "stop")
        return Completion(self.tokens, "length") if len(tokens) >= self.limit else None


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

    Raises ValueError where a prompt and its max_new_tokens exceed max_position_embeddings.
    """
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    lengths = [len(prompt) for prompt in prompts]
    most_slots = _most_slots(model, lengths, limits, pad)
    group = _group_size(model, batch_size)
    waiting = _prefilled(model, prompts, group, pad, spread, dtype)
    places: list[_Row | None] = [None] * batch_size
    cache = spread(decode.empty(model, batch_size, min(LEAST_SLOTS, most_slots), dtype))
    while True:
        free = [place for place, row in enumerate(places) if row is None]
        arrived = list(zip(free, waiting, strict=False))
        for place, (index, _, _) in arrived:
            places[place] = _Row(index, lengths[index], limits[index])
        live = [(place, row) for place, row in enumerate(places) if row is not None]
        if not live:
            return
        needed = max(max(pad(row.prompt_length), row.length + BLOCK) for _, row in live)
        cache = _fit(cache, needed, most_slots)
        cache = _insert(cache, arrived, group, batch_size, spread)
        cache, block = decode.decode(
            model,
            cache,
            spread(_rows(live, keys, batch_size)),
            num_tokens=BLOCK,
            temperature=temperature,
            top_p=top_p,
            eos_id=eos_id,
            dtype=dtype,
        )
        drawn, finished = np.asarray(block).tolist(), []
        for place, row in live:
            if completion := row.take(drawn[place], eos_id, stops):
                finished.append((row.index, completion))
                places[place] = None
        if finished:
            on_progress(len(finished), sum(len(done.tokens) for _, done in finished))
        yield from finished


def _most_slots(
    model: StableLM, lengths: Sequence[int], limits: Sequence[int], pad: Callable[[int], int]
) -> int:
    """Slots in which every prompt and its tokens fit."""
    most, allowed = 0, model.config.max_position_embeddings
    for length, limit in zip(lengths, limits, strict=True):
        if length + limit > allowed:
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens = {limit} exceed the "
                f"model's max_position_embeddings = {allowed}"
            )
        most = max(most, pad(length) + -(-limit // BLOCK) * BLOCK)
    return most


def _group_size(model: StableLM, batch_size: int) -> int:
    """Prompts computed at once: about PROMPTS, and as many on every device."""
    devices = len(jax.tree.leaves(model)[0].sharding.device_set)
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


def _fit(cache: decode.Cache, needed: int, most: int) -> decode.Cache:
    """The cache with at least `needed` slots per row."""
    slots = LEAST_SLOTS
    while slots < needed:
        slots *= 2
    slots = min(slots, most)
    return cache if slots == cache.num_slots else decode.resize(cache, num_slots=slots)


def _insert(
    cache: decode.Cache,
    arrived: Sequence[tuple[int, tuple[int, decode.Prompts, int]]],
    group: int,
    batch_size: int,
    spread: Callable[[Any], Any],
) -> decode.Cache:
    """Copies computed prompts to the rows that they were given, `group` at a time."""
    for _, same in groupby(arrived, key=lambda one: id(one[1][1])):
        rows = [(computed, source, target) for target, (_, computed, source) in same]
        for start in range(0, len(rows), group):
            part = rows[start : start + group]
            source, target = np.zeros(group, np.int32), np.full(group, batch_size, np.int32)
            source[: len(part)] = [source for _, source, _ in part]
            target[: len(part)] = [target for _, _, target in part]
            cache = decode.insert(cache, part[0][0], *spread((source, target)))
    return cache


def _rows(live: Sequence[tuple[int, _Row]], keys: np.ndarray, batch_size: int) -> decode.Rows:
    rows = decode.Rows(
        length=np.zeros(batch_size, np.int32),
        drawn=np.zeros(batch_size, np.int32),
        keys=np.zeros((batch_size, 2), np.uint32),
        done=np.ones(batch_size, bool),
    )
    for place, row in live:
        rows.length[place], rows.drawn[place] = row.length, row.drawn
        rows.keys[place], rows.done[place] = keys[row.index], False
    return rows


def row_keys(seed: int, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    """PRNG keys [len(rows), 2] uint32 for (question number, sample number) pairs."""

    def one(question: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), question), number)

    pairs = jnp.asarray(rows, jnp.uint32)
    return np.asarray(jax.vmap(one)(pairs[:, 0], pairs[:, 1]))
