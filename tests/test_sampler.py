"""The sampler against transformers' generate, sorted top-p, and exact distributions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import tiny_model
from reference_models import make_hf
from scipy import stats

from convert import load_hf
from memphis_jax import sampler
from memphis_jax.decode import sample_tokens, top_p_mask
from memphis_jax.model import StableLM
from memphis_jax.pool import Pool
from memphis_jax.sampler import Completion, row_keys, sample

pytestmark = pytest.mark.slow  # compiles much; `make check` leaves it out

NEVER = 10_000  # an EOS outside the vocabulary


def prompts_of(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size - 1, length).tolist() for length in lengths]


def draw(model: StableLM, prompts: Sequence[Sequence[int]], **changes: Any) -> list[Completion]:
    options: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 20,
        "eos_id": NEVER,
        "batch_size": len(prompts),
        **changes,
    }
    keys = options.pop("keys", None)
    keys = row_keys(0, [(i, 0) for i in range(len(prompts))]) if keys is None else keys
    return sample(model, prompts, keys, **options)


def generate(reference: Any, prompt: list[int], number: int, eos_id: int) -> list[int]:
    """What transformers adds to one prompt, alone in its batch, greedily."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=number,
            eos_token_id=eos_id,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


FAMILY = {
    "plain": {},
    "gqa-qk-layernorm": {"num_key_value_heads": 2, "qk_layernorm": True, "use_qkv_bias": True},
}
LENGTHS = (1, 2, 3, 5, 8, 11, 13, 17, 20, 23, 29, 31, 32, 33, 37, 41, 47, 53, 64, 65)


@pytest.mark.parametrize("name", FAMILY)
def test_greedy_is_that_of_transformers_with_eos(name: str, tmp_path: Path) -> None:
    reference = make_hf(tmp_path, **FAMILY[name])
    model = load_hf(tmp_path)
    prompts = prompts_of(LENGTHS, 97)
    free = [generate(reference, prompt, 24, NEVER) for prompt in prompts]
    ours = draw(model, prompts, max_new_tokens=24)
    assert [done.tokens for done in ours] == free
    assert {done.finish_reason for done in ours} == {"length"}

    # The EOS that ends rows at the most different places.
    eos_id = max(
        range(97), key=lambda token: len({row.index(token) for row in free if token in row})
    )
    stopped = [generate(reference, prompt, 24, eos_id) for prompt in prompts]
    ours = draw(model, prompts, max_new_tokens=24, eos_id=eos_id)
    for done, tokens in zip(ours, stopped, strict=True):
        ended = tokens[-1] == eos_id
        assert done.tokens == (tokens[:-1] if ended else tokens)
        assert done.finish_reason == ("stop" if ended else "length")
    lengths = {len(done.tokens) for done in ours}
    assert len(lengths) > 3
    assert 24 in lengths


@pytest.fixture(scope="module")
def model() -> StableLM:
    return tiny_model(vocab_size=97)


def test_rows_do_not_depend_on_their_batch(model: StableLM) -> None:
    prompts = prompts_of((3, 40, 7, 1, 33, 12, 5), 97)
    keys = row_keys(4, [(i, i % 2) for i in range(7)])
    options: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "eos_id": 11}
    together = draw(model, prompts, keys=keys, batch_size=9, **options)
    assert len({tuple(done.tokens) for done in together}) == 7
    for batch_size in (1, 3):
        assert draw(model, prompts, keys=keys, batch_size=batch_size, **options) == together
    order = [5, 2, 0, 6, 1, 4, 3]
    shuffled = draw(model, [prompts[i] for i in order], keys=keys[order], batch_size=3, **options)
    assert shuffled == [together[i] for i in order]


