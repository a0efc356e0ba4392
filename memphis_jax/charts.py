"""The charts of report.html: rows of numbers in, titles with inline SVG out.

Imports matplotlib, numpy and markupsafe; nothing of ours and no jax. Each chart is drawn narrow
(about four inches), so that its text stays readable when CSS fits it to a phone.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in these colours (Okabe-Ito: safe for colour-blind readers), then replaced by the CSS
# variables of the same name, so that the charts follow the page into dark mode.
COLOURS = {
    "ink": "#202124",
    "faint": "#c9ccd0",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "yellow": "#e69f00",
    "grey": "#9aa0a6",
}
BLUE, ORANGE, GREY = COLOURS["blue"], COLOURS["orange"], COLOURS["grey"]
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["faint"],
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, in the page's font
}
# Name in pairs.json -> colour.
OUTCOMES = {"all_correct": "blue", "mixed": "yellow", "all_wrong": "orange", "no_valid": "grey"}
VERDICTS = {"correct": "blue", "incorrect": "orange", "invalid": "yellow", "unknown": "grey"}
SFT_PANELS = {
    "Loss and cross entropy": ("loss", "ce"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
RANK_PANELS = {
    "Loss": ("loss",),
    "Cross entropy of the ground truth, per token": ("ce",),
    "Ranking loss, per group": ("rank_loss",),
    "Margin, chosen − rejected, per token": ("rank_margin",),  # noqa: RUF001
    "Log-probability per token": ("chosen_logprob", "rejected_logprob"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
HISTOGRAM_BINS = 30

Row = Mapping[str, Any]
Chart = tuple[str, Markup]  # title, <svg>


def _svg(title: str, draw: Callable[[Axes], object], width: float, height: float) -> Markup:
    """An <svg> element of what `draw` puts on the axes; width and height in inches."""
    out = io.StringIO()
    # The salt keeps ids apart between charts and the same from run to run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    for name, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{name})")
    return Markup(svg)


def _lines_with_errors(
    title: str,
    labels: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    limits: tuple[float, float],
) -> Markup:
    """Up to two named lines over `labels`, a (percent, standard error) per label; NaN = gap."""

    def draw(axes: Axes) -> None:
        looks = ((BLUE, "o", -0.04), (ORANGE, "s", 0.04))
        for (name, cells), (colour, marker, shift) in zip(lines.items(), looks, strict=False):
            y, error = np.array(cells).T
            x = np.arange(len(y)) + shift  # so that equal values do not hide each other
            axes.errorbar(
                x, y, error, label=name, color=colour, marker=marker, markersize=3.5, elinewidth=0.8
            )
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.3, len(labels) - 0.7)
        axes.set_ylim(*limits)
        axes.set_ylabel("correct, %")
        axes.legend(loc="best")

    return _svg(title, draw, 4.4, 2.5)


def _curves(title: str, names: Sequence[str], runs: Mapping[str, Sequence[Row]]) -> Markup:
    """Up to two metrics over steps. Several runs stand end to end, each under its label."""

    def draw(axes: Axes) -> None:
        start = 0.0
        for label, rows in runs.items():
            steps = [start + row["step"] for row in rows]
            for name, colour in zip(names, (BLUE, ORANGE), strict=False):
                values = [math.nan if row.get(name) is None else row[name] for row in rows]
                axes.plot(steps, values, color=colour, marker=".", markersize=2.5)
            if start:
                axes.axvline(start, color=GREY, linewidth=0.8)
            if len(runs) > 1:
                place = axes.get_xaxis_transform()
                axes.text((start + steps[-1]) / 2, 1.02, label, transform=place, ha="center")
            start = steps[-1]
        if "rank_margin" in names:
            axes.axhline(0, color=GREY, linewidth=0.8)
        if len(names) > 1:
            axes.legend([name.replace("_logprob", "") for name in names])
        axes.set_xlabel("step")
        # "2e-06" at each tick: a common factor above the axis would meet the labels of the runs.
        axes.yaxis.set_major_formatter("{x:g}")

    return _svg(title, draw, 3.5, 2.1)


def _stacked_bars(
    title: str, labels: Sequence[str], parts: Mapping[str, tuple[str, Sequence[float]]]
) -> Markup:
    """One horizontal bar per label; parts: name -> (colour, values), as shares of the bar's sum."""

    def draw(axes: Axes) -> None:
        total = np.maximum(np.sum([values for _, values in parts.values()], axis=0), 1)
        left = np.zeros(len(labels))
        for name, (colour, values) in parts.items():
            width = 100 * np.array(values) / total
            axes.barh(labels, width, 0.62, left, label=name, color=COLOURS[colour])
            left += width
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        axes.figure.legend(
            loc="outside upper center", ncols=len(parts), handlelength=1, columnspacing=1
        )

    return _svg(title, draw, 4.4, 0.9 + 0.25 * len(labels))


def _histogram(title: str, unit: str, values: Mapping[str, Sequence[float]]) -> Markup:
    """Shares of each named list of whole numbers over common bins; later lists are stronger."""

    def draw(axes: Axes) -> None:
        top = max(max(numbers) for numbers in values.values())
        edges = np.arange(0, top + 1 + (width := max(1, math.ceil(top / HISTOGRAM_BINS))), width)
        for place, (name, numbers) in enumerate(values.items(), start=1):
            share = 100 * np.histogram(numbers, edges)[0] / len(numbers)
            strength = 0.25 + 0.75 * place / len(values)
            axes.stairs(share, edges, color=BLUE, alpha=strength, linewidth=1.2, label=name)
        axes.set_xlabel(unit)
        axes.set_ylabel("share, %")
        axes.legend()

    return _svg(title, draw, 4.4, 2.5)


