"""The teacher: the plan of many calls whose samples a fit aims at, and those samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from evodiff_jax.fitting._offsets import check_levels, time_at
from evodiff_jax.numerics import concrete_array, is_integer
from evodiff_jax.sampling import plan as lay_out
from evodiff_jax.sampling import sample
from evodiff_jax.schedules import NoiseSchedule, expect_schedule, made_of
from evodiff_jax.solvers import unipc
from evodiff_jax.tables import Plan, denoises_to_zero
from evodiff_jax.types import batch_size, check_function, check_state

STEPS = 100
_BEYOND = 5.0  # what the default teacher adds to lambda where the run ends at sigma = 0 or starts at alpha = 0


def default_teacher(schedule: NoiseSchedule, plan: Plan, steps: int = STEPS) -> Plan:
    """UniPC of order 3 in equal log-SNR steps between a plan's ends.

    A run to sigma = 0 or from alpha = 0, where lambda is infinite, has a last or first step more, from or to 5 beyond
    the lambda of the plan's time next to it. Where the plan ends with the data prediction at its last time
    (`denoise_to_zero`), the teacher does so too.

    Args:
      schedule: the schedule of the plan.
      plan: the plan that is to be fitted.
      steps: the number of steps, at least the plan's.

    Returns:
      The teacher.

    Raises:
      TypeError: when schedule or plan is something else.
      ValueError: when there are fewer steps than the plan makes calls.
    """
    expect_schedule(schedule)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, from evodiff_jax.plan(schedule, times, solver), got {plan!r}")
    calls = int(plan.calls)
    if not is_integer(steps) or steps < calls:
        raise ValueError(f"a teacher's steps must be an integer of at least the plan's {calls} calls, got {steps!r}")
    times = np.append(concrete_array("the plan's times", plan.table.time)[:calls], float(plan.end))
    denoised = denoises_to_zero(plan)
    if denoised:
        times = times[:-1]
    lambda_ = schedule.levels(times).lambda_
    known = np.isfinite(lambda_)
    inside = lambda_[known] if known.any() else np.zeros(1)
    ends = inside[0] - _BEYOND * (not known[0]), inside[-1] + _BEYOND * (not known[-1])
    middle = np.asarray(time_at(schedule, np.linspace(*ends, steps + 1)))
    if known[0]:
        middle = middle[1:]
    if known[-1]:
        middle = middle[:-1]
    times = np.concatenate([times[:1], middle, times[-1:]])
    return lay_out(schedule, times, unipc(3), denoise_to_zero=bool(denoised))


def converge(
    denoise: Callable[..., Any],
    x_T: Any,
    teacher: Plan,
    *,
    params: Any = None,
    condition: Any = None,
    batch: int = 128,
) -> Any:
    """The teacher's samples, on the host: `fit` takes them as `target`, so that fits of several plans share them.

    Args:
      denoise: as for `fit`.
      x_T: (N, ...) noise, or a pytree of such.
      teacher: the plan, such as `default_teacher`.
      params: as for `fit`.
      condition: as for `fit`.
      batch: samples at a time.

    Returns:
      NumPy arrays like x_T.

    Raises:
      TypeError: when an argument is something else.
      ValueError: when an argument is out of range, or samples are not finite.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    x_T = check_state(x_T, "x_T")
    if not is_integer(batch) or batch < 1:
        raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
    check_condition(condition, batch_size(x_T))
    run = jax.jit(lambda plan, params, x, condition: sample(bind(denoise, params, condition), x, plan))
    samples = in_batches(functools.partial(run, teacher, params), (x_T, condition), batch)
    check_finite(samples)
    return samples


def bind(denoise: Callable[..., Any], params: Any, condition: Any) -> Callable[[Any, Any], Any]:
    """denoise(x, t) for one batch."""
    before, after = (() if extra is None else (extra,) for extra in (params, condition))
    return made_of(lambda x, t: denoise(*before, x, t, *after), denoise)


def in_batches(run: Callable[..., Any], data: tuple[Any, ...], batch: int) -> Any:
    """run(*data) of all samples, on the host; the last batch is filled up with the first ones."""
    count = batch_size(data[0])
    batches = np.resize(np.arange(count), (-(-count // batch), min(batch, count)))
    made = [jax.tree.map(np.asarray, run(*jax.tree.map(lambda leaf: leaf[rows], data))) for rows in batches]  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *made)


def check_condition(condition: Any, count: int) -> None:
    """Raises ValueError where the condition has not one entry for each sample."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(condition):
        if np.shape(leaf)[:1] != (count,):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"condition{where} must have one entry for each of the {count} samples of x_T, got shape "
                f"{np.shape(leaf)}"
            )


def check_finite(samples: Any) -> None:
    """Raises ValueError where a sample of the teacher is not finite."""
    finite = [np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(samples)]
    bad = np.flatnonzero(~np.logical_and.reduce(finite))
    if bad.size:
        which = ", ".join(map(str, bad[:5])) + (", ..." if bad.size > 5 else "")
        raise ValueError(
            f"{bad.size} of the teacher's {len(finite[0])} samples are not finite, those of x_T[{which}]: the model or "
            "the teacher is unusable there"
        )


def check_teacher(teacher: Any, plan: Plan, schedule: NoiseSchedule) -> None:
    """Raises TypeError or ValueError where the teacher is none of the plan."""
    if not isinstance(teacher, Plan):
        raise TypeError(f"teacher must be a Plan, from evodiff_jax.plan(schedule, times, solver), got {teacher!r}")
    if np.ndim(teacher.calls) != 0:
        raise ValueError(f"the teacher is a stack of {np.shape(teacher.calls)[0]} plans: give one")
    check_levels("the teacher", teacher.levels, schedule)
    if teacher.table.noise is not None:
        raise ValueError("the teacher is of a stochastic solver: its samples are not functions of x_T")
    if int(teacher.calls) < int(plan.calls):
        raise ValueError(f"the teacher makes {int(teacher.calls)} calls, fewer than the plan's {int(plan.calls)}")
    ends, own = ((float(p.table.time[0]), float(p.end)) for p in (teacher, plan))
    if not np.allclose(ends, own, rtol=0, atol=1e-6 * (schedule.t_max - schedule.t_min)):
        raise ValueError(
            f"the teacher runs from t = {ends[0]:g} to {ends[1]:g}, the plan from {own[0]:g} to {own[1]:g}: give both "
            "the same ends"
        )