def test_a_batch_that_is_halved_draws_the_same(
    model: StableLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of 3 to 100 tokens: rows and pages move while the batch runs empty.

    Blocks are of 4 tokens then, as a model is a large one that has rows to halve; of 8 before.
    """
    prompts = prompts_of((1, 5, 9, 20, 33, 40, 47, 64, 65, 70, 90), 97)
    options: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.9,
        "max_new_tokens": [3, 100, 9, 17, 60, 8, 33, 5, 80, 12, 41],
        "batch_size": 8,
    }
    constant = draw(model, prompts, **options)
    sizes = []

    def fit(pool: Pool) -> Any:
        change = Pool.fit(pool)
        assert pool.block == 4
        sizes.append((pool.size, pool.num_pages))
        return change

    monkeypatch.setattr(sampler, "least_rows", lambda _: 1)
    monkeypatch.setattr(sampler, "Pool", type("Watched", (Pool,), {"fit": fit}))
    assert draw(model, prompts, **options) == constant
    assert [size for size, _ in sizes] == sorted((size for size, _ in sizes), reverse=True)
    assert {8, 4, 2, 1} == {size for size, _ in sizes}
    assert len({pages for _, pages in sizes}) > 2


def test_keys_make_the_samples(model: StableLM) -> None:
    prompts = prompts_of((5,) * 6, 97)[:1] * 6
    keys = row_keys(0, [(1, 0), (1, 1), (2, 0), (2, 1), (1, 0), (1, 1)])
    done = draw(model, prompts, keys=keys, temperature=1.0)
    assert done[0] == done[4]
    assert done[1] == done[5]
    assert len({tuple(row.tokens) for row in done}) == 4
    assert draw(model, prompts, keys=row_keys(1, [(1, 0)] * 6), temperature=1.0)[0] != done[0]
    pairs = [(q, n) for q in (0, 1, 2**32 - 1) for n in range(50)]
    assert len({tuple(key) for key in row_keys(0, pairs).tolist()}) == len(pairs)


@pytest.mark.parametrize("number", [1, 15, 16, 17])
def test_max_new_tokens_is_kept_exactly(model: StableLM, number: int) -> None:
    prompts = prompts_of((4, 9), 97)
    longest = draw(model, prompts, max_new_tokens=20)
    done = draw(model, prompts, max_new_tokens=number)
    assert [row.tokens for row in done] == [row.tokens[:number] for row in longest]
    assert {row.finish_reason for row in done} == {"length"}


def test_eos_at_the_limit_counts_as_a_new_token(model: StableLM) -> None:
    """As in transformers and vLLM: n tokens and then EOS need max_new_tokens of n + 1."""
    (prompt,) = prompts_of((4,), 97)
    tokens = draw(model, [prompt], temperature=1.0)[0].tokens
    at = next(i for i in range(3, 15) if tokens[i] not in tokens[:i])
    cut, just, free = (
        draw(model, [prompt], temperature=1.0, eos_id=tokens[at], max_new_tokens=number)[0]
        for number in (at, at + 1, 20)
    )
    assert cut == Completion(tokens[:at], "length")
    assert just == free == Completion(tokens[:at], "stop")


def test_stop_text_ends_a_row(model: StableLM) -> None:
    prompts = prompts_of((4, 9, 6), 97)
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 60}
    longest = [row.tokens for row in draw(model, prompts, **options)]
    pair = longest[1][5:7]

    def stops(tokens: list[int]) -> bool:
        return pair in [tokens[i : i + 2] for i in range(len(tokens) - 1)]

    assert [stops(tokens) for tokens in longest] == [False, True, False]
    done = draw(model, prompts, stops=stops, **options)
    assert [row.finish_reason for row in done] == ["length", "stop", "length"]
    assert done[0].tokens == longest[0]
    assert done[1].tokens == longest[1][: len(done[1].tokens)]
    assert 7 <= len(done[1].tokens) < 60
    # Inside the limit it counts, though the block goes on; beyond the limit it does not.
    for number, reason in ((7, "stop"), (6, "length")):
        short = draw(model, prompts, stops=stops, temperature=1.0, max_new_tokens=number)
        assert short[1] == Completion(longest[1][:number], reason)


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        draw(tiny_model(), [[1, 2], []])


def test_a_prompt_too_long_for_the_model_is_an_error() -> None:
    model = tiny_model(max_position_embeddings=50)
    prompts = prompts_of((3, 31), 61)
    assert len(draw(model, prompts, max_new_tokens=19)[1].tokens) == 19
    with pytest.raises(ValueError, match=r"31 tokens and max_new_tokens = 20 .* = 50"):
        draw(model, prompts, max_new_tokens=20)


def test_no_prompts_give_no_completions(model: StableLM) -> None:
    assert draw(model, [], batch_size=4, keys=np.zeros((0, 2), np.uint32)) == []


def test_progress_adds_up(model: StableLM) -> None:
    told: list[tuple[int, int]] = []
    done = draw(
        model,
        prompts_of((4, 9, 6), 97),
        batch_size=2,
        on_progress=lambda *numbers: told.append(numbers),
    )
    assert sum(rows for rows, _ in told) == 3
    assert sum(tokens for _, tokens in told) == sum(len(row.tokens) for row in done)


# --- top-p


def sorted_top_p(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """By sorting, one row, in float64; ties with the last token needed are kept."""
    ordered = np.sort(probabilities.astype(np.float64))[::-1]
    needed = int(np.searchsorted(np.cumsum(ordered), top_p))
    return probabilities >= ordered[min(needed, len(ordered) - 1)]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.8, 0.95, 0.999])
def test_top_p_mask_is_that_of_sorting(top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((300, 50)) * rng.choice([0.01, 1.0, 5.0, 30.0], (300, 1))
    logits[:60] = np.round(logits[:60])  # many ties
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    mask = np.asarray(top_p_mask(jnp.asarray(probabilities), top_p))
    for row, ours in zip(probabilities, mask, strict=True):
        # float32 sums may fall on either side of top_p.
        wanted = [sorted_top_p(row, top_p * (1 + slack)).tolist() for slack in (0, 1e-6, -1e-6)]
        assert ours.tolist() in wanted


@pytest.mark.parametrize("top_p", [0.2, 0.8, 0.9999])
def test_top_p_mask_by_hand(top_p: float) -> None:
    rows = jnp.eye(5)[None, 2]
    np.testing.assert_array_equal(top_p_mask(rows, top_p), rows > 0)  # one token has it all
    uniform = jnp.full((1, 8), 0.125)
    assert top_p_mask(uniform, top_p).all()  # as probable as the last one needed
    probabilities = jnp.array([[0.1, 0.4, 0.2, 0.3]])
    kept = {0.2: [0, 1, 0, 0], 0.8: [0, 1, 1, 1], 0.9999: [1, 1, 1, 1]}[top_p]
    np.testing.assert_array_equal(top_p_mask(probabilities, top_p)[0], np.array(kept, bool))


# --- distributions

DRAWS = 40_000


def exact(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """[..., V] probabilities in float64."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    if top_p < 1:
        kept = np.apply_along_axis(sorted_top_p, -1, probabilities, top_p)
        probabilities = np.where(kept, probabilities, 0)
    return probabilities / probabilities.sum(-1, keepdims=True)


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square; cells with fewer than five expected are added up."""
    counts, expected = counts.ravel(), counts.sum() * probabilities.ravel()
    assert not counts[expected == 0].any()
    rare = expected < 5
    if expected[rare].sum() >= 5:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        counts, expected = counts[~rare], expected[~rare]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


SETTINGS = [(1.0, 1.0), (0.5, 0.8), (1.0, 0.8), (2.0, 0.95), (0.2, 1.0)]


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_single_draws_follow_the_exact_distribution(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(2).normal(0, 1.5, 12).astype(np.float32)
    keys = jnp.asarray(row_keys(3, [(i, 0) for i in range(DRAWS)]))
    tokens = sample_tokens(
        jnp.broadcast_to(logits, (DRAWS, 12)), keys, temperature=temperature, top_p=top_p
    )
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert_drawn_from(counts, exact(logits, temperature, top_p))


def test_sampled_pairs_follow_the_models_distribution() -> None:
    """Two tokens through cache, keys and batches, against the products of full logits."""
    temperature, top_p = 0.7, 0.8
    model = tiny_model(seed=3, vocab_size=13)
    prompt = [4, 0, 9, 7]
    number, size = 20_480, 13
    keys = row_keys(8, [(i // 64, i % 64) for i in range(number)])
    done = draw(
        model,
        [prompt] * number,
        keys=keys,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=2,
        eos_id=12,
        batch_size=4096,
    )
    counts = np.zeros((size, size))
    for row in done:
        assert len(row.tokens) == 2 or row.finish_reason == "stop"
        first, second = (*row.tokens, 12, 12)[:2]
        counts[first, second] += 1
    grown = jnp.asarray([[*prompt, token] for token in range(size)])
    logits = np.asarray(model.logits(grown))
    joint = exact(logits[0, 3], temperature, top_p)[:, None] * exact(
        logits[:, 4], temperature, top_p
    )
    joint[12] = np.where(np.arange(size) == 12, joint[12].sum(), 0)  # it ends there
    assert_drawn_from(counts, joint)


def test_a_token_outside_top_p_is_never_drawn() -> None:
    """Not even by the keys that fall where rounding lets a cumulative sum rise over it."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 1.5, (1, 50_304)), jnp.float32)
    probabilities = jax.nn.softmax(logits)
    allowed = top_p_mask(probabilities, 0.5)
    cumulative = np.asarray(jnp.cumsum(jnp.where(allowed, probabilities, 0.0), axis=-1))[0]
    highest = np.maximum.accumulate(cumulative)
    rises = (highest[1:] > highest[:-1]) & ~np.asarray(allowed)[0, 1:]
    keys = rng.integers(0, 2**32, (400_000, 2), dtype=np.uint32)
    thresholds = np.asarray(jax.vmap(jax.random.uniform)(keys)) * cumulative[-1]
    at = np.searchsorted(highest, thresholds, side="right")
    dangerous = keys[np.append(False, rises)[at]][:16]
    assert len(dangerous) > 0, "choose other logits: none of these keys is dangerous"
    padded = np.resize(dangerous, (16, 2))
    tokens = sample_tokens(
        jnp.repeat(logits, 16, axis=0), jnp.asarray(padded), temperature=1.0, top_p=0.5
    )
    assert allowed[0][tokens].all()


def test_the_last_of_what_is_allowed_is_drawn_where_the_sum_ends_above_it() -> None:
    """Not token 0, which many tokenizers call EOS: what argmax says of a row without a True."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 1.5, (256, 50_304)), jnp.float32)
    probabilities = jax.nn.softmax(logits)
    allowed = np.asarray(top_p_mask(probabilities, 0.3))
    cumulative = np.asarray(jnp.cumsum(jnp.where(allowed, probabilities, 0.0), axis=-1))
    largest = np.array([[1, 1_415_738]], np.uint32)  # its uniform number is the largest below 1
    threshold = np.asarray(jax.random.uniform(largest[0])) * cumulative[:, -1]
    none = np.where(allowed, cumulative, 0).max(-1) <= threshold
    assert none.any(), "choose other logits: the sum of none of these wobbles so"
    keys = jnp.asarray(np.repeat(largest, none.sum(), axis=0))
    tokens = np.asarray(sample_tokens(logits[none], keys, temperature=1.0, top_p=0.3))
    assert allowed[none][np.arange(len(tokens)), tokens].all()
