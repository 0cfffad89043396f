"""Time grids: the N + 1 decreasing times of a run, from t_max to t_min of a schedule, as float64 NumPy arrays.

Any strictly decreasing times will do for a run; these are the usual ones. Every grid takes `start` and `end`, times
within the schedule, to run over a part of it.
"""

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike

from evodiff_jax.numerics import on_host
from evodiff_jax.schedules import NoiseSchedule

Grid = Callable[..., np.ndarray]


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
      ValueError: when num_steps is not a positive integer, not t_min <= end < start <= t_max, or the log-SNR is
        infinite at an end.
    """
    return polyexponential(schedule, num_steps, rho=1.0, start=start, end=end)


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
      ValueError: as `log_snr`.
    """
    return log_snr(schedule, num_steps, start=start, end=end)


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
      ValueError: as `log_snr`, or when rho is not positive.
    """
    if not rho > 0:
        raise ValueError(f"polyexponential needs rho > 0, got {rho}")
    start, end = _ends(schedule, start, end)
    high, low = _lambda_ends(schedule, start, end)
    return _at_lambda(schedule, _between(low, high, (1 - _fractions(num_steps)) ** rho), start, end)


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
      ValueError: as `log_snr`, or when rho is not positive.
    """
    if not rho > 0:
        raise ValueError(f"karras needs rho > 0, got {rho}")
    start, end = _ends(schedule, start, end)
    high, low = (np.exp(-lambda_ / rho) for lambda_ in _lambda_ends(schedule, start, end))
    return _at_lambda(schedule, -rho * np.log(_between(high, low, _fractions(num_steps))), start, end)


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
      ValueError: when num_steps is not a positive integer or not t_min <= end < start <= t_max.
    """
    return _between(*_ends(schedule, start, end), _fractions(num_steps))


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
      ValueError: as `time_uniform`, or when the last time is negative.
    """
    start, end = _ends(schedule, start, end)
    if end < 0:
        raise ValueError(f"time_quadratic needs a last time of at least 0, got {end}")
    return _pinned(_between(np.sqrt(start), np.sqrt(end), _fractions(num_steps)) ** 2, start, end)


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
      ValueError: as `time_uniform`, or when a or b is not positive.
    """
    from scipy.special import betaincinv

    if not (a > 0 and b > 0):
        raise ValueError(f"beta needs a > 0 and b > 0, got {a} and {b}")
    start, end = _ends(schedule, start, end)
    return _pinned(_between(end, start, betaincinv(a, b, 1 - _fractions(num_steps))), start, end)


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
      ValueError: as `time_uniform`.
    """
    start, end = _ends(schedule, start, end)
    lowest = end if schedule.num_timesteps is None else max(end, 0.0)
    return _pinned(_between(start, lowest, _fractions(num_steps)), start, end)


