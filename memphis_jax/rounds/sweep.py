"""What a merge is worth: greedy accuracies of models on questions, and those of several t. No jax.

    HF folders A, B -> per t: merge [-> checkpoint] -> answers -> grades [, memphis eval] -> scores

Every step is a stage of a ledger, so a sweep that was stopped goes on where it was. `memphis merge
--sweep` runs one on two folders, `memphis scribe` as a part of its recipe.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memphis_jax import config as configs
from memphis_jax.rounds.files import read_completions, read_jsonl, write_json, write_jsonl
from memphis_jax.rounds.ledger import locked
from memphis_jax.rounds.recipe import CONVERT, MEMPHIS, Recipe
from memphis_jax.rounds.run import claim

Row = dict[str, Any]
Tasks = Mapping[str, Mapping[str, Path]]  # task -> split -> questions.jsonl

CHART = "sweep"  # sweep.png and sweep.svg


def merge_stage(
    recipe: Recipe,
    name: str,
    a: Path,
    b: Path,
    how: configs.MergeConfig,
    options: Sequence[Any] = (),
) -> Path:
    """Merges into WORKDIR/NAME/hf; returns the model as a checkpoint, WORKDIR/NAME/init.

    options: further words of `memphis merge`. vLLM samples from the HF folder, so there is no
    checkpoint to make for it.
    """
    out, init = recipe.workdir / name / "hf", recipe.workdir / name / "init"
    at = ("--method", how.method, "--t", how.t, "--threshold", how.threshold)
    own = (word for text in how.t_for for word in ("--t-for", text))
    command = (*MEMPHIS, "merge", a, b, "--out", out, *at, *own, *options)
    recipe.stage(f"{name}-merge", command, [a, b], [out])
    recipe.exported[init] = out
    if recipe.config.generate.engine == "jax":
        recipe.stage(f"{name}-init", (*CONVERT, "from-hf", out, init), [out], [init])
    return init


def score(recipe: Recipe, name: str, checkpoint: Path, tasks: Tasks) -> Row:
    """{task: {split: {accuracy, questions, standard_error}}} of greedy answers.

    What `config.merge.eval_tasks` names is scored by `memphis eval` and stands under "eval".
    """
    scores: Row = {}
    if tasks:
        questions = [path for splits in tasks.values() for path in splits.values()]
        out = recipe.workdir / "eval" / name
        completions = recipe.sample(
            f"{name}-answers",
            checkpoint,
            questions,
            out,
            num_samples=1,
            temperature=0.0,
            num_questions=0,
            seed=recipe.config.seed,
        )
        graded = out.with_name(f"{name}.graded.jsonl")  # a t in the name has a dot of its own
        recipe.grade(f"{name}-grade", completions, questions, graded)
        _, rows = read_completions(graded)
        correct = {row["id"] for row in rows if row["verdict"] == "correct"}
        scores = {
            task: {split: accuracy(path, correct) for split, path in splits.items()}
            for task, splits in tasks.items()
        }
    if recipe.config.merge.eval_tasks:
        scores["eval"] = _harness(recipe, name, checkpoint)
    return scores


def accuracy(questions: Path, correct: set[str]) -> Row:
    """{accuracy, questions, standard_error}: of all questions, asked or not, those in `correct`."""
    ids = [row["id"] for row in read_jsonl(questions)]
    if not ids:
        raise ValueError(f"{questions}: no question to measure an accuracy on")
    share = sum(name in correct for name in ids) / len(ids)
    error = (share * (1 - share) / len(ids)) ** 0.5  # binomial
    return {"accuracy": share, "questions": len(ids), "standard_error": error}


def _harness(recipe: Recipe, name: str, checkpoint: Path) -> Row:
    """{task: {metrics, ...}} of `memphis eval`, which resumes by itself too."""
    config, folder = recipe.config, recipe.exported[checkpoint]
    out = recipe.workdir / "eval" / f"{name}-lm"
    options = ("--tasks", config.merge.eval_tasks, "--engine", config.generate.engine)
    recipe.stage(
        f"{name}-eval",
        (*MEMPHIS, "eval", folder, *options, "--out", out, *config.merge.eval_options),
        inputs=[folder],
        outputs=[out / "results.json"],
        suffix=("--python", config.generate.python),
    )
    return json.loads((out / "results.json").read_text("utf-8"))["tasks"]


def sweep(
    recipe: Recipe,
    a: Path,
    b: Path,
    tasks: Tasks,
    known: Mapping[float, Row] | None = None,
    options: Sequence[Any] = (),
) -> list[Row]:
    """Rows {t, scores} of every t of `config.merge.sweep`, all tensors at one t, in order of t.

    known: t -> scores of models that were scored already. options: as in `merge_stage`.
    """
    how, rows = recipe.config.merge, []
    for t in sorted(set(how.sweep)):
        scores = (known or {}).get(t)
        if scores is None:
            at = configs.MergeConfig(method=how.method, t=t, threshold=how.threshold)
            name = f"sweep-t{t:g}"
            merged = merge_stage(recipe, name, a, b, at, options)
            scores = score(recipe, name, merged, tasks)
        rows.append({"t": t, "scores": scores})
    return rows


def points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, float]]]:
    """{task: (t, percent, standard error in percent)}, of the split `validation`."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        for task, splits in row["scores"].items():
            if task != "eval":
                cell = splits["validation"]
                numbers = (100 * cell["accuracy"], 100 * cell["standard_error"])
                found.setdefault(task, []).append((row["t"], *numbers))
    return found


