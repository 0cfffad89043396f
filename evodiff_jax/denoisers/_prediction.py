"""What a network predicts and what it takes for time, turned into the data prediction at the schedule's time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evodiff_jax.numerics import checked_arguments, on_host
from evodiff_jax.preconditioning import coefficients
from evodiff_jax.schedules import NoiseSchedule, expect_schedule, of_schedule
from evodiff_jax.types import Denoiser, State, batch_size, check_function, check_like, widest


class _Levels(NamedTuple):
    alpha: jax.Array
    sigma: jax.Array


# From (x, the network's output, alpha and sigma) to x_0, for x = alpha x_0 + sigma eps.
_TO_DATA: dict[str, Callable[[Any, Any, _Levels], Any]] = {
    "data": lambda x, output, at: output,
    "epsilon": lambda x, output, at: (x - at.sigma * output) / at.alpha,
    "v": lambda x, output, at: (at.alpha * x - at.sigma * output) / (at.alpha**2 + at.sigma**2),
    "velocity": lambda x, output, at: (x - at.sigma * output) / (at.alpha + at.sigma),
    "score": lambda x, output, at: (x + at.sigma**2 * output) / at.alpha,
}
PREDICTIONS = (*_TO_DATA, "edm")
"""What a network may predict, see `from_prediction`."""
TIMES = ("t", "sigma", "log_sigma", "c_noise", "index")
"""What a network may take for its time, see `from_prediction`."""

_SCALAR_TIME = (
    "The network was called with one time for the whole batch, a scalar. If it takes one for each sample, (B,), give "
    "from_prediction per_sample_time=True."
)
NEED_SIGNAL = ("epsilon", "score", "edm")
"""The predictions that say nothing about the data where alpha is 0."""


@checked_arguments
def from_prediction(
    fn: Denoiser,
    schedule: NoiseSchedule,
    prediction: str,
    *,
    time: str | Callable[[jax.Array], jax.Array] | None = None,
    per_sample_time: bool = False,
    sigma_data: float = 0.5,
) -> Denoiser:
    """Turns a network's prediction into the data prediction, the posterior mean of x_0 given x_t.

    With x_t = alpha x_0 + sigma eps, the network may predict

    * "data": x_0.
    * "epsilon": the noise eps; x_0 = (x_t - sigma eps) / alpha.
    * "v": alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512); x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2).
    * "velocity": eps - x_0, of flow matching and rectified flow (arXiv 2209.03003) with time running from data to
      noise; x_0 = (x_t - sigma v) / (alpha + sigma). For a network whose time runs from noise to data give
      `lambda x, t: -network(x, 1 - t)`.
    * "score": the gradient of log p(x_t); x_0 = (x_t + sigma^2 score) / alpha.
    * "edm": EDM's raw network F (Karras et al., arXiv 2206.00364, Eq. 7), called at x_t / alpha, the state of a
      schedule with alpha = 1, and kappa = sigma / alpha; x_0 = c_skip x_t / alpha + c_out F(c_in x_t / alpha, time).

    Args:
      fn: the network, fn(x, time, *conditions) -> an array of x's shape (or a pytree like x). It may compute in a
        lower precision than x's; the conversion is made in float32 at least.
      schedule: the schedule the network was trained with, or any other of the same noise levels.
      prediction: what fn predicts, one of `PREDICTIONS`.
      time: what fn takes for time: "t", the schedule's; "sigma", sigma(t), or kappa for prediction "edm";
        "log_sigma", the natural logarithm of that; "c_noise", log(kappa) / 4; "index", the nearest of the integers
        0 .. n - 1, for `schedules.discrete` (whose "t" is the index interpolated); or your own function of t. By
        default "c_noise" for "edm", else "t".
      per_sample_time: give fn the time as (B,), the same for every sample, in place of a scalar.
      sigma_data: the standard deviation of the data, for "edm".

    Returns:
      denoise(x, t, *conditions), of the structure, shapes and dtypes of x.

    Raises:
      TypeError: when fn is no function, the schedule is something else, time is neither a name nor a function,
        per_sample_time no boolean, or sigma_data no number; when called, when fn returns no floating-point array.
      ValueError: when `prediction` or `time` is unknown, alpha is 0 at t_max and the prediction says nothing about the
        data there, "index" is asked for a schedule without timesteps, or sigma_data is not positive; when called,
        when fn returns another shape.

    Examples:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
      >>> denoise = from_prediction(lambda x, index: 0 * x, schedule, "v", time="index")
    """
    _check(fn, schedule, prediction, time, sigma_data)
    time = ("c_noise" if prediction == "edm" else "t") if time is None else time

    def denoise(x: State, t: Any, *conditions: Any) -> State:
        wide = widest(jax.tree.leaves(x))
        t = jnp.asarray(t, wide)
        at = _Levels(schedule.alpha(t), schedule.sigma(t))
        seen, to_data = x, _TO_DATA.get(prediction)
        if to_data is None:  # EDM's network, whose state has alpha = 1
            seen, at, to_data = _preconditioned(x, at, sigma_data, wide)
        told = jnp.asarray(time(t)) if callable(time) else _network_time(time, t, at, schedule.num_timesteps)
        if per_sample_time:
            told = jnp.broadcast_to(told, (batch_size(x),))
        try:
            output = fn(seen, told, *conditions)
        except (IndexError, TypeError, ValueError) as error:
            if not per_sample_time:
                error.add_note(_SCALAR_TIME)
            raise
        check_like(output, x, "the network fn(x, time)")
        return jax.tree.map(lambda a, o: to_data(a.astype(wide), o.astype(wide), at).astype(a.dtype), x, output)

    return of_schedule(denoise, schedule)


def check_signal(schedule: NoiseSchedule, what: str) -> None:
    """Raises ValueError when alpha is 0 at t_max, where `what` does not determine the data."""
    if on_host(schedule.alpha, schedule.t_max) == 0:
        raise ValueError(
            f"alpha is 0 at t_max = {schedule.t_max:g}, where {what} says nothing about the data: use a schedule that "
            "ends before, dataclasses.replace(schedule, t_max=...), or a network that predicts v or the data"
        )


def _check(fn: Any, schedule: Any, prediction: Any, time: Any, sigma_data: Any) -> None:
    check_function("fn", fn, "fn(x, time)")
    expect_schedule(schedule)
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(map(repr, PREDICTIONS))}")
    if prediction in NEED_SIGNAL:
        check_signal(schedule, f"prediction {prediction!r}")
    if isinstance(time, str) and time not in TIMES:
        raise ValueError(f"unknown time {time!r}: choose one of {', '.join(map(repr, TIMES))}, or give a function of t")
    if not (time is None or isinstance(time, str) or callable(time)):
        raise TypeError(f"time must be one of {', '.join(map(repr, TIMES))} or a function of t, got {time!r}")
    if time == "index" and schedule.num_timesteps is None:
        raise ValueError(
            "time='index' needs a schedule of discrete timesteps, from schedules.discrete; for another one give a "
            "function of t"
        )
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")


def _preconditioned(x: State, at: _Levels, sigma_data: float, wide: Any) -> tuple[State, _Levels, Any]:
    """What EDM's network sees of x, the levels there, and the function from its output to the data."""
    kappa = at.sigma / at.alpha
    c = coefficients(kappa, sigma_data)
    seen = jax.tree.map(lambda a: c.c_in * (a.astype(wide) / at.alpha), x)
    to_data = lambda a, output, _: c.c_skip * (a / at.alpha) + c.c_out * output
    return seen, _Levels(jnp.ones_like(kappa), kappa), to_data


def _network_time(name: str, t: jax.Array, at: _Levels, num_timesteps: int | None) -> jax.Array:
    if name == "index" and num_timesteps is not None:
        return jnp.clip(jnp.round(t), 0, num_timesteps - 1).astype(jnp.int32)
    log_of = lambda level: jnp.log(jnp.maximum(level, jnp.finfo(level.dtype).tiny))  # finite at sigma = 0
    return {
        "t": lambda: t,
        "sigma": lambda: at.sigma,
        "log_sigma": lambda: log_of(at.sigma),
        "c_noise": lambda: (log_of(at.sigma) - log_of(at.alpha)) / 4,
    }[name]()
