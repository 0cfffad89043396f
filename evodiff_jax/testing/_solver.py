"""Whether a solver of one's own does what it says: its tables, its order, its noise, and how it runs in JAX."""

import dataclasses
import functools
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.grids import log_snr
from evodiff_jax.numerics import enable_x64
from evodiff_jax.sampling import expect_solver, sample
from evodiff_jax.schedules import NoiseSchedule, expect_schedule
from evodiff_jax.tables import Plan, Solver, pad
from evodiff_jax.testing import _runs, _tables
from evodiff_jax.testing._models import gaussian
from evodiff_jax.testing._orders import Order, observed_order, observed_order_of_variance

_ORDER = 0.25  # an observed order is this near to the true one; 0.2 is the most among the package's solvers
_CONVERGES = 0.75  # the least observed order of a solver that says none
_EQUAL = 1e-8  # of the largest number of a sample: runs in float64 that are to be the same
_ROWS = 32  # that plans of runs are padded to
_SAMPLES, _STEPS_OF_NOISE = 2_500, 200  # of the moments of samples; their standard errors are 2 and 1.4 %
_MEAN, _STD = 0.7, np.array([0.2, 1.0])  # of their data
_MOMENTS = 0.08  # of the deviation: what mean and deviation of samples may be off; the steps make up to 0.02 of it


class SolverReport(NamedTuple):
    """What `check_solver` measured.

    Attributes:
      calls: the model calls a step of a run of 8 steps.
      remembers: K, the number of earlier outputs that a step uses at most.
      order: the observed order: of the samples, or for a stochastic solver of their variance; None for a solver with
        noise and a rule, and on a schedule of its own whose log-SNR is infinite at an end.
      errors: {model calls: error} that the order is the slope of, see `check_solver`.
      stochastic: whether it adds noise.
      traced_times: whether its table can be made of traced times, inside `jax.jit`.
      picklable: whether it can be pickled.
    """

    calls: float
    remembers: int
    order: float | None
    errors: dict[int, float]
    stochastic: bool
    traced_times: bool
    picklable: bool


def check_solver(solver: Solver, *, order: float | None = None, schedule: NoiseSchedule | None = None) -> SolverReport:
    """Checks a solver on models without error, in float64 where numbers are compared, whatever JAX is set to.

    Checked are, in this order:

    * its tables on four schedules with grids of 1, 2, 3 and 8 steps: columns, float64, times within the run, and one
      set of columns, so that padded plans run in one compiled program; the tables of JAX's times are those of NumPy's;
    * if it keeps constants and its outputs are data predictions: a model that predicts a constant gets it back, and the
      initial noise falls as sigma;
    * its runs, in compiled programs: finite samples in float64, float32 and bfloat16, near each other; states that are
      pytrees; each sample by itself, whatever the others are; finite gradients; with a rule, padded plans as plans
      without padding;
    * of a stochastic solver: the same key gives the same samples, each key its own, and samples of normal data have
      its mean and deviation;
    * the order: the slope of the error over the steps, on `bimodal` data with log-SNR steps. Of a stochastic solver
      without a rule it is that of the variance of samples of normal data, computed without sampling.

    A solver with a rule is to pass `check_rule` too.

    Args:
      solver: yours.
      order: the order that it is to have, within 0.25; left out, it must be above 0.75.
      schedule: the only schedule that the solver is for; the observed order is then that on it.

    Returns:
      What was measured.

    Raises:
      TypeError: when solver is no Solver or schedule no NoiseSchedule.
      ValueError: for the first check that fails; the message says where and by how much.

    Examples:
      >>> import evodiff_jax as ed
      >>> report = check_solver(ed.solvers.dpm_solver_pp(2), order=2)
      >>> report.calls, report.remembers, round(report.order, 1)
      (1.0, 1, 2.0)
    """
    expect_solver(solver)
    if schedule is not None:
        expect_schedule(schedule)
    cases = list(_tables.cases(schedule))
    plans = [(case, _tables.plan_of(solver, case)) for case in cases]
    _tables.check_one_program(solver, plans)
    traced = _tables.takes_traced_times(solver, next(case for case in cases if len(case.times) == 4))
    if solver.keeps_constants and solver.rule is None:
        _check_constants(solver, plans)
    of_run = next(case for case in cases if len(case.times) == _tables.STEPS[-1] + 1)
    stochastic = plans[0][1].table.noise is not None
    _check_runs(solver, of_run, stochastic)
    if stochastic:
        _check_noise(solver, of_run)
    found = _order(solver, schedule, stochastic, order)
    longest = plans[cases.index(of_run)][1]
    return SolverReport(
        calls=int(longest.calls) / (len(of_run.times) - 1),
        remembers=longest.table.predictor.shape[1] - 1,
        order=None if found is None else found.order,
        errors={} if found is None else dict(zip(found.calls, found.errors, strict=True)),
        stochastic=stochastic,
        traced_times=traced,
        picklable=_is_picklable(solver, of_run),
    )


