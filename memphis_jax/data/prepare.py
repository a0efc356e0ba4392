"""`memphis data`: the folder that a run reads, from the embedded default or from other data sets.

    OUT/{train,validation,test}.jsonl   the rounds: {id, prompt, rationale, target, source}
    OUT/tokenizer/                      tokenizer.json and its companions
    OUT/sft/*.arrow                     the SFT examples as tokens (see build.py)
    OUT/manifest.json                   what went in, what was dropped and why, what came out

train.jsonl holds the CoT rows among the SFT examples. The folder appears in one rename. No jax.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memphis_jax import config as configs
from memphis_jax.data import build, contamination, procedural, recipes
from memphis_jax.data.examples import MANIFEST, read_manifest
from memphis_jax.data.fields import Drop, clean
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.data.recipes import Item, Loaded
from memphis_jax.fields import difference
from memphis_jax.rounds.files import new_folder, read_jsonl, sha256_file, write_jsonl

SPLITS = ("train", "validation", "test")
FIELDS = ("prompt", "rationale", "target", "source")


def data(argv: Sequence[str]) -> None:
    if argv[:1] == ["show"]:
        from memphis_jax.data import show

        return show.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="memphis data",
        description="Build the data folder of a run; `memphis data show DIR N` prints an example.",
        epilog=configs.overrides_help("data.source=jsonl") + " docs/data.md tells of the data.",
    )
    parser.add_argument("--config", required=True, help="configs/*.py, or a saved config.json")
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    args, overrides = parser.parse_known_args(argv)
    config, out = configs.load(args.config, overrides), args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MANIFEST).is_file():
        raise FileExistsError(f"{out} holds files of something else: choose another --out")
    with new_folder(out) as building:
        if finished := _build(config, building, out):
            shutil.rmtree(building)
    if finished:
        print(f"{out}: built before from the same inputs, nothing to do")
        return
    print_manifest(read_manifest(out), out)


def _build(config: configs.RunConfig, building: Path, out: Path) -> bool:
    """Builds the folder `building`; stops and returns True where `out` holds the same already."""
    data_sets, held_out, unwanted = load_sources(config, building)
    evaluation, warnings = contamination.read_evaluation(config.data.evaluation)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sizes: dict[str, Any] = {"seed": config.seed, "seq_len": config.sft.seq_len}
    inputs = {
        "format": build.FORMAT,
        "data": dataclasses.asdict(config.data),
        **sizes,
        "tokenizer_sha256": sha256_file(building / "tokenizer" / "tokenizer.json"),
        "eos_id": load_tokenizer(building / "tokenizer")[1],
        "origins": {name: loaded.origin for name, loaded in data_sets.items()},
        "evaluation_sha256": hashlib.sha256(json.dumps(evaluation).encode()).hexdigest(),
    }
    inputs = json.loads(json.dumps(inputs))  # tuples are lists in the manifest
    if (out / MANIFEST).is_file() and _is_finished(out, inputs):
        return True
    found = {name: _contaminated(loaded, evaluation) for name, loaded in data_sets.items()}
    if config.data.contamination == "drop":
        for name, reasons in found.items():
            held = (f"holds an evaluation question ({why})" if why else "" for why in reasons)
            unwanted[name] = [a or b for a, b in zip(unwanted[name], held, strict=True)]
    records, kept = build.write_examples(building, data_sets, unwanted, config.sft.seq_len)
    for name, reasons in found.items():
        records[name]["contaminated"] = dict(sorted(Counter(filter(None, reasons)).items()))
    cot = [name for name, loaded in data_sets.items() if loaded.template == "cot"]
    for split, rows in {"train": [item for name in cot for item in kept[name]], **held_out}.items():
        write_jsonl(
            building / f"{split}.jsonl",
            ({field: row[field] for field in ("id", *FIELDS)} for row in rows),
        )
    told: dict[str, Any] = {"inputs": inputs, "warnings": warnings, "epochs": config.sft.epochs}
    build.write_manifest(building, records, **told, **sizes)
    return False


def _contaminated(loaded: Loaded, evaluation: Sequence[str]) -> list[str]:
    if not evaluation:
        return [""] * len(loaded.items)
    return list(contamination.guard(map(contamination.row_text, loaded.items), evaluation))


def _is_finished(out: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the built folder `out` is whole. Raises ConfigError where it has other inputs."""
    manifest = read_manifest(out)
    if lines := difference(manifest["inputs"], inputs):
        raise configs.ConfigError(
            f"{out} was built from other inputs: choose another --out, or delete it. "
            "Differing (built -> given): " + "; ".join(lines)
        )
    for name, sha256 in manifest["files"].items():
        if not (out / name).is_file() or sha256_file(out / name) != sha256:
            print(f"{out / name} is not as it was built: building again", file=sys.stderr)
            return False
    return True


