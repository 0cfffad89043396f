"""Files that are complete or not there: written beside their place and moved to it."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

_unfinished: set[Path] = set()


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file that is complete or not there; where the path is a link, the file that it leads to.

    A reader, or a run that is killed, never meets half a file.

    Raises:
      OSError: when it cannot be written, with the file's name; an older file of that name stays as it is.
    """
    place = _behind_links(path)
    temporary = _write_temporary(place, write)
    try:
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def packaged_or_path(kind: str, name_or_path: str | os.PathLike[str], packaged: Mapping[str, Path]) -> Path:
    """The file of a packaged name, or the given path.

    Raises:
      ValueError: it is neither a packaged name nor, by its looks, a path.
    """
    name = os.fspath(name_or_path)
    if name in packaged:
        return packaged[name]
    if os.sep in name or Path(name).suffix or Path(name).exists():
        return Path(name)
    known = ", ".join(packaged) or "none"
    raise ValueError(f"no packaged {kind} {name!r}; there are: {known}; or pass the path of a file")


def check_writable(path: Path) -> None:
    """Raises OSError if a file of this name could not be written; permission bits do not tell all."""
    temporary = _write_temporary(_behind_links(path), lambda file: None)
    temporary.unlink()
    _unfinished.discard(temporary)


def discard_unfinished() -> None:
    """Removes the temporary files of writes in progress, for a process that is about to end."""
    for temporary in tuple(_unfinished):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """A context whose OSErrors name the file: a full disk's does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(path)) from error


def _behind_links(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _write_temporary(path: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Writes a file next to `path` and returns its path; it is gone if writing fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _unfinished.add(temporary)
    try:
        with named_in_errors(path), temporary.open("wb") as file:
            write(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)
        raise
    return temporary
