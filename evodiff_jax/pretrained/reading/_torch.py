"""Torch checkpoints: zip files of torch >= 1.6, and the legacy stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from evodiff_jax.pretrained.reading._cursor import Cursor
from evodiff_jax.pretrained.reading._entries import choose
from evodiff_jax.pretrained.reading._legacy import read_stream, same_storage
from evodiff_jax.pretrained.reading._machine import Budget
from evodiff_jax.pretrained.reading._opcodes import unpickle
from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, shown
from evodiff_jax.pretrained.reading._standins import Builders, StandIn, listed
from evodiff_jax.pretrained.reading._tensors import STORAGES, TENSORS, Storage, Tensor, storage_of
from evodiff_jax.pretrained.reading._zip import read_entries

# The largest known is under 1 MB.
_MAX_PICKLE = 2**26


class _Device(StandIn):
    described = "a torch device"


def _device(arguments: tuple) -> _Device:
    if not 1 <= len(arguments) <= 2 or type(arguments[0]) is not str:
        raise FormatError(f"has a torch device of other than its name and number; {DOWNLOAD}")
    return _Device()


def _size(arguments: tuple) -> tuple:
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise FormatError(f"has a torch Size of other than a tuple; {DOWNLOAD}")
    return arguments[0]  # its integers are checked where a tensor has it


_BUILDERS: Builders = {
    **TENSORS,
    **STORAGES,
    **listed("torch device", reduce=_device),
    **listed("torch Size", reduce=_size),
}


def read_zip(data: np.ndarray, budget: Budget, entry: str | None) -> dict[str, Tensor]:
    """Returns the state dict of a torch zip file; its storages are views of the file's bytes.

    Raises:
      FormatError: the zip file is none of torch, is damaged, or holds more than arrays in plain containers.
    """
    entries = read_entries(data)
    if "data.pkl" not in entries:
        raise FormatError("is a zip file without data.pkl: no torch checkpoint; pass the file that torch.save wrote")
    if "byteorder" in entries and (order := bytes(entries["byteorder"][:20]).strip()) != b"little":
        raise FormatError(f"was written with byte order {order!r}, only little is read; save it on another machine")
    if len(pickled := entries["data.pkl"]) > _MAX_PICKLE:
        raise FormatError(
            f"has a data.pkl of {len(pickled):,} bytes, beyond {_MAX_PICKLE:,}; checkpoints have smaller ones"
        )
    cursor = Cursor(pickled)
    storages: dict[str, Storage] = {}
    content = unpickle(cursor, _BUILDERS, budget, lambda pid: _storage(pid, entries, storages))
    if cursor.left:
        raise FormatError(f"has {cursor.left} bytes after the pickle in data.pkl; {DOWNLOAD}")
    return choose(content, entry)


def _storage(pid: Any, entries: dict[str, np.ndarray], storages: dict[str, Storage]) -> Storage:
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        raise FormatError(f"has a persistent id that is no storage: {shown(pid)}; {DOWNLOAD}")
    _, kind, key, location, numel = pid
    if type(key) is not str or type(location) is not str:
        raise FormatError(f"has a storage with key {shown(key)} at {shown(location)}, expected strings; {DOWNLOAD}")
    storage = storage_of(kind, numel)
    if (stored := entries.get(f"data/{key}")) is None:
        raise FormatError(f"lacks the zip entry of storage {shown(key)}; {DOWNLOAD}")
    if len(stored) != storage.nbytes:
        raise FormatError(
            f"stores {len(stored)} bytes for storage {shown(key)} of {numel} elements, {storage.nbytes} bytes are due"
        )
    storage.data = stored
    return same_storage(storages, key, storage)


def read_legacy(data: np.ndarray, budget: Budget, entry: str | None) -> dict[str, Tensor]:
    """Returns the state dict of a torch legacy file; its storages are views of the file's bytes.

    Raises:
      FormatError: the file is damaged, or holds more than arrays in plain containers.
    """
    content, _ = read_stream(data, _BUILDERS, budget)
    return choose(content, entry)
