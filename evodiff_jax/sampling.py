"""`sample`: a solver's table scanned over the times of a run, and the same with a trace."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from evodiff_jax import tables
from evodiff_jax.denoisers import Denoiser
from evodiff_jax.gram import Gram
from evodiff_jax.numerics import at_least_float32
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers._evodiff import evodiff
from evodiff_jax.tables import Solver, Table


class Trace(NamedTuple):
    """What a run did.

    Attributes:
      times: (N + 1,), the times of the run.
      states: (N + 1, B, ...), the (corrected) state at every time, before any denoising to zero.
      coefficients: the rule's coefficients by name, for EVODiff "zeta" and "eta", per step that corrects, sample and
        (where separate) channel: (N - 2, B, C) for EVODiff, whose first and last steps have none. Empty for solvers
        without a rule.
      gram: the inner products they were computed from, each entry of the coefficients' shape, or None.
    """

    times: jax.Array
    states: jax.Array
    coefficients: dict[str, jax.Array]
    gram: Gram | None

    @property
    def zeta(self) -> jax.Array:
        """EVODiff's zeta, (N - 2, B, C) or (N - 2, B)."""
        return self.coefficients["zeta"]

    @property
    def eta(self) -> jax.Array:
        """EVODiff's eta, (N - 2, B, C) or (N - 2, B)."""
        return self.coefficients["eta"]


def sample(
    denoise: Denoiser,
    x_T: ArrayLike,
    times: ArrayLike,
    schedule: NoiseSchedule,
    solver: Solver | None = None,
    denoise_to_zero: bool = False,
    key: jax.Array | None = None,
) -> jax.Array:
    """Samples from a diffusion or flow model with exactly N model calls for N + 1 times.

    A pure function, to be called inside your own `jax.jit`; it can be vmapped and differentiated too. The model is
    traced once and stands once in the compiled program, whatever the solver and the number of steps.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction: x of x_T's shape and dtype, t a scalar, float32 at least.
        See `denoisers.from_prediction` for networks that predict something else.
      x_T: (B, ...) noise at times[0], of standard deviation sigma(times[0]), in the floating-point dtype of the run.
        Images are NHWC.
      times: (N + 1,) strictly decreasing times within the schedule, for example `grids.log_snr(schedule, N)`.
        Concrete times give a table computed in float64 on the host; traced ones are not checked.
      schedule: the model's noise schedule.
      solver: one of `evodiff_jax.solvers`, by default evodiff().
      denoise_to_zero: return denoise(x, times[-1]) at the end, for one more model call.
      key: a JAX random key, needed by stochastic solvers and unused by the others, so that comparing solvers is
        changing one argument.

    Returns:
      The sample at times[-1], of the shape and dtype of x_T.

    Raises:
      TypeError: when x_T is not floating-point, denoise returns no floating-point array, or the schedule or solver is
        something else.
      ValueError: when x_T has no batch axis, the times are not as above, denoise returns another shape, or a
        stochastic solver gets no key. All before compilation.

    Example:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> times = ed.grids.log_snr(schedule, 10)
      >>> denoise = lambda x, t: x / (1 + t**2)  # the exact model of standard normal data
      >>> x_T = schedule.t_max * jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
      >>> x = jax.jit(lambda x_T: ed.sample(denoise, x_T, times, schedule))(x_T)
      >>> x.shape, x.dtype.name
      ((64, 32, 32, 3), 'float32')
    """
    x_T, table, solver = _prepare(x_T, times, schedule, solver, denoise_to_zero, key)
    (carry, _), _ = _scan(denoise, x_T, table, solver, key, traced=False)
    return carry.x


