"""Plans: a run laid out as data, so that its number of steps, times and solver are arguments of a compiled program."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from evodiff_jax.numerics import namespace
from evodiff_jax.schedules import NoiseSchedule, check_schedule
from evodiff_jax.solvers._evodiff import evodiff
from evodiff_jax.tables import Plan, Solver, Table, append_denoising, pad


def plan(
    schedule: NoiseSchedule,
    times: ArrayLike,
    solver: Solver | None = None,
    denoise_to_zero: bool = False,
    max_calls: int | None = None,
) -> Plan:
    """Lays out a run for `sample_plan` and `stepping`.

    Args:
      schedule: the model's noise schedule.
      times: (N + 1,) strictly decreasing times within the schedule. Concrete times give a table computed in float64
        on the host; traced ones are not checked.
      solver: one of `evodiff_jax.solvers`, by default evodiff().
      denoise_to_zero: end with the data prediction at times[-1], for one more model call.
      max_calls: the number of rows to pad the table to. Plans of one solver with the same `max_calls` have the same
        shapes and run in the same compiled program.

    Returns:
      The plan; `plan.calls` is its number of model calls.

    Raises:
      TypeError: when the schedule or the solver is something else.
      ValueError: when the times are not as above, or the run takes more calls than `max_calls`.
    """
    check_schedule(schedule)
    solver = check_solver(solver)
    laid_out = from_times(schedule, check_times(times, schedule), solver, denoise_to_zero)
    calls = laid_out.table.time.shape[0]
    if max_calls is None:
        return laid_out
    if calls > max_calls:
        raise ValueError(f"{solver.name} takes {calls} model calls for these times, max_calls is {max_calls}")
    return dataclasses.replace(laid_out, table=pad(laid_out.table, max_calls))


def stack(plans: Sequence[Plan]) -> Plan:
    """Plans of solvers without a rule, stacked on a new leading axis for `jax.vmap` over `sample_plan`.

    Their tables are padded to the same number of calls and the same memory; a vmapped run takes as many calls as the
    longest of them.

    Args:
      plans: from `plan`.

    Returns:
      A plan whose arrays have a leading axis of len(plans).

    Raises:
      ValueError: when there are none, or a plan's solver has a rule or coefficients for each coordinate.

    Example:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> times = ed.grids.log_snr(schedule, 8)
      >>> solvers = (ed.solvers.ddim(), ed.solvers.dpm_solver_pp(2), ed.solvers.unipc(2))
      >>> stacked = ed.plans.stack([ed.plan(schedule, times, solver) for solver in solvers])
      >>> x_T = schedule.t_max * jax.random.normal(jax.random.key(0), (4, 8))
      >>> denoise = lambda x, t: x / (1 + t**2)
      >>> x = jax.jit(jax.vmap(lambda plan: ed.sample_plan(denoise, x_T, plan)))(stacked)
      >>> x.shape
      (3, 4, 8)
    """
    if not plans or any(p.rule is not None or p.table.predictor.ndim > 2 for p in plans):
        raise ValueError("stack needs plans of solvers whose tables alone, with scalar coefficients, are the solver")
    rows = max(p.table.time.shape[0] for p in plans)
    slots = max(p.table.predictor.shape[1] for p in plans)
    uniform = [pad(_with_all_columns(p.table, slots, plans), rows) for p in plans]
    scalars = [(p.calls, p.end, p.denoises) for p in plans]
    stacked = [jax.tree.map(lambda *values: namespace(*values).stack(values), *trees) for trees in (uniform, scalars)]
    table, (calls, end, denoises) = stacked
    return dataclasses.replace(plans[0], table=table, calls=calls, end=end, denoises=denoises)


def from_times(schedule: NoiseSchedule, times: Any, solver: Solver, denoise_to_zero: bool = False) -> Plan:
    """The plan for times as `check_times` returns them, or such times reversed."""
    table = solver.table(schedule, times)
    if denoise_to_zero:
        table = append_denoising(table, times[-1])
    calls, denoises = np.int32(table.time.shape[0]), np.bool_(denoise_to_zero)
    return Plan(table, calls, times[-1], denoises, solver.rule, solver.channel_axis, solver.per_leaf, solver.memory)


def check_solver(solver: Any) -> Solver:
    """The solver, by default evodiff(); raises TypeError for anything else."""
    solver = evodiff() if solver is None else solver
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, for example solvers.evodiff(), called, got {solver!r}")
    return solver


def check_times(times: ArrayLike, schedule: NoiseSchedule) -> Any:
    """The times of a run: float64 NumPy when they are concrete, and then checked; else as they are.

    Raises:
      ValueError: when they are not one-dimensional, fewer than two, not finite, not strictly decreasing, or outside
        the schedule.
    """
    shape: tuple[int, ...] = np.shape(times)  # pyright: ignore[reportAssignmentType]
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"times must be N + 1 >= 2 times in one dimension, got shape {shape}")
    if isinstance(times, Tracer):
        return times
    concrete = np.asarray(times, np.float64)
    if not np.isfinite(concrete).all():
        raise ValueError("times must be finite")
    increases = np.flatnonzero(np.diff(concrete) >= 0)
    if increases.size:
        i = increases[0]
        raise ValueError(
            f"times must be strictly decreasing, from noise to data, got times[{i}] = {concrete[i]} "
            f"and times[{i + 1}] = {concrete[i + 1]}"
        )
    slack = 1e-6 * (schedule.t_max - schedule.t_min)  # float32 times of a float64 grid
    if concrete[0] > schedule.t_max + slack or concrete[-1] < schedule.t_min - slack:
        raise ValueError(
            f"times must lie within the schedule's {schedule.t_min} to {schedule.t_max}, "
            f"got {concrete[-1]} to {concrete[0]}"
        )
    return concrete


def _with_all_columns(table: Table, slots: int, plans: Sequence[Plan]) -> Table:
    """The table with a memory of `slots` and the columns that any of the plans has."""
    xp = namespace(table.time)
    spare = [(0, 0), (0, slots - table.predictor.shape[1])]
    tables = [p.table for p in plans]
    zero, one = xp.zeros_like(table.time), xp.ones_like(table.time)

    def completed(column: Any, others: list[Any], neutral: Any) -> Any:
        return neutral if column is None and any(other is not None for other in others) else column

    return table._replace(
        predictor=xp.pad(table.predictor, spare),
        corrector=xp.pad(table.corrector, spare),
        history=completed(table.history, [t.history for t in tables], (zero, one)),
        noise=completed(table.noise, [t.noise for t in tables], zero),
    )
