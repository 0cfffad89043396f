"""NumPy's scalars in pickles: a dtype and the bytes of one number, made a Python number."""

from __future__ import annotations

from typing import Any

import numpy as np

from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, shown
from evodiff_jax.pretrained.reading._standins import Builders, Bytes, StandIn, listed

_NAMES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _DType(StandIn):
    described = "a NumPy dtype"

    def __init__(self, name: str):
        self.dtype = np.dtype(name).newbyteorder("<")

    def build(self, state: Any) -> None:
        """Checks the state (version, byte order, subarray, names, fields, size, alignment, flags): a plain number's."""
        order = "<" if self.dtype.itemsize > 1 else "|"
        if type(state) is not tuple or len(state) != 8 or not _same(state, (3, order, None, None, None, -1, -1, 0)):
            raise FormatError(
                f"has a dtype {self.dtype.str} with state {shown(state)}, expected a plain number; {DOWNLOAD}"
            )


def _same(state: tuple, expected: tuple) -> bool:
    return all(type(a) is type(b) and a == b for a, b in zip(state, expected, strict=True))


def _dtype(arguments: tuple) -> _DType:
    name = arguments[0] if len(arguments) == 3 else None
    if type(name) is not str or name not in _NAMES or any(type(flag) not in (bool, int) for flag in arguments[1:]):
        raise FormatError(f"refuses the NumPy dtype {shown(name)}; known are {', '.join(_NAMES)}")
    return _DType(name)


def _scalar(arguments: tuple) -> Any:
    kind, data = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(kind, _DType) or not isinstance(data, Bytes) or len(data.data) != kind.dtype.itemsize:
        raise FormatError(f"has a NumPy scalar of other than a dtype and its number of bytes; {DOWNLOAD}")
    if kind.dtype == np.bool_ and data.data[0] > 1:
        raise FormatError(f"has a NumPy bool of byte {data.data[0]}, expected 0 or 1; {DOWNLOAD}")
    return np.frombuffer(bytes(data.data), kind.dtype)[0].item()


SCALARS: Builders = {
    **listed("numpy dtype", reduce=_dtype),
    **listed("numpy.core.multiarray scalar", "numpy._core.multiarray scalar", reduce=_scalar),
}
