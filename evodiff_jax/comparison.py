"""Solvers compared on one model: the same noise, the same numbers of model calls, distances with their intervals.

Runs are stored one by one as they are made, so that a comparison can be interrupted and goes on where it was.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.files import write_atomically
from evodiff_jax.grids import Grid, log_snr
from evodiff_jax.metrics import Estimate, bootstrap, frechet_distance, kernel_distance, trajectory_errors
from evodiff_jax.plans import plan
from evodiff_jax.sampling import sample_plan
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers import SOLVERS, unipc
from evodiff_jax.tables import Plan, Solver

_CONVERGED_STEPS = 500


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
      data: (M, D) features of real data, or None to compare with converged samples.
      batch: how many samples at a time.
    """

    name: str
    denoise: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    params: Any
    schedule: NoiseSchedule
    noise: np.ndarray
    condition: Any
    features: Callable[[np.ndarray], np.ndarray]
    data: np.ndarray | None
    batch: int


class Result(NamedTuple):
    """What one run is worth.

    Attributes:
      problem: the problem's name.
      grid: the grid's name.
      solver: the solver's name.
      calls: the number of model calls of a sample.
      frechet: the Frechet distance in the problem's features.
      kernel: the kernel distance, with an interval of 1.96 standard errors.
      median: the median over samples of the trajectory error.
      worst_tenth: its 90th percentile.
      blown_up: the fraction of samples that are not finite.
    """

    problem: str
    grid: str
    solver: str
    calls: int
    frechet: Estimate
    kernel: Estimate
    median: Estimate
    worst_tenth: Estimate
    blown_up: float


def compare(
    problem: Problem,
    grids: dict[str, Grid],
    calls: Iterable[int],
    folder: Path,
    solvers: dict[str, Callable[[], Solver]] = SOLVERS,
    resamples: int = 100,
) -> Iterator[Result]:
    """Runs and judges every solver on every grid at every number of model calls that it can take.

    Args:
      problem: the model.
      grids: grids by name.
      calls: numbers of model calls a sample.
      folder: where samples are stored, and found when they have been made before; a folder belongs to one version of
        the problems and solvers.
      solvers: solvers by name.
      resamples: of the bootstrap.

    Yields:
      One result a run, as soon as it is made.
    """
    calls = sorted(calls)
    exact = converged(problem, folder)
    exact_features = problem.features(exact)
    for solver_name, make in solvers.items():
        sampler = make_sampler(problem, make(), calls[-1])
        for grid_name, grid in grids.items():
            for count in calls:
                times = times_of(problem.schedule, grid, make(), count)
                if times is None:
                    continue
                path = folder / problem.name / f"{solver_name}_{grid_name}_{count}.npy"
                x = _stored(path, functools.partial(sampler, times))
                judged = judge(x, exact, problem.features, exact_features, problem.data, resamples)
                yield Result(problem.name, grid_name, solver_name, count, *judged)


def judge(
    x: np.ndarray,
    exact: np.ndarray,
    features: Callable[[np.ndarray], np.ndarray],
    exact_features: np.ndarray,
    data: np.ndarray | None,
    resamples: int,
) -> tuple[Estimate, Estimate, Estimate, Estimate, float]:
    """The figures of a `Result` from its samples: with a sample that is not finite the distances are infinite."""
    blown_up = 1 - np.isfinite(x).reshape(len(x), -1).all(1).mean()
    errors = trajectory_errors(x, exact)
    median, worst_tenth = (
        bootstrap(lambda rows, q=q: float(np.quantile(errors[rows], q, method="higher")), len(x), resamples=resamples)
        for q in (0.5, 0.9)
    )
    if blown_up:
        infinite = Estimate(np.inf, np.inf, np.inf)
        return infinite, infinite, median, worst_tenth, float(blown_up)
    found = features(x)

    def frechet_of(rows: np.ndarray) -> float:
        # Against converged samples of the same noise, the same rows of both are drawn.
        return frechet_distance(found[rows], exact_features[rows] if data is None else data)

    frechet = bootstrap(frechet_of, len(x), resamples=resamples)
    value, error = kernel_distance(found, exact_features if data is None else data)
    return frechet, Estimate(value, value - 1.96 * error, value + 1.96 * error), median, worst_tenth, 0.0


def converged(problem: Problem, folder: Path, steps: int = _CONVERGED_STEPS) -> np.ndarray:
    """The samples that deterministic solvers tend to, by UniPC of order 3 in many steps; stored in `folder`."""
    times = log_snr(problem.schedule, steps)
    path = folder / problem.name / f"converged_{steps}.npy"
    return _stored(path, lambda: make_sampler(problem, unipc(3), steps)(times))


def times_of(schedule: NoiseSchedule, grid: Grid, solver: Solver, calls: int) -> np.ndarray | None:
    """The times of the run that takes exactly `calls` model calls, or None where the solver has no such run."""
    for steps in (calls, (calls + 1) // 2):
        times = grid(schedule, steps)
        if plan(schedule, times, solver).calls == calls:
            return times
    return None


def make_sampler(problem: Problem, solver: Solver, max_calls: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from times to samples (N, ...), compiled once for all runs of up to `max_calls` calls."""

    @jax.jit
    def run(params: Any, x_T: jax.Array, condition: Any, laid_out: Plan) -> jax.Array:
        return sample_plan(lambda x, t: problem.denoise(params, x, t, condition), x_T, laid_out)

    def sampler(times: np.ndarray) -> np.ndarray:
        laid_out = plan(problem.schedule, times, solver, max_calls=max_calls)
        count = len(problem.noise)
        # The last batch is filled up with the first samples, so that all have one shape.
        batches = np.resize(np.arange(count), (-(-count // problem.batch), problem.batch))
        made = []
        for rows in batches:
            x_T, condition = jax.tree.map(lambda leaf: leaf[rows], (problem.noise, problem.condition))  # noqa: B023
            made.append(np.asarray(run(problem.params, x_T, condition, laid_out)))
        return np.concatenate(made)[:count]

    return sampler


def _stored(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if path.exists():
        return np.load(path)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.save(file, made))
    return made
