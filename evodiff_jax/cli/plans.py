"""Fitted plans that a command takes in the place of solvers, or beside them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evodiff_jax import fitting, interrupts
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import denoises_to_zero

if TYPE_CHECKING:
    from evodiff_jax.fitting import Figures, Fitted

SUFFIX = ".safetensors"


def read_plan(option: str, path: str, schedule: NoiseSchedule | None = None, digest: str | None = None) -> Fitted:
    """Loads a plan; a model's schedule and digest are compared with the plan's where they are given.

    Args:
      option: the command's option that names it.
      path: the name of a packaged plan, or the path of a file.
      schedule: the model's.
      digest: the model's.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no fitted plan, or one of another model.
    """
    try:
        return fitting.load(path, schedule, digest=digest)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"argument {option}: {error}") from error


def read_plans(option: str, paths: Sequence[str]) -> dict[str, Fitted]:
    """Loads plans that stand beside solvers, by name.

    Raises:
      OSError: a file cannot be read.
      ValueError: as `read_plan`, or two have the same name, or one has a solver's.
    """
    found = {}
    for path in paths:
        name = name_of(path)
        if name in found:
            raise ValueError(f"argument {option}: two plans have the name {name!r}: rename one")
        if name in FORMS:
            raise ValueError(f"argument {option}: the plan {name!r} has the name of a solver: rename it")
        found[name] = read_plan(option, path)
    return found


def check_plans(
    option: str,
    paths: Sequence[str],
    schedule: NoiseSchedule,
    digest: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Compares plans with a model, as `read_plan` does; `settings`, as `Guided` has them, with a warning.

    Raises:
      ValueError: a plan is of another model.
    """
    for path in paths:
        found = read_plan(option, path, schedule, digest)
        if settings is not None:
            warn_of_guidance(name_of(path), found, settings)


def facts_of(fitted: Mapping[str, Fitted]) -> list[str]:
    """What plans are, one a line."""
    return [f"`{name}`: {int(f.plan.calls)} model calls, {origin(f)}" for name, f in fitted.items()]


def name_of(path: str) -> str:
    """What a plan is called: its file's name without the suffix."""
    return Path(path).name.removesuffix(SUFFIX)


def origin(fitted: Fitted) -> str:
    """What the plan was fitted from, in words."""
    card = fitted.card
    grid = f" on the {card['grid']} grid" if "grid" in card else ""
    return f"fitted from {card.get('solver', 'an unknown solver')}{grid}"


def described(path: str) -> list[tuple[str, str]]:
    """What a plan is and how good, as names and words.

    Args:
      path: the name of a packaged plan, or the path of a file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no fitted plan, or a damaged one.
    """
    fitted = fitting.load(path)
    plan, report, card = fitted.plan, fitted.report, fitted.card
    last = ", the last one at the last noise level" if denoises_to_zero(plan) else ""
    levels = ", ".join(f"({t:.4g}, {alpha:.4g}, {sigma:.4g})" for t, alpha, sigma in plan.levels)
    told = ", ".join(f"{t:.4g}" for t in plan.table.time[: int(plan.calls)])
    training, validation, test = report.samples
    radius = f", noise within {card['radius']:g} of its size" if card.get("radius") else ""
    stopped = ", interrupted" if report.interrupted else ""
    made = f"{report.teacher_calls:,} model calls for the teacher's samples, " if report.teacher_calls else ""
    versions = [f"{name} {card[name]}" for name in ("evodiff_jax", "jax") if name in card]

    def change(start: Figures, end: Figures) -> str:
        return f"median error {start.median:.3g} -> {end.median:.3g}, RMS {start.rms:.3g} -> {end.rms:.3g}"

    return [
        ("calls", f"{int(plan.calls)} model calls a sample{last}"),
        ("start", origin(fitted).removeprefix("fitted from ")),
        ("times", f"the model is told {told}; to {float(plan.end):.4g}"),
        ("schedule", f"(t, alpha, sigma) is {levels or 'unknown'}"),
        ("model", f"{card.get('model', 'unknown')}, SHA-256 {card.get('digest') or 'unknown'}"),
        *([("guidance", f"{card['guidance']:g}{_classifier(card)}")] if "guidance" in card else []),
        ("teacher", f"{card.get('teacher_calls', 'unknown')} model calls"),
        ("loss", f"{card.get('loss', 'unknown')}{radius}"),
        ("seed", f"{card['seed']}" if "seed" in card else f"unknown; random key {card.get('key', 'unknown')}"),
        ("versions", ", ".join(versions) or "unknown"),
        ("fit", f"{report.steps} steps on {training} samples, the best after {report.best_step}{stopped}"),
        ("spent", f"{made}{report.forward_calls:,} in the fit and {report.gradient_calls:,} with gradients"),
        ("time", f"{report.seconds:.0f} s"),
        ("choice", f"{change(report.validation_start, report.validation_fitted)}, of {validation} samples"),
        ("test", f"{change(report.start, report.fitted)}, of {test} samples with no part in the fit"),
    ]


def _classifier(card: Mapping[str, Any]) -> str:
    return f", of a classifier {card['classifier_scale']:g}" if "classifier_scale" in card else ""


def warn_of_guidance(name: str, fitted: Fitted, settings: Mapping[str, Any]) -> None:
    """Prints a line to stderr where a plan was fitted with other guidance than `settings`, as `Guided` has them."""
    card = fitted.card
    if "guidance" not in card:
        return
    differing = []
    if card["guidance"] != settings["guidance"]:
        differing.append(f"guidance {card['guidance']:g}, not {settings['guidance']:g}")
    then, now = ({key: of[key] for key in ("classifier", "classifier_scale") if key in of} for of in (card, settings))
    if then != now:
        scales = [of.get("classifier_scale", 0) for of in (then, now)]
        differing.append(
            f"classifier guidance {scales[0]:g}, not {scales[1]:g}" if scales[0] != scales[1] else "another classifier"
        )
    if differing:
        text = f"the plan {name} was fitted with {' and '.join(differing)}"
        print(f"{interrupts.COMMAND}: warning: {text}", file=sys.stderr)
