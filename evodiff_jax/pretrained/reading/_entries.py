"""The state dict among what a torch checkpoint holds."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

from evodiff_jax.pretrained.reading._refusals import FormatError, shown
from evodiff_jax.pretrained.reading._tensors import Tensor

_MAX_DEPTH = 4


def choose(content: Any, entry: str | None) -> dict[str, Tensor]:
    """Returns the state dict of a checkpoint.

    Args:
      content: what the pickle holds: the state dict, or dictionaries around state dicts.
      entry: which state dict; names of nested dictionaries are joined by ".".

    Returns:
      Tensors by name.

    Raises:
      FormatError: there is none, there are several and `entry` is None, or none has that name.
    """
    if _is_state_dict(content):
        if entry is not None:
            raise FormatError(f"holds one state dict and no entry {entry!r}; leave out entry")
        return content
    found = dict(_state_dicts(content))
    names = ", ".join(map(shown, list(found)[:20]))
    if not found:
        raise FormatError(f"holds no state dict, which maps names to tensors, but {_content(content)}")
    if entry is None and len(found) > 1:
        raise FormatError(f'holds several state dicts: {names}; choose one, e.g. entry="{list(found)[-1]}" (--entry)')
    if entry is not None and entry not in found:
        raise FormatError(f"has no state dict under entry {entry!r}; its entries are {names}")
    return found[entry] if entry is not None else next(iter(found.values()))


def _is_dict(value: Any) -> bool:
    return type(value) in (dict, collections.OrderedDict)


def _is_state_dict(value: Any) -> bool:
    return _is_dict(value) and bool(value) and all(type(k) is str and isinstance(v, Tensor) for k, v in value.items())


def _state_dicts(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields the state dicts below a dictionary; each dictionary is entered once, so that cycles and sharing end."""
    entered: set[int] = set()
    verdicts: dict[int, bool] = {}
    level = [("", content)] if _is_dict(content) else []
    for _ in range(_MAX_DEPTH):
        below = []
        for path, outer in level:
            if id(outer) in entered:
                continue
            entered.add(id(outer))
            for key, value in outer.items():
                if type(key) is not str or len(key) > 100 or not key.isprintable() or not _is_dict(value):
                    continue
                name = f"{path}.{key}" if path else key
                if id(value) not in verdicts:
                    verdicts[id(value)] = _is_state_dict(value)
                if verdicts[id(value)]:
                    yield name, value
                else:
                    below.append((name, value))
        level = below


def _content(content: Any) -> str:
    if not _is_dict(content):
        return shown(content)
    for key, value in content.items():
        if type(key) is not str or not isinstance(value, Tensor):
            return f"{shown(key)}: {shown(value)}, among {len(content)} entries"
    return "an empty dictionary"