def _lines(
    title: str, unit: str, labels: Sequence[str], values: Mapping[str, Sequence[float]]
) -> Markup:
    """Up to two named lines of positive numbers over `labels`, from 0 up."""

    def draw(axes: Axes) -> None:
        for (name, y), colour, marker in zip(values.items(), (BLUE, ORANGE), "os", strict=False):
            axes.plot(y, color=colour, marker=marker, markersize=3.5, label=name)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.3, len(labels) - 0.7)
        axes.set_ylim(0, 1.2 * max(max(y) for y in values.values()) or 1)
        axes.set_ylabel(unit)
        axes.legend()

    return _svg(title, draw, 4.4, 2.5)


def accuracy_charts(evals: Sequence[Row]) -> list[Chart]:
    """Validation and test on one scale; evals: {label, cells: {name: (percent, error) or None}}."""
    known = [cell for row in evals for cell in row["cells"].values() if cell]
    if not known:
        return []
    low = max(0.0, min(value - 2 * error for value, error in known) - 2)
    high = min(100.0, max(value + 2 * error for value, error in known) + 2)
    made = []
    for split in ("validation", "test"):
        cells = {
            kind: [row["cells"][f"{split}_{kind}"] or (math.nan, math.nan) for row in evals]
            for kind in ("greedy", "sampled")
        }
        title = f"Accuracy, {split} questions"
        labels = [row["label"] for row in evals]
        made.append((title, _lines_with_errors(title, labels, cells, (low, high))))
    return made


def curve_charts(
    phase: str, panels: Mapping[str, Sequence[str]], runs: Mapping[str, Sequence[Row]]
) -> list[Chart]:
    """One chart per panel {title: metric names} over the metrics of each run {label: rows}."""
    runs = {label: rows for label, rows in runs.items() if rows}
    if not runs:
        return []
    # The phase keeps the ids in two charts of one title apart.
    return [(title, _curves(f"{phase}: {title}", names, runs)) for title, names in panels.items()]


def yield_charts(rounds: Sequence[Row]) -> list[Chart]:
    """What became of the questions and of the samples; rounds: {label, stats, verdicts}."""
    rounds = [row for row in rounds if row["stats"]]
    if not rounds:
        return []
    made = []
    for title, field, colours in (
        ("Questions by the outcome of their samples", "stats", OUTCOMES),
        ("Samples by verdict", "verdicts", VERDICTS),
    ):
        parts = {
            name.replace("_", " "): (colour, [row[field].get(name, 0) for row in rounds])
            for name, colour in colours.items()
        }
        made.append((title, _stacked_bars(title, [row["label"] for row in rounds], parts)))
    return made


def length_charts(rounds: Sequence[Row]) -> list[Chart]:
    """Tokens of all samples, characters of pairs; rounds: {label, tokens, chosen, rejected}."""
    made = []
    tokens = {row["label"]: row["tokens"] for row in rounds if row["tokens"]}
    if tokens:
        title = "Length of the sampled training answers"
        made.append((title, _histogram(title, "tokens", tokens)))
    rounds = [row for row in rounds if row["chosen"] is not None]
    if rounds:
        title = "Mean length of chosen and rejected"
        means = {name: [row[name] for row in rounds] for name in ("chosen", "rejected")}
        made.append((title, _lines(title, "characters", [row["label"] for row in rounds], means)))
    return made


Tradeoff = Mapping[str, Sequence[tuple[float, float, float]]]  # task -> (t, percent, error)


def _draw_tradeoff(axes: Axes, tasks: Tradeoff) -> None:
    colours = [COLOURS[name] for name in ("blue", "orange", "green", "yellow")]
    for number, (task, points) in enumerate(tasks.items()):
        t, percent, error = np.array(points).T
        colour, marker = colours[number % 4], "osD^"[number % 4]
        axes.errorbar(
            t,
            percent,
            error,
            label=task,
            color=colour,
            marker=marker,
            markersize=3.5,
            elinewidth=0.8,
        )
    axes.set_xlabel("t: 0 = the start, 1 = the finetuned model")
    axes.set_ylabel("correct, %")
    axes.set_ylim(-2, 102)
    axes.legend(loc="best")


def tradeoff_charts(tasks: Tradeoff) -> list[Chart]:
    """What each skill keeps at every t of a merge, with standard errors."""
    if not tasks:
        return []
    title = "Accuracy on held-out questions by t"
    return [(title, _svg(title, lambda axes: _draw_tradeoff(axes, tasks), 4.4, 2.5))]


def save_tradeoff(tasks: Tradeoff, path: Path) -> list[Path]:
    """The same chart as files: PATH.png and PATH.svg, in colours of their own."""
    paths = [path.with_name(f"{path.name}.{form}") for form in ("png", "svg")]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.name}):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        _draw_tradeoff(figure.subplots(), tasks)
        figure.savefig(paths[0], dpi=200)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
