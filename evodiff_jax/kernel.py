"""The one kernel: applies a row of a table (see `tables`) to a run, whose state is an array or a pytree of arrays."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.sums import reduced_axes, sums_over_samples
from evodiff_jax.tables import Choice, Rule, Table
from evodiff_jax.types import State, normal_like, zeros_like


class Carry(NamedTuple):
    """What a row hands to the next.

    Attributes:
      x: the probe.
      outputs: like x with leaves (K + 1, B, ...), the newest outputs as a ring, so that none is ever moved: row i
        writes slot i mod (K + 1). None where K = 0.
      memory: the rule's memory, one entry for each leaf of x, or one for all, with leaves (B, ...) or (B, C, ...);
        empty without a rule.
    """

    x: State
    outputs: Any
    memory: tuple[Any, ...]


class Done(NamedTuple):
    """What a row did.

    Attributes:
      time: the row's time.
      corrected: the corrected state there.
      trace: the rule's trace, with leaves (B, ...) or (B, C, ...); for a state of several leaves with choices of their
        own a pytree like it of such traces. Empty without a rule.
    """

    time: jax.Array
    corrected: State
    trace: Any


def start(x: State, table: Table, rule: Rule | None) -> Carry:
    """The carry before the first row, of types that derive from x: its sharding and its varying mesh axes.

    Args:
      x: the initial state.
      table: the run's table, in the scalar dtype of the state.
      rule: the solver's rule.
    """
    slots = table.predictor.shape[1]
    zeros = zeros_like(x)
    outputs = None if slots == 1 else jax.tree.map(lambda a: jnp.broadcast_to(a[None], (slots, *a.shape)), zeros)
    if rule is None:
        return Carry(x, outputs, ())
    first = rule.init(jax.tree.map(lambda column: column[0], table.data))
    leaves = jax.tree.leaves(x)
    memory = [
        jax.tree.map(functools.partial(_for_each, leaf, rule, table.time.dtype), first)
        for leaf in (leaves if rule.per_leaf else leaves[:1])
    ]
    return Carry(x, outputs, tuple(memory))


def advance(
    rule: Rule | None, carry: Carry, row: Table, index: Any, active: Any, m: State, keys: jax.Array | None
) -> tuple[Carry, Done]:
    """Applies one row: corrects the state at the row's time with the new output, then predicts the next probe.

    Args:
      rule: the solver's rule, or None.
      carry: from `start` or the row before.
      row: one row of the table, in the state's scalar dtype.
      index: the number of the row.
      active: False where the row is padding (of plans that are vmapped over together): the state then stays as it is.
      m: the data prediction at (carry.x, row.time), of the state's structure, shapes and dtypes.
      keys: the random key of this row, one or one a sample, or None for deterministic solvers.
    """
    xs, structure = jax.tree.flatten(carry.x)
    ys = jax.tree.leaves(m)
    if row.history is not None:
        ys = [_combine(x, row.history[0], [(row.history[1], y)]) for x, y in zip(xs, ys, strict=True)]
    slots = row.predictor.shape[0]
    # ages[s] is the age of the output in slot s once the new one, of age 0, is written. It is its own inverse.
    ages = (index - jnp.arange(slots)) % slots
    if carry.outputs is None:
        rings = [y[None] for y in ys]
    else:
        written = zip(jax.tree.leaves(carry.outputs), ys, strict=True)
        rings = [jax.lax.dynamic_update_index_in_dim(ring, y, index % slots, 0) for ring, y in written]
    draws = [None] * len(xs) if row.noise is None or keys is None else jax.tree.leaves(normal_like(keys, carry.x))
    choices, memory = _choose(rule, carry, row, xs, ys, rings, ages)
    stepped = [
        _step(rule, row, active, x, ring, ages, chosen, draw)
        for x, ring, chosen, draw in zip(xs, rings, choices, draws, strict=True)
    ]
    following, corrected = (jax.tree.unflatten(structure, leaves) for leaves in zip(*stepped, strict=True))
    outputs = None if carry.outputs is None else jax.tree.unflatten(structure, rings)
    traces = [chosen.trace for chosen in choices if chosen is not None]
    trace = () if not traces else jax.tree.unflatten(structure, traces) if rule and rule.per_leaf else traces[0]
    return Carry(following, outputs, memory), Done(row.time, corrected, trace)


def skipped(rule: Rule | None, carry: Carry, row: Table, done: Done) -> Done:
    """Zeros like `done`, the shapes of what a row does, that have the types of what it does."""
    if rule is None:
        return Done(jnp.zeros_like(row.time), zeros_like(carry.x), ())
    leaves, structure = jax.tree.flatten(carry.x)

    def of_leaf(x: jax.Array, trace: Any) -> Any:
        count = x.ndim - len(reduced_axes(x.shape, rule.channel_axis))
        return jax.tree.map(lambda s: _for_each(x, rule, s.dtype, np.zeros(s.shape[count:], s.dtype)), trace)

    if rule.per_leaf:
        traces = structure.flatten_up_to(done.trace)
        trace = jax.tree.unflatten(structure, [of_leaf(x, t) for x, t in zip(leaves, traces, strict=True)])
    else:
        trace = of_leaf(leaves[0], done.trace)
    return Done(jnp.zeros_like(row.time), zeros_like(carry.x), trace)


def _choose(
    rule: Rule | None, carry: Carry, row: Table, xs: list[Any], ys: list[Any], rings: list[Any], ages: jax.Array
) -> tuple[Sequence[Choice | None], tuple[Any, ...]]:
    """A choice for each leaf, with leaves (B, ...) or (B, C, ...), and the rule's new memory."""
    if rule is None:
        return [None] * len(xs), ()
    sums: list[Any] = []
    for x, y, ring in zip(xs, ys, rings, strict=True):
        wide = at_least_float32(x.dtype)

        def output(j: int, y: Any = y, ring: Any = ring, wide: Any = wide) -> jax.Array:
            found = y if j == 0 else jax.lax.dynamic_index_in_dim(ring, ages[j], keepdims=False)
            return found.astype(wide)

        terms = rule.terms(_cast(row.data, wide), x.astype(wide), output)
        sums.append(sums_over_samples(terms, rule.channel_axis))
    if not rule.per_leaf:  # the leaves are parts of one vector
        dtype = row.time.dtype
        sums = [tuple(sum(part.astype(dtype) for part in parts) for parts in zip(*sums, strict=True))]
    # Rematerialised, or the many small residuals of a rule are kept row by row for its gradient.
    choose = jax.checkpoint(rule.choose, prevent_cse=False)
    found: list[Any] = []
    for of_leaf, memory in zip(sums, carry.memory, strict=True):
        ruled = jax.vmap(choose, in_axes=(None, 0, 0))
        if of_leaf[0].ndim == 2:
            # Over channels outside: a vmap over samples inside another loses their sharding on explicit meshes.
            ruled = jax.vmap(ruled, in_axes=(None, 1, 1), out_axes=1)
        found.append(ruled(_cast(row.data, of_leaf[0].dtype), of_leaf, memory))
    choices = [_checked(choice, row.predictor.shape[0]) for choice, _ in found]
    memory = tuple(
        jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)
        for (_, new), old in zip(found, carry.memory, strict=True)
    )
    return choices if rule.per_leaf else choices * len(xs), memory


