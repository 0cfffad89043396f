"""`plan` lays a run out as data, `sample` applies its rows in one loop; the same with a trace, or a call at a time."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from evodiff_jax import kernel
from evodiff_jax.numerics import at_least_float32, checked_arguments, concrete_array, is_integer, on_host
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule, expect_schedule, some_levels
from evodiff_jax.tables import Plan, Solver, Table, append_denoising, check_table, denoises_to_zero, pad
from evodiff_jax.types import (
    Denoiser,
    Hook,
    as_state,
    batch_size,
    broadcasts,
    check_function,
    check_keys,
    check_state,
    fold_in,
    widest,
)


class Trace(NamedTuple):
    """What a run did. With a plan of `calls` model calls padded to R rows, entries after `calls` are zero.

    Attributes:
      times: (R + 1,), the time of every model call, and at index `calls` the time of the result.
      states: (R + 1, B, ...), the corrected state at each of them, and at index `calls` the result. For a state that is
        a pytree, a pytree like it.
      rule: what the solver's rule tells of every row, a pytree with leaves (R, B) or, where channels are separate,
        (R, B, C); for a state of several leaves with choices of their own a pytree like it of such. Empty for solvers
        without a rule.
    """

    times: jax.Array
    states: Any
    rule: Any


@checked_arguments
def plan(
    schedule: NoiseSchedule,
    times: ArrayLike,
    solver: Solver,
    *,
    denoise_to_zero: bool = False,
    max_calls: int | None = None,
) -> Plan:
    """Lays out the run of a solver, for `sample`.

    Args:
      schedule: the model's noise schedule.
      times: (N + 1,) strictly decreasing times within the schedule, for example `grids.log_snr(schedule, N)`. Concrete
        times give a table computed in float64 on the host. Traced ones are not checked, and are computed with in
        float32 at least.
      solver: one of `evodiff_jax.solvers`, or your own.
      denoise_to_zero: end with the data prediction at times[-1], for one more model call.
      max_calls: the number of rows to pad the table to. Plans with the same `max_calls`, of one solver or of several
        without a rule and with the same memory, have the same shapes and run in the same compiled program.

    Returns:
      The plan; `plan.calls` is its number of model calls.

    Raises:
      TypeError: when the schedule or the solver is something else, denoise_to_zero is no boolean, max_calls no integer,
        or the solver returns no table.
      ValueError: when the times are not as above, the solver's table is inconsistent, or the run takes more calls than
        `max_calls`.

    Examples:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> run = plan(schedule, ed.grids.log_snr(schedule, 10), ed.solvers.dpm_solver_pp(2), max_calls=40)
      >>> int(run.calls), run.table.time.shape
      (10, (40,))
    """
    expect_schedule(schedule)
    expect_solver(solver)
    if max_calls is not None and not is_integer(max_calls):
        raise TypeError(f"max_calls must be an integer or None, got {max_calls!r}")
    laid_out = plan_from_times(schedule, check_times(times, schedule), solver, denoise_to_zero)
    calls = laid_out.table.time.shape[0]
    if max_calls is None:
        return laid_out
    if calls > max_calls:
        raise ValueError(f"{solver.name} takes {calls} model calls for these times, max_calls is {max_calls}")
    return dataclasses.replace(laid_out, table=pad(laid_out.table, int(max_calls)))


def plan_from_times(schedule: NoiseSchedule, times: Any, solver: Solver, denoise_to_zero: bool = False) -> Plan:
    """The plan for times as `check_times` returns them, or for such times in increasing order (a run to the noise)."""
    table = check_table(solver, solver.table(schedule, times), schedule, times[-1])
    if denoise_to_zero:
        table = append_denoising(table, times[-1])
    end = times[-1] if isinstance(times, Tracer) else np.asarray(times[-1])
    return Plan(table, np.asarray(table.time.shape[0], np.int32), end, solver.rule, some_levels(schedule))


def expect_solver(solver: Any) -> None:
    """Raises TypeError for anything but a solver."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, such as solvers.dpm_solver_pp(2) returns, got {solver!r}")


