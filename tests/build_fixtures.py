"""A mixture to build a data folder from (a pytest plugin)."""

from pathlib import Path

import numpy as np
import pytest
from built import chat_row, cot_row

from memphis_jax.data import procedural
from memphis_jax.rounds.files import write_jsonl


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A mixture of 120 CoT rows and 60 conversations, some of them too long, and a tokenizer."""
    rng = np.random.default_rng(0)
    cot = [cot_row(rng, number, words=200 if number % 20 == 7 else 8) for number in range(120)]
    chat = [chat_row(rng, int(rng.integers(1, 4))) for _ in range(60)]
    write_jsonl(tmp_path / "cot.jsonl", cot)
    write_jsonl(tmp_path / "chat.jsonl", chat)
    texts = [text for row in cot for text in row.values()]
    tokenizer = procedural.train_tokenizer(texts, 512)
    procedural.save_tokenizer(tokenizer, tmp_path / "tokenizer")
    return tmp_path
