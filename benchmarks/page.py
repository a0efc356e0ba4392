"""docs/performance.md from docs/performance/: NAME.json (or NAME-PART.json), NAME.md beneath."""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import REPO, RESULTS

# The order of the page.
NAMES = [
    *("train", "rank", "memory", "sampler", "convert", "merge", "startup", "demo", "scaling"),
    "gpu",
]
HEAD = """# Performance

Every table on this page was printed by the command above it. Programs that are compared ran in
the same command, in turns; a cell shows the median (least-most). "ready" is the time from the
start of a process until it is compiled and warm. The text beneath the tables says where we lose
and what profiling found. `python -m benchmarks page` makes this page of
[performance/](performance).
"""


def main(argv: list[str]) -> None:
    (REPO / "docs" / "performance.md").write_text(page(RESULTS))


def page(folder: Path) -> str:
    """The whole page; benchmarks without a result are named at its end."""
    parts, absent = [HEAD], []
    for name in NAMES:
        results = sorted(folder.glob(f"{name}*.json"))
        heading = ""
        for path in results:
            result = json.loads(path.read_text())
            if result["about"] != heading:  # the parts of one benchmark share a heading
                heading = result["about"]
                parts.append(f"## {heading}\n")
            parts.append(section(result))
        if not results:
            absent.append(name)
        if (folder / f"{name}.md").is_file():
            parts.append((folder / f"{name}.md").read_text())
    if absent:
        parts.append(f"Never run here: {', '.join(absent)}.\n")
    return "\n".join(parts)


def section(result: dict[str, Any]) -> str:
    at = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in at["versions"].items() if v != "not installed")
    lines = [
        f"    {result['command']}",
        "",
        f"{at['processor']}, {at['cores']} cores, {at['memory_gb']} GB, load "
        f"{at['load_at_start']} at start; {versions}; commit {at['commit']}, {at['date']}.",
    ]
    for table in result["tables"]:
        lines += ["", f"**{table['title']}**", ""]
        lines.append("| " + " | ".join(table["columns"]) + " |")
        lines.append("|---" + "|---:" * (len(table["columns"]) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in table["rows"]]
        if table["note"]:
            lines += ["", table["note"]]
    return "\n".join(lines) + "\n"