def best_t(rows: Sequence[Row]) -> float | None:
    """The t of the highest mean validation accuracy over the tasks; the lowest of equal ones."""
    means: dict[float, list[float]] = {}
    for cells in points(rows).values():
        for t, percent, _ in cells:
            means.setdefault(t, []).append(percent)
    return max(means, key=lambda t: (sum(means[t]), -t), default=None)


def print_sweep(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="accuracy on held-out questions by t, greedy")
    table.add_column("t")
    found = points(rows)
    for task in found:
        table.add_column(task, justify="right")
    for number, row in enumerate(rows):
        cells = [found[task][number] for task in found]
        table.add_row(f"{row['t']:g}", *(f"{y:.1f} ± {error:.1f} %" for _, y, error in cells))
    console.print(table)


def own_ids(tasks: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """{task: questions.jsonl} of which no two share an id; copies in `folder` where they did.

    Every run numbers its questions alike, so those of two runs cannot be answered together as they
    are.
    """
    rows = {name: read_jsonl(path) for name, path in tasks.items()}
    ids = [row.get("id") for one in rows.values() for row in one]
    if len(set(ids)) == len(ids):
        return dict(tasks)
    folder.mkdir(exist_ok=True)
    copies = {}
    for number, (name, one) in enumerate(rows.items()):
        copies[name] = folder / f"{number}.jsonl"
        write_jsonl(copies[name], ({**row, "id": f"{number}-{row.get('id')}"} for row in one))
    return copies


def command(args: argparse.Namespace, how: configs.MergeConfig, overrides: Sequence[str]) -> None:
    """`memphis merge --sweep`."""
    try:
        ts = tuple(float(word) for word in args.sweep.split(","))
        tasks = {name: Path(path) for name, path in (text.split("=", 1) for text in args.task)}
    except ValueError:
        raise configs.ConfigError(
            f"--sweep {args.sweep} or --task {' '.join(args.task)} is not of the form 0,0.5,1 or "
            "NAME=FILE"
        ) from None
    config = configs.load(args.config, overrides)
    merge = configs.MergeConfig(
        how.method,
        how.t,
        threshold=how.threshold,
        sweep=ts,
        eval_tasks=args.eval,
        eval_options=config.merge.eval_options,
    )
    options = ["--max-shard-mb", args.max_shard_mb, *(["--uncertified"] * args.uncertified)]
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    config = configs.RunConfig(**{**values, "merge": merge})
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        claim(args.out, config)
        recipe = Recipe(args.out, config)
        questions = {
            name: {"validation": path}
            for name, path in own_ids(tasks, args.out / "questions").items()
        }
        rows = sweep(recipe, args.a, args.b, questions, options=options)
        best = best_t(rows)
        write_json(args.out / "sweep.json", {"sweep": rows, "best_t": best})
    print_sweep(rows, Console())
    if best is not None:
        print(f"best mean: t = {best:g}")
        from memphis_jax import charts  # matplotlib

        print(*charts.save_tradeoff(points(rows), args.out / CHART), file=sys.stderr)
