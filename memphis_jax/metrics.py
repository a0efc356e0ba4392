"""Where a training run tells how it goes: metrics.jsonl, TensorBoard, and the terminal. No jax."""

import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsWriter:
    """Writes one row per call; a context manager.

    Rows after `resume_step` left by an interrupted run are removed first, so that
    metrics.jsonl holds each step once, however often the run was stopped.
    """

    def __init__(self, workdir: Path, *, resume_step: int, num_steps: int, label: str):
        path = workdir / "metrics.jsonl"
        kept = [row for row in _complete_rows(path) if row["step"] <= resume_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        self._board = _board(workdir / "tensorboard", purge_step=resume_step + 1)
        self._num_steps, self._label = num_steps, label
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            numbers = TextColumn("{task.fields[numbers]}")
            self._bar = Progress(*columns, TimeRemainingColumn(), numbers, console=console)
            self._task = self._bar.add_task(
                label, total=num_steps, completed=resume_step, numbers=""
            )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        self._board.close()
        self._file.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": step, **dict.fromkeys(values), **finite}  # JSON has no NaN: null
        self._file.write(json.dumps(row) + "\n")
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        shown = ("loss", "rank_margin", "learning_rate", "tokens_per_second", "mfu")
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            print(f"{self._label} {step}/{self._num_steps}  {numbers}", file=sys.stderr, flush=True)


def _board(folder: Path, purge_step: int) -> Any:
    """tensorboardX's writer; it would import torch where that is installed: a second or two."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=purge_step)


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose last line a killed process may have left half written."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
