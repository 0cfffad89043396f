"""The bytes of a file and a position in them, and the arguments of pickle opcodes read there."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError
from evodiff_jax.pretrained.reading._standins import Bytes

# The longest string of a released file is the source code of EDM's networks, 36,000 characters.
MAX_TEXT = 2**24


class Cursor:
    """A position in bytes, given as a one-dimensional array of uint8."""

    def __init__(self, data: np.ndarray, position: int = 0):
        self.data, self.view, self.position = data, data.data, position

    @property
    def left(self) -> int:
        """The number of bytes after the position."""
        return len(self.view) - self.position

    def take(self, count: int) -> memoryview:
        """Returns the next bytes, without a copy."""
        if count > self.left:
            raise FormatError(
                f"is cut off or damaged: {count} bytes are needed at byte {self.position}, {self.left} are left; "
                f"{DOWNLOAD}"
            )
        self.position += count
        return self.view[self.position - count : self.position]

    def text(self, count: int) -> str:
        """Returns the next bytes as a string."""
        if count > MAX_TEXT:
            raise FormatError(f"has a string of {count:,} bytes, no checkpoint has one beyond {MAX_TEXT:,}; {DOWNLOAD}")
        return self.decoded(bytes(self.take(count)))

    def decoded(self, text: bytes) -> str:
        """Returns bytes before the position as a string."""
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise FormatError(f"has a string that is no UTF-8 before byte {self.position}; {DOWNLOAD}") from None


Reader = Callable[[Cursor], Any]


def nothing(cursor: Cursor) -> None:
    """Reads no argument."""


def fixed(layout: str) -> Reader:
    """Returns the reader of a number in a layout of `struct`."""
    packed = struct.Struct(layout)
    return lambda cursor: packed.unpack(cursor.take(packed.size))[0]


U8, U16, I32, U32, U64, F64 = (fixed(layout) for layout in ("<B", "<H", "<i", "<I", "<Q", ">d"))


def long(cursor: Cursor) -> int:
    """Reads an integer of up to 255 bytes."""
    return int.from_bytes(cursor.take(U8(cursor)), "little", signed=True)


def text(length: Reader) -> Reader:
    """Returns the reader of a string that follows its length."""
    return lambda cursor: cursor.text(length(cursor))


def raw(length: Reader) -> Reader:
    """Returns the reader of bytes that follow their length: a view of the cursor's array."""

    def read(cursor: Cursor) -> Bytes:
        cursor.take(count := length(cursor))
        return Bytes(cursor.data[cursor.position - count : cursor.position])

    return read


def two_lines(cursor: Cursor) -> tuple[str, str]:
    """Reads the module and the name of a global."""
    lines = bytes(cursor.view[cursor.position : cursor.position + 1000]).split(b"\n", 2)
    if len(lines) < 3:
        raise FormatError(f"is cut off or damaged: the global at byte {cursor.position} does not end; {DOWNLOAD}")
    cursor.take(len(lines[0]) + len(lines[1]) + 2)
    return cursor.decoded(lines[0]), cursor.decoded(lines[1])
