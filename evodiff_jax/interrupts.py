"""Ctrl-C in the command line: one line and exit code 130 at any time, with nothing half written.

Python's own way, the exception KeyboardInterrupt, prints a traceback where nobody catches it, as while JAX is imported,
and is swallowed where it meets a callback of a library's.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from evodiff_jax.files import discard_unfinished

COMMAND = "evodiff-jax"
INTERRUPTED = 130
MESSAGE = f"{COMMAND}: interrupted\n"


def watch_command() -> None:
    """Leaves at Ctrl-C from here on if this process is the command, and does nothing in any other."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    as_module = ("-m", "evodiff_jax") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    if as_module or name in (COMMAND, f"{COMMAND}.exe"):
        _watch()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A context in which the process leaves at Ctrl-C."""
    before = _watch()
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raised() -> Iterator[Callable[[], None]]:
    """A context in which Ctrl-C raises KeyboardInterrupt, for work with a result to keep; a second one leaves.

    Yields:
      A function that raises KeyboardInterrupt once there was a Ctrl-C: to be called now and then, as the exception is
      lost where it meets a callback of a library's.
    """
    seen: list[bool] = []

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    def handle(*_: Any) -> None:
        if seen:
            _leave()
        seen.append(True)
        raise KeyboardInterrupt

    before = _watch(handle)
    try:
        yield check
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _leave(*_: Any) -> None:
    discard_unfinished()
    os.write(2, MESSAGE.encode())
    os._exit(INTERRUPTED)


def _watch(handler: Callable[..., None] = _leave) -> Any:
    """Sets the handler and returns the one before, or None where Ctrl-C is ignored or not this thread's business."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return None
    return signal.signal(signal.SIGINT, handler)