def check_times(times: ArrayLike, schedule: NoiseSchedule) -> Any:
    """The times of a run: float64 NumPy when they are concrete, and then checked; traced ones in float32 at least.

    Raises:
      ValueError: when they are not one-dimensional, fewer than two, not finite, not strictly decreasing, outside the
        schedule, or evidently noise levels.
    """
    shape: tuple[int, ...] = np.shape(times)  # pyright: ignore[reportAssignmentType]
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            "times must be N + 1 >= 2 times in one dimension, for example grids.log_snr(schedule, 10), got shape "
            f"{shape}"
        )
    if isinstance(times, Tracer):
        return times.astype(at_least_float32(times.dtype))
    concrete = concrete_array("times", times)
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
    most = float(np.exp(-on_host(schedule.lambda_, schedule.t_max)))
    levels = "for noise levels instead of times use grids.from_sigmas(schedule, sigmas)"
    if concrete[0] > schedule.t_max + slack or concrete[-1] < schedule.t_min - slack:
        fit_as_levels = concrete[0] <= 1.05 * most and concrete[-1] >= 0 and abs(schedule.t_max - most) > 0.5 * most
        advice = f"; {levels}" if fit_as_levels else ""
        raise ValueError(
            f"times must lie within the schedule's {schedule.t_min} to {schedule.t_max}, "
            f"got {concrete[-1]} to {concrete[0]}{advice}"
        )
    if abs(concrete[0] - most) <= 0.05 * most < 0.5 * abs(schedule.t_max - most):
        raise ValueError(
            f"times[0] = {concrete[0]:g} is the schedule's largest sigma / alpha, {most:g}, and far from its t_max = "
            f"{schedule.t_max:g}: {levels}"
        )
    return concrete


def sample(
    denoise: Denoiser,
    x_T: Any,
    plan: Plan,
    *,
    key: jax.Array | None = None,
    on_state: Hook | None = None,
    remat: bool = False,
) -> Any:
    """Samples from a diffusion or flow model: applies the rows of a plan, with one model call a row.

    A pure function, to be called inside your own `jax.jit`; it can be vmapped and differentiated too. One `lax.scan`
    runs every plan, in which the model is traced once. Jitted with the plan as an argument it is compiled once for all
    plans of one schedule that are padded to the same `max_calls`, whatever their number of steps, times and (of solvers
    without a rule and with the same memory) solver; padded rows are skipped.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction: x of x_T's shape and dtype, t a scalar, float32 at least.
        See `denoisers.from_prediction` for networks that predict something else. A function of x_0 and t put around it
        acts on every data prediction of the run.
      x_T: (B, ...) noise at the plan's first time, from `schedule.noise(key, shape)`, in the floating-point dtype of
        the run. Or a pytree of such arrays, all with the same B. The first axis is always the batch: an image without
        one would be taken for a batch of rows. Images are (B, H, W, C); for (B, C, H, W) give solvers that have a
        `channel_axis` 1 there.
      plan: from `plan`. A stacked one needs `jax.vmap`.
      key: a random key, or one for each sample (B,), with which sample k depends on key k alone. Needed by stochastic
        solvers and unused by the others. Under `vmap` or `shard_map` one key for all gives all the same noise.
      on_state: on_state(x, t, index, key) -> x, a function of the state that is applied before every model call and to
        the result (not to the data prediction of denoise_to_zero). `index` is the number of the call that follows, -1
        for the result; `key` is a random key of this call, or one a sample, None where `sample` got none.
      remat: recompute the model's activations in reverse-mode differentiation instead of keeping them: memory hardly
        grows with N (with its square root, and that only by the solver's own few states), for two more evaluations
        of the model a step.

    Returns:
      The sample at the plan's end, of the structure, shapes and dtypes of x_T.

    Raises:
      TypeError: when x_T is not floating-point, denoise or on_state returns no floating-point array, or plan, key or
        remat is something else.
      ValueError: when x_T has no batch axis, denoise or on_state returns another shape, a stochastic solver gets no
        key, the plan is stacked, or its coefficients are for states of another shape. All before compilation.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> x_T = schedule.noise(jax.random.key(0), (64, 32, 32, 3))
      >>> denoise = lambda x, t: x / (1 + t**2)  # the exact model of standard normal data
      >>> run = jax.jit(lambda x_T, plan: ed.sample(denoise, x_T, plan))
      >>> for steps in (5, 10):
      ...     x = run(x_T, ed.plan(schedule, ed.grids.log_snr(schedule, steps), ed.solvers.unipc(2), max_calls=20))
      >>> x.shape, x.dtype.name, run._cache_size()
      ((64, 32, 32, 3), 'float32', 1)
    """
    if not isinstance(remat, bool | np.bool_):
        raise TypeError(f"remat must be True or False, got {remat!r}")
    return _run(denoise, x_T, plan, key, on_state, bool(remat), traced=False)[0]


