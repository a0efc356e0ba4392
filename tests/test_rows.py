"""Files of other commands that `grade`, `pairs` and `accuracy` cannot use: told in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memphis_jax.rounds import commands
from memphis_jax.rounds.files import read_jsonl, write_jsonl

META = {"meta": {"num_samples": 2, "skipped": {}}}
QUESTIONS = [
    {"id": name, "prompt": "?", "rationale": "so", "target": "4", "source": "s"} for name in "ab"
]
ANSWERS = [
    {
        "id": name,
        "sample": sample,
        "text": f"so {sample}\n### Answer:\n{4 + sample}",
        "finish_reason": "stop",
        "num_tokens": 5,
        "rationale": f"so {sample}",
        "answer": str(4 + sample),
        "verdict": ("correct", "incorrect")[sample],
    }
    for name in "ab"
    for sample in (0, 1)
]
READ = {  # command -> (the option that names answers, the other options)
    "grade": ("--completions", ("--questions", "questions.jsonl")),
    "pairs": ("--graded", ("--questions", "questions.jsonl")),
    "accuracy": (
        "--sampled",
        ("--greedy", "answers.jsonl", "--validation", "questions.jsonl", "--test", "other.jsonl"),
    ),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl("questions.jsonl", QUESTIONS)
    write_jsonl("other.jsonl", QUESTIONS)
    write_jsonl("answers.jsonl", [META, *ANSWERS])
    return tmp_path


def run(command: str, answers: str = "answers.jsonl", out: str = "out.jsonl", *more: str) -> None:
    option, others = READ[command]
    getattr(commands, command)([option, answers, *others, "--out", out, *more])


@pytest.mark.parametrize(
    ("command", "field", "kind"),
    [
        *(("grade", field, "text") for field in ("id", "text", "finish_reason")),
        *(("pairs", field, "text") for field in ("id", "rationale", "answer", "verdict")),
        *(("accuracy", field, "text") for field in ("id", "verdict", "finish_reason")),
        *((command, "sample", "a whole number") for command in ("grade", "pairs")),
        ("accuracy", "num_tokens", "a whole number"),
    ],
)
def test_a_field_that_an_answer_lacks_is_named(
    files: Path, command: str, field: str, kind: str
) -> None:
    maker = "memphis sample" if command == "grade" else "memphis grade"
    last = dict(ANSWERS[3])
    told = rf"bad.jsonl, line 5: .* the field '{field}' as {kind}, %s; `{maker}`"
    for value in (None, [1], True, "absent"):
        found = f"found {value!r}".replace("[", r"\[") if value != "absent" else "which is missing"
        row = last | {field: value} if value != "absent" else {**last}
        if value == "absent":
            del row[field]
        write_jsonl("bad.jsonl", [META, *ANSWERS[:3], row])
        with pytest.raises(ValueError, match=told % found):
            run(command, "bad.jsonl")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("field", ["id", "prompt", "rationale", "target"])
def test_a_field_that_a_question_lacks_is_named(files: Path, field: str) -> None:
    write_jsonl("questions.jsonl", [QUESTIONS[0], {**QUESTIONS[1], field: None}])
    told = rf"questions.jsonl, line 2: a question needs the field '{field}' .*`memphis data`"
    with pytest.raises(ValueError, match=told):
        run("pairs")


def test_the_process_ends_with_that_one_line(files: Path) -> None:
    write_jsonl("bad.jsonl", [META, {"id": "a"}])
    option, others = READ["pairs"]
    words = ["pairs", option, "bad.jsonl", *others, "--out", "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "memphis_jax", *words], capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("memphis pairs: bad.jsonl, line 2: ")


@pytest.mark.parametrize("command", READ)
def test_what_is_no_file_is_told_with_what_makes_it(files: Path, command: str) -> None:
    maker = "memphis sample" if command == "grade" else "memphis grade"
    with pytest.raises(FileNotFoundError, match=rf"^nope.jsonl: no such file; `{maker}`"):
        run(command, "nope.jsonl")
    with pytest.raises(IsADirectoryError, match=r"^\. is a folder: give a file in it"):
        run(command, ".")
    Path("questions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"questions.jsonl: no such file; `memphis data`"):
        run(command)


def test_rows_that_contradict_one_another_are_named(files: Path) -> None:
    write_jsonl("twice.jsonl", [META, *ANSWERS, ANSWERS[1]])
    for command in ("grade", "pairs"):
        with pytest.raises(ValueError, match="line 6: sample 1 of the question 'a' is there twice"):
            run(command, "twice.jsonl")
    write_jsonl("verdict.jsonl", [META, ANSWERS[0] | {"verdict": "right"}])
    for command in ("pairs", "accuracy"):
        with pytest.raises(ValueError, match="line 2: verdict 'right' is none of correct, "):
            run(command, "verdict.jsonl")
    write_jsonl("foreign.jsonl", [META, ANSWERS[0] | {"id": "z"}])
    with pytest.raises(ValueError, match=r"questions.jsonl has no question 'z'"):
        run("pairs", "foreign.jsonl")
    write_jsonl("other.jsonl", [*QUESTIONS, QUESTIONS[0]])
    with pytest.raises(ValueError, match=r"other.jsonl, line 3: the id 'a' is there twice"):
        run("accuracy")


@pytest.mark.parametrize("number", [1, 3])
def test_an_accuracy_of_too_few_or_too_many_answers_is_refused(files: Path, number: int) -> None:
    """A missing answer would count as a wrong one, and a repeated one twice."""
    write_jsonl("bad.jsonl", [META, *ANSWERS[:2], *[ANSWERS[2]] * number])
    with pytest.raises(ValueError, match=f"bad.jsonl: {number} answers to .* 'b', expected 2"):
        run("accuracy", "bad.jsonl")


@pytest.mark.parametrize(
    "meta", [{}, {"num_samples": 0, "skipped": {}}, {"num_samples": "2", "skipped": {}}]
)
def test_an_accuracy_needs_the_samplers_header(files: Path, meta: dict[str, Any]) -> None:
    write_jsonl("bad.jsonl", [{"meta": meta}, *ANSWERS])
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: the header needs num_samples"):
        run("accuracy", "bad.jsonl")


def test_pairs_keep_the_order_of_the_questions(files: Path) -> None:
    names = [f"q{number}" for number in range(30)]
    write_jsonl("questions.jsonl", [{**QUESTIONS[0], "id": name} for name in names])
    rows = [{**ANSWERS[k], "id": name} for name in reversed(names) for k in (0, 1)]
    write_jsonl("answers.jsonl", [META, *rows])
    run("pairs")
    assert [row["id"] for row in read_jsonl("out.jsonl")] == names


@pytest.mark.parametrize(
    ("out", "more", "told"),
    [
        ("x.jsonl", ("--max-pairs-per-question", "-1"), "-1 must be 0 (no limit) or more"),
        ("x.json", (), "--out x.json: the counts go to x.json; let the name end in .jsonl"),
        (".", (), "--out . is a folder"),
        ("answers.jsonl", (), "would overwrite answers.jsonl"),
        ("./questions.jsonl", (), "would overwrite questions.jsonl"),
        ("graded.jsonl", (), "--out graded.jsonl would overwrite graded.json,"),
    ],
)
def test_options_of_pairs_that_are_refused(
    files: Path, capsys: pytest.CaptureFixture[str], out: str, more: tuple[str, ...], told: str
) -> None:
    answers = "graded.json" if "graded" in out else "answers.jsonl"
    write_jsonl(answers, [META, *ANSWERS])
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    with pytest.raises(SystemExit) as ended:
        run("pairs", answers, out, *more)
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.parametrize("command", READ)
def test_no_command_overwrites_what_it_reads(
    files: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = Path("answers.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(command, out="answers.jsonl")
    assert "would overwrite answers.jsonl, which is read" in capsys.readouterr().err
    assert Path("answers.jsonl").read_bytes() == before


def test_a_new_folder_of_out_is_made(files: Path) -> None:
    for command in READ:
        run(command, out=f"new/{command}/out.jsonl")
    assert json.loads(Path("new/accuracy/out.jsonl").read_text())["test_sampled"] == 0.5
