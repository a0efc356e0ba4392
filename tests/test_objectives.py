"""What must not change the loss or any gradient: packing, order, accumulation, remat, chunks.

The reference runs the examples unpacked, one per row, from full logits without segment ids, and
writes the losses out plainly. Every variant is held against it; variants are combined, since each
costs a compilation.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import assert_close, named_leaves, random_example, random_group, tiny_model
from reference_models import make_hf

from convert import load_hf
from memphis_jax.data.packing import Group, pack_groups, pack_rows
from memphis_jax.data.prompts import Example
from memphis_jax.layers import QUERY_CHUNK
from memphis_jax.model import ONE_DEVICE, Ops, StableLM
from memphis_jax.objectives import rank_sums, sft_sums
from memphis_jax.optimizer import is_embedding, partition
from memphis_jax.sharding import ACTIVATIONS
from memphis_jax.train_step import loss_and_gradients

pytestmark = pytest.mark.slow  # compiles much; `make check` leaves it out

ETA, RANK_WEIGHT = 0.75, 5.0
FORWARD: dict[str, Any] = {
    "mixce_eta": ETA,
    "neftune_alpha": 0.0,
    "dtype": "float32",
    "remat": "none",
    "logprob_chunk": 10_000,
}
SEQ_LEN = 300
LENGTHS = (100, 61, 130, 7)  # tokens; the second and third span edges of attention's query chunks
GROUP_LENGTHS = ((60, 90, 41), (150, 5, 33), (9, 2, 30))  # chosen, rejected, ground truth


def sft_examples() -> list[Example]:
    rng = np.random.default_rng(5)
    return [random_example(rng, length) for length in LENGTHS]


def rank_groups() -> list[Group]:
    rng = np.random.default_rng(6)
    return [random_group(rng, lengths) for lengths in GROUP_LENGTHS]


def pack_sft(rows: Sequence[Sequence[int]], seq_len: int = SEQ_LEN) -> dict[str, np.ndarray]:
    examples = sft_examples()
    return pack_rows([[examples[index] for index in row] for row in rows], seq_len)


def pack_rank(groups: Sequence[Group], num_rows: int, seq_len: int = SEQ_LEN) -> Any:
    """With a filler group and a third candidate that is padding."""
    return pack_groups(groups, seq_len=seq_len, num_rows=num_rows, num_groups=4, num_candidates=3)


def micro_batches(*batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[A, ...] of batches of one shape."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def coefficients(rank: bool) -> dict[str, float]:
    return {"token": 1.0, **({"rank_loss": RANK_WEIGHT} if rank else {})}


@cache
def compiled(rank: bool, **changes: Any) -> Any:
    sums_fn = partial(rank_sums if rank else sft_sums, **{**FORWARD, **changes})
    return jax.jit(partial(loss_and_gradients, sums_fn=sums_fn, coefficients=coefficients(rank)))


def derive(model: StableLM, batch: Any, *, frozen: bool = False, **changes: Any) -> Any:
    """{"loss", "gradients"} of a batch [A, ...], as a training step computes them."""
    rank = "ranks" in batch
    parts = partition(model, is_embedding if frozen else lambda _: False)
    sums, gradients = compiled(rank, **changes)(*parts, batch, jax.random.key(0))
    loss = sum(c * sums[name][0] / sums[name][1] for name, c in coefficients(rank).items())
    return {"loss": loss, "gradients": gradients}


def alone(model: StableLM, examples: Sequence[Example]) -> list[jax.Array]:
    """Logprobs of the trained tokens of each example, from plain causal logits."""
    tokens = np.zeros((len(examples), max(len(example.tokens) for example in examples)), np.int32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens  # what follows cannot reach back
    logprobs = jax.nn.log_softmax(model.logits(jnp.asarray(tokens[:, :-1])))
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    trained = [np.flatnonzero(example.loss_mask[1:]) for example in examples]
    return [chosen[row, where] for row, where in enumerate(trained)]


def mixce_mean(logprobs: Sequence[jax.Array]) -> jax.Array:
    every = jnp.concatenate(logprobs)
    return -((ETA + (1 - ETA) * jax.lax.stop_gradient(jnp.exp(every))) * every).mean()


def sft_reference(model: StableLM) -> tuple[jax.Array, None]:
    return mixce_mean(alone(model, sft_examples())), None


def rank_reference(model: StableLM) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(objective, parts by hand)"""
    groups = rank_groups()
    found = alone(model, [member for g in groups for member in (*g.candidates, g.gold)])
    chosen = jnp.stack([logprobs.mean() for logprobs in found[0::3]])
    rejected = jnp.stack([logprobs.mean() for logprobs in found[1::3]])
    gold = found[2::3]
    ranking = -jnp.log(jnp.exp(chosen) / (jnp.exp(chosen) + jnp.exp(rejected))).mean()
    parts = {
        "rank_loss": ranking,
        "chosen_logprob": chosen.mean(),
        "rejected_logprob": rejected.mean(),
        "rank_margin": (chosen - rejected).mean(),
        "ce": -jnp.concatenate(gold).mean(),
        "token": mixce_mean(gold),
    }
    return mixce_mean(gold) + RANK_WEIGHT * ranking, parts


