"""The one kernel: a sampler is a table, a run is its rows applied one after the other.

A row is one model call. It finds the probe x, the prediction of the state at its time t, and the history
H_1, ..., H_K of the calls before, newest first:

    m          = denoise(x, t)                                the data prediction
    y          = m, or keep_x x + keep_m m                    what this call adds to the history, H_0
    corrected  = x + corrector_0 y + sum_j corrector_j H_j     the state at t, improved by what the call showed
    x'         = transition corrected + predictor_0 y + sum_j predictor_j H_j + noise z
                                                              the probe at the next row's time

         time  transition  predictor     corrector     history            noise
    row    t       c       d_0 ... d_K   b_0 ... b_K   keep_x, keep_m      nu

No second state is carried: a corrector differs from the predictor before it only by outputs that are still in the
history, so it is written as a change of the probe, and so is a second stage that starts from its step's first state.
Coefficients that depend on the sample (EVODiff's) come from the Gram of the newest 1 + K outputs through the solver's
rule, evaluated per sample (and channel), and are added to the row's constant ones. Rows are scanned, so the network
stands once in the compiled program whatever the table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from evodiff_jax import gram as grams
from evodiff_jax.denoisers import Denoiser
from evodiff_jax.gram import Gram
from evodiff_jax.numerics import at_least_float32, namespace
from evodiff_jax.schedules import NoiseSchedule


class Table(NamedTuple):
    """The coefficients of a run of R model calls with K remembered outputs: a pytree whose leaves have R rows.

    Coefficients may have further axes that broadcast against one sample of the state, for solvers whose coefficients
    differ from coordinate to coordinate: transition (R, ...), predictor (R, K + 1, ...) and so on.

    Attributes:
      time: (R,), the time of each model call.
      transition: (R,), the coefficient of the corrected state in the next probe.
      predictor: (R, K + 1), the coefficients of y and the history in the next probe.
      corrector: (R, K + 1), the coefficients of y and the history in the corrected state.
      history: None where y = m, else (keep_x, keep_m), each (R,).
      noise: (R,), the standard deviation of the noise in the next probe, or None for a deterministic solver.
      adaptive: (R, 2), 1 where the rule's corrector and predictor are added and 0 where not, or None without a rule.
      rule: a pytree of (R,) scalars that the solver's rule reads, or None without one.
      offset: None, or what is added to the corrected state and to the next probe, each (R, ...).
    """

    time: Any
    transition: Any
    predictor: Any
    corrector: Any
    history: tuple[Any, Any] | None = None
    noise: Any = None
    adaptive: Any = None
    rule: Any = None
    offset: tuple[Any, Any] | None = None


class Coefficients(NamedTuple):
    """What a rule returns for one sample (and channel).

    Attributes:
      predictor: K + 1 scalars to add to the row's predictor coefficients.
      corrector: K + 1 scalars to add to the row's corrector coefficients.
      trace: a dict of scalars for `sample_with_trace`.
    """

    predictor: tuple[Any, ...]
    corrector: tuple[Any, ...]
    trace: dict[str, Any]


class Solver(NamedTuple):
    """A training-free solver.

    Attributes:
      name: how it is called in messages.
      table: table(schedule, times) -> Table, by the same code in NumPy for concrete times and in JAX for traced ones.
      rule: rule(row, gram) -> Coefficients, for a row of `Table.rule` and the Gram of one sample (and channel), pure
        and elementwise; None for a solver whose coefficients are the table's alone.
      channel_axis: the axis of the state over which inner products are separate, None for one per sample.
    """

    name: str
    table: Callable[[NoiseSchedule, Any], Table]
    rule: Callable[[Any, Gram], Coefficients] | None = None
    channel_axis: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A run laid out: a table, how many of its rows are to be applied, and the rule that completes it.

    A pytree, so that it can be an argument of a jitted function, be vmapped over, or be part of a loop's state.

    Attributes:
      table: the coefficients, with any number of spare rows at the end.
      calls: the number of rows that are applied, an integer scalar.
      rule: the solver's rule, static.
      channel_axis: the solver's channel axis, static.
    """

    table: Table
    calls: Any
    rule: Callable[[Any, Gram], Coefficients] | None = dataclasses.field(default=None, metadata={"static": True})
    channel_axis: int | None = dataclasses.field(default=None, metadata={"static": True})