def leading(
    schedule: NoiseSchedule, num_steps: int, offset: int = 0, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """The timesteps of DDIM for discrete schedules: multiples of n // N, plus an offset, and t_min after them.

    Args:
      schedule: a schedule with `num_timesteps`, from `schedules.discrete`.
      num_steps: the number of steps N, at least 1.
      offset: what is added to the timesteps: 1 for Stable Diffusion. 0 reaches index 0, after which there is only the
        end at sigma = 0 of a schedule made with t_min=-1.
      start: timesteps above it are left out.
      end: the last time, by default t_min; timesteps that are not above one given here are left out.

    Returns:
      Decreasing times, float64: N + 1, fewer for a part.

    Raises:
      ValueError: as `time_uniform`, or when the schedule is not discrete, N is above its number of timesteps, or the
        timesteps do not lie between the ends.

    References:
      Song, Meng, Ermon, arXiv 2010.02502, appendix D.3; the name is from Lin et al., arXiv 2305.08891, table 2.
    """
    count = _discrete(schedule, "leading", num_steps)
    return _timesteps(schedule, np.arange(num_steps)[::-1] * (count // num_steps) + offset, start, end)


def trailing(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Timesteps of discrete schedules counted from the last one, which is always visited, and t_min after them.

    round(n (1 - i / N)) - 1 for i = 0 .. N - 1: the spacing for zero terminal SNR.

    Args:
      schedule: a schedule with `num_timesteps`, from `schedules.discrete`.
      num_steps: the number of steps N, at least 1.
      start: timesteps above it are left out.
      end: the last time, by default t_min; timesteps that are not above one given here are left out.

    Returns:
      Decreasing times, float64: N + 1, fewer for a part.

    Raises:
      ValueError: as `leading`.

    References:
      Lin, Liu, Li, Yang, arXiv 2305.08891, table 2.
    """
    count = _discrete(schedule, "trailing", num_steps)
    return _timesteps(schedule, np.round(count * (1 - _fractions(num_steps)[:-1])) - 1, start, end)


def from_sigmas(schedule: NoiseSchedule, sigmas: ArrayLike) -> np.ndarray:
    """The times at which sigma / alpha takes the values given: your own list of noise levels.

    Args:
      schedule: the noise schedule.
      sigmas: (N + 1,) strictly decreasing levels of noise relative to the data, within the schedule; a last 0 needs a
        schedule that ends at sigma = 0.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      ValueError: when the sigmas are not as above.
    """
    kappa = np.asarray(sigmas, np.float64)
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


def last_steps(times: ArrayLike, strength: float) -> np.ndarray:
    """The part of a grid that image-to-image sampling runs: its last round(strength N) steps, at least one.

    Strength is the fraction of the steps that are run, so of the model calls too. 1 starts from pure noise and keeps
    nothing of the image; the smaller it is, the less noise the image gets and the more of it stays. What noise a
    strength means depends on the grid; to start at a noise level of your choice give a grid `start`.

    Args:
      times: (N + 1,) the times of a whole run.
      strength: above 0 and at most 1.

    Returns:
      The last times, float64; noise the image to the first of them with `editing.add_noise`.

    Raises:
      ValueError: unless 0 < strength <= 1.

    Example:
      >>> last_steps([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], strength=0.4)
      array([0.4, 0.2, 0. ])
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    times = np.asarray(times, np.float64)
    return times[-(max(1, round(strength * (times.size - 1))) + 1) :]


# Every grid for any schedule by name: what the command line offers and the general tests run over.
GRIDS: dict[str, Grid] = {
    "log_snr": log_snr,
    "karras": karras,
    "time_uniform": time_uniform,
    "time_quadratic": time_quadratic,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
}


def _fractions(num_steps: int) -> np.ndarray:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
    return np.arange(num_steps + 1) / num_steps


def _between(start: float, end: float, fractions: np.ndarray) -> np.ndarray:
    return start * (1 - fractions) + end * fractions


def _ends(schedule: NoiseSchedule, start: float | None, end: float | None) -> tuple[float, float]:
    start = schedule.t_max if start is None else float(start)
    end = schedule.t_min if end is None else float(end)
    if not schedule.t_min <= end < start <= schedule.t_max:
        raise ValueError(
            f"a grid needs end < start within the schedule's {schedule.t_min} to {schedule.t_max}, "
            f"got start={start} and end={end}"
        )
    return start, end


def _lambda_ends(schedule: NoiseSchedule, start: float, end: float) -> tuple[float, float]:
    high, low = on_host(schedule.lambda_, [start, end])
    if not np.isfinite([high, low]).all():
        raise ValueError(
            f"this grid needs a finite log-SNR at its ends, got lambda {high} and {low}: "
            "end it at a small positive sigma, or use a grid in time"
        )
    return float(high), float(low)


def _at_lambda(schedule: NoiseSchedule, lambda_: np.ndarray, start: float, end: float) -> np.ndarray:
    return _pinned(on_host(schedule.time, lambda_), start, end)


def _pinned(times: np.ndarray, start: float, end: float) -> np.ndarray:
    """The ends exactly: a round trip through lambda would move them by round-off, outside the schedule."""
    times[0], times[-1] = start, end
    return times


def _discrete(schedule: NoiseSchedule, grid: str, num_steps: int) -> int:
    """The number of the schedule's timesteps, once it is known to have that many."""
    _fractions(num_steps)
    if schedule.num_timesteps is None:
        raise ValueError(f"the {grid} grid needs a schedule of discrete timesteps, from schedules.discrete")
    if num_steps > schedule.num_timesteps:
        raise ValueError(f"the {grid} grid needs num_steps <= {schedule.num_timesteps}, got {num_steps}")
    return schedule.num_timesteps


def _timesteps(schedule: NoiseSchedule, steps: np.ndarray, start: float | None, end: float | None) -> np.ndarray:
    """The timesteps between the ends, and the end; without a part asked for, all of them or an error."""
    whole = start is None and end is None
    start, end = _ends(schedule, start, end)
    kept = steps if whole else steps[(steps <= start) & (steps > end)]
    times = np.append(np.asarray(kept, np.float64), end)
    if times.size < 2 or times[0] > schedule.t_max or not (np.diff(times) < 0).all():
        raise ValueError(
            f"the timesteps {steps[0]:g} .. {steps[-1]:g} and the end {end:g} must decrease within the schedule's "
            f"{schedule.t_min:g} to {schedule.t_max:g}: choose another offset, or make the schedule with t_min=-1"
        )
    return times
