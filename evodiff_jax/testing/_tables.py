"""What the table of a solver must be on every schedule and grid, whatever the method."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax import grids, schedules
from evodiff_jax.numerics import enable_x64
from evodiff_jax.sampling import plan as make_plan
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Plan, Solver

STEPS = (1, 2, 3, 8)
_TRACED = 1e-7  # the relative difference of a table in jax.numpy and one in NumPy, both in float64


class Case(NamedTuple):
    """A run for which a solver is asked for its table; `name` is said in errors."""

    name: str
    schedule: NoiseSchedule
    times: np.ndarray


def cases(schedule: NoiseSchedule | None) -> Iterator[Case]:
    """Several schedules, each with one or two grids, or the only schedule with three, with few and with more steps."""
    pairs = [
        ("edm()", schedules.edm(), "karras"),
        ("edm()", schedules.edm(), "log_snr"),
        ("vp_linear()", schedules.vp_linear(), "time_uniform"),
        ("flow(1, 0.01, 0.99)", schedules.flow(1.0, 0.01, 0.99), "log_snr"),
        ("discrete(...)", schedules.discrete(schedules.scaled_linear_betas()), "time_uniform"),
    ]
    if schedule is not None:
        names = ["time_uniform", "log_snr", "karras"] if has_finite_ends(schedule) else ["time_uniform"]
        pairs = [("the schedule", schedule, name) for name in names]
    for name, of_run, grid in pairs:
        for steps in STEPS:
            times = getattr(grids, grid)(of_run, steps)
            yield Case(f"{grid}(schedule, {steps}) of {name}", of_run, times)


def has_finite_ends(schedule: NoiseSchedule) -> bool:
    """Whether there is signal at t_max and noise at t_min."""
    return bool(np.isfinite(schedule.levels([schedule.t_min, schedule.t_max]).lambda_).all())


def plan_of(solver: Solver, case: Case) -> Plan:
    """The plan, whose table is checked.

    Raises:
      ValueError: when `plan` refuses it, a concrete table is not of float64 NumPy arrays, or a row calls the model
        outside the run.
    """
    where = f"solver {solver.name!r} on {case.name}"
    try:
        plan = make_plan(case.schedule, case.times, solver)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    for path, column in jax.tree_util.tree_leaves_with_path(plan.table):
        if isinstance(column, jax.Array) or column.dtype == np.float32:
            kind = "a JAX array" if isinstance(column, jax.Array) else "NumPy's"
            raise ValueError(
                f"{where}: column {jax.tree_util.keystr(path)[1:]} is {kind} of {column.dtype}, whose rounding shows "
                "in samples: compute tables of concrete times with NumPy in float64"
            )
    slack = 1e-9 * (case.times[0] - case.times[-1])
    outside = (plan.table.time > case.times[0] + slack) | (plan.table.time < case.times[-1] - slack)
    if outside.any():
        raise ValueError(
            f"{where}: row {np.argmax(outside)} calls the model at t = {plan.table.time[np.argmax(outside)]:.6g}, "
            f"outside the run from {case.times[0]:.6g} to {case.times[-1]:.6g}"
        )
    return plan


def check_one_program(solver: Solver, plans: list[tuple[Case, Plan]]) -> None:
    """Checks that plans of all numbers of steps, padded, have the same columns, and that a plan is always the same.

    Raises:
      ValueError: when they differ.
    """
    case, plan = plans[-1]
    again = jax.tree.leaves(plan_of(solver, case).table)
    if not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plan.table), again, strict=True)):
        raise ValueError(
            f"solver {solver.name!r} on {case.name}: the table differs from call to call: it must depend on the "
            "schedule and the times alone"
        )

    def form(plan: Plan) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(plan.table)
        return {jax.tree_util.keystr(path)[1:]: np.shape(column)[1:] for path, column in leaves}

    (first, of_first), *others = ((case, form(plan)) for case, plan in plans)
    for other, of_other in others:
        for column in [*of_first, *of_other]:
            a, b = (columns.get(column, "none") for columns in (of_first, of_other))
            if a != b:
                raise ValueError(
                    f"solver {solver.name!r}: column {column} has rows of shape {a} on {first.name} and {b} on "
                    f"{other.name}, so that each needs a program of its own: give all tables the same columns and "
                    "memory, and fill what is not needed with zeros"
                )


def takes_traced_times(solver: Solver, case: Case) -> bool:
    """Whether the table can be made of traced times.

    Raises:
      ValueError: when it then differs from the table of concrete times.
    """
    with enable_x64():
        try:
            jax.eval_shape(lambda times: solver.table(case.schedule, times), case.times)
        except (TypeError, ValueError, IndexError):  # functions of NumPy, or conditions on times
            return False
        traced, concrete = (solver.table(case.schedule, times) for times in (jnp.asarray(case.times), case.times))
    found, expected = (jax.tree_util.tree_leaves_with_path(table) for table in (traced, concrete))
    for (path, ours), (_, theirs) in zip(found, expected, strict=True):
        size = max(float(np.max(np.abs(theirs), initial=0)), 1e-12)
        difference = float(np.max(np.abs(np.asarray(ours) - theirs), initial=0))
        if not difference <= _TRACED * size:
            raise ValueError(
                f"solver {solver.name!r} on {case.name}: column {jax.tree_util.keystr(path)[1:]} of JAX's times "
                f"differs by {difference:.3g} from that of NumPy's: both are to be made by the same formulas in float64"
            )
    return True
