"""Which questions a sampler answers, as tokens: the same for every engine. No jax."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from memphis_jax.data.prompts import encode_prompt
from memphis_jax.rounds.files import read_jsonl


class Question(NamedTuple):
    id: str
    tokens: list[int]  # of the prompt; empty where the question is skipped
    skipped: str = ""  # why no answer can be sampled


def read_questions(paths: Sequence[str], limit: int, seed: int) -> list[dict[str, Any]]:
    """The questions of several files, or `limit` of them drawn by `seed`, in the files' order.

    Raises ValueError naming file and line for a broken row, one without id or prompt, or an id that
    is met twice.
    """
    questions, seen = [], set()
    for path in paths:
        for number, row in enumerate(read_jsonl(path), start=1):
            for name in ("id", "prompt"):
                if not isinstance(row.get(name), str):
                    raise ValueError(
                        f"{path}, line {number}: {name!r} must be text (`memphis data` writes "
                        f"questions with ids): {row}"[:300]
                    )
            if not _is_unicode(row["id"]):
                raise ValueError(f"{path}, line {number}: the id {row['id']!r} is no valid Unicode")
            if row["id"] in seen:
                raise ValueError(f"{path}, line {number}: the id {row['id']!r} is there twice")
            seen.add(row["id"])
            questions.append(row)
    if 0 < limit < len(questions):
        chosen = np.random.default_rng(seed).permutation(len(questions))[:limit]
        questions = [questions[i] for i in sorted(chosen)]
    return questions


def _is_unicode(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which JSON can spell and no file can hold."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def encode_questions(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, max_new_tokens: int, context: int
) -> list[Question]:
    """Prompts as tokens. What cannot be answered within `context` tokens says why, and is kept.

    Raises ValueError where none can be answered.
    """
    questions: list[Question] = []
    for row in rows:
        try:
            tokens = encode_prompt(tokenizer, row["prompt"])
        except ValueError as error:
            questions.append(Question(row["id"], [], str(error)))
            continue
        if len(tokens) + max_new_tokens > context:
            why = (
                f"prompt of {len(tokens)} tokens + {max_new_tokens} new ones exceed the context "
                f"of {context}"
            )
            questions.append(Question(row["id"], [], why))
        else:
            questions.append(Question(row["id"], tokens))
    if questions and all(question.skipped for question in questions):
        raise ValueError(
            f"none of the {len(questions)} questions can be answered; {questions[0].id}: "
            f"{questions[0].skipped}"
        )
    return questions


def prompts_sha256(questions: Sequence[Question]) -> str:
    """Hash of ids and prompts, so that answers to other questions are told apart."""
    prompts = json.dumps([[q.id, q.tokens] for q in questions])
    return hashlib.sha256(prompts.encode()).hexdigest()


def row_number(question_id: str) -> int:
    """A number in [0, 2^32) of a question for its random draws, whatever else is sampled."""
    return zlib.crc32(question_id.encode())


def rescored(questions: Sequence[Question], num_samples: int, limit: int) -> set[tuple[str, int]]:
    """(id, sample) of the completions whose logprobs are kept: `limit`, spread over all rows."""
    rows = [(q.id, k) for q in questions if not q.skipped for k in range(num_samples)]
    rows.sort(key=lambda row: (zlib.crc32(f"rescore/{row[0]}/{row[1]}".encode()), row))
    return set(rows[:limit])
