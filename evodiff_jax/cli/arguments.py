"""Types of arguments."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAX_GUIDANCE = 100.0


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: an integer in low .. high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer in {low} .. {high}, got {text!r}")
        return value

    return parse


def settings(text: str) -> dict[str, Any]:
    """An argument's type: settings as JSON, or the path of a file of such."""
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"must be JSON in braces or the path of a JSON file, cannot read {text!r}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, {text!r} is not: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return found


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which state dict of a file to take, and what network it belongs to."""
    add = parser.add_argument
    add(
        "--config",
        type=settings,
        metavar="JSON",
        help="the network's settings, for a file without them: JSON, or a file of it; see docs/checkpoints.md",
    )
    add("--entry", metavar="NAME", help="state dict to take of a training checkpoint with several, such as ema")


def guidance(text: str) -> float:
    """An argument's type: a scale of classifier-free guidance."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MAX_GUIDANCE:
        raise argparse.ArgumentTypeError(f"must be a number in 0 .. {_MAX_GUIDANCE:g}, got {text!r}")
    return value


def fraction(text: str) -> float:
    """An argument's type: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
    return value
