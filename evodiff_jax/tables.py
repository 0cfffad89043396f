"""A sampler is a table: its rows, applied one after the other by the kernel, are the run.

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
rule, evaluated per sample (and channel), and are added to the row's constant ones; a rule may keep numbers of its own
from row to row. Rows are scanned, so the network stands once in the compiled program whatever the table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.gram import Gram
from evodiff_jax.numerics import namespace
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
      rule: a pytree of arrays (R, ...) that the solver's rule reads, or None without one.
      offset: None, or what is added to the corrected state and to the next probe, each (R, ...).
      alpha: (R,), alpha at each call, 1 where it is zero, for a rule that reads `Gram.noise`; else None.
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
    alpha: Any = None


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


Rule = Callable[[Any, Gram, Any], tuple[Coefficients, Any]]


class Solver(NamedTuple):
    """A training-free solver.

    Attributes:
      name: how it is called in messages.
      table: table(schedule, times) -> Table, by the same code in NumPy for concrete times and in JAX for traced ones.
      rule: rule(row, gram, memory) -> (Coefficients, memory), for a row of `Table.rule` and the Gram of one sample (and
        channel), pure; None for a solver whose coefficients are the table's alone.
      channel_axis: the axis of the state over which inner products are separate, None for none.
      per_leaf: whether inner products are separate for the leaves of a state that is a pytree, or summed over them.
      memory: how many numbers the rule keeps from row to row, a vector that is zero in the first row.
    """

    name: str
    table: Callable[[NoiseSchedule, Any], Table]
    rule: Rule | None = None
    channel_axis: int | None = None
    per_leaf: bool = True
    memory: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A run laid out: a table, how many of its rows are to be applied, and the rule that completes it.

    A pytree, so that it can be an argument of a jitted function, be vmapped over, or be part of a loop's state.

    Attributes:
      table: the coefficients, with any number of spare rows at the end.
      calls: the number of rows that are applied, an integer scalar.
      end: the last time of the run, a scalar.
      denoises: whether the result is the data prediction there (denoise-to-zero), a boolean scalar.
      rule: the solver's rule, static.
      channel_axis: the solver's, static.
      per_leaf: the solver's, static.
      memory: the solver's, static.
    """

    table: Table
    calls: Any
    end: Any
    denoises: Any
    rule: Rule | None = dataclasses.field(default=None, metadata={"static": True})
    channel_axis: int | None = dataclasses.field(default=None, metadata={"static": True})
    per_leaf: bool = dataclasses.field(default=True, metadata={"static": True})
    memory: int = dataclasses.field(default=0, metadata={"static": True})


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
        alpha=add(table.alpha, 1.0),
    )


def pad(table: Table, rows: int) -> Table:
    """The table with its last row repeated: rows that are never applied, of values that are no trap for gradients."""

    def padded(column: Any) -> Any:
        return namespace(column).concatenate([column, *[column[-1:]] * (rows - column.shape[0])])

    return jax.tree.map(padded, table)
