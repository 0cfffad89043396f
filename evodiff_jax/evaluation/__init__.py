"""Solvers compared on one model: the same noise, the same numbers of model calls, distances with their intervals; FID.

Runs are stored as they are made, so that a comparison can be interrupted and goes on where it was.
"""

from evodiff_jax.evaluation._document import write_report
from evodiff_jax.evaluation._fid import Fid, evaluate, inception_features, settings_of, skipped, source_of
from evodiff_jax.evaluation._fid_report import aligned, fid_table, write_fid_report
from evodiff_jax.evaluation._plots import check_plots
from evodiff_jax.evaluation._problems import (
    MIXTURES,
    exact,
    image_model,
    in_parts,
    judged_by_itself,
    mixture,
    modes_of,
    text_model,
)
from evodiff_jax.evaluation._reference import Reference, read_reference
from evodiff_jax.evaluation._report import SUBJECT, standings
from evodiff_jax.evaluation._results import Ratio, Result, best_grids, compare, ratios
from evodiff_jax.evaluation._runs import (
    DETERMINISTIC,
    FITTED,
    Problem,
    converged,
    make_sampler,
    runs,
    times_of,
)
from evodiff_jax.evaluation._statistics import Statistics, include, no_statistics
from evodiff_jax.evaluation._store import check_store, stored
from evodiff_jax.generation import UINT8, Source, digest_of_plan, program, program_from_key, to_uint8

__all__ = [
    "DETERMINISTIC",
    "FITTED",
    "MIXTURES",
    "SUBJECT",
    "UINT8",
    "Fid",
    "Problem",
    "Ratio",
    "Reference",
    "Result",
    "Source",
    "Statistics",
    "aligned",
    "best_grids",
    "check_plots",
    "check_store",
    "compare",
    "converged",
    "digest_of_plan",
    "evaluate",
    "exact",
    "fid_table",
    "image_model",
    "in_parts",
    "inception_features",
    "include",
    "judged_by_itself",
    "make_sampler",
    "mixture",
    "modes_of",
    "no_statistics",
    "program",
    "program_from_key",
    "ratios",
    "read_reference",
    "runs",
    "settings_of",
    "skipped",
    "source_of",
    "standings",
    "stored",
    "text_model",
    "times_of",
    "to_uint8",
    "write_fid_report",
    "write_report",
]
