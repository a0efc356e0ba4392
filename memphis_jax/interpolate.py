"""Two tensors into one: SLERP and linear interpolation, in float64 and in pieces.

    slerp    c = sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b,   cos(w) = <a, b> / (|a| |b|)
    linear   c = (1 - t) a + t b

The angle w is that of the whole tensors as flat vectors, while a and b keep their norms (Shoemake,
"Animating rotation with quaternion curves", 1985, for unit vectors; mergekit's `slerp` for these).
Like mergekit, SLERP becomes linear where |cos(w)| is above a threshold, since sin(w) vanishes
there, and takes a tensor of norm 0 as orthogonal to every other. Unlike mergekit it sums in
float64, not float32, and t = 0 and t = 1 give a and b to the bit.

A large tensor never stands in memory as a whole: `sums` of its pieces add up, `weights` follow from
the total, and `blend` makes each piece of the result. Numpy only; imports nothing of ours.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

Method = Literal["slerp", "linear"]
METHODS: tuple[Method, ...] = ("slerp", "linear")
THRESHOLD = 0.9995
"""mergekit's: SLERP is linear above this |cos|, so below 1.81 degrees and above 178.19."""

SMALLEST_NORM = 1e-8  # mergekit's: below it a tensor has no direction


class Sums(NamedTuple):
    """Sums over the elements of two tensors, in float64; the sums of pieces add up."""

    aa: float
    bb: float
    ab: float

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(x + y for x, y in zip(self, other, strict=True)))


class Weights(NamedTuple):
    """The result is a * first + b * second."""

    first: float
    second: float
    branch: Literal["slerp", "linear", "copy"]
    why: str  # of a branch that is not what was asked for; else ""


NO_SUMS = Sums(0.0, 0.0, 0.0)


def sums(a: np.ndarray, b: np.ndarray) -> Sums:
    """`Sums` of two float64 arrays of one shape."""
    a, b = a.ravel(), b.ravel()
    # Not np.dot: several threads ask for this, and the threads of BLAS would fight with them.
    return Sums(*(float(np.einsum("i,i->", x, y)) for x, y in ((a, a), (b, b), (a, b))))


def cosine(total: Sums) -> float:
    """cos of the angle between the tensors, in [-1, 1]; 0 where one of them has norm 0."""
    norm_a, norm_b = math.sqrt(total.aa), math.sqrt(total.bb)
    norms = [norm if norm > SMALLEST_NORM else 1.0 for norm in (norm_a, norm_b)]
    return min(1.0, max(-1.0, total.ab / norms[0] / norms[1]))


def distance(total: Sums) -> float:
    """|b - a|; exactly 0 for equal tensors."""
    return math.sqrt(max(0.0, total.aa + total.bb - 2.0 * total.ab))


def weights(method: Method, t: float, total: Sums, threshold: float = THRESHOLD) -> Weights:
    """The weights of a and b for t in [0, 1] (0 gives a).

    threshold: |cos| above which SLERP is linear; 1 leaves only what is parallel to the last bit.
    """
    if t in (0.0, 1.0):
        return Weights(1.0 - t, t, "copy", "")
    if method == "linear":
        return Weights(1.0 - t, t, "linear", "")
    cos = cosine(total)
    if abs(cos) > threshold or abs(cos) == 1.0:
        why = "parallel" if cos > 0 else "antiparallel"
        return Weights(1.0 - t, t, "linear", why)
    zero = min(total.aa, total.bb) <= SMALLEST_NORM**2
    w = math.acos(cos)
    first, second = math.sin((1.0 - t) * w) / math.sin(w), math.sin(t * w) / math.sin(w)
    return Weights(first, second, "slerp", "norm 0, taken as orthogonal" if zero else "")


def blend(a: np.ndarray, b: np.ndarray, by: Weights) -> np.ndarray:
    """The result, or a piece of it: float64 arrays in and out."""
    if by.branch == "copy":
        return a if by.first else b
    return by.first * a + by.second * b


def interpolate(
    a: np.ndarray, b: np.ndarray, t: float, method: Method = "slerp", threshold: float = THRESHOLD
) -> np.ndarray:
    """Two whole arrays into one, float64. The same arithmetic as in pieces."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return blend(a, b, weights(method, t, sums(a, b), threshold))
