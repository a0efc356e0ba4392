"""The model card of a run's model: README.md from the ledger and the files of the stages. No jax.

Everything on it is read: the config, the data manifest, the ledger's records, the scores, the
merge report, the certificate. What is not there is left out. `evals` are also written as the hub's
model-index. Imports `huggingface_hub` for the metadata's format; nothing is sent anywhere.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from memphis_jax.data.contamination import NOT_COMPARED
from memphis_jax.merge_report import describe
from memphis_jax.rounds.files import read_object

Row = dict[str, Any]

# What a config calls a choice -> how the card lists it, by phase.
SHOWN = (
    *("epochs", "batch_size", "seq_len", "mixce_eta", "neftune_alpha", "rank_weight"),
    *("optimizer.name", "optimizer.learning_rate", "optimizer.warmup_ratio"),
    *("optimizer.lambda_", "optimizer.freeze_embeddings", "keep_optimizer_state"),
)
MODELS = {"start": "start", "sft": "finetuned", "merged": "merged"}  # of `memphis scribe`


CONFIG = ("start", "data", "sft", "rank", "generate", "rounds", "seed")  # read of a run's config


def read_json(path: Path) -> Row:
    """The object in a file; {} where there is none. Raises ValueError, naming a broken file."""
    return read_object(path) if path.is_file() else {}


def write_card(
    hf: Path, workdir: Path, folder: Path, *, repo: str, license: str, base_model: str = ""
) -> ModelCardData:
    """Writes FOLDER/README.md about the model `hf` of the run `workdir`; returns its metadata.

    repo: where it will be on the hub; "" = only in FOLDER. Raises ValueError where `hf` is not of
    this run.
    """
    stage = stage_of(hf, workdir)
    config, manifest = _config_of(workdir), read_json(workdir / "data/manifest.json")
    records = [read_json(path) for path in (workdir / "ledger").glob("*.json")]
    records.sort(key=lambda record: record["started"])
    scores, merge = evals(workdir, stage), read_json(hf / "merge.json")
    repos = [
        row["origin"]["repo"]
        for row in manifest.get("data_sets", {}).values()
        if "repo" in row["origin"]
    ]
    data = ModelCardData(
        # The named data sets are English; what is in files of one's own nobody has said.
        language=None if config["data"]["source"] == "jsonl" else "en",
        base_model=base_model or None,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["memphis_jax", *(["merge"] if merge else [])],
        datasets=repos or None,
        model_name=repo.rpartition("/")[2] or workdir.resolve().name,
        eval_results=model_index(scores) or None,
    )
    warnings = manifest.get("warnings", [])
    context = {
        "metadata": data.to_yaml(),
        "name": data.model_name,
        "model_id": repo or ".",
        "license": license,
        "start": base_model or _start_of(config),
        "data_sets": manifest.get("data_sets", {}),
        "evaluation": _compared(config["data"]["evaluation"], warnings),
        "warnings": warnings,
        "phases": phases(config),
        "rounds": config["rounds"]["num_rounds"],
        "generate": config["generate"],
        "merge": {**merge, "text": describe(merge)} if merge else {},
        "scores": scores,
        "models": list(dict.fromkeys(row["model"] for row in scores)),
        "tasks": list(dict.fromkeys(row["task"] for row in scores)),
        "seed": config["seed"],
        "seconds": sum(record["seconds"] for record in records),
        "stages": records,
        "hashes": hashes(hf, workdir, records),
        "versions": records[-1]["versions"] if records else {},
        "max_new_tokens": config["generate"]["max_new_tokens"],
    }
    (folder / "README.md").write_text(render(context), encoding="utf-8")
    return data


def _config_of(workdir: Path) -> Row:
    config = read_json(workdir / "config.json")
    if not config:
        raise ValueError(f"{workdir} has no config.json: give the --workdir of a run")
    if missing := [name for name in CONFIG if name not in config]:
        raise ValueError(
            f"{workdir}/config.json lacks {', '.join(missing)}: it is not of `memphis rounds` or "
            "`memphis scribe`; give the --workdir of a run"
        )
    return config


def _start_of(config: Row) -> str:
    """The name of the model that training started from; "" for none."""
    start = config["start"]
    if not start["hf_folder"] or start["rounds_config"]:
        return ""
    name = Path(start["hf_folder"]).name
    return "a model of an earlier run" if name == "hf" else name  # an export's says nothing


def _compared(evaluation: Iterable[str], warnings: Iterable[str]) -> list[str]:
    """The evaluation sets that the training data was compared with."""
    absent = [text for text in warnings if text.endswith(NOT_COMPARED)]
    return [
        name
        for name in evaluation
        if not any(text.startswith(f"evaluation set {name}: ") for text in absent)
    ]


def render(context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown of our own files
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.jinja").render(context)


def stage_of(hf: Path, workdir: Path) -> str:
    """The run's stage that made a model: "sft", "round4", "merged"."""
    try:
        return hf.resolve().relative_to(workdir.resolve()).parts[0]
    except (ValueError, IndexError):
        raise ValueError(f"{hf} is not inside {workdir}: give a model of that run") from None


