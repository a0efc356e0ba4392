"""`memphis merge A B`: two HF folders of one model into a third, tensor by tensor. No jax.

    A/*.safetensors, B/*.safetensors -> OUT/*.safetensors, config and tokenizer of A,
                                        merge.json (the report), conversion.json (the certificate)

OUT appears by rename. How tensors are read and written: `merge_tensors.py`; combined:
`interpolate.py`; several t and what they score: `rounds/sweep.py`.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memphis_jax import config as configs
from memphis_jax.interpolate import METHODS, THRESHOLD
from memphis_jax.merge_report import describe, summary
from memphis_jax.merge_tensors import write_tensors
from memphis_jax.rounds.certificate import (
    CERTIFICATE,
    check_certificate,
    file_hashes,
    is_replaceable,
)
from memphis_jax.rounds.files import new_folder, sha256_file, write_json
from memphis_jax.same_model import model_config, same_model

Row = dict[str, Any]

REPORT = "merge.json"
COMPANIONS = (  # of A, where it has them
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "tokenizer.model"),
)


def merge(argv: Sequence[str]) -> None:
    args, overrides = _arguments(argv)
    given = {"method": args.method, "t": args.t, "threshold": args.threshold}
    how = configs.MergeConfig(**given, t_for=tuple(args.t_for))
    if args.sweep:
        from memphis_jax.rounds import sweep  # it runs the stages of a recipe

        return sweep.command(args, how, overrides)
    options = {"shard_bytes": args.max_shard_mb * 10**6, "uncertified": args.uncertified}
    report = merge_folders(args.a, args.b, args.out, how, **options)
    print(f"{args.out}: {describe(report)}")


def merge_folders(
    a: Path,
    b: Path,
    out: Path,
    how: configs.MergeConfig,
    *,
    shard_bytes: int = 5 * 10**9,
    uncertified: bool = False,
) -> Row:
    """Writes `out` and returns the report (see `summary`), which is in OUT/merge.json too.

    Raises ValueError, naming everything at once, where a certificate does not cover its folder,
    where the two are not the same model in shapes, dtypes, config and tokenizer, for a `t_for`
    that no tensor has, and for NaN or infinity; FileExistsError for an `out` of something else.
    """
    hashes = _certified(a, b, uncertified)
    left, right = same_model(a, b)
    ts = {name: t_of(name, how) for name in left}
    _check_patterns(how, left)
    _check_target(out, (a, b))
    with new_folder(out) as folder:
        rows = write_tensors(folder, left, right, ts, how, shard_bytes)
        tensors = {name: row.pop("stored") for name, row in rows.items()}
        report = {**summary(rows, left, how), "a": str(a), "b": str(b), "tensors": rows}
        write_json(folder / REPORT, report)
        for name in COMPANIONS:
            if (a / name).is_file():
                shutil.copyfile(a / name, folder / name)
        write_json(folder / CERTIFICATE, _certificate(folder, tensors, (a, b), hashes))
    return report


def t_of(name: str, how: configs.MergeConfig) -> float:
    """t of a tensor: of the first pattern of `t_for` that is found in its name, or `how.t`."""
    found = (t for pattern, t in how.patterns() if pattern.search(name))
    return next(found, how.t)


def _check_patterns(how: configs.MergeConfig, names: Iterable[str]) -> None:
    names = list(names)
    for pattern, _ in how.patterns():
        if not any(pattern.search(name) for name in names):
            raise ValueError(f"t_for: no tensor's name holds {pattern.pattern!r}")


def _certified(a: Path, b: Path, uncertified: bool) -> list[dict[str, str]]:
    """The files' hashes of both folders, once their certificates cover them."""
    found, problems = [], []
    for folder in (a, b):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        print(f"{folder}: hashing", file=sys.stderr, flush=True)
        found.append(file_hashes(folder))
        try:
            check_certificate(folder, found[-1])
        except ValueError as error:
            problems.append(str(error))
    if problems and not uncertified:
        raise ValueError("; ".join(problems))
    return found


