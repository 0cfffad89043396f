"""Time grids: the N + 1 decreasing times of a run, from t_max to t_min of a schedule, as float64 NumPy arrays."""

from collections.abc import Callable

import numpy as np

from evodiff_jax.numerics import on_host
from evodiff_jax.schedules import NoiseSchedule

Grid = Callable[[NoiseSchedule, int], np.ndarray]


def log_snr(schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """Times equally spaced in the log-SNR (Lu et al. 2022, DPM-Solver, arXiv 2206.00927, section 3.4).

    Args:
      schedule: the noise schedule; its log-SNR must be finite at both ends.
      num_steps: the number of steps N, at least 1.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      ValueError: when num_steps is not a positive integer, or the log-SNR is infinite at an end.
    """
    return _times(schedule, num_steps, lambda u: _between(*_lambda_ends(schedule, "log_snr"), u))


def karras(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0) -> np.ndarray:
    """Times at which sigma / alpha is equally spaced in its rho-th root (Karras et al. 2022, arXiv 2206.00364, Eq. 5).

    Args:
      schedule: the noise schedule; its log-SNR must be finite at both ends.
      num_steps: the number of steps N, at least 1.
      rho: 7 in the paper; larger values spend more steps at low noise.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      ValueError: when num_steps is not a positive integer, rho is not positive, or the log-SNR is infinite at an end.
    """
    if not rho > 0:
        raise ValueError(f"karras needs rho > 0, got {rho}")
    start, end = (np.exp(-lambda_ / rho) for lambda_ in _lambda_ends(schedule, "karras"))
    return _times(schedule, num_steps, lambda u: -rho * np.log(_between(start, end, u)))


def time_uniform(schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """Equally spaced times.

    Args:
      schedule: the noise schedule.
      num_steps: the number of steps N, at least 1.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      ValueError: when num_steps is not a positive integer.
    """
    return _between(schedule.t_max, schedule.t_min, _fractions(num_steps))


def time_quadratic(schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """Times whose square roots are equally spaced: more steps at low noise than `time_uniform`.

    Args:
      schedule: the noise schedule, with t_min >= 0.
      num_steps: the number of steps N, at least 1.

    Returns:
      N + 1 decreasing times, float64.

    Raises:
      ValueError: when num_steps is not a positive integer or t_min is negative.
    """
    if schedule.t_min < 0:
        raise ValueError(f"time_quadratic needs t_min >= 0, got {schedule.t_min}")
    roots = _between(np.sqrt(schedule.t_max), np.sqrt(schedule.t_min), _fractions(num_steps))
    return _pinned(schedule, roots**2)


# Every grid by name: what the command line offers and the general tests run over.
GRIDS: dict[str, Grid] = {
    "log_snr": log_snr,
    "karras": karras,
    "time_uniform": time_uniform,
    "time_quadratic": time_quadratic,
}


def _fractions(num_steps: int) -> np.ndarray:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
    return np.arange(num_steps + 1) / num_steps


def _between(start: float, end: float, fractions: np.ndarray) -> np.ndarray:
    return start * (1 - fractions) + end * fractions


def _lambda_ends(schedule: NoiseSchedule, grid: str) -> tuple[float, float]:
    start, end = on_host(schedule.lambda_, [schedule.t_max, schedule.t_min])
    if not np.isfinite([start, end]).all():
        raise ValueError(
            f"the {grid} grid needs a finite log-SNR at t_max and t_min, got lambda {start} and {end}: "
            "end the schedule at a small positive sigma, or use a grid in time"
        )
    return float(start), float(end)


def _times(schedule: NoiseSchedule, num_steps: int, lambda_: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return _pinned(schedule, on_host(schedule.time, lambda_(_fractions(num_steps))))


def _pinned(schedule: NoiseSchedule, times: np.ndarray) -> np.ndarray:
    """The ends exactly: a round trip through lambda would move them by round-off, outside the schedule."""
    times[0], times[-1] = schedule.t_max, schedule.t_min
    return times
