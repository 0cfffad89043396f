"""Observed orders of convergence, on models whose exact solution is known."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.grids import log_snr
from evodiff_jax.numerics import enable_x64
from evodiff_jax.sampling import plan as make_plan
from evodiff_jax.sampling import sample
from evodiff_jax.schedules import NoiseSchedule, edm
from evodiff_jax.tables import Plan, Solver
from evodiff_jax.testing import _runs
from evodiff_jax.testing._models import bimodal

# At both ends of this range of noise levels the data prediction hardly changes, so that the first steps, which have few
# outputs, and the last ones, whose order is lowered, do not hide a solver's order.
_LEAST, _MOST = 1e-3, 1e3
_CALLS = (320, 640, 1280)  # errors of order 4 are still above round-off
_SHAPE = (8, 8)
_CENTER, _STD = 1.0, 0.8
_MEAN, _DEVIATIONS = 0.7, np.array([0.2, 0.5, 1.0])  # of the normal data of stochastic solvers


class Order(NamedTuple):
    """An observed order.

    Attributes:
      order: minus the slope of log error over log steps, by least squares.
      calls: the numbers of model calls.
      errors: the errors there: the root mean square difference from the exact solution of the probability-flow ODE, or
        for a stochastic solver the largest relative error of a variance.
    """

    order: float
    calls: tuple[int, ...]
    errors: tuple[float, ...]


def observed_order(solver: Solver, schedule: NoiseSchedule | None) -> Order:
    """That of a solver without noise, on the model `bimodal`."""
    schedule = edm(_LEAST, _MOST) if schedule is None else schedule
    with enable_x64():
        plans = _plans(solver, schedule, pad=True)
        coordinates = np.shape(plans[0].table.predictor)[2:]
        x_T = _runs.noise(_SHAPE if not coordinates else (8, *coordinates), _sigma(schedule), jnp.float64)
        exact = bimodal(schedule, _CENTER, _STD).solve(x_T, schedule.t_max, schedule.t_min)
        samples = [np.asarray(_program(schedule)(x_T, _runs.shared(plan, noise=False))) for plan in plans]
    errors = [float(np.sqrt(np.mean((x - exact) ** 2))) for x in samples]
    return _fitted([int(plan.calls) for plan in plans], errors)


@functools.lru_cache(maxsize=8)
def _program(schedule: NoiseSchedule) -> Any:
    """The run on a schedule's model, compiled once for all solvers without a rule."""
    denoise = bimodal(schedule, _CENTER, _STD).denoise
    return jax.jit(lambda x_T, plan: sample(denoise, x_T, plan, key=jax.random.key(0)))


def observed_order_of_variance(solver: Solver, schedule: NoiseSchedule | None) -> Order:
    """That of a solver with noise and without a rule: of the variance of its samples of normal data."""
    schedule = edm(_LEAST, _MOST) if schedule is None else schedule
    alpha, sigma, _ = schedule.levels(schedule.t_min)
    exact = np.hypot(alpha * _DEVIATIONS, sigma) ** 2
    plans = _plans(solver, schedule, pad=False)
    errors = []
    for plan in plans:
        mean, std = moments(plan, schedule, np.full_like(_DEVIATIONS, _MEAN), _DEVIATIONS)
        if not np.allclose(mean, alpha * _MEAN, rtol=1e-8, atol=1e-8):
            raise ValueError(
                f"solver {solver.name!r} takes normal data of mean {_MEAN} to samples of mean {mean / alpha}: a state "
                "at the mean must stay there"
            )
        errors.append(float(np.max(np.abs(std**2 / exact - 1))))
    return _fitted([int(plan.calls) for plan in plans], errors)


def moments(plan: Plan, schedule: NoiseSchedule, mean: Any, std: Any) -> tuple[np.ndarray, np.ndarray]:
    """The exact mean and standard deviation of what a plan makes of noisy normal data.

    A row of a table is affine in the state and in the remembered outputs, and so is the data prediction of normal data:
    the moments follow row by row, without samples.

    Args:
      plan: from `plan`, of a solver without a rule and with scalar coefficients.
      schedule: its noise schedule.
      mean: (D,), the means of independent normal coordinates of the data.
      std: (D,), their standard deviations.

    Returns:
      The means (D,) and the standard deviations (D,) of the samples, for a run that starts from alpha x_0 + sigma eps
      at the plan's first time.

    Raises:
      ValueError: when the plan has a rule, offsets, or coefficients for each coordinate.

    Examples:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> plan = ed.plan(schedule, ed.grids.log_snr(schedule, 100), ed.solvers.sde_dpm_solver_pp(2))
      >>> mean, std = moments(plan, schedule, [1.0], [0.5])
      >>> float(mean[0].round(2)), float(std[0].round(2))
      (1.0, 0.5)
    """
    table = plan.table
    if plan.rule is not None or table.offset is not None or np.ndim(table.predictor) != 2:
        raise ValueError("moments needs a plan without a rule, without offsets and with scalar coefficients")
    mean, std = (np.asarray(value, np.float64) for value in (mean, std))
    rows, slots = table.predictor.shape
    keep_x, keep_m = (np.zeros(rows), np.ones(rows)) if table.history is None else table.history
    alpha, sigma, _ = schedule.levels(table.time)
    size = slots  # the state and the outputs H_1 ... H_K before it, as one vector for each coordinate
    center, covariance = np.zeros((len(mean), size)), np.zeros((len(mean), size, size))
    center[:, 0] = alpha[0] * mean
    covariance[:, 0, 0] = (alpha[0] * std) ** 2 + sigma[0] ** 2
    for i in range(int(plan.calls)):
        gain = alpha[i] * std**2 / ((alpha[i] * std) ** 2 + sigma[i] ** 2)
        outputs = np.tile(np.eye(slots), (len(mean), 1, 1))  # H_0 ... H_K of the state and H_1 ... H_K
        outputs[:, 0, 0] = keep_x[i] + keep_m[i] * gain
        constant = keep_m[i] * (1 - gain * alpha[i]) * mean
        of_outputs = table.transition[i] * table.corrector[i] + table.predictor[i]
        of_state = of_outputs @ outputs
        of_state[:, 0] += table.transition[i]
        step = np.concatenate([of_state[:, None], outputs[:, :-1]], axis=1)
        center = np.einsum("dij,dj->di", step, center)
        center[:, 0] += of_outputs[0] * constant
        if slots > 1:
            center[:, 1] += constant
        covariance = step @ covariance @ step.transpose(0, 2, 1)
        if table.noise is not None:
            covariance[:, 0, 0] += table.noise[i] ** 2
    return center[:, 0], np.sqrt(covariance[:, 0, 0])


def _plans(solver: Solver, schedule: NoiseSchedule, pad: bool) -> list[Plan]:
    """Plans of about so many model calls, padded to one number of rows if asked for."""
    a_step = max(1, round(int(make_plan(schedule, log_snr(schedule, 8), solver).calls) / 8))
    rows = _CALLS[-1] + 8 if pad else None
    return [make_plan(schedule, log_snr(schedule, calls // a_step), solver, max_calls=rows) for calls in _CALLS]


def _sigma(schedule: NoiseSchedule) -> float:
    return float(schedule.levels(schedule.t_max).sigma)


def _fitted(calls: Sequence[int], errors: Sequence[float]) -> Order:
    positive = np.maximum(errors, 1e-300)
    slope = np.polyfit(np.log(calls), np.log(positive), 1)[0] if np.isfinite(errors).all() else np.nan
    return Order(float(-slope), tuple(calls), tuple(errors))
