"""A stack machine for pickles. It builds plain containers and inert stand-ins.

A global is looked up in a closed dictionary by its exact (module, name) pair, so nothing is imported, and nothing is
called but the builders in that dictionary.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from evodiff_jax.pretrained.reading._cursor import Cursor
from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, refusal, shown
from evodiff_jax.pretrained.reading._standins import Builders, Global, Opaque, StandIn

# Released files take up to 150,000 steps. Each may cost 100 bytes of memory and a microsecond or two.
MAX_STEPS = 1_000_000
_MAX_GLOBAL = 1_000  # characters of a module and a name that are worth a list


class Budget:
    """What the reading of one file may cost, and the refused globals that it met.

    Attributes:
      refused: the globals outside the closed list, in order; None where the first of them is an error.
    """

    def __init__(self, *, collect: bool = False):
        self.refused: dict[str, None] | None = {} if collect else None
        self._steps = MAX_STEPS

    def step(self, count: int = 1) -> None:
        """Counts opcodes and visits of values: a memo of a few bytes can have a long value visited many times."""
        self._steps -= count
        if self._steps < 0:
            raise FormatError(f"takes more than {MAX_STEPS:,} steps to read; a checkpoint takes far fewer: {DOWNLOAD}")


class Machine:
    """The state of one pickle: a stack, the stacks below its marks, a memo."""

    def __init__(self, cursor: Cursor, builders: Builders, budget: Budget, persistent: Callable[[Any], Any] | None):
        self.cursor, self.builders, self.budget, self.persistent = cursor, builders, budget, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def damaged(self, reason: str) -> FormatError:
        return FormatError(f"has a damaged pickle before byte {self.cursor.position}: {reason}; {DOWNLOAD}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if not self.stack:
            raise self.damaged("it takes from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise self.damaged("a mark is missing")
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_or_mark(self) -> None:
        self.stack.pop() if self.stack else self.pop_mark()

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.damaged(f"nothing is stored under {index}")
        self.push(self.memo[index])

    def frame(self, length: int) -> None:
        if length > self.cursor.left:
            raise FormatError(f"is cut off or damaged: a frame of {length} bytes reaches past its end; {DOWNLOAD}")

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise FormatError(f"refuses APPEND on {shown(target)}; no checkpoint does that")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if len(items) % 2:
            raise self.damaged("a key has no value")
        if isinstance(target, Opaque):
            return
        if type(target) not in (dict, collections.OrderedDict):
            raise FormatError(f"refuses SETITEM on {shown(target)}; no checkpoint does that")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            if key in target:
                raise FormatError(f"has two entries {shown(key)} in one dictionary; {DOWNLOAD}")
            target[key] = value

    def add_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            return
        if type(target) is not set:
            raise FormatError(f"refuses ADDITEMS on {shown(target)}; no checkpoint does that")
        for item in items:
            _check_key(item)
            target.add(item)

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise FormatError(f"refuses a global with the names {shown(module)}, {shown(name)}; names are strings")
        found = self.builders.get((module, name))
        if found is None:
            if self.budget.refused is None or len(module) + len(name) > _MAX_GLOBAL:
                raise refusal(f"{module} {name}")
            self.budget.refused.setdefault(f"{module} {name}")
            found = Opaque()
        self.push(found)

    def call(self, builder: Callable[[Any], Any] | None, target: Any, argument: Any, opcode: str) -> Any:
        """Calls a builder; after a refused global was noted, whatever does not fit is opaque."""
        try:
            if builder is None:
                raise FormatError(f"refuses {opcode} on {shown(target)}; no checkpoint does that")
            return builder(argument)
        except FormatError:
            if not self.budget.refused:
                raise
            return Opaque()

    def make(self, role: str, opcode: str) -> None:
        arguments, target = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise FormatError(f"refuses {opcode} with {shown(arguments)} for arguments; they are a tuple")
        builder = getattr(target, role) if isinstance(target, Global) else None
        self.push(self.call(builder, target, arguments, opcode))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(state) is dict:
            check_attributes(state, shown(target), self.budget)
            if type(target) is collections.OrderedDict:
                return  # the attribute `_metadata` of a state dict, the versions of its modules: not needed
        self.call(target.build if isinstance(target, StandIn) else None, target, state, "BUILD")

    def persist(self) -> None:
        if self.persistent is None:
            raise FormatError("refuses the pickle opcode BINPERSID; this format has no persistent ids")
        self.push(self.call(self.persistent, None, self.pop(), "BINPERSID"))


def check_attributes(state: dict[Any, Any], owner: str, budget: Budget) -> None:
    """Raises FormatError where a state would set what Python itself uses, such as __class__."""
    budget.step(len(state))
    for key in state:
        if type(key) is not str or key.startswith("__"):
            raise FormatError(f"refuses to set {shown(key)} on {owner}; no checkpoint does that")


def _check_key(key: Any) -> None:
    # A tuple can take exponential time to hash, and larger integers can be made to collide.
    if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
        raise FormatError(f"refuses {shown(key)} as a key; checkpoints use strings and small integers")
