"""The versions that decide a result. No jax."""

import platform
from importlib import metadata

TRAINING = ("jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")


def versions(packages: tuple[str, ...] = TRAINING) -> dict[str, str]:
    """Versions of Python, of this program and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("memphis-jax", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