class Carry(NamedTuple):
    """What a row hands to the next.

    Attributes:
      x: the probe.
      outputs: (K + 1, B, ...), the newest outputs as a ring, so that none is ever moved: row i writes slot
        i mod (K + 1). None where K = 0.
      gram: the Gram of the outputs, newest first, for solvers with a rule, else None.
      row: the number of rows applied.
      key: the random key of the rows to come, or None.
    """

    x: jax.Array
    outputs: jax.Array | None
    gram: Gram | None
    row: jax.Array
    key: jax.Array | None


def start(x: jax.Array, plan: Plan, key: jax.Array | None) -> Carry:
    """The carry before the first row, from the initial state `x`."""
    slots = plan.table.predictor.shape[1]
    outputs = None if slots == 1 else jnp.zeros((slots, *x.shape), x.dtype)
    gram = None
    if plan.rule is not None:
        axes = grams.reduced_axes(x.shape, plan.channel_axis)
        kept = tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
        gram = grams.initial(kept, slots - 1, at_least_float32(x.dtype))
    return Carry(x, outputs, gram, jnp.zeros((), jnp.int32), key if plan.table.noise is not None else None)


def advance(plan: Plan, carry: Carry, row: Table, m: jax.Array) -> tuple[Carry, jax.Array, dict[str, jax.Array]]:
    """Applies one row: corrects the state at the row's time by what the model call there showed, predicts the next.

    Args:
      plan: the plan the row belongs to.
      carry: from `start` or the row before.
      row: one row of the plan's table, in the state's scalar dtype.
      m: the data prediction at (carry.x, row.time), of the state's shape and dtype.

    Returns:
      The next carry, the corrected state at the row's time, and the rule's trace.
    """
    x, outputs, gram, number, key = carry
    y = m
    if row.history is not None:
        keep_x, keep_m = row.history
        y = _combine(x.dtype, (keep_x, keep_m), (x, m))
    slots = row.predictor.shape[0]
    # ages[s] is the age of the output in slot s once y, of age 0, is written; the permutation is its own inverse.
    ages = (number - jnp.arange(slots)) % slots
    outputs = y[None] if outputs is None else jax.lax.dynamic_update_index_in_dim(outputs, y, number % slots, 0)

    predictor, corrector = _column(row.predictor, x.ndim), _column(row.corrector, x.ndim)
    trace: dict[str, jax.Array] = {}
    if plan.rule is not None and gram is not None:
        axes = grams.reduced_axes(x.shape, plan.channel_axis)
        gram = grams.push(gram, y, outputs, ages, axes)
        adaptive = _over_samples(plan.rule, gram.norms[0].ndim)(row.rule, gram)
        trace = adaptive.trace
        corrects, predicts = row.adaptive
        predictor = predictor + predicts * jnp.expand_dims(jnp.stack(adaptive.predictor), [a + 1 for a in axes])
        corrector = corrector + corrects * jnp.expand_dims(jnp.stack(adaptive.corrector), [a + 1 for a in axes])
    corrected = _combine(x.dtype, (None, *corrector[ages]), (x, *outputs))
    if row.offset is not None:
        corrected = _combine(x.dtype, (None, None), (corrected, row.offset[0]))
    # The next probe straight from x, so that the corrected state is computed only where a trace asks for it.
    following = row.transition * corrector + predictor
    terms, arrays = (row.transition, *following[ages]), (x, *outputs)
    if row.offset is not None:
        terms, arrays = (*terms, row.transition, 1.0), (*arrays, *row.offset)
    if row.noise is not None and key is not None:
        key, draw = jax.random.split(key)
        noise = jax.random.normal(draw, x.shape, at_least_float32(x.dtype))
        terms, arrays = (*terms, row.noise), (*arrays, noise)
    next_x = _combine(x.dtype, terms, arrays)
    return Carry(next_x, None if slots == 1 else outputs, gram, number + 1, key), corrected, trace


def call_model(denoise: Denoiser, x: jax.Array, t: jax.Array) -> jax.Array:
    """denoise(x, t), checked and in the state's dtype.

    Raises:
      TypeError: while tracing, when the denoiser does not return a floating-point array.
      ValueError: while tracing, when it returns another shape.
    """
    return check_prediction(denoise(x, t), x)


