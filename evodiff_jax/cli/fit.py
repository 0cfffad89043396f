"""`evodiff-jax fit`: plans of few model calls, fitted to the packaged model, a public checkpoint or one of your own."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from evodiff_jax import __version__, interrupts
from evodiff_jax.cli.arguments import fraction, integer
from evodiff_jax.cli.models import Guided, add_model_arguments, load_guided
from evodiff_jax.cli.output import check_folder
from evodiff_jax.cli.plans import SUFFIX
from evodiff_jax.cli.sample import make_labels
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.sampling import plan
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Plan

if TYPE_CHECKING:
    from evodiff_jax.fitting import Fitted, Report

_CALLS = (5,)
_MAX_CALLS = 100
_MAX_TEACHER_STEPS = 1_000


class _Task(NamedTuple):
    """What all fits of a command share.

    Attributes:
      guided: the model.
      denoise: denoise(params, x, t, labels).
      starts: by number of model calls, the plan to begin with.
      teacher: the plan whose samples are aimed at.
      noise: x_T.
      labels: the classes.
      key: the random key of the fits.
    """

    guided: Guided
    denoise: Any
    starts: dict[int, Plan]
    teacher: Plan
    noise: jax.Array
    labels: np.ndarray
    key: jax.Array


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax fit`."""
    add = parser.add_argument
    add(
        "--calls",
        nargs="+",
        type=integer(1, _MAX_CALLS),
        default=_CALLS,
        help=f"model calls a sample, a plan for each (default: {' '.join(map(str, _CALLS))})",
    )
    add("--solver", choices=FORMS, default="dpm_solver_pp-2", metavar="SOLVER", help="start (default: %(default)s)")
    add("--grid", choices=GRIDS, default="karras", help="where the start's steps are (default: %(default)s)")
    add_model_arguments(parser, "all in turn")
    add("--noises", type=integer(8, 1_000_000), default=384, help="samples to fit and judge by (default: %(default)s)")
    add("--steps", type=integer(1, 1_000_000), default=400, help="steps of the optimizer (default: %(default)s)")
    add("--batch", type=integer(1, 50_000), default=8, help="samples a step (default: %(default)s)")
    add(
        "--teacher-steps",
        type=integer(1, _MAX_TEACHER_STEPS),
        default=100,
        help="steps of the samples that are aimed at (default: %(default)s)",
    )
    add("--radius", type=fraction, default=0.0, help="how far noise may move, see docs/fitting.md (default: 0)")
    add(
        "--out",
        type=Path,
        default=Path("evodiff_plans"),
        metavar="DIR",
        help="folder of the plans, and of the samples aimed at, which are made once (default: %(default)s)",
    )


