"""Writes how good fitted plans are at few model calls, on the nine models of quality.py.

    uv run --group quality python benchmarks/fitting.py --store runs/quality --out benchmarks/FITTED.md

Figures are those of quality.py: Frechet distance, median and root mean square error of a model's samples from noise
that no fit has seen. A fitted plan stands beside "training-free", which has for each figure the least of all
deterministic solvers, each on the better of the grids log_snr and karras, so that no single solver need be as good; and
beside the converged samples, whose Frechet distance no small error can be expected to undercut. The solvers' samples
are made where the store, which quality.py shares, lacks them. Fitted plans are kept in its folder "fitted", and a run
that was stopped goes on.

Exact models are fitted with 2048 noises, 600 steps of 32 and a teacher of 100 steps; networks with 384 noises, 400
steps of 8 and a teacher of 40, for their evaluations take the time.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from quality import PROBLEMS, facts

import evodiff_jax as ed
from evodiff_jax import evaluation, fitting
from evodiff_jax.evaluation import Problem
from evodiff_jax.evaluation._results import converged_distance
from evodiff_jax.files import write_atomically
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import FORMS

FIGURES = ("frechet", "median", "rms")
START, GRID = "dpm_solver_pp-2", "karras"


class Settings(NamedTuple):
    """How a plan is fitted."""

    noises: int
    steps: int
    batch: int
    teacher_steps: int
    seed: int = 7


EXACT = Settings(2048, 600, 32, 100)
NETWORK = Settings(384, 400, 8, 40)


class Task(NamedTuple):
    """A model to fit plans to, with noise of its own and the converged samples of that."""

    problem: Problem
    settings: Settings
    noise: np.ndarray
    condition: Any
    target: Any
    store: Path


def settings_of(problem: Problem) -> Settings:
    """Networks are those that have classes or make images of 32 x 32."""
    return NETWORK if problem.noise.shape[1:-1] else EXACT


def task_of(name: str, store: Path) -> Task:
    """The task of a model; its converged samples are kept in the store."""
    samples, make = PROBLEMS[name]
    problem = make(samples, store)
    settings = settings_of(problem)
    deviation = float(problem.schedule.sigma(problem.schedule.t_max))
    shape = (settings.noises, *problem.noise.shape[1:])
    noise = np.float32(deviation) * np.random.default_rng(settings.seed).standard_normal(shape, np.float32)
    condition = None if problem.condition is None else np.resize(problem.condition, settings.noises)
    path = store / "fitted" / f"{name}-target-{settings.noises}-{settings.teacher_steps}-{settings.seed}.npy"
    task = Task(problem, settings, noise, condition, None, store)
    target = evaluation.stored(
        path, lambda: np.asarray(fitting.converge(x_T=noise, teacher=teacher(task), **call(task)))
    )
    return task._replace(target=target)


def call(task: Task) -> dict[str, Any]:
    """The model as `fit` and `converge` take it."""
    problem = task.problem
    if problem.condition is None:
        denoise = lambda params, x, t: problem.denoise(params, x, t, None)
    else:
        denoise = problem.denoise
    # None of parameters means that there is no such argument.
    params = {} if problem.params is None else problem.params
    return {"denoise": denoise, "params": params, "condition": task.condition}


def start_of(task: Task, calls: int, solver: str = START, grid: str = GRID) -> ed.Plan:
    """The plan that a fit starts from."""
    schedule = task.problem.schedule
    return ed.plan(schedule, GRIDS[grid](schedule, calls), FORMS[solver].make())


def teacher(task: Task, calls: int = 1) -> ed.Plan:
    """The plan of the converged samples."""
    return fitting.default_teacher(task.problem.schedule, start_of(task, calls), task.settings.teacher_steps)


def path_of(task: Task, calls: int, name: str = "", solver: str = START, grid: str = GRID) -> Path:
    """Where a fitted plan is kept."""
    label = "-".join(map(str, (task.problem.name, calls, solver, grid, *task.settings, *([name] if name else []))))
    return task.store / "fitted" / f"{label}.safetensors"


def fitted(task: Task, calls: int, name: str = "", solver: str = START, grid: str = GRID, **options: Any) -> Any:
    """The fitted plan of a number of calls, from the store where it is there; `name` tells other options apart."""
    settings = task.settings
    path = path_of(task, calls, name, solver, grid)
    if path.exists():
        return fitting.load(path, task.problem.schedule)
    given = {"steps": settings.steps, "batch": settings.batch, "key": jax.random.key(settings.seed), **options}
    result = fitting.fit(
        schedule=task.problem.schedule,
        plan=start_of(task, calls, solver, grid),
        x_T=task.noise,
        teacher=teacher(task, calls),
        target=task.target,
        progress=False,
        **call(task),
        **given,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fitting.save(path, result, model=task.problem.name, solver=solver, grid=grid)
    return result


def judge(problem: Problem, plan: ed.Plan, store: Path) -> tuple[float, ...]:
    """Frechet distance, median and root mean square error of a plan's samples from the problem's noise."""
    (result,) = evaluation.compare(problem, {}, (), store, {}, plans={"plan": plan})
    return tuple(float(getattr(result, name).value) for name in FIGURES)


def training_free(problem: Problem, calls: Sequence[int], store: Path) -> dict[int, tuple[float, ...]]:
    """For each number of calls the least of each figure."""
    grids = {name: GRIDS[name] for name in ("log_snr", "karras")}
    results = list(evaluation.compare(problem, grids, calls, store))
    least = lambda count, name: min(float(getattr(r, name).value) for r in results if r.calls == count)
    return {count: tuple(least(count, name) for name in FIGURES) for count in calls}


def mean_of(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(float(np.mean(np.log(ratios))))


def main() -> None:
    """Fits, judges and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--calls", nargs="+", type=int, default=[3, 4, 5, 6, 8, 10])
    parser.add_argument("--against", nargs="+", type=int, default=[5, 6, 8, 10], help="other calls of training-free")
    parser.add_argument("--store", type=Path, default=Path("runs/quality"), help="folder of samples and figures")
    parser.add_argument("--stored", action="store_true", help="leave out plans that are not in the store")
    parser.add_argument("--out", type=Path, help="Markdown file to write too")
    args = parser.parse_args()
    counts = sorted({*args.calls, *args.against})
    lines = ["# Fitted plans at few model calls", "", *(f"- {fact}" for fact in facts()), ""]
    lines += [
        f"The start is `{START}` on the grid {GRID}. Each cell has Frechet distance / median error / root mean square "
        "error. Seconds and model calls are of the fit without the converged samples, which all fits of a model share; "
        "a call with a gradient counts as three.",
        "",
        "| model | calls | start | training-free, the least of each | fitted | Frechet distance, converged | seconds "
        "| calls of the fit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    found: dict[tuple[str, int], tuple[float, ...]] = {}
    free: dict[str, dict[int, tuple[float, ...]]] = {}
    floor = {}
    cell = lambda figures: " / ".join(f"{value:.3g}" for value in figures)
    for name in args.models:
        task = task_of(name, args.store)
        problem = task.problem
        free[name] = training_free(problem, counts, args.store)
        floor[name] = float(converged_distance(problem, args.store).value)
        for calls in args.calls:
            if args.stored and not path_of(task, calls).exists():
                continue
            result = fitted(task, calls)
            found[name, calls] = judge(problem, result.plan, args.store)
            report = result.report
            line = (
                f"| {name} | {calls} | {cell(judge(problem, start_of(task, calls), args.store))} "
                f"| {cell(free[name][calls])} | {cell(found[name, calls])} | {floor[name]:.3g} | {report.seconds:.0f} "
                f"| {report.forward_calls + 3 * report.gradient_calls:,} |"
            )
            lines.append(line)
            print(line, flush=True)
    lines += [
        "",
        "Geometric means over the models of fitted over training-free, and the largest ratio of Frechet distances:",
        "",
        "| fitted calls | training-free calls | models | Frechet | converged samples' Frechet | median | RMS "
        "| worst Frechet |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for calls in args.calls:
        names = [name for name in args.models if (name, calls) in found]
        for other in [count for count in counts if count >= calls] if names else []:
            ratios = [[found[n, calls][k] / free[n][other][k] for n in names] for k in range(len(FIGURES))]
            best = mean_of([floor[name] / free[name][other][0] for name in names])
            means = [f"{mean_of(of_figure):.2f}" for of_figure in ratios]
            lines.append(
                f"| {calls} | {other} | {len(names)} | {means[0]} | {best:.2f} | {means[1]} | {means[2]} "
                f"| {max(ratios[0]):.2f} |"
            )
    text = "\n".join(lines) + "\n"
    print(text[text.index("\nGeometric") :])
    if args.out:
        write_atomically(args.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
