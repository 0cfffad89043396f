"""What `fit` is given, checked before anything is compiled, and made whole."""

from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.fitting._offsets import Offsets, Start, start_of
from evodiff_jax.fitting._teacher import check_condition, check_finite, check_teacher, default_teacher
from evodiff_jax.numerics import concrete_array, is_integer
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule
from evodiff_jax.tables import Plan
from evodiff_jax.types import batch_size, check_function, check_like, check_state

_LEAST = 8  # samples


class Checked(NamedTuple):
    """What a fit works with.

    Attributes:
      start: the plan and its numbers.
      offsets: where the descent begins.
      teacher: the plan of the teacher.
      noise: x_T.
      parts: how much of it is for training, validation and test.
    """

    start: Start
    offsets: Offsets
    teacher: Plan
    noise: Any
    parts: tuple[int, int, int]


def checked(
    denoise: Any,
    schedule: NoiseSchedule,
    plan: Plan,
    x_T: Any,
    condition: Any,
    teacher: Plan | None,
    target: Any,
    offsets: Any,
    loss: Any,
    error: Any,
    steps: Any,
    batch: Any,
    validation: Any,
    test: Any,
    outputs: Any,
    radius: Any,
) -> Checked:
    """The arguments of `fit`, which documents them and what is raised."""
    check_function("denoise", denoise, "denoise(x, t) -> x_0, or denoise(params, x, t, condition)")
    start = start_of(plan, schedule, outputs=outputs)
    check_same_schedule(denoise, plan.levels, "the plan's")
    if loss not in ("mean", "mean_square"):
        raise ValueError(f'loss must be "mean" or "mean_square", got {loss!r}; give a function of samples as error')
    if error is not None:
        check_function("error", error, "error(x, target) -> (B,)")
    for name, value in (("steps", steps), ("batch", batch)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if isinstance(radius, bool) or not isinstance(radius, int | float) or not 0 <= radius < 1:
        raise ValueError(f"radius must be a number from 0 to below 1, a fraction of x_T's size, got {radius!r}")
    x_T = check_state(x_T, "x_T")
    parts = _parts(batch_size(x_T), validation, test)
    check_condition(condition, batch_size(x_T))
    if target is not None:
        check_like(target, x_T, "the teacher whose samples are given as target")
        check_finite(target)
    teacher = default_teacher(schedule, plan) if teacher is None else teacher
    check_teacher(teacher, plan, schedule)
    return Checked(start, _begin(offsets, start), teacher, x_T, parts)


def _parts(count: int, validation: float, test: float) -> tuple[int, int, int]:
    """How many samples are for training, validation and test."""
    if count < _LEAST:
        raise ValueError(f"x_T has {count} samples, a fit needs at least {_LEAST}, and some hundreds to be of use")
    validating, testing = (max(1, round(part * count)) for part in (validation, test))
    training = count - validating - testing
    if not (0 < validation < 1 and 0 < test < 1 and training > 0):
        raise ValueError(
            "validation and test must be fractions above 0 that leave samples for training, got "
            f"validation={validation}, test={test} of {count} samples"
        )
    return training, validating, testing


def _begin(offsets: Any, start: Start) -> Offsets:
    zeros = start.zeros()
    if offsets is None:
        return zeros
    if not isinstance(offsets, Offsets):
        raise TypeError(f"offsets must be Offsets, as a Fitted has them, got {type(offsets).__name__}")
    begin = Offsets(*(concrete_array(f"offsets.{name}", leaf) for name, leaf in offsets._asdict().items()))
    for name, leaf, zero in zip(Offsets._fields, begin, zeros, strict=True):
        if leaf.shape != zero.shape or not np.isfinite(leaf).all():
            raise ValueError(
                f"offsets.{name} must be finite and of shape {zero.shape}, as the plan's calls and outputs are, got "
                f"{leaf.shape}"
            )
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), begin)
