"""What a pickle's globals and objects become: inert values that refuse what is done to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from evodiff_jax.pretrained.reading._refusals import FormatError


class StandIn:
    """A value that stands for an object or a global of a pickle. It has no behaviour but `build`."""

    described = "an object"

    def build(self, state: Any) -> None:
        """Takes the state that BUILD gives an object; refuses unless a subclass says otherwise."""
        raise FormatError(f"refuses BUILD on {self.described}; no checkpoint does that")


class Global(StandIn):
    """A global of a format's closed list.

    Attributes:
      reduce: takes the tuple of arguments of REDUCE; None where the global is not called.
      new: takes the tuple of arguments of NEWOBJ; None where the global is not instantiated.
      value: what the global stands for: the dtype of a storage class.
    """

    def __init__(
        self,
        name: str,
        *,
        reduce: Callable[[Any], Any] | None = None,
        new: Callable[[Any], Any] | None = None,
        value: Any = None,
    ):
        self.described = f"the global {name!r}"
        self.reduce, self.new, self.value = reduce, new, value


class Bytes(StandIn):
    """A byte string: a view of the file's bytes. It equals itself alone, so that comparisons with it are safe."""

    described = "a byte string"

    def __init__(self, data: np.ndarray):
        self.data = data


class Opaque(StandIn):
    """What comes of a global outside the closed list while `inspect` lists them: nothing can be done with it."""

    described = "an object of a refused global"

    def build(self, state: Any) -> None:
        """Drops the state."""


Builders = Mapping[tuple[str, str], Global]


def listed(*names: str, **roles: Any) -> dict[tuple[str, str], Global]:
    """Returns entries of a closed list for globals "module name" that play the same roles."""
    return {tuple(name.split(" ")): Global(name, **roles) for name in names}  # pyright: ignore[reportReturnType]
