"""The versions that decide a result. No jax."""

import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    packages = ("memphis-jax", "jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
