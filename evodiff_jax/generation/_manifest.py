"""The configuration of a run, and the markers of its complete chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jaxlib.version
import numpy as np

from evodiff_jax import __version__
from evodiff_jax.generation._digests import digest_of_params, digest_of_plan
from evodiff_jax.generation._place import CHUNKS, MANIFEST, Place, as_document
from evodiff_jax.generation._program import Source
from evodiff_jax.tables import Plan

FORMAT = 1


class Layout(NamedTuple):
    """How the samples of a run are divided.

    Attributes:
      shape: (num, H, W, C).
      chunk: samples of a chunk; the last one may be shorter.
    """

    shape: tuple[int, ...]
    chunk: int

    @property
    def num(self) -> int:
        """The number of samples."""
        return self.shape[0]

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return -(-self.num // self.chunk)

    def bounds(self, number: int) -> tuple[int, int]:
        """The first sample of a chunk, and the one after its last."""
        first = number * self.chunk
        return first, min(first + self.chunk, self.num)


def configuration(source: Source, laid_out: Plan, layout: Layout, seed: int, uint8: str) -> dict[str, Any]:
    """All that determines the images, as JSON."""
    settings = dict(source.settings)
    if "weights" not in settings:
        settings["weights"] = digest_of_params(source.params)
    if source.conditions is None and source.num_classes:
        settings["classes"] = "at random" if source.label is None else source.label
    key = jax.random.key(seed)
    found = {
        "format": FORMAT,
        "num": layout.num,
        "image": list(layout.shape[1:]),
        "pixels": "uint8",
        "chunk": layout.chunk,
        "seed": seed,
        "uint8": uint8,
        "plan": digest_of_plan(laid_out),
        "calls": int(laid_out.calls),
        **settings,
        "random": str(jax.random.key_impl(key)),
        "partitionable": bool(getattr(jax.config, "jax_threefry_partitionable", True)),
        "x64": bool(getattr(jax.config, "jax_enable_x64", False)),
        "evodiff_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
    }
    return json.loads(json.dumps(found))  # tuples as lists, as they will be read


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, in words."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [f"{name} {there.get(name)} there, {here.get(name)} here" for name in names]


def read_manifest(place: Place) -> tuple[dict[str, Any], Layout]:
    """The configuration of a place and its layout.

    Raises:
      ValueError: there is none, or a damaged one.
      OSError: it cannot be read.
    """
    found = place.read_json(MANIFEST)
    if found is None:
        raise ValueError(f"{place.name!r} holds no run of generate: it has no {MANIFEST}")
    try:
        if found["format"] > FORMAT:
            raise ValueError(f"{place.name!r} was written by a later version, {found['evodiff_jax']}: use that")
        shape = (found["num"], *found["image"])
        if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in (*shape, found["chunk"])):
            raise TypeError
        return found, Layout(shape, found["chunk"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place.name!r}: {MANIFEST} is damaged") from error


class Marker(NamedTuple):
    """What is known of a complete chunk.

    Attributes:
      chunk: its number.
      images: how many it has.
      sha256: of their bytes.
      not_finite: how many samples were not.
      batch: samples at a time on one device, on which round-off depends.
      device: the kind of the devices.
    """

    chunk: int
    images: int
    sha256: str
    not_finite: int
    batch: int
    device: str


def key_of(number: int) -> str:
    """The key of a chunk's marker."""
    return f"{CHUNKS}{number:08d}.json"


def marked(place: Place, layout: Layout) -> np.ndarray:
    """Booleans (chunks,), whether each has a marker."""
    found = np.zeros(layout.chunks, bool)
    for key in place.keys(CHUNKS):
        stem = key.removeprefix(CHUNKS).removesuffix(".json")
        if stem.isdecimal() and int(stem) < layout.chunks:
            found[int(stem)] = True
    return found


def read_marker(place: Place, layout: Layout, number: int) -> Marker | None:
    """The marker of a chunk, None where there is none, or a damaged one."""
    value = place.read(key_of(number))
    document = None if value is None else as_document(value)
    if document is None or set(document) != set(Marker._fields):
        return None
    marker = Marker(**document)
    first, end = layout.bounds(number)
    return marker if (marker.chunk, marker.images) == (number, end - first) else None


def digest_of_images(images: np.ndarray) -> str:
    """SHA-256 of the bytes of images, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def intact(place: Place, layout: Layout, array: Any, numbers: Iterable[int]) -> Iterator[tuple[int, Marker | None]]:
    """Reads chunks and compares them with their markers: each with its marker, or None where they do not agree."""
    for number in numbers:
        marker = read_marker(place, layout, number)
        if marker is not None:
            first, end = layout.bounds(number)
            try:
                images = array[first:end].read().result()
            except ValueError as error:
                told = place.in_words(error, "cannot read it")
                if isinstance(told, OSError):  # the store's trouble, not the chunk's
                    raise told from error
                marker = None
            else:
                marker = marker if digest_of_images(images) == marker.sha256 else None
        yield number, marker
