"""A model with its noise, the runs of solvers on it, and how they are made."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.evaluation._store import stored
from evodiff_jax.generation import digest_of_plan, program
from evodiff_jax.grids import Grid, log_snr
from evodiff_jax.sampling import plan
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers import FORMS, unipc
from evodiff_jax.tables import Plan, Solver

_CONVERGED_STEPS = 200

FITTED = "fitted"
"""In the place of a grid's name, for plans that are fitted to a model."""

DETERMINISTIC: dict[str, Callable[[], Solver]] = {n: form.make for n, form in FORMS.items() if not form.stochastic}
"""Every deterministic solver in the forms that people use."""


class Problem(NamedTuple):
    """A model to sample from, and what its samples are judged by.

    Attributes:
      name: what it is called in tables and file names.
      denoise: denoise(params, x, t, condition) -> x_0, for a batch.
      params: the model's parameters.
      schedule: its noise schedule.
      noise: (N, ...) the x_T that every run starts from.
      condition: a pytree of arrays (N, ...), or None.
      features: features(x) -> (N, D), from samples on the host.
      data: (M, D) features of real data, or of independent samples of the model.
      batch: how many samples at a time.
      judged_by: the features and the data in words, for reports.
      images: images(x) -> (N, H, W, C) in -1 .. 1, from samples on the host, where they are images.
    """

    name: str
    denoise: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    params: Any
    schedule: NoiseSchedule
    noise: np.ndarray
    condition: Any
    features: Callable[[np.ndarray], np.ndarray]
    data: np.ndarray
    batch: int
    judged_by: str = ""
    images: Callable[[np.ndarray], np.ndarray] | None = None


class Run(NamedTuple):
    """A solver at one number of model calls on one grid, or a fitted plan.

    Attributes:
      solver: the solver's name, or the plan's.
      grid: the grid's name, FITTED of a plan.
      calls: the number of model calls of a sample.
      times: the times of its steps.
      digest: of the solver, see `digest_of_plan`.
      plan: the fitted plan, None of a solver.
    """

    solver: str
    grid: str
    calls: int
    times: np.ndarray
    digest: str
    plan: Plan | None = None


def runs(
    schedule: NoiseSchedule,
    grids: dict[str, Grid],
    calls: Iterable[int],
    solvers: dict[str, Callable[[], Solver]] = DETERMINISTIC,
    denoise_to_zero: bool = False,
    plans: Mapping[str, Plan] | None = None,
) -> list[Run]:
    """Every solver on every grid at every number of model calls that it can take, the last of `plan` included.

    Fitted plans, by name, follow, whatever their numbers of calls.

    Raises:
      ValueError: when a plan has the name of a solver.
    """
    plans = {} if plans is None else plans
    for name in plans:
        if name in solvers:
            raise ValueError(f"the plan {name!r} has the name of a solver: rename it")
    found = [
        Run(solver, name, count, times, digest_of_plan(plan(schedule, times, make(), denoise_to_zero=denoise_to_zero)))
        for solver, make in solvers.items()
        for name, grid in grids.items()
        for count in sorted(set(calls))
        if (times := times_of(schedule, grid, make(), count, denoise_to_zero)) is not None
    ]
    for name, fitted in plans.items():
        count = int(fitted.calls)
        times = np.append(fitted.table.time[:count], fitted.end)
        found.append(Run(name, FITTED, count, times, digest_of_plan(fitted), fitted))
    return found


def converged(problem: Problem, folder: Path, steps: int = _CONVERGED_STEPS) -> np.ndarray:
    """The samples that deterministic solvers tend to, by UniPC of order 3 in many steps; stored in `folder`.

    Raises:
      ValueError: when they are not finite.
    """
    times = log_snr(problem.schedule, steps)

    def make() -> np.ndarray:
        x = make_sampler(problem, unipc(3), steps)(times)
        if not np.isfinite(x).all():
            raise ValueError(f"the converged samples of {problem.name} are not finite: the model is unusable")
        return x

    digest = digest_of_plan(plan(problem.schedule, times, unipc(3)))
    return stored(folder / problem.name / f"converged_{steps}_{digest}.npy", make)


def times_of(
    schedule: NoiseSchedule, grid: Grid, solver: Solver, calls: int, denoise_to_zero: bool = False
) -> np.ndarray | None:
    """The times of the run that takes exactly `calls` model calls, or None where the solver has no such run."""
    of_steps = calls - denoise_to_zero
    for steps in (of_steps, (of_steps + 1) // 2):
        if steps < 1:
            continue
        times = grid(schedule, steps)
        if plan(schedule, times, solver, denoise_to_zero=denoise_to_zero).calls == calls:
            return times
    return None


def make_sampler(problem: Problem, solver: Solver, max_calls: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from times to samples (N, ...), compiled once for all runs of up to `max_calls` calls."""
    sampler = make_plan_sampler(problem)
    return lambda times: sampler(plan(problem.schedule, times, solver, max_calls=max_calls))


def make_plan_sampler(problem: Problem) -> Callable[[Plan], np.ndarray]:
    """A function from a plan to samples (N, ...), compiled once for all plans of one shape and rule."""
    run = jax.jit(program(lambda params, condition: lambda x, t: problem.denoise(params, x, t, condition)))

    def sampler(laid_out: Plan) -> np.ndarray:
        count = len(problem.noise)
        # The last batch is filled up with the first samples, so that all have one shape.
        batches = np.resize(np.arange(count), (-(-count // problem.batch), problem.batch))
        made = []
        for rows in batches:
            x_T, condition = jax.tree.map(lambda leaf: leaf[rows], (problem.noise, problem.condition))  # noqa: B023
            made.append(np.asarray(run(problem.params, x_T, condition, None, laid_out)))
        return np.concatenate(made)[:count]

    return sampler
