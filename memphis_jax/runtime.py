"""Start-up of a process that computes with JAX."""

import ctypes
import os
import platform
from pathlib import Path

import jax


def start_jax() -> None:
    """Sets up the persistent compile cache (JAX_COMPILATION_CACHE_DIR moves it) and the allocator.

    glibc gives large blocks back to the system and fetches them again at every step, page by page;
    keeping them saves a small model on CPU much of its time.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memphis_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, most)
