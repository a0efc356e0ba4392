"""What a process of `python -m benchmarks gpu` measures, and the batch that everybody gets. No jax.

Every row is one text of seq_len random tokens, so that torch may take its fast causal path; in a
rank step answers and ground truths have a row each. Axis letters: B row, T position, G group.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import workload
from memphis_jax.config import ModelConfig
from memphis_jax.data.packing import Group, pack_groups, pack_rows

MIXCE_ETA, NEFTUNE_ALPHA, RANK_WEIGHT, LEARNING_RATE = 0.75, 10.0, 5.0, 1e-6
STEPS = 5  # in one measurement
PROMPT, NEW_TOKENS = 64, 256  # of a sampled sequence
TEMPERATURE, TOP_P = 0.5, 0.8  # the card's
TINY: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


class Case(NamedTuple):
    """What a process measures; rows: groups in a rank step, sequences at once in sampling."""

    engine: str  # "ceiling", "jax", "torch", "torch compiled"
    phase: str = ""  # "sft", "rank", "sample"; "" for the ceiling
    rows: int = 0
    attention: str = ""  # jax: compute.attention
    remat: str = ""  # jax: compute.remat; torch always recomputes every layer
    tiny: bool = False

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**TINY) if self.tiny else ModelConfig()

    @property
    def seq_len(self) -> int:
        return (128 if self.phase == "sft" else 64) if self.tiny else SEQ_LEN[self.phase]

    @property
    def tokens(self) -> int:
        """Of a training step."""
        return self.rows * self.seq_len * (3 if self.phase == "rank" else 1)


SEQ_LEN = {"sft": 4096, "rank": 1024}


def batch(case: Case) -> dict[str, np.ndarray]:
    """The arrays of `data.packing`, a full row for every text: [B, T] and, for rank, [G, 2]."""
    count = case.tokens // case.seq_len
    texts = workload.examples([case.seq_len] * count, case.model.vocab_size, seed=0)
    if case.phase == "sft":
        return pack_rows([[text] for text in texts], case.seq_len)
    groups = [Group((a, b), (0, 1), gold) for a, b, gold in zip(*[iter(texts)] * 3, strict=True)]
    return pack_groups(
        groups, seq_len=case.seq_len, num_rows=count, num_groups=case.rows, num_candidates=2
    )


def speed(step: Callable[[], None], finish: Callable[[], None], per_step: int) -> float:
    """`per_step` things a second over STEPS calls of `step`."""
    begun = time.perf_counter()
    for _ in range(STEPS):
        step()
    finish()
    return per_step * STEPS / (time.perf_counter() - begun)


def sampling(case: Case) -> tuple[list[list[int]], int]:
    """(a prompt of one length per row, new tokens of each)."""
    length, new_tokens = (8, 16) if case.tiny else (PROMPT, NEW_TOKENS)
    rng = np.random.default_rng(0)
    return rng.integers(2, case.model.vocab_size - 1, (case.rows, length)).tolist(), new_tokens
