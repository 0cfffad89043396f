"""Diagnoses as a figure: a panel a quantity, a line a solver, against log-SNR."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.diagnostics._diagnose import QUANTITIES, Diagnosis
from evodiff_jax.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito, told apart by the colour-blind; dashes and markers tell lines apart in grey.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osv^Dx+"
_DASHES = ("-", "--", "-.", ":")
_TITLES = {
    **QUANTITIES,
    "entropy": "conditional entropy of the transition",
    "information": "information about the data",
    "zeta": "zeta",
    "eta": "eta",
}
_UNITS = {
    "entropy": "nats a coordinate",
    "information": "nats a coordinate",
    "curvature": "of the step's length",
    "zeta": "",
    "eta": "",
    "posterior_variance": "squared units of the data",
    "reconstruction_error": "units of the data, RMS",
    "transition_error": "units of the state, RMS",
    "state_error": "units of the state, RMS",
    "update_variance": "squared units of the state",
    "transition_variance": "squared units of the state",
}
_LINEAR = ("entropy", "information", "curvature", "zeta", "eta")
_COLUMNS = 4


def plot(diagnoses: Mapping[str, Diagnosis], title: str = "") -> "Figure":
    """Draws diagnoses, with means over samples and bands of 1.96 standard errors; needs `evodiff-jax[plots]`.

    The state's error is drawn at the end of the step, all else at its start. What is at alpha = 0 or sigma = 0, where
    the log-SNR is infinite, is left out.

    Args:
      diagnoses: from `diagnose`.
      title: of the figure.

    Returns:
      A matplotlib figure, of no window: `figure.savefig(path)` writes it.

    Raises:
      ModuleNotFoundError: when matplotlib is not installed.
      ValueError: when there are no diagnoses.
    """
    require("matplotlib", extra="plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not diagnoses:
        raise ValueError("plot needs a diagnosis at least, from diagnose")
    shown = [name for name in _TITLES if any(np.isfinite(_of(found, name)).any() for found in diagnoses.values())]
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(3.6 * _COLUMNS, 2.7 * rows + 0.7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for panel, name in zip(panels, shown, strict=False):
        for index, (solver, found) in enumerate(diagnoses.items()):
            if name == "curvature" and index:  # of the model, the same for all
                continue
            x, mean, half = _line(found, name)
            if not len(x):
                continue
            style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
            if name == "curvature":
                style = {"color": "0.3", "marker": "."}
            dashes = _DASHES[index % len(_DASHES)]
            line = panel.plot(x, mean, linestyle=dashes, markersize=3.5, linewidth=1.3, markerfacecolor="none", **style)
            panel.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
            if name != "curvature":
                lines[solver] = line[0]
        panel.set_title(_TITLES[name], fontsize=8)
        panel.set_xlabel("log-SNR, 2 log(alpha / sigma)", fontsize=7)
        panel.set_ylabel(_UNITS[name], fontsize=7)
        panel.tick_params(which="both", labelsize=7)
        panel.grid(alpha=0.3, linewidth=0.5)
        if name not in _LINEAR:
            panel.set_yscale("log", nonpositive="mask")
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=9)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=min(len(lines), 7), fontsize=8)
    return figure


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