def reference(function: Any, model: StableLM) -> Any:
    (loss, parts), gradients = jax.jit(jax.value_and_grad(function, has_aux=True))(model)
    return {"loss": loss, "gradients": gradients}, parts


@pytest.fixture(scope="module")
def model() -> StableLM:
    return tiny_model()


@pytest.fixture(scope="module")
def sft_expected(model: StableLM) -> Any:
    return reference(sft_reference, model)[0]


@pytest.fixture(scope="module")
def rank_both(model: StableLM) -> Any:
    return reference(rank_reference, model)


@pytest.fixture(scope="module")
def rank_expected(rank_both: Any) -> Any:
    return rank_both[0]


ONE_ROW = [[0, 1, 2, 3], [], [], []]


@pytest.mark.parametrize(
    "rows",
    [ONE_ROW, [[3, 2, 0, 1], [], [], []], [[0], [1], [2], [3]], [[2], [], [1, 3, 0], []]],
    ids=["one row", "other order", "unpacked", "two rows"],
)
def test_packed_sft_is_unpacked_sft(model: StableLM, sft_expected: Any, rows: Any) -> None:
    batch = pack_sft(rows)
    if rows is ONE_ROW:
        ids = batch["segment_ids"][0]
        for edge in (QUERY_CHUNK, 2 * QUERY_CHUNK):
            assert ids[edge - 1] == ids[edge] > 0, "a segment spans the edge"
    assert_close(derive(model, micro_batches(batch)), sft_expected)


def test_remat_chunks_of_seven_and_frozen_embeddings(model: StableLM, sft_expected: Any) -> None:
    """No gradient leaf for the embedding and the head; the others are what they were."""
    batch = micro_batches(pack_sft(ONE_ROW))
    ours = derive(model, batch, frozen=True, remat="full", logprob_chunk=7)
    named = named_leaves(ours["gradients"])
    assert named.keys() == named_leaves(model).keys() - {"embed_tokens", "lm_head/kernel"}
    every = named_leaves(sft_expected["gradients"])
    assert_close(named, {name: every[name] for name in named})
    assert_close(ours["loss"], sft_expected["loss"])


def test_four_sft_micro_batches_in_chunks_of_one(model: StableLM, sft_expected: Any) -> None:
    """Unequal token counts; the last micro-batch is all padding."""
    parts = [pack_sft(rows) for rows in ([[0, 3]], [[1]], [[2]], [[]])]
    assert_close(derive(model, micro_batches(*parts), logprob_chunk=1), sft_expected)


def test_packed_ranking_is_unpacked_ranking(model: StableLM, rank_expected: Any) -> None:
    assert_close(derive(model, micro_batches(pack_rank(rank_groups(), 2))), rank_expected)


def test_order_of_groups_is_free(model: StableLM, rank_expected: Any) -> None:
    assert_close(derive(model, micro_batches(pack_rank(rank_groups()[::-1], 2))), rank_expected)


def test_ranking_in_short_rows_with_remat_and_chunks_of_one(
    model: StableLM, rank_expected: Any
) -> None:
    """Other neighbours, and rows of padding."""
    batch = pack_rank(rank_groups(), 5, seq_len=149)
    assert not batch["segment_ids"][-1].any()
    ours = derive(model, micro_batches(batch), remat="full", logprob_chunk=1)
    assert_close(ours, rank_expected)


def test_four_rank_micro_batches_in_chunks_of_seven(model: StableLM, rank_expected: Any) -> None:
    """Unequal group counts; two micro-batches hold filler groups alone."""
    first, second, third = rank_groups()
    parts = [pack_rank(groups, 2) for groups in ([first, third], [second], [], [])]
    assert_close(derive(model, micro_batches(*parts), logprob_chunk=7), rank_expected)


