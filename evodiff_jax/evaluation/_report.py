"""Results as CSV and as a Markdown document."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from evodiff_jax.evaluation._results import RANKED, Ratio, Result, best_grids
from evodiff_jax.evaluation._runs import FITTED
from evodiff_jax.evaluation.metrics import Estimate
from evodiff_jax.files import write_atomically

SUBJECT = "variance_optimal"
"""The solver that reports compare with the best of the others."""
FIGURES = {
    "frechet": "Frechet distance",
    "kernel": "Kernel distance",
    "median": "Median trajectory error",
    "worst_tenth": "90th percentile of the trajectory error",
    "rms": "Root mean square trajectory error",
}
_FEW = range(5, 9)

_READING = """\
Intervals are of 95 %, bootstrapped over samples, those of Frechet distances centered on the value, as resampling
raises these; kernel distances are unbiased and stand with their standard error. Frechet and kernel distances are in
the features stated for each model, and comparable within a model only; they are not FID. Trajectory errors are root
mean square differences from the converged samples of the same noise.

A ratio is a solver's figure over that of the best of its peers, which may be another one in every cell; the best of
many is favoured by chance, so 1 is harder to reach than against any one peer. Its interval is from the same rows of
both, with the peer held fixed. A win has an interval wholly below 1, a loss wholly above. With a sample that is not
finite both distances count as infinite."""

_STANDINGS = """\
Each solver's figure over the best of all others', over all models, grids and numbers of calls that it takes: the worst,
and the geometric mean. Solvers of two calls a step have no runs of odd numbers of calls."""


_OF_PLANS = """\
Each plan's figure over that of the best solver on its best grid, at the same number of calls. A plan was fitted to the
model, the solvers were not: plans have no part in the comparisons of solvers with each other."""


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """One line a run, each figure with the ends of its interval."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    figures = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    writer.writerow(["problem", "grid", "solver", "calls", *figures, "samples", "blown_up"])
    for r in results:
        values = (f"{value:.6g}" for name in FIGURES for value in getattr(r, name))
        writer.writerow([*r[:4], *values, r.samples, r.blown_up])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def report(
    title: str,
    facts: Sequence[str],
    results: Sequence[Result],
    same: Sequence[Ratio],
    best: Sequence[Ratio],
    judged_by: Mapping[str, str],
    floors: Mapping[str, Estimate],
    pictures: Mapping[str, Sequence[str]],
    plans: Mapping[str, Sequence[Ratio]] | None = None,
) -> str:
    """The whole document: what was run, how variance_optimal and all others stand, and every figure.

    Args:
      title: its heading.
      facts: what to know about the machine, versions and settings, a line each.
      results: of one or more problems.
      same: ratios of variance_optimal to the best peer on the same grid.
      best: the same with every solver on its best grid.
      judged_by: by problem, the features and data in words.
      floors: by problem, the Frechet distance of the converged samples.
      pictures: by problem, addresses of plots and pictures relative to the document.
      plans: by fitted plan, its ratios to the best solver on its best grid.

    Returns:
      Markdown.
    """
    models = [
        f"- {name}: {_samples(results, name):,} samples, judged by {words}; the converged samples have "
        f"a Frechet distance of {_cell(floors[name])}."
        for name, words in judged_by.items()
    ]
    parts = [f"# {title}", "\n".join([f"- {fact}" for fact in facts] + models), _READING]
    for heading, compared in (("on the same grid", same), ("every solver on its best grid", best)):
        if compared:
            parts += [f"## `{SUBJECT}` against the best peer, {heading}", _tally_table(compared)]
            if compared is same:
                parts.append(_below_floors(same, results, floors))
            parts += _ratio_tables(compared, one_grid=compared is best)
    if plans:
        parts += ["## Fitted plans against the best solver", _OF_PLANS, _table_of_plans(plans)]
    parts += ["## Every solver against the best of the others", _STANDINGS]
    parts += ["### On the same grid", _standing_table(results, best_grid=False)]
    if len(grids_of(results)) > 1:
        parts += ["### Every solver on its best grid", _standing_table(results, best_grid=True)]
    for name in judged_by:
        parts += _model_section(name, [r for r in results if r.problem == name], pictures.get(name, ()))
    return "\n\n".join(parts) + "\n"


