import itertools
import json
import random
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphis_jax.data.contamination import guard, read_evaluation, row_text, words

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether?"
)


def why(row: str, *evaluation: str) -> str:
    """The reason for one row."""
    (reason,) = guard([row], evaluation)
    return reason


def numbered(first: int, last: int) -> str:
    """Words `word1 word2 ...`, the last included."""
    return " ".join(f"word{n}" for n in range(first, last + 1))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (QUESTION, "exact"),
        (QUESTION.upper(), "exact"),
        (QUESTION.replace(",", " --").replace(".", "!").replace(" ", "\t "), "exact"),
        ("\u201c" + QUESTION.replace(" ", "\u00a0") + "\u201d\r\n", "exact"),
        (f"{QUESTION}\nShe sold 24 in May and 48 + 24 = 72 altogether.\n72", "exact"),
        ("\n".join([*QUESTION.split(". "), "She sold 72."]), "exact"),
        (f"Answer me this.\n{QUESTION}\nThink first.", "exact"),
        (f"Once I heard: {QUESTION} I could not tell.", "13-gram"),
        ("She sold half as many clips in May how many clips did Natalia sell", "13-gram"),
        ("She sold half as many clips in May. How many did Natalia sell altogether?", ""),
        (QUESTION.replace(" ", ""), ""),
        ("", ""),
        ("\n\n?!\n", ""),
    ],
)
def test_a_question_is_found_whatever_its_case_punctuation_and_place(row: str, reason: str) -> None:
    assert why(row, "Another question.", QUESTION) == reason


def test_twelve_shared_words_are_not_enough_and_thirteen_are() -> None:
    evaluation = numbered(1, 40)
    for start in (1, 7, 28):
        assert why(f"before {numbered(start, start + 11)} after", evaluation) == ""
        assert why(f"before {numbered(start, start + 12)} after", evaluation) == "13-gram"
    assert why(f"{numbered(1, 12)} and {numbered(13, 24)}", evaluation) == ""


def test_a_run_may_cross_lines_of_the_row_but_not_two_evaluation_texts() -> None:
    assert why(f"{numbered(1, 6)}\n{numbered(7, 13)}", numbered(1, 40)) == "13-gram"
    assert why(numbered(1, 14), numbered(1, 7), numbered(8, 14)) == ""


def test_a_short_question_is_found_only_where_it_stands_alone() -> None:
    question = "Do hamsters provide food for any animals?"
    assert why(f"{question}\nHamsters are prey.\nyes", question) == "exact"
    assert why(f"{question}\nOptions:\n(A) yes\n(B) no\nHamsters are prey.", question) == "exact"
    assert why(f"Hello!\n{question.upper()}", question) == "exact"
    assert why(f"I was asked: {question}", question) == ""


def test_a_line_of_three_words_is_no_evidence_but_a_whole_prompt_is() -> None:
    assert why("Compute it.\n2 + 3 = 5", "2 * 3 = 5") == ""
    assert why("2 + 3 = 5\nSo it is 5.", "2 * 3 = 5") == "exact"
    assert why("Compute it.\n2 + 3 + 1 = 6", "2 * 3 * 1 = 6") == "exact"


def test_empty_evaluation_texts_match_nothing() -> None:
    rows = ["", "\n", "...", "a b c d", QUESTION]
    assert list(guard(rows, ["", " \n", "?!"])) == [""] * len(rows)
    assert list(guard(rows, [])) == [""] * len(rows)
    assert list(guard([], [QUESTION])) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't panic_now: 1,000 km/h!", ["don", "t", "panic", "now", "1", "000", "km", "h"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("ﬁve \uff11\uff12 ½", ["five", "12", "1", "2"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("ΣΊΣΥΦΟΣ σίσυφος", ["σίσυφοσ", "σίσυφοσ"]),
        ("ΐ " + "ΐ".upper(), ["ΐ", "ΐ"]),
        ("שלום, עולם! 👍🏽", ["שלום", "עולם"]),
        ("\ud800 x", ["x"]),
        ("…—\u200b \u3000", []),
    ],
)
def test_words_fold_case_and_compatible_forms(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(max_size=60))
def test_words_are_the_runs_of_letters_and_digits_of_the_folded_text(text: str) -> None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = "".join(letter if letter.isalnum() else " " for letter in folded)
    assert words(text) == letters.split()


