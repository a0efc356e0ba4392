"""Pack examples of unequal length into rows of one length.

Sits between `prompts.py`, which makes examples, and `loader.py`, which makes batches of the rows.
Imports numpy and `prompts.Example` only.

An example of n tokens takes n - 1 slots: slot i holds input `tokens[i]`, target `tokens[i + 1]` and
whether that target is trained, so the model never shifts anything. Words: B rows, T slots in a row,
G groups, R candidates in a group. Segment 0 is padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memphis_jax.data.prompts import Example

PADDING_RANK = -100


class Group(NamedTuple):
    """Ranked answers to one question (rank 0 is the best) and its ground truth."""

    candidates: tuple[Example, ...]
    ranks: tuple[int, ...]
    gold: Example


def num_slots(example: Example) -> int:
    """How many slots of a row the example takes."""
    return len(example.tokens) - 1


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each length, in the given order, into the first row that still has room for it.

    Returns the rows as lists of indices into `lengths`. O(n log n). Raises ValueError for a length
    below 1 or above `capacity`.
    """
    check_lengths(lengths, capacity)
    # A tree of free space: node k holds the maximum of its children 2k and 2k + 1, and the leaves
    # are the rows, so walking down to the left wherever there is room finds the first fit.
    leaves = 1 << (len(lengths) - 1).bit_length() if lengths else 1
    free = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return rows


def epoch_order(num_items: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes its items: every one once."""
    return np.random.default_rng((seed, epoch)).permutation(num_items).tolist()


def plan_rows(slots: Sequence[int], seq_len: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of an epoch, as indices into `slots`: first-fit over the epoch's own order.

    Rows are planned here, from the lengths alone, and not stored with the built data: in each epoch
    an example meets other neighbours in other batches, and one build serves every seed.
    """
    order = epoch_order(len(slots), seed, epoch)
    rows = first_fit([slots[index] for index in order], seq_len)
    return [[order[at] for at in row] for row in rows]


def check_lengths(lengths: Sequence[int], capacity: int, name: str = "example") -> None:
    """Raise ValueError unless every length is between 1 and `capacity` slots."""
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(
                f"{name} {index} takes {length} slots: it needs at least two tokens, "
                "an input and a target"
            )
        if length > capacity:
            raise ValueError(
                f"{name} {index} takes {length} slots but a row has {capacity}: "
                "drop it before packing, or use longer rows"
            )


def check_groups(groups: Sequence[Group], seq_len: int) -> None:
    """Raise ValueError unless all members of a group fit into a row and candidates have ranks."""
    for index, group in enumerate(groups):
        check_lengths(
            [num_slots(member) for member in _members([group])], seq_len, f"group {index} member"
        )
        if len(group.ranks) != len(group.candidates) or min(group.ranks, default=0) < 0:
            raise ValueError(
                f"group {index} has {len(group.candidates)} candidates and ranks {group.ranks}: "
                "give each candidate one, 0 for the best"
            )


def pack_rows(rows: Sequence[Sequence[Example]], seq_len: int) -> dict[str, np.ndarray]:
    """Lay the examples of each row side by side.

    Returns arrays [B, T]: `tokens`, `targets`, `positions` (restart at 0 in every segment),
    `segment_ids` (count from 1, 0 is padding), all int32, and `loss_mask` (bool, True where the
    target is trained). A row without examples is all padding. Raises ValueError when a row's
    examples take more than `seq_len` slots.
    """
    shape = (len(rows), seq_len)
    names = ("tokens", "targets", "positions", "segment_ids")
    packed = {name: np.zeros(shape, np.int32) for name in names}
    packed["loss_mask"] = np.zeros(shape, np.bool_)
    for row, examples in enumerate(rows):
        used = sum(num_slots(example) for example in examples)
        if used > seq_len:
            raise ValueError(
                f"row {row} takes {used} slots but seq_len is {seq_len}: see first_fit"
            )
        start = 0
        for segment, example in enumerate(examples, start=1):
            where = (row, slice(start, start + num_slots(example)))
            packed["tokens"][where] = example.tokens[:-1]
            packed["targets"][where] = example.tokens[1:]
            packed["positions"][where] = np.arange(num_slots(example))
            packed["segment_ids"][where] = segment
            packed["loss_mask"][where] = example.loss_mask[1:]
            start += num_slots(example)
    return packed


def rows_needed(groups: Sequence[Group], seq_len: int) -> int:
    """How many rows `pack_groups` fills with these groups."""
    return len(_place(_members(groups), seq_len))


def pack_groups(
    groups: Sequence[Group], *, seq_len: int, num_rows: int, num_groups: int, num_candidates: int
) -> dict[str, np.ndarray]:
    """Pack the candidates and the ground truth of every group as segments, longest first.

    Returns the arrays of `pack_rows` for B = `num_rows`, where `loss_mask` keeps the trained tokens
    of ground truths only, plus `rank_mask` [B, T] (bool), the trained tokens of candidates only:
    cross-entropy never reuses the ranking mask. Also `candidate_rows`, `candidate_segments` and
    `ranks` [G, R] (int32), which say where each candidate lies; a missing candidate or group is row
    0, segment 0, rank -100. Raises ValueError when the groups do not fit into the given shape.
    """
    check_groups(groups, seq_len)
    members = _members(groups)
    rows = _place(members, seq_len)
    widest = max((len(group.candidates) for group in groups), default=0)
    for name, needed, given in (
        ("num_groups", len(groups), num_groups),
        ("num_candidates", widest, num_candidates),
        ("num_rows", len(rows), num_rows),
    ):
        if needed > given:
            raise ValueError(
                f"these groups need {name} of {needed} but it is {given}: see rows_needed"
            )
    rows += [[] for _ in range(num_rows - len(rows))]
    packed = pack_rows([[members[index] for index in row] for row in rows], seq_len)

    places = {index: (b, s) for b, row in enumerate(rows) for s, index in enumerate(row, start=1)}
    candidate_places = np.zeros((num_groups, num_candidates, 2), np.int32)
    ranks = np.full((num_groups, num_candidates), PADDING_RANK, np.int32)
    is_candidate = np.zeros((num_rows, len(members) + 1), np.bool_)
    first = 0
    for g, group in enumerate(groups):
        for r, rank in enumerate(group.ranks):
            candidate_places[g, r] = places[first + r]
            is_candidate[places[first + r]] = True
            ranks[g, r] = rank
        first += len(group.candidates) + 1

    in_candidate = np.take_along_axis(is_candidate, packed["segment_ids"], axis=1)
    return packed | {
        "loss_mask": packed["loss_mask"] & ~in_candidate,
        "rank_mask": packed["loss_mask"] & in_candidate,
        "candidate_rows": candidate_places[..., 0],
        "candidate_segments": candidate_places[..., 1],
        "ranks": ranks,
    }


def _members(groups: Sequence[Group]) -> list[Example]:
    """Every candidate, then the ground truth, group after group."""
    return [example for group in groups for example in (*group.candidates, group.gold)]


def _place(members: Sequence[Example], seq_len: int) -> list[list[int]]:
    """Rows of indices into `members`, longest first, which wastes less than a given order."""
    by_length = sorted(range(len(members)), key=lambda index: -num_slots(members[index]))
    rows = first_fit([num_slots(members[index]) for index in by_length], seq_len)
    return [[by_length[at] for at in row] for row in rows]
