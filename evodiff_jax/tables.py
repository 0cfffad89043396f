"""A sampler is a table: its rows, applied one after the other by the kernel, are the run. This is the extension API.

A row is one model call. It finds the probe x, which is the prediction of the state at the row's time t, and the
outputs of earlier calls H_1, ..., H_K, newest first:

    m          = denoise(x, t)                                 the data prediction
    H_0        = m, or keep_x x + keep_m m                     the output that the solver remembers of this call
    corrected  = x + sum_j corrector_j H_j  (+ offset_0)       the state at t, improved by the new output
    x'         = transition corrected + sum_j predictor_j H_j  (+ offset_1)  (+ noise z)
                                                               the probe at the next row's time

         time  transition  predictor     corrector     history         noise   data, predicts, corrects
    row    t       c       d_0 ... d_K   b_0 ... b_K   keep_x, keep_m    nu     for the rule

No second state is carried. A corrector differs from the predictor before it only by outputs that are still remembered,
and so does a second stage that starts from its step's first state: both are written as changes of the probe.

A `Rule` adds coefficients that it chooses for each sample from a few sums over the sample. Rows are scanned, so the
network stands once in the compiled program whatever the table.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.core import Tracer

from evodiff_jax.numerics import is_integer, namespace
from evodiff_jax.schedules import NoiseSchedule, SomeLevels


class Table(NamedTuple):
    """The coefficients of a run of R model calls with K remembered outputs: a pytree whose leaves have R rows.

    Coefficients may have further axes that broadcast against one sample of the state, for solvers whose coefficients
    differ from coordinate to coordinate: transition (R, ...), predictor (R, K + 1, ...) and so on.

    Attributes:
      time: (R,), the time of each model call.
      transition: (R,), the coefficient of the corrected state in the next probe.
      predictor: (R, K + 1), the coefficients of H_0 ... H_K in the next probe. The width of this column is K + 1.
      corrector: (R, K + 1), the coefficients of H_0 ... H_K in the corrected state, as a change of the probe.
      history: None where H_0 is the data prediction, else (keep_x, keep_m), each (R,).
      noise: (R,), the standard deviation of the noise in the next probe, or None for a deterministic solver.
      offset: None, or what is added to the corrected state and to the next probe, each (R, ...).
      data: a pytree of arrays (R, ...) that the solver's rule reads.
      predicts: (R,), what the rule's predictor coefficients are multiplied with, None for 1.
      corrects: (R,), what the rule's corrector coefficients are multiplied with, None for 1.
    """

    time: Any
    transition: Any
    predictor: Any
    corrector: Any
    history: tuple[Any, Any] | None = None
    noise: Any = None
    offset: tuple[Any, Any] | None = None
    data: Any = ()
    predicts: Any = None
    corrects: Any = None


class Choice(NamedTuple):
    """The coefficients that a rule chooses for one sample (and channel).

    Attributes:
      predictor: (K + 1,), added to the row's.
      corrector: (K + 1,), added to the row's.
      trace: any pytree of arrays, which `sample_with_trace` returns.
    """

    predictor: Any
    corrector: Any
    trace: Any = ()


def _nothing(data: Any) -> tuple[()]:
    return ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """Coefficients chosen for each sample (and channel) from sums over the sample.

    Rules are compared by their functions. Use functions of a module, not new lambdas, so that plans of one solver run
    in one compiled program.

    Attributes:
      terms: terms(data, x, output) -> a tuple of arrays like x, whose sums over each sample the rule reads. `data` is
        the row's part of `Table.data`, x the probe, and output(j) is H_j, zero where there is none yet. All arrays are
        (B, ...) in float32 at least. The sums are made in one pass over what the terms read.
      choose: choose(data, sums, memory) -> (Choice, memory), for the sums and the memory of one sample (and channel).
        Pure; it is vmapped over samples (and channels).
      init: init(data) -> the memory of one sample before the first row, a pytree of arrays; `data` of the first row.
      channel_axis: an axis of the state over which sums and coefficients are separate, or None for one choice a
        sample. States of fewer than three axes have no channels.
      per_leaf: for states that are pytrees, whether each leaf has sums and coefficients of its own. If not, the sums
        run over all leaves, which takes channel_axis=None.

    Raises:
      TypeError: when channel_axis is neither an integer nor None, or per_leaf no boolean.
      ValueError: when per_leaf is False and channel_axis is not None.
    """

    terms: Callable[[Any, Any, Callable[[int], Any]], tuple[Any, ...]]
    choose: Callable[[Any, tuple[Any, ...], Any], tuple[Choice, Any]]
    init: Callable[[Any], Any] = _nothing
    channel_axis: int | None = None
    per_leaf: bool = True

    def __post_init__(self) -> None:
        if self.channel_axis is not None and not is_integer(self.channel_axis):
            raise TypeError(f"channel_axis must be an integer or None, got {self.channel_axis!r}")
        if not isinstance(self.per_leaf, bool | np.bool_):
            raise TypeError(f"per_leaf must be True or False, got {self.per_leaf!r}")
        if not self.per_leaf and self.channel_axis is not None:
            raise ValueError(
                "per_leaf=False sums over the whole sample and takes channel_axis=None, got "
                f"channel_axis={self.channel_axis}"
            )


class Solver(NamedTuple):
    """A training-free solver.

    Attributes:
      name: the solver's name in messages, tables and `citation`.
      table: table(schedule, times) -> Table, by the same code in NumPy for concrete times and in JAX for traced ones.
      rule: the rule that completes the table, or None where the table alone is the solver.
      keeps_constants: whether the table, without what a rule adds, gives a model that predicts a constant that constant
        back; `plan` then checks it.
    """

    name: str
    table: Callable[[NoiseSchedule, Any], Table]
    rule: Rule | None = None
    keeps_constants: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as data: a table, how many of its rows are applied, and the rule that completes it.

    A pytree: it can be an argument of a jitted function, vmapped over, differentiated, saved.

    Attributes:
      table: the coefficients, float64 NumPy arrays for concrete times, with any number of spare rows at the end.
      calls: the number of model calls, an int32 scalar; later rows are not applied.
      end: the time of the result, a scalar.
      rule: the solver's rule, static.
      levels: a few times of the schedule with alpha and sigma there, static: `sample` compares them with the denoiser's
        schedule where it knows that. Empty for a stack of plans of different schedules.
    """

    table: Table
    calls: Any
    end: Any
    rule: Rule | None = dataclasses.field(default=None, metadata={"static": True})
    levels: SomeLevels = dataclasses.field(default=(), metadata={"static": True})


