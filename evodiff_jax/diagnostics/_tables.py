"""Diagnoses as rows, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from evodiff_jax.diagnostics._diagnose import QUANTITIES, Diagnosis
from evodiff_jax.diagnostics._geometry import calls_of_steps


class Row(NamedTuple):
    """A step of a solver.

    Attributes:
      solver: the solver's name.
      step: its number, from 1.
      t: the time at which it starts.
      log_snr: 2 lambda there.
      means: by name, the mean over samples and 1.96 standard errors of it, NaN where there is none.
      calls: by order of a method, the share of its calls that should be in this step.
    """

    solver: str
    step: int
    t: float
    log_snr: float
    means: dict[str, tuple[float, float]]
    calls: dict[int, float]


def rows_of(diagnoses: Mapping[str, Diagnosis]) -> list[Row]:
    """The steps of all solvers, with means over samples.

    Args:
      diagnoses: from `diagnose`.
    """
    rows = []
    for solver, found in diagnoses.items():
        shares = {order: calls_of_steps(density, found.lambda_) for order, density in found.density.items()}
        for i, (t, half) in enumerate(zip(found.times[:-1], found.lambda_[:-1], strict=True)):
            means = {name: mean_and_interval(values[i]) for name, values in found.values.items()}
            calls = {order: float(share[i]) for order, share in shares.items()}
            rows.append(Row(solver, i + 1, float(t), 2 * float(half), means, calls))
    return rows


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of (B,) and 1.96 of its standard errors, NaN where a value is or there is only one."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return (math.nan if np.isnan(values).any() else math.inf), math.nan
    error = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def names_of(diagnoses: Mapping[str, Diagnosis]) -> list[str]:
    """The quantities of all diagnoses, those of QUANTITIES first."""
    return list(dict.fromkeys([*QUANTITIES, *(name for found in diagnoses.values() for name in found.values)]))


def orders_of(diagnoses: Mapping[str, Diagnosis]) -> list[int]:
    """The orders of methods that all diagnoses have a density of calls for."""
    return sorted(set.intersection(*(set(found.density) for found in diagnoses.values())))


def csv_of(diagnoses: Mapping[str, Diagnosis]) -> str:
    """One line a solver and step: each quantity with its half interval, and the shares of calls by order.

    Args:
      diagnoses: from `diagnose`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = names_of(diagnoses)
    columns = [f"{name}{end}" for name in names for end in ("", "_interval")]
    orders = orders_of(diagnoses)
    columns += [f"calls_of_order_{order}" for order in orders]
    writer.writerow(["solver", "step", "t", "log_snr", *columns])
    for row in rows_of(diagnoses):
        values = [value for name in names for value in row.means.get(name, (math.nan, math.nan))]
        values += [row.calls[order] for order in orders]
        numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in (row.t, row.log_snr, *values)]
        writer.writerow([row.solver, row.step, *numbers])
    return text.getvalue()


def markdown_of(diagnoses: Mapping[str, Diagnosis]) -> str:
    """A table a solver, a line a step, and one of where calls help; +- is 1.96 standard errors over samples.

    Args:
      diagnoses: from `diagnose`.
    """
    lines = []
    for solver, found in diagnoses.items():
        known = [name for name, values in found.values.items() if not np.isnan(values).all()]
        names = [name for name in names_of(diagnoses) if name in known]
        lines += [f"## {solver}", "", "| " + " | ".join(["step", "t", "log-SNR", *map(_title, names)]) + " |"]
        lines.append("| " + " | ".join(["---:"] * (len(names) + 3)) + " |")
        for row in rows_of({solver: found}):
            cells = [str(row.step), f"{row.t:.4g}", f"{row.log_snr:.2f}", *(_cell(*row.means[name]) for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *_calls_table(diagnoses)])


def _calls_table(diagnoses: Mapping[str, Diagnosis]) -> list[str]:
    """The shares of calls, of the first solver, for they are the same for all."""
    orders = orders_of(diagnoses)
    if not orders:
        return []
    first = next(iter(diagnoses))
    rows = rows_of({first: diagnoses[first]})
    lines = ["## Where calls help", ""]
    lines += [
        "The share of a method's calls that should be in each of these steps, by its order, so that all of its steps "
        f"have the same error to leading order. Each step here has {1 / len(rows):.1%}.",
        "",
    ]
    lines.append("| step | t | log-SNR | " + " | ".join(f"order {order}" for order in orders) + " |")
    lines.append("| " + " | ".join(["---:"] * (len(orders) + 3)) + " |")
    for row in rows:
        cells = [str(row.step), f"{row.t:.4g}", f"{row.log_snr:.2f}", *(f"{row.calls[order]:.1%}" for order in orders)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _title(name: str) -> str:
    return name.replace("_", " ")


def _cell(mean: float, interval: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.3g}" if math.isnan(interval) else f"{mean:.3g} +- {interval:.1g}"
