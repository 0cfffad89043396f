"""Plots of every figure against the number of model calls, and pictures of the same noise by all solvers."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax import plotting
from evodiff_jax.evaluation._report import FIGURES, SUBJECT, grids_of, ranking
from evodiff_jax.evaluation._results import Result
from evodiff_jax.evaluation._runs import FITTED, Problem, converged
from evodiff_jax.extras import require
from evodiff_jax.files import write_atomically
from evodiff_jax.plotting.style import (
    SMALL,
    add_legend,
    calls_axis,
    draw_intervals,
    finish_panel,
    line_style,
    log_axis,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = (SUBJECT, "evodiff")  # the rule of this project, and the paper's
_PEERS = 3
_OTHERS = {"color": "0.75", "linewidth": 0.8, "marker": ".", "markersize": 2}
_PLANS = {"color": "black", "linestyle": "none", "marker": "x", "markersize": 6}
_COLUMNS = 10
_COLOURS = 256  # of a file


def check_plots() -> None:
    """Raises a ModuleNotFoundError where what plots need is not installed."""
    require("matplotlib", "PIL", extra="plots")


def best_peers(results: Sequence[Result], count: int) -> list[str]:
    """The solvers with the smallest ratios to the best of all others, in all figures and runs; not those of _NAMED."""
    return [solver for solver in ranking(results) if solver not in _NAMED][:count]


def plot(path: Path, results: Sequence[Result]) -> None:
    """Draws the results of one problem: a row of panels a grid, a column a figure, a line a solver.

    `variance_optimal`, `evodiff` and the best of the others have colours, dashes, markers and intervals; a panel shows
    what is below three times their largest value. Fitted plans are black crosses on every grid.
    """
    order = [*_NAMED, *best_peers(results, _PEERS)]
    styles = {solver: line_style(index) for index, solver in enumerate(order)}
    grids = grids_of(results)
    names = dict.fromkeys(r.solver for r in results if r.grid != FITTED)
    solvers = [s for s in names if s not in styles] + [s for s in reversed(order) if s in names]
    calls = [r.calls for r in results]
    drawn = new_figure(3.4 * len(FIGURES), 2.6 * len(grids) + 0.5)
    panels = drawn.subplots(len(grids), len(FIGURES), squeeze=False, sharex=True)
    lines: dict[str, Any] = {}
    for i, grid in enumerate(grids):
        for panel, (figure, title) in zip(panels[i], FIGURES.items(), strict=True):
            shown = []
            for solver in solvers:
                runs = sorted((r for r in results if (r.grid, r.solver) == (grid, solver)), key=lambda r: r.calls)
                known = [(r.calls, *getattr(r, figure)) for r in runs if np.isfinite(getattr(r, figure)).all()]
                if not known:
                    continue
                x, values, low, high = np.array(known).T
                (line,) = panel.plot(x, values, **styles.get(solver, _OTHERS))
                if solver in styles:
                    draw_intervals(panel, x, low, high, styles[solver]["color"])
                    shown += list(values)
                lines[solver if solver in styles else "others"] = line
            plans = [(r.calls, getattr(r, figure).value) for r in results if r.grid == FITTED]
            plans = [(count, value) for count, value in plans if np.isfinite(value)]
            if plans:
                (lines[FITTED],) = panel.plot(*zip(*plans, strict=True), **_PLANS)
                shown += [value for _, value in plans]
            _scale(panel, figure, shown)
            calls_axis(panel, calls)
            panel.set_title(f"{title}, {grid}", fontsize=SMALL)
            finish_panel(panel, small=True)
    order = [name for name in (*order, "others", FITTED) if name in lines]
    add_legend(drawn, {name: lines[name] for name in order}, "outside upper center", columns=len(order))
    drawn.supxlabel("model calls a sample", fontsize=SMALL)
    write_atomically(path, lambda file: drawn.savefig(file, format="png"))
    _make_small(path)


def _scale(panel: Any, figure: str, shown: Sequence[float]) -> None:
    """Logarithmic, except near 0 for the kernel distance, which may be negative."""
    positive = [value for value in shown if value > 0]
    if figure == "kernel":
        size = max(float(np.median(np.abs(shown))) if shown else 1.0, 1e-12)
        panel.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(size)))
    elif positive:
        log_axis(panel, positive)
    if positive:
        panel.set_ylim(top=3 * max(positive))


def _make_small(path: Path) -> None:
    """Writes a PNG again with few colours."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: small.save(file, format="PNG", optimize=True))


def picture(problem: Problem, results: Iterable[Result], folder: Path, grid: str, calls: int) -> "Figure | None":
    """The first samples of all solvers on one grid and of fitted plans at one number of calls, and the converged ones.

    Each has a row. Every column starts from the same noise.

    Args:
      problem: the model.
      results: what `compare` yielded of it.
      folder: where `compare` stored the samples.
      grid: the grid's name.
      calls: the number of model calls.

    Returns:
      The figure, with all pixels of the images, or None where samples are no images or there are no such runs.
    """
    chosen = [r for r in results if (r.problem, r.calls) == (problem.name, calls) and r.grid in (grid, FITTED)]
    if problem.images is None or all(r.grid == FITTED for r in chosen):
        return None
    rows = {r.solver: problem.images(np.load(r.path(folder))[:_COLUMNS]) for r in chosen}
    rows["converged"] = problem.images(converged(problem, folder)[:_COLUMNS])
    drawn = plotting.images(rows, columns=_COLUMNS)
    (panel,) = drawn.axes
    # Large images are shown smaller than they are; the file has all of their pixels.
    shrunk = np.asarray(panel.images[0].get_array()).shape[1] / panel.get_window_extent().width
    drawn.set_dpi(drawn.dpi * max(1, shrunk))
    return drawn
