"""Whether a run's numbers are finite, and from which call on they are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.diagnostics._runs import Run, Trajectory
from evodiff_jax.diagnostics._states import mean_square
from evodiff_jax.numerics import on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule


def check_finite(run: Run | Trajectory, schedule: NoiseSchedule) -> None:
    """Checks on the host that states and data predictions are finite, and says where they cease to be.

    Args:
      run: a concrete run or trajectory.
      schedule: its schedule.

    Raises:
      TypeError: when the run is traced or something else, or the schedule is.
      ValueError: with the call, the time and the log-SNR at which numbers that are not finite began, and the samples.
    """
    expect_schedule(schedule)
    if not isinstance(run, Run | Trajectory) or isinstance(run.times, Tracer):
        raise TypeError(f"check_finite needs a concrete Run or Trajectory, from follow or converge, got {run!r}")
    check_flags(np.asarray(run.times), finite_flags(run), schedule, "call" if isinstance(run, Run) else "step")


def finite_flags(run: Run | Trajectory) -> tuple[jax.Array, jax.Array]:
    """Where the model broke (R, B), and which states (R + 1, B) are finite."""
    return run.broken, jnp.isfinite(jax.vmap(mean_square)(run.states))


def check_flags(times: np.ndarray, flags: tuple[Any, Any], schedule: NoiseSchedule, row: str) -> None:
    """Raises the ValueError of `check_finite` from the times of a run, its `finite_flags` and what its rows are."""
    broken, states = (np.asarray(part) for part in flags)
    rows = len(broken)
    first = min(np.flatnonzero(of.any(1)).min(initial=rows + 1) for of in (~states, broken))
    if first > rows:
        return
    by_model = first < rows and bool(broken[first].any())  # a correction then spoils the state of the same call
    which = np.flatnonzero(broken[first] if by_model else ~states[first])
    named = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
    reason = (
        "the model's input there is finite"
        if by_model
        else "the initial state is not finite"
        if first == 0
        else "the step before leaves the range of the dtype"
    )
    raise ValueError(
        f"the {'data prediction' if by_model else 'state'} is not finite from t = {times[first]:.6g} (log-SNR "
        f"{2 * float(on_host(schedule.lambda_, times[first])):.3g}) on, "
        f"{f'at {row} {first + 1} of {rows}' if first < rows else 'in the result'}, in {len(which)} of "
        f"{states.shape[1]} samples ({named}): {reason}"
    )
