import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memphis_jax.data.loader import Batch, Loader, rank_loader, sft_loader
from memphis_jax.data.packing import Group, rows_needed
from memphis_jax.data.prompts import Example

SEQ_LEN = 24


def make_examples(count: int) -> list[Example]:
    """Examples of 3 to 21 tokens, each 1 + the index of its example: a token tells its owner."""
    lengths = np.random.default_rng(0).integers(3, 22, count)
    return [Example(np.full(n, 1 + i, np.int32), np.arange(n) > 0) for i, n in enumerate(lengths)]


def make_groups(count: int) -> list[Group]:
    examples = iter(make_examples(4 * count))
    groups = []
    for index in range(count):
        candidates = tuple(next(examples) for _ in range(2 + index % 2))
        groups.append(Group(candidates, tuple(range(len(candidates))), next(examples)))
    return groups


def sft(examples: list[Example], **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "batch_size": 8,
        "epochs": 3,
        "seed": 5,
    } | changes
    return sft_loader(examples, **arguments)


def digest(batch: Batch) -> str:
    content = b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))
    return hashlib.sha256(content).hexdigest()


def segments(batch: Batch) -> list[int]:
    """The example index of every segment, row after row."""
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    return (batch["tokens"][starts] - 1).tolist()


def test_every_epoch_holds_every_example_once_in_another_order() -> None:
    loader = sft(make_examples(50))
    batches = list(loader)
    assert len(batches) == loader.num_steps
    assert {batch["tokens"].shape for batch in batches} == {(1, 8, SEQ_LEN)}
    seen = [index for batch in batches for index in segments(batch)]
    epochs = [seen[start : start + 50] for start in (0, 50, 100)]
    assert len(seen) == 150
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_last_batch_of_an_epoch_is_filled_with_padding() -> None:
    loader = sft(
        [Example(np.full(SEQ_LEN + 1, 3, np.int32), np.ones(SEQ_LEN + 1, bool))] * 11, epochs=2
    )
    filled = [(batch["segment_ids"] > 0).any(axis=-1).tolist() for batch in loader]
    assert filled == [[[True] * 8], [[True] * 3 + [False] * 5]] * 2


def test_batches_depend_on_the_seed_and_on_nothing_else() -> None:
    examples = make_examples(50)
    first = [digest(batch) for batch in sft(examples)]
    assert first == [digest(batch) for batch in sft(examples)]
    assert first != [digest(batch) for batch in sft(examples, seed=6)]


def test_accumulation_only_cuts_the_batch() -> None:
    examples = make_examples(50)
    for whole, parts in zip(sft(examples), sft(examples, accumulation=4), strict=True):
        for name, array in whole.items():
            assert parts[name].shape == (4, 2, SEQ_LEN)
            np.testing.assert_array_equal(parts[name].reshape(array.shape), array)


def test_the_hosts_shares_make_up_the_batch() -> None:
    examples = make_examples(50)
    hosts = [sft(examples, accumulation=2, process_index=p, process_count=4) for p in range(4)]
    for whole, *shares in zip(sft(examples, accumulation=2), *hosts, strict=True):
        for name, array in whole.items():
            assert shares[0][name].shape == (2, 1, SEQ_LEN)
            np.testing.assert_array_equal(
                np.concatenate([share[name] for share in shares], axis=1), array
            )


def fits(groups: list[Group]) -> dict[int, int]:
    """The index of a group by the token that all of its ground truth consists of."""
    return {int(group.gold.tokens[0]): index for index, group in enumerate(groups)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4, 7])
