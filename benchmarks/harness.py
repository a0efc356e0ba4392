"""What all benchmarks share: turns, medians, the machine, and a result that prints and keeps.

A result is JSON: {name, about, command, machine, tables}; a table is {title, columns, rows, note}
with rows of ready text. The console and docs/performance.md (`benchmarks.page`) show the same.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memphis_jax.versions import versions

REPO = Path(__file__).parents[1]
RESULTS = REPO / "docs" / "performance"  # NAME.json, and NAME.md with what was found and tried
Row = Sequence[str]


def parser(name: str, about: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    made.add_argument("--repeats", type=int, default=repeats, help="measured turns of each")
    made.add_argument("--json", type=Path, help="where the figures go (docs/performance/NAME.json)")
    return made


def take_turns(variants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """{name: what each of `repeats` calls returned}; every other round runs backwards.

    So a machine that slows down, or a neighbour that comes, meets all of them alike.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            found[name].append(variants[name]())
    return found


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def matmul_ceiling(product: Callable[[], Any], size: int) -> float:
    """FLOP/s of the best of five products [size, size] @ [size, size], after one unmeasured."""
    product()
    return 2.0 * size**3 / min(seconds(product) for _ in range(5))


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median, least and most: "1,200 (1,100-1,250)"."""
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)}-{format(max(values), form)})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ratio of two medians."""
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}"


class Served:
    """A process that measures once for every line it is sent; see `serve`.

    Peers keep to processes of their own: their thread pools and allocators must not meet.
    """

    def __init__(self, command: Sequence[object], env: Mapping[str, str] | None = None):
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), **(env or {})},
        )
        self.ready: dict[str, Any] = self._answer()  # what it said of itself, once warm
        self.ready_after = time.perf_counter() - begun

    def __call__(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        words = " ".join(map(str, self._process.args))  # type: ignore[arg-type]
        raise RuntimeError(f"`{words}` ended early (exit status {self._process.wait()})")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def served_turns(
    commands: Mapping[str, tuple[Sequence[object], Mapping[str, str]]], repeats: int
) -> tuple[dict[str, Served], dict[str, list[float]]]:
    """`take_turns` of processes, {name: (command, environment)}, that live as long as it lasts."""
    with ExitStack() as stack:
        served = {name: stack.enter_context(Served(*one)) for name, one in commands.items()}
        return served, take_turns(served, repeats)


def serve(measure: Callable[[], float], about: Mapping[str, Any] | None = None) -> None:
    """The other end of `Served`: says that it is ready, then measures for every line of stdin."""
    print("BENCH", json.dumps(about or {}), flush=True)
    for _ in sys.stdin:
        print("BENCH", json.dumps(measure()), flush=True)


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load, versions, commit, date."""
    text = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    git = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "processor": names[0].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9),
        "load_at_start": round(os.getloadavg()[0], 1),
        "versions": versions(("jax", "flax", "torch", "transformers")),
        "commit": commit or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(
    title: str, columns: Sequence[str], rows: Sequence[Row], note: str = ""
) -> dict[str, Any]:
    return {"title": title, "columns": list(columns), "rows": [*map(list, rows)], "note": note}


def finish(
    args: argparse.Namespace,
    name: str,
    about: str,
    before: dict[str, Any],
    tables: list[dict[str, Any]],
    **figures: Any,
) -> None:
    """Prints the tables and writes the result; `before` is `machine()` as it was at the start."""
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    result = {"name": name, "about": about, "command": command}
    result |= {"machine": before, "tables": tables, **figures}
    show(tables)
    path = args.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}; `python -m benchmarks page` renews docs/performance.md")


def show(tables: Sequence[Mapping[str, Any]]) -> None:
    for one in tables:
        drawn = Table(title=one["title"], caption=one["note"] or None)
        for number, column in enumerate(one["columns"]):
            drawn.add_column(column, justify="right" if number else "left")
        for row in one["rows"]:
            drawn.add_row(*row)
        Console(width=140).print(drawn)