def by_definition(row: str, evaluation: list[str]) -> str:
    """The same reason from word lists alone: quadratic, without sets or hashes."""
    wanted = [words(text) for text in evaluation if words(text)]
    lines = [words(line) for line in row.split("\n")]
    beginnings = [words("\n".join(row.split("\n")[: count + 1])) for count in range(len(lines))]
    if any(text in beginnings for text in wanted):
        return "exact"
    if any(text in lines and len(text) >= 4 for text in wanted):
        return "exact"
    runs = [text[at : at + 13] for text in wanted for at in range(len(text) - 12)]
    inside = beginnings[-1]
    return "13-gram" if any(inside[at : at + 13] in runs for at in range(len(inside))) else ""


# Few words, so that lines and runs meet often; separators that vanish, and line ends that do not.
_PIECES = st.lists(
    st.sampled_from(["a", "b", "A ", "b,", "\n", " - ", "a b a b a", "b\nb", "é", "e\u0301"]),
    max_size=30,
).map(" ".join)


@given(st.lists(_PIECES, max_size=6), st.lists(_PIECES, max_size=6))
def test_guard_equals_the_definition(rows: list[str], evaluation: list[str]) -> None:
    assert list(guard(rows, evaluation)) == [by_definition(row, evaluation) for row in rows]


def test_guard_equals_the_definition_where_every_reason_occurs() -> None:
    rng = random.Random(0)
    pieces = ["a", "b", "A ", "b,", "\n", "a b a b a"]
    texts = [" ".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(400)]
    rows, evaluation = texts[:380], texts[380:]
    reasons = list(guard(rows, evaluation))
    assert reasons == [by_definition(row, evaluation) for row in rows]
    assert min(reasons.count(reason) for reason in ("", "exact", "13-gram")) >= 10


def test_the_order_of_rows_and_of_evaluation_texts_does_not_matter() -> None:
    rng = random.Random(1)
    evaluation = [numbered(start, start + 20) for start in range(0, 2000, 50)]
    rows = [numbered(start, start + 9 + rng.randrange(8)) for start in range(0, 2000, 3)]
    expected = dict(zip(rows, guard(rows, evaluation), strict=True))
    assert set(expected.values()) == {"", "13-gram"}
    for _ in range(5):
        rng.shuffle(rows)
        rng.shuffle(evaluation)
        assert dict(zip(rows, guard(rows, iter(evaluation)), strict=True)) == expected


