"""Prints what each constant and part of variance_optimal() is worth: figures over those of the whole rule.

    uv run --group quality python benchmarks/ablation.py

Each constant is halved and doubled, and each part left out, one at a time. Geometric means over numbers of model calls
on the log-SNR grid, on models of benchmarks/quality.py: the Frechet distance, and the median and root mean square over
samples of the error against the converged samples, which --store keeps. For comparison the published EVODiff.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from quality import PROBLEMS

import evodiff_jax as ed
from evodiff_jax import evaluation
from evodiff_jax.evaluation import metrics
from evodiff_jax.solvers import _variance_optimal as rule

FIGURES = ("Frechet", "median", "RMS")
CONSTANTS = (
    "POWER",
    "SMALLEST",
    "NARROW",
    "WIDE",
    "SHARPNESS",
    "RIDGE_CORRECTOR",
    "RIDGE_PREDICTOR",
    "GROWTH",
    "CLEAR",
)
# What is set to leave a part of the rule out.
PARTS: dict[str, dict[str, Any]] = {
    "one prior, narrow": {"WIDE": rule.NARROW},
    "one prior, wide": {"NARROW": rule.WIDE},
    "no commitment to a mode": {"CLEAR": 1e9},
    "c* alone": {"RIDGE_CORRECTOR": 1e3, "RIDGE_PREDICTOR": 1e3},
}


def variants() -> dict[str, dict[str, Any]]:
    """By name, what is set instead."""
    changed = {
        f"{words} {name}": {name: factor * getattr(rule, name)}
        for name in CONSTANTS
        for words, factor in (("half", 0.5), ("twice", 2.0))
    }
    return {"variance_optimal()": {}, **PARTS, **changed}


@contextlib.contextmanager
def constants(changed: dict[str, Any]) -> Iterator[None]:
    """The rule with other constants, which its functions read when a plan is made and a run is traced."""
    before = {name: getattr(rule, name) for name in changed}
    jax.clear_caches()  # JAX keeps what it has traced of the rule's functions, with the constants of then
    try:
        for name, value in changed.items():
            setattr(rule, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(rule, name, value)


def figures(problem: evaluation.Problem, solver: ed.Solver, calls: list[int], exact: np.ndarray) -> np.ndarray:
    """(calls, figures), all logarithms."""
    sampler, rows = evaluation.make_sampler(problem, solver, max(calls)), []
    distance = metrics.frechet_distance_to(problem.data)
    for count in calls:
        x = sampler(ed.grids.log_snr(problem.schedule, count))
        errors = metrics.trajectory_errors(x, exact)
        frechet = distance(problem.features(x)) if np.isfinite(x).all() else math.inf
        rows.append((frechet, np.median(errors), math.sqrt(np.mean(errors**2))))
    return np.log(rows)


def main() -> None:
    """Prints a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=["mixture-64d", "digits-0.3", "galaxies-hsc"])
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 8, 12])
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--store", type=Path, default=Path("runs/ablation"), help="folder of converged samples")
    args = parser.parse_args()

    problems = [PROBLEMS[name][1](args.samples, args.store) for name in args.models]
    converged = [evaluation.converged(problem, args.store) for problem in problems]
    print(f"| | {' | '.join(f'{name} {figure}' for name in args.models for figure in FIGURES)} |")
    print(f"|---|{'---:|' * len(FIGURES) * len(problems)}")
    full = None
    for name, changed in [*variants().items(), ("evodiff()", None)]:
        with constants(changed or {}):
            solver = ed.solvers.evodiff() if changed is None else ed.solvers.variance_optimal()
            pairs = zip(problems, converged, strict=True)
            found = np.stack([figures(problem, solver, args.calls, exact) for problem, exact in pairs])
        full = found if full is None else full
        ratios = np.exp(np.mean(found - full, axis=1)).ravel()
        print(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
