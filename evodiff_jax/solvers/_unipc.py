"""UniPC: exponential integrators in lambda whose corrector costs no model call."""

import functools
from typing import Any

from evodiff_jax import quadrature
from evodiff_jax.numerics import factory
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver, Table


@factory
def unipc(
    order: int = 2,
    variant: str = "bh2",
    prediction: str = "data",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """UniPC: predictor UniP and corrector UniC of the same order, which makes each step one order more exact.

    The predictor integrates the polynomial through the last `order` outputs, the corrector the one through these and
    the output at the step's end. The variants differ where one difference is weighted by 1/2: in the predictor of order
    2 and the corrector of order 1, to B(h) / 2 with B = h ("bh1") or e^h - 1 ("bh2") in place of the exact moment.
    As in the release, the last step, at whose end no call is made, is not corrected. The order of convergence is
    order + 1.

    Args:
      order: 1, 2 or 3, of the predictor. The first steps have the order that the outputs so far allow.
      variant: "bh1" or "bh2".
      prediction: "data", or "epsilon" to integrate the noise prediction.
      lower_order_final: the order of step i of N, corrector and all, is at most N + 1 - i.
      euler_at_final: the last step alone is of first order.

    Returns:
      The solver. NFE: N for N steps.

    Raises:
      ValueError: for another order, variant or prediction.

    References:
      Zhao, Bai, Rao, Zhou, Lu, "UniPC", arXiv 2302.04867, algorithms 1 and 2, Eq. 11 and appendix F.
    """
    quadrature.check_order("unipc", order, 3)
    quadrature.check_choice("unipc", "variant", variant, ("bh1", "bh2"))
    quadrature.check_choice("unipc", "prediction", prediction, ("data", "epsilon"))
    table = functools.partial(
        _table,
        order=order,
        variant=variant,
        prediction=prediction,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )
    return Solver("unipc", table)


def _table(
    schedule: NoiseSchedule,
    times: Any,
    order: int,
    variant: str,
    prediction: str,
    lower_order_final: bool,
    euler_at_final: bool,
) -> Table:
    levels = schedule.levels(times)
    make_steps = quadrature.data_steps if prediction == "data" else quadrature.noise_steps
    steps = make_steps(*quadrature.ends(levels))
    orders = quadrature.multistep_orders(times, order, lower_order_final, euler_at_final, levels.sigma[-1])
    exact = quadrature.exponential_moments(steps.exponent, 4)
    half = 0.5 / quadrature.phi(1, steps.exponent) if variant == "bh1" else 0.5
    past = quadrature.past_nodes(quadrature.finite(levels.lambda_), order)
    predictors, correctors = [], []
    for k in range(1, order + 1):
        predictors.append(quadrature.weights(past[:k], [1.0, half] if k == 2 else exact))
        correctors.append(quadrature.weights([1.0, *past[:k]], [1.0, half] if k == 1 else exact))
    return quadrature.multistep_table(
        times,
        steps,
        quadrature.by_order(orders, predictors, order),
        quadrature.by_order(orders, correctors, order + 1),
    )
