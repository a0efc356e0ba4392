"""Guards of several hosts, as real processes on this one: all start or none, one lost stops all."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memphis_jax import hosts

pytestmark = pytest.mark.slow

RUN = """
import sys
from memphis_jax import hosts
from memphis_jax.errors import one_line
with one_line("test"):
    sys.exit(hosts.guard(hosts.from_environment(), sys.argv[1:]))
"""
SLEEP = "import time; time.sleep(100)"


class Group:
    """Guards that each run some Python; their output, and the pids of their children."""

    def __init__(self, folder: Path, count: int, barrier: int = 20, heartbeat: int = 20):
        self.folder, self.count = folder, count
        with socket.socket() as one, socket.socket() as two:
            one.bind(("localhost", 0))
            self.port = one.getsockname()[1]
            two.bind(("localhost", self.port + 1))  # the hub's is free too
        self.env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{self.port}",
            "JAX_NUM_PROCESSES": str(count),
            "MEMPHIS_BARRIER_SECONDS": str(barrier),
            "MEMPHIS_HEARTBEAT_SECONDS": str(heartbeat),
        }
        self.guards: dict[int, subprocess.Popen[str]] = {}

    def start(self, process: int, code: str) -> None:
        note = (
            f"import os; open({str(self.folder / f'pid{process}')!r}, 'w').write(str(os.getpid()))"
        )
        self.guards[process] = subprocess.Popen(
            [sys.executable, "-c", RUN, sys.executable, "-c", f"{note}\n{code}"],
            env=self.env | {"JAX_PROCESS_ID": str(process)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def child(self, process: int) -> int:
        """The pid of a child, once it runs."""
        path = self.folder / f"pid{process}"
        deadline = time.monotonic() + 30
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline, f"process {process} did not start"
            time.sleep(0.05)
        return int(path.read_text())

    def end(self, process: int) -> tuple[int, str]:
        """(exit code, what was said on stderr)."""
        _, said = self.guards[process].communicate(timeout=60)
        return self.guards[process].returncode, said


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(count: int, **limits: int) -> Group:
        made.append(Group(tmp_path, count, **limits))
        return made[-1]

    yield make
    for one in made:
        for guard in one.guards.values():
            guard.kill()
            guard.wait()


def test_all_run_and_end(group: Callable[..., Group]) -> None:
    three = group(3)
    for process in range(3):
        three.start(process, "import sys; sys.exit(0)")
    assert [three.end(process) for process in range(3)] == [(0, "")] * 3


@pytest.mark.parametrize("code", [0, 75])
def test_a_host_may_end_long_after_the_others(group: Callable[..., Group], code: int) -> None:
    """Process 0, to whom all listen, stays until then, and says for whom."""
    three = group(3)
    for process, seconds in enumerate((0, 13, 1)):
        three.start(process, f"import sys, time; time.sleep({seconds}); sys.exit({code})")
    waiting = r"memphis: done here; waiting for process 1 of 3 \(.+\)\n"
    ends = [three.end(process) for process in range(3)]
    assert [end[0] for end in ends] == [code] * 3
    assert re.fullmatch(waiting, ends[0][1]) and ends[1][1] == ends[2][1] == ""


def test_a_host_that_goes_after_its_end_is_not_lost(group: Callable[..., Group]) -> None:
    two = group(2)
    two.start(0, "")
    two.start(1, _until(f"{two.folder}/gone"))
    two.child(1)
    time.sleep(2)  # process 0's child has ended by then; its guard is there for the other
    two.guards[0].kill()
    two.end(0)
    time.sleep(1)
    (two.folder / "gone").touch()
    assert two.end(1) == (0, "")


def test_after_the_end_of_one_a_lost_host_still_stops_the_rest(
    group: Callable[..., Group],
) -> None:
    three = group(3)
    three.start(0, "")
    three.start(1, SLEEP)
    three.start(2, SLEEP)
    os.kill(three.child(1), signal.SIGKILL)
    three.child(2)
    ends = [three.end(process) for process in range(3)]
    assert [code for code, _ in ends] == [0, 76, 76]
    assert all("process 1 of 3" in said for _, said in ends[1:])


def test_no_child_starts_before_the_last_host_is_there(group: Callable[..., Group]) -> None:
    two = group(2)
    two.start(0, "")
    time.sleep(2)
    assert not (two.folder / "pid0").exists()
    two.start(1, "")
    assert two.end(0)[0] == two.end(1)[0] == 0


def test_a_host_that_does_not_come_is_named(group: Callable[..., Group]) -> None:
    three = group(3, barrier=3)
    three.start(0, SLEEP)
    three.start(2, SLEEP)
    for process in (0, 2):
        code, said = three.end(process)
        assert code == 76
        assert "process 1 of 3 did not arrive within 3 s" in said
        assert len(said.splitlines()) == 1
    assert not (three.folder / "pid0").exists()


def test_a_coordinator_that_does_not_come_is_named(group: Callable[..., Group]) -> None:
    two = group(2, barrier=2)
    two.start(1, SLEEP)
    code, said = two.end(1)
    assert code == 76
    assert f"process 0 (localhost:{two.port + 1}) was not reached within 2 s" in said


def test_sigterm_before_anything_could_be_saved_is_no_error(group: Callable[..., Group]) -> None:
    """A pod that is taken away while it starts: the launcher tries again after 76, not after 1."""
    two = group(2)
    for process in range(2):
        two.start(process, SLEEP)
    for process in range(2):
        two.child(process)
    for process in range(2):
        two.guards[process].terminate()
    assert all(two.end(process)[0] == 76 for process in range(2))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_stops_all_by_name(group: Callable[..., Group], victim: int) -> None:
    three = group(3)
    for process in range(3):
        three.start(process, SLEEP)
    children = [three.child(process) for process in range(3)]
    os.kill(children[victim], signal.SIGKILL)
    for process in range(3):
        code, said = three.end(process)
        assert code == 76
        told = rf"process {victim} of 3 \(.+\) was killed by signal 9: all .+ for lack of memory"
        assert re.search(told, said) and len(said.splitlines()) == 1
    assert not any(_runs(pid) for pid in children)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_host_stops_all_by_name(group: Callable[..., Group], victim: int) -> None:
    """The guard itself is gone, as when the machine is: so is its child, and the others stop."""
    two = group(2)
    for process in range(2):
        two.start(process, SLEEP)
    children = [two.child(process) for process in range(2)]
    two.guards[victim].kill()
    code, said = two.end(1 - victim)
    assert code == 76
    told = r"process 0 \(localhost\) is gone" if victim == 0 else r"process 1 of 2 \(.+\) its conn"
    assert re.search(told, said)
    assert not any(_runs(pid) for pid in children)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_host_stops_all_by_name(group: Callable[..., Group], victim: int) -> None:
    """Connections stay open, as when a network cable is pulled; nothing more is heard."""
    two = group(2, heartbeat=2)
    for process in range(2):
        two.start(process, SLEEP)
        two.child(process) if process else None
    two.child(0)
    two.guards[victim].send_signal(signal.SIGSTOP)
    code, said = two.end(1 - victim)
    assert code == 76
    assert (
        "process 0 (localhost) is silent" if victim == 0 else "was not heard of for 2 s"
    ) in said


def test_an_error_of_one_is_its_own(group: Callable[..., Group]) -> None:
    """The one with the error says it and ends with 1; the others are told who it was."""
    two = group(2)
    two.start(0, SLEEP)
    two.start(1, "import sys; sys.exit('no such file')")
    assert two.end(1) == (1, "no such file\n")
    code, said = two.end(0)
    assert code == 76
    assert re.search(r"process 1 of 2 \(.+\) ended with exit code 1", said)


def test_an_error_of_all_is_told_by_all(group: Callable[..., Group]) -> None:
    two = group(2)
    for process in range(2):
        two.start(process, "import sys, time; time.sleep(1); sys.exit('bad value')")
    assert [two.end(process) for process in range(2)] == [(1, "bad value\n")] * 2


def test_process_0_stays_until_the_others_have_said_the_same(group: Callable[..., Group]) -> None:
    """JAX's service is in its child, and aborts all others when that ends."""
    two = group(2)
    fails = "from memphis_jax.errors import one_line\nwith one_line('test'): raise OSError('bad')"
    two.start(0, fails)
    there = f"os.kill(int(open('{two.folder}/pid0').read()), 0)"
    two.start(1, f"import time; time.sleep(3); {there}\n{fails}")
    assert [two.end(process) for process in range(2)] == [(1, "test: bad\n")] * 2


