"""The one error of the readers, and how they show what a file says."""

from __future__ import annotations

import re
from typing import Any

DOWNLOAD = "download the file again"

_MAX_NAME = 500  # characters; the longest of released files has 120

_ADVICE = {
    "argparse Namespace": "this is a training checkpoint: take the released file, which holds the state dict alone",
}


class FormatError(ValueError):
    """A file that is not read, with the reason; the public functions put the path in front."""


def shown(value: Any) -> str:
    """Returns a value from a file on one line, whatever its length, nesting or characters."""
    if described := getattr(value, "described", None):  # a stand-in
        return described
    if isinstance(value, str):
        text = repr(value[:200])
        return text if len(value) <= 200 else f"{text}..."
    if value is None or type(value) in (bool, int, float):
        return repr(value)[:80]
    if type(value) is tuple and len(value) <= 8 and all(type(item) is int for item in value):
        return repr(value)
    return f"a {type(value).__name__}"


def text_global(data: bytes) -> str | None:
    """Returns the first "module name" that the opcodes GLOBAL and INST could name in bytes."""
    found = re.search(rb"[ci]([\w.]{1,100})\n([\w.]{1,100})\n", data)
    return f"{found[1].decode()} {found[2].decode()}" if found else None


def printable(name: str) -> str:
    """Returns a name from a file as it is, or as a literal where it would not show on one line."""
    return name if len(name) <= 200 and name.isprintable() else shown(name)


def refusal(name: str) -> FormatError:
    """Returns the error for a global, "module name", that is not in a format's closed list."""
    advice = _ADVICE.get(name, "a checkpoint of arrays needs no such code, do not load this file with torch either")
    return FormatError(f"refuses the global {shown(name)}; {advice}")


def check_name(name: Any, owner: str) -> None:
    """Raises FormatError unless a name is a string that can be printed on one line."""
    if type(name) is not str or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise FormatError(f"has the name {shown(name)} in {owner}; names are printable strings: {DOWNLOAD}")
