"""The shape of a model, from and to a Hugging Face config.json. Imports `fields` only."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memphis_jax.fields import build, one_of, positive, require

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a StableLM, in the names of Hugging Face's StableLmConfig (same defaults)."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.25  # share of each head's dimensions that is rotated
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 0

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        positive(self, "layer_norm_eps", "rope_theta", "initializer_range")
        one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size = {self.hidden_size} is not divisible by "
            f"num_attention_heads = {self.num_attention_heads}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} is not divisible by "
            f"num_key_value_heads = {self.num_key_value_heads}",
        )
        require(
            self.partial_rotary_factor <= 1 and self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"partial_rotary_factor = {self.partial_rotary_factor} of head_dim = {self.head_dim} "
            f"gives {self.rotary_dim} rotary dimensions: an even number greater than 0 is needed",
        )
        require(
            0 <= self.eos_token_id < self.vocab_size,
            f"eos_token_id = {self.eos_token_id} is outside the vocabulary of {self.vocab_size}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face config.json, of model_type stablelm or the old stablelm_epoch.

        Raises ConfigError naming the field for anything that this model does not compute: another
        model_type or activation, RoPE scaling, dropout, quantisation.
        """
        one_of("model_type", hf.get("model_type"), ("stablelm", "stablelm_epoch"))
        _refuse_unsupported(hf)
        values = {f.name: hf[f.name] for f in dataclasses.fields(cls) if hf.get(f.name) is not None}
        renamed = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
        values |= {new: hf[old] for old, new in renamed.items() if hf.get(old) is not None}
        rope = hf.get("rope_parameters") or {}
        values |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        values.setdefault("num_key_value_heads", values.get("num_attention_heads", 32))
        aliases = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
        if isinstance(act := values.get("hidden_act"), str):
            values["hidden_act"] = aliases.get(act, act)
        if isinstance(eos := values.get("eos_token_id"), list):
            values["eos_token_id"] = eos[0] if eos else None
        config = build(cls, values, "config.json")
        require(
            hf.get("head_dim") in (None, config.head_dim),
            f"head_dim = {hf.get('head_dim')!r} is not hidden_size / num_attention_heads = "
            f"{config.head_dim}",
        )
        return config

    def to_hf(self) -> dict[str, Any]:
        """config.json for transformers (4.38 or later: model_type stablelm) and for vLLM."""
        rope = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        return {
            "architectures": ["StableLmForCausalLM"],
            "model_type": "stablelm",
            **dataclasses.asdict(self),
            "rope_parameters": {"rope_type": "default", **rope},
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cache": True,
        }


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    for name in ("hidden_dropout", "attention_dropout"):
        value = hf.get(name) or 0.0
        require(value == 0, f"{name} = {value}: dropout is not supported, set it to 0")
    for name in ("rope_scaling", "quantization_config"):
        require(not hf.get(name), f"{name} = {hf.get(name)!r} is not supported, remove it")
    rope = hf.get("rope_parameters") or {}
    require(isinstance(rope, Mapping), f"rope_parameters = {rope!r} must be a section with fields")
    rope_type = rope.get("rope_type", "default")
    require(
        rope_type == "default",
        f"rope_parameters.rope_type = {rope_type!r} is not supported: only 'default' (no scaling)",
    )
    factor = hf.get("rotary_scaling_factor")
    require(factor in (None, 1), f"rotary_scaling_factor = {factor!r} is not supported, only 1.0")
