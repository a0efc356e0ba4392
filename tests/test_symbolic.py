"""Facts about comparing formulas in a worker process: the answers, the limits, and its end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memphis_jax.rounds import commands
from memphis_jax.rounds.files import read_jsonl, write_jsonl
from memphis_jax.rounds.symbolic import SymbolicEqual

ENDLESS = "\\binom{999999999}{99999999}"


@pytest.fixture(scope="module")
def equal() -> Iterator[SymbolicEqual]:
    with SymbolicEqual() as equal:
        yield equal


def pid(equal: SymbolicEqual) -> int:
    assert equal._worker
    return equal._worker.pid


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (a container's init may not reap orphans)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("truth", "answer", "verdict"),
    [
        ("x^2-1", "(x-1)(x+1)", True),
        ("x^2-1", "(x-1)(x-1)", False),
        ("x^2-y^2", "(x-y)(x+y)", True),
        ("x^2y^3", "y^3x^2", True),
        ("\\frac{x^2}{y^2}", "(\\frac{x}{y})^{2}", True),
        ("(x^2+1)^2", "x^4+2x^2+1", True),
        ("\\frac{\\sqrt{2}}{2}", "1/\\sqrt{2}", True),
        ("pi/2", "\\frac{\\pi}{2}", True),
        ("8+4i", "4i+8", True),
        ("8+4i", "8-4i", False),
        ("x+1", "y+1", False),
        ("(18,-18)", "(18,-18.0)", True),
        ("(18,-18)", "(18,-17)", False),
        ("(3,4)", "(4,3)", False),  # sympy reads an interval and a pair
        ("(3,4)", "7", False),
        ("[1,2)", "[1,2]", False),
        ("[1,2)", "[1,3)", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("\\{1,2\\}", "\\{1,3\\}", False),
        ("\\{1,2\\}", "1", False),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}", False),
        ("x=2", "2", True),
        ("y=2x+1", "y=2x+2", False),
        ("y=2x+1", "2y=4x+2", True),
        ("x<3", "3>x", True),
        ("x<3", "x<=3", False),
        # nothing that sympy can read, or that is worth a time-out
        ("x+1", "x^+", None),
        *(("x+1", power, None) for power in ("9^{9^{9}}", "9^9^9", "x^{9}^{9}", "9**9**9")),
        ("x+1", "x^(9^9)", None),
        ("x+1", "x^{-9999}", None),
        ("x+1", "999!", None),
        ("x+1", "x" * 400, None),
        # math-verify says yes, but numbers differ
        ("x^2=x-101", "x^2=3x-101", None),
        ("x^2=2x-101", "x^2=2x-201", None),
        ("\\frac{4}{3}\\pi", "4.18879", None),
        # a decimal near a closed form may be meant as it
        ("2\\pi", "6.28", None),
        ("2\\pi r", "6.28r", None),
        ("(2\\pi,1)", "(6.28,1)", None),
        ("(2\\pi,1)", "(6.28,2)", False),
        ("2\\pi", "6.5", False),
        ("x+0.5", "x+0.502", False),
        # math-verify says no, but no number tells them apart
        ("\\sqrt{x^2}", "x", None),
        ("\\sqrt{ab}", "\\sqrt{a}\\sqrt{b}", None),
        ("x", "2x-x", None),
        ("x<3", "\\{1\\}", None),
        ("\\infty", "3", None),
    ],
)
def test_equal_formulas(
    truth: str, answer: str, verdict: bool | None, equal: SymbolicEqual
) -> None:
    assert equal(truth, answer) is verdict


@pytest.mark.slow
def test_an_endless_comparison_costs_one_time_out_and_the_worker() -> None:
    with SymbolicEqual(seconds=1) as equal:
        assert equal("x+1", "1+x") is True
        first = pid(equal)
        with pytest.raises(TimeoutError, match=r"gave up on 'x\+1' = .*binom"):
            equal("x+1", ENDLESS)
        assert not is_running(first)
        assert equal("x+1", "2+x") is False
        second = pid(equal)
        with pytest.raises(TimeoutError):  # remembered
            equal("x+1", ENDLESS)
        assert pid(equal) == second
        assert equal.timeouts == 1
    assert not is_running(second)


def test_memory_is_limited_and_a_lack_of_it_proves_nothing() -> None:
    """These are equal; math-verify, out of memory on the way, says no (seen at this limit)."""
    limit = 80 * 2**20  # a little above what the imports take
    with SymbolicEqual(seconds=20, memory=limit) as equal:
        assert equal("x+1", "1+x") is True
        limits = Path(f"/proc/{pid(equal)}/limits").read_text()
        assert limits.partition("Max address space")[2].split()[:2] == [str(limit)] * 2
        square = "((u+v)(u+v)+2(u+v)(w+x)+(w+x)(w+x))"
        try:
            verdict = equal("(u+v+w+x)^{40}", square + "^{20}")
        except TimeoutError:
            verdict = None  # the worker itself ran out of it
        assert verdict is None


def test_a_worker_killed_from_outside_is_replaced() -> None:
    with SymbolicEqual() as equal:
        assert equal("x+1", "1+x") is True
        os.kill(pid(equal), signal.SIGKILL)
        while is_running(pid(equal)):
            time.sleep(0.01)
        assert equal("x+2", "2+x") is True
        assert equal.timeouts == 0


def test_threads_share_a_worker_and_no_signal_is_touched(equal: SymbolicEqual) -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    verdicts = {}

    def ask(number: int) -> None:
        verdicts[number] = equal(f"x+{number}", f"{number % 5}+x")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number < 5 for number in range(10)}
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == before


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["1+x", ENDLESS], ids=["idle", "busy"])
def test_the_worker_ends_with_its_parent(formula: str) -> None:
    """The parent is killed with SIGKILL, so that it can tell nobody."""
    code = f"""
