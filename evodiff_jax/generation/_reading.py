"""Images that were generated: read lazily, verified, and exported."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZipFile

import numpy as np

from evodiff_jax.extras import require
from evodiff_jax.files import write_atomically
from evodiff_jax.generation import _manifest
from evodiff_jax.generation._manifest import Layout
from evodiff_jax.generation._place import COMPLETE, Place


class Images:
    """Images as an array of shape (num, H, W, C), of which no more is read than what is asked for.

    Attributes:
      store: the array as TensorStore's own, for everything else.
      manifest: the configuration of the run.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, store: Any, manifest: dict[str, Any], layout: Layout, place: Place) -> None:
        """Takes an open array; see `open`."""
        self.store = store
        self.manifest = manifest
        self.layout = layout
        self._place = place

    @property
    def shape(self) -> tuple[int, ...]:
        """(num, H, W, C)."""
        return self.layout.shape

    def __len__(self) -> int:
        return self.layout.num

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads images, by whatever an array of NumPy is indexed with; a damaged part is a ValueError."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        try:
            found = self.store[_from_the_end(first, len(self))].read().result()
        except (ValueError, IndexError) as error:
            if isinstance(error, IndexError) or "OUT_OF_RANGE" in str(error):
                raise IndexError(f"{first!r} is no index of {len(self)} images") from error
            raise self._place.in_words(error, "cannot read these images") from error
        scalar = isinstance(first, int | np.integer)
        return np.asarray(found)[tuple(rest) if scalar else (slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def parts(self) -> Iterator[np.ndarray]:
        """All images, a chunk at a time."""
        for number in range(self.layout.chunks):
            first, end = self.layout.bounds(number)
            yield self[first:end]


class Verified(NamedTuple):
    """The state of a run.

    Attributes:
      manifest: its configuration.
      layout: how its samples are divided.
      intact: chunks that agree with their checksums.
      damaged: numbers of chunks that do not.
      missing: numbers of chunks that are not there yet.
      not_finite: samples that were not finite.
      digest: of all images in order, "" where some are not there: equal where all images are.
    """

    manifest: dict[str, Any]
    layout: Layout
    intact: int
    damaged: tuple[int, ...]
    missing: tuple[int, ...]
    not_finite: int
    digest: str


def open(place: str | os.PathLike[str], *, partial: bool = False) -> Images:
    """Images that `generate` made, to be indexed like an array.

    Args:
      place: as for `generate`.
      partial: open a run that is not complete; what is missing reads as zeros.

    Returns:
      The images.

    Raises:
      ValueError: there is no run, or one that is not complete.
      OSError: it cannot be read.
    """
    store = Place(place)
    manifest, layout = _manifest.read_manifest(store)
    if not partial and store.read(COMPLETE) is None:
        there = int(_manifest.marked(store, layout).sum())
        raise ValueError(
            f"{store.name!r} is not complete, {there} of {layout.chunks} chunks are there: start the command that made "
            "them again, or open it with partial=True"
        )
    return Images(store.array(layout.shape, layout.chunk), manifest, layout, store)


def verify(place: str | os.PathLike[str], on_chunk: Callable[[int], None] = lambda count: None) -> Verified:
    """Reads all images and compares them with their checksums.

    Args:
      place: as for `generate`.
      on_chunk: on_chunk(count) is called when so many samples more were looked at.

    Returns:
      What was found.

    Raises:
      ValueError: there is no run.
      OSError: it cannot be read.
    """
    store = Place(place)
    manifest, layout = _manifest.read_manifest(store)
    marked = _manifest.marked(store, layout)
    damaged, not_finite, digest = [], 0, hashlib.sha256()
    array = store.array(layout.shape, layout.chunk) if marked.any() else None
    for number, marker in _manifest.intact(store, layout, array, map(int, np.flatnonzero(marked))):
        if marker is None:
            damaged.append(number)
        else:
            not_finite += marker.not_finite
            digest.update(marker.sha256.encode())
        first, end = layout.bounds(number)
        on_chunk(end - first)
    whole = digest.hexdigest() if marked.all() and not damaged else ""
    missing = tuple(map(int, np.flatnonzero(~marked)))
    return Verified(manifest, layout, int(marked.sum()) - len(damaged), tuple(damaged), missing, not_finite, whole)


def export(
    place: str | os.PathLike[str],
    target: str | os.PathLike[str],
    on_chunk: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes all images in another form, a chunk at a time.

    Args:
      place: as for `generate`.
      target: a name that ends in .npz, for one file with `arr_0`, uint8 (num, H, W, C), as public evaluators read it,
        gray images as three equal channels; a URL of TensorStore, for an array of zarr version 3 there; else a folder,
        for a PNG file an image.
      on_chunk: as for `verify`.

    Raises:
      ValueError: the run is not complete, a chunk is damaged, or images of these channels are no PNG.
      OSError: something cannot be read or written.
    """
    images = open(place)
    name = os.fspath(target)
    channels = images.shape[-1]
    if "://" in name:
        copy = Place(name)
        copy.check_new()
        array = copy.array(images.shape, images.layout.chunk, create=True)
        for number, part in enumerate(images.parts()):
            copy.write_images(array, number, images.layout.bounds(number)[0], part)
            on_chunk(len(part))
    elif name.endswith(".npz"):
        write_atomically(Path(name), lambda file: _write_npz(file, images, on_chunk))
    else:
        require("PIL", extra="generate")
        from PIL import Image

        if channels not in (1, 3, 4):
            raise ValueError(f"a PNG file has 1, 3 or 4 channels, these images {channels}: export them as .npz")
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        digits = max(6, len(str(len(images) - 1)))
        number = 0
        for part in images.parts():
            for image in part:
                picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
                write = lambda file, picture=picture: picture.save(file, format="PNG")
                write_atomically(folder / f"{number:0{digits}}.png", write)
                number += 1
            on_chunk(len(part))


def _write_npz(file: IO[bytes], images: Images, on_chunk: Callable[[int], None]) -> None:
    """An npz file of more images than fit in memory."""
    shape = (*images.shape[:-1], 3 if images.shape[-1] == 1 else images.shape[-1])
    header = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": shape}
    with ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, header)
        for part in images.parts():
            entry.write(np.broadcast_to(part, (len(part), *shape[1:])).tobytes())
            on_chunk(len(part))


def _from_the_end(index: Any, count: int) -> Any:
    """An index as TensorStore takes it, which knows no numbers from the end."""
    if index is Ellipsis:
        return slice(0, count)
    if isinstance(index, slice):
        return slice(*index.indices(count)) if (index.step or 1) > 0 else np.arange(count)[index]
    if isinstance(index, int | np.integer):
        if not -count <= index < count:
            raise IndexError
        return int(index) % count
    numbers = np.asarray(index)
    return np.arange(count)[numbers]
