"""Readers of public checkpoint files: EDM pickles, torch .pt files, safetensors. They need no torch and run no code.

A pickle can name any function of an installed package and have it called. Here a pickle is read by a small stack
machine that knows a closed list of names and calls none of them: tensors, modules and scalars become inert stand-ins.
Sizes, offsets and strides are compared with the file before an array is made. Arrays are views of the file, mapped into
memory: a file must not change while its arrays are in use.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from evodiff_jax.pretrained.reading._edm import read_pickle
from evodiff_jax.pretrained.reading._legacy import is_legacy
from evodiff_jax.pretrained.reading._machine import Budget
from evodiff_jax.pretrained.reading._refusals import FormatError, printable, refusal, text_global
from evodiff_jax.pretrained.reading._safetensors import read_file, read_index
from evodiff_jax.pretrained.reading._tensors import resolve
from evodiff_jax.pretrained.reading._torch import read_legacy, read_zip

__all__ = ["Contents", "inspect", "read"]

_KNOWN = "torch .pt and .bin (zip and legacy), EDM .pkl, safetensors and its index"
_TORCH = {"torch zip": read_zip, "torch legacy": read_legacy}


class Contents(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
      format: "EDM pickle", "torch zip", "torch legacy" or "safetensors".
      arrays: the arrays by their names in the file, in stored order. They are read-only and have the stored dtypes and
        bits; bfloat16 is that of ml_dtypes.
      cls: of an EDM pickle, the class name of the network.
      arguments: of an EDM pickle, the keyword arguments that the network was made with; lists stand for tuples, Python
        numbers for NumPy scalars.
      metadata: of safetensors, the strings of its header.
      refused: from `inspect`, the globals "module name" for which `read` refuses the file.
    """

    format: str
    arrays: dict[str, np.ndarray]
    cls: str | None = None
    arguments: dict[str, Any] | None = None
    metadata: Mapping[str, str] = MappingProxyType({})
    refused: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, entry: str | None = None) -> Contents:
    """Reads a checkpoint file; its content tells the format, not its ending.

    Args:
      path: the file; of safetensors in shards, the index.
      entry: which state dict of a torch training checkpoint, such as "ema"; dots lead into nested dictionaries.

    Returns:
      The arrays, and what else the file says about the network.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has an unknown format, is damaged, needs a global outside the closed list, or holds several
        state dicts and `entry` names none of them. The message starts with the path.
    """
    return _read(path, entry, Budget())


def inspect(path: str | os.PathLike[str], *, entry: str | None = None) -> Contents:
    """Reads a checkpoint file as `read` does, and lists the globals that `read` refuses in place of raising.

    What depends on such a global is left out; it is not called or imported either.

    Args:
      path: the file.
      entry: which state dict of a torch training checkpoint.

    Returns:
      The arrays that can be read without the refused globals, and their names in `refused`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as for `read`, but for refused globals.
    """
    return _read(path, entry, Budget(collect=True))


def _read(path: str | os.PathLike[str], entry: str | None, budget: Budget) -> Contents:
    path = Path(path)
    try:
        data = _mapped(path)
        format = _format(data)
        try:
            return _contents(path, data, format, entry, budget)
        except FormatError:
            if not budget.refused:
                raise
            return Contents(format, {}, refused=_refused(budget))
    except FormatError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file must not show as another error, whatever was overlooked
        raise ValueError(f"{path}: is damaged, reading it failed with {type(error).__name__}: {error}") from error


def _contents(path: Path, data: np.ndarray, format: str, entry: str | None, budget: Budget) -> Contents:
    if format in _TORCH:
        arrays = resolve(_TORCH[format](data, budget, entry), len(data))
        return Contents(format, arrays, refused=_refused(budget))
    if format == "EDM pickle":
        network = read_pickle(data, budget, entry)
        arrays = resolve(network.tensors, len(data))
        return Contents(format, arrays, network.cls, network.arguments, refused=_refused(budget))
    if entry is not None:
        raise FormatError(f"is a safetensors file without entries; leave out entry {entry!r}")
    if format == "safetensors index":
        arrays, metadata = read_index(data, lambda name: _mapped(path.parent / name))
    else:
        arrays, metadata = read_file(data)
    return Contents("safetensors", arrays, metadata=metadata)


def _refused(budget: Budget) -> tuple[str, ...]:
    return tuple(map(printable, budget.refused or ()))


def _mapped(path: Path) -> np.ndarray:
    """Returns the bytes of a file as an array of uint8, mapped into memory."""
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; check the path")
    if path.is_dir():
        raise FormatError("is a folder; pass a file in it")
    if not path.is_file():
        raise FormatError("is no regular file; copy its content to one")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError("is an empty file; download the file again")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _format(data: np.ndarray) -> str:
    start = bytes(data[:512])
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[8:9] == b"{" and start[5:8] == bytes(3):
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "torch zip"
    if start.startswith(b"\x80"):
        return "torch legacy" if is_legacy(data) else "EDM pickle"
    if start[8:9] == b"{" and not text.startswith((b"{", b"<", b"version ")):
        return "safetensors"  # of a header length that no file has: the reader says so
    if text.startswith(b"{"):
        return "safetensors index"
    if text.startswith(b"<"):
        raise FormatError("is a web page, not the file: download it again, with the link to the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise FormatError("is a Git LFS pointer, not the file: run git lfs pull, or download the file")
    if start[257:262] == b"ustar":
        raise FormatError("is a tar file, the format of torch before 0.2: save it again with torch >= 1.0")
    if data[-1] == ord(".") and (named := text_global(bytes(data[:4096]))):
        raise refusal(named)  # a pickle of protocol 0 or 1, in which no format of ours is written
    raise FormatError(f"has an unknown format: it starts with {start[:16]!r}; known are {_KNOWN}")