import threading, time
from memphis_jax.rounds.symbolic import SymbolicEqual
equal = SymbolicEqual(seconds=2)
equal("x+1", "x+1")
threading.Thread(target=equal, args=("x+1", {formula!r}), daemon=True).start()
time.sleep(0.3)
print(equal._worker.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


@pytest.mark.slow
def test_the_command_goes_on_after_a_planted_endless_expression(tmp_path: Path) -> None:
    question = {"prompt": "?", "rationale": "r", "target": "x+1", "source": "math"}
    options = "Which?\nOptions:\n(A) 12\n(B) 13"
    choice = {"prompt": options, "rationale": "r", "target": "(B)", "source": "aqua"}
    write_jsonl(tmp_path / "questions.jsonl", [question | {"id": "q"}, choice | {"id": "c"}])

    def row(name: str, sample: int, answer: str) -> dict[str, object]:
        text = f"So.\n### Answer:\n{answer}"
        return {"id": name, "sample": sample, "text": text, "finish_reason": "stop"}

    rows = [row("q", i, a) for i, a in enumerate(["1+x", ENDLESS, "x+2", ENDLESS, "2x-x+1"])]
    rows += [row("c", i, a) for i, a in enumerate(["13", "12", "B", "14"])]
    write_jsonl(tmp_path / "completions.jsonl", [{"meta": {"seed": 1}}, *rows])
    commands.grade(
        [
            *("--completions", str(tmp_path / "completions.jsonl")),
            *("--questions", str(tmp_path / "questions.jsonl")),
            *("--out", str(tmp_path / "graded.jsonl")),
        ]
    )
    meta, *graded = read_jsonl(tmp_path / "graded.jsonl")
    assert meta == {"meta": {"seed": 1}}
    assert [row["verdict"] for row in graded] == [
        *("correct", "unknown", "incorrect", "unknown", "correct"),
        *("correct", "incorrect", "correct", "unknown"),
    ]
    assert [row["reason"] for row in graded] == ["", "time-out", "", "time-out", *[""] * 5]
    audit = json.loads((tmp_path / "graded.audit.json").read_text())
    assert audit["sources"]["math"]["timeouts"] == 2
    assert audit["sources"]["aqua"]["timeouts"] == 0