def check_table(solver: Solver, table: Any, schedule: NoiseSchedule, end: Any) -> Table:
    """The table of a solver, if it is one, with ones for what `predicts` and `corrects` leave out beside a rule.

    Args:
      solver: the solver, for its name and what it promises.
      table: what its function returned.
      schedule: the schedule of the run.
      end: the last time of the run.

    Raises:
      TypeError: when it is no Table, or a column is no array of numbers.
      ValueError: when columns differ in their rows, predictor and corrector in their width, a number is not finite, or
        a constant model would not get its constant back although the solver says so. Traced numbers are not looked at.
    """
    name = f"the table of solver {solver.name!r}"
    if not isinstance(table, Table):
        raise TypeError(
            f"{name} must be a Table, got {type(table).__name__}: its function is to return tables.Table(...)"
        )
    rows = np.shape(table.time)[:1]
    if np.ndim(table.time) != 1 or rows == (0,):
        raise ValueError(f"{name} must have a time for each of its rows (R,), R >= 1, got shape {np.shape(table.time)}")
    for path, column in jax.tree_util.tree_leaves_with_path(table):
        where = f"{name}: column {jax.tree_util.keystr(path)[1:]}"
        if not hasattr(column, "dtype") or not np.issubdtype(column.dtype, np.number):
            raise TypeError(f"{where} must be an array of numbers, got {column!r}")
        if np.shape(column)[:1] != rows:
            raise ValueError(f"{where} must have {rows[0]} rows like time, got shape {np.shape(column)}")
        if not isinstance(column, Tracer) and not np.isfinite(column).all():
            raise ValueError(f"{where} must be finite, got {np.asarray(column)}")
    widths = np.shape(table.predictor)[1:2], np.shape(table.corrector)[1:2]
    if len(set(widths)) != 1 or widths[0] in ((), (0,)):
        raise ValueError(
            f"{name} must have predictor and corrector of one shape (R, K + 1), got {np.shape(table.predictor)} and "
            f"{np.shape(table.corrector)}"
        )
    concrete = not any(isinstance(column, Tracer) for column in jax.tree.leaves((table, end)))
    if concrete and solver.keeps_constants and np.ndim(table.predictor) == 2 and table.offset is None:
        _check_constants(name, table, schedule, end)
    if solver.rule is None:
        return table
    ones = namespace(table.time).ones_like(table.time)
    completed = {name: ones for name in ("predicts", "corrects") if getattr(table, name) is None}
    return table._replace(**completed)


