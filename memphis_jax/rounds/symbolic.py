"""Whether two formulas are equal, by math-verify in a process that can be killed.

sympy can run for ever or fill the memory on a short text, and math-verify's own time limit is a
signal, which only a main thread can take and a loop in C does not hear. Here `SymbolicEqual` asks
a worker, which is this same file run as a script, and kills it at the limit. Imports nothing of
ours and no jax; math-verify is loaded in the worker only.
"""

import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

START_SECONDS = 120.0  # the imports alone take 2 s, on a busy machine far longer
WALL = 4.0  # wall seconds per CPU second of the limit: two busy cores must not change a verdict

# What surely ends in a time-out is not worth one: a power in an exponent, a huge exponent, long
# numbers and factorials. The rest, (x^99)^99 too, is left to the limits.
_EXPENSIVE = re.compile(
    r"(?:\^|\*\*)\s*(?:\{[^{}]*\}?|\([^()]*\)?|-?(?:[0-9.]+|\\?[A-Za-z]))\s*(?:\^|\*\*)"
    r"|(?:\^|\*\*)[\s({]*-?[0-9]{4}"
    r"|[0-9]{40}|[0-9]{3}\s*!|[!)}]\s*!"
)
_LONGEST = 300  # characters
_ROUNDED = 0.01  # a decimal this near to a closed form may be meant as it


class SymbolicEqual:
    """`equal(a, b)` for formulas in LaTeX without dollar signs, or plain; from any thread.

    A context manager. The worker starts with the first formula, is killed at a limit and started
    again with the next one; it ends with this process, however that ends. Answers are remembered,
    given-up ones too. `timeouts` counts the comparisons that were given up.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 2**30):
        """Limits for one comparison: CPU seconds of the worker, and bytes of its address space.

        Should it hang, WALL times the seconds on the clock end it.
        """
        self.timeouts = 0
        self._seconds, self._memory = seconds, memory
        self._known: dict[tuple[str, str], bool | TimeoutError | None] = {}
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, a: str, b: str) -> bool | None:
        """Whether the ground truth a and the answer b are equal; None where that is not clear.

        Not clear: either cannot be read or is too expensive to touch, or math-verify's
        verdict is not borne out by putting in numbers. Raises TimeoutError where the
        worker had to be given up (out of time or memory).
        """
        if any(len(text) > _LONGEST or _EXPENSIVE.search(text) for text in (a, b)):
            return None
        with self._lock:
            if (a, b) not in self._known:
                self._known[a, b] = self._ask(a, b)
            known = self._known[a, b]
        if isinstance(known, TimeoutError):
            raise TimeoutError(*known.args)
        return known

    def _ask(self, a: str, b: str) -> bool | TimeoutError | None:
        worker = self._worker
        if worker is None or worker.poll() is not None:  # none yet, or ended from outside
            worker = self._start()
        try:
            worker.stdin.write(json.dumps([a, b]).encode() + b"\n")  # type: ignore[union-attr]
            answer = _read(worker, WALL * self._seconds)
        except OSError:  # it ended this very moment
            answer = b""
        if answer:
            return json.loads(answer)
        self.close()
        self.timeouts += 1
        limits = f"{self._seconds:g} s of CPU time or out of memory"
        return TimeoutError(f"gave up on {a!r} = {b!r} after {limits}")

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        # -P: the folder of this file, with its files.py and commands.py, stays off the path
        command = [sys.executable, "-P", str(Path(__file__)), str(self._seconds), str(self._memory)]
        pipe = subprocess.PIPE
        self._worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)
        if not _read(self._worker, START_SECONDS):
            self.close()
            raise RuntimeError(
                "the process that compares formulas did not start: is math-verify installed?"
            )
        return self._worker

    def close(self) -> None:
        """End the worker; a later comparison starts another."""
        if self._worker:
            self._worker.kill()
            self._worker.communicate()  # closes the pipes and waits
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read(worker: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The worker's next line; nothing at the time limit or if it has ended."""
    assert worker.stdout
    ready = select.poll()  # unlike select.select, for any file descriptor number
    ready.register(worker.stdout, select.POLLIN)
    return os.read(worker.stdout.fileno(), 64) if ready.poll(1000 * seconds) else b""


# --- in the worker ----------------------------------------------------------------------------


