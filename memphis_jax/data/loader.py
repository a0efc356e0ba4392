"""Batches in a fixed order whose position can be saved, for SFT and for ranking.

Sits between `packing.py` and the training loop. Imports numpy, grain and `packing`.

What every step holds is planned before the first one, as a pure function of (lengths, seed, epoch):
the number of steps is known, the position in the data is one integer, and every host makes the same
plan and takes its own share of it. A built data set stores examples, not packed rows, so that each
epoch packs anew (see `plan_rows`). Batches are packed when they are asked for, a few ahead in a
thread.

Save the position with `iterator.get_state()`, a dict that `json.dumps` takes, and go on with the
very next batch by `iterator.set_state(state)`. It is the number of steps done, and holds for every
loader of the same items, seq_len, batch_size, epochs and seed: the hosts may be more or fewer.

Any number of hosts works. Each takes a contiguous share of every micro-batch. Where shares differ,
by one, the smaller are filled with empty rows, so that all hosts have arrays of one shape. Losses
are sums and weights: an empty row adds 0 to both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import grain
import numpy as np

from memphis_jax.data.packing import (
    Example,
    Group,
    check_groups,
    check_lengths,
    epoch_order,
    num_slots,
    pack_groups,
    pack_rows,
    plan_rows,
    rows_needed,
)

Batch = dict[str, np.ndarray]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Loader:
    """All steps of a run: item `step` is the batch of that step."""

    num_steps: int
    batch_at: Callable[[int], Batch]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not in this run of {self.num_steps} steps")
        return self.batch_at(step)

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        """A new iterator at step 0, with `get_state` and `set_state`."""
        # One thread packs while the device computes; the examples are in memory, so more only fight
        # over the interpreter lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))


def sft_loader(
    examples: Sequence[Example],
    *,
    seq_len: int,
    batch_size: int,
    accumulation: int = 1,
    epochs: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    slots: Sequence[int] | None = None,
) -> Loader:
    """Batches of `batch_size` packed rows: the arrays of `pack_rows` as [A, rows, T].

    A = `accumulation`, rows = batch_size / A / process_count, rounded up: this host's share of
    every micro-batch. `slots` are those of each example, where they are known without reading it.
    Each epoch holds every example once, in an order of its own; its last batch is filled up with
    rows of padding. Raises ValueError for no examples, for an example longer than `seq_len` + 1
    tokens, and for sizes that do not divide.
    """
    micro = _micro_batch(len(examples), batch_size, accumulation, epochs)
    mine, share = _share(micro, process_index, process_count)
    slots = [num_slots(example) for example in examples] if slots is None else slots
    check_lengths(slots, seq_len)
    batches: list[Sequence[list[int]]] = []
    for epoch in range(epochs):
        batches += _chunks(plan_rows(slots, seq_len, seed, epoch), batch_size)

    def batch_at(step: int) -> Batch:
        parts = []
        for start in range(0, batch_size, micro):
            rows = batches[step][start : start + micro][mine]
            rows = [*rows, *([] for _ in range(share - len(rows)))]
            parts.append(pack_rows([[examples[i] for i in row] for row in rows], seq_len))
        return _stack(parts)

    return Loader(len(batches), batch_at)


def rank_loader(
    groups: Sequence[Group],
    *,
    seq_len: int,
    batch_size: int,
    accumulation: int = 1,
    epochs: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    row_multiple: int = 1,
) -> Loader:
    """Batches of `batch_size` groups: the arrays of `pack_groups` as [A, rows, T] and [A, G, R].

    A = `accumulation`, G = batch_size / A / process_count, rounded up: this host's share of every
    micro-batch, packed by itself, so that `candidate_rows` count within this host's rows. R is the
    most candidates of any group, and rows what the fullest share of the run needs on any host, so
    that every step has one shape everywhere, rounded up to `row_multiple`, the devices of a host
    that divide them. Each epoch holds every group once, in an order of its
    own; its last batch is filled up with empty groups. Raises ValueError for no groups, for an
    example longer than `seq_len` + 1 tokens, and for sizes that do not divide.
    """
    micro = _micro_batch(len(groups), batch_size, accumulation, epochs)
    mine, num_groups = _share(micro, process_index, process_count)
    check_groups(groups, seq_len)
    parts = [
        [[groups[i] for i in batch[start : start + micro]] for start in range(0, batch_size, micro)]
        for epoch in range(epochs)
        for batch in _chunks(epoch_order(len(groups), seed, epoch), batch_size)
    ]
    shares = [_share(micro, process, process_count)[0] for process in range(process_count)]
    fullest = max(
        rows_needed(part[share], seq_len) for step in parts for part in step for share in shares
    )
    pack = partial(
        pack_groups,
        seq_len=seq_len,
        num_rows=-(-fullest // row_multiple) * row_multiple,
        num_groups=num_groups,
        num_candidates=max(len(group.candidates) for group in groups),
    )
    return Loader(len(parts), lambda step: _stack([pack(part[mine]) for part in parts[step]]))


def _share(micro: int, process_index: int, process_count: int) -> tuple[slice, int]:
    """(which rows or groups of a micro-batch are this host's, how many the fullest host has)."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"host {process_index} of {process_count} is not one of them")
    start, end = (micro * p // process_count for p in (process_index, process_index + 1))
    return slice(start, end), -(-micro // process_count)


def _micro_batch(num_items: int, batch_size: int, accumulation: int, epochs: int) -> int:
    if num_items == 0:
        raise ValueError("there is nothing to train on: no examples or groups were given")
    if min(batch_size, accumulation, epochs) < 1 or batch_size % accumulation:
        raise ValueError(
            f"batch_size {batch_size}, accumulation {accumulation} and epochs {epochs} must be "
            "1 or more, and batch_size a multiple of accumulation"
        )
    return batch_size // accumulation


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _stack(parts: Sequence[Batch]) -> Batch:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
