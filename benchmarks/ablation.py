"""Prints what each ingredient of evodiff() is worth: figures without it relative to the full rule, above 1 for worse.

    uv run --group quality python benchmarks/ablation.py

Geometric means over numbers of model calls on the log-SNR grid, on models of benchmarks/quality.py: the Fréchet
distance, and the median and root mean square over samples of the error against the converged samples, which --store
keeps.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from quality import CALLS, PROBLEMS

import evodiff_jax as ed
from evodiff_jax import evaluation
from evodiff_jax.evaluation import metrics
from evodiff_jax.solvers import _evodiff

FIGURES = ("Fréchet", "median", "RMS")


def prior(row: Any, gram: Any, known: Any, outputs: Any) -> tuple[Any, Any, Any]:
    """The spectrum before anything is known."""
    return known.energy, known.unexplained, 0 * known.unexplained


def explained(row: Any, gram: Any, known: Any, outputs: Any) -> tuple[Any, Any, Any]:
    """The spectrum that explains all."""
    nothing = 0 * known.unexplained
    energy, _, _ = _evodiff._spectrum(row, gram, known._replace(unexplained=nothing), outputs, unexplained=0.0)
    return energy, nothing, nothing


def two(missing: Any, differences: Any, weights: Any, ridge: Any) -> Any:
    """The least squares of two differences."""
    return _evodiff._least_squares(missing, differences.at[2].set(0), weights, ridge)


def none(missing: Any, differences: Any, weights: Any, ridge: Any) -> Any:
    """No change of c*."""
    return 0 * differences[:, 0]


def without_noise(row: Any, gram: Any, memory: Any) -> Any:
    """The rule of a state without noise: c* is that of a scale far above kappa, and no commitment is noticed."""
    return _evodiff._rule(row, gram._replace(noise=0 * gram.noise), memory)


def without_commitment(row: Any, gram: Any, memory: Any) -> Any:
    """The rule that forgets how the outputs moved."""
    return _evodiff._rule(row, gram, memory.at[-_evodiff._SIZES.course :].set(0))


VARIANTS = {
    "evodiff()": {},
    "the prior for a spectrum": {"spectrum": prior},
    "no unexplained energy": {"spectrum": explained},
    "scales without errors of their own": {"exact_scales": True},
    "two differences": {"least_squares": two},
    "no corrector": {"corrects": False},
    "c* alone": {"least_squares": none},
}


def variants() -> dict[str, ed.Solver]:
    """The solvers by what is left out."""
    full = ed.solvers.evodiff()
    changed = {name: full._replace(rule=functools.partial(_evodiff._rule, **parts)) for name, parts in VARIANTS.items()}
    return {
        **changed,
        "no noise": full._replace(rule=without_noise),
        "no commitment": full._replace(rule=without_commitment),
        "evodiff_reference()": ed.solvers.evodiff_reference(),
    }


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
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=["mixture-64d", "digits-0.1", "digits-0.3"])
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--store", type=Path, default=Path("runs/ablation"), help="folder of converged samples")
    args = parser.parse_args()

    problems = [PROBLEMS[name][1](args.samples, args.store) for name in args.models]
    converged = [evaluation.converged(problem, args.store) for problem in problems]
    print(f"| | {' | '.join(f'{name} {figure}' for name in args.models for figure in FIGURES)} |")
    print(f"|---|{'---:|' * len(FIGURES) * len(problems)}")
    full = None
    for name, solver in variants().items():
        pairs = zip(problems, converged, strict=True)
        found = np.stack([figures(problem, solver, args.calls, exact) for problem, exact in pairs])
        full = found if full is None else full
        ratios = np.exp(np.mean(found - full, axis=1)).ravel()
        print(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
