"""NEFTune's noise: its size by segment, where it falls, and its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from memphis_jax.neftune import neftune_noise

ALPHA, DIM = 10.0, 64
# Two rows of unequal segments, with padding at the end of the one and in the middle of the other.
LENGTHS = ((3, 50, 120), (200,))
SEGMENTS = np.zeros((2, 240), np.int32)
SEGMENTS[0, :3], SEGMENTS[0, 3:53], SEGMENTS[0, 53:173] = 1, 2, 3
SEGMENTS[1, 20:220] = 1


def noise(key: int = 0, segments: np.ndarray = SEGMENTS, alpha: float = ALPHA) -> np.ndarray:
    zeros = jnp.zeros((*segments.shape, DIM))
    return np.asarray(neftune_noise(jax.random.key(key), zeros, jnp.asarray(segments), alpha))


def test_bounded_by_each_segments_own_length() -> None:
    sample = np.abs(noise())
    for row, lengths in enumerate(LENGTHS):
        for segment, length in enumerate(lengths, start=1):
            bound = ALPHA / np.sqrt(length * DIM)
            inside = sample[row, SEGMENTS[row] == segment]
            assert inside.shape == (length, DIM)
            assert 0.97 * bound < inside.max() <= bound * (1 + 1e-6)


def test_zero_on_padding() -> None:
    assert not noise()[SEGMENTS == 0].any()
    assert not noise(segments=np.zeros((1, 8), np.int32)).any()


@pytest.mark.parametrize(("row", "segment", "length"), [(0, 2, 50), (0, 3, 120), (1, 1, 200)])
def test_uniform_between_minus_one_and_one(row: int, segment: int, length: int) -> None:
    """Kolmogorov-Smirnov against U(-1, 1), which U(0, 1) would fail; variance 1/3."""
    scaled = noise()[row, SEGMENTS[row] == segment].ravel() * np.sqrt(length * DIM) / ALPHA
    assert stats.kstest(scaled, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    error = 5 / np.sqrt(scaled.size)
    assert abs(scaled.mean()) < error / np.sqrt(3)
    assert abs(scaled.var() - 1 / 3) < error * np.sqrt(4 / 45)


def test_added_to_the_embeddings_and_drawn_from_the_key() -> None:
    embeddings = jax.random.normal(jax.random.key(7), (*SEGMENTS.shape, DIM))
    moved = neftune_noise(jax.random.key(0), embeddings, jnp.asarray(SEGMENTS), ALPHA)
    np.testing.assert_allclose(moved - embeddings, noise(), atol=1e-6)
    np.testing.assert_array_equal(noise(0), noise(0))
    assert np.abs(noise(0) - noise(1)).max() > 0.1
    np.testing.assert_allclose(noise(alpha=2 * ALPHA), 2 * noise(), rtol=1e-6)


def test_rows_and_segments_get_noise_of_their_own() -> None:
    twins = np.repeat([[1, 2]], 50, axis=1).repeat(2, axis=0).astype(np.int32)
    sample = noise(segments=twins).reshape(2, 2, 50, DIM)  # row, segment
    flat = sample.reshape(4, -1)
    correlation = np.corrcoef(flat) - np.eye(4)
    assert np.abs(correlation).max() < 0.1


def test_dtype_is_that_of_the_embeddings() -> None:
    embeddings = jnp.zeros((*SEGMENTS.shape, DIM), jnp.bfloat16)
    moved = neftune_noise(jax.random.key(0), embeddings, jnp.asarray(SEGMENTS), ALPHA)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(moved.astype(jnp.float32), noise(), rtol=1e-2)