def run_fit(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax fit`.

    Args:
      args: what `add_fit_arguments` parsed.

    Raises:
      ValueError: an argument is out of range or does not fit the model, a solver can't be a start, the model is
        unusable, or a batch does not fit in memory.
      OSError: the model cannot be read, or an output not be written.
      KeyboardInterrupt: Ctrl-C ended a fit, whose best plan is written.
    """
    calls = sorted(set(args.calls))
    check_folder("--out", args.out)
    if args.teacher_steps < calls[-1]:
        raise ValueError(f"argument --teacher-steps: must be at least the {calls[-1]} calls, got {args.teacher_steps}")
    require("tqdm", extra="models")
    require("optax", "safetensors", extra="fit")

    began = time.perf_counter()
    guided = load_guided(args)
    task = _task(args, guided, calls)
    reports: list[Report] = []
    written: list[Path] = []
    try:
        target, path, made = _target(args, task)
        model = guided.model
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        last = ", with --denoise-to-zero" if args.denoise_to_zero else ""
        _tell("model", f"{model.name}, {parameters:,} parameters, {guided.dtype}")
        _tell("start", f"{args.solver} on the {args.grid} grid{last}{guided.words}")
        _tell("samples", f"{args.noises} of {int(task.teacher.calls)} model calls, seed {args.seed}, {path}")
        for count, start in task.starts.items():
            fitted = _fit(args, task, count, start, target)
            reports.append(fitted.report)
            if not fitted.report.interrupted or fitted.report.best_step > 0:
                written.append(args.out / f"{_stem(args, guided)}-{count}{SUFFIX}")
                _save(args, task, written[-1], fitted)
            _tell(f"{count} calls", _words(fitted))
            if fitted.report.interrupted:
                break
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(f"a batch of {args.batch} does not fit in memory: use a smaller --batch") from error
        raise
    twice = "" if args.guidance in (0, 1) else ", two network evaluations each"
    device = jax.devices()[0]
    forward, backward = (sum(getattr(r, name) for r in reports) for name in ("forward_calls", "gradient_calls"))
    _tell("spent", f"{made:,} model calls for samples, {forward:,} in fits and {backward:,} with gradients{twice}")
    _tell("time", f"{time.perf_counter() - began:.1f} s")
    _tell("device", f"{device.platform}, {device.device_kind}")
    _tell("output", ", ".join(map(str, written)) or "none: no better plan than the start was found yet")
    if reports[-1].interrupted:
        raise KeyboardInterrupt


def _task(args: argparse.Namespace, guided: Guided, calls: list[int]) -> _Task:
    """Lays out the plans, which compiles nothing.

    Raises:
      ValueError: the solver has no such run, or can't be a start.
    """
    from evodiff_jax import evaluation, fitting

    model, solver, grid = guided.model, FORMS[args.solver].make(), GRIDS[args.grid]
    schedule = model.schedule
    try:
        fitting.start_of(plan(schedule, grid(schedule, 3), solver), schedule)
    except ValueError as error:
        raise ValueError(f"argument --solver: {args.solver} can't be a start: {error}") from error
    starts = {}
    for count in calls:
        found = evaluation.times_of(schedule, grid, solver, count, args.denoise_to_zero)
        if found is None:
            raise ValueError(f"argument --calls: {args.solver} has no run of {count} calls")
        starts[count] = plan(schedule, found, solver, denoise_to_zero=args.denoise_to_zero)

    def denoise(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return guided.make_denoiser(params, labels)(x, t)

    of_noise, of_fits = jax.random.split(jax.random.key(args.seed))
    return _Task(
        guided=guided,
        denoise=denoise,
        starts=starts,
        teacher=fitting.default_teacher(schedule, starts[calls[-1]], args.teacher_steps),
        noise=schedule.noise(of_noise, (args.noises, *model.image_shape)),
        labels=make_labels(args.noises, guided.num_classes, args.label),
        key=of_fits,
    )


def _target(args: argparse.Namespace, task: _Task) -> tuple[np.ndarray, Path, int]:
    """The teacher's samples, the file that they are stored in, and how many model calls were made for them."""
    from evodiff_jax import evaluation, fitting

    guided, calls = task.guided, []

    def make() -> np.ndarray:
        calls.append(int(task.teacher.calls) * args.noises)
        return fitting.converge(
            task.denoise,
            task.noise,
            task.teacher,
            params=guided.params,
            condition=task.labels,
            batch=8 * args.batch,  # without gradients there is memory for more than in the fit
        )

    settings = {
        "version": __version__,
        "jax": jax.__version__,
        "model": guided.model.digest,
        "config": [args.config, args.entry, args.classifier_config],
        **guided.settings,
        "dtype": task.guided.dtype,
        "teacher": evaluation.digest_of_plan(task.teacher),
        "noises": args.noises,
        "seed": args.seed,
        "class": None if args.label is None else int(task.labels[0]),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = args.out / f"target_{digest}.npy"
    try:
        found = evaluation.stored(path, make)
        if found.shape != task.noise.shape:
            raise ValueError(f"its shape is {found.shape}, not {task.noise.shape}")
    except (ValueError, EOFError) as error:
        if calls:
            raise
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
    return found, path, sum(calls)


def _fit(args: argparse.Namespace, task: _Task, count: int, start: Plan, target: np.ndarray) -> Fitted:
    """One fit; Ctrl-C ends it and keeps what it found."""
    from tqdm import tqdm

    from evodiff_jax import fitting

    # disable=None: no bar unless stderr is a terminal.
    bar = tqdm(total=args.steps, desc=f"{count} calls", unit="step", leave=False, disable=None)
    with bar, interrupts.raised() as check:

        def on_validation(step: int, value: float) -> None:
            bar.set_postfix(validation=f"{value:.4g}", refresh=False)
            bar.update(step - bar.n)
            check()

        return fitting.fit(
            task.denoise,
            task.guided.model.schedule,
            start,
            task.noise,
            key=jax.random.fold_in(task.key, count),
            params=task.guided.params,
            condition=task.labels,
            teacher=task.teacher,
            target=target,
            steps=args.steps,
            batch=args.batch,
            radius=args.radius,
            progress=on_validation,
        )


def _save(args: argparse.Namespace, task: _Task, path: Path, fitted: Fitted) -> None:
    from evodiff_jax import fitting

    guided = task.guided
    fitting.save(
        path,
        fitted,
        digest=guided.model.digest,
        model=guided.model.name,
        model_licence=guided.model.licence,
        **guided.settings,
        solver=args.solver,
        grid=args.grid,
        dtype=guided.dtype,
        denoise_to_zero=args.denoise_to_zero,
        label=None if args.label is None else int(task.labels[0]),
        seed=args.seed,
        evodiff_jax=__version__,
        jax=jax.__version__,
    )


def _stem(args: argparse.Namespace, guided: Guided) -> str:
    """The name of the plans' files before the number of calls."""
    marks = [guided.model.name.removesuffix(Path(args.checkpoint).suffix or SUFFIX)]
    if args.guidance != 1:
        marks.append(f"g{args.guidance:g}")
    if guided.classifier is not None:
        marks.append(f"c{args.classifier_scale:g}")
    return "-".join(marks)


def _words(fitted: Fitted) -> str:
    report = fitted.report
    before, after = report.start, report.fitted
    stopped = f", interrupted after {report.steps} steps" if report.interrupted else ""
    return (
        f"median error {before.median:.3g} -> {after.median:.3g}, RMS {before.rms:.3g} -> {after.rms:.3g}, of "
        f"{report.samples[2]} samples with no part in the fit{stopped}"
    )


def _tell(name: str, text: str) -> None:
    """Prints a line at once: a command of several fits takes long."""
    print(f"{name:<8} {text}", flush=True)
