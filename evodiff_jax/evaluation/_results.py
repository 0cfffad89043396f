"""What runs are worth: distances and errors with their intervals, and ratios to the best peer."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evodiff_jax.evaluation._runs import (
    DETERMINISTIC,
    FITTED,
    Problem,
    Run,
    converged,
    make_plan_sampler,
    make_sampler,
    runs,
)
from evodiff_jax.evaluation._store import Figures, path_of, stored
from evodiff_jax.evaluation.metrics import (
    Estimate,
    bootstrap,
    bootstrap_ratio,
    frechet_distance_to,
    kernel_distance_to,
    trajectory_errors,
)
from evodiff_jax.grids import Grid
from evodiff_jax.tables import Plan, Solver, pad

RANKED = ("frechet", "median", "rms")  # the figures that solvers are compared by
_INFINITE = Estimate(np.inf, np.inf, np.inf)


class Result(NamedTuple):
    """What one run is worth.

    Attributes:
      problem: the problem's name.
      grid: the grid's name, "fitted" of a fitted plan.
      solver: the solver's name, or the plan's.
      calls: the number of model calls of a sample.
      frechet: the Frechet distance in the problem's features.
      kernel: the kernel distance, with an interval of 1.96 standard errors.
      median: the median over samples of the trajectory error.
      worst_tenth: its 90th percentile.
      rms: its root mean square, in which the few samples that end elsewhere weigh most.
      samples: the number of samples.
      blown_up: the number of them that are not finite.
      digest: of the solver, see `digest_of_plan`.
    """

    problem: str
    grid: str
    solver: str
    calls: int
    frechet: Estimate
    kernel: Estimate
    median: Estimate
    worst_tenth: Estimate
    rms: Estimate
    samples: int
    blown_up: int
    digest: str

    def path(self, folder: Path) -> Path:
        """Where the samples are that `compare` stored in `folder`."""
        return path_of(folder / self.problem, self.solver, self.grid, self.calls, self.digest)


class Ratio(NamedTuple):
    """A solver's figure over the best peer's, on the same noise and number of calls.

    Attributes:
      problem: the problem's name.
      grid: the grid's name.
      calls: the number of model calls of a sample.
      figure: "frechet", "median" or "rms", as in `Result`.
      peer: the name of the best peer.
      peer_grid: the name of its grid.
      ratio: below 1 where the solver is better.
    """

    problem: str
    grid: str
    calls: int
    figure: str
    peer: str
    peer_grid: str
    ratio: Estimate


def compare(
    problem: Problem,
    grids: dict[str, Grid],
    calls: Iterable[int],
    folder: Path,
    solvers: dict[str, Callable[[], Solver]] = DETERMINISTIC,
    resamples: int = 100,
    stored_only: bool = False,
    plans: Mapping[str, Plan] | None = None,
) -> Iterator[Result]:
    """Runs and judges every solver on every grid at every number of model calls that it can take, and fitted plans.

    Args:
      problem: the model.
      grids: grids by name.
      calls: numbers of model calls a sample.
      folder: where samples and figures are stored, in a folder of the problem's name, and found when they have been
        made before; it belongs to one version of the problem and of the solvers, see `check_store`.
      solvers: solvers by name.
      resamples: of the bootstrap.
      stored_only: leave out what is not stored, so that nothing is sampled.
      plans: fitted plans of the model by name, each at its own number of calls; their results have the grid "fitted".

    Yields:
      One result a run, as soon as it is made.

    Raises:
      ValueError: when the converged samples are not finite, or a plan has the name of a solver.
    """
    judge, calls = _Judge(problem, folder, resamples), sorted(calls)
    samplers = {}
    longest = max((fitted.table.time.shape[0] for fitted in (plans or {}).values()), default=0)
    for run in runs(problem.schedule, grids, calls, solvers, plans=plans):
        path = path_of(folder / problem.name, run.solver, run.grid, run.calls, run.digest)
        if stored_only and not path.exists():
            continue

        def make(run: Run = run) -> np.ndarray:
            name = run.solver if run.plan is None else FITTED
            if name not in samplers:
                samplers.clear()  # the compiled programs of the solvers before
                if run.plan is None:
                    samplers[name] = make_sampler(problem, solvers[name](), calls[-1])
                else:
                    samplers[name] = make_plan_sampler(problem)
            if run.plan is None:
                return samplers[name](run.times)
            return samplers[name](dataclasses.replace(run.plan, table=pad(run.plan.table, longest)))

        x = stored(path, make)
        blown_up = int(np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(1)))
        figures = *judge.distances_of(x), *judge.errors_of(x)
        yield Result(problem.name, run.grid, run.solver, run.calls, *figures, len(x), blown_up, run.digest)


def converged_distance(problem: Problem, folder: Path, resamples: int = 100) -> Estimate:
    """The Frechet distance of the converged samples themselves, which a better solver does not lower."""
    return _Judge(problem, folder, resamples).distances_of(converged(problem, folder))[0]


def best_grids(results: Iterable[Result], figure: str) -> list[Result]:
    """Of every solver and number of calls the result on the grid where the figure is smallest."""
    best: dict[tuple, Result] = {}
    for result in results:
        key = result.problem, result.solver, result.calls
        if key not in best or getattr(result, figure).value < getattr(best[key], figure).value:
            best[key] = result
    return list(best.values())


def ratios(
    problem: Problem,
    results: Iterable[Result],
    folder: Path,
    solver: str,
    peers: Collection[str],
    resamples: int = 100,
    best_grid: bool = False,
) -> Iterator[Ratio]:
    """How one solver compares with the best of its peers, which may be another one for every figure and run.

    Args:
      problem: the model.
      results: what `compare` yielded of it.
      folder: where `compare` stored the samples.
      solver: the solver's name.
      peers: the names of the solvers to compare with.
      resamples: of the bootstrap.
      best_grid: compare every solver on the grid where its figure is smallest, not all on the same.

    Yields:
      For every grid (one if `best_grid`) and number of calls that `solver` and a peer have taken the ratio of each
      figure, with intervals from the same rows of both.
    """
    results = [r for r in results if r.problem == problem.name]
    judge = _Judge(problem, folder, resamples)
    rows = {figure: best_grids(results, figure) if best_grid else results for figure in RANKED}
    order = [(None if best_grid else r.grid, r.calls) for r in rows["median"] if r.solver == solver]

    for grid, calls in order:
        for figure, candidates in rows.items():
            candidates = [r for r in candidates if r.calls == calls and grid in (None, r.grid)]
            mine = next(r for r in candidates if r.solver == solver)
            rivals = [r for r in candidates if r.solver in peers]
            if not rivals:
                continue
            best = min(rivals, key=lambda r: getattr(r, figure).value)
            if not np.isfinite(getattr(mine, figure).value):
                ratio = _INFINITE
            elif not np.isfinite(getattr(best, figure).value):
                ratio = Estimate(0.0, 0.0, 0.0)
            else:
                ours, theirs = (np.load(r.path(folder)) for r in (mine, best))
                ratio = judge.ratio_of(ours, theirs, figure)
            yield Ratio(problem.name, mine.grid, calls, figure, best.solver, best.grid, ratio)


class _Judge:
    """Figures of samples of one problem; those that have been computed before are found in its folder."""

    def __init__(self, problem: Problem, folder: Path, resamples: int) -> None:
        self._problem, self._resamples = problem, resamples
        self._exact = converged(problem, folder)
        self._known = Figures(folder / problem.name, self._exact, problem.data)

    @functools.cached_property
    def _frechet(self) -> Callable[[np.ndarray], float]:
        return frechet_distance_to(self._problem.data)

    @functools.cached_property
    def _kernel(self) -> Callable[[np.ndarray], tuple[float, float]]:
        return kernel_distance_to(self._problem.data)

    def distances_of(self, x: np.ndarray) -> tuple[Estimate, Estimate]:
        """Frechet and kernel distance, infinite with a sample that is not finite."""

        def compute() -> np.ndarray:
            if not np.isfinite(x).all():
                return np.ravel([_INFINITE, _INFINITE])
            found = self._problem.features(x)
            frechet = self._bootstrap(lambda rows: self._frechet(found[rows]), centered=True)
            value, error = self._kernel(found)
            return np.ravel([frechet, (value, value - 1.96 * error, value + 1.96 * error)])

        values = self._known.get(f"distances {self._resamples}", [x], compute)
        return Estimate(*values[:3]), Estimate(*values[3:])

    def errors_of(self, x: np.ndarray) -> tuple[Estimate, Estimate, Estimate]:
        """The median, 90th percentile and root mean square of the trajectory error."""

        def compute() -> np.ndarray:
            errors = trajectory_errors(x, self._exact)
            worst_tenth = functools.partial(_quantile, q=0.9)
            return np.ravel(
                [self._bootstrap(lambda rows, of=of: of(errors[rows])) for of in (_quantile, worst_tenth, _rms)]
            )

        values = self._known.get(f"errors {self._resamples}", [x], compute)
        return Estimate(*values[:3]), Estimate(*values[3:6]), Estimate(*values[6:])

    def ratio_of(self, x: np.ndarray, other: np.ndarray, figure: str) -> Estimate:
        """The figure of samples over that of others, from the same rows of both."""

        def compute() -> Estimate:
            if figure == "frechet":
                a, b, statistic = self._problem.features(x), self._problem.features(other), self._frechet
            else:
                a, b = (trajectory_errors(of, self._exact) for of in (x, other))
                statistic = _rms if figure == "rms" else _quantile
            return bootstrap_ratio(
                lambda rows: statistic(a[rows]),
                lambda rows: statistic(b[rows]),
                len(a),
                resamples=self._resamples,
                centered=figure == "frechet",
            )

        return Estimate(*self._known.get(f"ratio {figure} {self._resamples}", [x, other], compute))

    def _bootstrap(self, statistic: Callable[[np.ndarray], float], centered: bool = False) -> Estimate:
        return bootstrap(statistic, len(self._problem.noise), resamples=self._resamples, centered=centered)


def _quantile(errors: np.ndarray, q: float = 0.5) -> float:
    return float(np.quantile(errors, q, method="higher"))


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
