"""DPM-Solver-v3: an exponential integrator around the empirical statistics of the model.

In the notation of `evodiff_jax.statistics`, over the step from lambda_0 to lambda_1, with

    A(lambda) = exp of the integral of l,   E(lambda) = exp of the integral of s,   B(lambda) = integral of b / E,

each from lambda_0, and g = f / E - B, whose derivative is what l, s and b leave over,

    u_1 = (u_0 - integral A E (g + B) dlambda) / A(lambda_1),

where the solver replaces g by the polynomial through its values at the last calls. All of it is linear in the f of
those calls, with coefficients for each coordinate: a table.

Zheng, Lu, Chen, Zhu, arXiv 2310.13268, Eqs. 10 to 13 and algorithm 1.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from evodiff_jax import quadrature
from evodiff_jax.numerics import checked_arguments, namespace
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.statistics import Statistics
from evodiff_jax.tables import Solver, Table

_CELLS, _POINTS = 8, 6  # Gauss-Legendre in the cells of a step


class _Curves(NamedTuple):
    """The statistics as functions of lambda: (...) -> (..., *sample)."""

    l: Any  # noqa: E741
    b: Any
    integral_l: Any
    integral_s: Any


@checked_arguments
def dpm_solver_v3(
    statistics: Statistics,
    order: int = 3,
    corrector: bool = True,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """DPM-Solver-v3 with the statistics of your model, from `statistics.estimate` or `statistics.load`.

    The paper's "pseudo-order" predictor, a heuristic for fewer than 10 calls, is left out.

    Args:
      statistics: their levels must cover the run's (except for a last step to sigma = 0), their shape is that of one
        sample.
      order: 1, 2 or 3, of the predictor. The first steps have the order that the outputs so far allow.
      corrector: correct each step but the last once the model has been called at its end, which costs no call and
        makes it one order more exact.
      lower_order_final: the order of step i of N, corrector and all, is at most N + 1 - i.
      euler_at_final: the last step alone is of first order.

    Returns:
      The solver. NFE: N for N steps. Its times must be concrete.

    Raises:
      TypeError: when `statistics` is something else.
      ValueError: for another order or statistics of inconsistent shapes; and from its table, for traced times or ones
        that the statistics do not cover.

    References:
      arXiv 2310.13268, algorithms 1 and 2.
    """
    quadrature.check_order("dpm_solver_v3", order, 3)
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics must be Statistics, from statistics.estimate or .load, got {type(statistics).__name__}"
        )
    statistics = Statistics(*(np.asarray(a, np.float64) for a in statistics))
    shapes = {a.shape for a in statistics[1:]}
    levels = statistics.lambda_
    if levels.ndim != 1 or len(levels) < 2 or len(shapes) != 1 or shapes.pop()[:1] != levels.shape:
        raise ValueError("statistics must be lambda_ (M,), M >= 2, and l, s, b of one shape (M, ...)")
    if not (np.diff(levels) > 0).all():
        raise ValueError("the levels of the statistics, lambda_, must increase")
    table = functools.partial(
        _table,
        statistics=statistics,
        order=order,
        corrector=corrector,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )
    return Solver("dpm_solver_v3", table, keeps_constants=False)


def _table(
    schedule: NoiseSchedule,
    times: Any,
    statistics: Statistics,
    order: int,
    corrector: bool,
    lower_order_final: bool,
    euler_at_final: bool,
) -> Table:
    if namespace(times) is not np:
        raise ValueError("dpm_solver_v3 integrates its statistics on the host: its times must be concrete, not traced")
    alpha, _, lambda_ = schedule.levels(times)
    if alpha[0] == 0:
        raise ValueError("alpha is 0 at times[0]: dpm_solver_v3 cannot start there")
    orders = quadrature.multistep_orders(times, order, lower_order_final, euler_at_final, 1 / np.exp(lambda_[-1]))
    covered = lambda_[np.isfinite(lambda_)]
    lowest, highest = statistics.lambda_[0], statistics.lambda_[-1]
    slack = 1e-6 * (highest - lowest)
    if covered[0] < lowest - slack or covered[-1] > highest + slack:
        raise ValueError(
            f"the statistics cover lambda from {lowest} to {highest}, the run goes from {covered[0]} to {covered[-1]}"
        )
    curves = _curves(statistics)
    linear = curves.l(lambda_[:-1])
    memory = order + corrector
    rows = len(times) - 1
    shape = statistics.l.shape[1:]
    transition, to_next = np.zeros((rows, *shape)), np.zeros((rows, *shape))
    predictor, changes = np.zeros((2, rows, memory, *shape))
    to_corrected = np.zeros((rows, *shape))
    for i, points in enumerate(orders):
        if not np.isfinite(lambda_[i + 1]):  # the data prediction itself, m = (1 - l) u - f
            transition[i], predictor[i, 0] = alpha[i + 1] / alpha[i] * (1 - linear[i]), -alpha[i + 1]
            continue
        past = lambda_[i::-1][:points]
        growth, [(weights, constant), corrected] = _integrate(
            curves, lambda_[i], lambda_[i + 1], [past, np.append(lambda_[i + 1], past)]
        )
        scale = -alpha[i + 1] / growth
        transition[i] = alpha[i + 1] / alpha[i] / growth
        predictor[i, :points] = scale * weights
        to_next[i] = scale * constant
        if corrector and i + 1 < rows:
            weights, constant = corrected
            changes[i + 1, : points + 1] = scale * weights
            changes[i + 1, 1:] -= predictor[i, : memory - 1]
            to_corrected[i + 1] = scale * constant - to_next[i]
    return Table(
        time=times[:-1],
        transition=transition,
        predictor=predictor,
        corrector=changes,
        history=((1 - linear) / alpha[:-1].reshape(-1, *(1,) * len(shape)), -np.ones(rows)),
        offset=(to_corrected, to_next),
    )


def _curves(statistics: Statistics) -> _Curves:
    """Cubic splines: the solver's order is that of what they leave of f, which they must not make less smooth."""
    from scipy.interpolate import CubicSpline  # not loaded with the library

    l, s, b = (CubicSpline(statistics.lambda_, values) for values in statistics[1:])  # noqa: E741
    return _Curves(l, b, l.antiderivative(), s.antiderivative())