def grids_of(results: Iterable[Result]) -> list[str]:
    """The grids of the solvers' results."""
    return list(dict.fromkeys(r.grid for r in results if r.grid != FITTED))


def standings(results: Iterable[Result], figure: str, best_grid: bool = False) -> dict[str, list[float]]:
    """By solver the ratios of its figure to the best of the others' for every run; fitted plans are left out."""
    results = [r for r in results if r.grid != FITTED]
    results = best_grids(results, figure) if best_grid else results
    cells: dict[tuple, dict[str, float]] = {}
    for r in results:
        key = r.problem, None if best_grid else r.grid, r.calls
        cells.setdefault(key, {})[r.solver] = getattr(r, figure).value
    found = {r.solver: [] for r in results}
    for cell in cells.values():
        for solver, value in cell.items():
            others = [v for name, v in cell.items() if name != solver]
            if others:
                found[solver].append(_ratio(value, min(others)))
    return found


def ranking(results: Sequence[Result], best_grid: bool = False) -> dict[str, dict[str, list[float]]]:
    """By solver and figure the ratios of `standings`, the solver with the smallest geometric mean of them all first."""
    ratios = {figure: standings(results, figure, best_grid) for figure in RANKED}
    of_solvers = {solver: {figure: ratios[figure][solver] for figure in RANKED} for solver in ratios[RANKED[0]]}
    mean = lambda solver: geometric_mean([value for values in of_solvers[solver].values() for value in values])
    return {solver: of_solvers[solver] for solver in sorted(of_solvers, key=mean)}


