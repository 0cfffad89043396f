"""What the commands write: pictures, and where."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.files import check_writable, write_atomically

if TYPE_CHECKING:
    from PIL import Image

_ZOOM = 2
_PADDING = 2


def make_picture(images: np.ndarray, labels: np.ndarray) -> Image.Image:
    """Draws images of one or three channels as a grid, each class on rows of its own.

    Args:
      images: (N, H, W, C) in [-1, 1]; values outside are clipped.
      labels: (N,), the classes.

    Returns:
      The picture.
    """
    from PIL import Image

    from evodiff_jax.evaluation import to_uint8

    pixels = to_uint8(images)
    pixels = pixels.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2)
    rows, columns = _positions(labels)
    height, width = pixels.shape[1] + _PADDING, pixels.shape[2] + _PADDING
    shape = ((rows.max() + 1) * height + _PADDING, (columns.max() + 1) * width + _PADDING, pixels.shape[3])
    canvas = np.full(shape, 255, np.uint8)
    for image, row, column in zip(pixels, rows, columns, strict=True):
        top, left = row * height + _PADDING, column * width + _PADDING
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas.squeeze(-1) if canvas.shape[2] == 1 else canvas)


def _positions(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every image: as many rows a class as make the grid about square."""
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.max() == 1:  # one image a class: rows of one image would be a ribbon
        group, counts = np.zeros_like(group), np.array([len(labels)])
    columns = math.ceil(counts.max() / max(1, round(math.sqrt(counts.max() / len(counts)))))
    rows_per_class = math.ceil(counts.max() / columns)
    order = np.argsort(group, kind="stable")
    rank = np.empty_like(order)  # the number of an image within its class
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return group * rows_per_class + rank // columns, rank % columns


def check_output(option: str, path: Path, suffix: str) -> None:
    """Raises an error if the file could not be written, before any work is done for it."""
    if path.suffix != suffix:
        raise ValueError(f"argument {option}: must end in {suffix}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"argument {option}: {str(path)!r} is a folder, a file is needed")
    if not path.parent.is_dir():
        raise ValueError(f"argument {option}: there is no folder {str(path.parent)!r}")
    try:
        check_writable(path)
    except OSError as error:
        raise ValueError(f"argument {option}: cannot write {str(path)!r}: {error.strerror}") from error


def check_folder(option: str, path: Path) -> None:
    """Raises an error if the folder could not be written to, or not be made, before any work is done for it."""
    try:
        if not path.parent.is_dir():
            raise ValueError(f"argument {option}: there is no folder {str(path.parent)!r}")
        if path.exists() and not path.is_dir():
            raise ValueError(f"argument {option}: {str(path)!r} is a file, a folder is needed")
        check_writable(path / "test" if path.exists() else path)
    except OSError as error:
        raise ValueError(f"argument {option}: cannot write to {str(path)!r}: {error.strerror}") from error


def write_all(writes: dict[Path, Callable[[IO[bytes]], Any]]) -> None:
    """Writes as many of the files as can be written.

    Raises:
      OSError: one or more could not be written; the message names all of them.
    """
    failures: list[OSError] = []
    for path, write in writes.items():
        try:
            write_atomically(path, write)
        except OSError as error:
            failures.append(error)
    if failures:
        raise OSError("; ".join(map(str, failures))) from failures[0]