def test_planted_rows_and_no_others_are_found_among_many() -> None:
    rng = random.Random(2)
    vocabulary = [f"w{n}" for n in range(300)]

    def text(length: int) -> list[str]:
        return rng.choices(vocabulary, k=length)

    evaluation = [text(rng.randrange(13, 60)) for _ in range(200)]
    rows, planted = [], []
    for number in range(3000):
        row = text(rng.randrange(120))
        if number % 10 == 0:
            source = rng.choice(evaluation)
            at = rng.randrange(len(source) - 12)
            row[len(row) // 2 : len(row) // 2] = source[at : at + 13]
        rows.append(rng.choice([" ", ", ", "\n"]).join(row).title())
        planted.append(number % 10 == 0)
    found = guard(rows, [" ".join(words) for words in evaluation])
    assert [bool(reason) for reason in found] == planted


def test_rows_are_streamed() -> None:
    def endless() -> Iterable[str]:
        for number in itertools.count():
            yield QUESTION if number % 2 else "another text"

    assert list(itertools.islice(guard(endless(), [QUESTION]), 4)) == ["", "exact", "", "exact"]


def test_row_text_is_all_that_a_row_says() -> None:
    row = {"prompt": "How many?", "rationale": "Count.", "target": "3", "source": "s", "id": "1"}
    assert row_text(row) == "How many?\nCount.\n3"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nyou"}]
    assert row_text({"messages": turns, "source": "s"}) == "Hi\nHello\nyou"
    with pytest.raises(KeyError):
        row_text({"prompt": "How many?"})


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        ([{"question": "What?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}], ["What?"]),
        ([{"prompt": "", "Problem": "What?"}, {"INPUT": "Who?"}], ["What?", "Who?"]),
        ([{"prompt": "First", "question": "second"}], ["First"]),
        ([{"passage": "Six sat.", "question": "Who?", "label": "A"}], ["Six sat.\nWho?"]),
        (
            [{"passage": None, "question": "Who?"}, {"passage": "", "question": "I?"}],
            ["Who?", "I?"],
        ),
        ([{"input": "Who?\n\nOptions:\n(A) I\n(B) you"}], ["Who?"]),
        ([{"input": "Options: which?"}], ["Options: which?"]),
    ],
)
def test_the_question_of_a_row(tmp_path: Path, rows: list[dict], texts: list[str]) -> None:
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    whole = write(tmp_path / "b.json", json.dumps(rows, indent=1))
    bench = write(tmp_path / "c.json", json.dumps({"canary": "do not train", "examples": rows}))
    for source in (lines, whole, bench):
        assert read_evaluation([source]) == (texts, [])
    assert read_evaluation([lines, whole]) == (texts * 2, [])


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    write(tmp_path / "set/z.json", '{"problem": "Z?", "level": 5}')
    write(tmp_path / "set/deep/a.jsonl", '{"question": "A1?"}\r\n{"question": "A2?"}\r\n')
    write(tmp_path / "set/README.md", "no data")
    assert read_evaluation([str(tmp_path / "set")]) == (["A1?", "A2?", "Z?"], [])


def test_a_data_set_is_read_without_its_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder of parquet goes through `datasets` as a set of the hub does."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation", "test"):
        table = datasets.Dataset.from_dict({"question": [f"{split} {n}?" for n in range(2)]})
        table.to_parquet(str(tmp_path / "full" / f"{split}.parquet"))
    texts, warnings = read_evaluation([str(tmp_path / "full")])
    assert sorted(texts) == ["test 0?", "test 1?", "validation 0?", "validation 1?"]
    assert warnings == []
    only = datasets.Dataset.from_dict({"prompt": ["all there is"]})
    only.to_parquet(str(tmp_path / "only" / "train.parquet"))
    assert read_evaluation([str(tmp_path / "only")]) == (["all there is"], [])


def test_what_was_not_compared_is_a_warning_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # fail at once, without retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here = write(tmp_path / "here.jsonl", '{"question": "Q?"}\n')
    missing = str(tmp_path / "missing.jsonl")
    (tmp_path / "bare").mkdir()
    bare = str(tmp_path / "bare")
    empty = write(tmp_path / "empty.jsonl", "")
    holes = write(
        tmp_path / "holes.jsonl",
        '{"question": "R?"}\n{"question": null}\n{"id": 1}\n'
        '{"passage": "Six sat.", "question": "\\nOptions:\\n- I"}\n',
    )
    sources = [missing, "evals/gone.json", "gsm8k", "nobody/no-such-set", bare, empty, here, holes]
    texts, warnings = read_evaluation(sources)
    assert texts == ["Q?", "R?"]
    named = [source for source in sources if source != here]
    assert len(warnings) == len(named)
    for source, warning in zip(named, warnings, strict=True):
        assert warning.startswith(f"evaluation set {source}: ") and "\n" not in warning
    assert "1 of 4 rows" in warnings[-1] and "0 of 0 rows" in warnings[-2]
    for warning in warnings[:-2]:
        assert warning.endswith("; nothing was compared with it")
    assert read_evaluation([]) == ([], [])


def test_a_data_set_that_is_a_script_is_a_warning_and_never_run(tmp_path: Path) -> None:
    write(tmp_path / "scripted/scripted.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    texts, [warning] = read_evaluation([str(tmp_path / "scripted")])
    assert texts == [] and "scripts are no longer supported" in warning
    assert warning.endswith("; nothing was compared with it")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": "Q?", "gold": 1}\n', "no row has text in any of prompt, .* first has query"),
        ('{"question": 7}\n{}\n', "no row has text in any of prompt"),
        ('{"question": "Q?"}\nnot JSON\n', "a.jsonl, line 2: not JSON"),
        ('["Q?"]', "a.jsonl: expected rows, each a JSON object"),
        ("7", "a.jsonl: expected rows, each a JSON object"),
    ],
)
def test_a_file_that_cannot_be_understood_is_an_error(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_evaluation([write(tmp_path / "a.jsonl", text)])


def test_the_real_evaluation_sets_are_read_whole(shared: Path) -> None:
    counts = {
        "bbh/tasks": 1500,
        "agieval_v1_en": 704,
        "aqua/dev.json": 254,
        "aqua/test.json": 254,
        "mathqa/test.json": 2985,
        "strategyqa/dev.json": 229,
        "math/test": 6,
        "gsm8k/train.jsonl": 7473,
    }
    for name, count in counts.items():
        texts, warnings = read_evaluation([str(shared / "data" / name)])
        assert (len(texts), warnings) == (count, []), name


def test_gsm8k_shares_nothing_with_bbh_and_agieval(shared: Path) -> None:
    data = shared / "data"
    training, _ = read_evaluation([str(data / "gsm8k/train.jsonl")])
    evaluation, _ = read_evaluation([str(data / "bbh/tasks"), str(data / "agieval_v1_en")])
    assert set(guard(training, evaluation)) == {""}
    leaked = guard([*training, f"Hard: {evaluation[-1]}"], evaluation)
    assert sum(map(bool, leaked)) == 1


def test_a_file_nested_beyond_reason_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"^{path}, line 1: JSON nested too deeply"):
        read_evaluation([str(path)])
