"""Tiny models, random examples and comparisons that several test modules share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memphis_jax.config import ModelConfig
from memphis_jax.data.packing import Group
from memphis_jax.data.prompts import Example
from memphis_jax.model import StableLM, abstract, leaf_name

GOLDEN = Path(__file__).parent / "golden"

# Every optional part that has parameters is in it.
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,  # 2 of 4
    "max_position_embeddings": 512,
    "use_qkv_bias": True,
    "qk_layernorm": True,
}


def tiny_model(seed: int = 0, **options: Any) -> StableLM:
    """A random model in which every leaf matters, norm scales and biases too."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, "float32")
        return jnp.asarray(1 + 0.2 * noise if leaf_name(path).endswith("scale") else 0.3 * noise)

    model = abstract(ModelConfig(**{**TINY, **options}))  # quicker than compiling the initialiser
    return jax.tree_util.tree_map_with_path(draw, model)


def random_example(rng: np.random.Generator, length: int, vocab_size: int = 61) -> Example:
    """`length` tokens, about the first third of them a prompt without loss."""
    tokens = rng.integers(0, vocab_size, length).astype(np.int32)
    return Example(tokens, np.arange(length) >= max(1, length // 3))


def random_group(rng: np.random.Generator, lengths: Sequence[int]) -> Group:
    """Candidates of the given lengths, ranked in this order, and a ground truth of the last."""
    *candidates, gold = (random_example(rng, length) for length in lengths)
    return Group(tuple(candidates), tuple(range(len(candidates))), gold)


def logged(workdir: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    clocked = ("tokens_per_second", "tflops_per_device")
    return [{name: row[name] for name in row if name not in clocked} for row in rows]


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """{leaf name: numpy array} of any pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Trees of equal names; each leaf's largest difference is within `rtol` of its largest value.

    An expected leaf of zeros would prove nothing and fails.
    """
    left, right = named_leaves(actual), named_leaves(expected)
    assert left.keys() == right.keys()
    for name, wanted in right.items():
        assert left[name].shape == wanted.shape, name
        size = np.abs(wanted).max()
        assert 0 < size < np.inf, f"{name}: nothing to compare with"
        error = np.abs(left[name] - wanted).max() / size
        assert error <= rtol, f"{name}: relative error {error:.1e}"


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Trees of equal names, shapes, dtypes and bytes."""
    left, right = named_leaves(actual), named_leaves(expected)
    assert left.keys() == right.keys()
    for name, wanted in right.items():
        assert left[name].dtype == wanted.dtype, name
        assert left[name].shape == wanted.shape, name
        assert left[name].tobytes() == wanted.tobytes(), name


def copied(tree: Any) -> Any:
    """Arrays of one's own, to hand to a function that donates them."""
    return jax.tree.map(jnp.array, tree)
