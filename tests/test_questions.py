"""Which questions are sampled, and which are left out with a reason."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sampled import save_tokenizer, write_questions
from tokenizers import Tokenizer

from memphis_jax.data.prompts import encode_prompt
from memphis_jax.rounds.questions import (
    Question,
    encode_questions,
    prompts_sha256,
    read_questions,
    rescored,
    row_number,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("questions") / "tokenizer")[0]


def test_several_files_in_their_order_with_every_field(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text('{"id": "b", "prompt": "x", "target": "1"}\n')
    (tmp_path / "2.jsonl").write_text('{"id": "a", "prompt": "y"}\n{"id": "c", "prompt": ""}')
    rows = read_questions([str(tmp_path / f"{n}.jsonl") for n in (1, 2)], 0, seed=0)
    assert [row["id"] for row in rows] == ["b", "a", "c"]
    assert rows[0]["target"] == "1"


def test_a_share_is_fixed_by_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = [str(write_questions(tmp_path / "q.jsonl", 50))]
    every = [row["id"] for row in read_questions(path, 0, seed=3)]
    shares = [[row["id"] for row in read_questions(path, 12, seed)] for seed in (3, 3, 4)]
    assert shares[0] == shares[1] != shares[2]
    for share in shares:
        assert len(share) == len(set(share)) == 12
        assert share == [name for name in every if name in share] != every[:12]
    for limit in (50, 51):
        assert [row["id"] for row in read_questions(path, limit, seed=3)] == every


def test_every_question_is_as_likely_to_be_in_a_share(tmp_path: Path) -> None:
    path = [str(write_questions(tmp_path / "q.jsonl", 8))]
    counts = Counter(row["id"] for seed in range(400) for row in read_questions(path, 2, seed))
    assert len(counts) == 8 and max(abs(count - 100) for count in counts.values()) < 40


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "q16", "prompt": ', "line 17: not JSON"),
        ("", "line 17: empty line"),
        ('["q16", "text"]', "line 17: expected a JSON object, found list"),
        ('{"prompt": "text"}', "line 17: 'id' must be text"),
        ('{"id": 16, "prompt": "text"}', "line 17: 'id' must be text"),
        ('{"id": "q16"}', "line 17: 'prompt' must be text"),
        ('{"id": "q16", "prompt": null}', "line 17: 'prompt' must be text"),
        ('{"id": "q3", "prompt": "text"}', "line 17: the id 'q3' is there twice"),
        (r'{"id": "\ud83d", "prompt": "x"}', r"line 17: the id '\\ud83d' is no valid Unicode"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = write_questions(tmp_path / "q.jsonl", 20)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:16], line, *lines[17:]]) + "\n")
    with pytest.raises(ValueError, match=told) as caught:
        read_questions([str(path)], 0, seed=0)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_an_id_in_two_files_is_named_with_the_second(tmp_path: Path) -> None:
    paths = [str(write_questions(tmp_path / f"{n}.jsonl", 2)) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"2\.jsonl, line 1: the id 'q0' is there twice"):
        read_questions(paths, 0, seed=0)


def encode(tokenizer: Tokenizer, prompt: str, new: int, context: int) -> Question:
    return encode_questions([{"id": "q", "prompt": prompt}], tokenizer, new, context)[0]


def test_a_prompt_may_fill_the_context_and_not_one_token_more(tokenizer: Tokenizer) -> None:
    tokens = encode_prompt(tokenizer, "Tom has 3 apples.")
    room = len(tokens) + 16
    assert encode(tokenizer, "Tom has 3 apples.", 16, room) == Question("q", tokens)
    rows = [{"id": "q", "prompt": "Tom has 3 apples."}, {"id": "short", "prompt": "Tom"}]
    tight = encode_questions(rows, tokenizer, 16, room - 1)[0]
    assert tight.tokens == []
    assert tight.skipped == (
        f"prompt of {len(tokens)} tokens + 16 new ones exceed the context of {room - 1}"
    )
    with pytest.raises(ValueError, match=r"none of the 1 questions can be answered; q: prompt of"):
        encode_questions(rows[:1], tokenizer, 16, room - 1)


@pytest.mark.parametrize("prompt", ["", " \n\t ", "half a pair: \ud83d"])
def test_what_cannot_be_encoded_is_skipped_with_its_reason(
    tokenizer: Tokenizer, prompt: str
) -> None:
    rows: list[dict[str, Any]] = [{"id": "bad", "prompt": prompt}, {"id": "good", "prompt": "x"}]
    bad, good = encode_questions(rows, tokenizer, 4, 64)
    assert bad.tokens == [] and bad.skipped
    assert "drop the row" in bad.skipped
    assert good.tokens and not good.skipped


def test_the_hash_tells_other_prompts_apart() -> None:
    questions = [Question("a", [1, 2]), Question("b", [3])]
    others = [
        [Question("a", [1, 2]), Question("b", [4])],
        [Question("a", [1, 2]), Question("c", [3])],
        questions[::-1],
        questions[:1],
    ]
    hashes = {prompts_sha256(q) for q in (questions, *others)}
    assert len(hashes) == 5 and prompts_sha256(list(questions)) in hashes


def test_row_numbers_depend_on_the_id_alone_and_fit_in_32_bits() -> None:
    numbers = {row_number(f"train-{i}") for i in range(2000)}
    assert len(numbers) == 2000 and all(0 <= n < 2**32 for n in numbers)
    assert row_number("123456789") == 0xCBF43926  # the check value of CRC-32


def test_what_is_rescored_is_spread_over_all_rows_and_never_skipped() -> None:
    questions = [Question(f"q{i}", [1], "too long" if i % 3 == 0 else "") for i in range(300)]
    chosen = rescored(questions, 4, 64)
    assert len(chosen) == 64 and chosen == rescored(questions[::-1], 4, 64)
    assert all(int(name[1:]) % 3 for name, _ in chosen)
    assert {k for _, k in chosen} == {0, 1, 2, 3}
    assert len({int(name[1:]) // 100 for name, _ in chosen}) == 3
    assert rescored(questions, 4, 16) < chosen
    assert len(rescored(questions, 4, 10**6)) == 200 * 4
    assert rescored(questions, 4, 0) == set()