def test_reported_parts_of_a_rank_batch(model: StableLM, rank_both: Any) -> None:
    parts = partition(model, lambda _: False)
    batch = micro_batches(pack_rank(rank_groups(), 2))
    sums, _ = compiled(True)(*parts, batch, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    values = {name: total / weight for name, (total, weight) in sums.items()}
    used = sum(length - 1 for lengths in GROUP_LENGTHS for length in lengths)
    assert float(values.pop("padding_share")) == pytest.approx(1 - used / (2 * SEQ_LEN))
    assert_close(values, rank_both[1])


def test_noise_and_bfloat16_move_the_loss_a_little(model: StableLM, sft_expected: Any) -> None:
    exact = float(sft_expected["loss"])
    for change in ({"neftune_alpha": 5.0}, {"dtype": "bfloat16"}):
        run = jax.jit(partial(sft_sums, **{**FORWARD, **change}))
        total, weight = run(model, pack_sft(ONE_ROW), jax.random.key(0))["token"]
        assert total.dtype == weight.dtype == jnp.float32
        assert 1e-5 < abs(float(total / weight) / exact - 1) < 0.1, change


def test_a_meshs_lookup_kernel_and_layouts_are_used(model: StableLM) -> None:
    used: set[str] = set()

    def noting(name: str, function: Any) -> Any:
        return lambda *args: used.add(name) or function(*args)

    ops = Ops(
        lookup=noting("lookup", ONE_DEVICE.lookup),
        attention=noting("attention", ONE_DEVICE.attention),
        constrain=lambda x, kind: used.add(kind) or x,
    )
    run = partial(sft_sums, **FORWARD, ops=ops)
    jax.eval_shape(run, model, pack_sft(ONE_ROW), jax.random.key(0))
    assert used == {"lookup", "attention", *ACTIVATIONS}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_remat_reaches_the_layers(model: StableLM, remat: str) -> None:
    run = partial(sft_sums, **{**FORWARD, "remat": remat})
    program = jax.make_jaxpr(run)(model, pack_sft(ONE_ROW), jax.random.key(0))
    assert ("prevent_cse" in str(program)) == (remat == "full")


# HF's name -> ours; a matrix of theirs is [out, in].
TORCH_NAMES = {
    "model.embed_tokens.weight": "embed_tokens",
    "model.norm.bias": "norm/bias",
    "lm_head.weight": "lm_head/kernel",
    "self_attn.q_proj.weight": "layers/self_attn/q_proj/kernel",
    "self_attn.k_proj.weight": "layers/self_attn/k_proj/kernel",
    "self_attn.v_proj.bias": "layers/self_attn/v_proj/bias",
    "self_attn.o_proj.weight": "layers/self_attn/o_proj/kernel",
    "mlp.gate_proj.weight": "layers/mlp/gate_proj/kernel",
    "mlp.down_proj.weight": "layers/mlp/down_proj/kernel",
    "input_layernorm.weight": "layers/input_layernorm/scale",
    "post_attention_layernorm.bias": "layers/post_attention_layernorm/bias",
}


def test_loss_and_gradients_are_those_of_pytorch(tmp_path: Path) -> None:
    """The packed MixCE loss against transformers' model and autograd, example by example."""
    reference = make_hf(tmp_path, use_qkv_bias=True, num_key_value_heads=2)
    indices = [1, 3]
    total, count = torch.zeros([]), 0
    for example in (sft_examples()[index] for index in indices):
        tokens = torch.tensor(example.tokens, dtype=torch.long)
        where = torch.tensor(example.loss_mask[1:])
        logits = reference(tokens[None, :-1], use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0][where]
        total = total - ((ETA + (1 - ETA) * logprobs.detach().exp()) * logprobs).sum()
        count += int(where.sum())
    loss = total / count
    loss.backward()

    ours = derive(load_hf(tmp_path), micro_batches(pack_sft([indices], 100)))
    assert float(ours["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    gradients = named_leaves(ours["gradients"])
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    for hf_name, name in TORCH_NAMES.items():
        if name.startswith("layers/"):
            layers = [theirs[f"model.layers.{layer}.{hf_name}"] for layer in range(2)]
            expected = np.stack([array.T for array in layers])
        else:
            expected = theirs[hf_name] if name == "embed_tokens" else theirs[hf_name].T
        assert_close({name: gradients[name]}, {name: expected}, rtol=1e-4)
