"""A line of progress for long sampling: live on a terminal, a line per tenth elsewhere. No jax."""

import sys
import time


class Progress:
    """Rows done of `total`, new tokens per second and time left, on standard error."""

    def __init__(self, total: int, label: str = "sampled"):
        self._total, self._label = total, label
        self._rows, self._tokens, self._shown = 0, 0, 0
        self._start = time.perf_counter()

    def add(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        terminal, ended = sys.stderr.isatty(), self._rows >= self._total
        if not (terminal or ended) and self._rows - self._shown < self._total / 10:
            return
        self._shown = self._rows
        seconds = time.perf_counter() - self._start
        left = seconds * (self._total / max(self._rows, 1) - 1)
        line = f"{self._label} {self._rows}/{self._total}  {self._tokens / seconds:.0f} tokens/s"
        end = "\r" if terminal and not ended else "\n"
        print(f"{line}  {left:.0f} s left ", end=end, file=sys.stderr, flush=True)
