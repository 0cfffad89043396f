"""Ctrl-C and SIGTERM in the command line: one line and an exit code at any time, with nothing half written.

Python's own way, the exception KeyboardInterrupt, prints a traceback where nobody catches it, as while JAX is imported,
and is swallowed where it meets a callback of a library's.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from evodiff_jax.files import discard_unfinished

COMMAND = "evodiff-jax"
INTERRUPTED = 130
TERMINATED = 143
MESSAGE = f"{COMMAND}: interrupted\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `postponed` watches for it."""


def ending(error: KeyboardInterrupt) -> tuple[int, str]:
    """The exit code and the message of an interrupt."""
    return (TERMINATED, f"{COMMAND}: terminated\n") if isinstance(error, Terminated) else (INTERRUPTED, MESSAGE)


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


@contextlib.contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """A context in which Ctrl-C and SIGTERM wait until work is in order; a second one leaves.

    Yields:
      A function that raises KeyboardInterrupt, for SIGTERM `Terminated`, once there was one: to be called often.
    """
    seen: list[KeyboardInterrupt] = []

    def check() -> None:
        if seen:
            raise seen[0]

    def handle(number: int, _: Any) -> None:
        found = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if seen:
            _leave_with(found)
        seen.append(found)

    watched = [(number, _watch(handle, number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield check
    finally:
        for number, before in watched:
            if before is not None:
                signal.signal(number, before)


def _leave(*_: Any) -> None:
    _leave_with(KeyboardInterrupt())


def _leave_with(error: KeyboardInterrupt) -> NoReturn:
    code, message = ending(error)
    discard_unfinished()
    os.write(2, message.encode())
    os._exit(code)


def _watch(handler: Callable[..., None] = _leave, number: int = signal.SIGINT) -> Any:
    """Sets the handler and returns the one before, None where the signal is ignored or not this thread's."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) == signal.SIG_IGN:
        return None
    return signal.signal(number, handler)
