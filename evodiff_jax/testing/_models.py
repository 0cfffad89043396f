"""Models without error on any schedule, with the exact solution of their probability-flow ODE, and networks of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from evodiff_jax.numerics import at_least_float32, checked_arguments, concrete_array, enable_x64
from evodiff_jax.preconditioning import coefficients
from evodiff_jax.schedules import NoiseSchedule, expect_schedule, of_schedule
from evodiff_jax.types import Denoiser, State, check_function, widest

_BISECTIONS = 64  # halve the bracket down to float64 round-off


class ExactModel(NamedTuple):
    """A model without error.

    Attributes:
      denoise: denoise(x, t) -> x_0, the exact data prediction, as for `sample`.
      solve: solve(x, start, end) -> x, the exact solution at time `end` of the probability-flow ODE that has the state
        x (B, ...) at time `start`, in float64 NumPy. All are concrete.
    """

    denoise: Denoiser
    solve: Callable[[Any, float, float], np.ndarray]


def gaussian(schedule: NoiseSchedule, mean: ArrayLike, std: ArrayLike) -> ExactModel:
    """The exact model of independent normal coordinates.

    With v(t) = alpha^2 std^2 + sigma^2, the variance of x_t, the data prediction is mean + (alpha std^2 / v)
    (x - alpha mean), and (x_t - alpha mean) / sqrt(v) stays as it is along the probability-flow ODE.

    Args:
      schedule: the noise schedule.
      mean: the means of the coordinates, of the shape of one sample or one that broadcasts to it.
      std: their standard deviations, at least 0, likewise.

    Returns:
      The model.

    Raises:
      TypeError: when the schedule is something else, or mean or std no array of numbers.
      ValueError: when a standard deviation is negative.

    Examples:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> model = gaussian(schedule, mean=[1.0, 0.0], std=[0.5, 2.0])
      >>> x_T = schedule.noise(jax.random.key(0), (4, 2))
      >>> plan = ed.plan(schedule, ed.grids.log_snr(schedule, 100), ed.solvers.unipc(3))
      >>> exact = model.solve(x_T, schedule.t_max, schedule.t_min)
      >>> bool(abs(ed.sample(model.denoise, x_T, plan) - exact).max() < 1e-3)
      True
    """
    expect_schedule(schedule)
    mean, std = concrete_array("mean", mean), concrete_array("std", std)
    if not (std >= 0).all():
        raise ValueError(f"gaussian needs standard deviations of at least 0, got {std}")

    def denoise(x: jax.Array, t: Any) -> jax.Array:
        wide = at_least_float32(x.dtype)
        t, center, variance = (jnp.asarray(value, wide) for value in (t, mean, std**2))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return (center + gain * (x.astype(wide) - alpha * center)).astype(x.dtype)

    def solve(x: Any, start: float, end: float) -> np.ndarray:
        (alpha, alpha_end), (sigma, sigma_end), _ = schedule.levels([start, end])
        shrink = np.hypot(alpha_end * std, sigma_end) / np.hypot(alpha * std, sigma)
        return alpha_end * mean + shrink * (np.asarray(x, np.float64) - alpha * mean)

    return ExactModel(of_schedule(denoise, schedule), solve)


@checked_arguments
def bimodal(schedule: NoiseSchedule, center: float = 1.0, std: float = 0.5) -> ExactModel:
    """The exact model of independent coordinates that are normal around -center or center, with equal probability.

    Its data prediction is not linear in the state. In one dimension the probability-flow ODE keeps the order of states,
    and so the probability below a state: its solution has it at the end as at the start.

    Args:
      schedule: the noise schedule.
      center: the mean of one of the two modes of every coordinate.
      std: the standard deviation of each mode, above 0.

    Returns:
      The model, for states of any shape.

    Raises:
      TypeError: when the schedule is something else, or center or std no number.
      ValueError: when std is not positive.
    """
    expect_schedule(schedule)
    if not std > 0:
        raise ValueError(f"bimodal needs std > 0, got {std}")

    def denoise(x: jax.Array, t: Any) -> jax.Array:
        wide = at_least_float32(x.dtype)
        y, t = x.astype(wide), jnp.asarray(t, wide)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = (alpha * std) ** 2 + sigma**2
        mean = center * jnp.tanh(alpha * center * y / variance)
        return (mean + alpha * std**2 / variance * (y - alpha * mean)).astype(x.dtype)

    def solve(x: Any, start: float, end: float) -> np.ndarray:
        alpha, sigma, _ = schedule.levels([start, end])
        mode, spread = np.abs(alpha * center), np.hypot(alpha * std, sigma)
        with enable_x64():
            distance = np.asarray(_transported(np.abs(np.asarray(x, np.float64)), mode, spread))
        return np.sign(x) * distance

    return ExactModel(of_schedule(denoise, schedule), solve)


def as_network(
    prediction: str, denoise: Denoiser, schedule: NoiseSchedule, sigma_data: float = 0.5
) -> Callable[..., State]:
    """The network that predicts what `prediction` names and from which `denoise` follows.

    `denoisers.from_prediction(as_network(prediction, denoise, schedule), schedule, prediction)` is `denoise` again.

    Args:
      prediction: one of `denoisers.PREDICTIONS`.
      denoise: denoise(x, t, *conditions) -> x_0, a data prediction.
      schedule: its noise schedule.
      sigma_data: the standard deviation of the data, for "edm".

    Returns:
      network(x, t, *conditions), of the structure and shapes of x, in float32 at least. For "edm" its arguments are
      EDM's c_in x_t / alpha and c_noise = log(sigma / alpha) / 4, else the state and the schedule's time.

    Raises:
      TypeError: when denoise is no function or the schedule is something else.
      ValueError: when the prediction is unknown.

    Examples:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.vp_linear()
      >>> denoise = gaussian(schedule, 0.0, 1.0).denoise
      >>> network = as_network("epsilon", denoise, schedule)
      >>> again = ed.denoisers.from_prediction(network, schedule, "epsilon")
      >>> x = jnp.ones((2, 3))
      >>> bool(abs(again(x, 0.5) - denoise(x, 0.5)).max() < 1e-5)
      True
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    expect_schedule(schedule)
    if prediction == "edm":
        return _raw(denoise, schedule, sigma_data)
    if prediction not in _OUTPUTS:
        known = ", ".join(map(repr, (*_OUTPUTS, "edm")))
        raise ValueError(f"unknown prediction {prediction!r}: choose one of {known}")
    output = _OUTPUTS[prediction]

    def network(x: State, t: Any, *conditions: Any) -> State:
        wide = widest(jax.tree.leaves(x))
        t = jnp.asarray(t, wide)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        of_leaf = lambda x, m: output(x.astype(wide), m.astype(wide), alpha, sigma)
        return jax.tree.map(of_leaf, x, denoise(x, t, *conditions))

    return network


