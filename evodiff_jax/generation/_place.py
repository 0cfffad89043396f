"""Where images are kept: a local folder or a URL of TensorStore, as a key-value store and the array in it.

manifest.json           the configuration
images/                 the array (num, H, W, C), zarr version 3, whose shards are the chunks of the run
chunks/{number}.json    a marker of each complete chunk, with its checksum
complete.json           there once all chunks are
lock.json               which process writes, while one does
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evodiff_jax.extras import require
from evodiff_jax.files import check_writable

if TYPE_CHECKING:
    import tensorstore

MANIFEST = "manifest.json"
COMPLETE = "complete.json"
ARRAY = "images/"
CHUNKS = "chunks/"

# How TensorStore begins the errors that are the store's, not the content's.
_TROUBLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "ABORTED")
_INNER_BYTES = 1 << 20  # what is read at least to look at one image; half of it doubles the checksums of a shard


class Place:
    """A place for images, which need not be there yet.

    Attributes:
      name: as it was given, for messages.
      folder: the local folder, None of a URL that is none.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        """Opens the key-value store.

        Raises:
          ModuleNotFoundError: TensorStore is not installed.
          ValueError: TensorStore does not know the URL, or it is a file.
        """
        require("tensorstore", extra="generate")
        import tensorstore

        self.name = os.fspath(place)
        try:
            if "://" in self.name:
                opened = tensorstore.KvStore.open(self.name.rstrip("/") + "/", context=_context())
            else:
                path = f"{os.path.abspath(self.name)}/"
                opened = tensorstore.KvStore.open({"driver": "file", "path": path}, context=_context())
            self._store = opened.result()
        except ValueError as error:
            raise ValueError(f"TensorStore cannot open {self.name!r}: {_reason(error)}") from error
        self._spec = self._store.spec().to_json()
        self.folder = Path(self._spec["path"]) if self._spec["driver"] == "file" else None
        if self.folder is not None and self.folder.is_file():
            raise ValueError(f"{self.name!r} is a file, a folder is needed")

    def read(self, key: str) -> bytes | None:
        """The value of a key, None where there is none."""
        return self.read_with_generation(key)[0]

    def read_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        """The value of a key, or None, and the generation that `write` compares."""
        with self._told("read"):
            found = self._store.read(key).result()
        return (bytes(found.value) if found.state == "value" else None), found.stamp.generation

    def write(self, key: str, value: bytes | None, generation: bytes | None = None) -> bytes:
        """Writes a key at once and durably, or with None deletes it.

        Args:
          key: its name.
          value: what it holds from now on.
          generation: write only where the key still is of this generation.

        Returns:
          The new generation, empty where another one was found and nothing was written.

        Raises:
          OSError: it cannot be written.
        """
        with self._told("write to"):
            return self._store.write(key, value, if_equal=generation).result().generation

    def read_json(self, key: str) -> dict[str, Any] | None:
        """A document, None where there is none.

        Raises:
          ValueError: it is no JSON object.
        """
        value = self.read(key)
        if value is None:
            return None
        found = as_document(value)
        if found is None:
            raise ValueError(f"{self.name}: {key} is damaged: delete it, and the run goes on from what is complete")
        return found

    def write_json(self, key: str, document: dict[str, Any]) -> None:
        """Writes a document."""
        self.write(key, json.dumps(document, indent=1).encode())

    def keys(self, prefix: str) -> list[str]:
        """The names of the keys that begin so."""
        import tensorstore

        with self._told("list"):
            within = tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))
            return [key.decode() for key in self._store.list(within).result()]

    def check_new(self) -> None:
        """Raises an error if no run could begin here: there is something else, or it can't be written to.

        Raises:
          ValueError: there is something else.
          OSError: it cannot be written to.
        """
        if self.folder is None:
            with self._told("list"):
                found = [key.decode(errors="replace") for key in self._store.list().result()]
        else:
            if not self.folder.parent.is_dir():
                raise ValueError(f"there is no folder {str(self.folder.parent)!r}")
            with _named(self.name):
                check_writable(self.folder / "test" if self.folder.exists() else self.folder)
                found = sorted(os.listdir(self.folder)) if self.folder.exists() else []
        # What a run that was killed before its manifest was there may have left.
        found = [key for key in found if not key.startswith(("lock.json", MANIFEST))]
        if found:
            raise ValueError(f"{self.name!r} holds something else, such as {found[0]!r}: give a new or an empty one")

    def array(self, shape: tuple[int, ...], chunk: int, *, create: bool = False) -> tensorstore.TensorStore:
        """The array of images.

        Args:
          shape: (num, H, W, C).
          chunk: images of a shard.
          create: make it where it is not there, or is damaged; shards stay.

        Raises:
          ValueError: it is not there, or another one.
          OSError: it cannot be read or written.
        """
        import tensorstore

        spec = {"driver": "zarr3", "kvstore": {**self._spec, "path": self._spec["path"] + ARRAY}}
        if create:
            spec["metadata"] = metadata(shape, chunk)
        key = f"{ARRAY}zarr.json"
        for attempt in range(2):
            try:
                opened = tensorstore.open(spec, context=_context(), open=True, create=create).result()
                if opened.shape != shape:
                    raise ValueError(f"its shape is {opened.shape}, not {shape}")
                return opened
            except ValueError as error:
                if not create or attempt or os_error(error) is not None:
                    raise self.in_words(error, f"{key} cannot be opened") from error
                self.write(key, None)
        raise AssertionError("unreachable")

    def write_images(self, array: tensorstore.TensorStore, number: int, first: int, images: Any) -> None:
        """Writes a shard whole; a shard that is there is dropped first, as a damaged one is not written over."""
        with self._told("write to"):
            self._store.write(f"{ARRAY}c/{number}/0/0/0", None).result()
            array[first : first + len(images)].write(images).result()

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise self.in_words(error, f"cannot {doing} it") from error

    def in_words(self, error: ValueError, doing: str) -> Exception:
        """The error of a store as one line; an OSError where the operating system's is known."""
        code = os_error(error)
        if code is not None:
            return OSError(code, os.strerror(code), self.name)
        kind = OSError if str(error).startswith(_TROUBLE) else ValueError
        return kind(f"{self.name}: {doing}: {_reason(error)}")


def metadata(shape: tuple[int, ...], chunk: int) -> dict[str, Any]:
    """The metadata of zarr version 3: a shard a chunk of the run, in inner chunks of some images with checksums."""
    image = shape[1:]
    size = 1
    for side in image:
        size *= side
    wanted = max(1, _INNER_BYTES // size)
    inner = next(count for count in range(min(chunk, wanted), 0, -1) if chunk % count == 0)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [inner, *image],
        "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    return {
        "shape": list(shape),
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk, *image]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["sample", "height", "width", "channel"],
    }


def as_document(value: bytes) -> dict[str, Any] | None:
    """A JSON object, None where it is none."""
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def os_error(error: Exception) -> int | None:
    """The operating system's number of an error of TensorStore's, which raises ValueError for everything."""
    found = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
    return None if found is None else int(found[1] or found[2])


def _reason(error: Exception) -> str:
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return "".join(character if character.isprintable() else " " for character in text)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error


@functools.cache
def _context() -> tensorstore.Context:
    """One for all, so that memory:// is the same memory throughout the process."""
    import tensorstore

    return tensorstore.Context()