def _check_constants(name: str, table: Table, schedule: NoiseSchedule, end: Any) -> None:
    """Runs the table on a model that predicts x_0 = 1 from a state without noise, which is alpha(t) all along."""
    expected = schedule.levels(np.append(table.time, end)).alpha
    keep_x, keep_m = (np.zeros(table.time.shape), np.ones(table.time.shape)) if table.history is None else table.history
    outputs = np.zeros(np.shape(table.predictor)[1])
    x = expected[0]
    for i in range(len(table.time)):
        outputs = np.append(keep_x[i] * x + keep_m[i], outputs[:-1])
        x = table.transition[i] * (x + table.corrector[i] @ outputs) + table.predictor[i] @ outputs
        if not abs(x - expected[i + 1]) <= 1e-5 * max(1.0, expected[i + 1]):
            raise ValueError(
                f"{name}: row {i} takes a model that predicts the constant 1 to {x:.6g} at the next time, where alpha "
                f"is {expected[i + 1]:.6g}: its coefficients are inconsistent (or say keeps_constants=False)"
            )


def denoises_to_zero(plan: Plan) -> Any:
    """Whether the plan's last row is that of `append_denoising`; traced where the plan is."""
    last = plan.calls - 1
    return (plan.table.time[last] == plan.end) & (plan.table.transition[last] == 0).all()


def append_denoising(table: Table, t: Any) -> Table:
    """Adds the row that replaces the final state by its data prediction at time `t`, in which a rule has no part."""
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
        offset=None if table.offset is None else (add(table.offset[0], 0.0), add(table.offset[1], 0.0)),
        data=jax.tree.map(lambda column: add(column, column[-1]), table.data),
        predicts=add(table.predicts, 0.0),
        corrects=add(table.corrects, 0.0),
    )


def pad(table: Table, rows: int) -> Table:
    """The table with its last row repeated: rows that are never applied, of values that are no trap for gradients."""

    def padded(column: Any) -> Any:
        return namespace(column).concatenate([column, *[column[-1:]] * (rows - column.shape[0])])

    return jax.tree.map(padded, table)


