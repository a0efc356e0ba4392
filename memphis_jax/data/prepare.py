"""`memphis data`: the files that a run reads, from the embedded default or from the user's own.

    OUT/{train,validation,test}.jsonl   {id, prompt, rationale, target, source}
    OUT/tokenizer/                      tokenizer.json and its companions

No jax.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from memphis_jax import config as configs
from memphis_jax.data import procedural
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import read_jsonl, write_jsonl

SPLITS = ("train", "validation", "test")
FIELDS = ("prompt", "rationale", "target", "source")


def data(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis data", description="Write the data files of a run into a new folder."
    )
    parser.add_argument("--config", required=True, help="configs/*.py, or a saved config.json")
    parser.add_argument("--out", required=True, type=Path)
    args, overrides = parser.parse_known_args(argv)
    config = configs.load(args.config, overrides)
    if config.data.source == "procedural":
        counts = (config.data.num_train, config.data.num_validation, config.data.num_test)
        splits = procedural.generate(*counts, config.seed)
        procedural.write(args.out, splits, config.data.vocab_size)
    else:
        import_rows(config.data, Path(config.data.tokenizer or config.start.hf_folder), args.out)


def import_rows(data: configs.DataConfig, tokenizer: Path, out: Path) -> None:
    """Copies TinyCoT-shaped files, giving every row an id that is unique over the three splits.

    Raises ValueError naming file and line for a missing or non-text field, or where a question of
    `validation` or `test` is among those of `train`.
    """
    load_tokenizer(tokenizer)  # before anything is written
    building = out.with_name(out.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    prompts: dict[str, set[str]] = {}
    for split in SPLITS:
        path = getattr(data, split)
        rows = []
        for number, row in enumerate(read_jsonl(path), start=1):
            for name in FIELDS:
                if not isinstance(row.get(name), str):
                    raise ValueError(
                        f"{path}, line {number}: field {name!r} must be text, found "
                        f"{row.get(name)!r}; a row needs {', '.join(FIELDS)}"
                    )
            rows.append({"id": f"{split}-{number:06d}", **{name: row[name] for name in FIELDS}})
        prompts[split] = {row["prompt"].strip() for row in rows}
        if leaked := prompts[split] & (prompts["train"] if split != "train" else set()):
            raise ValueError(
                f"{path}: {len(leaked)} of its questions are also in {data.train}, the first is "
                f"{min(leaked)[:80]!r}; remove them from one of the two"
            )
        write_jsonl(building / f"{split}.jsonl", rows)
    shutil.copytree(tokenizer, building / "tokenizer", ignore=_only_tokenizer_files)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(building, out)


def _only_tokenizer_files(_: str, names: list[str]) -> set[str]:
    wanted = ("tokenizer", "special_tokens", "added_tokens", "vocab.json", "merges.txt")
    return {name for name in names if not name.startswith(wanted) or name.endswith(".bin")}
