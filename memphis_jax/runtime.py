"""A process that computes with JAX: how it starts, alone or as one of several, and when it ends."""

import ctypes
import os
import platform
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from memphis_jax import hosts
from memphis_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def start_jax(dtype: str = "bfloat16") -> None:
    """Joins the other hosts, sets up the compile cache, the allocator and the products' precision.

    `dtype` is that of compute. float32 is meant: by default a TPU multiplies in bfloat16 then, and
    a GPU in TF32, with 8 and 11 bits for the mantissa's 24.

    JAX_COORDINATOR_ADDRESS and its companions make this one of several processes (hosts.py).
    JAX_COMPILATION_CACHE_DIR moves the persistent compile cache.

    glibc gives large blocks back to the system and fetches them again at every step, page by page;
    on a CPU, where all activations are such blocks, keeping them saves a tenth of a step's time
    with jax 0.10. With 0.12 a block often does not fit where the last one was, and is fetched anew.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc:  # before there are threads: only the first arena can keep blocks of any size
        libc.mallopt(M_ARENA_MAX, 1)
    if group := hosts.from_environment():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"{group.host}:{group.port}",
            group.processes,
            group.process,
            # The guard has counted the hosts already, and notices sooner when one is gone.
            initialization_timeout=round(group.barrier) + 60,
            heartbeat_timeout_seconds=max(100, round(2 * group.heartbeat)),
        )
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memphis_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")
    if libc and jax.default_backend() == "cpu":
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def is_first() -> bool:
    """Whether this process writes logs and reports: process 0."""
    return jax.process_index() == 0


def same_on_all_hosts(value: int, what: str) -> int:
    """`value`, once all hosts are seen to have the same. Raises RuntimeError where they do not."""
    if jax.process_count() > 1:
        values = np.ravel(multihost_utils.process_allgather(np.int32(value))).tolist()
        if len(set(values)) > 1:
            raise RuntimeError(
                f"{what} differs between hosts: {values} on processes 0 to {len(values) - 1}; is "
                "the folder on storage that all hosts share?"
            )
    return value


class Trace:
    """Traces a step and the next two by jax.profiler, in this process; a context manager.

    The folder is for TensorBoard's profile plugin (pip install xprof) and for Perfetto.
    """

    STEPS = 3

    def __init__(self, folder: Path, first: int) -> None:
        self._folder, self._first, self._runs = folder, first, False

    def __enter__(self) -> Self:
        return self

    def before(self, step: int) -> None:
        """To be called when all earlier steps are done."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._runs = True
        elif step == self._first + self.STEPS:
            self._stop()

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False
            print(f"{self._folder}: a trace from step {self._first} on", file=sys.stderr)


class Preemption:
    """SIGTERM (maintenance, a spot machine taken back), noticed between steps; a context manager.

    A signal to one of several processes stops all of them, at the same step. Alone, Ctrl-C does so
    too, once: the second ends at once.
    """

    def __init__(self) -> None:
        self.exit_code = EXIT_PREEMPTED
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Several processes: jax.distributed has its own handler on every host.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._notice)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to save and end after `step`; every process asks at every step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            self.exit_code = EXIT_INTERRUPTED  # nothing that restarts preempted runs goes on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            told = "\nCtrl-C: this step is finished and saved; once more to end at once\n"
            os.write(sys.stderr.fileno(), told.encode())  # print is not reentrant
