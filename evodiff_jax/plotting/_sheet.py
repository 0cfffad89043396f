"""Images as one grid of pixels, with text around it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.plotting.style import DPI, LABEL, SMALL, TITLE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 960, 20_000  # pixels of a figure that its grid does not exceed
_CELL = 112  # pixels up to which an image is enlarged
_GAP = 8  # pixels between text and grid
_MISSING = np.array([[255, 0, 255], [0, 0, 0]], np.uint8)


def check_array(name: str, value: Any) -> np.ndarray:
    """The value as a NumPy array of float32, whatever floating-point dtype it has.

    Raises:
      TypeError: when it is traced or no array of floating-point numbers.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} must be concrete, got the traced {value}: draw outside jax.jit")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array, got {value!r}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point numbers, images in -1 .. 1, got {type(value)} of {array.dtype}")
    return array.astype(np.float32)


def check_images(name: str, value: Any) -> np.ndarray:
    """The value as (N, H, W, C) float32.

    Raises:
      TypeError: as `check_array`.
      ValueError: when it has another rank, not 1 or 3 channels, or no pixel.
    """
    images = check_array(name, value)
    if images.ndim != 4:
        raise ValueError(f"{name} must be images (N, H, W, C), got shape {images.shape}")
    if images.shape[3] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels, the last axis, got shape {images.shape}")
    if not images.size:
        raise ValueError(f"{name} must hold an image at least, got shape {images.shape}")
    return images


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Bytes (..., H, W, 3) of images (..., H, W, C) in -1 .. 1.

    Values outside are clipped. Pixels that are not finite become a chequered pattern of magenta and black.
    """
    known = np.isfinite(images).all(-1, keepdims=True)
    grey = np.rint(127.5 * (np.clip(np.where(known, images, 0), -1, 1) + 1)).astype(np.uint8)
    height, width = images.shape[-3:-1]
    pattern = _MISSING[np.add.outer(np.arange(height), np.arange(width)) % 2]
    return np.where(known, grey, pattern)


def draw_sheet(
    cells: np.ndarray,
    groups: Sequence[int],
    *,
    labels: Sequence[str] = (),
    heads: Sequence[str] = (),
    heads_label: str = "",
    title: str = "",
) -> "Figure":
    """Draws a grid of images as one picture, each pixel as a whole number of the figure's pixels where it has room.

    Args:
      cells: (R, K, H, W, 3) bytes.
      groups: the rows that begin a group, which is set apart, with 0.
      labels: of every row, on the left.
      heads: of every column, above.
      heads_label: the heads' own label, on the left.
      title: of the figure.
    """
    padding = max(1, round(cells.shape[3] / 28))
    pixels, tops = _mosaic(cells, groups, padding)
    height, width = pixels.shape[:2]
    zoom = min(_WIDTH / width, _HEIGHT / height)
    zoom = max(1, min(int(zoom), _CELL // cells.shape[3])) if zoom >= 1 else zoom
    figure = new_figure(1, 1, constrained=False)
    text = lambda words, size, **aligned: figure.text(0, 0, words, fontsize=size, **aligned)
    rows = [text(label, LABEL, ha="right", va="center") for label in labels]
    columns = [text(head, SMALL, ha="center", va="bottom") for head in heads]
    own = [text(heads_label, SMALL, ha="right", va="bottom")] if heads_label else []
    above = [text(title, TITLE, ha="center", va="top")] if title else []
    extent = lambda texts, side: max((getattr(text.get_window_extent(), side) for text in texts), default=0)

    left = _GAP + (extent([*rows, *own], "width") + _GAP if labels or own else 0)
    head = extent([*columns, *own], "height") + _GAP / 2 if heads else 0
    top = _GAP + (extent(above, "height") + _GAP if title else 0) + head
    whole = np.ceil([max(left + zoom * width + _GAP, extent(above, "width") + 2 * _GAP), top + zoom * height + _GAP])
    figure.set_size_inches(*whole / DPI)
    left, top = round(left), whole[1] - round(top)  # pixels from the left and from below
    centres = zoom * (np.array(tops) + cells.shape[2] / 2)
    place = lambda written, x, y: written.set_position((x / whole[0], y / whole[1]))
    for written, centre in zip(rows, centres, strict=False):
        place(written, left - _GAP, top - centre)
    centres = zoom * (padding + np.arange(len(columns)) * (cells.shape[3] + padding) + cells.shape[3] / 2)
    for written, centre in zip(columns, centres, strict=True):
        place(written, left + centre, top + _GAP / 4)
    for written in own:
        place(written, left - _GAP, top + _GAP / 4)
    for written in above:
        place(written, whole[0] / 2, whole[1] - _GAP)

    width, height = zoom * width / whole[0], zoom * height / whole[1]
    panel = figure.add_axes((left / whole[0], top / whole[1] - height, width, height))
    panel.imshow(pixels, interpolation="nearest" if zoom >= 1 else "auto", aspect="auto")
    panel.set_axis_off()
    return figure


def _mosaic(cells: np.ndarray, groups: Sequence[int], padding: int) -> tuple[np.ndarray, list[int]]:
    """The rows below each other on white, and where each begins."""
    rows, columns, height, width, _ = cells.shape
    pixels, tops, top = [], [], 0
    line = np.full((height, padding + columns * (width + padding), 3), 255, np.uint8)
    for row in range(rows):
        gap = padding * (3 if row and row in groups else 1)
        for column in range(columns):
            left = padding + column * (width + padding)
            line[:, left : left + width] = cells[row, column]
        pixels += [np.full((gap, line.shape[1], 3), 255, np.uint8), line.copy()]
        tops.append(top + gap)
        top += gap + height
    return np.concatenate([*pixels, pixels[0]]), tops