def state(plan: Plan, schedule: NoiseSchedule, dtype: Any, seed: int = 0) -> jax.Array:
    """Initial noise of the shape that the plan's coefficients are for."""
    shape = (_runs.SHAPE[0], *np.shape(plan.table.predictor)[2:]) if np.ndim(plan.table.predictor) > 2 else _runs.SHAPE
    return _runs.noise(shape, float(schedule.levels(plan.table.time[0]).sigma), dtype, seed)


def difference(x: Any, y: Any) -> float:
    """The largest difference between two samples, over the largest number in them."""
    x, y = (np.asarray(value, np.float64) for value in (x, y))
    return float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), np.max(np.abs(y)), 1e-12))


def padded(plan: Plan, rows: int = _ROWS) -> Plan:
    """The plan with at least so many rows and, without a rule, with the columns of all."""
    table = pad(plan.table, max(rows, int(plan.calls)))
    return _runs.shared(dataclasses.replace(plan, table=table))


def _check_constants(solver: Solver, plans: list[tuple[_tables.Case, Plan]]) -> None:
    """Runs a constant model, whose exact solution has the initial noise over sigma(t_max) times sigma(t_min)."""
    constant = 0.7
    with enable_x64():
        for case, plan in (run for run in plans if len(run[0].times) in (2, 4)):
            if plan.table.noise is not None or plan.table.history is not None:
                return  # noise predictions of a constant model are constants themselves only without round-off
            alpha, sigma, _ = case.schedule.levels(case.times[[0, -1]])
            x_T = state(plan, case.schedule, jnp.float64)
            x = _runs.run(_runs.Model(0.0, constant, 1.0), x_T, padded(plan), _runs.keys())
            expected = alpha[1] * constant + sigma[1] / sigma[0] * (x_T - alpha[0] * constant)
            if not difference(x, expected) < _EQUAL:
                raise ValueError(
                    f"solver {solver.name!r} on {case.name}: samples of a model that predicts the constant {constant} "
                    f"differ by {difference(x, expected):.3g} of their size from the exact ones, in which the initial "
                    "noise is multiplied with sigma(t_min) / sigma(t_max): check transition against predictor and "
                    "corrector (or say keeps_constants=False)"
                )


def _check_runs(solver: Solver, case: _tables.Case, stochastic: bool) -> None:
    where = f"solver {solver.name!r} on {case.name}"
    bare, model, keys = _tables.plan_of(solver, case), _runs.Model(), _runs.keys()
    plan = padded(bare)
    with enable_x64():
        x_T, others = (state(plan, case.schedule, jnp.float64, seed) for seed in (0, 1))
        whole = np.asarray(_runs.run(model, x_T, plan, keys))
        if not np.isfinite(whole).all():
            raise ValueError(f"{where}: the samples of a smooth model are not finite in float64")
        if solver.rule is not None:
            again = _runs.run(model, x_T, _runs.shared(bare), keys)
            if not difference(again, whole) < _EQUAL:
                raise ValueError(
                    f"{where}: samples of the plan padded to {_ROWS} rows differ by {difference(again, whole):.3g} of "
                    "their size from those without padding: a rule's functions must depend on their arguments alone"
                )
        mixed, of_mixed = (
            jnp.roll(a.at[0].set(b[0]), 1, axis=0) for a, b in ((others, x_T), (_runs.keys(seed=1), keys))
        )
        apart = difference(_runs.run(model, mixed, plan, of_mixed)[1], whole[0])
        if not apart < _EQUAL:
            raise ValueError(
                f"{where}: a sample changes by {apart:.3g} of its size when the others of its batch are replaced: "
                "something is summed, or normalised, over the batch axis"
            )
    wide = x_T.astype(jnp.float32)
    x, gradients = _runs.run_and_gradients(model, wide, plan, keys)
    _check_finite(x, f"{where}: samples in float32")
    _check_finite(gradients, f"{where}: gradients of samples in float32")
    leaves = _runs.run(model, {"narrow": (x_T.astype(jnp.bfloat16),), "wide": wide}, plan, keys)
    _check_finite(leaves, f"{where}: samples of a state that is a pytree of bfloat16 and float32")
    size = max(float(np.max(np.abs(whole))), 1e-12)
    for found, near in ((x, 1e-3), (leaves["narrow"][0], 0.1)):
        off = float(np.median(np.abs(np.asarray(found, np.float64) - whole))) / size
        if not stochastic and not off < near:  # the noise of other dtypes is another
            raise ValueError(
                f"{where}: samples in {found.dtype} differ from those in float64 by {off:.3g} of their size"
            )


