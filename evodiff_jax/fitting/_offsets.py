"""The parameters of a fit: offsets of a plan's times and weights from those of a published solver.

Over the step to the next time, with the outputs H_0 ... H_K, newest first, of `Table`, and D_a = H_a - H_{a+1},

    x' = transition (x + amplitude_before sum_j b_j H_j) + amplitude sum_j w_j H_j

where transition and amplitude are those of the exact solution for a constant output (see `quadrature`). A fit adds
sum_a c_a D_a to the last sum, and moves log h_i of the increments h_i of the log-SNR between the times. The increments
keep their sum, so the first and the last time stay and times keep their order. It also moves the times that the model
is told, `Table.time`, off those of the states: after few calls a state has another noise level than its time says. A
constant output has D_a = 0 and no time, so what the plan makes of one stays whatever the offsets are.

The b_j, a corrector's, stay: a fit of them would add the same D_a to x' a second time. `variance_optimal` chooses w_j
and b_j for each sample, and the c_a are the same for all.
"""

import dataclasses
import types
from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax import quadrature
from evodiff_jax.numerics import concrete_array, is_integer, namespace
from evodiff_jax.schedules import Levels, NoiseSchedule, SomeLevels, expect_schedule, some_levels
from evodiff_jax.solvers import _variance_optimal
from evodiff_jax.tables import Plan, Rule, Table, append_denoising, denoises_to_zero, pad

_MOST = 4.0  # |offset| of log h that is approached and never reached: increments grow or shrink by e^4 = 55 at most
_MOST_SHIFT = 2.0  # the same of lambda
_TOLERANCE = 1e-6  # of a plan's numbers that must agree with the schedule's


class Offsets(NamedTuple):
    """What a fit moves, for a plan of R calls that remembers K outputs; zeros are the plan itself.

    Attributes:
      times: (R,), added to the logarithms of the log-SNR increments, softly limited to 4 either way.
      weights: (R, K), the c_a of the module's equation; without effect where there are not so many earlier outputs.
      shifts: (R,), added to lambda, half the log-SNR, of the time that the model is told at each call; softly limited
        to 2 either way, and to the lambdas of the plan's ends.
    """

    times: Any
    weights: Any
    shifts: Any


class Start(NamedTuple):
    """A plan as what offsets are added to, from `start_of`.

    Attributes:
      plan: the plan.
      times: (N + 1,), the times of its steps.
      lambda_: (N + 1,), half the log-SNR there.
      predictor: (N, K + 1), the w_j; for `variance_optimal` what an earlier fit has added to that solver's.
      corrector: (N, K + 1), the b_j; zeros for `variance_optimal`.
      of_noise: whether the outputs are noise predictions.
    """

    plan: Plan
    times: np.ndarray
    lambda_: np.ndarray
    predictor: np.ndarray
    corrector: np.ndarray
    of_noise: bool

    def zeros(self) -> Offsets:
        """Offsets that leave the plan as it is, float64."""
        rows = int(self.plan.calls)
        return Offsets(np.zeros(rows), np.zeros((rows, self.predictor.shape[1] - 1)), np.zeros(rows))


def start_of(plan: Plan, schedule: NoiseSchedule, *, outputs: int = 4) -> Start:
    """The plan as what offsets are added to.

    Args:
      plan: of a deterministic solver with fixed coefficients whose every call is at a later time than the one before,
        or of `variance_optimal`.
      schedule: the plan's schedule.
      outputs: the number of outputs, the new one included, that a fixed table is widened to where it has fewer. 1
        leaves `ddim` its one output: then only times can move.

    Returns:
      The start.

    Raises:
      TypeError: when plan, schedule or an option is something else, or the plan is traced.
      ValueError: when the plan is not as above or of another schedule.
    """
    expect_schedule(schedule)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, from evodiff_jax.plan(schedule, times, solver), got {plan!r}")
    if not is_integer(outputs) or outputs < 1:
        raise ValueError(f"outputs must be an integer of at least 1, got {outputs!r}")
    if np.ndim(plan.calls) != 0:
        raise ValueError(f"this is a stack of {np.shape(plan.calls)[0]} plans: fit them one by one")
    check_levels("the plan", plan.levels, schedule)
    _check_form(plan)
    calls = int(plan.calls)
    table: Table = jax.tree.map(lambda column: concrete_array("the plan's table", column)[:calls], plan.table)
    end = float(plan.end)
    if denoises_to_zero(plan):
        table = jax.tree.map(lambda column: column[:-1], table)
    times = np.append(table.time, end)
    if not (np.diff(times) < 0).all():
        raise ValueError(
            f"the times of the plan's calls must decrease strictly, got {times}: heun and other solvers that call the "
            "model twice at one time can't be fitted, start from a multistep solver such as dpm_solver_pp(2)"
        )
    levels = schedule.levels(times)
    if plan.rule is not None:
        predictor, corrector = _of_rule(table, schedule, times)
    else:
        predictor, corrector = _of_weights(table, levels, outputs)
    return Start(plan, times, levels.lambda_, predictor, corrector, table.history is not None)


