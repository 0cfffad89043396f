"""One run at a time in a place."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from evodiff_jax.generation._place import Place, as_document

LOCK = "lock.json"

REFRESH_SECONDS = 30.0
"""How often a lock is written anew. Half of it doubles the writes, twice of it a restart's wait on another machine."""

STALE_SECONDS = 300.0
"""Age of another machine's lock from which on its process counts as dead; clocks may differ by less than that."""


class Lock:
    """The right to write to a place; a context manager.

    It is taken by a conditional write, so that of two processes one gets it. The lock of a process of this machine that
    is no more is taken over at once, that of another machine when it has not been written anew for STALE_SECONDS.
    """

    def __init__(self, place: Place) -> None:
        """Takes the lock.

        Raises:
          ValueError: another process has it.
          OSError: it cannot be written.
        """
        self._place = place
        self._holder = {**_this_process(), "token": uuid.uuid4().hex, "since": time.time()}
        self._lost = False
        found, generation = place.read_with_generation(LOCK)
        holder = {} if found is None else as_document(found) or {}
        if holder and not stale(holder):
            raise ValueError(_refusal(place, holder))
        self._generation = place.write(LOCK, self._value(), generation)
        if not self._generation:
            raise ValueError(_refusal(place, as_document(place.read(LOCK) or b"") or {}))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises an error if another process took the lock over.

        Raises:
          ValueError: it did, as after this machine slept for long.
        """
        if self._lost:
            raise ValueError(f"{self._place.name}: another process took this run over: stopped")

    def release(self) -> None:
        """Gives the lock back; does nothing where it is another process's."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            self._place.write(LOCK, None, self._generation)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.release()
        except OSError:
            if kind is None:  # else what went wrong before is what there is to tell
                raise

    def _value(self) -> bytes:
        return json.dumps({**self._holder, "refreshed": time.time()}).encode()

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            try:
                generation = self._place.write(LOCK, self._value(), self._generation)
            except (OSError, ValueError):
                continue  # a full disk, which the run meets itself; or the next time it goes
            self._lost = not generation
            if self._lost:
                return
            self._generation = generation


def stale(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock is no more."""
    ours = _this_process()
    if holder.get("host") != ours["host"]:
        age = time.time() - float(holder.get("refreshed", 0))
        return age > STALE_SECONDS
    if holder.get("boot") != ours["boot"]:
        return True
    pid = int(holder.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return holder.get("started") != _started(pid)  # else the number is another process's by now


def _refusal(place: Place, holder: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", 0)))
    return (
        f"{place.name!r} is being written to by process {holder.get('pid')} on {holder.get('host')} since {since}: "
        "wait for it or end it, or give another place"
    )


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    """A name of the time since the machine was started, "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in the system's own unit; "" where it does not say, or of a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
