"""Writes slerp.npz with mergekit's own slerp: `MERGEKIT_PYTHON tests/golden/make_slerp.py`.

Run with an interpreter that has mergekit 0.1.5; tests/test_merge.py reads the result.
"""

from pathlib import Path

import numpy as np
import torch
from mergekit.merge_methods.slerp import slerp

ANGLES = (0.01, 0.5, 1.7, 1.9, 5.0, 30.0, 90.0, 150.0, 178.0, 179.5)  # degrees; 1.8 = threshold
TS = (0.1, 0.25, 0.5, 0.9)


def at_angle(a: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """A tensor of another norm at this angle to `a`."""
    noise = rng.standard_normal(a.shape)
    flat = a.astype(np.float64)
    noise -= flat * (noise * flat).sum() / (flat * flat).sum()
    noise *= np.linalg.norm(flat) / np.linalg.norm(noise)
    return 1.3 * (np.cos(np.radians(degrees)) * flat + np.sin(np.radians(degrees)) * noise)


def main() -> None:
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    pairs = {}
    for shape in ((7,), (9, 12), (5, 3, 4)):
        a = rng.standard_normal(shape)
        pairs["random-" + "x".join(map(str, shape))] = (a, rng.standard_normal(shape))
        for degrees in ANGLES if len(shape) == 2 else (0.5, 5.0):
            pairs[f"angle-{degrees}-{len(shape)}d"] = (a, at_angle(a, degrees, rng))
    a = rng.standard_normal((5, 8))
    pairs |= {"zero-a": (0 * a, a), "zero-b": (a, 0 * a), "equal": (a, a), "opposite": (a, -a)}
    for name, (left, right) in pairs.items():
        left, right = left.astype(np.float32), right.astype(np.float32)
        out |= {f"{name}/a": left, f"{name}/b": right}
        for t in TS:
            for dtype in ("float32", "float64"):
                pair = [torch.from_numpy(side.astype(dtype))[None] for side in (left, right)]
                out[f"{name}/{t}/{dtype}"] = slerp(torch.tensor([t], dtype=torch.float64), *pair)[
                    0
                ].numpy()
    np.savez_compressed(Path(__file__).with_name("slerp.npz"), **out)


if __name__ == "__main__":
    main()
