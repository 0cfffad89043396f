"""Whether a denoiser and what it is used with are of one schedule: another one gives plausible, wrong samples.

A denoiser made for a schedule carries it as an attribute, and what is made of a denoiser carries that of its own. A
plan holds the levels of its schedule at a few times. Denoisers without the attribute are not checked.
"""

from typing import Any, TypeVar

import numpy as np

from evodiff_jax.schedules._schedule import NoiseSchedule

Function = TypeVar("Function")

_ATTRIBUTE = "noise_schedule"
_FRACTIONS = (0.1, 0.5, 1.0)  # of the way from t_min to t_max
_TOLERANCE = 1e-3  # of alpha and sigma: betas in half precision pass, no two published schedules do

SomeLevels = tuple[tuple[float, float, float], ...]
"""Some times of a schedule with alpha and sigma there, as plain numbers: static data of a plan."""


def of_schedule(denoise: Function, schedule: NoiseSchedule) -> Function:
    """The denoiser, which is marked as made for the schedule."""
    setattr(denoise, _ATTRIBUTE, schedule)
    return denoise


def made_of(made: Function, denoise: Any) -> Function:
    """A denoiser made of another one, for the same schedule if that is known."""
    schedule = getattr(denoise, _ATTRIBUTE, None)
    return made if schedule is None else of_schedule(made, schedule)


def some_levels(schedule: NoiseSchedule) -> SomeLevels:
    """The schedule's alpha and sigma at a few of its times."""
    times = schedule.t_min + np.array(_FRACTIONS) * (schedule.t_max - schedule.t_min)
    return tuple((float(t), float(a), float(s)) for t, a, s in zip(times, *schedule.levels(times)[:2], strict=True))


def check_same_schedule(denoise: Any, levels: SomeLevels, of: str) -> None:
    """Checks that a denoiser is for the schedule with these levels, where it knows its own.

    Args:
      denoise: any function.
      levels: from `some_levels`; may be empty.
      of: what the levels are of, for the message.

    Raises:
      ValueError: when the levels differ by more than 0.1 %.
    """
    schedule = getattr(denoise, _ATTRIBUTE, None)
    if not isinstance(schedule, NoiseSchedule):
        return
    for t, alpha, sigma in levels:
        known = schedule.levels(t)
        if not np.allclose([known.alpha, known.sigma], [alpha, sigma], rtol=_TOLERANCE, atol=1e-6):
            raise ValueError(
                f"denoise was made for another schedule than {of}: at t = {t:g} it has alpha = {known.alpha:.4g} and "
                f"sigma = {known.sigma:.4g}, {of} has {alpha:.4g} and {sigma:.4g}; give both the same schedule"
            )
