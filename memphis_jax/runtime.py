"""Start-up of a process that computes: compile cache, devices, one line of versions. No jax import
until it is called."""

import os
import platform
from importlib import metadata
from pathlib import Path


def start_jax() -> None:
    """Turns on JAX's persistent compile cache (unless JAX_COMPILATION_CACHE_DIR says where)."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memphis_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