@pytest.mark.parametrize("aborts", ["os.abort()", "sys.exit(77)"])
def test_an_abort_that_another_caused_is_not_blamed(
    group: Callable[..., Group], aborts: str
) -> None:
    """JAX aborts where another process is lost, often before this one hears who it was."""
    two = group(2, heartbeat=5)
    two.start(
        0, f"import os, sys, time\nwhile not os.path.exists('{two.folder}/lost'): pass\n{aborts}"
    )
    two.start(1, SLEEP)
    two.child(0), two.child(1)
    two.guards[1].send_signal(signal.SIGSTOP)
    (two.folder / "lost").touch()
    code, said = two.end(0)
    assert code == 76
    assert re.search(r"process 1 of 2 \(.+\) was not heard of for 5 s", said)


def test_a_bug_of_one_ends_with_1(group: Callable[..., Group]) -> None:
    two = group(2, heartbeat=2)
    two.start(0, "import sys; sys.exit(77)")
    two.start(1, SLEEP)
    assert two.end(0)[0] == 1
    code, said = two.end(1)
    assert code == 76 and "process 0 of 2" in said and "exit code 77" in said


def test_sigterm_reaches_the_child(group: Callable[..., Group]) -> None:
    two = group(2)
    trap = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
    for process in range(2):
        two.start(process, trap + f"open('{two.folder}/ready{process}', 'w'); time.sleep(100)")
    for process in range(2):
        while not (two.folder / f"ready{process}").exists():
            time.sleep(0.05)
        two.guards[process].terminate()
    assert [two.end(process) for process in range(2)] == [(75, "")] * 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "10.0.0.2"},
            "JAX_COORDINATOR_ADDRESS = '10.0.0.2' is not HOST",
        ),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES = '' must be a whole number"),
        ({"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID = 'two' must be a whole number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID = 2 must be from 0 to"),
        ({"MEMPHIS_BARRIER_SECONDS": "5 min"}, "MEMPHIS_BARRIER_SECONDS = '5 min' must be a whole"),
    ],
)
def test_variables_that_describe_no_group(
    change: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in (good | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hosts.HostsError) as caught:
        hosts.from_environment()
    assert told in str(caught.value)


def test_alone_without_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    assert hosts.from_environment() is None


def _until(path: str) -> str:
    """Python that ends once there is such a file."""
    return f"import os, time\nwhile not os.path.exists({path!r}): time.sleep(0.05)"


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
