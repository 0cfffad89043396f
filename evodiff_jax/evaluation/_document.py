"""A report with its plots, pictures and CSV file."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from evodiff_jax.evaluation._plots import picture, plot
from evodiff_jax.evaluation._report import SUBJECT, grids_of, report, write_csv
from evodiff_jax.evaluation._results import Ratio, Result, converged_distance, ratios
from evodiff_jax.evaluation._runs import FITTED, Problem
from evodiff_jax.files import write_atomically

_TEN = 10


def write_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    compared: Sequence[tuple[Problem, Sequence[Result]]],
    store: Path,
    assets: Path,
    pictured: Iterable[tuple[str, str, int]] | None = None,
) -> list[Path]:
    """Writes a report, and beside it what it shows.

    Args:
      path: of the Markdown document.
      title: its heading.
      facts: what to know about the machine, versions and settings, a line each.
      compared: problems with what `compare` yielded of them.
      store: where `compare` stored the samples.
      assets: the folder of plots, pictures and results.csv, that of the document or one in it.
      pictured: names of problems, grids and numbers of calls to show samples of, where they are images; by default
        every problem on every grid at the smallest number and at 10.

    Returns:
      What has been written.

    Raises:
      OSError: something cannot be written.
    """
    assets.mkdir(parents=True, exist_ok=True)
    results = [result for _, of_problem in compared for result in of_problem]
    solvers = {r.solver for r in results if r.grid != FITTED}
    peers = solvers - {SUBJECT}
    several_grids = len(grids_of(results)) > 1
    same: list[Ratio] = []
    best: list[Ratio] = []
    of_plans: dict[str, list[Ratio]] = {}
    images: dict[str, list[str]] = {}
    written = [path, assets / "results.csv"]
    for problem, of_problem in compared:
        same += ratios(problem, of_problem, store, SUBJECT, peers)
        if several_grids:
            best += ratios(problem, of_problem, store, SUBJECT, peers, best_grid=True)
        for name in dict.fromkeys(r.solver for r in of_problem if r.grid == FITTED):
            found = list(ratios(problem, of_problem, store, name, solvers, best_grid=True))
            if found:  # else no solver makes as many calls
                of_plans.setdefault(name, []).extend(found)
        made = list(_draw(problem, of_problem, store, assets, pictured))
        images[problem.name] = [name.relative_to(path.parent).as_posix() for name in made]
        written += made
    judged_by = {problem.name: problem.judged_by for problem, _ in compared}
    floors = {problem.name: converged_distance(problem, store) for problem, _ in compared}
    text = report(title, facts, results, same, best, judged_by, floors, images, of_plans)
    write_csv(written[1], results)
    write_atomically(path, lambda file: file.write(text.encode()))
    return written


def _draw(
    problem: Problem,
    results: Sequence[Result],
    store: Path,
    assets: Path,
    pictured: Iterable[tuple[str, str, int]] | None,
) -> Iterator[Path]:
    """Writes the plot of a problem and its pictures, and yields their paths."""
    if not results:
        return
    path = assets / f"{problem.name}.png"
    plot(path, results)
    yield path
    if pictured is None:
        counts = dict.fromkeys((min(r.calls for r in results if r.grid != FITTED), _TEN))
        pictured = [(problem.name, grid, count) for grid in grids_of(results) for count in counts]
    for name, grid, count in pictured:
        drawn = picture(problem, results, store, grid, count) if name == problem.name else None
        if drawn is not None:
            path = assets / f"{name}_{grid}_{count}_calls.png"
            write_atomically(path, lambda file, drawn=drawn: drawn.savefig(file, format="png"))
            yield path
