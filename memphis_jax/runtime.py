"""Start-up of a process that computes with JAX."""

import os
from pathlib import Path

import jax


def start_jax() -> None:
    """Turns on JAX's persistent compile cache (unless JAX_COMPILATION_CACHE_DIR says where)."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memphis_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
