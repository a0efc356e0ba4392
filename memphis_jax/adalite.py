"""Adalite, version 1 (31 January 2024): the optimizer Memphis was trained with, for optax.

A factored second moment of one number per output feature, update clipping, a trust ratio, and the
pull towards unit norm of arXiv 2103.06583: the state is under 0.1 % of the parameters. Source:
euclaise/supertrainer2000. Imports nothing of ours.

The algorithm is defined on single PyTorch tensors, whose first axis is the output feature. Here a
kernel is [in, out] and layers may be stacked [L, in, out]; `stacked` and `out_first` say so, and
every norm, mean and RMS is taken per layer, the row statistic per output feature.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# One value for all leaves, a pytree (prefix) of values, or a function params -> such a pytree.
PerLeaf = Any | Callable[[optax.Params], Any]


class ScaleByAdaliteState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32 scalar, steps taken
    second_moment: optax.Params  # per leaf: float32 [stack..., out], or [stack...] for a vector
    momentum: optax.Params | None  # like the parameters; None where momentum is 0


class _Axes(NamedTuple):
    tensor: tuple[int, ...]  # axes of one tensor, that is, all but the stacking ones
    reduced: tuple[int, ...]  # the same without the output feature


def _axes(ndim: int, stacked: int, out_first: bool) -> _Axes:
    tensor = tuple(range(min(int(stacked), ndim), ndim))
    if len(tensor) <= 1:  # a vector: PyTorch's mean over no axis is the mean over everything
        return _Axes(tensor, tensor)
    out = tensor[0] if out_first else tensor[-1]
    return _Axes(tensor, tuple(axis for axis in tensor if axis != out))


def _flatten(params: optax.Params) -> tuple[list[jax.Array], Any]:
    return jax.tree.flatten(params)


def _leaf_axes(params: optax.Params, stacked: PerLeaf, out_first: PerLeaf) -> list[_Axes]:
    def per_leaf(value: PerLeaf) -> list[Any]:
        prefix = value(params) if callable(value) else value
        full = jax.tree.map(lambda v, sub: jax.tree.map(lambda _: v, sub), prefix, params)
        return jax.tree.leaves(full)

    leaves = jax.tree.leaves(params)
    flags = zip(leaves, per_leaf(stacked), per_leaf(out_first), strict=True)
    return [_axes(leaf.ndim, s, o) for leaf, s, o in flags]


def _direction(
    g: jax.Array,
    p: jax.Array,
    c: jax.Array,
    axes: _Axes,
    *,
    beta: jax.Array,
    eps: float,
    lambda_: float,
    centralize: bool,
) -> tuple[jax.Array, jax.Array]:
    """(m, new c) of one leaf; see `scale_by_adalite`."""
    mean = partial(jnp.mean, keepdims=True)
    g, p = g.astype(jnp.float32), p.astype(jnp.float32)
    if centralize:
        g = g - mean(g, axis=axes.reduced)
    u = (1.0 - beta) * jnp.square(g) + beta * jnp.expand_dims(c, axes.reduced) + eps
    m = g * jax.lax.rsqrt(u)
    m = m / jnp.maximum(1.0, jnp.sqrt(mean(jnp.square(m), axis=axes.tensor)))
    p_norm = jnp.sqrt(jnp.sum(jnp.square(p), axis=axes.tensor, keepdims=True))
    g_norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=axes.tensor, keepdims=True))
    usable = (p_norm > 0) & (g_norm > 0)
    trusted = m * (p_norm / jnp.where(usable, g_norm, 1.0))
    pull = lambda_ * (p - p / jnp.where(usable, p_norm, 1.0))
    return jnp.where(usable, trusted + pull, m), u.mean(axes.reduced)


def scale_by_adalite(
    *,
    eps: float = 1e-5,
    lambda_: float = 0.01,
    beta_decay: float = 0.8,
    centralize: bool = True,
    momentum: float = 0.0,
    stacked: PerLeaf = 0,
    out_first: PerLeaf = False,
) -> optax.GradientTransformation:
    """Adalite's direction m, which `adalite` multiplies by -learning_rate.

    For step t = 1, 2, ... and one tensor p with gradient g:

      g <- g - mean(g)                                over all axes but the output's (centralize)
      u  = (1 - beta) g^2 + beta c + eps,             beta = 1 - t^(-beta_decay)
      c <- mean(u)                                    over all axes but the output's
      m  = g / sqrt(u);  m <- m / max(1, rms(m))      rms over the tensor
      m <- m ||p|| / ||g|| + lambda_ (p - p / ||p||)  unless a norm is zero
      m <- momentum * buffer + (1 - momentum) m       where momentum > 0; also the new buffer

    A vector counts as one output feature. For gradients far below sqrt(eps) the first m has length
    ||p|| / sqrt(eps): a fresh state takes large steps.

    Args:
      eps: added to the second moment.
      lambda_: weight of the pull towards unit norm.
      beta_decay: exponent of the second moment's growing memory.
      centralize: subtract each output feature's mean gradient.
      momentum: 0 keeps no buffer.
      stacked: how many leading axes index separate tensors (True = 1). One number for all leaves, a
        pytree or prefix of one, or a function params -> such a pytree.
      out_first: True for a leaf stored [out, in], such as an embedding [V, D]; the same forms.

    Returns:
      A GradientTransformation whose `update` needs `params` (ValueError without). Arithmetic and
      state are float32.
    """

    def init(params: optax.Params) -> ScaleByAdaliteState:
        leaves, treedef = _flatten(params)
        axes = _leaf_axes(params, stacked, out_first)
        pairs = zip(leaves, axes, strict=True)
        moments = [jnp.zeros_like(p, jnp.float32).mean(a.reduced) for p, a in pairs]
        buffers = optax.tree.zeros_like(params, dtype=jnp.float32) if momentum > 0 else None
        return ScaleByAdaliteState(jnp.zeros([], jnp.int32), treedef.unflatten(moments), buffers)

    def update(
        updates: optax.Updates, state: ScaleByAdaliteState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdaliteState]:
        if params is None:
            raise ValueError("adalite: call update(grads, state, params), the params are missing")
        count = state.count + 1
        beta = 1.0 - count.astype(jnp.float32) ** -beta_decay
        step = partial(_direction, beta=beta, eps=eps, lambda_=lambda_, centralize=centralize)

        leaves, treedef = _flatten(params)
        gradients = treedef.flatten_up_to(updates)
        moments = treedef.flatten_up_to(state.second_moment)
        axes = _leaf_axes(params, stacked, out_first)
        results = [step(*leaf) for leaf in zip(gradients, leaves, moments, axes, strict=True)]
        directions = treedef.unflatten([m for m, _ in results])
        moments = treedef.unflatten([c for _, c in results])
        buffers = state.momentum
        if buffers is not None:
            directions = buffers = optax.tree.update_moment(directions, buffers, momentum, 1)
        return directions, ScaleByAdaliteState(count, moments, buffers)

    return optax.GradientTransformation(init, update)


def adalite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: float = 1e-5,
    lambda_: float = 0.01,
    beta_decay: float = 0.8,
    centralize: bool = True,
    momentum: float = 0.0,
    stacked: PerLeaf = 0,
    out_first: PerLeaf = False,
) -> optax.GradientTransformation:
    """The Adalite optimizer: p <- p - learning_rate * m, with m of `scale_by_adalite`.

    Args:
      learning_rate: a number or an optax schedule.
      eps, lambda_, beta_decay, centralize, momentum, stacked, out_first: see `scale_by_adalite`.
    """
    direction = scale_by_adalite(
        eps=eps,
        lambda_=lambda_,
        beta_decay=beta_decay,
        centralize=centralize,
        momentum=momentum,
        stacked=stacked,
        out_first=out_first,
    )
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))
