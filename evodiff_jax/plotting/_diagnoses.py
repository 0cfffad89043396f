"""Diagnoses as a figure: a panel a quantity, a line a solver, against log-SNR."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.diagnostics import QUANTITIES, Density, Diagnosis
from evodiff_jax.plotting.style import (
    DASHES,
    SMALL,
    TITLE,
    add_legend,
    check_title,
    finish_panel,
    line_style,
    log_axis,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DENSITY = "density"
_TITLES = {
    **QUANTITIES,
    "entropy": "conditional entropy of the transition",
    "information": "information about the data",
    "zeta": "zeta",
    "eta": "eta",
    _DENSITY: "where calls help",
}
_UNITS = {
    "entropy": "nats a coordinate",
    "information": "nats a coordinate",
    "curvature": "of the step's length",
    _DENSITY: "share of the calls per unit of log-SNR",
    "zeta": "",
    "eta": "",
    "posterior_variance": "squared units of the data",
    "reconstruction_error": "units of the data, RMS",
    "transition_error": "units of the state, RMS",
    "state_error": "units of the state, RMS",
    "update_variance": "squared units of the state",
    "transition_variance": "squared units of the state",
}
_LINEAR = ("entropy", "information", "curvature", "zeta", "eta", _DENSITY)
_COLUMNS = 4
_OF_MODEL = "0.3"  # the colour of what no solver changes


def diagnoses(diagnoses: Mapping[str, Diagnosis], title: str = "") -> "Figure":
    """Draws diagnoses, with means over samples and bands of 1.96 standard errors; needs `evodiff-jax[plots]`.

    The state's error is drawn at the end of the step, all else at its start. What is at alpha = 0 or sigma = 0, where
    the log-SNR is infinite, is left out, and so is a mean of 0 or below on a logarithmic axis. The last panel is the
    density of calls of methods of order 1 and 2.

    Args:
      diagnoses: from `diagnostics.diagnose`.
      title: of the figure.

    Returns:
      A matplotlib figure, of no window: a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
      ModuleNotFoundError: when matplotlib is not installed.
      TypeError: when diagnoses are something else, or the title is no text.
      ValueError: when there are no diagnoses, or nothing in them is finite.
    """
    if not isinstance(diagnoses, Mapping) or not all(isinstance(found, Diagnosis) for found in diagnoses.values()):
        raise TypeError(f"diagnoses must be a dictionary, from diagnose, got {diagnoses!r}")
    if not diagnoses:
        raise ValueError("there must be a diagnosis at least, from diagnose")
    check_title(title)
    shown = [name for name in _TITLES if any(len(_line(found, name)[0]) for found in diagnoses.values())]
    if not shown:
        raise ValueError("no quantity of the diagnoses is finite anywhere")
    density = next(iter(diagnoses.values())).density  # of the model, the same for all
    if density:
        shown.append(_DENSITY)
    rows = -(-len(shown) // _COLUMNS)
    figure = new_figure(3.6 * _COLUMNS, 2.7 * rows + 0.7)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for panel, name in zip(panels, shown, strict=False):
        if name == _DENSITY:
            lines |= _draw_density(panel, density)
        positive: list[float] = []
        for index, (solver, found) in enumerate(diagnoses.items()):
            if name == "curvature" and index:  # of the model, the same for all
                continue
            x, mean, half = _line(found, name)
            if not len(x):
                continue
            if name not in _LINEAR:
                mean = np.where(mean > 0, mean, np.nan)
                positive += mean[mean > 0].tolist()
            style = {**line_style(index), "markersize": 4, "linewidth": 1.3}
            if name == "curvature":
                style |= {"color": _OF_MODEL, "marker": ".", "linestyle": "-"}
            (line,) = panel.plot(x, mean, **style)
            panel.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
            if name != "curvature":
                lines.setdefault(solver, line)
        panel.set_title(_TITLES[name], fontsize=SMALL)
        panel.set_xlabel("log-SNR, 2 log(alpha / sigma)", fontsize=SMALL - 1)
        panel.set_ylabel(_UNITS[name], fontsize=SMALL - 1)
        finish_panel(panel, small=True)
        if positive:
            log_axis(panel, positive)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=TITLE)
    if lines:
        add_legend(figure, lines, "outside lower center", columns=min(len(lines), 6))
    return figure


def _draw_density(panel: Any, density: Mapping[int, Density]) -> dict[str, Any]:
    """Draws a line an order of methods, and returns the lines with their names."""
    lines = {}
    for dashes, (order, found) in zip(DASHES, sorted(density.items()), strict=False):
        log_snr, share = 2 * np.asarray(found.lambda_), np.asarray(found.density) / 2
        name = f"calls, method of order {order}"
        (lines[name],) = panel.plot(log_snr, share, color=_OF_MODEL, linestyle=dashes, linewidth=1.3)
    panel.set_ylim(bottom=0)
    return lines


def _of(found: Diagnosis, name: str) -> np.ndarray:
    return found.values.get(name, np.full(1, np.nan))


def _line(found: Diagnosis, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The places, means and half intervals of a line, where they are known."""
    values = np.asarray(_of(found, name), np.float64)
    if values.ndim != 2:
        return np.empty(0), np.empty(0), np.empty(0)
    x = 2 * (found.lambda_[1:] if name == "state_error" else found.lambda_[:-1])
    mean = values.mean(1)
    half = 1.96 * values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else np.zeros(len(mean))
    known = np.isfinite(x) & np.isfinite(mean)
    return x[known], mean[known], half[known]
