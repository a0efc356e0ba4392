"""The demo's seconds by kind of stage: of a new run, or of finished runs side by side.

python -m benchmarks demo                    runs configs/tiny.py in a temporary folder
python -m benchmarks demo WORKDIR WORKDIR    reads the ledgers of `memphis rounds`
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import harness

LIMIT = 300  # seconds, on two cores


def main(argv: list[str]) -> None:
    parser = harness.parser("demo", __doc__, repeats=1)
    parser.add_argument("workdirs", nargs="*", type=Path, help="of `memphis rounds`; none: run it")
    args = parser.parse_args(argv)
    if args.workdirs:
        harness.show([stage_table(args.workdirs)])
        return
    before = harness.machine()
    with tempfile.TemporaryDirectory() as work:
        workdirs = [Path(work) / f"run {number + 1}" for number in range(args.repeats)]
        wall = [run(workdir) for workdir in workdirs]
        tables = [
            stage_table(
                workdirs, f"Wall time: {harness.spread(wall)} s; at most {LIMIT} s wanted."
            ),
            accuracy_table(workdirs[0]),
        ]
    harness.finish(args, "demo", "The demo", before, tables)


def run(workdir: Path) -> float:
    """Seconds of the whole recipe as `make demo` starts it, with an empty compile cache."""
    command = [sys.executable, "-m", "memphis_jax", "rounds", "--config", "configs/tiny.py"]
    cache = workdir.with_name(f"{workdir.name} cache")
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return harness.seconds(
        lambda: subprocess.run(
            [*command, "--workdir", str(workdir)],
            check=True,
            cwd=harness.REPO,
            env=os.environ | environment,
        )
    )


def stage_table(workdirs: list[Path], note: str = "") -> dict[str, Any]:
    runs = [seconds_by_kind(workdir) for workdir in workdirs]
    kinds = dict.fromkeys(kind for one in runs for kind in one)
    rows = [[kind, *(_cell(one[kind]) for one in runs)] for kind in kinds]
    rows.append(["all stages", *(f"{sum(map(sum, one.values())):.0f} s" for one in runs)])
    columns = ("stage: how many, mean seconds, all", *(workdir.name for workdir in workdirs))
    return harness.table("Stages, each a process, one after another", columns, rows, note)


def _cell(seconds: list[float]) -> str:
    return (
        f"{len(seconds)} x {statistics.mean(seconds):.1f} = {sum(seconds):.0f} s" if seconds else ""
    )


def seconds_by_kind(workdir: Path) -> dict[str, list[float]]:
    """{kind of stage: seconds of each}, in the order in which kinds first ran."""
    paths = (workdir / "ledger").glob("*.json")
    records = sorted((json.loads(path.read_text()) for path in paths), key=lambda r: r["started"])
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        kind = re.sub(r"^(round\d+|sft)-", "", record["stage"])
        found[kind].append(record["seconds"])
    return found


def accuracy_table(workdir: Path) -> dict[str, Any]:
    """Held-out test accuracies that the run ended with."""
    results = json.loads((workdir / "results.json").read_text())
    names = {"test_greedy": "greedy", "test_sampled": "sampled", "valid_share": "valid"}
    phases = {"SFT": results["sft"]}
    phases |= {f"round {n}": one for n, one in enumerate(results["rounds"], start=1)}
    rows = [
        (phase, *(f"{100 * one[name]:.1f} %" for name in names)) for phase, one in phases.items()
    ]
    return harness.table("Its test accuracy, seed 0", ("after", *names.values()), rows)
