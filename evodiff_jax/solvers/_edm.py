"""Second-order single-step methods in kappa = sigma / alpha: Heun's, with or without churn, and the midpoint rule.

In kappa the probability-flow ODE is d(x / alpha) = eps dkappa, with eps the noise prediction.
"""

import functools
from typing import Any

import numpy as np

from evodiff_jax import quadrature
from evodiff_jax.numerics import factory, namespace
from evodiff_jax.quadrature import Stage
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver, Table


@factory
def heun(
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    lower_order_final: bool = False,
) -> Solver:
    """EDM's sampler: Heun's method (the trapezoidal rule), optionally with churn, which makes it stochastic.

    With churn, before each step from kappa the noise level is raised to kappa (1 + gamma), gamma = min(s_churn / N,
    sqrt(2) - 1) where s_tmin <= kappa <= s_tmax and else 0, by adding noise. Levels are limited to the first one of
    the run, above which a network need not be trained, so the first step has none: x_T is pure noise already.

    Args:
      s_churn: the amount of churn, 0 for the deterministic solver.
      s_tmin: the lowest kappa with churn.
      s_tmax: the highest kappa with churn.
      s_noise: the standard deviation of the added noise relative to what the level asks for.
      lower_order_final: the last step is Euler's. One to sigma = 0 is in any case; for traced times it takes its second
        call all the same, at the step's start, and makes nothing of it.

    Returns:
      The solver, which needs a key where s_churn > 0. NFE: 2 N for N steps, 2 N - 1 where the last is Euler's.

    Raises:
      ValueError: unless s_churn >= 0, s_noise >= 0 and 0 <= s_tmin <= s_tmax.

    References:
      Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
      2206.00364, algorithms 1 and 2.
    """
    if not (s_churn >= 0 and s_noise >= 0 and 0 <= s_tmin <= s_tmax):
        raise ValueError(
            "heun needs s_churn >= 0, s_noise >= 0 and 0 <= s_tmin <= s_tmax, got "
            f"s_churn={s_churn}, s_noise={s_noise}, s_tmin={s_tmin}, s_tmax={s_tmax}"
        )
    churn = functools.partial(_churned, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax) if s_churn > 0 else None
    return Solver("heun", functools.partial(_heun_table, churn=churn, s_noise=s_noise, euler=lower_order_final))


@factory
def dpm_2(lower_order_final: bool = False) -> Solver:
    """The midpoint rule in kappa with the midpoint taken in log kappa, known as DPM2.

    Args:
      lower_order_final: the last step is Euler's. One to sigma = 0 is in any case; for traced times it takes its second
        call all the same, within the step, and makes nothing of it.

    Returns:
      The solver. NFE: 2 N for N steps, 2 N - 1 where the last is Euler's.

    References:
      Karras et al., arXiv 2206.00364, appendix B.2, and Lu et al., arXiv 2206.00927, algorithm 1; the form is
      k-diffusion's.
    """
    return Solver("dpm_2", functools.partial(_dpm_2_table, euler=lower_order_final))


def _heun_table(schedule: NoiseSchedule, times: Any, churn: Any, s_noise: float, euler: bool) -> Table:
    levels = schedule.levels(times)
    begin = times[:-1] if churn is None else churn(schedule, times)
    start, end = schedule.levels(begin), quadrature.ends(levels)[1]
    steps = quadrature.noise_steps(start, end)
    half = steps.amplitude / 2
    eulers = [Stage(begin, steps.transition, (steps.amplitude,))]
    # Where sigma ends at 0 there is no noise to predict: a call there, which traced times keep, is made at the start.
    second = namespace(times).where(quadrature.bounded(levels.lambda_), times[1:], begin)
    heuns = [*eulers, Stage(second, steps.transition, (half, half))]
    orders = quadrature.singlestep_orders(times, 2, euler, False, levels.lambda_)
    table = quadrature.singlestep_table([eulers, heuns], orders, levels.lambda_, _history(schedule))
    if churn is None:
        return table
    # The last row of a step goes on to the raised level from which the next one starts.
    xp = namespace(times)
    before = quadrature.ends(levels)[0]
    kappa, raised = before.sigma / before.alpha, start.sigma / start.alpha
    gap = raised**2 - kappa**2
    noise = s_noise * start.alpha * xp.where(gap > 0, xp.sqrt(xp.where(gap > 0, gap, 1.0)), 0.0)
    step = np.repeat(np.arange(orders.size), orders)
    goes_on = np.append(step[1:] != step[:-1], False)
    following = np.minimum(step + 1, orders.size - 1)
    scale = xp.where(goes_on, (start.alpha / before.alpha)[following], 1.0)
    return table._replace(
        transition=table.transition * scale,
        predictor=table.predictor * scale[:, None],
        noise=xp.where(goes_on, noise[following], 0.0),
    )


def _dpm_2_table(schedule: NoiseSchedule, times: Any, euler: bool) -> Table:
    levels = schedule.levels(times)
    start, end = quadrature.ends(levels)
    middle = quadrature.times_within(schedule, times, levels.lambda_, 1 / 2)
    there, whole = quadrature.noise_steps(start, schedule.levels(middle)), quadrature.noise_steps(start, end)
    eulers = [Stage(times[:-1], whole.transition, (whole.amplitude,))]
    midpoint = [
        Stage(times[:-1], there.transition, (there.amplitude,)),
        Stage(middle, whole.transition, (0 * whole.amplitude, whole.amplitude)),
    ]
    orders = quadrature.singlestep_orders(times, 2, euler, False, levels.lambda_)
    return quadrature.singlestep_table([eulers, midpoint], orders, levels.lambda_, _history(schedule))


def _history(schedule: NoiseSchedule) -> Any:
    return lambda times: quadrature.noise_history(schedule.levels(times))


def _churned(schedule: NoiseSchedule, times: Any, s_churn: float, s_tmin: float, s_tmax: float) -> Any:
    """The times at which the steps start, at their raised noise levels."""
    xp = namespace(times)
    lambda_ = schedule.levels(times[:-1]).lambda_
    kappa = xp.exp(-lambda_)
    most = min(s_churn / (times.shape[0] - 1), 2**0.5 - 1)
    gamma = xp.where((kappa >= s_tmin) & (kappa <= s_tmax), most, 0.0)
    raised = xp.maximum(lambda_ - xp.log1p(gamma), lambda_[0])
    return xp.where(raised < lambda_, quadrature.time_at(schedule, raised), times[:-1])