def _certificate(
    folder: Path,
    tensors: dict[str, Row],
    parents: Sequence[Path],
    hashes: Sequence[dict[str, str]],
) -> Row:
    """conversion.json as `convert to-hf` writes it, with both parents as its source."""
    lineage = []
    for parent, files in zip(parents, hashes, strict=True):
        path = parent / CERTIFICATE
        row: Row = {"folder": str(parent.resolve()), "files": files}
        if path.is_file():
            row |= {"certificate_sha256": sha256_file(path), "source": _source(path)}
        lineage.append(row)
    both = json.dumps([files for files in hashes], sort_keys=True).encode()
    return {
        "format": 1,
        "model": dataclasses.asdict(model_config(folder)),
        "dtype": "keep",
        "tensors": tensors,
        "files": file_hashes(folder),
        "coverage": {"tensors": len(tensors), "tensors_mapped": len(tensors)},
        # No training step has followed: `convert from-hf` makes step 0 of it.
        "source": {
            "step": 0,
            "sha256": hashlib.sha256(both).hexdigest(),
            "merged_from": lineage,
        },
    }


def _source(certificate: Path) -> Any:
    """What a certificate says of its folder's origin; None where it is none (--uncertified)."""
    try:
        return json.loads(certificate.read_text("utf-8"))["source"]
    except (ValueError, KeyError, TypeError):
        return None


def _check_target(out: Path, parents: Sequence[Path]) -> None:
    """Raises FileExistsError unless `out` is new, empty, or another merge or export as it was."""
    out = out.resolve()
    for parent in (parent.resolve() for parent in parents):
        if out in (parent, *parent.parents) or parent in out.parents:
            raise FileExistsError(f"--out {out} and {parent}, which is merged, overlap")
    if out.exists() and not is_replaceable(out) and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else than a merge: choose another --out")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="memphis merge",
        description="Merge two HF folders of one model, tensor by tensor.",
        epilog="A tensor's own t: --t-for 'mlp=0.3' --t-for 'layers\\.[0-3]\\.=0.1' (a regular "
        "expression found in its name; the first that is found counts). Several t, each scored on "
        "questions: --sweep 0,0.25,0.5,0.75,1 --config configs/tiny_scribe.py --task "
        "sums=runs/scribe/cot/data/validation.jsonl (how answers are sampled is in the config; "
        "its fields can be set here too, as --config.generate.max_new_tokens=64).",
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="HF folder; all of it at t = 0")
    add("b", type=Path, metavar="B", help="HF folder; all of it at t = 1")
    add("--out", required=True, type=Path, help="HF folder to write; --sweep: folder of the sweep")
    add("--method", choices=METHODS, default="slerp", help="default: %(default)s")
    add("--t", type=float, default=0.5, help="share of B, 0 to 1 (default: %(default)s)")
    add("--t-for", action="append", default=[], metavar="REGEX=T", help="t of some tensors")
    why = "slerp is linear where |cos| of the angle is above this (default: mergekit's %(default)s)"
    add("--threshold", type=float, default=THRESHOLD, help=why)
    add("--max-shard-mb", type=int, default=5000, help="MB in a file (default: %(default)s)")
    add("--uncertified", action="store_true", help="take folders without a valid certificate")
    add("--sweep", metavar="T,T,...", help="merge at each t and score it; needs --config, --task")
    add("--config", help="sweep: configs/*.py, for `generate` and `compute`")
    add("--task", action="append", default=[], metavar="NAME=FILE", help="sweep: questions.jsonl")
    add("--eval", default="", metavar="TASKS", help="sweep: score with `memphis eval --tasks` too")
    args, overrides = parser.parse_known_args(argv)
    if args.max_shard_mb < 1:
        parser.error(f"--max-shard-mb {args.max_shard_mb} must be 1 or more")
    if args.sweep and not (args.config and (args.task or args.eval)):
        parser.error("--sweep needs --config, and --task NAME=FILE or --eval TASKS")
    if args.sweep and args.t_for:
        parser.error(
            f"--sweep merges all tensors at one t: there is no use of --t-for {args.t_for}"
        )
    if not args.sweep and (args.config or args.task or args.eval or overrides):
        parser.error(f"without --sweep there is no use of --config, --task, --eval, {overrides}")
    return args, overrides