def _ratio(value: float, other: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return value / max(other, np.finfo(np.float64).tiny)


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers that are not negative, infinity among them."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan


def _standing_table(results: Sequence[Result], best_grid: bool) -> str:
    rows = []
    for solver, ratios in ranking(results, best_grid).items():
        row, mine = [f"`{solver}`"], [r for r in results if r.solver == solver]
        for values in ratios.values():
            row += [_number(max(values, default=math.nan)), _number(geometric_mean(values))]
        blown_up, samples = sum(r.blown_up for r in mine), sum(r.samples for r in mine)
        rows.append([*row, str(len(ratios["frechet"])), f"{blown_up:,} of {samples:,}"])
    header = ["solver"]
    for name in ("Frechet", "median", "RMS"):
        header += [f"worst {name} ratio", "geometric mean"]
    return _table([*header, "ratios", "blown up samples"], rows)


def _tally_table(compared: Sequence[Ratio]) -> str:
    rows = []
    for figure in RANKED:
        cells = [r for r in compared if r.figure == figure]
        if not cells:
            continue
        wins, losses = sum(r.ratio.high < 1 for r in cells), sum(r.ratio.low > 1 for r in cells)
        worst = max(cells, key=lambda r: r.ratio.value)
        where = f"{worst.problem}, {worst.calls} calls, {worst.grid}, against `{worst.peer}`"
        few = geometric_mean([r.ratio.value for r in cells if r.calls in _FEW])
        every = geometric_mean([r.ratio.value for r in cells])
        ties = len(cells) - wins - losses
        row = [FIGURES[figure], str(wins), str(losses), str(ties), f"{_number(worst.ratio.value)} ({where})"]
        rows.append([*row, _number(few), _number(every)])
    header = ["ratio of", "wins", "losses", "ties", "worst"]
    return _table([*header, "geometric mean, 5 to 8 calls", "all calls"], rows)


def _below_floors(same: Sequence[Ratio], results: Sequence[Result], floors: Mapping[str, Estimate]) -> str:
    distances = {r[:4]: r.frechet.value for r in results}
    compared = [r for r in same if r.figure == "frechet"]
    below = sum(distances[r.problem, r.peer_grid, r.peer, r.calls] < floors[r.problem].value for r in compared)
    return (
        f"In {below} of these {len(compared)} the best peer's Frechet distance is below that of the converged samples: "
        "there a ratio of 1 asks for more than the exact solution."
    )


def _ratio_tables(compared: Sequence[Ratio], one_grid: bool) -> list[str]:
    """A table a figure and grid, or a figure alone with the grids in its cells; wins are bold."""
    parts = []
    for figure in RANKED:
        of_figure = [r for r in compared if r.figure == figure]
        for grid in ("",) if one_grid else dict.fromkeys(r.grid for r in of_figure):
            chosen = [r for r in of_figure if grid in ("", r.grid)]
            cells = {(f"{r.problem}", r.calls): _ratio_cell(r, one_grid) for r in chosen}
            where = "every solver on its best grid" if one_grid else f"{grid} grid"
            title = f"### {FIGURES[figure]}, ratio, {where}"
            parts += [title, _grid("model", cells)]
    return parts


def _table_of_plans(plans: Mapping[str, Sequence[Ratio]]) -> str:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, compared in plans.items():
        for r in compared:
            cells = rows.setdefault((r.problem, f"`{name}`", str(r.calls)), {})
            cells[r.figure] = f"{_ratio_cell(r, False)}, {r.peer_grid}"
    header = ["model", "plan", "calls", *(FIGURES[figure] for figure in RANKED)]
    return _table(header, [[*row, *(cells[figure] for figure in RANKED)] for row, cells in rows.items()])


def _ratio_cell(r: Ratio, with_grids: bool) -> str:
    value = f"**{_number(r.ratio.value)}**" if r.ratio.high < 1 else _number(r.ratio.value)
    mine, peer = (f"{r.grid}: ", f", {r.peer_grid}") if with_grids else ("", "")
    return f"{mine}{value} ({_number(r.ratio.low)} .. {_number(r.ratio.high)}) `{r.peer}`{peer}"


def _model_section(name: str, results: Sequence[Result], pictures: Iterable[str]) -> list[str]:
    parts = [f"## {name}", *(f"![{Path(address).stem.replace('_', ' ')}]({address})" for address in pictures)]
    for figure, title in FIGURES.items():
        best = {(f"`{r.solver}`", r.calls): _best_cell(getattr(r, figure), r.grid) for r in best_grids(results, figure)}
        grids = dict.fromkeys(r.grid for r in results)
        tables = [("every solver on its best grid", best)] if len(grids) > 1 and figure in RANKED else []
        for grid in grids:
            rows = [r for r in results if r.grid == grid]
            cell = _kernel_cell if figure == "kernel" else _cell
            heading = "fitted plans" if grid == FITTED else f"{grid} grid"
            tables.append((heading, {(f"`{r.solver}`", r.calls): cell(getattr(r, figure)) for r in rows}))
        for heading, cells in tables:
            parts.append(f"<details><summary>{title}, {heading}</summary>\n\n{_grid('solver', cells)}\n\n</details>")
    return parts


def _cell(e: Estimate) -> str:
    return f"{_number(e.value)} ({_number(e.low)} .. {_number(e.high)})"


def _kernel_cell(e: Estimate) -> str:
    return f"{_number(e.value)} ± {_number((e.high - e.low) / 2 / 1.96)}" if math.isfinite(e.value) else "inf"


def _best_cell(e: Estimate, grid: str) -> str:
    return f"{_number(e.value)} {grid}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _samples(results: Iterable[Result], name: str) -> int:
    return next((r.samples for r in results if r.problem == name), 0)


def _grid(corner: str, cells: Mapping[tuple[str, int], str]) -> str:
    """A table of cells by row and number of calls."""
    calls = sorted({count for _, count in cells})
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(cells.get((name, count), "") for count in calls)] for name in names]
    return _table([corner, *(f"{count} calls" for count in calls)], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)
