"""One self-contained HTML page per run: what was run, what came out, and the pairs to read.

Reads the files that the stages leave in a workdir (config.json, ledger/, eval/, metrics, pairs) and
writes report.html beside them: inline SVG, inline CSS, one small script, nothing loaded from
anywhere. A file that is not there yet leaves a gap which the page names, so a run that goes on has
a report too. Model output is data here: jinja escapes it, and the script only sets it as text.
Imports `charts`, `report_merge`, `report_files` and `model_card.read_json` of ours, and no jax.

    python -m memphis_jax.report WORKDIR
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from memphis_jax import charts, report_merge
from memphis_jax.model_card import read_json
from memphis_jax.report_files import (
    HELD,
    count_parameters,
    is_run,
    read_accuracies,
    read_ledger,
    read_lines,
    read_metrics,
    rounds_there,
)

Row = dict[str, Any]

MOST_PAIRS = 300  # per round
MOST_PAIR_BYTES = 1_000_000  # of all rounds together: keeps the page under 2 MB

ACCURACIES = ("validation_greedy", "validation_sampled", "test_greedy", "test_sampled")


def standard_error(share: float, count: int) -> float:
    """Binomial standard error sqrt(p (1 - p) / n) of a share `p` among `n` questions."""
    return math.sqrt(share * (1 - share) / count)


def headline(evals: Sequence[Row]) -> str:
    """The result in one sentence, from rows {label, test_greedy, ...} in order, SFT first."""
    measured = [row for row in evals if row.get("test_greedy") is not None]
    if not measured:
        return "No test accuracy has been measured yet."
    start, end = (100 * measured[i]["test_greedy"] for i in (0, -1))
    first = f"Test accuracy {start:.1f} % after {measured[0]['label']}"
    if len(measured) == 1:
        return f"{first}; no round has been measured yet."
    change = f"{end - start:+.1f} points, greedy decoding"
    return f"{first} → {end:.1f} % after {measured[-1]['label']} ({change})."


def _accuracy(row: Row, name: str) -> tuple[float, float] | None:
    """(accuracy, standard error) in percent, None where not measured."""
    share, count = row.get(name), row.get(f"{name.split('_')[0]}_questions")
    if share is None or not count:
        return None
    return 100 * share, 100 * standard_error(share, count)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _training(label: str, metrics: Sequence[Row]) -> Row:
    """What the last logged step says, with speed and padding over all of them."""

    def all_of(name: str) -> list[float]:
        return [row[name] for row in metrics if row.get(name) is not None]

    speeds = all_of("tokens_per_second")
    last = {"skipped_steps": None, "rank_loss": None, "rank_margin": None, **metrics[-1]}
    speed = {"tokens_per_second": statistics.median(speeds) if speeds else None}
    return {**last, "label": label, **speed, "padding_share": _mean(all_of("padding_share"))}


def time_table(ledger: Sequence[Row]) -> dict[str, dict[str, float]]:
    """{kind of stage: {phase: seconds}}, phases being "set-up", "SFT", "round 1" ...

    >>> time_table([{"stage": "data", "seconds": 2.0}, {"stage": "round1-rank", "seconds": 3.0}])
    {'data': {'set-up': 2.0}, 'rank': {'round 1': 3.0}}
    """
    table: dict[str, dict[str, float]] = {}
    for record in ledger:
        found = re.fullmatch(r"(sft|round)(\d*)(?:-(.+))?", record["stage"])
        phase, kind = "set-up", record["stage"]
        if found:
            phase = "SFT" if found[1] == "sft" else f"round {found[2]}"
            kind = found[3] or kind
        table.setdefault(kind, {})[phase] = record["seconds"]
    return table


def choose_pairs(pairs: Sequence[Row], most: int, most_bytes: int) -> list[Row]:
    """At most `most` of the pairs, evenly spread over the file, of about `most_bytes` as JSON."""
    size = sum(len(json.dumps(pair, ensure_ascii=False).encode(errors="replace")) for pair in pairs)
    count = min(len(pairs), most, len(pairs) * most_bytes // max(size, 1))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def _read_round(workdir: Path, number: int) -> Row:
    folder = workdir / f"round{number}"
    stats = read_json(folder / "pairs.json")
    graded = read_lines(folder / "graded.jsonl", {"num_tokens": int})
    pairs = read_lines(folder / "pairs.jsonl", {"chosen": str, "rejected": str})
    return {
        "label": f"round {number}",
        "stats": stats,
        "verdicts": stats.get("verdicts", stats),
        "audit": read_json(folder / "graded.audit.json"),
        "metrics": read_metrics(folder / "rank" / "metrics.jsonl"),
        "tokens": [row["num_tokens"] for row in graded],
        "mean_tokens": _mean([row["num_tokens"] for row in graded]),
        "truncated": _mean([row.get("finish_reason") == "length" for row in graded]),
        "pairs": pairs,
        "chosen": _mean([len(row["chosen"]) for row in pairs]),
        "rejected": _mean([len(row["rejected"]) for row in pairs]),
    }


def _flatten(values: Row, prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        leaf = [(prefix + name, value)]
        leaves += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else leaf
    return leaves


def _pair_browser(rounds: Sequence[Row]) -> list[Row]:
    rounds = [row for row in rounds if row["pairs"]]
    fields = ("id", "prompt", "chosen", "rejected", "gold")
    browser = []
    for row in rounds:
        shown = choose_pairs(row["pairs"], MOST_PAIRS, MOST_PAIR_BYTES // len(rounds))
        texts = [[str(pair.get(name, "")) for name in fields] for pair in shown]
        browser.append({"label": row["label"], "total": len(row["pairs"]), "pairs": texts})
    return browser


def _what_was_run(workdir: Path, config: Row, ledger: Sequence[Row]) -> Row:
    """Facts for the head of the page: name -> text, unknown ones left out."""
    words = [str(word) for record in ledger for word in record["command"]]
    names = [word for word in words if re.search(r"(^|/)configs/[^/]+\.py$", word)]
    parameters = count_parameters(workdir / "sft" / "hf")
    size = [f"{parameters:,} parameters"] if parameters else []
    shape = read_json(workdir / "sft" / "hf" / "config.json") or config.get("model", {})
    if shape:
        size.append(
            f"{shape['num_hidden_layers']} layers × {shape['hidden_size']} wide, "  # noqa: RUF001
            f"{shape['num_attention_heads']} heads, vocabulary {shape['vocab_size']:,}"
        )
    sampling = config.get("generate")
    texts = {
        "Config": names[0] if names else "",
        "Config hash": ledger[-1]["config_sha256"][:12] if ledger else "",
        "Seed": str(config.get("seed", "")),
        "Model": ", ".join(size),
        "Start": config.get("start", {}).get("hf_folder") or ("random weights" if config else ""),
        "Data": config.get("data", {}).get("source", ""),
        "Sampling": "{num_samples} answers per question, temperature {temperature}, "
        "top-p {top_p}, at most {max_new_tokens} tokens".format(**sampling)
        if sampling
        else "",
        "Started": ledger[0]["started"] if ledger else "",
        "Host": ", ".join(sorted({record["host"] for record in ledger})),
        "Versions": ", ".join(f"{k} {v}" for k, v in ledger[-1]["versions"].items())
        if ledger
        else "",
    }
    return {name: text for name, text in texts.items() if text}


def _duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _number(value: float | None, form: str) -> str:
    """`value` in a format such as ".2f" or ".1%"; a dash where there is none."""
    return "–" if value is None else format(value, form).replace("%", " %")  # noqa: RUF001


def _shorten(text: str, most: int) -> str:
    """`text`, or its begin and end with how much is left out between them."""
    if len(text) <= most:
        return text
    head, tail = text[: most * 2 // 3], text[-(most // 3) :]
    return f"{head} […] {tail}\n({len(text):,} characters, {len(head) + len(tail):,} shown)"


def _context(workdir: Path) -> Row:
    """Everything that the template names."""
    config = read_json(workdir / "config.json")
    ledger = read_ledger(workdir)
    planned = config.get("rounds", {}).get("num_rounds", 0)
    most = max([planned, *rounds_there(workdir)])
    rounds = [_read_round(workdir, number) for number in range(1, most + 1)]
    stages = [("sft", "SFT"), *((f"round{i}", row["label"]) for i, row in enumerate(rounds, 1))]
    evals = [
        {**values, "label": label, "cells": {name: _accuracy(values, name) for name in ACCURACIES}}
        for stage, label in stages
        if (values := read_accuracies(workdir / "eval" / f"{stage}.json", ACCURACIES))
    ]
    training = {"SFT": read_metrics(workdir / "sft" / "metrics.jsonl")}
    training |= {row["label"]: row["metrics"] for row in rounds}
    parts = report_merge.context(workdir)
    return {
        **parts,
        "name": workdir.resolve().name,
        "headline": report_merge.headline(parts["models"]) if parts["models"] else headline(evals),
        "finished": (workdir / "results.json").is_file(),
        "facts": _what_was_run(workdir, config, ledger),
        "ledger": ledger,
        "evals": evals,
        "accuracy_charts": list(charts.accuracy_charts(evals)),
        "training": [_training(label, rows) for label, rows in training.items() if rows],
        "sft_charts": charts.curve_charts("SFT", charts.SFT_PANELS, {"SFT": training.pop("SFT")}),
        "rank_charts": charts.curve_charts("Rank", charts.RANK_PANELS, training),
        "rounds": rounds,
        "yield_charts": list(charts.yield_charts(rounds)),
        "length_charts": list(charts.length_charts(rounds)),
        "times": time_table(ledger),
        "browser": _pair_browser(rounds),
        "config": _flatten(config),
        "OUTCOMES": list(charts.OUTCOMES),
        "VERDICTS": list(charts.VERDICTS),
    }


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html from what the stages have left there so far; returns its path."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters |= {"duration": _duration, "number": _number, "shell": shlex.join}
    environment.filters |= {"shorten": _shorten, "total": lambda cells: sum(cells.values())}
    page = environment.get_template("report.html.jinja").render(_context(workdir))
    path = workdir / "report.html"
    temporary = path.with_name("report.html.tmp")
    # A completion may hold half of a surrogate pair, which UTF-8 cannot.
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis report",
        description="Write WORKDIR/report.html and print its path: one page about a run, which "
        "loads nothing from anywhere: accuracies, loss curves, times, what the grader did, and "
        "pairs of each round to read.",
        epilog="Reads config.json, ledger/, eval/, results.json and, of sft/ and each roundN/, "
        "metrics.jsonl, graded.jsonl and pairs.jsonl. What is not there yet leaves a gap that the "
        "page names, so it can be written at any time of a run; `memphis rounds` and `memphis "
        "scribe` write it at their end. Changes nothing else.",
    )
    parser.add_argument(
        "workdir", type=Path, help="the --workdir of `memphis rounds` or `memphis scribe`"
    )
    workdir = parser.parse_args(argv).workdir
    if not workdir.is_dir():
        parser.error(f"{workdir} is not a folder: give the --workdir of a run")
    if not is_run(workdir):
        parser.error(f"{workdir} is not of a run, whose folder holds {HELD}: give its --workdir")
    print(write_report(workdir))


if __name__ == "__main__":
    main()
