"""Whether noise has the scale of its schedule."""

import jax
import numpy as np

from evodiff_jax.numerics import on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule
from evodiff_jax.types import State, check_state

_SLACK = 0.1  # of sigma: an x_T of data and noise at t_max differs less from pure noise


def check_noise(schedule: NoiseSchedule, x_T: State) -> None:
    """Checks that the initial noise of a run has the schedule's scale, sigma(t_max).

    Args:
      schedule: the schedule of the run.
      x_T: concrete, (B, ...) or a pytree of such.

    Raises:
      TypeError: when the schedule is something else, or x_T is not floating-point.
      ValueError: when the root mean square of x_T is farther from sigma(t_max) than 10 % and six standard errors.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> check_noise(schedule, schedule.noise(jax.random.key(0), (4, 32, 32, 3)))
    """
    expect_schedule(schedule)
    leaves = jax.tree.leaves(check_state(x_T, "x_T"))
    count = sum(leaf.size for leaf in leaves)
    found = np.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in leaves) / count)
    sigma = float(on_host(schedule.sigma, schedule.t_max))
    if not abs(found / sigma - 1) <= _SLACK + 6 / np.sqrt(2 * count):
        raise ValueError(
            f"x_T has a root mean square of {found:.4g}, pure noise of this schedule has {sigma:.4g}: make it with "
            "schedule.noise(key, shape)"
        )
