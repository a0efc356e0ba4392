"""Rows -> token examples, and the built folder of them: what `memphis train` reads. No jax.

Over-long rows are dropped and counted, as the original does, never cut. `build.py` writes the
folder; here it is opened, memory-mapped, with one example decoded at a time.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from memphis_jax.data.packing import Group
from memphis_jax.data.prompts import (
    Example,
    cot_completion,
    encode_chat,
    encode_cot,
    load_tokenizer,
)
from memphis_jax.rounds.files import read_jsonl, sha256_file, sha256_folder

Row = Mapping[str, Any]
Item = TypeVar("Item")

MANIFEST = "manifest.json"
IN_MANIFEST = ("inputs", "data_sets", "totals", "packing", "sft_sha256", "files")

SFT_DATA = (
    "phase sft reads a folder that `memphis data --config FILE --out DIR` made, or a file of rows "
    "{prompt, rationale, target} or {messages}"
)
PAIRS_DATA = "phase rank reads pairs.jsonl as `memphis pairs` writes it"


def encode_row(tokenizer: Tokenizer, row: Row, eos_id: int) -> Example:
    """A row {messages} in the chat template, a row {prompt, rationale, target} in CoT's.

    Raises ValueError for what the template cannot hold, KeyError for a missing field.
    """
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("messages is not a list of {role, content}: drop the row")
        return encode_chat(tokenizer, turns, eos_id)
    completion = cot_completion(row["rationale"], row["target"])
    return encode_cot(tokenizer, row["prompt"], completion, eos_id)


def encode_or_reason(tokenizer: Tokenizer, row: Row, eos_id: int, seq_len: int) -> Example | str:
    """`encode_row`, or why the row has to be dropped."""
    try:
        example = encode_row(tokenizer, row, eos_id)
    except ValueError as error:
        return str(error)
    return _too_long([example], seq_len) or example


def _too_long(members: Iterable[Example], seq_len: int) -> str:
    # An example of n tokens fills n - 1 slots: the last token is only a target.
    if max(len(example.tokens) for example in members) > seq_len + 1:
        return f"longer than seq_len = {seq_len} tokens"
    return ""


def read_cot_examples(
    path: str | Path, tokenizer: Tokenizer, eos_id: int, seq_len: int
) -> tuple[list[Example], Counter[str]]:
    """Rows {prompt, rationale, target} -> (examples, why rows were dropped: reason -> count).

    Raises FileNotFoundError without the file; ValueError, naming it, where it has no rows, where a
    row lacks a field, and where no row can be trained on.
    """

    def encode(row: Row) -> Example | str:
        return encode_or_reason(tokenizer, row, eos_id, seq_len)

    examples, dropped = _keep(path, encode, SFT_DATA)
    if not examples:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise ValueError(f"{path}: none of its rows can be trained on: {reasons}")
    return examples, dropped


def read_groups(
    path: str | Path, tokenizer: Tokenizer, eos_id: int, seq_len: int
) -> tuple[list[Group], Counter[str]]:
    """Rows {prompt, chosen, rejected, gold} of pairs.jsonl -> (groups, why rows were dropped).

    Raises FileNotFoundError without the file; ValueError, naming it, where it has no rows, and
    where a row lacks a field.
    """

    def encode(row: Row) -> Group | str:
        try:
            chosen, rejected, gold = (
                encode_cot(tokenizer, row["prompt"], row[name], eos_id)
                for name in ("chosen", "rejected", "gold")
            )
        except ValueError as error:
            return str(error)
        group = Group(candidates=(chosen, rejected), ranks=(0, 1), gold=gold)
        return _too_long([chosen, rejected, gold], seq_len) or group

    return _keep(path, encode, PAIRS_DATA)


def _keep(
    path: str | Path, encode: Callable[[Row], Item | str], made_by: str
) -> tuple[list[Item], Counter[str]]:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; {made_by}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is needed; {made_by}")
    kept: list[Item] = []
    dropped: Counter[str] = Counter()
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} is empty: there is nothing to train on; {made_by}")
    for number, row in enumerate(rows, start=1):
        try:
            item = encode(row)
        except KeyError as missing:
            told = f"no field {missing}, found {', '.join(row) or 'none'}"
            raise ValueError(f"{path}, line {number}: {told}; {made_by}") from None
        if isinstance(item, str):
            dropped[item] += 1
        else:
            kept.append(item)
    return kept, dropped


class ArrowExamples(Sequence[Example]):
    """The examples of Arrow files, one after another, memory-mapped.

    `lengths` [n] int64 holds the tokens of each, known without touching the tokens. Raises
    ValueError, naming it, for a file that is damaged or not there.
    """

    def __init__(self, paths: Sequence[Path]):
        self._batches = [batch for path in paths for batch in _open_shard(path)]
        self._offsets = [np.asarray(batch["tokens"].offsets, np.int64) for batch in self._batches]
        self._tokens = [np.asarray(batch["tokens"].values) for batch in self._batches]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self.lengths = np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._offsets)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        batch, row = self._locate(index)
        start, end = self._offsets[batch][row : row + 2].tolist()
        mask = self._batches[batch]["loss_mask"].values.slice(start, end - start)
        return Example(self._tokens[batch][start:end], mask.to_numpy(zero_copy_only=False))

    def source(self, index: int) -> str:
        """Where the example is from: its row's `source`."""
        batch, row = self._locate(index)
        return self._batches[batch]["source"][row].as_py()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is not there: the last of them is {len(self) - 1}")
        batch = int(np.searchsorted(self._ends, index, side="right"))
        return batch, int(index - self._ends[batch] + self._batches[batch].num_rows)


def _open_shard(path: Path) -> list[pa.RecordBatch]:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_batches()
    except (OSError, pa.ArrowException) as error:
        told = f"{path} cannot be read ({' '.join(str(error).split())[:200]})"
        raise ValueError(f"{told}: build its folder again with `memphis data`") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a built folder. Raises ValueError for a folder without a whole one."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: build it with `memphis data --config FILE --out {folder}`"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): delete {folder}, build it again") from None
    found = manifest if isinstance(manifest, dict) else {}
    if missing := [name for name in IN_MANIFEST if name not in found]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so `memphis data` did not write it: delete "
            f"{folder}, build it again"
        )
    return found


def open_built(folder: Path) -> tuple[ArrowExamples, dict[str, Any]]:
    """(examples, manifest) of a built folder, in the order in which they were built.

    Nothing is read through: see `check_built`.
    """
    manifest = read_manifest(folder)
    shards = [name for one in manifest["data_sets"].values() for name in one["shards"]]
    return ArrowExamples([folder / name for name in shards]), manifest


def check_built(folder: Path, tokenizer: Path, seq_len: int) -> None:
    """Raises ValueError unless the shards of a built folder are whole and fit this training.

    They must be of the same tokenizer.json and EOS, and of the same `seq_len`: for another one,
    other examples would have been dropped.
    """
    manifest = read_manifest(folder)
    if not (folder / "sft").is_dir() or sha256_folder(folder / "sft") != manifest["sft_sha256"]:
        raise ValueError(f"{folder}/sft differs from {MANIFEST}: delete {folder}, build it again")
    inputs = manifest["inputs"]
    tokens = (sha256_file(tokenizer / "tokenizer.json"), load_tokenizer(tokenizer)[1])
    if tokens != (inputs["tokenizer_sha256"], inputs["eos_id"]):
        raise ValueError(f"{folder} was built with another tokenizer than that in {tokenizer}")
    if (built := inputs["seq_len"]) != seq_len:
        raise ValueError(f"{folder} was built for sft.seq_len = {built}, but it is {seq_len} now")