def _check_finite(tree: Any, what: str) -> None:
    for leaf in jax.tree.leaves(tree):
        values = np.asarray(leaf, np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{what} are not finite: {np.count_nonzero(~np.isfinite(values))} of {values.size} numbers"
            )


def _check_noise(solver: Solver, case: _tables.Case) -> None:
    where = f"solver {solver.name!r} on {case.name}"
    plan, model = padded(_tables.plan_of(solver, case)), _runs.Model()
    with enable_x64():
        x_T = state(plan, case.schedule, jnp.float64)
        first, again, other = (_runs.run(model, x_T, plan, _runs.keys(seed=seed)) for seed in (0, 0, 1))
    if not np.array_equal(first, again):
        raise ValueError(
            f"{where}: the same key gives different samples: draw nothing outside the key that it is given"
        )
    if np.array_equal(first, other):
        raise ValueError(f"{where}: another key gives the same samples, though the table has a column of noise")
    schedule = case.schedule
    if not _tables.has_finite_ends(schedule):
        return
    times = log_snr(schedule, _STEPS_OF_NOISE)
    many = padded(_tables.plan_of(solver, _tables.Case(case.name, schedule, times)), 2 * _STEPS_OF_NOISE)
    x_0 = _MEAN + _runs.noise((_SAMPLES, 2), 1.0, jnp.float32) * _STD.astype(np.float32)
    x_T = schedule.add_noise(x_0, schedule.t_max, jax.random.key(2))
    x = np.asarray(_of_normal_data(schedule)(x_T, many, jax.random.key(3)))
    alpha, sigma, _ = schedule.levels(schedule.t_min)
    exact = np.hypot(alpha * _STD, sigma)
    for name, off in (
        ("mean", (x.mean(0) - alpha * _MEAN) / exact),
        ("standard deviation", x.std(0) / exact - 1),
    ):
        if not (np.abs(off) < _MOMENTS).all():
            raise ValueError(
                f"solver {solver.name!r}: after {_STEPS_OF_NOISE} log-SNR steps the {name} of samples of normal data "
                f"is off by {off.round(3)} of their exact deviations {exact.round(3)}: check the noise column against "
                "the coefficients"
            )


@functools.lru_cache(maxsize=8)
def _of_normal_data(schedule: NoiseSchedule) -> Any:
    """The run on the exact model of normal data, compiled once for all solvers without a rule."""
    denoise = gaussian(schedule, _MEAN, _STD).denoise
    return jax.jit(lambda x_T, plan, key: sample(denoise, x_T, plan, key=key))


def _order(solver: Solver, schedule: NoiseSchedule | None, stochastic: bool, claimed: float | None) -> Order | None:
    found = None
    if not (stochastic and solver.rule is not None) and (schedule is None or _tables.has_finite_ends(schedule)):
        found = (observed_order_of_variance if stochastic else observed_order)(solver, schedule)
    if found is None:
        if claimed is not None:
            raise ValueError(
                f"the order of solver {solver.name!r} can't be measured: it adds noise and has a rule, or its schedule "
                "has no finite log-SNR at both ends; leave order out"
            )
        return None
    wrong = not found.order > _CONVERGES if claimed is None else not abs(found.order - claimed) <= _ORDER
    if wrong:
        errors = [f"{error:.3g} in {calls} calls" for calls, error in zip(found.calls, found.errors, strict=True)]
        of = "the variance of samples of normal data" if stochastic else "samples of bimodal data"
        raise ValueError(
            f"solver {solver.name!r} has an observed order of {found.order:.2f}, not "
            f"{'1 or more' if claimed is None else claimed}: errors of {of} are {', '.join(errors)}"
        )
    return found


def _is_picklable(solver: Solver, case: _tables.Case) -> bool:
    try:
        again = pickle.loads(pickle.dumps(solver))
    except (pickle.PicklingError, AttributeError, TypeError):  # functions that are not at the top of a module
        return False
    plans = [_tables.plan_of(each, case) for each in (solver, again)]
    leaves = [jax.tree.leaves(plan.table) for plan in plans]
    if again.rule != solver.rule or not all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)):
        raise ValueError(f"solver {solver.name!r}: the pickled solver has another table or rule")
    return True
