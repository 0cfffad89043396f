"""`sample`: a solver's table scanned over the times of a run; the same with a trace, or for a plan made beforehand."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from evodiff_jax import kernel
from evodiff_jax.denoisers import Denoiser
from evodiff_jax.plans import plan as make_plan
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.states import as_state, check_state
from evodiff_jax.tables import Plan, Solver, Table, pad, row_at

Hook = Callable[[Any, jax.Array], Any]


class Trace(NamedTuple):
    """What a run did.

    For a state that is a pytree, the states are one too, and so are the coefficients and inner products of a solver
    that has them for each leaf.

    Attributes:
      times: (N + 1,), the time of every model call, for most solvers the times of the run, and the last time.
      states: (N + 1, B, ...), the (corrected) state at every one of them, before any denoising to zero.
      coefficients: what the rule tells, by name, for EVODiff "zeta" and "eta" and for `evodiff` the estimated
        "variance" of the step's error, in units of the data's; per step from the second to the last but one, sample and
        (where separate) channel: (N - 2, B) for `evodiff`, (N - 2, B, C) for `evodiff_reference`. Empty for solvers
        without a rule.
      gram: the inner products they were computed from, a `Gram` with entries of the coefficients' shape, or None.
    """

    times: jax.Array
    states: Any
    coefficients: dict[str, Any]
    gram: Any

    @property
    def zeta(self) -> Any:
        """EVODiff's zeta, (N - 2, B) or (N - 2, B, C)."""
        return self.coefficients["zeta"]

    @property
    def eta(self) -> Any:
        """EVODiff's eta, (N - 2, B) or (N - 2, B, C)."""
        return self.coefficients["eta"]


def sample(
    denoise: Denoiser,
    x_T: Any,
    times: ArrayLike,
    schedule: NoiseSchedule,
    solver: Solver | None = None,
    denoise_to_zero: bool = False,
    key: jax.Array | None = None,
    *,
    on_state: Hook | None = None,
    remat: bool = False,
    check_finite: bool = False,
) -> Any:
    """Samples from a diffusion or flow model, with one model call a step for most solvers: N for N + 1 times.

    A pure function, to be called inside your own `jax.jit`; it can be vmapped and differentiated too. The model is
    traced once and stands once in the compiled program, whatever the solver and the number of steps.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction: x of x_T's shape and dtype, t a scalar, float32 at least.
        See `denoisers.from_prediction` for networks that predict something else. A function of x_0 and t put around it
        acts on every data prediction of the run.
      x_T: (B, ...) noise at times[0], of standard deviation sigma(times[0]), in the floating-point dtype of the run;
        images are NHWC. Or a pytree of such arrays, all with the same B.
      times: (N + 1,) strictly decreasing times within the schedule, for example `grids.log_snr(schedule, N)`.
        Concrete times give a table computed in float64 on the host; traced ones are not checked.
      schedule: the model's noise schedule.
      solver: one of `evodiff_jax.solvers`, by default evodiff().
      denoise_to_zero: return denoise(x, times[-1]) at the end, for one more model call.
      key: a JAX random key, needed by stochastic solvers and unused by the others, so that comparing solvers is
        changing one argument.
      on_state: on_state(x, t) -> x, a function of the state that is applied before every model call and to the result
        (not to the data prediction that denoise_to_zero returns).
      remat: recompute the model's activations in reverse-mode differentiation instead of keeping them: memory hardly
        grows with N (with its square root, and that only by the solver's own few states), for two more evaluations
        of the model a step.
      check_finite: raise an error when x_T, which must then be concrete, is not finite.

    Returns:
      The sample at times[-1], of the structure, shapes and dtypes of x_T.

    Raises:
      TypeError: when x_T is not floating-point, denoise returns no floating-point array, or the schedule or solver is
        something else.
      ValueError: when x_T has no batch axis, the times are not as above, denoise returns another shape, a stochastic
        solver gets no key, or x_T is found not to be finite. All before compilation.

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
    x_T, prepared = _prepare(x_T, make_plan(schedule, times, solver, denoise_to_zero), key, check_finite)
    return run(denoise, x_T, prepared, key, on_state, remat)


def sample_with_trace(
    denoise: Denoiser,
    x_T: Any,
    times: ArrayLike,
    schedule: NoiseSchedule,
    solver: Solver | None = None,
    denoise_to_zero: bool = False,
    key: jax.Array | None = None,
    *,
    on_state: Hook | None = None,
    check_finite: bool = False,
) -> tuple[Any, Trace]:
    """`sample`, and the states and coefficients on the way: N + 1 states are kept in memory.

    Args:
      denoise: as for `sample`.
      x_T: as for `sample`.
      times: as for `sample`.
      schedule: as for `sample`.
      solver: as for `sample`.
      denoise_to_zero: as for `sample`.
      key: as for `sample`.
      on_state: as for `sample`.
      check_finite: as for `sample`.

    Returns:
      The sample and its `Trace`.

    Raises:
      TypeError: as `sample`.
      ValueError: as `sample`.
    """
    x_T, prepared = _prepare(x_T, make_plan(schedule, times, solver, denoise_to_zero), key, check_finite)
    step = _row_step(denoise, prepared, on_state)
    carry, done = jax.lax.scan(step, kernel.start(x_T, prepared, key), prepared.table)
    x = _result(prepared, carry, on_state)
    states, called = done.corrected, prepared.table.time
    if not denoise_to_zero:  # else the denoising row recorded the state at the last time
        states = jax.tree.map(lambda before, last: jnp.concatenate([before, last[None]]), states, x)
        called = jnp.append(called, prepared.end)
    coefficients, gram = jax.tree.map(lambda a: a[2 : called.shape[0] - 1], (done.trace, done.gram))
    return x, Trace(called, states, coefficients, gram)


def sample_plan(
    denoise: Denoiser,
    x_T: Any,
    plan: Plan,
    key: jax.Array | None = None,
    *,
    on_state: Hook | None = None,
    check_finite: bool = False,
) -> Any:
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
      on_state: as for `sample`.
      check_finite: as for `sample`.

    Returns:
      The sample, of the structure, shapes and dtypes of x_T, equal to that of `sample` to round-off.

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
    x_T, prepared = _prepare(x_T, plan, key, check_finite)
    step = _row_step(denoise, prepared, on_state)

    def body(carry: kernel.Carry) -> kernel.Carry:
        return step(carry, row_at(prepared.table, carry.row))[0]

    start = kernel.start(x_T, prepared, key)
    return _result(prepared, jax.lax.while_loop(lambda carry: carry.row < prepared.calls, body, start), on_state)


def run(denoise: Denoiser, x: Any, prepared: Plan, key: Any, on_state: Hook | None, remat: bool) -> Any:
    """All rows of a plan that `kernel.for_state` has prepared, scanned."""
    step = _row_step(denoise, prepared, on_state)
    carry = kernel.start(x, prepared, key)
    if remat:
        carry = _scan_rematerialised(step, carry, prepared.table)
    else:
        carry = jax.lax.scan(lambda carry, row: (step(carry, row)[0], None), carry, prepared.table)[0]
    return _result(prepared, carry, on_state)


def _prepare(x_T: Any, plan: Plan, key: Any, check_finite: bool) -> tuple[Any, Plan]:
    """The checked initial state, and the plan with its table in the state's scalar dtype."""
    if check_finite:
        _check_finite(x_T)
    x_T = check_state(x_T, "x_T")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, from evodiff_jax.plan(schedule, times), got {plan!r}")
    return x_T, kernel.for_state(plan, x_T, key)