def test_any_number_of_hosts_shares_every_batch(hosts: int, accumulation: int) -> None:
    """Also where they do not divide it: 7 hosts of 8 rows, and of 4."""
    whole = list(sft(make_examples(50), accumulation=accumulation))
    loaders = [
        sft(make_examples(50), accumulation=accumulation, process_index=p, process_count=hosts)
        for p in range(hosts)
    ]
    rows = -(-8 // accumulation // hosts)
    for step, of_all in enumerate(whole):
        shares = [loader[step] for loader in loaders]
        for share in shares:
            assert (
                share["tokens"].shape == share["loss_mask"].shape == (accumulation, rows, SEQ_LEN)
            )
        for part in range(accumulation):
            # Disjoint, complete and in order: the real rows side by side are the micro-batch.
            for name, array in of_all.items():
                real = [s[name][part][s["segment_ids"][part].any(-1)] for s in shares]
                expected = array[part][of_all["segment_ids"][part].any(-1)]
                np.testing.assert_array_equal(np.concatenate(real), expected)
    seen = [index for loader in loaders for batch in loader for index in segments(batch)]
    assert Counter(seen) == dict.fromkeys(range(50), 3)  # three epochs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4, 7])
def test_any_number_of_hosts_shares_the_groups(hosts: int, accumulation: int) -> None:
    groups = make_groups(22)
    loaders = [
        rank_loader(
            groups,
            seq_len=SEQ_LEN,
            batch_size=8,
            accumulation=accumulation,
            epochs=2,
            seed=0,
            process_index=p,
            process_count=hosts,
        )
        for p in range(hosts)
    ]
    assert {loader.num_steps for loader in loaders} == {2 * 3}
    shapes = {
        tuple((name, array.shape) for name, array in sorted(batch.items()))
        for loader in loaders
        for batch in loader
    }
    assert len(shapes) == 1
    assert dict(shapes.pop())["ranks"] == (accumulation, -(-8 // accumulation // hosts), 3)
    owner, steps = fits(groups), []
    for step in range(6):
        steps.append([])
        for loader in loaders:
            batch = loader[step]
            for part in range(accumulation):
                steps[-1] += groups_of({name: a[part] for name, a in batch.items()}, owner)
    for epoch in (steps[:3], steps[3:]):
        assert sorted(index for step in epoch for index in step) == list(range(22))
    whole = rank_loader(groups, seq_len=SEQ_LEN, batch_size=8, epochs=2, seed=0)
    for step, found in enumerate(steps):
        here = groups_of({name: a[0] for name, a in whole[step].items()}, owner)
        assert sorted(found) == sorted(here), "a step is the same groups on any number of hosts"


def groups_of(batch: Batch, owner: dict[int, int]) -> list[int]:
    """The indices of a micro-batch's groups, whose members all lie in it."""
    real = (batch["ranks"] >= 0).any(-1)
    found = sorted(owner[int(token)] for token in np.unique(batch["targets"][batch["loss_mask"]]))
    of_candidates = []
    for rows, numbers, ranks in zip(
        batch["candidate_rows"][real],
        batch["candidate_segments"][real],
        batch["ranks"][real],
        strict=True,
    ):
        tokens = [
            np.unique(batch["tokens"][row][batch["segment_ids"][row] == number]).tolist()
            for row, number, rank in zip(rows, numbers, ranks, strict=True)
            if rank >= 0
        ]
        # Examples are made candidate, candidate[, candidate], gold: with successive tokens.
        assert all(len(one) == 1 for one in tokens)
        assert tokens == [[tokens[0][0] + k] for k in range(len(tokens))]
        of_candidates.append(owner[tokens[-1][0] + 1])
    assert sorted(of_candidates) == found
    return found


def test_slots_told_beforehand_change_nothing() -> None:
    examples = make_examples(50)
    told = sft(examples, slots=[len(example.tokens) - 1 for example in examples])
    assert [digest(batch) for batch in told] == [digest(batch) for batch in sft(examples)]


def test_where_slots_are_told_no_example_is_read_before_its_batch() -> None:
    read: list[int] = []

    class Stored(list[Example]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            return (self[index] for index in range(len(self)))

    examples = make_examples(50)
    loader = sft(Stored(examples), slots=[len(example.tokens) - 1 for example in examples])
    assert read == []
    first = segments(loader[0])
    assert sorted(read) == sorted(first)


def test_rank_batches_have_one_shape_and_hold_every_group_once_an_epoch() -> None:
    groups = make_groups(10)
    golds = [int(group.gold.tokens[0]) for group in groups]
    loader = rank_loader(groups, seq_len=SEQ_LEN, batch_size=4, accumulation=2, epochs=2, seed=0)
    batches = list(loader)
    assert len(batches) == loader.num_steps == 2 * 3
    rows = batches[0]["tokens"].shape[1]
    fullest = 0
    for batch in batches:
        assert batch["tokens"].shape == batch["rank_mask"].shape == (2, rows, SEQ_LEN)
        assert batch["candidate_rows"].shape == batch["ranks"].shape == (2, 2, 3)
        fullest = max(fullest, int((batch["segment_ids"] > 0).any(axis=-1).sum(axis=-1).max()))
    assert fullest == rows
    assert rows_needed(groups[:1], SEQ_LEN) <= rows
    for epoch in (batches[:3], batches[3:]):
        trained = {int(token) for batch in epoch for token in batch["targets"][batch["loss_mask"]]}
        assert trained == set(golds)
        candidates = Counter(np.concatenate([batch["ranks"].ravel() for batch in epoch]).tolist())
        # 12 places for 3 candidates: ten groups with ranks 0 and 1, five of them also with 2.
        assert candidates == {0: 10, 1: 10, 2: 5, -100: 36 - 25}
        # The last batch holds two groups, both in its first micro-batch.
        assert (epoch[-1]["ranks"][1] == -100).all()
        assert not epoch[-1]["segment_ids"][1].any()
    assert digest(batches[0]) != digest(batches[3])


@pytest.mark.parametrize(("multiple", "rows"), [({}, 3), ({"row_multiple": 2}, 4)])
def test_rows_are_rounded_up_to_the_devices(multiple: dict[str, int], rows: int) -> None:
    row = Example(np.ones(SEQ_LEN + 1, np.int32), np.arange(SEQ_LEN + 1) > 0)
    group = Group((row, row), (0, 1), row)  # three rows
    loader = rank_loader([group], seq_len=SEQ_LEN, batch_size=1, epochs=1, seed=0, **multiple)
    assert loader[0]["tokens"].shape == (1, rows, SEQ_LEN)


@pytest.mark.parametrize("kind", ["sft", "rank"])
def test_a_restored_iterator_goes_on_with_the_next_batch(kind: str) -> None:
    def new() -> Loader:
        if kind == "sft":
            return sft(make_examples(50))
        return rank_loader(make_groups(10), seq_len=SEQ_LEN, batch_size=4, epochs=2, seed=0)

    iterator = iter(new())
    states = [json.dumps(iterator.get_state())]
    digests = []
    for batch in iterator:
        digests.append(digest(batch))
        states.append(json.dumps(iterator.get_state()))
    assert len(digests) > 3
    for step, state in enumerate(states):
        restored = iter(new())
        restored.set_state(json.loads(state))
        assert [digest(batch) for batch in restored] == digests[step:]


def long_run(process_index: int, process_count: int) -> Loader:
    changes = {"process_index": process_index, "process_count": process_count, "accumulation": 2}
    return sft(make_examples(600), **changes)


def log_batches(log: Path, saved: Path, process_index: int, process_count: int) -> None:
    """A process: append "step index count digest" per batch, going on from the state in `saved`."""
    iterator = iter(long_run(process_index, process_count))
    if saved.exists():
        iterator.set_state(json.loads(saved.read_text()))
    for batch in iterator:
        state = iterator.get_state()
        # The step is what the state says, so a state that is off by one does not go unseen.
        step = state["next_index"] - 1
        with log.open("a") as file:
            file.write(f"{step} {process_index} {process_count} {digest(batch)}\n")
        partial = saved.with_suffix(".partial")
        partial.write_text(json.dumps(state))
        partial.replace(saved)
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_at_ten_moments_the_next_process_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    """Each time as another host of another number of hosts."""
    log, saved, moments = tmp_path / "log", tmp_path / "saved.json", random.Random(0)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    hosts = [(0, 1), (1, 2), (2, 4), (6, 7), (0, 7), (3, 4), (0, 2), (0, 1), (5, 7), (1, 4), (0, 1)]

    def command(host: tuple[int, int]) -> list[str]:
        return [sys.executable, __file__, str(log), str(saved), *map(str, host)]

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    for host in hosts[:10]:
        enough = len(lines()) + moments.randint(1, 6)
        process = subprocess.Popen(command(host), env=environment)
        while process.poll() is None and len(lines()) < enough:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        assert process.poll() is None, "the process ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run(command(hosts[10]), env=environment, check=True)

    loaders = {host: long_run(*host) for host in hosts}
    logged = [line.split() for line in lines()]
    for step, index, count, found in logged:
        assert digest(loaders[int(index), int(count)][int(step)]) == found
    steps = [int(step) for step, *_ in logged]
    # A kill between a log line and its state makes the next process repeat that batch, only that.
    ends = [at for at in range(1, len(logged)) if logged[at][1:3] != logged[at - 1][1:3]]
    assert len(ends) == 10
    for at in range(1, len(steps)):
        assert steps[at] - steps[at - 1] in ((0, 1) if at in ends else (1,))
    assert (steps[0], steps[-1]) == (0, loaders[0, 1].num_steps - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, "batch_size a multiple of accumulation"),
        ({"epochs": 0}, "epochs 0 must be 1 or more"),
        ({"process_index": 2, "process_count": 2}, "host 2 of 2"),
        ({"seq_len": 10}, r"example \d+ takes \d+ slots but a row has 10"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sft(make_examples(50), **changes)


def test_the_example_that_is_too_long_is_named_by_its_place_in_the_input() -> None:
    examples = make_examples(20)
    examples[13] = Example(np.zeros(SEQ_LEN + 2, np.int32), np.ones(SEQ_LEN + 2, bool))
    with pytest.raises(ValueError, match=f"example 13 takes {SEQ_LEN + 1} slots"):
        sft(examples)
    groups = make_groups(6)
    groups[4] = groups[4]._replace(gold=examples[13])
    with pytest.raises(ValueError, match=f"group 4 member 2 takes {SEQ_LEN + 1} slots"):
        rank_loader(groups, seq_len=SEQ_LEN, batch_size=4, epochs=1, seed=0)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        sft([])
    with pytest.raises(ValueError, match="nothing to train on"):
        rank_loader([], seq_len=SEQ_LEN, batch_size=4, epochs=1, seed=0)


def test_steps_outside_the_run_are_an_error() -> None:
    loader = sft(make_examples(5))
    with pytest.raises(IndexError, match="step 3 is not in this run of 3 steps"):
        loader[loader.num_steps]


if __name__ == "__main__":
    log_batches(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
