"""Images as a grid, or rows of them with names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.numerics import is_integer
from evodiff_jax.plotting._sheet import check_images, draw_sheet, to_pixels
from evodiff_jax.plotting.style import check_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def images(images: Any, *, columns: int = 10, title: str = "") -> "Figure":
    """Draws images as a grid; needs `evodiff-jax[plots]`.

    Values outside of -1 .. 1 are clipped. Pixels that are not finite are a chequered pattern of magenta and black.

    Args:
      images: (N, H, W, C) in -1 .. 1, C = 1 for grey or 3 for colours, of any floating-point dtype; or a dictionary of
        such arrays of one shape by name, each of which takes a row, or several, with its name on the left.
      columns: images in a row, at most.
      title: of the figure.

    Returns:
      A matplotlib figure, of no window: a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
      ModuleNotFoundError: when matplotlib is not installed.
      TypeError: when images are not floating-point arrays, or are traced, or the title is no text.
      ValueError: when images have another rank, other channels, different shapes, no pixel or no finite one, or columns
        is below 1.
    """
    named = isinstance(images, Mapping)
    if named and not images:
        raise ValueError("images is an empty dictionary: it needs an array of images at least")
    given = images if named else {"": images}
    checked = {str(name): check_images(f"images[{name!r}]" if named else "images", v) for name, v in given.items()}
    if len(shapes := {value.shape for value in checked.values()}) > 1:
        found = ", ".join(f"{name} {value.shape}" for name, value in checked.items())
        raise ValueError(f"all images must have one shape, so that rows are aligned, got {found}")
    if not any(np.isfinite(value).any() for value in checked.values()):
        raise ValueError(f"images have no finite number, in shape {next(iter(shapes))}")
    if not is_integer(columns) or columns < 1:
        raise ValueError(f"columns must be an integer of at least 1, got {columns!r}")
    check_title(title)

    count, *shape = shapes.pop()
    columns = min(columns, count)
    lines = -(-count // columns)  # rows that each name takes
    cells = np.full((len(checked), lines * columns, *shape[:2], 3), 255, np.uint8)
    for row, value in zip(cells, checked.values(), strict=True):
        row[:count] = to_pixels(value)
    cells = cells.reshape(-1, columns, *shape[:2], 3)
    labels = [label for name in checked for label in [name, *[""] * (lines - 1)]] if named else ()
    groups = range(0, len(cells), lines) if lines > 1 else (0,)
    return draw_sheet(cells, groups, labels=labels, title=title)
