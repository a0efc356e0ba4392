"""Random StableLM models made by transformers, the reference that our model is held against."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import StableLmConfig, StableLmForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.5,  # of head_dim 12
}

# One entry per way in which members of the family differ.
FAMILY: dict[str, dict[str, Any]] = {
    # 3B: head_dim 80, 20 rotary dimensions, intermediate 2.7 times hidden
    "3b-ratios": {
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
    },
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1, "partial_rotary_factor": 1.0},
    "qkv-bias": {"use_qkv_bias": True},
    "qk-layernorm": {"qk_layernorm": True, "num_key_value_heads": 2},
    "parallel-residual": {"use_parallel_residual": True},
    # StableLM-2-12B has both
    "parallel-qk-layernorm": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "num_key_value_heads": 1,
    },
    "tied": {"tie_word_embeddings": True},
    "rotary-full": {"partial_rotary_factor": 1.0, "rope_theta": 500.0},
    "odd-sizes": {
        "vocab_size": 101,
        "hidden_size": 42,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "partial_rotary_factor": 0.3,  # 4 of 14
    },
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh", "use_qkv_bias": True},
}


def make_hf(folder: Path, dtype: str = "float32", shard: str = "5GB", **options: Any) -> Any:
    """Saves a random model in `folder` and returns it, in float32 eval mode where dtype is float32.

    Weights are N(0, 1 / fan_in), so that every part moves the logits; norm scales and all biases
    are far from their initial ones and zeros.
    """
    generator = torch.Generator().manual_seed(7)
    model = StableLmForCausalLM(StableLmConfig(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def reference_logits(model: Any, tokens: Any, positions: Any = None) -> Any:
    """Logits [B, T, V] of a transformers model as a numpy array, without padding.

    The mask is given because transformers takes a jump of positions without one for a new segment.
    """
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        where = None if positions is None else torch.tensor(positions, dtype=torch.long)
        return model(
            ids, attention_mask=torch.ones_like(ids), position_ids=where, use_cache=False
        ).logits.numpy()


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Applies `change` to the dict of tensors of a one-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
