"""Plots of every figure against the number of model calls, and pictures of the same noise by all solvers."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.evaluation._report import FIGURES, SUBJECT, grids_of, ranking
from evodiff_jax.evaluation._results import Result
from evodiff_jax.evaluation._runs import FITTED, Problem, converged
from evodiff_jax.extras import require
from evodiff_jax.files import write_atomically
from evodiff_jax.generation import to_uint8

if TYPE_CHECKING:
    from PIL import Image

_NAMED = {SUBJECT: "tab:red", "evodiff": "tab:orange"}  # the rule of this project, and the paper's
_PEERS = ("tab:blue", "tab:green", "tab:purple")
_REST = "0.8"
_COLUMNS = 10
_COLOURS = 256  # of a file
_PADDING = 2
_LABEL = 132  # pixels


def check_plots() -> None:
    """Raises a ModuleNotFoundError where what plots need is not installed."""
    require("matplotlib", "PIL", extra="plots")


def best_peers(results: Sequence[Result], count: int) -> list[str]:
    """The solvers with the smallest ratios to the best of all others, in all figures and runs; not those of _NAMED."""
    return [solver for solver in ranking(results) if solver not in _NAMED][:count]


def plot(path: Path, results: Sequence[Result]) -> None:
    """Draws the results of one problem: a row of panels a grid, a column a figure, a line a solver.

    `variance_optimal`, `evodiff` and the best of the others have colours and intervals; a panel shows what is below
    three times their largest value. Fitted plans are black crosses on every grid.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    colours = _NAMED | dict(zip(best_peers(results, len(_PEERS)), _PEERS, strict=False))
    grids = grids_of(results)
    names = dict.fromkeys(r.solver for r in results if r.grid != FITTED)
    solvers = [s for s in names if s not in colours] + [s for s in reversed(colours) if s in names]
    calls = sorted({r.calls for r in results})
    drawn = Figure(figsize=(3.4 * len(FIGURES), 2.6 * len(grids) + 0.5), dpi=90, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(grids), len(FIGURES), squeeze=False, sharex=True)
    lines: dict[str, Any] = {}
    for i, grid in enumerate(grids):
        for panel, (figure, title) in zip(panels[i], FIGURES.items(), strict=True):
            shown = []
            for solver in solvers:
                runs = sorted((r for r in results if (r.grid, r.solver) == (grid, solver)), key=lambda r: r.calls)
                estimates = np.array([getattr(r, figure) for r in runs if np.isfinite(getattr(r, figure)).all()])
                if not len(estimates):
                    continue
                x = [r.calls for r in runs if np.isfinite(getattr(r, figure)).all()]
                highlighted = solver in colours
                colour = colours.get(solver, _REST)
                low, high = (estimates[:, :1] - estimates[:, 1:2]).T, (estimates[:, 2:] - estimates[:, :1]).T
                line = panel.errorbar(
                    x,
                    estimates[:, 0],
                    np.maximum(np.concatenate([low, high]), 0) if highlighted else None,
                    fmt=".-",
                    color=colour,
                    linewidth=1.6 if highlighted else 0.8,
                    elinewidth=0.8,
                    markersize=5 if highlighted else 2,
                )
                lines[solver if highlighted else "others"] = line
                shown += list(estimates[:, 0]) * highlighted
            plans = [(r.calls, getattr(r, figure).value) for r in results if r.grid == FITTED]
            plans = [(count, value) for count, value in plans if np.isfinite(value)]
            if plans:
                lines[FITTED] = panel.plot(*zip(*plans, strict=True), "kx", markersize=5)[0]
                shown += [value for _, value in plans]
            _scale(panel, figure, shown)
            panel.set_xscale("log")
            panel.set_xticks(calls, [str(count) for count in calls])
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_title(f"{title}, {grid}", fontsize=8)
            panel.tick_params(which="both", labelsize=7)
            panel.grid(alpha=0.3, linewidth=0.5)
    order = [name for name in (*colours, "others", FITTED) if name in lines]
    drawn.legend([lines[name] for name in order], order, loc="outside upper center", ncols=len(order), fontsize=8)
    drawn.supxlabel("model calls a sample", fontsize=8)
    write_atomically(path, lambda file: drawn.savefig(file, format="png"))
    _make_small(path)


def _scale(panel: Any, figure: str, shown: Sequence[float]) -> None:
    """Logarithmic, except near 0 for the kernel distance, which may be negative."""
    positive = [value for value in shown if value > 0]
    if figure == "kernel":
        size = max(float(np.median(np.abs(shown))) if shown else 1.0, 1e-12)
        panel.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(size)))
    else:
        panel.set_yscale("log")
    if positive:
        panel.set_ylim(top=3 * max(positive))


def _make_small(path: Path) -> None:
    """Writes a PNG again with few colours."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: small.save(file, format="PNG", optimize=True))


def picture(problem: Problem, results: Iterable[Result], folder: Path, grid: str, calls: int) -> "Image.Image | None":
    """The first samples of all solvers on one grid and of fitted plans at one number of calls, and the converged ones.

    Each has a row. Every column starts from the same noise.

    Args:
      problem: the model.
      results: what `compare` yielded of it.
      folder: where `compare` stored the samples.
      grid: the grid's name.
      calls: the number of model calls.

    Returns:
      The picture, or None where samples are no images or there are no such runs.
    """
    chosen = [r for r in results if (r.problem, r.calls) == (problem.name, calls) and r.grid in (grid, FITTED)]
    if problem.images is None or all(r.grid == FITTED for r in chosen):
        return None
    rows = {}
    for r in chosen:
        rows[r.solver] = problem.images(np.load(r.path(folder))[:_COLUMNS])
    rows["converged"] = problem.images(converged(problem, folder)[:_COLUMNS])
    return draw_rows(rows)


def draw_rows(rows: dict[str, np.ndarray]) -> "Image.Image":
    """Rows of images with their names on the left.

    Args:
      rows: by name (N, H, W, C) in -1 .. 1 with one or three channels; values outside are clipped, NaN is black.

    Returns:
      The picture; images of less than 28 pixels are enlarged.
    """
    from PIL import Image, ImageDraw

    first = next(iter(rows.values()))
    zoom = -(-28 // first.shape[1])
    height, width = (zoom * side + _PADDING for side in first.shape[1:3])
    columns = max(len(images) for images in rows.values())
    canvas = Image.new("RGB", (_LABEL + columns * width + _PADDING, len(rows) * height + _PADDING), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (name, images) in enumerate(rows.items()):
        top = row * height + _PADDING
        draw.text((_PADDING, top + height // 2 - 7), name, fill="black")
        pixels = to_uint8(np.nan_to_num(images, nan=-1))
        pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3)).repeat(zoom, axis=1).repeat(zoom, axis=2)
        for column, image in enumerate(pixels):
            canvas.paste(Image.fromarray(image), (_LABEL + column * width, top))
    return canvas
