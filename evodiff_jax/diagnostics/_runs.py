"""What a run does call by call, and the trajectory that runs converge to."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax import kernel
from evodiff_jax.diagnostics._states import check_count, check_model, mean_square
from evodiff_jax.numerics import on_host
from evodiff_jax.sampling import RunState, check_times, init, plan_from_times
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule
from evodiff_jax.solvers import unipc
from evodiff_jax.tables import Choice, Plan, Rule, Solver, Table
from evodiff_jax.types import Denoiser, State, as_state, batch_size, check_function, fold_in

_BEYOND = 5.0  # what a step that is infinitely long in lambda is taken for, before the jump to its end


class Trajectory(NamedTuple):
    """States at some times, and the data predictions there.

    Attributes:
      times: (N + 1,), decreasing.
      states: leaves (N + 1, B, ...).
      outputs: leaves (N, B, ...), the data predictions at times[:-1].
      broken: (N, B), whether in a call of that step the model returned what is not finite for a finite state.
    """

    times: jax.Array
    states: State
    outputs: State
    broken: jax.Array


class Run(NamedTuple):
    """What a plan of R calls did.

    Attributes:
      times: (R + 1,), the time of every call, and that of the result.
      states: leaves (R + 1, B, ...), the corrected state at each of them.
      outputs: leaves (R, B, ...), the data prediction of each call. It was made at the solver's prediction of the
        state, before the correction.
      gains: (R, B), the mean over coordinates of the squared coefficient of a call's data prediction in the next state.
      noise: (R,), the deviation of the noise in the next state.
      rule: what the solver's rule tells of every call, as in `Trace`.
      broken: (R, B), whether the model returned what is not finite for a finite state.
    """

    times: jax.Array
    states: State
    outputs: State
    gains: jax.Array
    noise: jax.Array
    rule: Any
    broken: jax.Array


def follow(denoise: Denoiser, x_T: State, plan: Plan, *, key: jax.Array | None = None) -> Run:
    """Runs a plan as `sample` does, and keeps states, data predictions and coefficients of every call.

    A pure function of x_T and key, whose plan is concrete. It keeps 2 R + 1 states.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction.
      x_T: (B, ...), the noise at the plan's first time, or a pytree of such.
      plan: from `plan`, outside any trace; padding is cut off.
      key: as for `sample`.

    Returns:
      The run.

    Raises:
      TypeError: when the plan is traced, and as `sample`.
      ValueError: as `sample`.
    """
    run, state, table = start(denoise, x_T, plan, key)

    def step(carry: kernel.Carry, scanned: Any) -> tuple[kernel.Carry, Any]:
        row, index = scanned
        m = as_state(denoise(carry.x, row.time), carry.x, "denoise(x, t)")
        after, done = kernel.advance(run.rule, carry, row, index, True, m, noise_key(state.key, index))
        told, chosen = _untold(run, done.trace)
        return after, (done.corrected, m, _gain(row, chosen, carry.x), told, _broken(carry.x, m))

    carry = kernel.Carry(state.x, state.outputs, state.memory)
    carry, (states, outputs, gains, told, broken) = jax.lax.scan(step, carry, (table, jnp.arange(len(table.time))))
    noise = jnp.zeros_like(table.time) if table.noise is None else table.noise
    times = jnp.append(table.time, jnp.asarray(run.end, table.time.dtype))
    return Run(times, _and_last(states, carry.x), outputs, gains, noise, told, broken)


def converge(
    denoise: Denoiser,
    x_T: State,
    schedule: NoiseSchedule,
    times: Any,
    *,
    substeps: int = 20,
    solver: Solver | None = None,
) -> Trajectory:
    """The trajectory of the probability-flow ODE from x_T at given times, by many steps of a solver of high order.

    Each step between two times is divided into equal steps in lambda; one of infinite length in lambda is divided over
    5, before or after its infinite end. Only the states at the given times are kept. A pure function of x_T.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction.
      x_T: (B, ...), the noise at times[0], or a pytree of such.
      schedule: the model's noise schedule.
      times: (N + 1,) strictly decreasing concrete times, as for `plan`.
      substeps: into how many steps each is divided, at least 1.
      solver: one of one model call a step, by default unipc(3).

    Returns:
      The trajectory. Its outputs are those of the calls at these times.

    Raises:
      TypeError: when an argument is of another type, or the times are traced.
      ValueError: when times, substeps or x_T are not as above, denoise was made for another schedule, or the solver
        takes several calls a step or is stochastic.
    """
    x_T = check_model(denoise, schedule, x_T, "x_T")
    substeps = check_count("substeps", substeps, 1)
    if isinstance(times, Tracer):
        raise TypeError("times must be concrete: make them outside jax.jit")
    checked = check_times(times, schedule)
    fine = plan_from_times(schedule, refined(schedule, checked, substeps), unipc(3) if solver is None else solver)
    steps = len(checked) - 1
    if fine.table.noise is not None or len(fine.table.time) != steps * substeps:
        raise ValueError("converge needs a deterministic solver of one model call a step")
    run, state, table = start(denoise, x_T, fine, None)
    divided = lambda column: column.reshape(steps, substeps, *column.shape[1:])

    def call(kept: Any, scanned: Any) -> tuple[Any, None]:
        carry, at_start, of_start, broken = kept
        row, index = scanned
        m = as_state(denoise(carry.x, row.time), carry.x, "denoise(x, t)")
        after, done = kernel.advance(run.rule, carry, row, index, True, m, None)
        first = index % substeps == 0
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(first, new, old))
        return (after, keep(done.corrected, at_start), keep(m, of_start), broken | _broken(carry.x, m)), None

    def step(carry: kernel.Carry, scanned: Any) -> tuple[kernel.Carry, Any]:
        none = jnp.zeros_like(_broken(carry.x, carry.x))
        (carry, *kept), _ = jax.lax.scan(call, (carry, carry.x, carry.x, none), scanned)
        return carry, tuple(kept)

    carry = kernel.Carry(state.x, state.outputs, state.memory)
    scanned = (jax.tree.map(divided, table), jnp.arange(steps * substeps).reshape(steps, substeps))
    carry, (states, outputs, broken) = jax.lax.scan(step, carry, scanned)
    return Trajectory(jnp.asarray(checked, table.time.dtype), _and_last(states, carry.x), outputs, broken)


def start(denoise: Any, x_T: Any, plan: Any, key: Any) -> tuple[Plan, RunState, Table]:
    """The plan with a rule that tells its coefficients, the run's first state, and the table of its calls, cast."""
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    if isinstance(plan, Plan) and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(plan)):
        raise TypeError("the plan must be concrete: make it outside jax.jit, and do not pass it as an argument")
    telling = plan
    if isinstance(plan, Plan) and plan.rule is not None:
        rule = plan.rule
        telling = dataclasses.replace(plan, rule=dataclasses.replace(rule, choose=functools.partial(_told, rule)))
    state = init(x_T, telling, key=key)  # checks the rest
    check_same_schedule(denoise, plan.levels, "the plan's")
    cut = jax.tree.map(lambda column: jnp.asarray(column[: int(plan.calls)], state.t.dtype), plan.table)
    return telling, state, cut