def _serve(seconds: float, memory: int) -> None:
    """Answer each line [a, b] on standard input with true, false or null."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import math_verify  # noqa: F401  not on the clock of the first comparison

    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a library prints is no answer
    os.dup2(nowhere, 2)
    os.write(answers, b"ready\n")
    for line in sys.stdin.buffer:  # ends with the parent
        # The kernel ends this process at either limit, be it in a loop in C; the second, which is
        # later than the parent's, is for a parent that died in between.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL * seconds + 1)
        try:
            answer = _equal(*json.loads(line))
        except MemoryError:
            return  # who knows what is left in which state
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _equal(a: str, b: str) -> bool | None:
    """What `SymbolicEqual` answers, without limits."""
    from math_verify import LatexExtractionConfig, parse, verify

    # unescaped names would be read as products of letters
    latex = [re.sub(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln)\b", r"\\\1", t) for t in (a, b)]
    try:
        gold, given = (
            parse(
                f"${text}$",
                [LatexExtractionConfig()],
                fallback_mode="no_fallback",
                parsing_timeout=None,
                raise_on_error=True,
            )
            for text in latex
        )
        if not gold or not given:
            return None
        same = verify(gold, given, timeout_seconds=None, raise_on_error=True)
        pairs = [(x, y) for x in gold for y in given]
        # math-verify says no where it found no proof or met an error on the way, a lack of memory
        # too, and yes to rounded numbers and to any two equations without a real solution: either
        # becomes training data only where numbers bear it out.
        if same:
            return True if any(_agree(x, y) for x, y in pairs) else None
        return False if all(_differ(x, y) for x, y in pairs) else None
    except MemoryError:
        raise
    except Exception:  # sympy raises anything
        return None


def _differ(a: Any, b: Any) -> bool:
    """Whether numbers show that two sympy objects are not equal, nor b a rounded a."""
    import sympy  # type: ignore[import-untyped]
    from sympy.core.relational import Relational  # type: ignore[import-untyped]

    row = (sympy.Tuple, sympy.Interval)
    if isinstance(a, row) and isinstance(b, row):  # (3, 4) reads as an interval, (4, 3) as a pair
        xs, ys = ((x.start, x.end) if isinstance(x, sympy.Interval) else tuple(x) for x in (a, b))
        if type(a) is type(b) is sympy.Interval and a.args[2:] != b.args[2:]:
            return True  # other ends are open
        return len(xs) != len(ys) or any(_differ(x, y) for x, y in zip(xs, ys, strict=True))
    if isinstance(a, sympy.FiniteSet) or isinstance(b, sympy.FiniteSet):
        xs, ys = (x if isinstance(x, sympy.FiniteSet) else (x,) for x in (a, b))
        return any(all(_differ(x, y) for y in ys) for x in xs) or any(
            all(_differ(x, y) for x in xs) for y in ys
        )
    if isinstance(a, Relational) and isinstance(b, Relational):
        a, b = a.canonical, b.canonical  # 3 > x is x < 3
        return a.lhs == b.lhs and a.lhs.is_Symbol and (a.func != b.func or _differ(a.rhs, b.rhs))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape != b.shape or any(_differ(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        # a pair is no number; but x = 2 may be the answer 2
        kinds = (*row, sympy.Expr, sympy.MatrixBase)
        return isinstance(a, kinds) and isinstance(b, kinds)
    x, y = _values(1009, a, b)
    if b.has(sympy.Float) and not a.has(sympy.Float):  # 6.28 for 2 pi: rounded, a person may say
        return _apart(x, y, _ROUNDED)
    return _apart(x, y)


def _agree(a: Any, b: Any) -> bool:
    """Whether numbers bear out that two sympy objects are equal."""
    from sympy.core.relational import Relational  # type: ignore[import-untyped]

    if isinstance(a, Relational) and isinstance(b, Relational):  # one is a multiple of the other
        sides = (a.lhs - a.rhs, b.lhs - b.rhs)
        (left, right), (left2, right2) = _values(1009, *sides), _values(1741, *sides)
        return not _apart(left * right2, left2 * right)
    return not _differ(a, _exact(b))  # a rounded number does not differ, nor does it agree


def _exact(b: Any) -> Any:
    import sympy

    return b.xreplace({number: sympy.Rational(number) for number in b.atoms(sympy.Float)})


def _values(start: int, *expressions: Any) -> list[complex]:
    """Expressions where their symbols have positive values: is sqrt(x^2) x? A person may say."""
    import sympy

    symbols = sorted(set().union(*(x.free_symbols for x in expressions)), key=str)
    # no halves and thirds, about which x^2 - x would be symmetric
    point = {x: sympy.Rational(start + 331 * i, 733 + 97 * i) for i, x in enumerate(symbols)}
    return [complex(expression.subs(point).evalf(20)) for expression in expressions]


def _apart(a: complex, b: complex, tolerance: float = 1e-9) -> bool:
    return abs(a - b) > tolerance * max(1.0, abs(a), abs(b))


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
