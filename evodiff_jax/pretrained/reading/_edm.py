"""EDM's pickles of whole networks: class names, constructor arguments and tensors of persistent objects.

The original loader runs the source code in the file. Here every object is a stand-in that keeps its class name and its
attributes, and the source code is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from evodiff_jax.pretrained.reading._cursor import Cursor
from evodiff_jax.pretrained.reading._legacy import read_nested
from evodiff_jax.pretrained.reading._machine import Budget, check_attributes
from evodiff_jax.pretrained.reading._opcodes import unpickle
from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, check_name, shown
from evodiff_jax.pretrained.reading._scalars import SCALARS
from evodiff_jax.pretrained.reading._standins import Builders, Bytes, StandIn, listed
from evodiff_jax.pretrained.reading._tensors import TENSORS, Storage, Tensor

_VERSION = 6
_META = {"type", "version", "module_src", "class_name", "state"}
_MAX_DEPTH = 32  # released networks have 4 levels
_MAX_STRING = 10_000  # characters of an argument


class Network(NamedTuple):
    """The network under "ema".

    Attributes:
      cls: its class name.
      arguments: the keyword arguments of its constructor.
      tensors: parameters and persistent buffers by name, in stored order.
    """

    cls: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


class _Module(StandIn):
    """A persistent object (with a class name and constructor arguments) or a ModuleDict."""

    def __init__(self, cls: str | None, state: dict[str, Any] | None):
        self.cls, self.state = cls, state
        self.described = f"an object of class {cls or 'ModuleDict'}"

    def build(self, state: Any) -> None:
        if self.state is not None or type(state) is not dict:
            raise FormatError(f"refuses BUILD on {self.described} with {shown(state)}; only ModuleDict has it, once")
        self.state = state


def read_pickle(data: np.ndarray, budget: Budget, entry: str | None) -> Network:
    """Reads the network under "ema" of a pickle that EDM wrote; its storages are views of the file's bytes.

    Raises:
      FormatError: the file is no such pickle, is damaged, or holds more than arrays in modules.
    """
    cursor = Cursor(data)
    content = unpickle(cursor, _builders(budget), budget)
    if type(content) is not dict or "ema" not in content:
        raise FormatError(f"is a pickle without the entry 'ema' of EDM's networks, but {_entries(content)}")
    if cursor.left:
        raise FormatError(f"has {cursor.left} bytes after its pickle; {DOWNLOAD}")
    if entry not in (None, "ema"):
        raise FormatError(f"has no state dict under entry {entry!r}: the network of an EDM pickle is its 'ema'")
    network = content["ema"]
    if not isinstance(network, _Module) or network.cls is None:
        raise FormatError(f"has {shown(network)} for 'ema', expected a network")
    return Network(network.cls, *_walked(network, budget))


def _entries(content: Any) -> str:
    return f"a dictionary of {', '.join(map(shown, list(content)[:8]))}" if type(content) is dict else shown(content)


def _builders(budget: Budget) -> Builders:
    loaded: dict[Bytes, Storage] = {}

    def load_from_bytes(arguments: tuple) -> Storage:
        if len(arguments) != 1 or not isinstance(arguments[0], Bytes):
            raise FormatError(f"loads a storage from other than bytes; {DOWNLOAD}")
        stream = arguments[0]
        # Bytes that are used again by the memo are not read again: the work stays in proportion to the file.
        if stream not in loaded:
            loaded[stream] = read_nested(stream.data, budget)
        return loaded[stream]

    return {
        **TENSORS,
        **SCALARS,
        **listed("torch.storage _load_from_bytes", reduce=load_from_bytes),
        **listed(
            "torch_utils.persistence _reconstruct_persistent_obj",
            reduce=lambda arguments: _persistent_object(arguments, budget),
        ),
        **listed("torch.nn.modules.container ModuleDict", new=_module_dict),
    }


def _persistent_object(arguments: tuple, budget: Budget) -> _Module:
    meta = arguments[0] if len(arguments) == 1 else None
    if type(meta) is not dict or len(meta) != len(_META) or set(meta) != _META:
        raise FormatError(f"has a persistent object of other than {', '.join(sorted(_META))}; {DOWNLOAD}")
    if meta["type"] != "class" or type(meta["version"]) is not int or meta["version"] != _VERSION:
        raise FormatError(
            f"has a persistent {shown(meta['type'])} of version {shown(meta['version'])}, known are classes of version "
            f"{_VERSION}"
        )
    cls, state = meta["class_name"], meta["state"]
    check_name(cls, "its persistent objects")
    if type(meta["module_src"]) is not str:
        raise FormatError(f"has {shown(meta['module_src'])} for the source code of class {cls}; {DOWNLOAD}")
    if type(state) is not dict:
        raise FormatError(f"has a state of class {cls} that is {shown(state)}; {DOWNLOAD}")
    check_attributes(state, f"an object of class {cls}", budget)
    return _Module(cls, state)


def _module_dict(arguments: tuple) -> _Module:
    if arguments:
        raise FormatError("refuses ModuleDict with arguments; checkpoints make it empty and fill it")
    return _Module(None, None)


def _walked(network: _Module, budget: Budget) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the arguments and the tensors of a network, each module entered once."""
    positional = _state(network).get("_init_args", ())
    if type(positional) is not tuple or positional:
        raise FormatError(
            f"has a network made with positional arguments, {shown(positional)}; only keywords are understood"
        )
    arguments: dict[str, Any] = {}
    for key, value in _keywords(network, "the network").items():
        check_name(key, "the arguments of the network")
        arguments[key] = _plain(value, f"{key} of the network", budget)
    tensors: dict[str, Tensor] = {}
    entered: set[int] = set()

    def walk(module: _Module, path: tuple[str, ...]) -> None:
        owner = shown(".".join(path)) if path else "the network"
        if id(module) in entered or len(path) > _MAX_DEPTH:
            raise FormatError(f"has the module {owner} inside itself, in two places or too deep; {DOWNLOAD}")
        entered.add(id(module))
        keywords = _keywords(module, owner)
        for key in arguments:
            budget.step()
            if key in keywords and _plain(keywords[key], f"{key} of {owner}", budget) != arguments[key]:
                raise FormatError(
                    f"has another {key} for {owner}, of class {module.cls}, than for the network; {DOWNLOAD}"
                )
        for name, tensor in (*_items(module, "_parameters", owner, budget), *_items(module, "_buffers", owner, budget)):
            if not isinstance(tensor, Tensor):
                raise FormatError(f"has {shown(tensor)} for {shown(name)} of {owner}, expected a tensor; {DOWNLOAD}")
            full = ".".join((*path, name))
            if full in tensors:
                raise FormatError(f"has two tensors {shown(full)}; {DOWNLOAD}")
            tensors[full] = tensor
        for name, child in _items(module, "_modules", owner, budget):
            if not isinstance(child, _Module):
                raise FormatError(f"has {shown(child)} for {shown(name)} of {owner}, expected a module; {DOWNLOAD}")
            walk(child, (*path, name))

    walk(network, ())
    return arguments, tensors