def stack(plans: Sequence[Plan]) -> Plan:
    """Plans stacked on a new leading axis, for `jax.vmap` over `sample`.

    Their tables are padded to the same number of calls, and those without a rule to the same memory. A vmapped run
    takes as many calls as the longest of them.

    Args:
      plans: from `plan`; all of one rule, or all without one.

    Returns:
      A plan whose arrays have a leading axis of len(plans).

    Raises:
      ValueError: when there are none, their rules differ, or a solver has coefficients for each coordinate.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> times = ed.grids.log_snr(schedule, 8)
      >>> solvers = (ed.solvers.ddim(), ed.solvers.dpm_solver_pp(2), ed.solvers.unipc(2))
      >>> stacked = ed.stack([ed.plan(schedule, times, solver) for solver in solvers])
      >>> x_T = schedule.noise(jax.random.key(0), (4, 8))
      >>> denoise = lambda x, t: x / (1 + t**2)
      >>> x = jax.jit(jax.vmap(lambda plan: ed.sample(denoise, x_T, plan)))(stacked)
      >>> x.shape
      (3, 4, 8)
    """
    if not isinstance(plans, Sequence) or not plans or any(not isinstance(p, Plan) for p in plans):
        raise ValueError(f"stack needs at least one plan, from evodiff_jax.plan, got {plans!r}")
    if any(p.rule != plans[0].rule for p in plans):
        raise ValueError("stack needs plans of one rule, or plans whose solvers have none: sample the others apart")
    if any(np.ndim(p.table.predictor) != 2 for p in plans):
        raise ValueError(
            "stack needs plans with scalar coefficients, one for all coordinates, that are not stacked yet"
        )
    slots = max(p.table.predictor.shape[1] for p in plans)
    if plans[0].rule is not None and any(p.table.predictor.shape[1] != slots for p in plans):
        raise ValueError("stack needs plans that remember the same number of outputs where their solver has a rule")
    rows = max(p.table.time.shape[0] for p in plans)
    uniform = [(pad(_with_all_columns(p.table, slots, plans), rows), p.calls, p.end) for p in plans]
    table, calls, end = jax.tree.map(lambda *values: namespace(*values).stack(values), *uniform)
    levels = plans[0].levels if all(p.levels == plans[0].levels for p in plans) else ()
    return dataclasses.replace(plans[0], table=table, calls=calls, end=end, levels=levels)


def _with_all_columns(table: Table, slots: int, plans: Sequence[Plan]) -> Table:
    """The table with a memory of `slots` and the columns that any of the plans has."""
    xp = namespace(table.time)
    spare = [(0, 0), (0, slots - table.predictor.shape[1])]
    tables = [p.table for p in plans]
    zero, one = xp.zeros_like(table.time), xp.ones_like(table.time)

    def completed(column: Any, others: list[Any], neutral: Any) -> Any:
        return neutral if column is None and any(other is not None for other in others) else column

    return table._replace(
        predictor=xp.pad(table.predictor, spare),
        corrector=xp.pad(table.corrector, spare),
        history=completed(table.history, [t.history for t in tables], (zero, one)),
        noise=completed(table.noise, [t.noise for t in tables], zero),
    )


# `jax.export` of functions of a plan: a rule is written as the names of its functions, and read from modules that are
# imported already, so that an exported file can't run code of its own choice.


def _described(rule: Rule | None) -> list[Any] | None:
    """A rule as JSON."""

    def name(fn: Any) -> list[str]:
        found = [getattr(fn, "__module__", ""), getattr(fn, "__qualname__", "<locals>")]
        if "<locals>" in found[1] or "<lambda>" in found[1]:
            raise ValueError(f"jax.export can write rules of functions at the top of a module only, got {fn!r}")
        return found

    if rule is None:
        return None
    return [[name(fn) for fn in (rule.terms, rule.choose, rule.init)], rule.channel_axis, rule.per_leaf]


def _aux_from_bytes(content: bytes) -> tuple[Rule | None, SomeLevels]:
    described, found_levels = json.loads(content)
    levels = tuple((t, alpha, sigma) for t, alpha, sigma in found_levels)
    if described is None:
        return None, levels
    names, channel_axis, per_leaf = described
    for module, _ in names:
        if module not in sys.modules:
            raise ValueError(f"this file needs a rule of the module {module}: import it first")
    terms, choose, init = (getattr(sys.modules[module], name) for module, name in names)
    return Rule(terms, choose, init, channel_axis, per_leaf), levels


def exportable(*types: Any) -> None:
    """Tells `jax.export` how to write NamedTuples, for instance those of a rule's data."""
    for t in types:
        export.register_namedtuple_serialization(t, serialized_name=f"{t.__module__}.{t.__qualname__}")


exportable(Table, Choice)
export.register_pytree_node_serialization(
    Plan,
    serialized_name="evodiff_jax.Plan",
    serialize_auxdata=lambda aux: json.dumps([_described(aux[0]), aux[1]]).encode(),
    deserialize_auxdata=_aux_from_bytes,
)
