"""Solvers compared on one model: the same noise, the same numbers of model calls, distances with their intervals.

Runs are stored one by one as they are made, so that a comparison can be interrupted and goes on where it was.
"""

from evodiff_jax.evaluation._document import write_report
from evodiff_jax.evaluation._plots import check_plots
from evodiff_jax.evaluation._problems import MIXTURES, exact, image_model, in_parts, judged_by_itself, mixture
from evodiff_jax.evaluation._report import SUBJECT, standings
from evodiff_jax.evaluation._results import Ratio, Result, best_grids, compare, ratios
from evodiff_jax.evaluation._runs import DETERMINISTIC, Problem, converged, make_sampler, runs, times_of
from evodiff_jax.evaluation._store import check_store

__all__ = [
    "DETERMINISTIC",
    "MIXTURES",
    "SUBJECT",
    "Problem",
    "Ratio",
    "Result",
    "best_grids",
    "check_plots",
    "check_store",
    "compare",
    "converged",
    "exact",
    "image_model",
    "in_parts",
    "judged_by_itself",
    "make_sampler",
    "mixture",
    "ratios",
    "runs",
    "standings",
    "times_of",
    "write_report",
]
