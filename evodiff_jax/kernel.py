"""The one kernel: applies a row of a table (see `tables`) to a run, whose state is an array or a pytree of arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evodiff_jax import gram as grams
from evodiff_jax.gram import Gram
from evodiff_jax.numerics import at_least_float32
from evodiff_jax.states import State, broadcasts, leaf_keys, widest
from evodiff_jax.tables import Coefficients, Plan, Rule, Table


class Carry(NamedTuple):
    """What a row hands to the next.

    Attributes:
      x: the probe.
      outputs: like x with leaves (K + 1, B, ...), the newest outputs as a ring, so that none is ever moved: row i
        writes slot i mod (K + 1). None where K = 0.
      grams: for solvers with a rule the Gram of the outputs, newest first: one for each leaf of x, or one for all;
        else empty.
      memories: what the rule keeps of each Gram's samples, (B, ..., M).
      row: the number of rows applied.
      key: the random key of the rows to come, or None.
    """

    x: State
    outputs: Any
    grams: tuple[Gram, ...]
    memories: tuple[jax.Array, ...]
    row: jax.Array
    key: jax.Array | None


class Row(NamedTuple):
    """What a row did.

    Attributes:
      corrected: the corrected state at the row's time.
      trace: the rule's trace; each entry an array, or for a state of several leaves with inner products of their own a
        pytree like it.
      gram: the inner products, in the same form, or None.
    """

    corrected: State
    trace: dict[str, Any]
    gram: Any


def start(x: State, plan: Plan, key: jax.Array | None) -> Carry:
    """The carry before the first row, from the initial state `x`."""
    slots = plan.table.predictor.shape[1]
    outputs = None if slots == 1 else jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), x)
    initial, memories = (), ()
    if plan.rule is not None:
        leaves = jax.tree.leaves(x)
        for leaf in leaves if plan.per_leaf else leaves[:1]:
            axes = grams.reduced_axes(leaf.shape, plan.channel_axis)
            kept = tuple(n for axis, n in enumerate(leaf.shape) if axis not in axes)
            initial = (*initial, grams.initial(kept, slots - 1, widest(leaves), plan.table.alpha is not None))
            memories = (*memories, jnp.zeros((*kept, plan.memory), widest(leaves)))
    return Carry(x, outputs, initial, memories, jnp.zeros((), jnp.int32), key if plan.table.noise is not None else None)


def advance(plan: Plan, carry: Carry, row: Table, m: State) -> tuple[Carry, Row]:
    """Applies one row: corrects the state at the row's time by what the model call there showed, predicts the next.

    Args:
      plan: the plan the row belongs to.
      carry: from `start` or the row before.
      row: one row of the plan's table, in the state's scalar dtype.
      m: the data prediction at (carry.x, row.time), of the state's structure, shapes and dtypes.
    """
    xs, structure = jax.tree.flatten(carry.x)
    ys = jax.tree.leaves(m)
    if row.history is not None:
        ys = [_combine(x.dtype, row.history, (x, y)) for x, y in zip(xs, ys, strict=True)]
    slots = row.predictor.shape[0]
    # ages[s] is the age of the output in slot s once y, of age 0, is written; the permutation is its own inverse.
    ages = (carry.row - jnp.arange(slots)) % slots
    if carry.outputs is None:
        rings = [y[None] for y in ys]
    else:
        written = zip(jax.tree.leaves(carry.outputs), ys, strict=True)
        rings = [jax.lax.dynamic_update_index_in_dim(ring, y, carry.row % slots, 0) for ring, y in written]

    gram, memories, chosen = _choose(plan, carry, row, xs, ys, rings, ages)
    key, draws = carry.key, (None,) * len(xs)
    if row.noise is not None and key is not None:
        key, draw = jax.random.split(key)
        draws = leaf_keys(draw, len(xs))
    of_leaves = chosen if plan.per_leaf and chosen else (chosen or (None,)) * len(xs)
    stepped = [
        _step(plan, row, x, ring, ages, coefficients, draw)
        for x, ring, coefficients, draw in zip(xs, rings, of_leaves, draws, strict=True)
    ]
    following, corrected = (jax.tree.unflatten(structure, leaves) for leaves in zip(*stepped, strict=True))
    outputs = None if carry.outputs is None else jax.tree.unflatten(structure, rings)

    def traced(values: Sequence[Any]) -> Any:
        return jax.tree.unflatten(structure, values) if plan.per_leaf else values[0]

    trace = {name: traced([c.trace[name] for c in chosen]) for name in chosen[0].trace} if chosen else {}
    done = Row(corrected, trace, traced(gram) if chosen else None)
    return Carry(following, outputs, gram, memories, carry.row + 1, key), done


def for_state(plan: Plan, x_T: State, key: jax.Array | None) -> Plan:
    """The plan with its table and end in the state's scalar dtype.

    Raises:
      ValueError: when the plan needs a key and there is none, or its coefficients are for states of another shape.
    """
    table = plan.table
    if table.noise is not None and key is None:
        raise ValueError("this solver is stochastic: pass key, for example jax.random.key(0)")
    coordinates = table.predictor.shape[2:]
    leaves = jax.tree.leaves(x_T)
    for shape in (leaf.shape for leaf in leaves):
        if not broadcasts(coordinates, shape[1:]):
            raise ValueError(f"the solver's coefficients are for samples of shape {coordinates}, got x_T {shape}")
    dtype = widest(leaves)
    table, end = jax.tree.map(lambda column: jnp.asarray(column, dtype), (table, plan.end))
    return dataclasses.replace(plan, table=table, end=end)


def _choose(
    plan: Plan, carry: Carry, row: Table, xs: list[Any], ys: list[Any], rings: list[Any], ages: jax.Array
) -> tuple[tuple[Gram, ...], tuple[jax.Array, ...], tuple[Coefficients, ...]]:
    """The new Grams, what the rule keeps, and what it makes of each; nothing without a rule."""
    if plan.rule is None:
        return (), (), ()
    dtype = carry.grams[0].norms[0].dtype
    measured = []
    for x, y, ring in zip(xs, ys, rings, strict=True):
        axes = grams.reduced_axes(y.shape, plan.channel_axis)
        of_data = None if row.alpha is None else x.astype(dtype) / row.alpha.astype(dtype)
        measured.append(grams.measure(y, ring, ages, of_data, axes, dtype))
    if not plan.per_leaf:  # the leaves are parts of one vector, whose squared norm is the sum of theirs
        measured = [jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *measured)]
    gram = tuple(grams.push(g, new, ages) for g, new in zip(carry.grams, measured, strict=True))
    ruled = [
        _over_samples(plan.rule, g.norms[0].ndim)(row.rule, g, memory)
        for g, memory in zip(gram, carry.memories, strict=True)
    ]
    return gram, tuple(memory for _, memory in ruled), tuple(chosen for chosen, _ in ruled)


def _step(
    plan: Plan, row: Table, x: jax.Array, ring: jax.Array, ages: jax.Array, chosen: Coefficients | None, draw: Any
) -> tuple[jax.Array, jax.Array]:
    """One leaf of the next probe and of the corrected state."""
    predictor, corrector = _column(row.predictor, x.ndim), _column(row.corrector, x.ndim)
    if chosen is not None:
        reduced = [axis + 1 for axis in grams.reduced_axes(x.shape, plan.channel_axis)]
        corrects, predicts = row.adaptive
        predictor = predictor + predicts * jnp.expand_dims(jnp.stack(chosen.predictor), reduced)
        corrector = corrector + corrects * jnp.expand_dims(jnp.stack(chosen.corrector), reduced)
    corrected = _combine(x.dtype, (None, *corrector[ages]), (x, *ring))
    if row.offset is not None:
        corrected = _combine(x.dtype, (None, None), (corrected, row.offset[0]))
    # The next probe straight from x, so that the corrected state is computed only where a trace asks for it.
    following = row.transition * corrector + predictor
    terms, arrays = (row.transition, *following[ages]), (x, *ring)
    if row.offset is not None:
        terms, arrays = (*terms, row.transition, None), (*arrays, *row.offset)
    if draw is not None:
        noise = jax.random.normal(draw, x.shape, at_least_float32(x.dtype))
        terms, arrays = (*terms, row.noise), (*arrays, noise)
    return _combine(x.dtype, terms, arrays), corrected


def _combine(dtype: Any, coefficients: Sequence[Any], arrays: Sequence[jax.Array]) -> jax.Array:
    """The linear combination of arrays, None standing for a coefficient 1, computed in float32 at least."""
    wide = at_least_float32(dtype)
    terms = [
        a.astype(wide) if c is None else c.astype(wide) * a.astype(wide)
        for c, a in zip(coefficients, arrays, strict=True)
    ]
    return sum(terms[1:], start=terms[0]).astype(dtype)


def _column(coefficients: jax.Array, ndim: int) -> jax.Array:
    """(K + 1, ...) with axes of size 1 put in, so that it broadcasts against K + 1 states of `ndim` axes."""
    count, *per_coordinate = coefficients.shape
    return coefficients.reshape(count, *(1,) * (ndim - len(per_coordinate)), *per_coordinate)


def _over_samples(rule: Rule, ndim: int) -> Rule:
    """The rule vmapped over the axes of the Gram's entries: samples, and channels where they are separate."""
    for _ in range(ndim):
        rule = jax.vmap(rule, in_axes=(None, 0, 0))
    return rule
