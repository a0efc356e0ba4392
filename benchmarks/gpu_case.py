"""What a process of `python -m benchmarks gpu` measures, and the batch that everybody gets. No jax.

Every row of a step is one text of seq_len random tokens, so that torch may take its fast causal
path; in a rank step answers and ground truths have a row each.

Axis letters: B row, T position, G group.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import workload
from memphis_jax.config import ModelConfig
from memphis_jax.data.packing import Group, pack_groups, pack_rows

MIXCE_ETA, NEFTUNE_ALPHA, RANK_WEIGHT, LEARNING_RATE = 0.75, 10.0, 5.0, 1e-6
STEPS = 3  # in one measurement
STEP_TOKENS = 65_536  # a training step has about as many, in micro-batches
ATTENTION_ROWS = 4  # of 4096, where attention alone is measured
PROMPT, NEW_TOKENS = 64, 256  # of a sampled sequence
TEMPERATURE, TOP_P = 0.5, 0.8  # the card's
TINY: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


class Case(NamedTuple):
    """What a process measures.

    rows: of a micro-batch; groups in a rank step, sequences at once in sampling, texts in each row
    where attention alone is measured.
    """

    engine: str  # "ceiling", "jax", "torch", "torch compiled"
    phase: str = ""  # "sft", "rank", "sample", "attention"; "" for the ceiling
    rows: int = 0
    remat: str = ""  # compute.remat; torch knows "full" (every layer) and "none"
    tiny: bool = False

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**TINY) if self.tiny else ModelConfig()

    @property
    def seq_len(self) -> int:
        return (64 if self.phase == "rank" else 128) if self.tiny else SEQ_LEN[self.phase]

    @property
    def micro_tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.seq_len * (3 if self.phase == "rank" else 1)

    @property
    def micro_batches(self) -> int:
        """Of a training step."""
        return 2 if self.tiny else max(1, STEP_TOKENS // self.micro_tokens)

    @property
    def tokens(self) -> int:
        """Of a training step."""
        return self.micro_batches * self.micro_tokens


SEQ_LEN = {"sft": 4096, "rank": 1024, "attention": 4096}


def batches(case: Case) -> list[dict[str, np.ndarray]]:
    """The micro-batches of a step."""
    return [batch(case, seed) for seed in range(case.micro_batches)]


def batch(case: Case, seed: int) -> dict[str, np.ndarray]:
    """The arrays of `data.packing`, a full row for every text: [B, T] and, for rank, [G, 2]."""
    count = case.micro_tokens // case.seq_len
    texts = workload.examples([case.seq_len] * count, case.model.vocab_size, seed)
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
