"""What all figures have in common: the figure itself, styles of lines, axes of model calls, legends."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evodiff_jax.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
TITLE, LABEL, SMALL = 11, 9, 8
"""Sizes of text in points."""

# Of Okabe and Ito, told apart by the colour-blind; without yellow, too light on white. Neighbours differ in lightness.
BLACK, VERMILION, SKY, GREEN, ORANGE, BLUE, PURPLE = (
    "#000000",
    "#D55E00",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#0072B2",
    "#CC79A7",
)
COLOURS = (BLACK, VERMILION, SKY, GREEN, ORANGE, BLUE, PURPLE)
MARKERS = "os^vDP*<>"
DASHES = ("-", "--", ":", "-.")

_APART = 0.055  # how far labels of ticks are at least, as a share of the axis


def new_figure(width: float, height: float, *, constrained: bool = True) -> "Figure":
    """An empty figure of a size in inches, with matplotlib's constrained layout or none.

    Raises:
      ModuleNotFoundError: when matplotlib is not installed.
    """
    require("matplotlib", extra="plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from evodiff_jax.plotting._shown import ShownFigure

    figure = ShownFigure(figsize=(width, height), dpi=DPI, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line; 36 lines have different pairs of dashes and marker, for print in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markerfacecolor": "white",
        "markersize": 5,
        "linewidth": 1.5,
    }


def draw_intervals(panel: Any, x: Any, low: Any, high: Any, colour: str) -> None:
    """Error bars from low to high, of which the value itself may lie outside."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    panel.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", ecolor=colour, elinewidth=1, capsize=2)


def finish_panel(panel: Any, small: bool = False) -> None:
    """The panel's ticks and grid."""
    panel.tick_params(which="both", labelsize=SMALL - 1 if small else SMALL)
    panel.grid(alpha=0.3, linewidth=0.5)


def calls_axis(panel: Any, calls: Sequence[int]) -> None:
    """A logarithmic x axis with ticks at these numbers of model calls, which have labels where there is room."""
    from matplotlib.ticker import NullFormatter, NullLocator

    counts = sorted(set(calls))
    places = np.log(counts)
    span = max(places[-1] - places[0], 1e-9)
    labels, last = [], -np.inf
    for count, place in zip(counts, places, strict=True):
        roomy = (place - last) / span >= _APART
        labels.append(str(count) if roomy else "")
        last = place if roomy else last
    panel.set_xscale("log")
    panel.set_xticks(counts, labels)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())


def log_axis(panel: Any, values: Any) -> None:
    """A logarithmic y axis for values above 0, from a third of the smallest; intervals that reach further are cut.

    Its ticks have labels 1, 2, 5 and so on, or powers of ten alone over many decades.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    least, most = np.min(values), np.max(values)
    panel.set_yscale("log", nonpositive="clip")
    panel.set_ylim(bottom=max(panel.get_ylim()[0], least / 3))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def add_legend(figure: "Figure", lines: Mapping[str, Any], loc: Any, columns: int = 1) -> None:
    """A legend outside of the panels, with room for dashes and marker."""
    figure.legend(list(lines.values()), list(lines), loc=loc, ncols=columns, fontsize=SMALL, handlelength=3.5)


def check_title(title: Any) -> str:
    """The title, if it is text; else raises TypeError."""
    if not isinstance(title, str):
        raise TypeError(f"title must be text, got {title!r}")
    return title
