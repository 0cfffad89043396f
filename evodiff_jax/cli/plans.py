"""Fitted plans that a command takes in the place of solvers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evodiff_jax import fitting, interrupts
from evodiff_jax.schedules import NoiseSchedule

if TYPE_CHECKING:
    from evodiff_jax.fitting import Fitted

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


def name_of(path: str) -> str:
    """What a plan is called: its file's name without the suffix."""
    return Path(path).name.removesuffix(SUFFIX)


def origin(fitted: Fitted) -> str:
    """What the plan was fitted from, in words."""
    card = fitted.card
    grid = f" on the {card['grid']} grid" if "grid" in card else ""
    return f"fitted from {card.get('solver', 'an unknown solver')}{grid}"


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