def _state(module: _Module) -> dict[str, Any]:
    return module.state if module.state is not None else {}


def _items(module: _Module, kind: str, owner: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yields the named entries of a module but None and buffers that are not part of its state dict."""
    entries: Any = _state(module).get(kind)
    temporary = _state(module).get("_non_persistent_buffers_set", set())
    if not isinstance(entries, dict) or type(temporary) is not set:
        raise FormatError(f"has {shown(entries)} for {kind} of {owner}, expected a dictionary; {DOWNLOAD}")
    for name, value in entries.items():
        budget.step()
        check_name(name, f"{kind} of {owner}")
        if "." in name:
            raise FormatError(f"has the name {shown(name)} in {kind} of {owner}; torch allows no dot in it: {DOWNLOAD}")
        if value is not None and not (kind == "_buffers" and name in temporary):
            yield name, value


def _keywords(module: _Module, owner: str) -> dict[str, Any]:
    """Returns the keyword arguments of a persistent object's constructor; a ModuleDict has none."""
    keywords = _state(module).get("_init_kwargs", {})
    if type(keywords) is not dict:
        raise FormatError(f"has {shown(keywords)} for the keyword arguments of {owner}; {DOWNLOAD}")
    return keywords


def _plain(value: Any, name: str, budget: Budget, depth: int = 0) -> Any:
    """Returns a value as None, bool, int, float, str, lists and dicts."""
    budget.step()
    if depth > _MAX_DEPTH:
        raise FormatError(f"has {name} nested deeper than {_MAX_DEPTH} or in itself; {DOWNLOAD}")
    if value is None or type(value) in (bool, int, float) or (type(value) is str and len(value) <= _MAX_STRING):
        return value
    if type(value) in (list, tuple):
        return [_plain(item, name, budget, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, name, budget, depth + 1) for key, item in value.items()}
    raise FormatError(f"has {shown(value)} in {name}, expected numbers, strings and lists of them")
