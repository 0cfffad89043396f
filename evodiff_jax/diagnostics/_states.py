"""Numbers of states: mean squares, rows of coordinates, and checks of what diagnostics are given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.numerics import at_least_float32, concrete_array, is_integer
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule, expect_schedule, some_levels
from evodiff_jax.types import State, batch_size, check_function, check_state, widest


def dimension(x: State) -> int:
    """The number of coordinates D of one sample, over all leaves."""
    return sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(x))


def mean_square(x: State) -> jax.Array:
    """(B,), the mean over a sample's coordinates of their squares, in float32 at least."""
    leaves = jax.tree.leaves(x)
    wide = widest(leaves)
    sums = [jnp.sum(jnp.square(leaf.astype(wide)), range(1, leaf.ndim)) for leaf in leaves]
    return sum(sums[1:], sums[0]) / dimension(x)


def rms(x: State) -> jax.Array:
    """(B,), the root of `mean_square`."""
    return jnp.sqrt(mean_square(x))


def difference(x: State, y: State) -> State:
    """The difference x - y in float32 at least."""
    return jax.tree.map(lambda a, b: a.astype(at_least_float32(a.dtype)) - b.astype(at_least_float32(a.dtype)), x, y)


def rows_of(x: State) -> jax.Array:
    """(B, D), the coordinates of all leaves in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves(x)
    wide = widest(leaves)
    return jnp.concatenate([leaf.reshape(batch_size(x), -1).astype(wide) for leaf in leaves], axis=1)


def like(rows: jax.Array, x: State) -> State:
    """The state of the structure, shapes and dtypes of x whose `rows_of` are given."""
    leaves, structure = jax.tree.flatten(x)
    ends = np.cumsum([leaf.size // leaf.shape[0] for leaf in leaves])
    parts = jnp.split(rows, ends[:-1], axis=1)
    made = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def check_model(denoise: Any, schedule: Any, x: Any, name: str = "x") -> State:
    """The state, if the denoiser, the schedule and the state are such.

    Raises:
      TypeError: when denoise is no function, the schedule something else, or the state not of floating-point arrays.
      ValueError: when denoise was made for another schedule, or the state has no batch axis.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    expect_schedule(schedule)
    check_same_schedule(denoise, some_levels(schedule), "the schedule given")
    return check_state(x, name)


def check_time(schedule: NoiseSchedule, t: Any, name: str = "t") -> Any:
    """The time, float64 NumPy where it is concrete, which must then be a scalar within the schedule.

    Raises:
      TypeError: when it is no number.
      ValueError: when it is not a scalar, or outside the schedule.
    """
    if np.ndim(t) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(t)}: use jax.vmap over several times")
    if isinstance(t, Tracer):
        return t.astype(at_least_float32(t.dtype))
    concrete = concrete_array(name, t)
    slack = 1e-6 * (schedule.t_max - schedule.t_min)  # a float32 time of a float64 grid
    if not schedule.t_min - slack <= concrete <= schedule.t_max + slack:
        raise ValueError(
            f"{name} must be within the schedule's {schedule.t_min:g} to {schedule.t_max:g}, got {float(concrete):g}"
        )
    return concrete


def check_count(name: str, value: Any, least: int) -> int:
    """The value, if it is an integer of at least `least`; else raises ValueError."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