def _checked(choice: Any, slots: int) -> Choice:
    """The choice of a rule for a whole batch, if it has a coefficient for each output."""
    if not isinstance(choice, Choice):
        raise TypeError(f"a rule must return (Choice, memory), it returned {type(choice).__name__} for the choice")
    for name in ("predictor", "corrector"):
        coefficients = getattr(choice, name)
        width = coefficients.shape[-1] if hasattr(coefficients, "shape") and coefficients.ndim else None
        if width != slots:
            got = f"shape ({width},)" if hasattr(coefficients, "shape") else type(coefficients).__name__
            raise ValueError(
                f"a rule must choose an array of {slots} {name} coefficients, one for each output that the table "
                f"remembers and for the new one, it chose {got}"
            )
    return choice


def _step(
    rule: Rule | None, row: Table, active: Any, x: Any, ring: Any, ages: Any, chosen: Choice | None, draw: Any
) -> tuple[jax.Array, jax.Array]:
    """One leaf of the next probe and of the corrected state."""
    predictor, corrector = _column(row.predictor, x.ndim), _column(row.corrector, x.ndim)
    if rule is not None and chosen is not None:
        predictor, corrector = (c.reshape(-1, *(1,) * x.ndim) if c.ndim == 1 else c for c in (predictor, corrector))
        expand = functools.partial(_expand, reduced=reduced_axes(x.shape, rule.channel_axis))
        for_predictor, for_corrector = expand(chosen.predictor), expand(chosen.corrector)
        predictor = predictor + (for_predictor if row.predicts is None else row.predicts * for_predictor)
        corrector = corrector + (for_corrector if row.corrects is None else row.corrects * for_corrector)
    before, after = (None, None) if row.offset is None else (_column(o[None], x.ndim)[0] for o in row.offset)
    transition = _column(row.transition[None], x.ndim)[0]
    # The next probe straight from x, so that the corrected state is computed only where a trace asks for it.
    following = transition * corrector + predictor
    added = [] if draw is None else [(row.noise, draw)]
    if row.offset is not None:
        added += [(transition, before), (None, after)]
    new = _combine(x, transition, added, following[ages], ring)
    corrected = _combine(x, None, [] if row.offset is None else [(None, before)], corrector[ages], ring)
    if active is True:
        return new, corrected
    return jnp.where(active, new, x), jnp.where(active, corrected, jnp.zeros((), x.dtype))


