import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphis_jax.data.packing import Group, first_fit, pack_groups, pack_rows, rows_needed
from memphis_jax.data.prompts import Example


def example(tokens: list[int], num_prompt: int) -> Example:
    """An example whose first `num_prompt` tokens are not trained."""
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= num_prompt)


def random_example(rng: np.random.Generator, longest: int) -> Example:
    length = int(rng.integers(2, longest + 1))
    return example(rng.integers(2, 1000, length).tolist(), int(rng.integers(1, length)))


def unpack(
    packed: dict[str, np.ndarray], row: int, segment: int, mask: str
) -> tuple[list[int], list[int]]:
    """The tokens of one segment and those of its targets that `mask` keeps."""
    here = packed["segment_ids"][row] == segment
    tokens, targets = packed["tokens"][row][here], packed["targets"][row][here]
    assert packed["positions"][row][here].tolist() == list(range(len(tokens)))
    assert tokens[1:].tolist() == targets[:-1].tolist()
    return [*tokens.tolist(), int(targets[-1])], targets[packed[mask][row][here]].tolist()


def trained(of: Example) -> list[int]:
    return of.tokens[1:][of.loss_mask[1:]].tolist()


def test_first_fit_takes_the_first_row_with_room_in_the_given_order() -> None:
    assert first_fit([3, 5, 2, 4, 1, 2], capacity=6) == [[0, 2, 4], [1], [3, 5]]
    assert first_fit([], capacity=6) == []
    assert first_fit([6], capacity=6) == [[0]]


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 20))
def test_first_fit_equals_the_definition(lengths: list[int], capacity: int) -> None:
    expected: list[list[int]] = []
    for index, length in enumerate(lengths):
        for row in expected:
            if sum(lengths[other] for other in row) + length <= capacity:
                row.append(index)
                break
        else:
            expected.append([index])
    assert first_fit(lengths, capacity) == expected


def test_first_fit_names_a_length_that_cannot_fit() -> None:
    with pytest.raises(ValueError, match="example 1 takes 7 slots but a row has 6"):
        first_fit([6, 7], capacity=6)
    with pytest.raises(ValueError, match="example 2 takes 0 slots"):
        first_fit([6, 1, 0], capacity=6)


