"""The charts of report.html: plain numbers in, inline SVG out.

Imports matplotlib, numpy and markupsafe; nothing of ours and no jax. Each chart is drawn narrow (about
four inches), so that its text stays readable when CSS fits it to a phone.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence

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
STACK = [COLOURS[name] for name in ("blue", "yellow", "orange", "grey")]
STYLE = {
    "font.size": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
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
HISTOGRAM_BINS = 30

Step = Mapping[str, float]


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


def lines_with_errors(
    title: str,
    labels: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    limits: tuple[float, float],
) -> Markup:
    """Up to two named lines over `labels`, each a (percent, standard error) per label; NaN = gap."""

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

    return _svg(title, draw, 4.2, 2.4)


def curves(title: str, names: Sequence[str], runs: Mapping[str, Sequence[Step]]) -> Markup:
    """Up to two metrics over steps. Several runs stand end to end, each labelled above its stretch."""

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

    return _svg(title, draw, 3.5, 2.1)


def stacked_bars(title: str, labels: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Markup:
    """One horizontal bar per label, split into up to four parts as shares of the bar's sum."""

    def draw(axes: Axes) -> None:
        total = np.maximum(np.sum(list(parts.values()), axis=0), 1)
        left = np.zeros(len(labels))
        for (name, values), colour in zip(parts.items(), STACK, strict=False):
            width = 100 * np.array(values) / total
            axes.barh(labels, width, 0.62, left, label=name, color=colour)
            left += width
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        axes.figure.legend(loc="outside upper center", ncols=4, handlelength=1, columnspacing=1)

    return _svg(title, draw, 4.2, 0.9 + 0.25 * len(labels))


def histogram(title: str, unit: str, values: Mapping[str, Sequence[float]]) -> Markup:
    """Shares of each named list of whole numbers over common bins; later lists are drawn stronger."""

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

    return _svg(title, draw, 4.2, 2.4)


def lines(
    title: str, unit: str, labels: Sequence[str], values: Mapping[str, Sequence[float]]
) -> Markup:
    """Up to two named lines over `labels`; NaN = gap."""

    def draw(axes: Axes) -> None:
        for (name, y), colour, marker in zip(values.items(), (BLUE, ORANGE), "os", strict=False):
            axes.plot(y, color=colour, marker=marker, markersize=3.5, label=name)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.3, len(labels) - 0.7)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.legend()

    return _svg(title, draw, 4.2, 2.4)