def sample_with_trace(
    denoise: Denoiser,
    x_T: ArrayLike,
    times: ArrayLike,
    schedule: NoiseSchedule,
    solver: Solver | None = None,
    denoise_to_zero: bool = False,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Trace]:
    """`sample`, and the states and coefficients on the way: N + 1 states are kept in memory.

    Args:
      denoise: as for `sample`.
      x_T: as for `sample`.
      times: as for `sample`.
      schedule: as for `sample`.
      solver: as for `sample`.
      denoise_to_zero: as for `sample`.
      key: as for `sample`.

    Returns:
      The sample and its `Trace`.

    Raises:
      TypeError: as `sample`.
      ValueError: as `sample`.
    """
    x_T, table, solver = _prepare(x_T, times, schedule, solver, denoise_to_zero, key)
    (carry, _), (states, coefficients, gram) = _scan(denoise, x_T, table, solver, key, traced=True)
    # A denoising row already recorded the state at the last time.
    states = states if denoise_to_zero else jnp.concatenate([states, carry.x[None]])
    coefficients, gram = jax.tree.map(lambda a: a[2 : states.shape[0] - 1], (coefficients, gram))
    return carry.x, Trace(jnp.asarray(times, table.time.dtype), states, coefficients, gram)


def _prepare(
    x_T: ArrayLike,
    times: ArrayLike,
    schedule: NoiseSchedule,
    solver: Solver | None,
    denoise_to_zero: bool,
    key: Any,
) -> tuple[jax.Array, Table, Solver]:
    """The checked initial state, the table in the state's scalar dtype and the solver."""
    x_T = jnp.asarray(x_T)
    if not jnp.issubdtype(x_T.dtype, jnp.floating):
        raise TypeError(f"x_T must be floating-point, got {x_T.dtype}: convert it, for example x_T.astype('float32')")
    if x_T.ndim < 1:
        raise ValueError("x_T must have a batch axis in front, got a scalar")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, for example schedules.edm(), got {schedule!r}")
    solver = evodiff() if solver is None else solver
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, for example solvers.evodiff(), called, got {solver!r}")
    checked_times = check_times(times, schedule)
    table = solver.table(schedule, checked_times)
    if table.noise is not None and key is None:
        raise ValueError(f"the solver {solver.name} is stochastic: pass key, for example jax.random.key(0)")
    if denoise_to_zero:
        table = tables.append_denoising(table, checked_times[-1])
    dtype = at_least_float32(x_T.dtype)
    return x_T, jax.tree.map(lambda column: jnp.asarray(column, dtype), table), solver


def check_times(times: ArrayLike, schedule: NoiseSchedule) -> Any:
    """The times of a run: float64 NumPy when they are concrete, and then checked; else as they are.

    Raises:
      ValueError: when they are not one-dimensional, fewer than two, not finite, not strictly decreasing, or outside
        the schedule.
    """
    shape: tuple[int, ...] = np.shape(times)  # pyright: ignore[reportAssignmentType]
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"times must be N + 1 >= 2 times in one dimension, got shape {shape}")
    if isinstance(times, Tracer):
        return times
    concrete = np.asarray(times, np.float64)
    if not np.isfinite(concrete).all():
        raise ValueError("times must be finite")
    increases = np.flatnonzero(np.diff(concrete) >= 0)
    if increases.size:
        i = increases[0]
        raise ValueError(
            f"times must be strictly decreasing, from noise to data, got times[{i}] = {concrete[i]} "
            f"and times[{i + 1}] = {concrete[i + 1]}"
        )
    slack = 1e-6 * (schedule.t_max - schedule.t_min)  # float32 times of a float64 grid
    if concrete[0] > schedule.t_max + slack or concrete[-1] < schedule.t_min - slack:
        raise ValueError(
            f"times must lie within the schedule's {schedule.t_min} to {schedule.t_max}, "
            f"got {concrete[-1]} to {concrete[0]}"
        )
    return concrete


def _scan(denoise: Denoiser, x_T: jax.Array, table: Table, solver: Solver, key: jax.Array | None, traced: bool) -> Any:
    def step(state: tuple[tables.Carry, Any], row: Table) -> tuple[tuple[tables.Carry, Any], Any]:
        carry, key = state
        noise = None
        if row.noise is not None:
            key, draw = jax.random.split(key)
            noise = jax.random.normal(draw, x_T.shape, at_least_float32(x_T.dtype))
        carry, corrected, coefficients = tables.apply_row(denoise, solver, carry, row, noise)
        return (carry, key), (corrected, coefficients, carry.gram) if traced else None

    return jax.lax.scan(step, (tables.start(x_T, table, solver), key), table)
