"""The parts of the report page about a merge and about benchmarks. No jax.

Reads what `memphis scribe` and `memphis eval` leave in a workdir: results.json, eval/*-lm/ and
merged/hf/merge.json. A run without them has no such parts. Imports `charts` of ours, and the
readers of the model card.
"""

import re
import statistics
from pathlib import Path
from typing import Any

from memphis_jax import charts
from memphis_jax.merge_report import describe
from memphis_jax.model_card import harness_rows, read_json
from memphis_jax.rounds.sweep import points

Row = dict[str, Any]


def context(workdir: Path) -> Row:
    """Everything that report_merge.html.jinja names."""
    results = read_json(workdir / "results.json")
    models = results.get("models", {})
    merge = read_json(workdir / "merged" / "hf" / "merge.json")
    paths = sorted((workdir / "eval").glob("*-lm/results.json"))
    harness = [
        {**row, "model": path.parent.name.removesuffix("-lm")}
        for path in paths
        for row in harness_rows(read_json(path)["tasks"])
    ]
    return {
        "is_scribe": bool(models or merge),
        "models": models,
        "skills": [name for name in models.get("start", {}) if name != "eval"],
        "tradeoff_charts": charts.tradeoff_charts(points(results.get("sweep", []))),
        "best_t": results.get("best_t"),
        "merge": {**merge, "text": describe(merge), "kinds": kinds(merge)} if merge else {},
        "harness": harness,
    }


def headline(models: Row) -> str:
    """Every skill at the start, after finetuning and after the merge, in one sentence."""
    texts = []
    for skill in (name for name in models["start"] if name != "eval"):
        start, tuned, merged = (
            100 * models[name][skill]["test"]["accuracy"]
            for name in ("start", "finetuned", "merged")
        )
        texts.append(f"{skill} {start:.1f} % → {tuned:.1f} % finetuned → {merged:.1f} % merged")
    return f"Test accuracy: {'; '.join(texts)}."


def kinds(merge: Row) -> list[Row]:
    """A row per kind of tensor (its name without the layer), over all layers."""
    groups: dict[str, list[Row]] = {}
    for name, row in merge["tensors"].items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(row)
    table = []
    for name, rows in groups.items():
        angles = [row["angle"] for row in rows]
        moved = [row["distance"] / row["norm_a"] for row in rows if row["norm_a"]]
        branches = sorted(
            {row["branch"] + (f" ({row['why']})" if row["why"] else "") for row in rows}
        )
        ts = sorted({row["t"] for row in rows})
        table.append(
            {
                "name": name,
                "count": len(rows),
                "t": ", ".join(f"{t:g}" for t in ts),
                "least": min(angles),
                "median": statistics.median(angles),
                "most": max(angles),
                "moved": statistics.median(moved) if moved else None,
                "branches": ", ".join(branches),
            }
        )
    return table
