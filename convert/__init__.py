"""Weights between Hugging Face folders and this project's checkpoints, bit for bit.

    python -m convert from-hf HF CKPT     python -m convert to-hf CKPT HF
    python -m convert verify HF CKPT      from convert import load_hf

Imports `memphis_jax.config`, `.model` and `.checkpoint`; `memphis_jax` never imports this package:
a stage of a run that needs a conversion starts it as a process.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memphis_jax.model import StableLM


def load_hf(folder: str | Path, dtype: str = "float32") -> "StableLM":
    """StableLM with parameters in `dtype`, straight from an HF folder; see `convert.from_hf`."""
    from convert import from_hf  # here, so that `python -m convert --help` does not wait for JAX

    return from_hf.load_hf(folder, dtype)
