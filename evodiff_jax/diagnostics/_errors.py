"""Errors of a run against the converged trajectory, and of its data predictions against the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax import kernel
from evodiff_jax.diagnostics._runs import Run, Trajectory, noise_key, start
from evodiff_jax.diagnostics._states import difference, rms
from evodiff_jax.tables import Plan
from evodiff_jax.types import Denoiser, as_state, check_state

_SAME_TIME = 1e-6  # of the run's span


def state_errors(run: Run | Trajectory, reference: Trajectory) -> jax.Array:
    """How far a run's states are from the converged trajectory: |x_i - x*_i| / sqrt(D) at each time of the reference.

    Errors of all steps so far, as the ODE carried them on. The last is the error of the sample.

    Args:
      run: from `follow`.
      reference: from `converge` with the same noise and the times of the run's steps.

    Returns:
      (N + 1, B), in units of the state. At a time where the run has several states, the stages of a step, of the last;
      NaN at one where it has none.

    Raises:
      TypeError: when run or reference is something else.
      ValueError: when their states have different shapes.
    """
    _check(run, reference)
    span = reference.times[0] - reference.times[-1]
    same = jnp.abs(run.times[None] - reference.times[:, None]) <= _SAME_TIME * span
    last = same.shape[1] - 1 - jnp.argmax(same[:, ::-1], 1)
    found = jax.tree.map(lambda leaf: leaf[last], run.states)
    errors = jax.vmap(lambda x, y: rms(difference(x, y)))(found, reference.states)
    return jnp.where(jnp.any(same, 1)[:, None], errors, jnp.nan)


def transition_errors(
    denoise: Denoiser, plan: Plan, reference: Trajectory, *, key: jax.Array | None = None
) -> jax.Array:
    """The error of each step alone: each starts from the converged trajectory, |step(x*_i) - x*_{i+1}| / sqrt(D).

    After each correction the state is replaced by the converged one. The solver keeps its memory: outputs at its own
    predictions of the states, each one step away from the trajectory. The model is called as often as in the run.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction.
      plan: of a solver of one model call a step, at the times of the reference.
      reference: from `converge`.
      key: as for `sample`, for a stochastic solver.

    Returns:
      (N, B), in units of the state, for the steps from times[i] to times[i + 1].

    Raises:
      TypeError: as `follow`, or when the reference is something else.
      ValueError: as `follow`, or when the plan does not call the model once at each of the reference's times: a stage
        of a step is no state of the trajectory.
    """
    if not isinstance(reference, Trajectory):
        raise TypeError(f"reference must be a Trajectory, from converge, got {type(reference).__name__}")
    run, state, table = start(denoise, jax.tree.map(lambda leaf: leaf[0], reference.states), plan, key)
    times = np.append(np.asarray(plan.table.time)[: len(table.time)], plan.end)
    if not _same_times(times, reference.times):
        raise ValueError(
            f"the plan calls the model at {len(times) - 1} times, the reference has {len(reference.times) - 1} steps: "
            "transition_errors needs a solver of one call a step, without denoise_to_zero, and a reference at its times"
        )

    def step(carry: kernel.Carry, scanned: Any) -> tuple[kernel.Carry, Any]:
        row, index, exact = scanned
        m = as_state(denoise(carry.x, row.time), carry.x, "denoise(x, t)")
        after, done = kernel.advance(run.rule, carry, row, index, True, m, noise_key(state.key, index))
        error = difference(done.corrected, exact)
        forced = jax.tree.map(lambda x, e: (x - row.transition * e).astype(x.dtype), after.x, error)
        return after._replace(x=forced), rms(error)

    carry = kernel.Carry(state.x, state.outputs, state.memory)
    exact = jax.tree.map(lambda leaf: leaf[:-1], reference.states)
    carry, errors = jax.lax.scan(step, carry, (table, jnp.arange(len(table.time)), exact))
    end = jax.tree.map(lambda leaf: leaf[-1], reference.states)
    return jnp.concatenate([errors[1:], rms(difference(carry.x, end))[None]])


def reconstruction_errors(run: Run | Trajectory, x_0: Any) -> jax.Array:
    """How far each data prediction is from the data: |m_i - x_0| / sqrt(D).

    Args:
      run: from `follow` or `converge`.
      x_0: (B, ...), the data where they are known (x_T made of them by `schedule.add_noise`), or the converged sample
        (the last state of `converge`), or a pytree of such.

    Returns:
      (R, B), in units of the data.

    Raises:
      TypeError: when run is something else, or x_0 not floating-point.
      ValueError: when x_0 has another shape than the states.
    """
    if not isinstance(run, Run | Trajectory):
        raise TypeError(f"run must be a Run or a Trajectory, from follow or converge, got {type(run).__name__}")
    x_0 = check_state(x_0, "x_0")
    shapes = [[leaf.shape for leaf in jax.tree.leaves(x)] for x in (x_0, jax.tree.map(lambda m: m[0], run.outputs))]
    if shapes[0] != shapes[1]:
        raise ValueError(f"x_0 must have the shape of the run's states, {shapes[1]}, got {shapes[0]}")
    return jax.vmap(lambda m: rms(difference(m, x_0)))(run.outputs)


def update_variance(run: Run, variance: Any) -> jax.Array:
    """The conditional variance of each update, given the state and the outputs before it: c_i^2 V_i + nu_i^2.

    In the update the data prediction stands for the data, which have the posterior variance V_i given x_i. c_i is the
    coefficient of the newest data prediction in the next state, with what the rule chose; nu_i the deviation of the
    noise. For the exact reverse transition it is `transition_variance`. A method of the noise
    prediction eps = (x - alpha m) / sigma counts by what it does with the m in it.

    Args:
      run: from `follow`.
      variance: (R, B), V_i from `posterior_variance` at the run's states.

    Returns:
      (R, B), per coordinate, in squared units of the state.

    Raises:
      TypeError: when run is no Run.
      ValueError: when the variance is of another shape.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run must be a Run, from follow, got {type(run).__name__}")
    if jnp.shape(variance) != run.gains.shape:
        raise ValueError(f"variance must be {run.gains.shape}, one for each call and sample, got {jnp.shape(variance)}")
    return run.gains * jnp.asarray(variance) + jnp.square(run.noise)[:, None]


def _check(run: Any, reference: Any) -> None:
    if not isinstance(run, Run | Trajectory) or not isinstance(reference, Trajectory):
        raise TypeError(
            "state_errors needs a Run from follow and a Trajectory from converge, got "
            f"{type(run).__name__} and {type(reference).__name__}"
        )
    ours, theirs = ([leaf.shape[1:] for leaf in jax.tree.leaves(x)] for x in (run.states, reference.states))
    if ours != theirs:
        raise ValueError(f"the run has states of shapes {ours}, the reference of {theirs}")


def _same_times(times: np.ndarray, others: jax.Array) -> bool:
    """Whether the times are the same; of traced ones only their number is known."""
    if len(times) != len(others) or isinstance(others, Tracer):
        return len(times) == len(others)
    return bool(np.allclose(times, np.asarray(others), rtol=0, atol=_SAME_TIME * (times[0] - times[-1])))
