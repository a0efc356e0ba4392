"""Data sets -> token examples in Arrow files, and the manifest: the work of `memphis data`. No jax.

    FOLDER/sft/00000.arrow, ...   {tokens, loss_mask, source}, every file of one data set
    FOLDER/manifest.json          what went in, what was dropped and why, what came out

`prepare.py` calls this for a folder that it owns; `examples.py` reads the result. The bytes are a
function of the data sets, the tokenizer and the sizes: no clock and no number of processes is in.
"""

import contextlib
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from memphis_jax.data.examples import MANIFEST, ArrowExamples, encode_or_reason
from memphis_jax.data.packing import plan_rows
from memphis_jax.data.prompts import Example, load_tokenizer
from memphis_jax.data.recipes import Item, Loaded
from memphis_jax.progress import Progress
from memphis_jax.rounds.files import sha256_file, sha256_folder, write_json
from memphis_jax.versions import versions

FORMAT = 1
"""Raise it when prompts.py, recipes.py or fields.py make other examples of the same rows: a folder
built before is then refused, not taken for finished."""

CHUNK = 512  # rows tokenised at once and written as one record batch
SHARD_TOKENS = 1 << 24  # a file is closed when it has so many: 64 MiB of tokens
ITEMS_PER_PROCESS = 8192  # fewer are tokenised before a process has started
MOST_PROCESSES = 16

SCHEMA = pa.schema(
    {"tokens": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_()), "source": pa.string()}
)

Encode = Callable[[Iterable[list[Item]]], Iterable[list[Example | str]]]


def write_examples(
    folder: Path,
    data_sets: Mapping[str, Loaded],
    unwanted: Mapping[str, Sequence[str]],
    seq_len: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Item]]]:
    """Writes FOLDER/sft with the tokenizer in FOLDER/tokenizer.

    `unwanted` says for every item of a data set why it shall not be trained on, "" where it shall.
    Returns, by data set, its part of the manifest and the items that became examples. Raises
    ValueError where nothing did.
    """
    (folder / "sft").mkdir()
    records, kept = {}, {}
    total = sum(len(loaded.items) for loaded in data_sets.values())
    with _encoder(folder / "tokenizer", seq_len, total) as encode:
        for name, loaded in data_sets.items():
            records[name], kept[name] = _write_data_set(
                folder / "sft", name, loaded, unwanted[name], encode
            )
    if not any(kept.values()):
        reasons = sum((Counter(record["items_dropped"]) for record in records.values()), Counter())
        raise ValueError(f"no example is left of {total} rows; dropped: {_sorted(reasons)}")
    return records, kept


