"""Solvers compared on one model: the same noise, the same numbers of model calls, distances with their intervals.

Runs are stored one by one as they are made, so that a comparison can be interrupted and goes on where it was.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.files import write_atomically
from evodiff_jax.grids import Grid, log_snr
from evodiff_jax.metrics import Estimate, bootstrap, frechet_distance_to, kernel_distance, trajectory_errors
from evodiff_jax.plans import plan
from evodiff_jax.sampling import sample_plan
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers import SOLVERS, deis, dpm_solver, dpm_solver_pp, ipndm, ipndm_v, unipc
from evodiff_jax.tables import Plan, Solver

_CONVERGED_STEPS = 500

# Every deterministic solver in the forms that people use: a family's name, and its order where it has several.
FORMS: dict[str, Callable[[], Solver]] = {
    **{name: SOLVERS[name] for name in ("evodiff", "evodiff_reference", "ddim", "heun", "dpm_2")},
    **{
        f"{make.__name__}-{order}": functools.partial(make, order)
        for make, orders in (
            (dpm_solver, (2, 3)),
            (dpm_solver_pp, (2, 3)),
            (unipc, (2, 3)),
            (deis, (2, 3)),
            (ipndm, (2, 3, 4)),
            (ipndm_v, (2, 4)),
        )
        for order in orders
    },
}


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


class Ratio(NamedTuple):
    """A solver's figure over the best peer's, on the same noise, grid and number of calls.

    Attributes:
      problem: the problem's name.
      grid: the grid's name.
      calls: the number of model calls of a sample.
      figure: "frechet" or "median", as in `Result`.
      peer: the name of the best peer.
      ratio: below 1 where the solver is better.
    """

    problem: str
    grid: str
    calls: int
    figure: str
    peer: str
    ratio: Estimate


def compare(
    problem: Problem,
    grids: dict[str, Grid],
    calls: Iterable[int],
    folder: Path,
    solvers: dict[str, Callable[[], Solver]] = FORMS,
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
    distance = frechet_distance_to(problem.data)
    for solver_name, make in solvers.items():
        sampler = make_sampler(problem, make(), calls[-1])
        for grid_name, grid in grids.items():
            for count in calls:
                times = times_of(problem.schedule, grid, make(), count)
                if times is None:
                    continue
                path = _path(problem, folder, solver_name, grid_name, count)
                x = _stored(path, functools.partial(sampler, times))
                judged = _judge(x, exact, problem, distance, resamples)
                yield Result(problem.name, grid_name, solver_name, count, *judged)


def ratios(
    problem: Problem, results: Iterable[Result], folder: Path, solver: str, peers: Collection[str], resamples: int = 100
) -> Iterator[Ratio]:
    """How one solver compares with the best of its peers, which may be another one for every figure and run.

    Args:
      problem: the model.
      results: what `compare` yielded of it.
      folder: where `compare` stored the samples.
      solver: the solver's name.
      peers: the names of the solvers to compare with.
      resamples: of the bootstrap.

    Yields:
      For every grid and number of calls that `solver` and a peer have taken the ratio of Frechet distances, then that
      of median trajectory errors, with intervals from the same rows of both.
    """
    results = [r for r in results if r.problem == problem.name]
    exact = converged(problem, folder)
    distance = frechet_distance_to(problem.data)

    for mine in (r for r in results if r.solver == solver):
        rivals = [r for r in results if (r.grid, r.calls) == (mine.grid, mine.calls) and r.solver in peers]
        for figure in ("frechet", "median") if rivals else ():
            best = min(rivals, key=lambda r: getattr(r, figure).value)
            if not np.isfinite(getattr(mine, figure).value):
                ratio = Estimate(np.inf, np.inf, np.inf)
            else:
                pair = [np.load(_path(problem, folder, r.solver, r.grid, r.calls)) for r in (mine, best)]
                if figure == "frechet":
                    pair, statistic = [problem.features(x) for x in pair], distance
                else:
                    pair, statistic = [trajectory_errors(x, exact) for x in pair], _median

                def of_rows(rows: np.ndarray, pair: list = pair, statistic: Callable = statistic) -> float:
                    return statistic(pair[0][rows]) / max(statistic(pair[1][rows]), np.finfo(np.float64).tiny)

                ratio = bootstrap(of_rows, len(problem.noise), resamples=resamples)
            yield Ratio(problem.name, mine.grid, mine.calls, figure, best.solver, ratio)


def _judge(
    x: np.ndarray, exact: np.ndarray, problem: Problem, distance: Callable[[np.ndarray], float], resamples: int
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
    found = problem.features(x)
    frechet = bootstrap(lambda rows: distance(found[rows]), len(x), resamples=resamples)
    value, error = kernel_distance(found, problem.data)
    return frechet, Estimate(value, value - 1.96 * error, value + 1.96 * error), median, worst_tenth, 0.0


def _median(errors: np.ndarray) -> float:
    return float(np.quantile(errors, 0.5, method="higher"))


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


def _path(problem: Problem, folder: Path, solver: str, grid: str, calls: int) -> Path:
    return folder / problem.name / f"{solver}_{grid}_{calls}.npy"


def _stored(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if path.exists():
        return np.load(path)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.save(file, made))
    return made