def realise(start: Start, offsets: Offsets, schedule: NoiseSchedule) -> Plan:
    """The plan with the offsets: in float64 on the host for NumPy offsets, else traced and differentiable in them.

    Args:
      start: from `start_of`.
      offsets: of its shapes.
      schedule: the plan's schedule.

    Returns:
      A plan of the start's calls and ends, padded to as many rows.
    """
    xp, dtype = namespace(*offsets), offsets.times.dtype
    times, levels = _moved(start, offsets.times, schedule)
    count, width = start.predictor.shape[0], start.predictor.shape[1] - 1
    exists = np.arange(width) < np.arange(count)[:, None]  # row i has i earlier outputs
    differences = np.eye(width, width + 1, dtype=dtype) - np.eye(width, width + 1, 1, dtype=dtype)
    weights = xp.asarray(start.predictor, dtype) + (exists.astype(dtype) * offsets.weights[:count]) @ differences
    if start.plan.rule is not None:
        known: Any = types.SimpleNamespace(levels=lambda _: levels)
        own = _variance_optimal.table(known, times)
        table = own._replace(predictor=own.predictor + own.predictor[:, :1] * weights)
    else:
        steps = (quadrature.noise_steps if start.of_noise else quadrature.data_steps)(*quadrature.ends(levels))
        before = xp.concatenate([xp.ones_like(steps.amplitude[:1]), steps.amplitude[:-1]])
        table = Table(
            time=times[:-1],
            transition=steps.transition,
            predictor=steps.amplitude[:, None] * weights,
            corrector=before[:, None] * xp.asarray(start.corrector, dtype),
            history=steps.history,
        )
    told = _told(start, times, levels, offsets.shifts, schedule)
    table = table._replace(time=told)
    if int(start.plan.calls) > count:
        table = append_denoising(table, times[-1])
    table = pad(table, start.plan.table.time.shape[0])
    return dataclasses.replace(start.plan, table=table, end=times[-1] if xp is not np else np.asarray(times[-1]))


def check_levels(name: str, levels: SomeLevels, schedule: NoiseSchedule) -> None:
    """Raises ValueError where levels, as a plan or a file has them, are not the schedule's."""
    own = np.array(some_levels(schedule))
    if np.shape(levels) != own.shape or not np.allclose(levels, own, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{name} is of another schedule: its (t, alpha, sigma) are {_rounded(levels)}, the schedule's are "
            f"{_rounded(own)}"
        )


def is_variance_optimal(rule: Rule | None) -> bool:
    """Whether the rule is that of `variance_optimal`, whatever its axes."""
    own = _variance_optimal
    return rule is not None and (rule.terms, rule.choose, rule.init) == (own.terms, own.choose, own.init)


def _rounded(levels: Any) -> str:
    return ", ".join(f"({', '.join(f'{value:.4g}' for value in level)})" for level in levels) or "unknown"


def _check_form(plan: Plan) -> None:
    advice = "start from a solver with fixed coefficients, such as dpm_solver_pp(2), or from variance_optimal()"
    table = plan.table
    if table.noise is not None:
        raise ValueError(f"the plan is of a stochastic solver, whose samples no teacher has: {advice}")
    if plan.rule is not None and not is_variance_optimal(plan.rule):
        of = f"{plan.rule.choose.__module__}.{plan.rule.choose.__qualname__}"
        raise ValueError(f"the plan has the rule {of}, of whose table a fit knows nothing: {advice}")
    if np.ndim(table.predictor) != 2 or table.offset is not None:
        raise ValueError(
            f"the plan has coefficients for each coordinate, or terms of its own (dpm_solver_v3): {advice}"
        )


