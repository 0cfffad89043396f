"""Types of arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

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


def guidance(text: str) -> float:
    """An argument's type: a scale of classifier-free guidance."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MAX_GUIDANCE:
        raise argparse.ArgumentTypeError(f"must be a number in 0 .. {_MAX_GUIDANCE:g}, got {text!r}")
    return value
