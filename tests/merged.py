"""Certified HF folders of a few tensors, for the tests of merging."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from memphis_jax.config import MergeConfig
from memphis_jax.rounds.certificate import file_hashes
from memphis_jax.rounds.files import write_json

HALF = MergeConfig()
MODEL = {  # enough of a config.json; the tensors need not fit it
    "model_type": "stablelm",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 64,
}
SHAPES = {
    "model.embed_tokens.weight": (61, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.norm.bias": (16,),
    "model.norm.weight": (16,),
}


def tensors(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def folder(path: Path, values: dict[str, np.ndarray], shards: int = 1, **config: Any) -> Path:
    """A certified HF folder."""
    path.mkdir(parents=True)
    names = sorted(values)
    if shards == 1:
        save_file(values, path / "model.safetensors")
    for i in range(shards if shards > 1 else 0):
        part = {name: values[name] for name in names[i::shards]}
        save_file(part, path / f"model-{i + 1:05}-of-{shards:05}.safetensors")
    (path / "config.json").write_text(json.dumps(MODEL | config))
    vocabulary = {"a": 0, "b": 1}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    certify(path)
    return path


def certify(path: Path) -> None:
    source = {"checkpoint": f"/runs/{path.name}", "step": 3, "sha256": "5" * 64}
    (path / "conversion.json").unlink(missing_ok=True)
    write_json(path / "conversion.json", {"files": file_hashes(path), "source": source})


def read(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found