def phases(config: Row) -> dict[str, Row]:
    """{phase: {field: value}} of the phases that this run has."""
    names = ["sft"] + (["rank"] if config["rounds"]["num_rounds"] else [])
    table = {}
    for name in names:
        flat = {
            **config[name],
            **{f"optimizer.{k}": v for k, v in config[name]["optimizer"].items()},
        }
        table[name] = {field: flat[field] for field in SHOWN}
    return table


def evals(workdir: Path, stage: str) -> list[Row]:
    """Rows {model, task, split, value, error, count, metric, this} of what the run measured.

    Shares of 1 with binomial standard errors. `this` marks the model that the card is about.
    """
    rows: list[Row] = []
    results = read_json(workdir / "results.json")
    for folder, model in MODELS.items():
        for task, splits in results.get("models", {}).get(model, {}).items():
            this = {"model": model, "task": task, "this": folder == stage}
            for split, cell in splits.items() if task != "eval" else ():
                value, error, count = (
                    cell[name] for name in ("accuracy", "standard_error", "questions")
                )
                numbers = {"value": value, "error": error, "count": count}
                rows.append({**this, "split": split, "metric": "greedy", **numbers})
    this_model = MODELS.get(stage, stage) if rows else stage
    for path in sorted((workdir / "eval").glob("*-lm/results.json")):
        model = path.parent.name.removesuffix("-lm")
        about = {"model": model, "this": model == this_model}
        rows += [{**about, **row} for row in harness_rows(read_json(path)["tasks"])]
    for path in sorted((workdir / "eval").glob("*.json"), key=_place):
        found = read_json(path)
        for split in ("validation", "test"):
            for kind in ("greedy", "sampled"):
                value, count = found.get(f"{split}_{kind}"), found.get(f"{split}_questions")
                if value is None or not count:
                    continue
                rows.append(
                    {
                        "model": path.stem,
                        "task": "held-out questions",
                        "this": path.stem == stage,
                        "split": split,
                        "metric": kind,
                        "value": value,
                        "error": (value * (1 - value) / count) ** 0.5,
                        "count": count,
                    }
                )
    return rows


def _place(path: Path) -> tuple[bool, int, str]:
    """sft.json, round1.json, ..., round10.json: in the order in which a run makes them."""
    digits = "".join(filter(str.isdigit, path.stem))
    return path.stem != "sft", int(digits or 0), path.stem


def harness_rows(tasks: Mapping[str, Row]) -> list[Row]:
    """Rows {task, split, metric, value, error, count} of what `memphis eval` measured.

    value and error are shares of 1; an error that lm-eval does not know is None.
    """
    rows = []
    for name, task in tasks.items():
        shots = f", {task['num_fewshot']}-shot" if task["num_fewshot"] else ""
        for key, score in task["metrics"].items():
            row = {"task": name, "split": "test", "count": task["questions"]}
            numbers = {"value": score["value"], "error": score["stderr"]}
            rows.append({**row, "metric": key.removesuffix(",none") + shots, **numbers})
    return rows


def model_index(scores: list[Row]) -> list[EvalResult]:
    """This model's test scores in the hub's format, in percent."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=row["task"].replace(" ", "-"),
            dataset_name=row["task"],
            dataset_split=row["split"],
            metric_type="accuracy",
            metric_name=", ".join(filter(None, (row["metric"], _precision(row)))),
            metric_value=round(100 * row["value"], 2),
        )
        for row in scores
        if row["this"] and row["split"] == "test"
    ]


def _precision(row: Row) -> str:
    asked = f"{row['count']} questions" if row["count"] else ""
    error = "" if row["error"] is None else f"standard error {100 * row['error']:.1f}"
    return ", ".join(filter(None, (asked, error)))


def hashes(hf: Path, workdir: Path, records: list[Row]) -> dict[str, str]:
    """What the model can be told by: of its files, its data and its config."""
    files = read_json(hf / "conversion.json").get("files", {})
    wanted = {name: sha for name, sha in files.items() if name.endswith((".safetensors", ".json"))}
    wanted.pop("merge.json", None)
    data = read_json(workdir / "data" / "manifest.json").get("sft_sha256")
    last = max(records, key=lambda record: record["started"], default={})
    more = {"training data": data, "config of the run": last.get("config_sha256")}
    return wanted | {name: value for name, value in more.items() if value}
