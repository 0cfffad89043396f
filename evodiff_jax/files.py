"""Files that are complete or not there: written beside their place and moved to it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file that is complete or not there.

    A reader, or a run that is killed, never meets half a file.

    Raises:
      OSError: when it cannot be written; an older file of that name stays as it is.
    """
    temporary = write_temporary(path, write)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_temporary(path: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Writes a file next to `path` and returns its path; it is gone if writing fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
