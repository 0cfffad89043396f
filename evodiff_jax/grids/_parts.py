"""What the grids share: fractions of a run, the ends of a part, checks."""

import functools
from collections.abc import Callable

import numpy as np

from evodiff_jax.numerics import Parameters, checked_arguments, is_integer
from evodiff_jax.schedules import NoiseSchedule, expect_schedule


def grid(make: Callable[Parameters, np.ndarray]) -> Callable[Parameters, np.ndarray]:
    """A grid that checks its arguments, the schedule first: the order of the two is easily mistaken."""
    checked = checked_arguments(make)

    @functools.wraps(make)
    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> np.ndarray:
        if args:
            expect_schedule(args[0])
        return checked(*args, **kwargs)

    return made


def fractions_of(num_steps: int) -> np.ndarray:
    """0 to 1 in equal steps; raises ValueError for anything but a positive number of them."""
    if not is_integer(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
    return np.arange(num_steps + 1) / num_steps


def between(start: float, end: float, fractions: np.ndarray) -> np.ndarray:
    """The numbers at fractions of the way from start to end."""
    return start * (1 - fractions) + end * fractions


def ends_of(schedule: NoiseSchedule, start: float | None, end: float | None) -> tuple[float, float]:
    """The first and last time, those of the schedule unless given.

    Raises TypeError for anything but a schedule and ValueError for ends outside it.
    """
    expect_schedule(schedule)
    start = schedule.t_max if start is None else float(start)
    end = schedule.t_min if end is None else float(end)
    if not schedule.t_min <= end < start <= schedule.t_max:
        raise ValueError(
            f"a grid needs end < start within the schedule's {schedule.t_min} to {schedule.t_max}, "
            f"got start={start} and end={end}"
        )
    return start, end


def pinned(times: np.ndarray, start: float, end: float) -> np.ndarray:
    """The ends exactly: a round trip through lambda would move them by round-off, outside the schedule."""
    times[0], times[-1] = start, end
    return times