def _told(rule: Rule, data: Any, sums: Any, memory: Any) -> tuple[Choice, Any]:
    """What the rule chooses, with its coefficients of the newest output in the trace."""
    choice, memory = rule.choose(data, sums, memory)
    return choice._replace(trace=(choice.trace, (choice.predictor[0], choice.corrector[0]))), memory


def _untold(run: Plan, trace: Any) -> tuple[Any, Any]:
    """The rule's own trace, and the coefficients: a pair, or one for each leaf of the state."""
    if run.rule is None:
        return (), None
    is_pair = lambda node: isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], tuple)
    own = jax.tree.map(lambda pair: pair[0], trace, is_leaf=is_pair)
    return own, [pair[1] for pair in jax.tree.leaves(trace, is_leaf=is_pair)]


def _gain(row: Table, chosen: Any, x: State) -> jax.Array:
    """(B,), the mean square of the newest data prediction's coefficient in the next state."""
    leaves = jax.tree.leaves(x)
    chosen = [(0.0, 0.0)] if chosen is None else chosen
    of_leaves = chosen if len(chosen) == len(leaves) else chosen * len(leaves)
    transition, predictor, corrector = row.transition, row.predictor[0], row.corrector[0]
    predicts, corrects = (1.0 if factor is None else factor for factor in (row.predicts, row.corrects))
    keep = 1.0 if row.history is None else row.history[1]
    total = jnp.zeros((), row.time.dtype)
    for leaf, (of_predictor, of_corrector) in zip(leaves, of_leaves, strict=True):
        # Chosen coefficients are (B,) or (B, C), those of the table scalars or of single coordinates.
        added = transition * corrects * of_corrector + predicts * of_predictor
        coefficient = keep * (transition * corrector + predictor)
        if np.ndim(of_predictor) and coefficient.ndim:
            raise ValueError("the coefficients of a rule beside a table for single coordinates cannot be told apart")
        if np.ndim(of_predictor):
            square = jnp.square(coefficient + keep * added).reshape(len(leaf), -1)
            square = jnp.mean(square, 1)
        else:
            square = jnp.broadcast_to(jnp.mean(jnp.square(coefficient)), (len(leaf),))
        total = total + square * (leaf.size / sum(other.size for other in leaves))
    return jnp.broadcast_to(total, (batch_size(x),))


def noise_key(key: Any, index: Any) -> Any:
    """The key of a row's noise, as `sample` has it."""
    return None if key is None else fold_in(fold_in(key, index), 0)


def _broken(x: State, m: State) -> jax.Array:
    """(B,), whether the data prediction of a finite state is not finite."""
    return jnp.isfinite(mean_square(x)) & ~jnp.isfinite(mean_square(m))


def _and_last(states: State, x: State) -> State:
    return jax.tree.map(lambda before, last: jnp.concatenate([before, last[None]]), states, x)


def refined(schedule: NoiseSchedule, times: np.ndarray, substeps: int) -> np.ndarray:
    """The times with each step divided into `substeps`, equal in lambda."""
    lambda_ = schedule.levels(times).lambda_
    made = []
    for i in range(len(times) - 1):
        low, high = lambda_[i], lambda_[i + 1]
        if not (np.isfinite(low) or np.isfinite(high)):
            made.append(np.linspace(times[i], times[i + 1], substeps + 1)[:-1])
            continue
        if np.isfinite(low) and np.isfinite(high):
            inner = np.linspace(low, high, substeps + 1)[1:-1]
        elif np.isfinite(low):
            inner = np.linspace(low, low + _BEYOND, substeps)[1:]
        else:
            inner = np.linspace(high - _BEYOND, high, substeps)[:-1]
        made.append(np.append(times[i], on_host(schedule.time, inner)))
    return np.append(np.concatenate(made), times[-1])
