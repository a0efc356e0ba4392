"""`memphis rounds`: checks the config, claims the workdir, runs the recipe, prints the results."""

import argparse
import dataclasses
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memphis_jax import config as configs
from memphis_jax.fields import difference
from memphis_jax.rounds.files import write_json
from memphis_jax.rounds.ledger import locked
from memphis_jax.rounds.recipe import Recipe

# What may change in a run that goes on: where stages run, how they are fitted to the machines, when
# a gate closes, and the merge, the end of a recipe, whose stages run again where it changes.
PLACES = (
    *("executor.", "mesh.", "sft.accumulation:", "rank.accumulation:"),
    *("compute.remat:", "compute.attention:", "compute.logprob_chunk:", "compute.profile_step:"),
    *("generate.python:", "generate.data_parallel:", "generate.tensor_parallel_size:"),
    *("generate.parity_bound:", "merge."),
)


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis rounds",
        description="Run the whole recipe in --workdir; started again, it goes on where it was.",
        epilog=configs.overrides_help("rounds.num_rounds=2"),
    )
    parser.add_argument("--config", required=True, help="configs/*.py")
    parser.add_argument(
        "--workdir", required=True, type=Path, help="a new folder, or the run's own"
    )
    args, overrides = parser.parse_known_args(argv)
    config = configs.load(args.config, overrides)
    if config.start.rounds_config:
        raise configs.ConfigError(
            f"start.rounds_config = {config.start.rounds_config!r}: `memphis scribe` reads it, "
            "`memphis rounds` would start from random weights"
        )
    check(config, start_model(config))
    workdir: Path = args.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        claim(workdir, config)
        results = Recipe(workdir, config).run()
    print_results(results, workdir)


def check(config: configs.RunConfig, model: configs.ModelConfig) -> None:
    """What is said at once, not after hours of SFT; `model` is the one that the run trains."""
    for name in ("num_validation", "num_test"):
        if config.data.source == "mixture" and getattr(config.data, name) == 0:
            raise configs.ConfigError(f"data.{name} = 0: the rounds need held-out questions")
    check_executor(config.executor)
    phases = {"sft": config.sft, "rank": config.rank}
    configs.check_context(model, phases, config.generate.max_new_tokens)
    generate, here = config.generate, not config.executor.generate
    if generate.engine == "vllm" and here and not shutil.which(generate.python):
        raise configs.ConfigError(
            f"generate.python = {generate.python!r} is no interpreter: `make vllm` builds "
            ".venv-vllm; or set executor.generate to sample elsewhere, or "
            "--config.generate.engine=jax to sample here without vLLM (slower for large models)"
        )


def start_model(config: configs.RunConfig) -> configs.ModelConfig:
    """The model that a run starts from: the HF folder's, or random weights as the config says."""
    if not config.start.hf_folder:
        return config.model
    file = Path(config.start.hf_folder) / "config.json"
    if not file.is_file():
        raise configs.ConfigError(f"start.hf_folder: there is no {file}; name the base model")
    return configs.ModelConfig.from_hf(json.loads(file.read_text()))


def check_executor(executor: configs.ExecutorConfig) -> None:
    """Both prefixes are commands that are there."""
    for name, prefix in dataclasses.asdict(executor).items():
        try:
            words = shlex.split(prefix)
        except ValueError as error:
            raise configs.ConfigError(f"executor.{name} = {prefix!r}: {error}") from None
        if words and not shutil.which(words[0]):
            raise configs.ConfigError(
                f"executor.{name} = {prefix!r}: there is no command {words[0]!r} (seen from here)"
            )


def claim(workdir: Path, config: configs.RunConfig) -> None:
    """Saves the config in a new workdir; refuses one that was started with another config.

    Before its first stage is done a run may still change.
    """
    path = workdir / "config.json"
    records = (json.loads(one.read_text()) for one in (workdir / "ledger").glob("*.json"))
    if not any(record["outputs"] for record in records):
        write_json(path, dataclasses.asdict(config))
        return
    saved = (
        configs.build(configs.RunConfig, json.loads(path.read_text())) if path.is_file() else config
    )
    # As JSON has them: no tuples. A field newer than the saved file has its default there.
    old, fields = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (saved, config))
    if lines := [line for line in difference(old, fields) if not line.startswith(PLACES)]:
        raise configs.ConfigError(
            f"{workdir} was started with another config: use another --workdir, or delete it. "
            "Differing (saved -> given): " + "; ".join(lines)
        )
    write_json(path, fields)


def print_results(results: dict[str, Any], workdir: Path) -> None:
    """The table that a run ends with, and where its report is."""
    table = Table(title=f"held-out accuracy ({results['sft']['test_questions']} test questions)")
    columns = ("validation_greedy", "validation_sampled", "test_greedy", "test_sampled")
    for header in ("", *(name.replace("_", "\n") for name in columns), "valid\nanswers"):
        table.add_column(header, justify="right" if header else "left")
    rows = [("SFT", results["sft"])]
    rows += [(f"round {i}", row) for i, row in enumerate(results["rounds"], start=1)]
    for name, row in rows:
        table.add_row(name, *(f"{100 * row[key]:.1f} %" for key in (*columns, "valid_share")))
    Console().print(table)
    print(f"{results['seconds']:.0f} s in all")
    print(f"report: {workdir / 'report.html'}")
