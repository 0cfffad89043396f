"""torch's legacy stream: a magic number, a protocol version, facts of the machine, an object, keys, then storages."""

from __future__ import annotations

from typing import Any

import numpy as np

from evodiff_jax.pretrained.reading import _cursor
from evodiff_jax.pretrained.reading._cursor import Cursor
from evodiff_jax.pretrained.reading._machine import Budget
from evodiff_jax.pretrained.reading._opcodes import unpickle
from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, shown
from evodiff_jax.pretrained.reading._standins import Builders
from evodiff_jax.pretrained.reading._tensors import STORAGES, Storage, check_count, storage_of

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def is_legacy(data: np.ndarray) -> bool:
    """Whether bytes start with the pickle of a long integer, the magic number of the legacy stream or a wrong one."""
    start = bytes(data[:12])
    return start[:1] == b"\x80" and (start[2:3] == b"\x8a" or (start[2:3] == b"\x95" and start[11:12] == b"\x8a"))


def read_stream(data: np.ndarray, builders: Builders, budget: Budget) -> tuple[Any, dict[str, Storage]]:
    """Reads a legacy stream that takes all of the bytes.

    Args:
      data: the bytes.
      builders: the closed list of globals of the object.
      budget: the limits of the file.

    Returns:
      The object, and the storages by their keys, with their data.

    Raises:
      FormatError: it is no such stream, is damaged, or needs what is not in the closed list.
    """
    cursor = Cursor(data)
    if type(magic := unpickle(cursor, {}, budget)) is not int or magic != MAGIC:
        raise FormatError(f"has the wrong magic number {shown(magic)} for a torch legacy file; {DOWNLOAD}")
    if type(protocol := unpickle(cursor, {}, budget)) is not int or protocol != _PROTOCOL:
        raise FormatError(f"is a torch legacy file of protocol {shown(protocol)}, known is {_PROTOCOL}")
    facts = unpickle(cursor, {}, budget)
    if type(facts) is not dict or facts.get("little_endian") is not True:
        raise FormatError("is a torch legacy file without the mark of a little-endian machine; save it on one")
    storages: dict[str, Storage] = {}
    content = unpickle(cursor, builders, budget, lambda pid: _storage(pid, storages, cursor))
    keys = unpickle(cursor, {}, budget)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise FormatError(f"has a list of storages that is {shown(keys)} or not of strings; {DOWNLOAD}")
    if len(keys) != len(storages) or set(keys) != set(storages):
        raise FormatError(f"lists {len(keys)} storages, its pickle uses {len(storages)} or others; {DOWNLOAD}")
    for key in keys:
        storage = storages[key]
        numel = check_count(_cursor.U64(cursor), f"storage {shown(key)}")
        if numel != storage.numel:
            raise FormatError(
                f"stores {numel} elements for storage {shown(key)}, its pickle says {storage.numel}; {DOWNLOAD}"
            )
        start = cursor.position
        cursor.take(storage.nbytes)
        storage.data = data[start : cursor.position]
    if cursor.left:
        raise FormatError(f"has {cursor.left} bytes after its last storage; {DOWNLOAD}")
    return content, storages


def _storage(pid: Any, storages: dict[str, Storage], cursor: Cursor) -> Storage:
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise FormatError(f"has a persistent id that is no storage: {shown(pid)}; {DOWNLOAD}")
    _, kind, key, location, numel, *view = pid
    if type(key) is not str or type(location) is not str:
        raise FormatError(f"has a storage with key {shown(key)} at {shown(location)}, expected strings; {DOWNLOAD}")
    if view and view[0] is not None:
        raise FormatError("has views of storages, as torch 0.4 and before wrote them; save it again with torch >= 1.0")
    storage = storage_of(kind, numel)
    if storage.nbytes > cursor.left:
        raise FormatError(f"has a storage of {numel} elements, more than the {cursor.left} bytes left hold; {DOWNLOAD}")
    return same_storage(storages, key, storage)


def same_storage(storages: dict[str, Storage], key: str, storage: Storage) -> Storage:
    """Returns the storage that is known under a key, or notes the new one."""
    known = storages.setdefault(key, storage)
    if known.dtype != storage.dtype or known.numel != storage.numel:
        raise FormatError(f"describes storage {shown(key)} in two ways; {DOWNLOAD}")
    return known


NESTED: Builders = STORAGES
"""The closed list inside EDM's `_load_from_bytes`: a storage, nothing else."""


def read_nested(data: np.ndarray, budget: Budget) -> Storage:
    """Reads a legacy stream that holds one storage and nothing else."""
    content, storages = read_stream(data, NESTED, budget)
    if not isinstance(content, Storage) or len(storages) != 1:
        raise FormatError(f"nests {shown(content)} in place of one storage; {DOWNLOAD}")
    return content