def _write_data_set(
    folder: Path, name: str, loaded: Loaded, unwanted: Sequence[str], encode: Encode
) -> tuple[dict[str, Any], list[Item]]:
    """Shards of one data set -> (its part of the manifest, its items that became examples)."""
    pairs = zip(loaded.items, unwanted, strict=True)
    wanted = [item for item, reason in pairs if not reason]
    dropped = Counter(reason for reason in unwanted if reason)
    kept: list[Item] = []
    totals = {"tokens": 0, "trained_tokens": 0, "longest": 0}
    progress = Progress(len(loaded.items), f"{name}: tokenised")
    progress.add(len(loaded.items) - len(wanted), 0)

    def batches() -> Iterator[list[tuple[Example, str]]]:
        chunks = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)]
        for chunk, encoded in zip(chunks, encode(chunks), strict=True):
            batch = []
            for item, example in zip(chunk, encoded, strict=True):
                if isinstance(example, str):
                    dropped[example] += 1
                    continue
                kept.append(item)
                batch.append((example, item["source"]))
                totals["tokens"] += len(example.tokens)
                totals["trained_tokens"] += int(example.loss_mask.sum())
                totals["longest"] = max(totals["longest"], len(example.tokens))
            progress.add(len(chunk), sum(len(example.tokens) for example, _ in batch))
            yield batch

    shards = _write_shards(folder, batches())
    record = {
        "template": loaded.template,
        "origin": loaded.origin,
        "rows_in": loaded.rows_in,
        "rows_dropped": _sorted(loaded.dropped),
        "items": len(loaded.items),
        "items_dropped": _sorted(dropped),
        "examples": len(kept),
        **totals,
        "shards": [f"{folder.name}/{shard}" for shard in shards],
    }
    return record, kept


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """The largest first; equal ones by name, so that the order is one."""
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _write_shards(folder: Path, batches: Iterable[list[tuple[Example, str]]]) -> list[str]:
    """Arrow files of (example, source), numbered on from those in `folder` -> their names."""
    first, room = len(list(folder.iterdir())), 0
    shards: list[str] = []
    with contextlib.ExitStack() as stack:
        for batch in filter(None, batches):
            if room <= 0:
                stack.close()  # the file before
                shards.append(f"{first + len(shards):05d}.arrow")
                file = stack.enter_context((folder / shards[-1]).open("wb", buffering=0))
                stack.callback(os.fsync, file.fileno())
                writer = stack.enter_context(pa.ipc.new_file(file, SCHEMA))
                room = SHARD_TOKENS
            examples = [example for example, _ in batch]
            lengths = [len(example.tokens) for example in examples]
            offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
            columns = [
                pa.ListArray.from_arrays(offsets, np.concatenate([e.tokens for e in examples])),
                pa.ListArray.from_arrays(offsets, np.concatenate([e.loss_mask for e in examples])),
                pa.array([source for _, source in batch]),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            room -= sum(lengths)
    return shards


@contextlib.contextmanager
def _encoder(tokenizer: Path, seq_len: int, num_items: int) -> Iterator[Encode]:
    """Maps chunks of items to their examples, or reasons, in order; in processes where many."""
    processes = min(_cores(), MOST_PROCESSES, num_items // ITEMS_PER_PROCESS)
    if processes < 2:
        yield partial(map, partial(_encode, *load_tokenizer(tokenizer), seq_len))
        return
    # Not forked: the tokenizer's threads may hold locks.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, _start_worker, (tokenizer, seq_len))
    try:
        yield partial(pool.map, _encode_in_worker)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of {processes} tokenising processes was killed, perhaps for want of memory: "
            "run again with more, or on fewer cores (taskset -c 0 memphis data ...)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_worker: list[Callable[[list[Item]], list[Example | str]]] = []


def _start_worker(tokenizer: Path, seq_len: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(partial(_encode, *load_tokenizer(tokenizer), seq_len))


def _end_with_parent() -> None:
    """A worker would wait for ever for the next chunk of a build that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: list[Item]) -> list[Example | str]:
    return _worker[0](chunk)


def _encode(
    tokenizer: Tokenizer, eos_id: int, seq_len: int, chunk: list[Item]
) -> list[Example | str]:
    return [encode_or_reason(tokenizer, item, eos_id, seq_len) for item in chunk]


def write_manifest(
    folder: Path,
    records: Mapping[str, dict[str, Any]],
    *,
    inputs: Mapping[str, Any],
    warnings: Sequence[str],
    seed: int,
    seq_len: int,
    epochs: int,
) -> dict[str, Any]:
    """Writes FOLDER/manifest.json, last: totals, packing and the hash of every file there is.

    `inputs` is what makes this build what it is, `warnings` what could not be done. The packing is
    that of training with this seed: per epoch the rows, and the share of their slots with a token.
    It is a forecast for so many `epochs`; training packs by itself.
    """
    shards = [folder / name for record in records.values() for name in record["shards"]]
    slots = (ArrowExamples(shards).lengths - 1).tolist()
    packing = []
    for epoch in range(epochs):
        rows = len(plan_rows(slots, seq_len, seed, epoch))
        packing.append({"rows": rows, "efficiency": round(sum(slots) / (rows * seq_len), 6)})
    names = ("rows_in", "items", "examples", "tokens", "trained_tokens")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "inputs": inputs,
        "warnings": list(warnings),
        "versions": versions(("tokenizers", "pyarrow")),
        "data_sets": records,
        "totals": {name: sum(record[name] for record in records.values()) for name in names},
        "packing": packing,
        "sft_sha256": sha256_folder(folder / "sft"),
        "files": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest
