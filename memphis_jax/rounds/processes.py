"""Child processes that never outlive this one. Linux; elsewhere the kernel has no such order."""

import ctypes
import platform
import signal
from collections.abc import Callable


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


DIE_WITH_PARENT: Callable[[], None] | None = (
    _die_with_parent if platform.system() == "Linux" else None
)
"""`preexec_fn` of subprocess.Popen: a child is killed when the thread that started it ends."""