def _combine(x: jax.Array, of_x: Any, added: Sequence[tuple[Any, Any]], of_ring: Any = None, ring: Any = None) -> Any:
    """of_x x + sum_k of_ring_k ring_k + the other products, None standing for a coefficient 1, in float32 at least.

    The ring is read through one `lax.split`. Its transpose is one concatenation; that of indexing K + 1 times adds up
    K + 1 padded arrays, and XLA's CPU code for a sum over the leading axis is a hundred times slower.
    """
    wide = at_least_float32(x.dtype)
    terms = [(of_x, x), *added]
    if ring is not None:
        parts = jax.lax.split(ring, (1,) * ring.shape[0])
        terms += [(of_ring[k], part[0]) for k, part in enumerate(parts)]
    products = [a.astype(wide) if c is None else c.astype(wide) * a.astype(wide) for c, a in terms]
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _column(coefficients: jax.Array, ndim: int) -> jax.Array:
    """(K + 1,) as it is, or (K + 1, ...) for each coordinate, broadcast against K + 1 states of `ndim` axes."""
    count, *per_coordinate = coefficients.shape
    if not per_coordinate:
        return coefficients
    return coefficients.reshape(count, *(1,) * (ndim - len(per_coordinate)), *per_coordinate)


def _expand(chosen: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """(B, K + 1) or (B, C, K + 1) as (K + 1, B, 1, ..., 1) or (K + 1, B, 1, ..., C, ..., 1)."""
    return jnp.expand_dims(jnp.moveaxis(chosen, -1, 0), [axis + 1 for axis in reduced])


def _for_each(x: jax.Array, rule: Rule, wide: Any, value: Any) -> jax.Array:
    """The value for each sample (and channel) of x, with the type of sums over x."""
    zeros = jnp.sum(zeros_like(x), reduced_axes(x.shape, rule.channel_axis))
    value = jnp.asarray(value)
    dtype = wide if jnp.issubdtype(value.dtype, jnp.floating) else value.dtype
    spread = zeros.astype(dtype).reshape(*zeros.shape, *(1,) * value.ndim)
    return spread + value.astype(dtype).reshape(*(1,) * zeros.ndim, *value.shape)


def _cast(data: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda column: column.astype(dtype), data)
