"""How a process that computes with JAX starts."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FAULTS = """
import resource
import jax, jax.numpy as jnp
from memphis_jax.runtime import start_jax

start_jax()
step = jax.jit(lambda x: jax.lax.optimization_barrier(x[:, None] * x).sum(0))  # 400 MB on the way
x = jnp.ones(10_000)
for _ in range(3):
    step(x).block_until_ready()
    before, now = globals().get("now", 0), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(now - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is tuned on glibc only")
@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12),
    reason="the blocks of jax 0.12 do not fit where the ones before were: fetched again, unsolved",
)
def test_a_step_on_a_cpu_fetches_no_memory_again(tmp_path: Path) -> None:
    """400 MB are 100,000 pages: what the second step used, the third one finds."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-c", FAULTS]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
