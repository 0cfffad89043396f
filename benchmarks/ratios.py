"""Prints a solver's figures over another's, geometric means by model, from results.csv of one report or of two.

    python benchmarks/ratios.py variance_optimal unipc-2
    git show 747e0cd:benchmarks/results/results.csv > old.csv
    python benchmarks/ratios.py variance_optimal evodiff --other-csv old.csv

Cells are pairs of a grid and a number of calls that both have.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

FIGURES = ("frechet", "median", "rms")
RESULTS = Path(__file__).parent / "results" / "results.csv"


def cells(path: Path, solver: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of a solver by model, grid and calls."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["solver"] == solver]
    return {(row["problem"], row["grid"], row["calls"]): row for row in rows}


def main() -> None:
    """Prints a row for each model, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solver")
    parser.add_argument("other")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--other-csv", type=Path, help="the other solver's (default: the same)")
    args = parser.parse_args()
    mine, theirs = cells(args.csv, args.solver), cells(args.other_csv or args.csv, args.other)
    logs: dict[str, list[list[float]]] = defaultdict(list)
    for cell in mine.keys() & theirs.keys():
        logs[cell[0]].append([math.log(float(mine[cell][name]) / float(theirs[cell][name])) for name in FIGURES])
    print("| model | cells | Frechet | median | RMS |\n|---|---:|---:|---:|---:|")
    means = {}
    for model in dict.fromkeys(cell[0] for cell in mine):
        if model in logs:
            means[model] = [sum(column) / len(column) for column in zip(*logs[model], strict=True)]
            print(f"| {model} | {len(logs[model])} | {' | '.join(f'{math.exp(mean):.3f}' for mean in means[model])} |")
    total = [math.exp(sum(column) / len(column)) for column in zip(*means.values(), strict=True)]
    print(f"| geometric mean | | {' | '.join(f'{mean:.3f}' for mean in total)} |")


if __name__ == "__main__":
    main()
