"""Completions in blocks of questions: what makes sampling resumable and divisible. No jax.

    OUT/blocks-I-of-K/block-00000.jsonl ...    shard I of K, published by rename as it goes
    OUT/completions.jsonl                      all of them in the order of the questions

A block is JSON Lines: {"meta": ...}, one row per completion or {"id", "skipped": why}, and at last
{"end": {"rows", "sha256"}} with the hash of all bytes before it, so that damage is seen. Blocks of
one OUT must agree in everything of `meta` that decides what was sampled.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memphis_jax.rounds.files import publish, read_jsonl, write_jsonl

Row = dict[str, Any]
COMPLETIONS = "completions.jsonl"
OF_THE_PLACE = ("hardware", "shard")  # in `meta`, but free to differ between blocks


class DamagedBlock(ValueError):
    """A block file that is cut off or altered; it must be sampled again."""


class SampledOtherwise(ValueError):
    """A block of other weights, questions or settings."""


def shard_folder(out: Path, index: int, count: int) -> Path:
    return out / f"blocks-{index}-of-{count}"


def block_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.jsonl"


def write_block(path: Path, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Publishes one block by rename. Raises ValueError for what JSON cannot hold, such as NaN."""
    try:
        body = b"".join(_line(row) for row in ({"meta": meta}, *rows))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    end = {"rows": len(rows), "sha256": hashlib.sha256(body).hexdigest()}
    publish(path, [body, _line({"end": end})])


def read_block(path: Path) -> tuple[Row, list[Row]]:
    """(meta, rows) of a block. Raises DamagedBlock where the end or the hash is not right."""
    content = path.read_bytes()
    body, newline, last = content.removesuffix(b"\n").rpartition(b"\n")
    body += newline
    try:
        end = json.loads(last)["end"]
        whole = end["sha256"] == hashlib.sha256(body).hexdigest()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedBlock(f"{path} is cut off or altered")
    first, *rows, _ = read_jsonl(path)
    return first["meta"], rows


def open_shard(
    out: Path, index: int, count: int, num_blocks: int, meta: Mapping[str, Any], *, replace: bool
) -> tuple[Path, list[int]]:
    """(folder of a shard, numbers of the blocks that it lacks); the folder is made.

    Where a block was sampled otherwise, all of the shard go if `replace`, and what was merged of
    them; else SampledOtherwise.
    """
    folder = shard_folder(out, index, count)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        left = [number for number in range(num_blocks) if not finished(folder, number, meta)]
    except SampledOtherwise as error:
        if not replace:
            raise
        print(f"sampling all again: {error}", file=sys.stderr, flush=True)
        (out / COMPLETIONS).unlink(missing_ok=True)  # it would outlive a kill, and be graded
        shutil.rmtree(folder)
        folder.mkdir()
        left = list(range(num_blocks))
    if len(left) < num_blocks:
        told = f"{num_blocks - len(left)} of {num_blocks} blocks are there already"
        print(told, file=sys.stderr, flush=True)
    return folder, left


def finished(folder: Path, number: int, meta: Mapping[str, Any]) -> bool:
    """Whether block `number` is there, whole, and sampled like `meta` says.

    A damaged one is not. Raises SampledOtherwise naming what differs.
    """
    path = block_path(folder, number)
    if not path.is_file():
        return False
    try:
        found, _ = read_block(path)
    except DamagedBlock as damage:
        print(f"{damage}: sampling it again", flush=True)
        return False
    check_same(found, meta, path)
    return True


def check_same(found: Mapping[str, Any], meta: Mapping[str, Any], path: Path) -> None:
    """Raises SampledOtherwise, naming the fields, where two metas mean different sampling."""
    fields = sorted((found.keys() | meta.keys()) - set(OF_THE_PLACE))
    differing = [
        f"{name}: {' -> '.join(_apart(found.get(name), meta.get(name)))}"
        for name in fields
        if found.get(name) != meta.get(name)
    ]
    if differing:
        raise SampledOtherwise(
            f"{path} was sampled otherwise (found -> wanted: {'; '.join(differing)}): use another "
            "--out, or delete that folder"
        )


def gather(out: Path, count: int, ids: Sequence[str], meta: Mapping[str, Any]) -> int:
    """Merges the blocks of `count` shards into OUT/completions.jsonl; returns its rows.

    Rows come in the order of `ids`, every (id, sample) exactly once. The header is that of the
    blocks, with `hardware` as a list, `shards`, and `skipped` {id: why}. Raises ValueError where
    headers disagree with one another or with `meta` (whose `versions` may be of another machine),
    where a block is damaged, and where a completion is missing or there twice.
    """
    metas: list[Row] = []
    by_id: dict[str, dict[int, Row]] = {}
    skipped: dict[str, str] = {}
    for index in range(count):
        for path in sorted(shard_folder(out, index, count).glob("block-*.jsonl")):
            try:
                found, rows = read_block(path)
            except DamagedBlock as damage:
                raise ValueError(f"{damage}: run shard {index}/{count} again") from damage
            metas.append(found)
            check_same(found, {**meta, "versions": metas[0]["versions"]}, path)
            for row in rows:
                if "skipped" in row:
                    skipped[row["id"]] = row["skipped"]
                elif by_id.setdefault(row["id"], {}).setdefault(row["sample"], row) is not row:
                    raise ValueError(f"{path}: ({row['id']!r}, {row['sample']}) is there twice")
    wanted = set(range(meta["num_samples"]))
    missing = [name for name in ids if name not in skipped and by_id.get(name, {}).keys() != wanted]
    if missing:
        raise ValueError(
            f"{out}: {len(missing)} of {len(ids)} questions lack completions, the first is "
            f"{missing[0]!r}: run the shards that did not finish again"
        )
    if surplus := sorted((by_id.keys() | skipped.keys()) - set(ids)):
        raise ValueError(f"{out}: completions of {len(surplus)} unknown questions: {surplus[:3]}")
    hardware = [found["hardware"] for found in metas]
    header = {name: value for name, value in metas[0].items() if name not in OF_THE_PLACE}
    header["hardware"] = [h for i, h in enumerate(hardware) if h not in hardware[:i]]
    header |= {"shards": count, "skipped": skipped}
    rows = [by_id[name][k] for name in ids if name in by_id for k in sorted(wanted)]
    write_jsonl(out / COMPLETIONS, [{"meta": header}, *rows])
    return len(rows)


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """`items` in blocks of `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _apart(one: Any, other: Any) -> tuple[str, str]:
    """Two values as text, of mappings only what differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        same = [name for name in one if name in other and one[name] == other[name]]
        one, other = ({n: v for n, v in side.items() if n not in same} for side in (one, other))
    return _short(one), _short(other)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 90 else f"{text[:40]}...{text[-40:]}"
