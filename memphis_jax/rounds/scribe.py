"""`memphis scribe`: a CoT model, finetuned on more data, merged back with its start. No jax.

    [cot: memphis rounds] -> start/hf -> data -> init -> sft -> sft/hf
      -> merged/hf (start and finetuned, by `config.merge`) -> accuracies of the three
      -> the same at every t of `config.merge.sweep` -> results.json, sweep.png, report.html

The second recipe of the Memphis family (euclaise/Memphis-scribe-3B-alpha): finetuning forgets some
of what the start could do, and averaging the weights brings part of it back. What a model can do is
measured on held-out questions: of the data that made the start, and of the new data. Stages,
records and resuming are those of `memphis rounds`.
"""

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memphis_jax import config as configs
from memphis_jax.rounds.files import read_jsonl, write_json, write_jsonl
from memphis_jax.rounds.ledger import locked
from memphis_jax.rounds.recipe import CONVERT, MEMPHIS, Recipe, data_files
from memphis_jax.rounds.run import check, claim, start_model
from memphis_jax.rounds.sweep import (
    CHART,
    Tasks,
    best_t,
    merge_stage,
    points,
    print_sweep,
    score,
    sweep,
)

Row = dict[str, Any]

MODELS = ("start", "finetuned", "merged")
SPLITS = ("validation", "test")


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis scribe",
        description="Finetune a CoT model on more data and merge it with its start, in --workdir; "
        "started again, it goes on where it was.",
        epilog=configs.overrides_help("merge.t=0.3"),
    )
    parser.add_argument("--config", required=True, help="configs/*_scribe.py")
    parser.add_argument(
        "--workdir", required=True, type=Path, help="a new folder, or the run's own"
    )
    args, overrides = parser.parse_known_args(argv)
    config = configs.load(args.config, overrides)
    cot = _check(config, Path(args.config).parent)
    workdir: Path = args.workdir
    if cot:
        start = dataclasses.replace(config.start, hf_folder=str(workdir / "start" / "hf"))
        config = dataclasses.replace(config, start=start)
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        claim(workdir, config)
        results = Scribe(workdir, config, cot).run()
    print_results(results, workdir)


def _check(config: configs.RunConfig, here: Path) -> Path | None:
    """Raises what is said at once; returns the config that makes the start, if one does."""
    start = config.start
    if bool(start.hf_folder) == bool(start.rounds_config):
        raise configs.ConfigError(
            f"start.hf_folder = {start.hf_folder!r} and start.rounds_config = "
            f"{start.rounds_config!r}: `memphis scribe` starts from a trained model, so set one of "
            "them (an HF folder, or the config of a `memphis rounds` run that makes it)"
        )
    if not start.rounds_config:
        check(config, start_model(config))
        return None
    cot = here / start.rounds_config
    check(config, start_model(configs.load(str(cot), start.rounds_overrides)))
    return cot