def check_prediction(m: Any, x: jax.Array) -> jax.Array:
    """The data prediction `m` for the state `x`, in its dtype.

    Raises:
      TypeError: when it is not a floating-point array.
      ValueError: when it has another shape.
    """
    if not isinstance(m, jax.Array | np.ndarray) or not jnp.issubdtype(m.dtype, jnp.floating):
        got = f"an array of {m.dtype}" if hasattr(m, "dtype") else type(m).__name__
        raise TypeError(f"denoise(x, t) must return a floating-point array like x, it returned {got}")
    if m.shape != x.shape:
        raise ValueError(f"denoise(x, t) must return the shape of x, {x.shape}, it returned {m.shape}")
    return jnp.asarray(m, x.dtype)


def check_state(x_T: ArrayLike) -> jax.Array:
    """The initial state as an array.

    Raises:
      TypeError: when it is not floating-point.
      ValueError: when it has no batch axis.
    """
    x_T = jnp.asarray(x_T)
    if not jnp.issubdtype(x_T.dtype, jnp.floating):
        raise TypeError(f"x_T must be floating-point, got {x_T.dtype}: convert it, for example x_T.astype('float32')")
    if x_T.ndim < 1:
        raise ValueError("x_T must have a batch axis in front, got a scalar")
    return x_T


def for_state(plan: Plan, x_T: jax.Array, key: jax.Array | None) -> Plan:
    """The plan with its table in the state's scalar dtype.

    Raises:
      ValueError: when the plan needs a key and there is none, or its coefficients are for states of another shape.
    """
    table = plan.table
    if table.noise is not None and key is None:
        raise ValueError("this solver is stochastic: pass key, for example jax.random.key(0)")
    coordinates = table.predictor.shape[2:]
    if len(coordinates) > x_T.ndim - 1 or np.broadcast_shapes(coordinates, x_T.shape[1:]) != x_T.shape[1:]:
        raise ValueError(f"the solver's coefficients are for samples of shape {coordinates}, got x_T {x_T.shape}")
    dtype = at_least_float32(x_T.dtype)
    return dataclasses.replace(plan, table=jax.tree.map(lambda column: jnp.asarray(column, dtype), table))


def row_at(table: Table, index: Any) -> Table:
    """One row of a table, for a traced index."""
    return jax.tree.map(lambda column: jax.lax.dynamic_index_in_dim(column, index, keepdims=False), table)


def append_denoising(table: Table, t: Any) -> Table:
    """Adds the row that replaces the final state by its data prediction at time `t`, for denoise-to-zero."""
    xp = namespace(t, table.time)

    def add(column: Any, value: Any) -> Any:
        return None if column is None else xp.concatenate([column, xp.broadcast_to(value, column[-1:].shape)])

    first = np.zeros(table.predictor.shape[1])
    first[0] = 1
    first = first.reshape(-1, *(1,) * (table.predictor.ndim - 2))
    return Table(
        time=add(table.time, t),
        transition=add(table.transition, 0.0),
        predictor=add(table.predictor, first),
        corrector=add(table.corrector, 0.0),
        history=None if table.history is None else (add(table.history[0], 0.0), add(table.history[1], 1.0)),
        noise=add(table.noise, 0.0),
        adaptive=add(table.adaptive, 0.0),
        rule=jax.tree.map(lambda column: add(column, column[-1]), table.rule),
        offset=None if table.offset is None else (add(table.offset[0], 0.0), add(table.offset[1], 0.0)),
    )


def _combine(dtype: Any, coefficients: tuple[Any, ...], arrays: tuple[jax.Array, ...]) -> jax.Array:
    """The linear combination of arrays, None standing for a coefficient 1, computed in float32 at least."""
    wide = at_least_float32(dtype)
    terms = [a.astype(wide) if c is None else c * a.astype(wide) for c, a in zip(coefficients, arrays, strict=True)]
    return sum(terms[1:], start=terms[0]).astype(dtype)


def _column(coefficients: jax.Array, ndim: int) -> jax.Array:
    """(K + 1, ...) with axes of size 1 put in, so that it broadcasts against K + 1 states of `ndim` axes."""
    count, *per_coordinate = coefficients.shape
    return coefficients.reshape(count, *(1,) * (ndim - len(per_coordinate)), *per_coordinate)


def _over_samples(rule: Callable[[Any, Gram], Coefficients], ndim: int) -> Callable[[Any, Gram], Coefficients]:
    """The rule vmapped over the axes of the Gram's entries: samples, and channels where they are separate."""
    for _ in range(ndim):
        rule = jax.vmap(rule, in_axes=(None, 0))
    return rule