def _of_rule(table: Table, schedule: NoiseSchedule, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the plan adds to the weights of `variance_optimal`: zeros unless it has been fitted before."""
    own = _variance_optimal.table(schedule, times)
    if not _close(jax.tree.leaves(table._replace(predictor=0)), jax.tree.leaves(own._replace(predictor=0))):
        raise ValueError("the plan's table is not that of variance_optimal at its times: make it with evodiff_jax.plan")
    added = (table.predictor - own.predictor) / own.predictor[:, :1]
    return added, np.zeros(added.shape)


def _of_weights(table: Table, levels: Levels, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights of outputs, in units of the steps' amplitudes."""
    steps = (quadrature.data_steps if table.history is None else quadrature.noise_steps)(*quadrature.ends(levels))
    before = np.append(1.0, steps.amplitude[:-1])
    spare = [(0, 0), (0, max(0, outputs - table.predictor.shape[1]))]
    weights = np.pad(table.predictor, spare) / steps.amplitude[:, None]
    corrections = np.pad(table.corrector, spare) / before[:, None]
    sums = (weights.sum(1), corrections.sum(1)) if table.history is None else (1.0, 0.0)  # ipndm_v(4) has others
    found = table.transition, sums, table.history
    if not _close(jax.tree.leaves(found), jax.tree.leaves((steps.transition, (1.0, 0.0), steps.history))):
        raise ValueError(
            "the plan's rows are not steps of the data or of the noise prediction from one call to the next: start "
            "from a multistep solver such as dpm_solver_pp(2) or ipndm(3). To go on from a fitted plan give fit its "
            "start and its offsets"
        )
    return weights, corrections


def _close(found: Any, expected: Any) -> bool:
    return all(np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in zip(found, expected, strict=True))


def _moved(start: Start, offsets: Any, schedule: NoiseSchedule) -> tuple[Any, Levels]:
    """The times with the offsets, and their levels. Where lambda is infinite at an end, that step keeps its times."""
    xp, dtype = namespace(offsets), offsets.dtype
    known = np.flatnonzero(np.isfinite(start.lambda_))
    if len(known) < 3:
        return xp.asarray(start.times, dtype), Levels(*(xp.asarray(a, dtype) for a in schedule.levels(start.times)))
    first, last = known[0], known[-1]
    fixed = start.times[: first + 1], start.times[last:]
    increments = np.diff(start.lambda_[first : last + 1])
    logs = xp.asarray(np.log(increments), dtype) + _MOST * xp.tanh(offsets[first:last] / _MOST)
    parts = xp.exp(logs - xp.max(logs))
    passed = xp.cumsum(parts / xp.sum(parts))[:-1]
    inner = time_at(schedule, xp.asarray(start.lambda_[first], dtype) + increments.sum() * passed)
    ends = [schedule.levels(part) for part in fixed]
    join = lambda before, middle, after: xp.concatenate([xp.asarray(before, dtype), middle, xp.asarray(after, dtype)])
    # The ends' levels are constants: log(sigma) has no derivative where sigma is 0.
    levels = Levels(*(join(a, b, c) for a, b, c in zip(ends[0], schedule.levels(inner), ends[1], strict=True)))
    return join(fixed[0], inner, fixed[1]), levels


def _told(start: Start, times: Any, levels: Levels, shifts: Any, schedule: NoiseSchedule) -> Any:
    """The times that the model is told. Where lambda is infinite that is the state's own."""
    xp = namespace(shifts)
    rows = np.flatnonzero(np.isfinite(start.lambda_[:-1]))
    if not rows.size:
        return times[:-1]
    first, last = rows[0], rows[-1] + 1
    finite = start.lambda_[np.isfinite(start.lambda_)]
    own, moves = levels.lambda_[first:last], _MOST_SHIFT * xp.tanh(shifts[first:last] / _MOST_SHIFT)
    # As a difference, so that no shift is no change at all.
    change = time_at(schedule, xp.clip(own + moves, finite[0], finite[-1])) - time_at(schedule, own)
    return xp.concatenate([times[:first], times[first:last] + change, times[last:-1]])


def time_at(schedule: NoiseSchedule, lambda_: Any) -> Any:
    """As `quadrature.time_at`, with the derivative of an inverse function: a bisection has none of its own."""
    if namespace(lambda_) is np:
        return quadrature.time_at(schedule, lambda_)
    value = jax.lax.stop_gradient(lambda_)
    t = jax.lax.stop_gradient(schedule.time(value))
    slope = jax.jvp(schedule.lambda_, (t,), (jax.numpy.ones_like(t),))[1]
    return t + (lambda_ - value) / jax.lax.stop_gradient(slope)
