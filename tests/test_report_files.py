"""Folders that are no run, and records that no stage writes: one line, and no page."""

import json
from pathlib import Path
from typing import Any

import pytest

from memphis_jax.report import main, write_report
from memphis_jax.report_files import rounds_there

RECORD = {
    **{"stage": "sft", "started": "2024-02-03", "config_sha256": "0" * 64, "host": "box"},
    **{"command": ["memphis"], "exit_code": 0, "seconds": 1.5, "versions": {}, "note": ""},
    **{"inputs": {}, "outputs": {}},
}


def put(folder: Path, name: str, *rows: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )


@pytest.mark.parametrize("held", ["nothing", "an HF model", "one phase"])
def test_a_folder_that_is_no_run_gets_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held: str
) -> None:
    if held == "an HF model":
        put(tmp_path, "config.json", {"model_type": "stablelm"})
    if held == "one phase":
        put(tmp_path, "metrics.jsonl", {"step": 1})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and sorted(tmp_path.iterdir()) == before
    assert f"{tmp_path} is not of a run, whose folder holds config.json and ledger/" in last


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    put(tmp_path, "config.json", {"rounds": {"num_rounds": 2}})
    main([str(tmp_path)])
    assert "No stage is done yet" in (tmp_path / "report.html").read_text()


def test_the_help_says_what_is_read_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for word in ("WORKDIR/report.html", "ledger/", "metrics.jsonl", "pairs.jsonl", "any time"):
        assert word in told


def test_only_folders_of_rounds_count(tmp_path: Path) -> None:
    for name in ("round1", "round12", "round2-old", "roundtrip", "rounds", "round0", "round1e9"):
        (tmp_path / name).mkdir()
    (tmp_path / "round99999999").mkdir()  # it would be ninety-nine million rounds
    (tmp_path / "round3").write_text("a file")
    assert sorted(rounds_there(tmp_path)) == [1, 12]
    put(tmp_path, "ledger/sft.json", RECORD)
    assert write_report(tmp_path).is_file()


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("config.json", ["{"], "config.json is not JSON"),
        ("results.json", ["[]"], "results.json holds a list, a JSON object is needed"),
        ("ledger/data.json", ["{"], "data.json is not JSON"),
        ("ledger/data.json", [{}], "data.json: the field 'stage' is None"),
        ("ledger/data.json", [RECORD | {"seconds": "1"}], "data.json: the field 'seconds' is '1'"),
        ("eval/sft.json", [{"test_greedy": "x"}], "sft.json: the field 'test_greedy' is 'x'"),
        ("sft/metrics.jsonl", [{"step": 1}, '{"ste'], "metrics.jsonl, line 2: not JSON"),
        ("sft/metrics.jsonl", [{"step": "1"}], "metrics.jsonl, line 1: the field 'step' is '1'"),
        (
            "round1/graded.jsonl",
            [{"meta": {}}, {"num_tokens": None}],
            "graded.jsonl, line 2: the field 'num_tokens' is None",
        ),
        ("round1/pairs.jsonl", [{"chosen": "a"}], "line 1: the field 'rejected' is None"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, name: str, rows: list[Any], told: str) -> None:
    put(tmp_path, "ledger/sft.json", RECORD)
    put(tmp_path, name, *rows)
    with pytest.raises(ValueError, match=told):
        main([str(tmp_path)])
    assert not list(tmp_path.glob("report*"))
