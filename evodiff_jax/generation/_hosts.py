"""The processes of a run on several hosts: they agree at its start and its end, and work by themselves in between.

They speak through the coordination service of `jax.distributed`, so that no device takes part. A host that ends with an
error tells the others, which end too, at their next batch. One that is killed is missed by JAX's heartbeats, and JAX
ends the others.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from evodiff_jax.generation._manifest import differences

HEARTBEAT_SECONDS = 100
"""After how long JAX ends the others where one host is missed; JAX's own default. Half of it takes a host in a network
that stalls more often for dead, twice of it lets the others work on for longer."""

_ROOM = "evodiff_jax/generation"
_WAIT_MILLISECONDS = 1000
_runs = itertools.count()


class Hosts:
    """The processes of a run.

    Attributes:
      index: the number of this one.
      count: how many there are.
    """

    def __init__(self) -> None:
        """The processes of `jax.distributed`, or this one alone where that was not initialized."""
        self._client, self.index, self.count = _state()
        self._room = f"{_ROOM}/{next(_runs)}"

    def agree(
        self, configuration: Mapping[str, Any], prepare: Callable[[], np.ndarray], tick: Callable[[], None]
    ) -> np.ndarray:
        """Compares the configurations of all hosts, and has the first one prepare the place.

        Args:
          configuration: this host's.
          prepare: what host 0 does once all agree; returns booleans, which chunks are marked as complete.
          tick: called while this waits, and may raise.

        Returns:
          What `prepare` returned on host 0.

        Raises:
          ValueError: configurations differ, or another host ended.
        """
        if self.count == 1:
            return prepare()
        if self.index:
            self._set(f"host/{self.index}", json.dumps(configuration))
            start = json.loads(self._get("start", tick))
            return np.unpackbits(np.frombuffer(bytes.fromhex(start["bits"]), np.uint8), count=start["count"]) > 0
        for other in range(1, self.count):
            found = differences(configuration, json.loads(self._get(f"host/{other}", tick)))
            if found:
                told = "; ".join(found).replace(" there,", " on host 0,").replace(" here", f" on host {other}")
                raise ValueError(f"the hosts' commands differ ({told}): give all the same command but for --host")
        marked = prepare()
        self._set("start", json.dumps({"bits": np.packbits(marked).tobytes().hex(), "count": len(marked)}))
        return marked

    def finish(self, complete: Callable[[], None], tick: Callable[[], None]) -> None:
        """Waits until all hosts are here, when the first one calls `complete`.

        Raises:
          ValueError: another host ended before.
        """
        if self.count == 1:
            complete()
        elif self.index:
            self._set(f"done/{self.index}", "done")
            self._get("end", tick)
        else:
            for other in range(1, self.count):
                self._get(f"done/{other}", tick)
            complete()
            self._set("end", "end")

    def check(self) -> None:
        """Raises an error if another host ended with one.

        Raises:
          ValueError: it did.
        """
        if self.count == 1:
            return
        for key, reason in self._client.key_value_dir_get(f"{_ROOM}/failed/"):
            host = key.rpartition("/")[2]
            if host != str(self.index):
                raise ValueError(f"host {host} stopped: {reason}")

    def fail(self, reason: str) -> None:
        """Tells the others that this host ends with an error; they end at their next batch."""
        if self.count > 1:
            with contextlib.suppress(ValueError, RuntimeError):  # told before, or there is nobody to tell
                self._client.key_value_set(f"{_ROOM}/failed/{self.index}", reason)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{self._room}/{key}", value)

    def _get(self, key: str, tick: Callable[[], None]) -> str:
        """The value of a key, once it is there."""
        while True:
            self.check()
            tick()
            try:
                return self._client.blocking_key_value_get(f"{self._room}/{key}", _WAIT_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise ValueError(f"the hosts lost each other: {error}") from error


def join(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, timeout: int = HEARTBEAT_SECONDS
) -> None:
    """Joins the processes of a run, before JAX looks for devices; without arguments as `jax.distributed` finds them.

    Args:
      coordinator: "address:port" of host 0, which listens there.
      count: how many hosts there are.
      index: the number of this one.
      timeout: seconds until all must have joined, and after which a host that is not heard of counts as dead.

    Raises:
      ValueError: the hosts do not find each other, or were given different counts.
    """
    options: dict[str, Any] = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": timeout}
    known = inspect.signature(jax.distributed.initialize).parameters
    options = {name: value for name, value in options.items() if name in known}
    try:
        jax.distributed.initialize(coordinator, count, index, **options)
    except (RuntimeError, ValueError) as error:
        where = "" if coordinator is None else f" at {coordinator}"
        raise ValueError(f"the hosts did not find each other{where}: {error}") from error
    client, index, count = _state()
    if count == 1:
        return
    # Before JAX looks for devices, which waits minutes for hosts that do not exist.
    client.key_value_set(f"{_ROOM}/count/{index}", str(count))
    for other in (0,) if index else range(1, count):
        try:
            found = client.blocking_key_value_get(f"{_ROOM}/count/{other}", 1000 * timeout)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"host {other} of {count} did not join within {timeout} s") from error
        if found != str(count):
            raise ValueError(f"host {other} was started with --num-hosts {found}, host {index} with {count}")


def _state() -> tuple[Any, int, int]:
    """The client of the coordination service, the number of this process, and how many there are.

    JAX has no public name for the client.
    """
    from jax._src import distributed

    state = distributed.global_state
    if state.client is None or not state.num_processes:
        return None, 0, 1
    return state.client, int(state.process_id or 0), int(state.num_processes)
