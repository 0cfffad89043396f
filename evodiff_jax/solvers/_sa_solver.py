"""SA-Solver: Adams methods in lambda for the reverse SDE with a chosen amount of noise."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from evodiff_jax import quadrature
from evodiff_jax.numerics import factory, namespace, on_host
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver, Table


@factory
def sa_solver(
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[Any], Any] = 1.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    variant: str = "more_steps",
) -> Solver:
    """SA-Solver: stochastic Adams-Bashforth predictor and Adams-Moulton corrector for the data prediction.

    The corrector uses the predictor's own noise, so it is a change of the state by outputs alone and fits the table.
    The last step, at whose end no call is made, is not corrected.

    Args:
      predictor_order: the number of outputs that predict, 1 to 4.
      corrector_order: the number of outputs that correct, the one at the step's end among them, 1 to 4; 0 for none.
      tau: the noise relative to that of the reverse SDE: 0 for the ODE, 1 for the SDE; or a function of time,
        elementwise, taken at each step's end (the paper has noise at intermediate levels only).
      lower_order_final: step i of N is predicted with N + 1 - i outputs at most and corrected with one more.
      euler_at_final: the last step alone is of first order.
      variant: the weights where two outputs predict or correct, by the names of the public release's two modes:
        "more_steps", the paper's, or "few_steps", which take h^2 / 2 for the integral of e^(-(1 + tau^2) (lambda_1 -
        lambda)) (lambda - lambda_0) over the step, h = lambda_1 - lambda_0. The two differ by O(h^3) a step.

    Returns:
      The solver, which needs a key unless tau is the number 0. NFE: N for N steps.

    Raises:
      ValueError: for other orders or another variant, or a negative tau.

    References:
      Xue, Yi, Luo, Zhang, Sun, Li, Ma, "SA-Solver", arXiv 2309.05019, algorithm 1, Eqs. 14 and 17.
    """
    quadrature.check_order("sa_solver's predictor", predictor_order, 4)
    if corrector_order != 0:
        quadrature.check_order("sa_solver's corrector", corrector_order, 4)
    quadrature.check_choice("sa_solver", "variant", variant, ("more_steps", "few_steps"))
    if not callable(tau) and not tau >= 0:
        raise ValueError(f"sa_solver needs tau >= 0 or a function of time, got {tau}")
    table = functools.partial(
        _table,
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        tau=tau,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        variant=variant,
    )
    return Solver("sa_solver", table)


def _table(
    schedule: NoiseSchedule,
    times: Any,
    predictor_order: int,
    corrector_order: int,
    tau: float | Callable[[Any], Any],
    lower_order_final: bool,
    euler_at_final: bool,
    variant: str,
) -> Table:
    levels = schedule.levels(times)
    steps = quadrature.data_steps(*quadrature.ends(levels), _amounts(tau, times[1:]))
    moments = quadrature.exponential_moments(steps.exponent, 4)
    of_two = [moments[0], 0.5 / quadrature.phi(1, steps.exponent)] if variant == "few_steps" else moments
    past = quadrature.past_nodes(quadrature.finite(levels.lambda_), max(predictor_order, corrector_order - 1))
    orders = quadrature.multistep_orders(times, predictor_order, lower_order_final, euler_at_final, levels.sigma[-1])
    predictors = [quadrature.weights(past[:k], of_two if k == 2 else moments) for k in range(1, predictor_order + 1)]
    memory = max(predictor_order, corrector_order - 1)
    predictor = quadrature.by_order(orders, predictors, memory)
    if corrector_order == 0:
        return quadrature.multistep_table(times, steps, predictor)
    # The first step has two outputs to correct with.
    count = times.shape[0] - 1
    points = np.minimum(corrector_order, np.arange(count) + 2)
    if lower_order_final:
        points = np.minimum(points, count + 1 - np.arange(count))
    correctors = [
        quadrature.weights([1.0, *past[: k - 1]], of_two if k == 2 else moments) for k in range(1, corrector_order + 1)
    ]
    return quadrature.multistep_table(times, steps, predictor, quadrature.by_order(points, correctors, memory + 1))


def _amounts(tau: float | Callable[[Any], Any], times: Any) -> Any:
    """The values of tau at the given times, or None for the ODE."""
    if callable(tau):
        return on_host(tau, times) if namespace(times) is np else tau(times)
    return namespace(times).full_like(times, tau) if tau else None
