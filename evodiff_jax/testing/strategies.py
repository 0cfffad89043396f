"""Strategies for Hypothesis: schedules, times of runs, states and solvers.

    from hypothesis import given, strategies as st
    from evodiff_jax.testing import strategies

    @given(st.data())
    def test_mine(data):
        schedule = data.draw(strategies.schedules())
        times = data.draw(strategies.times(schedule))
        ...

Examples shrink towards the schedule `edm()`, one step from t_max to t_min, one small float32 array of zeros, and
`ddim()`. The module needs `evodiff-jax[testing]`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from evodiff_jax.extras import require

require("hypothesis", extra="testing")

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from evodiff_jax import schedules as factories
from evodiff_jax.numerics import on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Solver

_LEAST_STEP = 1e-3  # of the longest step of a run: the shortest one drawn
_DTYPES = ("float32", "bfloat16", "float16")
_MOST_AXES, _MOST_SIZE = 4, 4  # of states
_MOST = 4.0  # the largest number of a state


def schedules(*, whole: bool = False) -> st.SearchStrategy[NoiseSchedule]:
    """Noise schedules of every factory of `ed.schedules`, with drawn parameters.

    Args:
      whole: draw also schedules with alpha = 0 at t_max or sigma = 0 at t_min, where lambda is infinite: not every
        solver and grid takes them.

    Returns:
      The strategy.
    """
    low, high = (0.0, 1.0) if whole else (1e-4, 0.9999)
    starts, ends = st.floats(0.9, high), st.floats(low, 0.05)
    betas = {"beta_min": st.floats(0.01, 1.0), "beta_max": st.floats(1.0, 30.0)}
    inner_ends = st.floats(1e-4, 0.05)  # where beta is small sigma falls below float32's precision of alpha
    edm = st.builds(factories.edm, st.floats(0.0 if whole else 1e-3, 0.1), st.floats(1.0, 1000.0))
    ve = st.builds(factories.ve, st.floats(1e-3, 0.1), st.floats(1.0, 1000.0))
    return st.one_of(
        st.just(factories.edm()),
        edm,
        ve,
        st.builds(factories.vp_linear, **betas, t_min=inner_ends, t_max=starts),
        st.builds(factories.sub_vp, **betas, t_min=inner_ends, t_max=starts),
        st.builds(factories.vp_cosine, st.floats(0.0, 0.05), ends, starts),
        st.builds(factories.flow, st.floats(0.2, 10.0), ends, starts),
        _discrete(whole),
        st.builds(_from_log_snr, st.floats(1.0, 12.0), st.floats(1.0, 12.0)),
    )


@st.composite
def times(
    draw: st.DrawFn, schedule: NoiseSchedule, *, min_steps: int = 1, max_steps: int = 12, part: bool = False
) -> np.ndarray:
    """Strictly decreasing times of a run, with even or uneven steps in time or in lambda.

    Args:
      draw: given by Hypothesis.
      schedule: the noise schedule.
      min_steps: the least number of steps.
      max_steps: the largest number of steps.
      part: draw also runs that begin below t_max and end above t_min.

    Returns:
      The strategy of float64 arrays (N + 1,).

    Raises:
      TypeError: when the schedule is something else.
    """
    expect_schedule(schedule)
    count = draw(st.integers(min_steps, max_steps))
    steps = np.array(draw(st.lists(st.floats(_LEAST_STEP, 1.0), min_size=count, max_size=count)))
    first, last = (draw(st.floats(0.6, 1.0)), draw(st.floats(0.0, 0.4))) if part else (1.0, 0.0)
    fractions = np.append(1.0, 1 - np.cumsum(steps) / steps.sum())  # from 1 down to 0
    span = schedule.t_max - schedule.t_min
    ends = schedule.t_min + span * np.array([first, last])
    lambdas = schedule.levels(ends).lambda_
    if np.isfinite(lambdas).all() and draw(st.booleans()):
        found = on_host(schedule.time, lambdas[1] + fractions * (lambdas[0] - lambdas[1]))
    else:
        found = ends[1] + fractions * (ends[0] - ends[1])
    found[0], found[-1] = ends
    return found if (np.diff(found) < 0).all() else np.linspace(ends[0], ends[1], count + 1)  # steps may vanish in time


@st.composite
def states(draw: st.DrawFn, *, dtypes: Sequence[Any] = _DTYPES, pytrees: bool = True, scale: float = 1.0) -> Any:
    """States (B, ...) of small shapes, and pytrees of such with one B and a dtype for each leaf.

    Args:
      draw: given by Hypothesis.
      dtypes: the floating-point dtypes to draw from.
      pytrees: draw also dictionaries of up to three leaves.
      scale: what numbers from -4 to 4 are multiplied with, for example `schedule.sigma(schedule.t_max)`.

    Returns:
      The strategy of states.
    """
    batch = draw(st.integers(1, 3))
    count = draw(st.integers(0, 3)) if pytrees else 0
    leaves = [_array(draw, batch, dtypes, scale) for _ in range(max(1, count))]
    return leaves[0] if count == 0 else dict(zip("abc", leaves, strict=False))


def solvers(*, stochastic: bool | None = None, rules: bool = True) -> st.SearchStrategy[Solver]:
    """Solvers of the registry `ed.solvers.FORMS`.

    Args:
      stochastic: those that add noise alone, or those that add none alone; None for both.
      rules: also those that choose coefficients for each sample, each of which compiles a program of its own.

    Returns:
      The strategy.
    """
    made = [form.make() for form in FORMS.values() if stochastic in (None, form.stochastic)]
    simplest = sorted(made, key=lambda solver: (solver.rule is not None, solver.name != "ddim"))
    return st.sampled_from([solver for solver in simplest if rules or solver.rule is None])


def _array(draw: st.DrawFn, batch: int, dtypes: Sequence[Any], scale: float) -> jax.Array:
    axes = draw(st.lists(st.integers(1, _MOST_SIZE), max_size=_MOST_AXES - 1))
    numbers = arrays.arrays(np.float32, (batch, *axes), elements=st.floats(-_MOST, _MOST, width=32))
    return jnp.asarray((scale * draw(numbers)).astype(jnp.dtype(draw(st.sampled_from(list(dtypes))))))


def _discrete(whole: bool) -> st.SearchStrategy[NoiseSchedule]:
    betas = st.sampled_from([factories.linear_betas, factories.scaled_linear_betas, factories.cosine_betas])
    timesteps = st.integers(1000, 1500)  # NumPy prints longer arrays in short
    return st.builds(_of_betas, betas, timesteps, st.sampled_from([0.0, -1.0] if whole else [0.0]))


def _of_betas(betas: Callable[[int], np.ndarray], num_timesteps: int, t_min: float) -> NoiseSchedule:
    return factories.discrete(betas(num_timesteps), t_min=t_min)


def _from_log_snr(start: float, end: float) -> NoiseSchedule:
    """The log-SNR falls linearly from `start` at t = 0 to -end at t = 1."""
    return factories.from_log_snr(functools.partial(_line, start, end), 0.0, 1.0)


def _line(start: float, end: float, t: Any) -> Any:
    return start - (start + end) * t