def sample_with_trace(
    denoise: Denoiser, x_T: Any, plan: Plan, *, key: jax.Array | None = None, on_state: Hook | None = None
) -> tuple[Any, Trace]:
    """`sample`, and the states and what the rule tells on the way: R + 1 states are kept in memory.

    Args:
      denoise: as for `sample`.
      x_T: as for `sample`.
      plan: as for `sample`.
      key: as for `sample`.
      on_state: as for `sample`.

    Returns:
      The sample and its `Trace`.

    Raises:
      TypeError: as `sample`.
      ValueError: as `sample`.
    """
    x, done, run = _run(denoise, x_T, plan, key, on_state, False, traced=True)
    assert done is not None
    end = lambda entries, last: jax.lax.dynamic_update_index_in_dim(
        jnp.concatenate([entries, jnp.zeros_like(entries[:1])]), last, run.calls, 0
    )
    return x, Trace(end(done.time, run.end), jax.tree.map(end, done.corrected, x), done.trace)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunState:
    """A run in progress, a pytree of fixed shapes: it can live inside a jit, a scan or a fori_loop.

    Attributes:
      x: (B, ...) or a pytree of such: where the model is to be called; the sample once `done`.
      t: the scalar time at which the model is to be called; that of the last call once `done`.
      done: whether the run is over, a boolean scalar.
      index: the number of rows applied.
      outputs: the remembered outputs, see `kernel.Carry`.
      memory: the rule's memory, see `kernel.Carry`.
      key: the random key or keys of the run, or None.
    """

    x: Any
    t: jax.Array
    done: jax.Array
    index: jax.Array
    outputs: Any
    memory: Any
    key: Any


def init(x_T: Any, plan: Plan, *, key: jax.Array | None = None) -> RunState:
    """The state of a run before its first model call, for loops of your own: see `update`.

    Args:
      x_T: as for `sample`.
      plan: as for `sample`.
      key: as for `sample`.

    Returns:
      The state.

    Raises:
      TypeError: as `sample`.
      ValueError: as `sample`.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> x_T = schedule.noise(jax.random.key(0), (4, 8))
      >>> plan = ed.plan(schedule, ed.grids.log_snr(schedule, 10), ed.solvers.unipc(2))
      >>> state = ed.init(x_T, plan)
      >>> while not state.done:
      ...     prediction = state.x / (1 + state.t**2)  # your model's data prediction at (state.x, state.t)
      ...     state = ed.update(state, prediction, plan)
      >>> state.x.shape
      (4, 8)
    """
    x_T, run, key = _prepare(x_T, plan, key)
    carry = kernel.start(x_T, run.table, run.rule)
    return _state(carry, run, jnp.zeros((), jnp.int32), key if run.table.noise is not None else None)


@jax.jit
def update(state: RunState, prediction: Any, plan: Plan) -> RunState:
    """The state after the model call at (state.x, state.t).

    Args:
      state: from `init` or the last `update`.
      prediction: the data prediction there, of the shape of state.x.
      plan: the plan that `init` was given.

    Returns:
      The next state; the same state where the run is over.

    Raises:
      TypeError: when the prediction is not a floating-point array.
      ValueError: when it has another shape.
    """
    if not isinstance(state, RunState):
        raise TypeError(f"state must be a RunState, from init or update, got {type(state).__name__}")
    m = as_state(prediction, state.x, "the model whose prediction update was given")
    _, run, _ = _prepare(state.x, plan, state.key)

    def apply(state: RunState) -> RunState:
        row = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, state.index, keepdims=False), run.table)
        keys = None if state.key is None else _row_keys(state.key, state.index)[0]
        carry = kernel.Carry(state.x, state.outputs, state.memory)
        carry, _ = kernel.advance(run.rule, carry, row, state.index, True, m, keys)
        return _state(carry, run, state.index + 1, state.key)

    return jax.lax.cond(state.done, lambda state: state, apply, state)


def _state(carry: kernel.Carry, run: Plan, index: jax.Array, key: Any) -> RunState:
    calls = jnp.asarray(run.calls, jnp.int32)
    t = run.table.time[jnp.minimum(index, calls - 1)]
    return RunState(carry.x, t, index >= calls, index, carry.outputs, carry.memory, key)


def _prepare(x_T: Any, plan: Plan, key: Any) -> tuple[Any, Plan, jax.Array | None]:
    """The checked state, the plan with its numbers in the state's scalar dtype, and the checked key."""
    x_T = check_state(x_T, "x_T")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, from evodiff_jax.plan(schedule, times, solver), got {plan!r}")
    if np.ndim(plan.calls) != 0:
        raise ValueError(f"this is a stack of {np.shape(plan.calls)[0]} plans: use jax.vmap over it, one run a plan")
    table, leaves = plan.table, jax.tree.leaves(x_T)
    if table.noise is not None and key is None:
        raise ValueError("this solver is stochastic: pass key, for example jax.random.key(0)")
    coordinates = table.predictor.shape[2:]
    for shape in (leaf.shape for leaf in leaves):
        if not broadcasts(coordinates, shape[1:]):
            raise ValueError(f"the solver's coefficients are for samples of shape {coordinates}, got x_T {shape}")
    dtype = widest(leaves)
    table, end = jax.tree.map(lambda column: jnp.asarray(column, dtype), (table, plan.end))
    keys = None if key is None else check_keys(key, batch_size(x_T))
    return x_T, dataclasses.replace(plan, table=table, end=end), keys