def load_sources(
    config: configs.RunConfig, building: Path
) -> tuple[dict[str, Loaded], dict[str, list[Item]], dict[str, list[str]]]:
    """Reads every row and puts the tokenizer into the new folder `building`.

    Returns the data sets to train on; the questions of validation and test; and per data set why
    each item is not to be trained on ("" where it is).
    """
    settings = config.data
    tokenizer = settings.tokenizer or config.start.hf_folder
    dropped: Counter[str] = Counter()
    if settings.source == "procedural":
        counts = (settings.num_train, settings.num_validation, settings.num_test)
        splits = procedural.generate(*counts, config.seed, settings.task)
        procedural.write(building, splits, settings.vocab_size)
        origin = {"generator": procedural.__name__, "task": settings.task, "seed": config.seed}
    if tokenizer:
        load_tokenizer(tokenizer)  # says what is wrong with it
        shutil.rmtree(building / "tokenizer", ignore_errors=True)
        shutil.copytree(tokenizer, building / "tokenizer", ignore=_only_tokenizer_files)
    if settings.source == "mixture":
        return _load_mixture(settings, config.seed)
    if settings.source == "jsonl":
        splits, dropped = read_rows(settings)
        paths = [getattr(settings, split) for split in SPLITS]
        origin = {"path": settings.train, "sha256": {path: sha256_file(path) for path in paths}}
    rows = splits.pop("train")
    loaded = Loaded("cot", rows, len(rows) + dropped.total(), dropped, origin)
    return {settings.source: loaded}, splits, {settings.source: [""] * len(rows)}


def _load_mixture(
    settings: configs.DataConfig, seed: int
) -> tuple[dict[str, Loaded], dict[str, list[Item]], dict[str, list[str]]]:
    data_sets = {}
    for name, entry in settings.mixture.items():
        print(f"{name}: reading", file=sys.stderr, flush=True)
        data_sets[name] = recipes.load(name, entry, settings.root, seed)
    cot = [item for one in data_sets.values() if one.template == "cot" for item in one.items]
    for number, item in enumerate(cot, start=1):
        item["id"] = f"train-{number:06d}"
    counts = {"validation": settings.num_validation, "test": settings.num_test}
    held_out, drawn = hold_out(cot, counts, seed)
    questions = {_words(question) for question in drawn}
    unwanted = {
        name: ["held-out question" if _asked(item) & questions else "" for item in loaded.items]
        for name, loaded in data_sets.items()
    }
    return data_sets, held_out, unwanted


def hold_out(
    items: Sequence[Item], counts: Mapping[str, int], seed: int
) -> tuple[dict[str, list[Item]], set[str]]:
    """Draws that many different questions for each split -> (the rows of each, the questions).

    A question that has several rows is held out with the first of them. Raises ValueError where
    none would be left.
    """
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(_question(item), item)
    if (wanted := sum(counts.values())) and wanted >= len(first):
        raise ValueError(
            f"cannot hold out {wanted} of {len(first)} CoT questions: lower data.num_validation "
            "and data.num_test"
        )
    drawn = random.Random(seed).sample(sorted(first), wanted)
    splits, start = {}, 0
    for split, count in counts.items():
        chosen = drawn[start : start + count]
        splits[split] = [
            {**first[question], "id": f"{split}-{number:06d}"}
            for number, question in enumerate(chosen, start=1)
        ]
        start += count
    return splits, set(drawn)


def _question(item: Item) -> str:
    """The prompt, as far as two of them count as one question."""
    return " ".join(item["prompt"].split()).casefold()


