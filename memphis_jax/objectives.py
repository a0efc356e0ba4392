"""What a phase minimises and reports on one micro-batch, as {name: (sum, weight)}.

    batch -> embeddings (+ NEFTune) -> layers -> token logprobs -> sums

Imports `losses`, `neftune` and `model`. Axis letters: B row, T position, G group, R candidate.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memphis_jax import losses
from memphis_jax.model import ONE_DEVICE, Ops, StableLM
from memphis_jax.neftune import neftune_noise

Arrays = dict[str, jax.Array]
Sums = dict[str, losses.SumWeight]
SumsFn = Callable[[StableLM, Arrays, jax.Array], Sums]


def packed_logprobs(
    model: StableLM,
    batch: Arrays,
    key: jax.Array,
    *,
    neftune_alpha: float,
    dtype: str,
    remat: str,
    logprob_chunk: int,
    ops: Ops = ONE_DEVICE,
) -> jax.Array:
    """Logprob [B, T] float32 of every target of a packed batch (`data.packing.pack_rows`).

    `logprob_chunk` tokens of each device have their logits at once.
    """
    x = model.embed(batch["tokens"], dtype, ops)  # [B, T, D]
    if neftune_alpha > 0:
        x = neftune_noise(key, x, batch["segment_ids"], neftune_alpha)
    x = ops.constrain(x, "residual")
    x = model.hidden(x, batch["positions"], batch["segment_ids"], remat=remat, ops=ops)
    x = ops.constrain(x, "whole")
    chunk_size = logprob_chunk * ops.num_shards
    head = ops.constrain(model.head().astype(dtype), "head")
    return losses.token_logprobs(x, head, batch["targets"], chunk_size=chunk_size)


def sft_sums(
    model: StableLM, batch: Arrays, key: jax.Array, *, mixce_eta: float, **forward: Any
) -> Sums:
    """Losses and metrics of one SFT micro-batch: `token` is what is minimised."""
    logprobs = packed_logprobs(model, batch, key, **forward)
    return {
        "token": losses.mixce(logprobs, batch["loss_mask"], mixce_eta),
        "ce": losses.cross_entropy(logprobs, batch["loss_mask"]),
        "padding_share": _padding(batch),
    }


def rank_sums(
    model: StableLM, batch: Arrays, key: jax.Array, *, mixce_eta: float, **forward: Any
) -> Sums:
    """Of one rank micro-batch: `token` runs over ground truths, `rank_loss` over candidates."""
    logprobs = packed_logprobs(model, batch, key, **forward)
    per_segment = losses.sequence_logprobs(logprobs, batch["segment_ids"], batch["rank_mask"])
    candidates = per_segment[batch["candidate_rows"], batch["candidate_segments"]]  # [G, R]
    best, worse = batch["ranks"] == 0, batch["ranks"] > 0

    def total(where: jax.Array) -> losses.SumWeight:
        return jnp.where(where, candidates, 0.0).sum(), where.sum(dtype=jnp.float32)

    chosen, rejected = total(best), total(worse)
    pairs = (best[:, :, None] & worse[:, None, :]).astype(jnp.float32)
    gaps = candidates[:, :, None] - candidates[:, None, :]
    return {
        "token": losses.mixce(logprobs, batch["loss_mask"], mixce_eta),
        "rank_loss": losses.pro(candidates, batch["ranks"]),
        "ce": losses.cross_entropy(logprobs, batch["loss_mask"]),
        "rank_margin": ((gaps * pairs).sum(), pairs.sum()),
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
        "padding_share": _padding(batch),
    }


def _padding(batch: Arrays) -> losses.SumWeight:
    empty = batch["segment_ids"] == 0
    return empty.sum(dtype=jnp.float32), jnp.float32(empty.size)


def objective_weights(batch: Arrays) -> Arrays:
    """The weights of `token` and `rank_loss` over a whole batch [A, ...], before any forward pass.

    Dividing by them inside every micro-batch makes gradients of micro-batches plain summands.
    """
    weights = {"token": batch["loss_mask"].sum(dtype=jnp.float32)}
    if "ranks" in batch:
        weights["rank_loss"] = (batch["ranks"] >= 0).any(-1).sum(dtype=jnp.float32)
    return weights