def _check_finite(x_T: Any) -> None:
    for leaf in jax.tree.leaves(x_T):
        if isinstance(leaf, Tracer):
            raise ValueError("check_finite needs a concrete x_T: check before jax.jit, or leave it out")
        bad = np.size(leaf) - np.isfinite(np.asarray(leaf, np.float64)).sum()
        if bad:
            raise ValueError(f"x_T must be finite, got {bad} NaN or infinite values among {np.size(leaf)}")


def _row_step(denoise: Denoiser, plan: Plan, on_state: Hook | None) -> Callable[[kernel.Carry, Table], Any]:
    """The body of the loop over rows: hook, model call, row."""
    if not callable(denoise):
        raise TypeError(f"denoise must be a function denoise(x, t) -> x_0, got {denoise!r}")
    if not (on_state is None or callable(on_state)):
        raise TypeError(f"on_state must be a function on_state(x, t) -> x, got {on_state!r}")

    def step(carry: kernel.Carry, row: Table) -> tuple[kernel.Carry, kernel.Row]:
        carry = carry._replace(x=_hooked(carry.x, row.time, on_state))
        m = as_state(denoise(carry.x, row.time), carry.x, "denoise(x, t)")
        return kernel.advance(plan, carry, row, m)

    return step


def _result(plan: Plan, carry: kernel.Carry, on_state: Hook | None) -> Any:
    if on_state is None:
        return carry.x
    return jax.lax.cond(plan.denoises, lambda x: x, lambda x: _hooked(x, plan.end, on_state), carry.x)


def _hooked(x: Any, t: jax.Array, on_state: Hook | None) -> Any:
    return x if on_state is None else as_state(on_state(x, t), x, "on_state(x, t)")


def _scan_rematerialised(step: Callable[..., Any], carry: kernel.Carry, table: Table) -> kernel.Carry:
    """A scan over about sqrt(R) chunks of about sqrt(R) rows, each recomputed from its first carry.

    Reverse mode keeps the first carry of every chunk and the carries of one, instead of those of all rows.
    """
    rows = table.time.shape[0]
    size = math.isqrt(rows - 1) + 1
    chunks = -(-rows // size)

    def row_step(carry: kernel.Carry, row: Table) -> tuple[kernel.Carry, None]:
        if chunks * size == rows:
            return step(carry, row)[0], None
        return jax.lax.cond(carry.row < rows, lambda c: step(c, row)[0], lambda c: c, carry), None

    def chunk_step(carry: kernel.Carry, chunk: Table) -> tuple[kernel.Carry, None]:
        return jax.lax.scan(jax.checkpoint(row_step, prevent_cse=False), carry, chunk)

    chunked = jax.tree.map(lambda column: column.reshape(chunks, size, *column.shape[1:]), pad(table, chunks * size))
    return jax.lax.scan(jax.checkpoint(chunk_step, prevent_cse=False), carry, chunked)[0]
