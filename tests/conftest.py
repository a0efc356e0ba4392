"""What every test stands on: JAX on eight CPU devices, full-precision matmuls, fixed seeds.

The environment is set before JAX is imported. The device count goes through `jax.config`, not
`XLA_FLAGS`: a stage that a test starts as a process inherits the environment, and it must see the
one device that a user's machine shows.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import signal
from pathlib import Path

import hypothesis
import jax
import pytest

# A job in a script's background ignores Ctrl-C, and so would everything that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# XLA reads its flags when the backend starts. Only in this process LLVM optimises nothing, as most
# of the time goes to compiling; what a test starts as a process is compiled as a user's.
before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{before or ''} --xla_backend_optimization_level=0"
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()
del os.environ["XLA_FLAGS"]
if before is not None:
    os.environ["XLA_FLAGS"] = before
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets, tokenizers and reference numbers beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}, which is not part of the repository")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share a worker, which then sets up once what they share.

    vLLM's tests keep to one worker and take longest, so they start first, then the files with slow
    tests: at the end the other worker would wait for them.
    """
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: ("vllm" not in item.keywords, item.path not in slow))
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
