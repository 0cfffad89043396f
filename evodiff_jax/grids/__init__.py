"""Time grids: the N + 1 decreasing times of a run, from t_max to t_min of a schedule, as float64 NumPy arrays.

Any strictly decreasing times will do for a run; these are the usual ones. Every grid takes `start` and `end`, times
within the schedule, to run over a part of it.
"""

from collections.abc import Callable

import numpy as np

from evodiff_jax.grids._continuous import (
    beta,
    exponential,
    from_sigmas,
    karras,
    last_steps,
    log_snr,
    polyexponential,
    sgm_uniform,
    time_quadratic,
    time_uniform,
)
from evodiff_jax.grids._timesteps import leading, trailing

Grid = Callable[..., np.ndarray]
"""grid(schedule, steps, ...) -> the N + 1 decreasing times, float64."""

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
"""Every grid for any schedule by name: what the command line offers and the general tests run over."""

__all__ = [
    "GRIDS",
    "Grid",
    "beta",
    "exponential",
    "from_sigmas",
    "karras",
    "last_steps",
    "leading",
    "log_snr",
    "polyexponential",
    "sgm_uniform",
    "time_quadratic",
    "time_uniform",
    "trailing",
]
