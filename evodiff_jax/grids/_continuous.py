"""Grids for any schedule, from t_max to t_min or over a part."""

import math

import numpy as np
from jax.typing import ArrayLike

from evodiff_jax.grids._parts import between, ends_of, fractions_of, grid, pinned
from evodiff_jax.numerics import checked_arguments, concrete_array, on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule


@grid
def log_snr(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Times equally spaced in the log-SNR (Lu et al. 2022, DPM-Solver, arXiv 2206.00927, section 3.4).

    Args:
      schedule: the noise schedule; its log-SNR must be finite at both ends.
      num_steps: the number of steps N, at least 1.
      start: the first time, by default t_max.
      end: the last time, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: when num_steps is not a positive integer, not t_min <= end < start <= t_max, or the log-SNR is
        infinite at an end.
    """
    return polyexponential(schedule, num_steps, rho=1.0, start=start, end=end)


@grid
def exponential(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Times at which sigma / alpha falls by the same factor every step: what others call `log_snr`.

    Args:
      schedule: as for `log_snr`.
      num_steps: as for `log_snr`.
      start: as for `log_snr`.
      end: as for `log_snr`.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `log_snr`.
    """
    return log_snr(schedule, num_steps, start=start, end=end)


@grid
def polyexponential(
    schedule: NoiseSchedule,
    num_steps: int,
    rho: float = 1.0,
    *,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Times at which log(sigma / alpha) is a polynomial of the step, as in k-diffusion.

    log kappa_i = (1 - i / N)^rho (log kappa_start - log kappa_end) + log kappa_end.

    Args:
      schedule: the noise schedule; its log-SNR must be finite at both ends.
      num_steps: the number of steps N, at least 1.
      rho: 1 is `log_snr`; larger values spend more steps at low noise.
      start: the first time, by default t_max.
      end: the last time, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `log_snr`, or when rho is not positive.
    """
    if not rho > 0:
        raise ValueError(f"polyexponential needs rho > 0, got {rho}")
    start, end = ends_of(schedule, start, end)
    high, low = _lambda_ends(schedule, start, end)
    return _at_lambda(schedule, between(low, high, (1 - fractions_of(num_steps)) ** rho), start, end)


@grid
def karras(
    schedule: NoiseSchedule,
    num_steps: int,
    rho: float = 7.0,
    *,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Times at which sigma / alpha is equally spaced in its rho-th root (Karras et al. 2022, arXiv 2206.00364, Eq. 5).

    Args:
      schedule: the noise schedule; its log-SNR must be finite at both ends.
      num_steps: the number of steps N, at least 1.
      rho: 7 in the paper; larger values spend more steps at low noise.
      start: the first time, by default t_max.
      end: the last time, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `log_snr`, or when rho is not positive.
    """
    if not rho > 0:
        raise ValueError(f"karras needs rho > 0, got {rho}")
    start, end = ends_of(schedule, start, end)
    high, low = (np.exp(-lambda_ / rho) for lambda_ in _lambda_ends(schedule, start, end))
    return _at_lambda(schedule, -rho * np.log(between(high, low, fractions_of(num_steps))), start, end)


@grid
def time_uniform(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Equally spaced times.

    Args:
      schedule: the noise schedule.
      num_steps: the number of steps N, at least 1.
      start: the first time, by default t_max.
      end: the last time, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: when num_steps is not a positive integer or not t_min <= end < start <= t_max.
    """
    return between(*ends_of(schedule, start, end), fractions_of(num_steps))


@grid
def time_quadratic(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Times whose square roots are equally spaced: more steps at low noise than `time_uniform`.

    Args:
      schedule: the noise schedule.
      num_steps: the number of steps N, at least 1.
      start: the first time, by default t_max.
      end: the last time, at least 0, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `time_uniform`, or when the last time is negative.
    """
    start, end = ends_of(schedule, start, end)
    if end < 0:
        raise ValueError(f"time_quadratic needs a last time of at least 0, got {end}")
    return pinned(between(np.sqrt(start), np.sqrt(end), fractions_of(num_steps)) ** 2, start, end)


@grid
def beta(
    schedule: NoiseSchedule,
    num_steps: int,
    a: float = 0.6,
    b: float = 0.6,
    *,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Times at equal quantiles of a beta distribution over the time, dense at both ends (arXiv 2407.12173).

    Args:
      schedule: the noise schedule.
      num_steps: the number of steps N, at least 1.
      a: the distribution's first parameter; below 1 it is dense at the end.
      b: the second one; below 1 it is dense at the start.
      start: the first time, by default t_max.
      end: the last time, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `time_uniform`, or when a or b is not positive.
    """
    from scipy.special import betaincinv

    if not (a > 0 and b > 0):
        raise ValueError(f"beta needs a > 0 and b > 0, got {a} and {b}")
    start, end = ends_of(schedule, start, end)
    return pinned(between(end, start, betaincinv(a, b, 1 - fractions_of(num_steps))), start, end)


@grid
def sgm_uniform(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Times of N equal steps to the lowest level that a discrete model knows, the last of which ends at t_min.

    For a schedule that goes on to sigma = 0 (`discrete` with t_min=-1) the last step jumps there from one step above
    the lowest level, as in Stability AI's generative-models; for any other this is `time_uniform`.

    Args:
      schedule: the noise schedule.
      num_steps: the number of steps N, at least 1.
      start: the first time, by default t_max.
      end: the last time, by default t_min.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `time_uniform`.
    """
    start, end = ends_of(schedule, start, end)
    lowest = end if schedule.num_timesteps is None else max(end, 0.0)
    return pinned(between(start, lowest, fractions_of(num_steps)), start, end)


def from_sigmas(schedule: NoiseSchedule, sigmas: ArrayLike) -> np.ndarray:
    """The times at which sigma / alpha takes the values given: your own list of noise levels.

    Args:
      schedule: the noise schedule.
      sigmas: (N + 1,) strictly decreasing levels of noise relative to the data, within the schedule; a last 0 needs a
        schedule that ends at sigma = 0.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: when the sigmas are not as above.
    """
    expect_schedule(schedule)
    kappa = concrete_array("sigmas", sigmas)
    if kappa.ndim != 1 or kappa.size < 2 or not (np.diff(kappa) < 0).all() or kappa[-1] < 0:
        raise ValueError(f"sigmas must be at least 2 strictly decreasing numbers, none negative, got {sigmas!r}")
    high, low = np.exp(-on_host(schedule.lambda_, [schedule.t_max, schedule.t_min]))
    if kappa[0] > high * (1 + 1e-6) or kappa[-1] < low * (1 - 1e-6):
        raise ValueError(f"sigmas must lie within the schedule's {low} to {high}, got {kappa[-1]} to {kappa[0]}")
    with np.errstate(divide="ignore"):
        lambda_ = -np.log(kappa)
    times = on_host(schedule.time, np.where(np.isfinite(lambda_), lambda_, 0.0))
    times = np.where(np.isfinite(lambda_), times, schedule.t_min)
    return np.clip(times, schedule.t_min, schedule.t_max)


@checked_arguments
def last_steps(times: ArrayLike, strength: float) -> np.ndarray:
    """The part of a grid that image-to-image sampling runs: its last strength N steps, at least one.

    Strength is the fraction of the steps that are run, and of the model calls. strength N is rounded to the nearest
    integer, halves up: 0.5 of 5 steps are 3, of 7 steps 4. 1 starts from pure noise and keeps nothing of the image; the
    smaller it is, the less noise the image gets and the more of it stays. What noise a strength means depends on the
    grid; to start at a noise level of your choice give a grid `start`.

    Args:
      times: (N + 1,) the times of a whole run.
      strength: above 0 and at most 1.

    Returns:
      The last times, float64; noise the image to the first of them with `schedule.add_noise`.

    Raises:
      TypeError: when times is no array of numbers, or strength no number.
      ValueError: unless 0 < strength <= 1, or when times is not one-dimensional.

    Examples:
      >>> last_steps([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], strength=0.4)
      array([0.4, 0.2, 0. ])
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    times = concrete_array("times", times)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"last_steps needs the N + 1 times of a whole run, got shape {times.shape}")
    # 1e-9: a half that the product misses by round-off, as 0.57 * 50, is one all the same.
    steps = max(1, math.floor(strength * (times.size - 1) + 0.5 + 1e-9))
    return times[-(steps + 1) :]


def _lambda_ends(schedule: NoiseSchedule, start: float, end: float) -> tuple[float, float]:
    high, low = on_host(schedule.lambda_, [start, end])
    if not np.isfinite([high, low]).all():
        raise ValueError(
            f"this grid needs a finite log-SNR at its ends, got lambda {high} and {low}: "
            "end it at a small positive sigma, or use a grid in time"
        )
    return float(high), float(low)


def _at_lambda(schedule: NoiseSchedule, lambda_: np.ndarray, start: float, end: float) -> np.ndarray:
    return pinned(on_host(schedule.time, lambda_), start, end)