def _integrate(
    curves: _Curves, start: float, end: float, node_sets: list[np.ndarray]
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """One step's A(lambda_1), and for each set of nodes the integral of A E (g + B) as a function of the f there.

    Returns:
      A(lambda_1), and for each set the weights of f at its nodes and the constant.
    """
    points, gauss, cumulative = _collocation()
    width = (end - start) / _CELLS
    inside = start + width * (np.arange(_CELLS)[:, None] + points)
    growth = curves.integral_l(inside) - curves.integral_l(start)
    rate = curves.b(inside) * np.exp(curves.integral_s(start) - curves.integral_s(inside))
    # B at the points: whole cells before, and the collocation integral within the cell.
    in_cells = width * np.einsum("q,cq...->c...", gauss, rate)
    within = width * np.einsum("pq,cq...->cp...", cumulative, rate)
    constant = (np.cumsum(in_cells, axis=0) - in_cells)[:, None] + within
    density = np.exp(growth + curves.integral_s(inside) - curves.integral_s(start))

    def integral(values: np.ndarray) -> np.ndarray:
        return width * np.einsum("q,cq...->...", gauss, values)

    position = ((inside - start) / (end - start)).reshape(*inside.shape, *(1,) * (density.ndim - 2))
    moments = [integral(density * position**k) for k in range(max(map(len, node_sets)))]
    results = []
    for nodes in node_sets:
        weights = np.stack(quadrature.weights(list((nodes - start) / (end - start)), moments))
        constants = np.stack([_constant(curves, start, node) for node in nodes])
        shrink = np.exp(curves.integral_s(start) - curves.integral_s(nodes))
        results.append((weights * shrink, integral(density * constant) - np.sum(weights * constants, axis=0)))
    return np.exp(curves.integral_l(end) - curves.integral_l(start)), results


def _constant(curves: _Curves, start: float, node: float) -> np.ndarray:
    """B at a node before or after the start."""
    points, gauss, _ = _collocation()
    width = (node - start) / (2 * _CELLS)
    inside = start + width * (np.arange(2 * _CELLS)[:, None] + points)
    rate = curves.b(inside) * np.exp(curves.integral_s(start) - curves.integral_s(inside))
    return width * np.einsum("q,cq...->...", gauss, rate)


@functools.cache
def _collocation() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss-Legendre points and weights on [0, 1], and the integrals to each point of the interpolating polynomial."""
    points, gauss = np.polynomial.legendre.leggauss(_POINTS)
    points, gauss = (points + 1) / 2, gauss / 2
    powers = np.arange(_POINTS)
    integrals = points[:, None] ** (powers + 1) / (powers + 1)
    return points, gauss, integrals @ np.linalg.inv(points[:, None] ** powers)
