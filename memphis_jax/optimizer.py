"""Schedule, freezing and the optax chain. Imports `memphis_jax.config` only.

The chain gives update *directions*; the trainer multiplies them by -learning_rate(step). So one
phase's optimizer statistics can be carried into the next, whose schedule starts anew.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memphis_jax.adalite import scale_by_adalite
from memphis_jax.config import OptimizerConfig

EMBEDDINGS = ("embed_tokens", "lm_head")


def cosine_schedule(peak: float, num_steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warmup over round(warmup_ratio * num_steps) steps, then cosine decay to 0.

    Step s counts from 0. The warmup reaches `peak` at its last step, and its first step is not
    wasted at 0; with w warmup steps and N = num_steps:
      s < w:  peak (s + 1) / w;      s >= w:  peak (1 + cos(pi (s - w + 1) / (N - w + 1))) / 2
    """
    warmup = round(warmup_ratio * num_steps)

    def schedule(step: jax.Array) -> jax.Array:
        progress = (step - warmup + 1) / (num_steps - warmup + 1)
        decayed = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return peak * jnp.where(step < warmup, (step + 1) / max(warmup, 1), decayed)

    return schedule


def partition(model: Any, frozen: Callable[[str], bool]) -> tuple[Any, Any]:
    """(trainable, frozen) trees of the model's structure, None where the other one has the leaf.

    Differentiating with respect to the first computes no gradient for the second.
    """
    names = jax.tree_util.tree_map_with_path(lambda path, _: frozen(_name(path)), model)
    trainable = jax.tree.map(lambda freeze, leaf: None if freeze else leaf, names, model)
    rest = jax.tree.map(lambda freeze, leaf: leaf if freeze else None, names, model)
    return trainable, rest


def combine(trainable: Any, frozen: Any) -> Any:
    """Inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )


def is_embedding(name: str) -> bool:
    """Whether a leaf belongs to the input embedding or the output head."""
    return name.split("/")[0] in EMBEDDINGS


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping (if any) and the direction of Adalite or AdamW, without the learning rate."""
    if config.name == "adalite":
        direction = scale_by_adalite(
            eps=config.eps,
            lambda_=config.lambda_,
            beta_decay=config.beta_decay,
            centralize=config.centralize,
            momentum=config.momentum,
            stacked=_stacking_axes,
            out_first=_is_out_first,
        )
    else:
        direction = optax.chain(
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.adam_eps),
            optax.add_decayed_weights(config.weight_decay),
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, direction)


def _stacking_axes(params: Any) -> Any:
    """Layers are stacked; the norms of qk_layernorm are stacked once more, by head."""

    def axes(path: tuple[Any, ...], _: Any) -> int:
        if not (name := _name(path)).startswith("layers/"):
            return 0
        return 2 if "q_layernorm" in name or "k_layernorm" in name else 1

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_out_first(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) == "embed_tokens", params)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
