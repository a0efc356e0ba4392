"""The one table between the leaves of our model and the tensors of Hugging Face's StableLM.

Both directions read it: from-hf asks where a tensor goes, to-hf asks what a leaf becomes. Old
stablelm_epoch checkpoints name their tensors the same way. Imports `memphis_jax.config` and
`memphis_jax.model`.
"""

from dataclasses import dataclass

import numpy as np

from memphis_jax.config import ModelConfig
from memphis_jax.model import abstract, flatten

_LAYER = "model.layers.{layer}."

# leaf -> HF tensor. The fields of the HF name are the leading axes of the leaf, in this order.
HF_NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "layers/input_layernorm/bias": _LAYER + "input_layernorm.bias",
    "layers/input_layernorm/scale": _LAYER + "input_layernorm.weight",
    "layers/mlp/down_proj/kernel": _LAYER + "mlp.down_proj.weight",
    "layers/mlp/gate_proj/kernel": _LAYER + "mlp.gate_proj.weight",
    "layers/mlp/up_proj/kernel": _LAYER + "mlp.up_proj.weight",
    "layers/post_attention_layernorm/bias": _LAYER + "post_attention_layernorm.bias",
    "layers/post_attention_layernorm/scale": _LAYER + "post_attention_layernorm.weight",
    "layers/self_attn/k_layernorm/scale": _LAYER + "self_attn.k_layernorm.norms.{head}.weight",
    "layers/self_attn/k_proj/bias": _LAYER + "self_attn.k_proj.bias",
    "layers/self_attn/k_proj/kernel": _LAYER + "self_attn.k_proj.weight",
    "layers/self_attn/o_proj/kernel": _LAYER + "self_attn.o_proj.weight",
    "layers/self_attn/q_layernorm/scale": _LAYER + "self_attn.q_layernorm.norms.{head}.weight",
    "layers/self_attn/q_proj/bias": _LAYER + "self_attn.q_proj.bias",
    "layers/self_attn/q_proj/kernel": _LAYER + "self_attn.q_proj.weight",
    "layers/self_attn/v_proj/bias": _LAYER + "self_attn.v_proj.bias",
    "layers/self_attn/v_proj/kernel": _LAYER + "self_attn.v_proj.weight",
    "lm_head/kernel": "lm_head.weight",
    "norm/bias": "model.norm.bias",
    "norm/scale": "model.norm.weight",
}

_BLOCK = 256  # rows transposed at once: 2 to 3 times as fast as numpy's copy of a whole matrix
_WORDS = 64  # of 8 bytes, of each of these rows


@dataclass(frozen=True)
class Place:
    """Where one HF tensor lives in our model: `leaf[index]`, transposed where a kernel."""

    leaf: str
    index: tuple[int, ...]  # (layer,), (layer, head) or ()
    shape: tuple[int, ...]  # of the HF tensor
    transposed: bool  # HF stores [out, in], a kernel is [in, out]


def places(config: ModelConfig) -> dict[str, Place]:
    """{HF tensor name: its place} for all tensors of a model, grouped by leaf."""
    table = {}
    for leaf, array in flatten(abstract(config)).items():
        fields = [field for field in ("layer", "head") if f"{{{field}}}" in HF_NAMES[leaf]]
        leading, rest = array.shape[: len(fields)], array.shape[len(fields) :]
        transposed = leaf.endswith("/kernel")
        shape = rest[::-1] if transposed else rest
        for index in np.ndindex(*leading):
            name = HF_NAMES[leaf].format(**dict(zip(fields, index, strict=True)))
            table[name] = Place(leaf, index, shape, transposed)
    return table


def by_leaf(table: dict[str, Place]) -> dict[str, dict[str, Place]]:
    """The same table as {leaf: {HF tensor name: its place}}."""
    leaves: dict[str, dict[str, Place]] = {}
    for name, place in table.items():
        leaves.setdefault(place.leaf, {})[name] = place
    return leaves


def transpose_into(out: np.ndarray, value: np.ndarray) -> None:
    """out [n, m] = value [m, n] transposed."""
    if value.itemsize == 2 and value.shape[1] % 4 == 0 and value.strides[1] == 2:
        return _transpose_words(out.view(np.uint16), value.view(np.uint64))
    for start in range(0, len(value), _BLOCK):
        out[:, start : start + _BLOCK] = value[start : start + _BLOCK].T


def _transpose_words(out: np.ndarray, words: np.ndarray) -> None:
    """out [4 n, m] of 2 bytes = words [m, n] of 8: they are transposed, then taken apart.

    numpy copies number by number, so that words of four are faster although they are copied twice.
    """
    part = np.empty((_WORDS, _BLOCK), np.uint64)
    for row in range(0, words.shape[0], _BLOCK):
        for word in range(0, words.shape[1], _WORDS):
            block = words[row : row + _BLOCK, word : word + _WORDS]
            turned = part[: block.shape[1], : block.shape[0]]
            turned[...] = block.T
            fours = turned.view(np.uint16).reshape(*turned.shape, 4).transpose(0, 2, 1)
            target = out[4 * word : 4 * word + 4 * len(turned), row : row + block.shape[0]]
            for index in range(4):
                target[index::4] = fours[:, index]
