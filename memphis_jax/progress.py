"""A line of progress for long work: live on a terminal, in a log now and then. No jax."""

import sys
import time

PAUSE = 30.0  # seconds after which a log hears of it, tenth or not


class Progress:
    """Rows done of `total`, new tokens per second and time left, on standard error."""

    def __init__(self, total: int, label: str = "sampled"):
        self._total, self._label = total, label
        self._rows, self._tokens, self._shown = 0, 0, 0
        self._start = self._said = time.perf_counter()

    def add(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        terminal, ended = sys.stderr.isatty(), self._rows >= self._total
        now = time.perf_counter()
        due = self._rows - self._shown >= self._total / 10 or now - self._said >= PAUSE
        if not (terminal or ended or due):
            return
        self._shown, self._said = self._rows, now
        seconds = now - self._start
        left = seconds * (self._total / max(self._rows, 1) - 1)
        unit = "tokens" if self._tokens else "rows"
        speed = f"{(self._tokens or self._rows) / seconds:.{0 if self._tokens else 1}f} {unit}/s"
        line = f"{self._label} {self._rows}/{self._total}  {speed}"
        end = "\r" if terminal and not ended else "\n"
        print(f"{line}  {left:.0f} s left ", end=end, file=sys.stderr, flush=True)
