"""Mean seconds of each kind of stage of finished recipes, side by side, from their ledgers."""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks stages", description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, help="of `memphis rounds`")
    args = parser.parse_args(argv)
    runs = [seconds_by_kind(workdir) for workdir in args.workdirs]
    table = Table(title="seconds of one stage (how many there were)")
    for header in ("stage", *(workdir.name for workdir in args.workdirs)):
        table.add_column(header, justify="left" if header == "stage" else "right")
    for kind in dict.fromkeys(kind for run in runs for kind in run):
        table.add_row(kind, *(_cell(run[kind]) for run in runs))
    totals = (sum(map(sum, run.values())) for run in runs)
    table.add_row("in all", *(f"{total:.0f}" for total in totals))
    Console().print(table)


def _cell(seconds: list[float]) -> str:
    return f"{sum(seconds) / len(seconds):.1f} ({len(seconds)})" if seconds else ""


def seconds_by_kind(workdir: Path) -> dict[str, list[float]]:
    """{kind of stage: seconds of each}, in the order in which kinds first ran."""
    paths = (workdir / "ledger").glob("*.json")
    records = sorted((json.loads(path.read_text()) for path in paths), key=lambda r: r["started"])
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        kind = re.sub(r"^(round\d+|sft)-", "", record["stage"])
        found[kind].append(record["seconds"])
    return found
