"""How a command ends: an error of ours in one line, a bug with its traceback. No jax.

Exit codes beside 0 and 1, for whoever starts commands on machines that come and go:

  75  stopped by SIGTERM, all work is saved: the same command goes on
  76  another host was lost: the same command goes on from the last checkpoint
  130 stopped by Ctrl-C; the same command goes on from what is saved
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

GUARDED = "MEMPHIS_GUARDED"  # set where hosts.py started one of several processes: the guard's pid
EXIT_INTERRUPTED = 130  # of a shell: 128 + SIGINT
EXIT_PREEMPTED = 75  # sysexits.h: temporary failure, try again
EXIT_PEER_LOST = 76
EXIT_UNSURE = 77  # of a guarded process: an error that another host may have caused
LINGER = 30.0  # seconds at most until the guard ends a process that has said its error


class Stopped(RuntimeError):
    """The command ends with `exit_code` and this message; the same command goes on later."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """Exits with code 1 and one line for OSError and what our own code raised; bugs pass through.

    An error counts as ours where it was raised in this package, so that its message says all.
    """
    try:
        yield
    except KeyboardInterrupt:
        told = f"\n{command}: interrupted; the same command goes on from what is saved"
        _end(told, EXIT_INTERRUPTED)
    except Stopped as stopped:  # on all hosts at once
        print(f"{command}: {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_code)
    except OSError as error:
        _end(f"{command}: {error}")
    except Exception as error:
        if isinstance(error, ValueError | RuntimeError) and _is_ours(error):
            _end(f"{command}: {error}")
        if GUARDED not in os.environ:
            raise
        traceback.print_exc()
        _end(f"{command}: stopped", EXIT_UNSURE)


def _end(message: str, code: int = 1) -> NoReturn:
    if GUARDED not in os.environ and code == 1:
        sys.exit(message)  # which prints it
    print(message, file=sys.stderr, flush=True)
    if GUARDED not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    if code == 1 and os.environ[GUARDED] == str(os.getppid()):
        # JAX aborts all others when process 0 ends, and they may be about to say the same.
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(LINGER)
    os._exit(code)  # JAX would wait at exit for processes that wait for this one


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    return trace.tb_frame.f_globals["__name__"].startswith(("memphis_jax", "__main__"))
