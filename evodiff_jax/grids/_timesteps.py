"""Grids of the timesteps that a discrete schedule was trained at."""

import numpy as np

from evodiff_jax.grids._parts import ends_of, fractions_of, grid
from evodiff_jax.numerics import is_integer, on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule

_NEAR_T_MAX = 0.9  # a first timestep below this part of t_max has too much signal for an x_T of pure noise


@grid
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
      TypeError: when the schedule is something else.
      ValueError: when num_steps is not a positive integer, offset is no integer, not t_min <= end < start <= t_max, the
        schedule is not discrete, N is above its number of timesteps, the timesteps do not lie between the ends, or the
        first timestep is below 0.9 t_max and no start is given: x_T is noise of t_max, and n // N leaves the timesteps
        above (N - 1) (n // N) out, the more of them the farther n is from a multiple of N.

    References:
      Song, Meng, Ermon, arXiv 2010.02502, appendix D.3; the name is from Lin et al., arXiv 2305.08891, table 2.
    """
    if not is_integer(offset):
        raise ValueError(f"leading needs an integer for offset, got {offset!r}")
    count = _discrete(schedule, "leading", num_steps)
    times = _timesteps(schedule, np.arange(num_steps)[::-1] * (count // num_steps) + offset, start, end)
    if start is None and times[0] < _NEAR_T_MAX * schedule.t_max:
        raise ValueError(
            f"x_T is noise of t_max = {schedule.t_max:g}, but the first of {num_steps} leading timesteps is "
            f"{times[0]:g}, where alpha is {on_host(schedule.alpha, times[0]):.2g}: use grids.trailing, which starts "
            "at t_max, or give start and an x_T of that time"
        )
    return times


@grid
def trailing(
    schedule: NoiseSchedule, num_steps: int, *, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Timesteps of discrete schedules counted from the last one, which is always visited, and t_min after them.

    round(n (1 - i / N)) - 1 for i = 0 .. N - 1: the spacing for zero terminal SNR. Halves are rounded to the even
    neighbour, as NumPy's and the published code's `round` has it, and computed with integers, so that round-off moves
    none of them.

    Args:
      schedule: a schedule with `num_timesteps`, from `schedules.discrete`.
      num_steps: the number of steps N, at least 1.
      start: timesteps above it are left out.
      end: the last time, by default t_min; timesteps that are not above one given here are left out.

    Returns:
      Decreasing times, float64: N + 1, fewer for a part.

    Raises:
      TypeError: when the schedule is something else.
      ValueError: as `leading`.

    References:
      Lin, Liu, Li, Yang, arXiv 2305.08891, table 2.
    """
    count = _discrete(schedule, "trailing", num_steps)
    whole, rest = np.divmod(count * np.arange(num_steps, 0, -1), num_steps)
    up = (2 * rest > num_steps) | ((2 * rest == num_steps) & (whole % 2 == 1))
    return _timesteps(schedule, whole + up - 1, start, end)


def _discrete(schedule: NoiseSchedule, grid: str, num_steps: int) -> int:
    """The number of the schedule's timesteps, once it is known to have that many."""
    expect_schedule(schedule)
    fractions_of(num_steps)
    if schedule.num_timesteps is None:
        raise ValueError(f"the {grid} grid needs a schedule of discrete timesteps, from schedules.discrete")
    if num_steps > schedule.num_timesteps:
        raise ValueError(f"the {grid} grid needs num_steps <= {schedule.num_timesteps}, got {num_steps}")
    return schedule.num_timesteps


def _timesteps(schedule: NoiseSchedule, steps: np.ndarray, start: float | None, end: float | None) -> np.ndarray:
    """The timesteps between the ends, and the end; without a part asked for, all of them or an error."""
    whole = start is None and end is None
    start, end = ends_of(schedule, start, end)
    kept = steps if whole else steps[(steps <= start) & (steps > end)]
    if not kept.size:
        raise ValueError(
            f"no timestep of {steps[0]:g} .. {steps[-1]:g} is at most start = {start:g} and above end = {end:g}"
        )
    times = np.append(np.asarray(kept, np.float64), end)
    if times[0] > schedule.t_max or not (np.diff(times) < 0).all():
        raise ValueError(
            f"the timesteps {steps[0]:g} .. {steps[-1]:g} and the end {end:g} must decrease within the schedule's "
            f"{schedule.t_min:g} to {schedule.t_max:g}: choose another offset, or make the schedule with t_min=-1"
        )
    return times
