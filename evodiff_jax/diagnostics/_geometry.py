"""How far a trajectory is from straight, and where along it the calls of a budget would help most."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.diagnostics._runs import Trajectory
from evodiff_jax.diagnostics._states import check_count, difference, mean_square, rms
from evodiff_jax.numerics import at_least_float32, concrete_array, on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule
from evodiff_jax.types import State


class Density(NamedTuple):
    """Where calls help.

    Attributes:
      lambda_: (M,), half the log-SNR, increasing.
      density: (M,), the share of the steps per unit of lambda; its trapezoidal integral is 1.
    """

    lambda_: jax.Array
    density: jax.Array


def curvature(trajectory: Trajectory, schedule: NoiseSchedule) -> jax.Array:
    """How far each step of a trajectory is from straight: the error of a straight step over the step's length.

    In u = x / alpha and kappa = sigma / alpha the ODE is du/dkappa = (u - m) / kappa. Where m stays as it is, the path
    is a straight line to m and one call of DDIM makes it exactly. The curvature of the step from t to s is

        |u_s - (q u_t + (1 - q) m_t)| / |u_s - u_t|,        q = kappa_s / kappa_t

    0 for a straight step. It is the deviation from straightness of Liu, Gong, Liu, arXiv 2209.03003, section 2.2, for a
    step of any schedule.

    Args:
      trajectory: from `converge`.
      schedule: its schedule.

    Returns:
      (N, B); 0 where alpha is 0 at the step's start, infinitely far away, or the step has no length.

    Raises:
      TypeError: when an argument is something else.
    """
    _check(trajectory, schedule)
    dtype = trajectory.times.dtype
    times = trajectory.times if isinstance(trajectory.times, Tracer) else np.asarray(trajectory.times, np.float64)
    levels = schedule.levels(times)
    alpha, sigma = (jnp.asarray(level, dtype) for level in (levels.alpha, levels.sigma))
    closeness = -jnp.expm1(jnp.asarray(levels.lambda_[:-1] - levels.lambda_[1:], dtype))  # 1 - q

    def of_step(x: Any, after: Any, m: Any, i: Any) -> jax.Array:
        straight = jax.tree.map(lambda x, m: sigma[i + 1] / sigma[i] * x + alpha[i + 1] * closeness[i] * m, x, m)
        # Both lengths times alpha_t alpha_s, which may be 0.
        deviation = alpha[i] * rms(difference(after, straight))
        length = rms(jax.tree.map(lambda x, y: alpha[i] * y - alpha[i + 1] * x, x, after))
        moved = length > 0
        return jnp.where(moved, deviation / jnp.where(moved, length, 1), 0)

    before, after = (jax.tree.map(cut, trajectory.states) for cut in (lambda leaf: leaf[:-1], lambda leaf: leaf[1:]))
    return jax.vmap(of_step)(before, after, trajectory.outputs, jnp.arange(len(sigma) - 1))


def call_density(trajectory: Trajectory, schedule: NoiseSchedule, order: int = 2) -> Density:
    """Where along the log-SNR the steps of a method of an order should be, from derivatives of the data prediction.

    A step of length h in lambda of a method that extrapolates the data prediction through p outputs has, to leading
    order, an error of h^(p+1) |d^p m / dlambda^p| in the data's units. Over a run of N steps the sum is least when the
    density of the steps is proportional to

        (mean |d^p m / dlambda^p|^2)^(1 / (2 (p + 1))),

    where every step has the same error (equidistribution: de Boor 1973). The derivatives are divided differences of the
    outputs along the trajectory, the mean is over samples and coordinates. That the ODE carries errors of early steps
    on, and may shrink them, is left out.

    Args:
      trajectory: from `converge` at many times, 30 or more; those with infinite lambda are left out.
      schedule: its schedule.
      order: p, 1 to 3.

    Returns:
      The density, at the middles of the outputs that each derivative is of.

    Raises:
      TypeError: when an argument is something else, or the times are traced.
      ValueError: when order is out of range, or the trajectory has fewer than order + 2 times with finite lambda.
    """
    _check(trajectory, schedule)
    if check_count("order", order, 1) > 3:
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    if isinstance(trajectory.times, Tracer):
        raise TypeError("call_density needs concrete times: call it outside jax.jit")
    lambda_ = schedule.levels(np.asarray(trajectory.times[:-1], np.float64)).lambda_
    known = int(np.isfinite(lambda_).sum())
    if known < order + 2:
        raise ValueError(f"order {order} needs {order + 2} times of finite lambda, the trajectory has {known}")
    return density_of(lambda_, squared_derivatives(lambda_, trajectory.outputs, order), order)


def squared_derivatives(lambda_: np.ndarray, outputs: State, order: int) -> jax.Array:
    """(M, B), the mean over coordinates of |d^p m / dlambda^p|^2 for p = order, where lambda is finite."""
    finite = np.isfinite(lambda_)
    nodes = lambda_[finite]
    values = jax.tree.map(lambda leaf: leaf[finite].astype(at_least_float32(leaf.dtype)), outputs)
    for k in range(1, order + 1):
        # The divided differences of order k, times k! in all.
        gaps = (nodes[k:] - nodes[:-k]) / k
        scaled = lambda leaf, gaps=gaps: (
            jnp.diff(leaf, axis=0) / jnp.asarray(gaps, leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
        )
        values = jax.tree.map(scaled, values)
    return jax.vmap(mean_square)(values)


def density_of(lambda_: np.ndarray, squares: Any, order: int) -> Density:
    """The density of calls by the (M, B) that `squared_derivatives` returned for the same lambda and order."""
    middles = np.convolve(lambda_[np.isfinite(lambda_)], np.ones(order + 1) / (order + 1), "valid")
    monitor = jnp.mean(squares, 1) ** (1 / (2 * (order + 1)))
    middles = jnp.asarray(middles, monitor.dtype)
    return Density(middles, monitor / jnp.maximum(jnp.trapezoid(monitor, middles), jnp.finfo(monitor.dtype).tiny))


def densest_half(density: Density) -> tuple[float, float]:
    """The shortest range of lambda in which half of the calls should be.

    Args:
      density: from `call_density`.

    Returns:
      Its low and its high end, half the log-SNR.

    Raises:
      TypeError: when the density is traced.
      ValueError: when it is not positive and finite.
    """
    fine, share = _shares(density)
    starts = np.linspace(0, 0.5, 1001)
    low, high = (np.interp(ends, share, fine) for ends in (starts, starts + 0.5))
    shortest = np.argmin(high - low)
    return float(low[shortest]), float(high[shortest])


def calls_of_steps(density: Density, lambda_: np.ndarray) -> np.ndarray:
    """(N,), the share of the calls that should be in each step between lambdas (N + 1,), which increase."""
    return np.diff(np.interp(lambda_, *_shares(density)))


def times_by_density(schedule: NoiseSchedule, density: Density, start: float, end: float, steps: int) -> np.ndarray:
    """The times of a run whose steps follow a density: each has the same share of its integral.

    Beyond the density's ends its value there goes on.

    Args:
      schedule: the schedule.
      density: from `call_density`.
      start: the first time, of finite lambda.
      end: the last one, of finite lambda, below start.
      steps: how many steps.

    Returns:
      (steps + 1,) float64, for `plan`.

    Raises:
      TypeError: when the schedule is something else, or the density traced.
      ValueError: when start and end are not as above, steps is below 1, or the density is not positive and finite.
    """
    expect_schedule(schedule)
    steps = check_count("steps", steps, 1)
    low, high = schedule.levels(np.array([start, end])).lambda_
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"start and end must be decreasing times of finite lambda, got {start:g} and {end:g}")
    fine, share = _shares(density, (low, high))
    inner = np.interp(np.linspace(0, 1, steps + 1)[1:-1], share, fine)
    return np.concatenate([[start], on_host(schedule.time, inner), [end]])


def _shares(density: Density, ends: tuple[float, float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Many lambdas from end to end, and the share of the calls below each, strictly increasing from 0 to 1."""
    nodes, values = (concrete_array("density", part) for part in density)
    if not (np.isfinite(values).all() and (values > 0).any() and (values >= 0).all()):
        raise ValueError("a density must be finite and positive somewhere: look at the trajectory with check_finite")
    fine = np.linspace(*((nodes[0], nodes[-1]) if ends is None else ends), 2001)
    at = np.maximum(np.interp(fine, nodes, values), 1e-6 * values.max())  # so that no step is infinitely long
    share = np.concatenate([[0], np.cumsum((at[1:] + at[:-1]) / 2)])
    return fine, share / share[-1]


def _check(trajectory: Any, schedule: Any) -> None:
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory must be a Trajectory, from converge, got {type(trajectory).__name__}")
    expect_schedule(schedule)