def _row_keys(key: jax.Array, index: Any) -> tuple[jax.Array, jax.Array]:
    """The random keys of a row: of its noise, and of the hook before it."""
    key = fold_in(key, index)
    return fold_in(key, 0), fold_in(key, 1)


def _run(
    denoise: Denoiser, x_T: Any, plan: Plan, key: Any, on_state: Hook | None, remat: bool, traced: bool
) -> tuple[Any, kernel.Done | None, Plan]:
    """The result, what the rows did where it is asked for, and the prepared plan."""
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    if on_state is not None:
        check_function("on_state", on_state, "on_state(x, t, index, key) -> x")
    x_T, run, key = _prepare(x_T, plan, key)
    check_same_schedule(denoise, plan.levels, "the plan's")
    rows = run.table.time.shape[0]
    size = math.isqrt(rows - 1) + 1 if remat else rows  # about sqrt(R) chunks of about sqrt(R) rows
    chunks = -(-rows // size)
    whole = isinstance(plan.calls, np.ndarray | int | np.integer) and int(plan.calls) == chunks * size

    def apply(carry: kernel.Carry, row: Table, index: Any, active: Any) -> tuple[kernel.Carry, kernel.Done | None]:
        keys, hook_keys = (None, None) if key is None else _row_keys(key, index)
        probe = _hooked(carry.x, row.time, index, hook_keys, on_state)
        m = as_state(denoise(probe, row.time), probe, "denoise(x, t)")
        after, done = kernel.advance(run.rule, carry._replace(x=probe), row, index, active, m, keys)
        if on_state is not None and active is not True:  # padding does not keep what the hook did
            after = after._replace(x=jax.tree.map(lambda a, b: jnp.where(active, a, b), after.x, carry.x))
        return after, done if traced else None

    def step(carry: kernel.Carry, scanned: tuple[Table, Any]) -> tuple[kernel.Carry, kernel.Done | None]:
        row, index = scanned
        if whole:
            return apply(carry, row, index, True)
        any_active, active = _any(index < run.calls)
        shapes = jax.eval_shape(apply, carry, row, index, active)[1] if traced else None

        def skip(carry: kernel.Carry, row: Table, *_: Any) -> tuple[kernel.Carry, kernel.Done | None]:
            return carry, None if shapes is None else kernel.skipped(run.rule, carry, row, shapes)

        return jax.lax.cond(any_active, apply, skip, carry, row, index, active)

    carry = kernel.start(x_T, run.table, run.rule)
    scanned = (pad(run.table, chunks * size), jnp.arange(chunks * size))
    if not remat:
        carry, done = jax.lax.scan(step, carry, scanned)
    else:
        # Reverse mode keeps the first carry of every chunk and the carries of one chunk, instead of those of all rows.
        chunked = jax.tree.map(lambda a: a.reshape(chunks, size, *a.shape[1:]), scanned)
        chunk = functools.partial(jax.lax.scan, jax.checkpoint(step, prevent_cse=False))
        carry, done = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, chunked)
    x = carry.x
    if on_state is not None:
        _, keys = (None, None) if key is None else _row_keys(key, run.calls)
        hooked = lambda x: _hooked(x, run.end, jnp.asarray(-1), keys, on_state)
        x = jax.lax.cond(denoises_to_zero(run), lambda x: x, hooked, x)
    return x, done, run


def _hooked(x: Any, t: jax.Array, index: Any, keys: Any, on_state: Hook | None) -> Any:
    return x if on_state is None else as_state(on_state(x, t, index, keys), x, "on_state(x, t, index, key)")


@jax.custom_batching.custom_vmap
def _any(active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The predicate of the loop's cond, and whether this plan's row is applied where it is taken.

    Of plans that are vmapped over together there is one predicate, as a batched one would make the cond a select.
    """
    return active, jnp.ones_like(active)


@_any.def_vmap
def _(axis_size: int, in_batched: list[bool], active: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
    if not in_batched[0]:
        return _any(active), (False, False)
    any_active = _any(jnp.any(active))[0]  # nested vmaps: the rule again
    return (any_active, active), (False, True)
