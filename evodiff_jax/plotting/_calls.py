"""Solvers against the number of model calls."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.numerics import concrete_array, is_integer
from evodiff_jax.plotting.style import (
    LABEL,
    TITLE,
    add_legend,
    calls_axis,
    check_title,
    draw_intervals,
    finish_panel,
    line_style,
    log_axis,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def against_calls(values: Mapping[str, Mapping[int, Any]], *, metric: str, title: str = "") -> "Figure":
    """Draws a line a solver against the number of model calls; needs `evodiff-jax[plots]`.

    Calls are on a logarithmic axis, values too unless one of them is 0 or negative. A value that is not finite leaves a
    gap. On a logarithmic axis the intervals are cut at a third of the smallest value.

    Args:
      values: by solver and number of calls, a value or (value, low, high), whose interval is an error bar. An interval
        that is not finite is left out.
      metric: the values' name with their unit, such as "RMS error (units of the data)".
      title: of the figure.

    Returns:
      A matplotlib figure, of no window: a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
      ModuleNotFoundError: when matplotlib is not installed.
      TypeError: when values are no dictionary of dictionaries, numbers of calls no integers, values no numbers, or
        metric and title no text.
      ValueError: when there are no values, numbers of calls below 1, values of another shape, no finite value, or an
        interval whose low end is above its high one.
    """
    lines = _checked(values)
    check_title(title)
    if not isinstance(metric, str) or not metric:
        raise TypeError(f"metric must be text that names the values and their unit, got {metric!r}")
    known = np.concatenate([points[:, 1] for points in lines.values()])
    known = known[np.isfinite(known)]
    if not len(known):
        raise ValueError("no value is finite")

    figure = new_figure(7.2, max(3.8, 0.24 * len(lines) + 0.8))
    panel = figure.subplots()
    handles = {}
    for index, (solver, points) in enumerate(lines.items()):
        style = line_style(index)
        (handles[solver],) = panel.plot(points[:, 0], points[:, 1], label=solver, **style)
        given = points[np.isfinite(points).all(1)]
        if len(given):
            draw_intervals(panel, given[:, 0], given[:, 2], given[:, 3], style["color"])
    if (known > 0).all():
        log_axis(panel, known)
    calls_axis(panel, [int(count) for points in lines.values() for count in points[:, 0]])
    panel.set_xlabel("model calls a sample", fontsize=LABEL)
    panel.set_ylabel(metric, fontsize=LABEL)
    finish_panel(panel)
    if title:
        figure.suptitle(title, fontsize=TITLE)
    add_legend(figure, handles, "outside right upper")
    return figure


def _checked(values: Any) -> dict[str, np.ndarray]:
    """(calls, 4) of each solver, in order of the calls: calls, value, low and high, NaN where there is no interval."""
    if not isinstance(values, Mapping) or not all(isinstance(found, Mapping) for found in values.values()):
        raise TypeError(f"values must be dictionaries {{solver: {{calls: value}}}}, got {values!r}")
    if not values or not all(values.values()):
        raise ValueError(f"values must have a solver at least, and each a number of calls, got {values!r}")
    lines = {}
    for solver, found in values.items():
        rows = []
        for calls, value in found.items():
            where = f"values[{solver!r}][{calls!r}]"
            if not is_integer(calls):
                raise TypeError(f"{where}: the number of calls must be an integer")
            if calls < 1:
                raise ValueError(f"{where}: the number of calls must be at least 1")
            numbers = concrete_array(where, value)
            if numbers.shape not in ((), (3,)):
                raise ValueError(f"{where} must be a value or (value, low, high), got shape {numbers.shape}")
            value, low, high = numbers if numbers.ndim else (float(numbers), math.nan, math.nan)
            if low > high:
                raise ValueError(f"{where} must be (value, low, high), got {value:g}, {low:g}, {high:g}")
            rows.append((calls, value if np.isfinite(value) else math.nan, low, high))
        lines[str(solver)] = np.array(sorted(rows), np.float64)
    return lines
