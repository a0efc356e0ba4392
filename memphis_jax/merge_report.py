"""What a merge did, in numbers: the head of merge.json. No jax."""

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from memphis_jax import config as configs
from memphis_jax.tensors import Tensor

Row = dict[str, Any]


def summary(rows: dict[str, Row], tensors: dict[str, Tensor], how: configs.MergeConfig) -> Row:
    """The head of the report.

    {method, t, t_for, threshold, num_tensors, num_elements, branches, linear_because, angle}.
    branches: {branch: {tensors, elements}}; linear_because: the same of SLERP's linear branch by
    reason; angle, in degrees: {least, median, most} over the tensors.
    """

    def counts(key: str, chosen: Iterable[str]) -> Row:
        found, elements = Counter[str](), Counter[str]()
        for name in chosen:
            found[rows[name][key]] += 1
            elements[rows[name][key]] += tensors[name].size
        return {k: {"tensors": found[k], "elements": elements[k]} for k in sorted(found)}

    angles = [row["angle"] for row in rows.values()]
    fallen = [name for name, row in rows.items() if row["branch"] == "linear" and row["why"]]
    return {
        "method": how.method,
        "t": how.t,
        "t_for": list(how.t_for),
        "threshold": how.threshold,
        "num_tensors": len(rows),
        "num_elements": sum(tensor.size for tensor in tensors.values()),
        "branches": counts("branch", rows),
        "linear_because": counts("why", fallen),
        "angle": {
            "least": min(angles),
            "median": statistics.median(angles),
            "most": max(angles),
        },
    }


def describe(report: Row) -> str:
    """The head of a report in one line."""
    every, tensors = report["num_elements"], report["num_tensors"]

    def shares(counts: Row) -> str:
        return ", ".join(
            f"{name}: {count['tensors']} of {tensors} tensors, "
            f"{100 * count['elements'] / every:.1f} % of the numbers"
            for name, count in counts.items()
        )

    angle = report["angle"]
    why = report["linear_because"]
    because = f" (SLERP fell back to linear: {shares(why)})" if why else ""
    return (
        f"{report['method']}, t = {report['t']}; {shares(report['branches'])}{because}; angles "
        f"{angle['least']:.2f} to {angle['most']:.2f} degrees, median {angle['median']:.2f}"
    )
