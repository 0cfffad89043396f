"""DPM-Solver and DPM-Solver++: exponential integrators in lambda of the noise and of the data prediction.

In the notation of `quadrature`, with phi functions of z = h for the noise and z = -h for the data prediction, the
multistep solvers extrapolate y by the polynomial y_0 + theta D_1 + theta^2 D_2 through the last outputs and integrate
it with the moments 1, phi_2 / phi_1, 2 phi_3 / phi_1; the single-step ones evaluate the model within the step. The
published second order takes 1/2 for phi_2 / phi_1: `variant` "midpoint"; "heun" takes phi_2 / phi_1.
"""

import functools
from typing import Any

from evodiff_jax import quadrature
from evodiff_jax.numerics import factory, namespace
from evodiff_jax.quadrature import Stage
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver, Table

_VARIANTS = ("midpoint", "heun")


@factory
def dpm_solver(
    order: int = 2,
    method: str = "multistep",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    exact_curvature: bool = False,
    variant: str = "midpoint",
) -> Solver:
    """DPM-Solver: the noise prediction integrated in lambda.

    Quirks of the public release that this reproduces: `dpm_solver_pp` lists them.

    Args:
      order: 1 (DDIM), 2 or 3.
      method: "multistep", or "singlestep" for DPM-Solver-2 (r_1 = 1/2) and DPM-Solver-3 (r_1 = 1/3, r_2 = 2/3).
      lower_order_final: as for `dpm_solver_pp`.
      euler_at_final: as for `dpm_solver_pp`.
      exact_curvature: as for `dpm_solver_pp`.
      variant: as for `dpm_solver_pp`.

    Returns:
      The solver. NFE: N for N steps; for "singlestep" each step's order summed.

    Raises:
      ValueError: for another order, method or variant.

    References:
      Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver", arXiv 2206.00927, algorithms 1 and 2; multistep as in the public code.
    """
    return _solver("dpm_solver", "epsilon", order, method, lower_order_final, euler_at_final, exact_curvature, variant)


@factory
def dpm_solver_pp(
    order: int = 2,
    method: str = "multistep",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    exact_curvature: bool = False,
    variant: str = "midpoint",
) -> Solver:
    """DPM-Solver++: the data prediction integrated in lambda; (2M) and (3M) in multistep form, 2S in single-step form.

    Two quirks of the public release. Its multistep third order leaves out a factor 2 of the second divided difference,
    so it converges with order 2; that is the DPM-Solver++(3M) of the literature and the default here, and
    exact_curvature=True restores order 3. And for discrete-time and VP models it lowers the order at the end only in
    runs of fewer than 10 steps: pass lower_order_final=False for longer ones to reproduce it.

    Args:
      order: 1 (DDIM), 2 or 3. A run's first steps have the order that the outputs so far allow.
      method: "multistep" or "singlestep".
      lower_order_final: the order of step i of N is at most N + 1 - i. A last step to sigma = 0 is of first order in
        any case; with traced times a "singlestep" one takes its later calls all the same and makes nothing of them.
      euler_at_final: the last step alone is of first order.
      exact_curvature: the multistep third order as its derivation has it.
      variant: the weight of the first difference in steps of second order, those of a run of third order too:
        "midpoint", 1/2, or "heun", phi_2 / phi_1, which integrates the line through two outputs exactly. In single-step
        form the last stage of order 3 then integrates the parabola through its three outputs. "midpoint" and "heun" are
        the words of diffusers and k-diffusion; the public release's are "dpmsolver" and "taylor".

    Returns:
      The solver. NFE: N for N steps; for "singlestep" each step's order summed.

    Raises:
      ValueError: for another order, method or variant.

    References:
      Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++", arXiv 2211.01095, algorithms 1 and 2; third order as in the public
      code.
    """
    return _solver("dpm_solver_pp", "data", order, method, lower_order_final, euler_at_final, exact_curvature, variant)


@factory
def sde_dpm_solver_pp(
    order: int = 2,
    tau: float = 1.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    variant: str = "midpoint",
) -> Solver:
    """SDE-DPM-Solver++: the reverse SDE with the data prediction integrated in lambda; stochastic.

    Order 3 halves the second difference, as `dpm_solver_pp(3)` does. `sa_solver(3, 0, tau)` has the exact weights.

    Args:
      order: 1, 2 ("SDE-DPM-Solver++(2M)") or 3, which is k-diffusion's and not in the paper.
      tau: the noise relative to that of the reverse SDE; 0 is `dpm_solver_pp`, 1 the published solver. tau^2 is the
        `eta` of some implementations.
      lower_order_final: as for `dpm_solver_pp`.
      euler_at_final: as for `dpm_solver_pp`.
      variant: as for `dpm_solver_pp`.

    Returns:
      The solver, which needs a key unless tau is 0. NFE: N for N steps.

    Raises:
      ValueError: for another order or variant, or a negative tau.

    References:
      arXiv 2211.01095, section 6 (Eqs. 18 and 19).
    """
    quadrature.check_order("sde_dpm_solver_pp", order, 3)
    quadrature.check_choice("sde_dpm_solver_pp", "variant", variant, _VARIANTS)
    if not tau >= 0:
        raise ValueError(f"sde_dpm_solver_pp needs tau >= 0, got {tau}")
    table = functools.partial(
        _multistep_table,
        prediction="data",
        order=order,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        variant=variant,
        exact_curvature=False,
        tau=tau,
    )
    return Solver("sde_dpm_solver_pp", table)