def _words(question: str) -> str:
    """A question without case and without the punctuation around its words."""
    return " ".join(word.strip("\"'(").rstrip(".,;:?)\"'") for word in question.casefold().split())


def _asked(item: Item) -> set[str]:
    """What an example asks, as `_words`: its prompt, or each turn of its user."""
    turns = [turn["content"] for turn in item.get("messages", ()) if turn["role"] == "user"]
    return set(map(_words, [item["prompt"]] if "prompt" in item else turns))


def read_rows(data: configs.DataConfig) -> tuple[dict[str, list[Item]], Counter[str]]:
    """The rows of TinyCoT-shaped files by split, and why rows of `train` were dropped.

    Each row has an id that is unique over all splits. A row of `train` that is not valid Unicode is
    dropped. Raises ValueError, naming file and line, for a missing or non-text field, and for a row
    of `validation` or `test` that is not valid Unicode or has no prompt or target; and, naming the
    file, where one of them has no rows, or a question that `train` has as well.
    """
    dropped: Counter[str] = Counter()
    splits: dict[str, list[Item]] = {}
    for split in SPLITS:
        path, rows = getattr(data, split), []
        if not Path(path).is_file():
            what = "is a folder, not a file" if Path(path).is_dir() else "is not there"
            raise FileNotFoundError(f"data.{split} = {path!r} {what}: give a JSON Lines file")
        for number, row in enumerate(read_jsonl(path), start=1):
            where = f"{path}, line {number}"
            try:
                item = _read_row(row, where)
            except Drop as reason:
                if split != "train":
                    raise ValueError(f"{where}: {reason}; correct or remove the row") from None
                dropped[str(reason)] += 1
                continue
            empty = [name for name in ("prompt", "target") if not item[name]]
            if empty and split != "train":  # the rounds ask and grade every one
                raise ValueError(f"{where}: empty {empty[0]}; fill it in or remove the row")
            rows.append({"id": f"{split}-{number:06d}", **item})
        if not rows and not (split == "train" and dropped):
            raise ValueError(f"{path} has no rows: data.{split} needs one or more")
        splits[split] = rows
        trained = set().union(*map(_asked, splits["train"])) if split != "train" else set()
        if leaked := [row["prompt"] for row in rows if _asked(row) & trained]:
            raise ValueError(
                f"{path}: {len(leaked)} of its questions are also in {data.train}, the first is "
                f"{leaked[0][:80]!r}; remove them from one of the two"
            )
    return splits, dropped


def _read_row(row: Mapping[str, Any], where: str) -> Item:
    for name in FIELDS:
        if not isinstance(row.get(name), str):
            raise ValueError(
                f"{where}: field {name!r} must be text, found {row.get(name)!r}; "
                f"a row needs {', '.join(FIELDS)}"
            )
    return {name: clean(name, row[name]) for name in FIELDS}


def _only_tokenizer_files(_: str, names: list[str]) -> set[str]:
    wanted = ("tokenizer", "special_tokens", "added_tokens", "vocab.json", "merges.txt")
    return {name for name in names if not name.startswith(wanted) or name.endswith(".bin")}


def print_manifest(manifest: Mapping[str, Any], out: Path) -> None:
    """What a build ends with: a line per data set, and why rows were dropped."""
    table = Table()
    for header in ("", "rows read", "examples", "tokens", "trained"):
        table.add_column(header, justify="right" if header else "left")
    for name, record in {**manifest["data_sets"], "total": manifest["totals"]}.items():
        numbers = (record["rows_in"], record["examples"], record["tokens"])
        trained = f"{100 * record['trained_tokens'] / max(record['tokens'], 1):.1f} %"
        table.add_row(name, *(f"{number:,}" for number in numbers), trained)
    console = Console()
    console.print(f"{out}: examples of SFT", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for name, record in manifest["data_sets"].items():
        for reason, count in {**record["rows_dropped"], **record["items_dropped"]}.items():
            line = f"{name}: {count:,} dropped: {reason}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    shares = ", ".join(f"{100 * epoch['efficiency']:.1f} %" for epoch in manifest["packing"])
    seq_len = manifest["inputs"]["seq_len"]
    console.print(f"packed rows of {seq_len}: {shares} real tokens, by epoch", highlight=False)
