"""`sample`: a solver's table scanned over the times of a run; the same with a trace, or for a plan made beforehand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from evodiff_jax import tables
from evodiff_jax.denoisers import Denoiser
from evodiff_jax.gram import Gram
from evodiff_jax.plans import plan as make_plan
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Plan, Solver, Table


class Trace(NamedTuple):
    """What a run did.

    Attributes:
      times: (N + 1,), the time of every model call, for most solvers the times of the run, and the last time.
      states: (N + 1, B, ...), the (corrected) state at every one of them, before any denoising to zero.
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
    """Samples from a diffusion or flow model, with one model call a step for most solvers: N for N + 1 times.

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
    x_T, prepared = _prepare(x_T, make_plan(schedule, times, solver, denoise_to_zero), key)
    return _scan(denoise, x_T, prepared, key, traced=False)[0].x


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
    x_T, prepared = _prepare(x_T, make_plan(schedule, times, solver, denoise_to_zero), key)
    carry, (states, coefficients, gram) = _scan(denoise, x_T, prepared, key, traced=True)
    called = prepared.table.time
    if not denoise_to_zero:  # a denoising row already recorded the state at the last time
        states = jnp.concatenate([states, carry.x[None]])
        called = jnp.concatenate([called, jnp.asarray(times, called.dtype)[-1:]])
    coefficients, gram = jax.tree.map(lambda a: a[2 : states.shape[0] - 1], (coefficients, gram))
    return carry.x, Trace(called, states, coefficients, gram)


def sample_plan(denoise: Denoiser, x_T: ArrayLike, plan: Plan, key: jax.Array | None = None) -> jax.Array:
    """`sample` for a run laid out beforehand, whose number of steps is a run-time value.

    A `lax.while_loop` over the plan's rows: jitted with the plan as an argument it is compiled once for all plans
    padded to the same `max_calls`, whatever their number of steps, times and (for solvers without a rule and of the
    same memory) solver. A vmap over `plans.stack` runs several solvers in one call. Without reverse-mode derivatives,
    which a loop of unknown length has not.

    Args:
      denoise: as for `sample`.
      x_T: as for `sample`.
      plan: from `plans.plan`.
      key: as for `sample`.

    Returns:
      The sample, of the shape and dtype of x_T, equal to that of `sample` to round-off.

    Raises:
      TypeError: as `sample`, or when `plan` is not a `Plan`.
      ValueError: as `sample`.

    Example:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> run = jax.jit(lambda x_T, plan: ed.sample_plan(lambda x, t: x / (1 + t**2), x_T, plan))
      >>> x_T = schedule.t_max * jax.random.normal(jax.random.key(0), (4, 8))
      >>> for steps in (5, 10):
      ...     x = run(x_T, ed.plan(schedule, ed.grids.log_snr(schedule, steps), max_calls=20))
      >>> run._cache_size()
      1
    """
    x_T, prepared = _prepare(x_T, plan, key)

    def body(carry: tables.Carry) -> tables.Carry:
        row = tables.row_at(prepared.table, carry.row)
        return tables.advance(prepared, carry, row, tables.call_model(denoise, carry.x, row.time))[0]

    start = tables.start(x_T, prepared, key)
    return jax.lax.while_loop(lambda carry: carry.row < prepared.calls, body, start).x


def _prepare(x_T: ArrayLike, plan: Plan, key: Any) -> tuple[jax.Array, Plan]:
    """The checked initial state, and the plan with its table in the state's scalar dtype."""
    x_T = tables.check_state(x_T)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, from evodiff_jax.plan(schedule, times), got {plan!r}")
    return x_T, tables.for_state(plan, x_T, key)


def _scan(denoise: Denoiser, x_T: jax.Array, plan: Plan, key: jax.Array | None, traced: bool) -> Any:
    def step(carry: tables.Carry, row: Table) -> tuple[tables.Carry, Any]:
        m = tables.call_model(denoise, carry.x, row.time)
        carry, corrected, coefficients = tables.advance(plan, carry, row, m)
        return carry, (corrected, coefficients, carry.gram) if traced else None

    return jax.lax.scan(step, tables.start(x_T, plan, key), plan.table)
