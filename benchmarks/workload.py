"""The models and batches that the training benchmarks share: no jax, so that torch's side has them.

Axis letters: B row, T position, G group.
"""

from typing import Any, NamedTuple

import numpy as np

from memphis_jax.data.packing import Group, pack_groups, pack_rows, plan_rows, rows_needed
from memphis_jax.data.prompts import Example

PROMPT_SHARE = 0.3  # of an example's tokens
MIN_LENGTH = 8  # tokens


class Size(NamedTuple):
    """A model, its rows, and whether embeddings train (as in the demo; the card freezes them)."""

    shape: dict[str, Any]  # of the model, as ModelConfig names it
    rows: int  # of an SFT batch
    seq_len: int
    groups: int  # of a rank batch, a chosen and a rejected answer and the ground truth each
    mean: float  # tokens of an example
    freeze: bool
    steps: int  # in one measurement


def shape(width: int, mlp: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
    }


SIZES = {
    "demo: 64 x 3": Size(shape(64, 176, 3, 2, 512), 4, 128, 16, 42, False, 60),
    "512 x 8": Size(shape(512, 1376, 8, 8, 8192), 4, 512, 8, 100, True, 2),
    "3B's width, 2560 x 2": Size(shape(2560, 6912, 2, 32, 50304), 1, 512, 2, 100, True, 1),
}


def lengths(count: int, mean: float, cap: int, seed: int) -> list[int]:
    """Log-normal lengths in tokens, as answers have: sigma 0.7, about this mean, up to `cap`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - 0.7**2 / 2, 0.7, count)
    return np.clip(np.rint(drawn), MIN_LENGTH, cap).astype(int).tolist()


def examples(sizes: list[int], vocabulary: int, seed: int) -> list[Example]:
    """Examples of so many slots with random tokens, the prompt's not trained."""
    rng = np.random.default_rng(seed)
    made = []
    for size in sizes:
        tokens = rng.integers(2, vocabulary, size + 1).tolist()
        made.append(Example(tokens, [i > PROMPT_SHARE * size for i in range(size + 1)]))
    return made


def sft_batch(size: Size) -> dict[str, np.ndarray]:
    """The arrays of `pack_rows` [B, T]: examples packed as the trainer packs them."""
    vocabulary = size.shape["vocab_size"]
    count = round(3 * size.rows * size.seq_len / size.mean)
    sizes = lengths(count, size.mean, size.seq_len, seed=0)
    rows = plan_rows(sizes, size.seq_len, seed=0, epoch=0)
    fullest = sorted(rows, key=lambda row: -sum(sizes[i] for i in row))[: size.rows]
    made = examples(sizes, vocabulary, seed=1)
    return pack_rows([[made[i] for i in row] for row in fullest], size.seq_len)


def groups(size: Size) -> list[Group]:
    """G groups of a chosen and a rejected answer and a ground truth."""
    sizes = lengths(3 * size.groups, size.mean, size.seq_len, seed=2)
    made = examples(sizes, size.shape["vocab_size"], seed=3)
    return [Group((made[i], made[i + 1]), (0, 1), made[i + 2]) for i in range(0, len(made), 3)]


def rank_batch(size: Size) -> dict[str, np.ndarray]:
    """The arrays of `pack_groups`, packed as the trainer packs them."""
    made = groups(size)
    rows = rows_needed(made, size.seq_len)
    return pack_groups(
        made, seq_len=size.seq_len, num_rows=rows, num_groups=len(made), num_candidates=2
    )