def test_pack_rows_by_hand() -> None:
    first = example([11, 12, 13, 14], num_prompt=2)
    second = example([21, 22, 23], num_prompt=1)
    packed = pack_rows([[first, second], []], seq_len=7)
    assert packed["tokens"].tolist() == [[11, 12, 13, 21, 22, 0, 0], [0] * 7]
    assert packed["targets"].tolist() == [[12, 13, 14, 22, 23, 0, 0], [0] * 7]
    assert packed["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0], [0] * 7]
    assert packed["loss_mask"].astype(int).tolist() == [[0, 1, 1, 1, 1, 0, 0], [0] * 7]
    assert {name: array.dtype.name for name, array in packed.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "loss_mask": "bool",
    }


def test_pack_rows_refuses_an_overfull_row() -> None:
    with pytest.raises(ValueError, match="row 1 takes 4 slots but seq_len is 3"):
        pack_rows([[], [example([1, 2, 3], 1), example([1, 2, 3], 1)]], seq_len=3)


def test_every_example_comes_back_from_packed_rows() -> None:
    rng = np.random.default_rng(0)
    examples = [random_example(rng, longest=33) for _ in range(200)]
    rows = first_fit([len(one.tokens) - 1 for one in examples], 32)
    packed = pack_rows([[examples[index] for index in row] for row in rows], 32)
    for row, members in enumerate(rows):
        assert packed["segment_ids"][row].max() == len(members)
        for segment, index in enumerate(members, start=1):
            one = examples[index]
            assert unpack(packed, row, segment, "loss_mask") == (one.tokens.tolist(), trained(one))
    padding = packed["segment_ids"] == 0
    assert padding.any()
    assert not packed["loss_mask"][padding].any()


def test_pack_groups_by_hand() -> None:
    best, worst = example([1, 2, 3, 4], 2), example([1, 2, 5], 2)
    gold = example([1, 2, 6, 7, 8], 2)
    group = Group(candidates=(worst, best), ranks=(1, 0), gold=gold)
    packed = pack_groups([group], seq_len=7, num_rows=3, num_groups=2, num_candidates=3)
    # Longest first: gold takes 4 slots, best 3, worst 2 (which opens the second row).
    assert packed["tokens"].tolist() == [[1, 2, 6, 7, 1, 2, 3], [1, 2, 0, 0, 0, 0, 0], [0] * 7]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert packed["loss_mask"].astype(int).tolist() == [[0, 1, 1, 1, 0, 0, 0], [0] * 7, [0] * 7]
    assert packed["rank_mask"].astype(int).tolist() == [
        [0, 0, 0, 0, 0, 1, 1],
        [0, 1, 0, 0, 0, 0, 0],
        [0] * 7,
    ]
    assert packed["candidate_rows"].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert packed["candidate_segments"].tolist() == [[1, 2, 0], [0, 0, 0]]
    assert packed["ranks"].tolist() == [[1, 0, -100], [-100, -100, -100]]
    assert {
        packed[name].dtype.name for name in ("candidate_rows", "candidate_segments", "ranks")
    } == {"int32"}


def random_groups(rng: np.random.Generator, num_groups: int, longest: int) -> list[Group]:
    groups = []
    for _ in range(num_groups):
        candidates = tuple(random_example(rng, longest) for _ in range(rng.integers(1, 5)))
        ranks = tuple(rng.permutation(len(candidates)).tolist())
        groups.append(Group(candidates, ranks, random_example(rng, longest)))
    return groups


def test_every_candidate_and_ground_truth_comes_back_from_packed_groups() -> None:
    groups = random_groups(np.random.default_rng(1), num_groups=20, longest=25)
    num_rows = rows_needed(groups, 24)
    packed = pack_groups(groups, seq_len=24, num_rows=num_rows, num_groups=20, num_candidates=4)
    assert packed["tokens"].shape == (num_rows, 24)
    assert packed["segment_ids"][-1].any(), "rows_needed asked for a row that stays empty"
    assert not (packed["loss_mask"] & packed["rank_mask"]).any()

    taken = set()
    for g, group in enumerate(groups):
        assert packed["ranks"][g].tolist() == [*group.ranks, *[-100] * (4 - len(group.ranks))]
        for r, one in enumerate(group.candidates):
            place = int(packed["candidate_rows"][g, r]), int(packed["candidate_segments"][g, r])
            taken.add(place)
            assert unpack(packed, *place, "rank_mask") == (one.tokens.tolist(), trained(one))
            assert unpack(packed, *place, "loss_mask")[1] == []
    places = {
        (row, segment)
        for row in range(num_rows)
        for segment in np.unique(packed["segment_ids"][row])
        if segment
    }
    left = [unpack(packed, *place, "loss_mask") for place in places - taken]
    assert sorted(left) == sorted(
        (group.gold.tokens.tolist(), trained(group.gold)) for group in groups
    )
    assert packed["loss_mask"].sum() == sum(len(trained(group.gold)) for group in groups)


def test_no_groups_pack_into_padding() -> None:
    assert rows_needed([], 8) == 0
    packed = pack_groups([], seq_len=8, num_rows=2, num_groups=3, num_candidates=2)
    assert not packed["segment_ids"].any()
    assert not packed["rank_mask"].any()
    assert (packed["ranks"] == -100).all()


def test_a_group_without_candidates_trains_its_ground_truth() -> None:
    group = Group((), (), example([1, 2, 3], 1))
    packed = pack_groups([group], seq_len=3, num_rows=1, num_groups=1, num_candidates=1)
    assert packed["loss_mask"].tolist() == [[True, True, False]]
    assert packed["ranks"].tolist() == [[-100]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_rows": 1}, "need num_rows of 2 but it is 1"),
        ({"num_groups": 0}, "need num_groups of 1 but it is 0"),
        ({"num_candidates": 1}, "need num_candidates of 2 but it is 1"),
        ({"seq_len": 3}, "group 0 member 2 takes 4 slots but a row has 3"),
    ],
)
def test_pack_groups_names_the_size_that_is_too_small(shape: dict[str, int], message: str) -> None:
    group = Group(
        (example([1, 2, 3, 4], 2), example([1, 2, 5], 2)), (0, 1), example([1, 2, 6, 7, 8], 2)
    )
    sizes = {"seq_len": 7, "num_rows": 2, "num_groups": 1, "num_candidates": 2} | shape
    with pytest.raises(ValueError, match=message):
        pack_groups([group], **sizes)


@pytest.mark.parametrize("ranks", [(0,), (0, -100)])
def test_a_group_whose_ranks_do_not_match_is_refused(ranks: tuple[int, ...]) -> None:
    one = example([1, 2, 3], 1)
    with pytest.raises(ValueError, match="group 0 has 2 candidates and ranks"):
        pack_groups(
            [Group((one, one), ranks, one)], seq_len=8, num_rows=1, num_groups=1, num_candidates=2
        )
