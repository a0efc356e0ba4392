"""How a command ends on an error: ours in one line, a bug with its traceback. No jax."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """Exits with code 1 and one line for OSError and what our own code raised; bugs pass through.

    An error counts as ours where it was raised in this package, so that its message says all.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\n{command}: interrupted; the same command goes on from here")
    except OSError as error:
        sys.exit(f"{command}: {error}")
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        sys.exit(f"{command}: {error}")


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    return trace.tb_frame.f_globals["__name__"].startswith(("memphis_jax", "__main__"))
