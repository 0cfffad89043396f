"""The states and data predictions of a run, side by side."""

import itertools
from typing import TYPE_CHECKING

import jax
import numpy as np

from evodiff_jax.diagnostics import Run, Trajectory
from evodiff_jax.numerics import concrete_array, is_integer
from evodiff_jax.plotting._sheet import check_array, draw_sheet, to_pixels
from evodiff_jax.plotting.style import BLUE, SMALL, TITLE, VERMILION, check_title, finish_panel, new_figure
from evodiff_jax.schedules import NoiseSchedule, expect_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 16  # of images
_PANELS = 12  # of points
_PANEL = 1.15  # inches
_HEAD = "sigma / alpha"


def film(run: Run | Trajectory, schedule: NoiseSchedule, *, samples: int = 4, title: str = "") -> "Figure":
    """Draws what a run did, from left to right; needs `evodiff-jax[plots]`.

    Images have two strips a sample: the states x_t, divided by sqrt(alpha^2 + sigma^2), and below them the data
    predictions made there, of which the last state has none. States of two coordinates are points, all samples in each
    panel, on the same axes. These hold all states and the last data predictions; earlier predictions of a network may
    lie far off, and the panel says how many are outside. Columns are headed by sigma / alpha; where a run has many
    times, 16 of them evenly spaced are shown, 12 of points, with the first and the last. Values of images outside of
    -1 .. 1 are clipped, and pixels that are not finite are a chequered pattern of magenta and black.

    Args:
      run: from `diagnostics.follow` or `diagnostics.converge`, with states (R + 1, B, H, W, C), C = 1 or 3, or
        (R + 1, B, 2).
      schedule: the schedule of the run.
      samples: how many of the B images, from the first on; points are always shown of all samples.
      title: of the figure.

    Returns:
      A matplotlib figure, of no window: a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
      ModuleNotFoundError: when matplotlib is not installed.
      TypeError: when an argument is something else, is traced, or the states are a pytree.
      ValueError: when the states have other shapes, or nothing of them is finite, or samples is below 1.
    """
    if not isinstance(run, Run | Trajectory):
        raise TypeError(f"run must be a Run or a Trajectory, from follow or converge, got {type(run).__name__}")
    expect_schedule(schedule)
    if not jax.tree_util.all_leaves([run.states]):
        raise TypeError(
            "film draws one array, the states of this run are a pytree: pass one leaf, such as "
            'run._replace(states=run.states["image"], outputs=run.outputs["image"])'
        )
    states, outputs = check_array("run.states", run.states), check_array("run.outputs", run.outputs)
    times = concrete_array("run.times", run.times)
    image = states.ndim == 5 and states.shape[4] in (1, 3)
    if not (image or (states.ndim == 3 and states.shape[2] == 2)):
        raise ValueError(f"states must be (R + 1, B, H, W, C), C = 1 or 3, or (R + 1, B, 2), got {states.shape}")
    if times.shape != states.shape[:1] or outputs.shape != (len(states) - 1, *states.shape[1:]):
        raise ValueError(
            f"{len(states)} states {states.shape} need as many times, got shape {times.shape}, and one data "
            f"prediction less, got shape {outputs.shape}"
        )
    if not states.size or not np.isfinite(states).any():
        raise ValueError(f"no state is finite, of shape {states.shape}")
    if not is_integer(samples) or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples!r}")
    check_title(title)

    shown = np.unique(np.linspace(0, len(times) - 1, _COLUMNS if image else _PANELS).round().astype(int))
    levels = schedule.levels(times[shown])
    scale = np.hypot(levels.alpha, levels.sigma).astype(np.float32)
    states = states[shown] / scale.reshape(-1, *(1,) * (states.ndim - 1))
    outputs = outputs[shown[:-1]]
    with np.errstate(divide="ignore"):
        heads = [_number(ratio) for ratio in levels.sigma / levels.alpha]
    if image:
        return _strips(states[:, :samples], outputs[:, :samples], heads, title)
    return _points(states, outputs, heads, title)


def _number(ratio: float) -> str:
    """A few digits of sigma / alpha, without an exponent from 0.001 to 9999."""
    if not np.isfinite(ratio):
        return "∞"
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _strips(states: np.ndarray, outputs: np.ndarray, heads: list[str], title: str) -> "Figure":
    columns, count, height, width, _ = states.shape
    cells = np.full((2 * count, columns, height, width, 3), 255, np.uint8)
    cells[::2] = to_pixels(states).swapaxes(0, 1)
    cells[1::2, :-1] = to_pixels(outputs).swapaxes(0, 1)
    labels = [label for index in range(count) for label in (f"sample {index}: state", "data prediction")]
    return draw_sheet(cells, range(0, 2 * count, 2), labels=labels, heads=heads, heads_label=_HEAD, title=title)


def _points(states: np.ndarray, outputs: np.ndarray, heads: list[str], title: str) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    left, right, bottom, top = 0.85, 0.1, 0.5, 0.3 + 0.3 * bool(title)  # inches
    width = left + right + _PANEL * (1.1 * len(states) - 0.1)
    height = bottom + top + _PANEL * 2.1
    figure = new_figure(width, height, constrained=False)  # constrained layout takes seconds for many panels
    panels = figure.subplots(2, len(states), squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, 0.1, 0.1)
    known = [part[np.isfinite(part).all(-1)] for part in (states, outputs[-1:])]
    reach = 1.05 * max(float(np.abs(part).max(initial=0)) for part in known) or 1.0
    for drawn, row, colour, name in zip(
        (states, outputs), panels, (BLUE, VERMILION), ("scaled state", "data prediction"), strict=True
    ):
        row[0].set_ylabel(f"{name},\ncoordinate 2", fontsize=SMALL)
        for points, panel in itertools.zip_longest(drawn, row):
            if points is None:  # the last state has no data prediction
                panel.set_visible(False)
                continue
            panel.scatter(points[:, 0], points[:, 1], s=5, color=colour, alpha=0.6, linewidths=0)
            finite = np.isfinite(points).all(1)
            lost, outside = int((~finite).sum()), int((np.abs(points[finite]) > reach).any(1).sum())
            notes = [f"{lost} not finite"] * (lost > 0) + [f"{outside} outside"] * (outside > 0)
            if notes:
                panel.text(0.5, 0.05, "\n".join(notes), transform=panel.transAxes, ha="center", fontsize=SMALL)
            panel.set_box_aspect(1)
            finish_panel(panel, small=True)
    panels[1, 0].set_xlabel("coordinate 1", fontsize=SMALL)
    panels[0, 0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(head, fontsize=SMALL)
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.yaxis.set_major_locator(MaxNLocator(3))
    panels[0, 0].set_title(f"{_HEAD} = {heads[0]}", fontsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=TITLE, y=1 - 0.08 / height, va="top")
    return figure
