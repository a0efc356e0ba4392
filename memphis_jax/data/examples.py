"""Files of rows -> token examples: what `memphis train` reads. No jax.

Over-long rows are dropped and counted, as the original does, never cut.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from memphis_jax.data.packing import Group
from memphis_jax.data.prompts import Example, cot_completion, encode_cot
from memphis_jax.rounds.files import read_jsonl

Row = dict[str, Any]
Item = TypeVar("Item")


def read_cot_examples(
    path: str | Path, tokenizer: Tokenizer, eos_id: int, seq_len: int
) -> tuple[list[Example], Counter[str]]:
    """Rows {prompt, rationale, target} -> (examples, why rows were dropped: reason -> count)."""

    def encode(row: Row) -> Example:
        completion = cot_completion(row["rationale"], row["target"])
        return encode_cot(tokenizer, row["prompt"], completion, eos_id)

    return _encode_rows(read_jsonl(path), encode, lambda example: [example], seq_len)


def read_groups(
    path: str | Path, tokenizer: Tokenizer, eos_id: int, seq_len: int
) -> tuple[list[Group], Counter[str]]:
    """Rows {prompt, chosen, rejected, gold} of pairs.jsonl -> (groups, why rows were dropped)."""

    def encode(row: Row) -> Group:
        chosen, rejected, gold = (
            encode_cot(tokenizer, row["prompt"], row[name], eos_id)
            for name in ("chosen", "rejected", "gold")
        )
        return Group(candidates=(chosen, rejected), ranks=(0, 1), gold=gold)

    def members(group: Group) -> list[Example]:
        return [*group.candidates, group.gold]

    return _encode_rows(read_jsonl(path), encode, members, seq_len)


def _encode_rows(
    rows: Iterable[Row],
    encode: Callable[[Row], Item],
    members: Callable[[Item], list[Example]],
    seq_len: int,
) -> tuple[list[Item], Counter[str]]:
    kept: list[Item] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            item = encode(row)
        except KeyError as missing:
            raise ValueError(f"row {row.get('id', '')!r} has no field {missing}: {row}") from None
        except ValueError as error:
            dropped[str(error)] += 1
            continue
        # An example of n tokens fills n - 1 slots: the last token is only a target.
        if max(len(example.tokens) for example in members(item)) > seq_len + 1:
            dropped[f"longer than seq_len = {seq_len} tokens"] += 1
        else:
            kept.append(item)
    return kept, dropped
