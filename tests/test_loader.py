import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

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


def sft(examples: list[Example], **changes: int) -> Loader:
    arguments = {"seq_len": SEQ_LEN, "batch_size": 8, "epochs": 3, "seed": 5} | changes
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


def log_batches(log: Path, saved: Path) -> None:
    """A process: append "step digest" per batch to `log`, going on from the step in `saved`."""
    iterator = iter(sft(make_examples(50)))
    step = 0
    if saved.exists():
        step, state = json.loads(saved.read_text())
        iterator.set_state(state)
    for batch in iterator:
        with log.open("a") as file:
            file.write(f"{step} {digest(batch)}\n")
        step += 1
        partial = saved.with_suffix(".partial")
        partial.write_text(json.dumps([step, iterator.get_state()]))
        partial.replace(saved)
        time.sleep(0.05)


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    log, saved = tmp_path / "log", tmp_path / "saved.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(log), str(saved)]
    for kill_after in (2, 5):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and (
            not log.exists() or len(log.read_text().splitlines()) < kill_after
        ):
            time.sleep(0.01)
        assert process.poll() is None, "the process ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run(command, env=environment, check=True)

    lines = [line.split() for line in log.read_text().splitlines()]
    expected = [digest(batch) for batch in sft(make_examples(50))]
    # The kill may come between a log line and its position: then the same batch is logged twice.
    assert {int(step) for step, _ in lines} == set(range(len(expected)))
    assert all(expected[int(step)] == logged for step, logged in lines)
    assert len(lines) <= len(expected) + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, "batch_size a multiple of accumulation"),
        ({"epochs": 0}, "epochs 0 must be 1 or more"),
        ({"process_count": 3}, "equal share of micro-batches of 8"),
        ({"accumulation": 4, "process_count": 4}, "equal share of micro-batches of 2"),
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
    log_batches(Path(sys.argv[1]), Path(sys.argv[2]))