# From x, the data prediction, alpha and sigma to the output of a network of each kind.
_OUTPUTS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "data": lambda x, m, alpha, sigma: m,
    "epsilon": lambda x, m, alpha, sigma: (x - alpha * m) / sigma,
    "v": lambda x, m, alpha, sigma: (alpha * x - (alpha**2 + sigma**2) * m) / sigma,
    "velocity": lambda x, m, alpha, sigma: (x - (alpha + sigma) * m) / sigma,
    "score": lambda x, m, alpha, sigma: (alpha * m - x) / sigma**2,
}


def _raw(denoise: Denoiser, schedule: NoiseSchedule, sigma_data: float) -> Callable[..., State]:
    """EDM's network before its preconditioning."""

    def network(scaled: State, c_noise: Any, *conditions: Any) -> State:
        log_kappa = 4 * jnp.asarray(c_noise, widest(jax.tree.leaves(scaled)))
        t = schedule.time(-log_kappa)
        c = coefficients(jnp.exp(log_kappa), sigma_data)
        unscaled = jax.tree.map(lambda a: a / c.c_in, scaled)
        m = denoise(jax.tree.map(lambda u: schedule.alpha(t) * u, unscaled), t, *conditions)
        return jax.tree.map(lambda u, m: (m - c.c_skip * u) / c.c_out, unscaled, m)

    return network


def _log_beyond(y: Any, mode: Any, spread: Any) -> Any:
    """The logarithm of the probability of a coordinate above y >= 0, doubled."""
    beyond = lambda center: jax.scipy.special.log_ndtr((center - y) / spread)
    return jnp.logaddexp(beyond(mode), beyond(-mode))


@jax.jit
def _transported(y: Any, mode: Any, spread: Any) -> Any:
    """The y >= 0 with the probability above it at the end that y has at the start; mode and spread at both."""
    target = _log_beyond(y, mode[0], spread[0])

    def halve(_: int, bracket: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bracket
        middle = (low + high) / 2
        farther = _log_beyond(middle, mode[1], spread[1]) > target
        return jnp.where(farther, middle, low), jnp.where(farther, high, middle)

    highest = mode[1] + spread[1] * (jnp.max(y) + mode[0]) / spread[0] + 10 * spread[1]
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(target), jnp.full_like(target, highest)))
    return (low + high) / 2
