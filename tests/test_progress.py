"""What a person sees while answers are sampled."""

import sys

import pytest

from memphis_jax.progress import Progress


def test_a_log_gets_a_line_per_tenth_and_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(95)
    for _ in range(95):
        progress.add(1, 40)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/95" for n in (*range(10, 91, 10), 95)]
    assert "tokens/s" in lines[0] and lines[-1].endswith(" 0 s left ")


def test_a_terminal_sees_every_step_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(3)
    for _ in range(3):
        progress.add(1, 40)
    told = capsys.readouterr().err
    assert [part.split()[1] for part in told.split("\r")] == ["1/3", "2/3", "3/3"]
    assert told.count("\n") == 1 and told.endswith("\n")