class Scribe:
    """The stages of one run, on top of those of `Recipe`."""

    def __init__(self, workdir: Path, config: configs.RunConfig, cot: Path | None):
        self.recipe = Recipe(workdir, config)
        self.workdir, self.config, self.cot = workdir, config, cot

    def run(self) -> Row:
        init, tuned = self.start(), self.workdir / "sft"
        tasks = self.tasks()
        self.recipe.train("sft", "sft", tuned, init, self.recipe.data)
        start_hf, tuned_hf = self.workdir / "start" / "hf", self.export("sft", tuned)
        self.recipe.exported[init] = start_hf
        merged = merge_stage(self.recipe, "merged", start_hf, tuned_hf, self.config.merge)
        results: Row = {"models": {}}
        for name, checkpoint in zip(MODELS, (init, tuned, merged), strict=True):
            results["models"][name] = score(self.recipe, name, checkpoint, tasks)
            write_json(self.workdir / "eval" / f"{name}.json", results["models"][name])
        merge, scores = self.config.merge, results["models"]
        known = {0.0: scores["start"], 1.0: scores["finetuned"]}
        known |= {} if merge.t_for else {merge.t: scores["merged"]}
        results["sweep"] = sweep(self.recipe, start_hf, tuned_hf, tasks, known)
        results["best_t"] = best_t(results["sweep"])
        results["t"] = merge.t
        results["seconds"] = round(sum(row["seconds"] for row in self.recipe.ledger.records()), 1)
        results["seed"] = self.config.seed
        write_json(self.workdir / "results.json", results)
        if points(results["sweep"]):
            from memphis_jax import charts  # matplotlib

            charts.save_tradeoff(points(results["sweep"]), self.workdir / CHART)
        subprocess.run([*MEMPHIS, "report", str(self.workdir)], check=True)
        return results

    def start(self) -> Path:
        """The checkpoint to start from, with its certified HF folder start/hf, and the data."""
        if self.cot is None:
            init = self.recipe.start()
            assert init is not None  # start.hf_folder is set
            self.export("start", init)
            return init
        folder, results = self.workdir / "cot", self.workdir / "cot" / "results.json"
        overrides = self.config.start.rounds_overrides
        command = (*MEMPHIS, "rounds", "--config", self.cot, "--workdir", folder, *overrides)
        inner = configs.load(str(self.cot), overrides)
        self.recipe.stage("cot", command, [self.cot, *data_files(inner.data)], [results])
        # A round without pairs trains nothing: the weights are those of the round before.
        ranks = [folder / f"round{r}" / "rank" for r in range(1, inner.rounds.num_rounds + 1)]
        trained = [rank for rank in ranks if (rank / "checkpoints").is_dir()]
        self.export("start", trained[-1] if trained else folder / "sft")
        init = self.recipe.start()
        assert init is not None  # start.hf_folder is start/hf
        return init

    def export(self, name: str, checkpoint: Path) -> Path:
        """Start and finetuned in one dtype, that of compute: else they cannot be merged."""
        out = self.workdir / name / "hf"
        command = (*CONVERT, "to-hf", checkpoint, out, "--dtype", self.config.compute.dtype)
        inputs = [checkpoint / "checkpoints", checkpoint / "tokenizer"]
        self.recipe.stage(f"{name}-export", command, inputs, [out])
        self.recipe.exported[checkpoint] = out
        return out

    def tasks(self) -> Tasks:
        """Held-out questions by skill: those of the start's data, then those of the new data.

        Raises ConfigError where one model was trained on a question that the other's data hold out.
        """
        new, skill = self.recipe.data, _skill(self.config.data)
        if not self.cot:
            return {skill: _splits(new)}
        old = self.workdir / "cot" / "data"
        _no_leak(old, new)
        if _prompts(old, SPLITS) == _prompts(new, SPLITS):
            return {skill: _splits(new)}
        saved = json.loads((self.workdir / "cot" / "config.json").read_text("utf-8"))
        start_skill = _skill(configs.build(configs.RunConfig, saved).data)
        if start_skill == skill:
            start_skill, folder = f"{skill} of the start", self.workdir / "eval" / "start-questions"
            folder.mkdir(exist_ok=True)
            for path in _splits(old).values():  # ids are of one file: answers need their own
                rows = ({**row, "id": f"start-{row['id']}"} for row in read_jsonl(path))
                write_jsonl(folder / path.name, rows)
            old = folder
        return {start_skill: _splits(old), skill: _splits(new)}


def _splits(folder: Path) -> dict[str, Path]:
    return {split: folder / f"{split}.jsonl" for split in SPLITS}


def _prompts(folder: Path, splits: Sequence[str]) -> set[str]:
    return {row["prompt"] for split in splits for row in read_jsonl(folder / f"{split}.jsonl")}


def _no_leak(old: Path, new: Path) -> None:
    for trained, held_out in ((old, new), (new, old)):
        if leaked := _prompts(trained, ("train",)) & _prompts(held_out, SPLITS):
            raise configs.ConfigError(
                f"{len(leaked)} held-out questions of {held_out} are in {trained}/train.jsonl, the "
                f"first is {min(leaked)[:80]!r}: give both configs the same files, seed, "
                "data.num_validation and data.num_test, or other questions"
            )


def _skill(data: configs.DataConfig) -> str:
    return data.task if data.source == "procedural" else "CoT questions"


def print_results(results: Row, workdir: Path) -> None:
    """The tables that a run ends with, and where its report is."""
    console, models = Console(), results["models"]
    skills = [name for name in models["start"] if name != "eval"]
    counts = {skill: models["start"][skill]["test"]["questions"] for skill in skills}
    table = Table(title="accuracy on test questions, greedy")
    table.add_column("")
    for skill in skills:
        table.add_column(f"{skill}\n({counts[skill]} questions)", justify="right")
    for name in MODELS:
        cells = [models[name][skill]["test"] for skill in skills]
        texts = (f"{100 * x['accuracy']:.1f} ± {100 * x['standard_error']:.1f} %" for x in cells)
        label = f"merged, t = {results['t']:g}" if name == "merged" else name
        table.add_row(label, *texts)
    console.print(table)
    if results["sweep"]:
        print_sweep(results["sweep"], console)
        print(f"best mean of the validation accuracies: t = {results['best_t']:g}")
    print(f"{results['seconds']:.0f} s in all")
    print(f"report: {workdir / 'report.html'}")
