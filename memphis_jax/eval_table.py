"""The results of `memphis eval` as a table, beside what the Memphis cards state. No jax."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

# In percent, as the cards' tables state them at these commits:
# euclaise/Memphis-CoT-3B @4123bc3, euclaise/Memphis-scribe-3B @7ee2243 (which has no BBH score).
CARDS = {
    "gsm8k": {"base": 2.05, "CoT": 18.8, "scribe": 9.55},
    "agieval_nous": {"base": 25.14, "CoT": 27.22, "scribe": 24.78},
    "bbh_cot_fewshot": {"base": 36.75, "CoT": 36.92},
}
CARD_METRICS = ("exact_match,strict-match", "acc_norm,none", "exact_match,get-answer")
MODELS = ("base", "CoT", "scribe")
# Words in the names of lm-eval's metrics that are no shares of 1.
NO_SHARES = {"perplexity", "byte", "likelihood", "loglikelihood", "bleu", "chrf", "ter"}


def show(result: Row, console: Console | None = None) -> None:
    """Prints every metric of every task and group, shares in percent, with standard errors."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=120))
    carded = bool(CARDS.keys() & result["tasks"].keys())
    limit = f", first {result['limit']} questions of each task" if result["limit"] else ""
    lm_eval = result["versions"]["lm_eval"]
    table = Table(title=f"{result['engine']}, {result['dtype']}, lm-eval {lm_eval}{limit}")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("shots", "questions", "%", *(MODELS if carded else ())):
        table.add_column(name, justify="right")
    notes: dict[str, list[str]] = {}
    for name, task in result["tasks"].items():
        for key, score in task["metrics"].items():
            shown = CARDS.get(name, {}) if key in CARD_METRICS else {}
            cells = [f"{shown[model]:g}" if model in shown else "" for model in MODELS]
            table.add_row(
                *(name, key.removesuffix(",none"), _text(task["num_fewshot"])),
                *(_text(task["questions"]), _value(key, score), *(cells if carded else [])),
            )
        if task.get("note"):
            notes.setdefault(task["note"], []).append(name)
    console.print(table)
    for note, tasks in notes.items():
        console.print(f"{', '.join(tasks)}: {note}.", markup=False)
    if carded:
        console.print(
            "base, CoT, scribe: what the cards state of StableLM-3B-4e1t, Memphis-CoT-3B and "
            "Memphis-scribe-3B, by the lm-eval of January 2024, whose prompts, answer filters and "
            "number of BBH examples may differ.",
            markup=False,
        )


def _value(metric: str, score: Row) -> str:
    """ "12.30 ± 0.90" of {value, stderr} in percent; "17.2 (no %)" where the metric is no share."""
    share = not NO_SHARES.intersection(metric.partition(",")[0].split("_"))
    scale = 100 if share else 1
    error = "" if score["stderr"] is None else f" ± {scale * score['stderr']:.2f}"
    return f"{scale * score['value']:.2f}{error}" + ("" if share else " (no %)")


def _text(value: Any) -> str:
    return "" if value is None else str(value)