def _solver(
    name: str,
    prediction: str,
    order: int,
    method: str,
    lower_order_final: bool,
    euler_at_final: bool,
    exact_curvature: bool,
    variant: str,
) -> Solver:
    quadrature.check_order(name, order, 3)
    quadrature.check_choice(name, "method", method, ("multistep", "singlestep"))
    quadrature.check_choice(name, "variant", variant, _VARIANTS)
    build = functools.partial(_multistep_table, exact_curvature=exact_curvature)
    table = functools.partial(
        build if method == "multistep" else _singlestep_table,
        prediction=prediction,
        order=order,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        variant=variant,
    )
    return Solver(name, table)


def _multistep_table(
    schedule: NoiseSchedule,
    times: Any,
    prediction: str,
    order: int,
    lower_order_final: bool,
    euler_at_final: bool,
    variant: str,
    exact_curvature: bool,
    tau: float = 0.0,
) -> Table:
    levels = schedule.levels(times)
    start, end = quadrature.ends(levels)
    if prediction == "data":
        steps = quadrature.data_steps(start, end, namespace(times).full_like(end.sigma, tau) if tau else None)
    else:
        steps = quadrature.noise_steps(start, end)
    orders = quadrature.multistep_orders(times, order, lower_order_final, euler_at_final, levels.sigma[-1])
    one, first, second = quadrature.exponential_moments(steps.exponent, 3)
    # "midpoint" takes 1/2 for phi_2 / phi_1, the released third order phi_3 for 2 phi_3.
    moments = [one], [one, first if variant == "heun" else 0.5], [one, first, second if exact_curvature else second / 2]
    nodes = quadrature.past_nodes(quadrature.finite(levels.lambda_), order)
    choices = [quadrature.weights(nodes[:k], moments[k - 1]) for k in range(1, order + 1)]
    return quadrature.multistep_table(times, steps, quadrature.by_order(orders, choices, order))


def _singlestep_table(
    schedule: NoiseSchedule,
    times: Any,
    prediction: str,
    order: int,
    lower_order_final: bool,
    euler_at_final: bool,
    variant: str,
) -> Table:
    """The methods of order 1, of order 2 with a call at 1/2, and of order 3 with calls at 1/3 and 2/3 of the step.

    With y_r the output at r, a_r the amplitude and z_r the exponent from the step's start to there,

        order 2:  a_1 y_{1/2}
        order 3:  a_{2/3} (y_0 + 2 phi_2 / phi_1 (z_{2/3}) (y_{1/3} - y_0))  at 2/3,
                  a_1 (y_0 + 3/2 phi_2 / phi_1 (z_1) (y_{2/3} - y_0))        at 1;

    for "heun" the last stage of each integrates the polynomial through the step's outputs.
    """
    levels = schedule.levels(times)
    start = quadrature.ends(levels)[0]
    make_steps = quadrature.data_steps if prediction == "data" else quadrature.noise_steps

    def arrive(fraction: float) -> tuple[Any, Any, Any, list[Any]]:
        """From the steps' starts to `fraction` of them: the time there, T, a and the moments."""
        time = times[1:] if fraction == 1 else quadrature.times_within(schedule, times, levels.lambda_, fraction)
        steps = make_steps(start, schedule.levels(time))
        return time, steps.transition, steps.amplitude, quadrature.exponential_moments(steps.exponent, 3)

    begin = times[:-1]
    _, t_1, a_1, moments = arrive(1)
    half, t_half, a_half, _ = arrive(1 / 2)
    third, t_third, a_third, _ = arrive(1 / 3)
    two_thirds, t_two, a_two, (_, c_two, _) = arrive(2 / 3)
    last_of_2, last_of_3 = (0 * a_1, a_1), (a_1 * (1 - 1.5 * moments[1]), 0 * a_1, a_1 * 1.5 * moments[1])
    if variant == "heun":
        last_of_2, last_of_3 = (
            tuple(a_1 * weight for weight in quadrature.weights(nodes, moments))
            for nodes in ((0.0, 1 / 2), (0.0, 1 / 3, 2 / 3))
        )
    methods = [
        [Stage(begin, t_1, (a_1,))],
        [Stage(begin, t_half, (a_half,)), Stage(half, t_1, last_of_2)],
        [
            Stage(begin, t_third, (a_third,)),
            Stage(third, t_two, (a_two * (1 - 2 * c_two), a_two * 2 * c_two)),
            Stage(two_thirds, t_1, last_of_3),
        ],
    ]
    orders = quadrature.singlestep_orders(times, order, lower_order_final, euler_at_final, levels.lambda_)
    history = None if prediction == "data" else lambda time: quadrature.noise_history(schedule.levels(time))
    return quadrature.singlestep_table(methods[:order], orders, levels.lambda_, history)
