"""Prints how good a fitted plan's samples are, beside its start and the best of the solvers that are not fitted.

    python benchmarks/fitting.py --models mixture-2d --calls 5

Models, noise and figures are those of quality.py: Frechet distance, median and root mean square error on noise that the
fit has not seen. The row "training-free" has for each figure the least of all deterministic solvers, each on the better
of the grids log_snr and karras, so that no single solver need be as good. Solvers' samples are made where the store,
which quality.py shares, lacks them.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quality import PROBLEMS

import evodiff_jax as ed
from evodiff_jax import evaluation, fitting
from evodiff_jax.evaluation import Problem
from evodiff_jax.evaluation.metrics import frechet_distance_to
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import FORMS

FIGURES = ("frechet", "median", "rms")


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=["mixture-2d", "mixture-64d"])
    parser.add_argument("--calls", nargs="+", type=int, default=[5])
    parser.add_argument("--solver", choices=FORMS, default="dpm_solver_pp-2", help="the start")
    parser.add_argument("--grid", choices=GRIDS, default="log_snr", help="the start's (default: %(default)s)")
    parser.add_argument("--noises", type=int, default=2048, help="half of them for training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("runs/quality"), help="folder of samples and figures")
    args = parser.parse_args()
    print("| model | calls | plan | Frechet | median | RMS | seconds |\n|---|---|---|---|---|---|---|")
    for name in args.models:
        samples, make = PROBLEMS[name]
        problem = make(samples, args.store)
        for calls in args.calls:
            report(problem, calls, args)


def report(problem: Problem, calls: int, args: argparse.Namespace) -> None:
    """Prints the three rows of one model and number of calls."""
    grids = {name: GRIDS[name] for name in ("log_snr", "karras")}
    results = list(evaluation.compare(problem, grids, [calls], args.store))
    best = [min(float(getattr(result, name).value) for result in results) for name in FIGURES]
    schedule, shape = problem.schedule, problem.noise.shape[1:]
    noise, batches = jax.random.split(jax.random.key(args.seed))
    labels = None if problem.condition is None else np.resize(problem.condition, args.noises)
    start = ed.plan(schedule, GRIDS[args.grid](schedule, calls), FORMS[args.solver].make())
    fitted = fitting.fit(
        lambda x, t, condition=None: problem.denoise(problem.params, x, t, condition),
        schedule,
        start,
        schedule.noise(noise, (args.noises, *shape)),
        condition=labels,
        key=batches,
        steps=args.steps,
        batch=args.batch,
    )
    rows = {
        f"{args.solver}, {args.grid}": (judge(problem, start, args.store), ""),
        "training-free, the best of each": (best, ""),
        "fitted": (judge(problem, fitted.plan, args.store), f"{fitted.report.seconds:.0f}"),
    }
    for plan, (figures, seconds) in rows.items():
        print(
            f"| {problem.name} | {calls} | {plan} | {' | '.join(f'{v:.3g}' for v in figures)} | {seconds} |", flush=True
        )


def judge(problem: Problem, plan: ed.Plan, store: Path) -> tuple[float, ...]:
    """Frechet distance, median and root mean square error of a plan's samples from the problem's noise."""
    exact = evaluation.converged(problem, store)
    run = jax.jit(evaluation.program(lambda params, condition: lambda x, t: problem.denoise(params, x, t, condition)))
    made = []
    for i in range(0, len(exact), problem.batch):
        x_T, condition = jax.tree.map(lambda leaf: leaf[i : i + problem.batch], (problem.noise, problem.condition))  # noqa: B023
        made.append(np.asarray(run(problem.params, jnp.asarray(x_T), condition, None, plan)))
    x = np.concatenate(made)
    error = np.sqrt(np.mean(np.square(x - exact).reshape(len(x), -1), axis=1))
    frechet = frechet_distance_to(problem.data)(problem.features(x))
    return float(frechet), float(np.median(error)), float(np.sqrt(np.mean(error**2)))


if __name__ == "__main__":
    main()
