"""Tables of FIDs, as text, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from evodiff_jax.evaluation._fid import Fid
from evodiff_jax.evaluation._runs import FITTED
from evodiff_jax.files import write_atomically


def fid_table(results: Sequence[Fid]) -> list[list[str]]:
    """Rows of cells, the header first: solvers, or solvers and grids where there are several, and plans, by calls."""
    calls = sorted({r.calls for r in results})
    several = len({r.grid for r in results} - {FITTED}) > 1
    names = [f"{r.solver}, {r.grid}" if several and r.grid != FITTED else r.solver for r in results]
    cells = {(name, r.calls): _cell(r) for name, r in zip(names, results, strict=True)}
    rows = [[name, *(cells.get((name, count), "") for count in calls)] for name in dict.fromkeys(names)]
    return [["model calls", *map(str, calls)], *rows]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    )


def write_fid_report(folder: Path, results: Sequence[Fid], facts: Sequence[str], remarks: Sequence[str]) -> list[Path]:
    """Writes fid.md, the table with all facts, and fid.csv, one line a run.

    Args:
      folder: where; it is made where it is not there.
      results: of one model and reference.
      facts: what the figures depend on, a line each.
      remarks: what to know when reading them.

    Returns:
      What has been written.

    Raises:
      OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header, *rows = fid_table(results)
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
    parts = ["# FID", "\n".join(f"- {fact}" for fact in facts), table, *remarks]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["solver", "grid", "calls", "fid", "samples", "blown_up", "digest"])
    writer.writerows([*r[:3], f"{r.value:.8g}", *r[4:]] for r in results)
    written = {folder / "fid.md": "\n\n".join(parts) + "\n", folder / "fid.csv": text.getvalue()}
    for path, content in written.items():
        write_atomically(path, lambda file, content=content: file.write(content.encode()))
    return list(written)


def _cell(result: Fid) -> str:
    if not math.isfinite(result.value):
        return "not finite"
    return f"{result.value + 0.0:.3f}".replace("-0.000", "0.000")
