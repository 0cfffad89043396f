"""Adams-Bashforth methods for the noise prediction: DEIS, iPNDM and PNDM.

In kappa = sigma / alpha the probability-flow ODE is d(x / alpha) = eps dkappa, so that x_1 = (alpha_1 / alpha_0) x_0 +
alpha_1 integral eps dkappa; the solvers replace eps by a polynomial through its last values, in kappa, log kappa or t.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from evodiff_jax import quadrature
from evodiff_jax.numerics import factory, namespace
from evodiff_jax.quadrature import Stage
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver, Table

_GAUSS_POINTS = 32  # e^-lambda times a polynomial in t(lambda) over one step, to round-off


@factory
def deis(
    order: int = 2, variant: str = "rho-AB", lower_order_final: bool = False, euler_at_final: bool = False
) -> Solver:
    """DEIS: the noise prediction extrapolated by a polynomial in kappa (rho-AB), log kappa (log-rho-AB) or time (t-AB).

    Args:
      order: the degree of the polynomial, 1, 2 or 3, as in the paper: it goes through order + 1 outputs and the
        solver's order of convergence is order + 1. Degree 0 is `ddim()`.
      variant: "rho-AB"; "t-AB", which is the same for EDM, where kappa = t; or "log-rho-AB", which is not in the paper.
      lower_order_final: step i of N uses at most N + 1 - i outputs. The releases don't.
      euler_at_final: the last step alone is of first order (degree 0).

    Returns:
      The solver. NFE: N for N steps.

    Raises:
      ValueError: for another order or variant.

    References:
      Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv 2204.13902, sections 3.2 (tAB)
      and 3.3 (rhoAB).
    """
    quadrature.check_order("deis", order, 3)
    quadrature.check_choice("deis", "variant", variant, ("rho-AB", "t-AB", "log-rho-AB"))
    return _solver("deis", order + 1, variant, lower_order_final, euler_at_final)


@factory
def ipndm(
    order: int = 4, lower_order_final: bool = False, euler_at_final: bool = False, start: str = "adams-bashforth"
) -> Solver:
    """Adams-Bashforth with the coefficients of equal steps, whatever the steps: iPNDM; with another start PNDM or PLMS.

    Its order of convergence is `order` on grids equally spaced in kappa, and 2 at most on others whose steps change
    smoothly.

    Args:
      order: the number of outputs used, 1 (`ddim()`) to 4. The first steps use those there are.
      lower_order_final: step i of N uses at most N + 1 - i outputs.
      euler_at_final: the last step alone is of first order.
      start: how the first steps are taken, which have fewer outputs than `order`.
        "adams-bashforth": with the outputs there are, for iPNDM.
        "runge-kutta": the first order - 1 steps by the classical Runge-Kutta method, two of whose four calls are in the
        middle of the time, for PNDM (order 4 is the F-PNDM of its paper). The run remembers 4 order - 3 outputs, as
        those at the starts of steps are four calls apart.
        "heun": the first step by Heun's method of two calls, of which only the first is used later, for PLMS (order 2
        is the paper's S-PNDM).
        A first step to sigma = 0, or whose order the options for the last steps lower, is as in iPNDM. For traced times
        one to sigma = 0 takes its calls all the same, and makes nothing of the later ones.

    Returns:
      The solver. NFE: N for N steps; N + 1 with start "heun", N + 3 (order - 1) with "runge-kutta".

    Raises:
      ValueError: for another order or start.

    References:
      Zhang, Chen, arXiv 2204.13902, section 4 and appendix; Liu, Ren, Lin, Zhao, "PNDM", arXiv 2202.09778, Eqs. 9, 12
      and 13, algorithm 2 and appendix.
    """
    quadrature.check_order("ipndm", order, 4)
    quadrature.check_choice("ipndm", "start", start, ("adams-bashforth", "runge-kutta", "heun"))
    solver = _solver("ipndm", order, "equal", lower_order_final, euler_at_final)
    if start == "adams-bashforth" or order == 1:
        return solver
    table = functools.partial(
        _started_table,
        multistep=solver.table,
        method=_runge_kutta if start == "runge-kutta" else _heun,
        lowest=order if start == "runge-kutta" else 2,
        steps=order - 1 if start == "runge-kutta" else 1,
        last=(lower_order_final, euler_at_final),
    )
    return Solver("ipndm", table)


@factory
def ipndm_v(order: int = 4, lower_order_final: bool = False, euler_at_final: bool = False) -> Solver:
    """A form of iPNDM for unequal steps, as released.

    Adams-Bashforth for unequal steps is `deis(order - 1)`, and so is this for order 2. The release has two quirks. With
    its last steps h, h_1, h_2, h_3:

    - A misplaced bracket makes the weight of the second difference (1 - a b) / 2 where Adams-Bashforth has
      (1 - a) b / 2, a = h / (3 (h + h_1)), b = h (h + h_1) / (h_1 (h_1 + h_2)). The two agree for equal steps only.
    - The last weight of order 4 has h_1 / h_2 where the third difference has h_2 / h_3. The four weights sum to 1 only
      where these quotients agree, as on the grid log_snr; on karras the sum is off by up to 0.001.

    On grids whose steps change smoothly, order 3 converges with order 3, and order 4 with order 3 where its weights sum
    to 1, else with order 2. `deis` has the exact weights.

    Args:
      order: the number of outputs used, 1 (`ddim()`) to 4. The first steps use those there are.
      lower_order_final: step i of N uses at most N + 1 - i outputs.
      euler_at_final: the last step alone is of first order.

    Returns:
      The solver. NFE: N for N steps.

    Raises:
      ValueError: for another order.

    References:
      Zhou, Chen, Wang, Chen, "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps", arXiv 2312.00094, whose
      public code has it.
    """
    quadrature.check_order("ipndm_v", order, 4)
    return _solver("ipndm_v", order, "released", lower_order_final, euler_at_final)


def _solver(name: str, points: int, clock: str, lower_order_final: bool, euler_at_final: bool) -> Solver:
    table = functools.partial(
        _table, points=points, clock=clock, lower_order_final=lower_order_final, euler_at_final=euler_at_final
    )
    return Solver(name, table)


def _table(
    schedule: NoiseSchedule, times: Any, points: int, clock: str, lower_order_final: bool, euler_at_final: bool
) -> Table:
    levels = schedule.levels(times)
    steps = quadrature.noise_steps(*quadrature.ends(levels))
    orders = quadrature.multistep_orders(times, points, lower_order_final, euler_at_final, levels.sigma[-1])
    kappa = levels.sigma / levels.alpha
    moments: list[Any] = quadrature.uniform_moments(points)
    if clock == "log-rho-AB":  # log kappa = -lambda
        nodes = quadrature.past_nodes(quadrature.finite(levels.lambda_), points)
        moments = quadrature.exponential_moments(steps.exponent, points)
    elif clock == "t-AB":
        nodes, moments = quadrature.past_nodes(times, points), _moments_in_time(schedule, times, points)
    elif clock == "equal":
        nodes = [-float(age) for age in range(points)]
    else:
        nodes = quadrature.past_nodes(kappa, points)
    choices = [quadrature.weights(nodes[:k], moments) for k in range(1, points + 1)]
    if clock == "released":
        choices[2:] = _released_weights(nodes, points)
    return quadrature.multistep_table(times, steps, quadrature.by_order(orders, choices, points))


def _started_table(
    schedule: NoiseSchedule,
    times: Any,
    multistep: Callable[[NoiseSchedule, Any], Table],
    method: Callable[..., list[Stage]],
    lowest: int,
    steps: int,
    last: tuple[bool, bool],
) -> Table:
    """The table of a multistep solver whose first steps a single-step method takes.

    Args:
      schedule: as for every table.
      times: as for every table.
      multistep: the table function of the multistep solver.
      method: method(schedule, times, steps) -> the stages of the single-step method for each step.
      lowest: the order that a first step must be allowed for the method to take it.
      steps: how many first steps it takes at most.
      last: lower_order_final and euler_at_final.
    """
    xp = namespace(times)
    table, levels = multistep(schedule, times), schedule.levels(times)
    whole = quadrature.noise_steps(*quadrature.ends(levels))
    count, memory = table.predictor.shape
    stages = method(schedule, times, whole)
    width = steps * (len(stages) - 1) + memory
    allowed = quadrature.last_steps(np.full(count, lowest), *last) >= lowest
    orders = quadrature.singlestep_orders(times, 2, False, False, levels.lambda_)  # 1 to sigma = 0
    taken = int(np.sum(allowed & (orders > 1) & (np.arange(count) < steps)))
    # The multistep steps use the calls at the steps' starts alone: which calls these are, and how many calls ago.
    calls = np.append(np.arange(taken) * len(stages), taken * len(stages) + np.arange(count - taken))
    step = np.arange(taken, count)
    ages = [(calls[step] - calls[np.maximum(step - age, 0)])[:, None] for age in range(memory)]
    later = [table.predictor[taken:, k, None] * (age == np.arange(width)) for k, age in enumerate(ages)]
    table = table._replace(predictor=sum(later), corrector=np.zeros((count, width)))
    if taken == 0:
        return table
    eulers = [Stage(times[:-1], whole.transition, (whole.amplitude,))]
    first = quadrature.singlestep_table([eulers, stages], orders[:taken], levels.lambda_, None)
    time = xp.concatenate([first.time, table.time[taken:]])
    predictor = xp.concatenate([xp.pad(first.predictor, [(0, 0), (0, width - len(stages))]), table.predictor])
    return Table(
        time=time,
        transition=xp.concatenate([first.transition, table.transition[taken:]]),
        predictor=predictor,
        corrector=xp.zeros_like(predictor),
        history=quadrature.noise_history(schedule.levels(time)),
    )


def _heun(schedule: NoiseSchedule, times: Any, whole: quadrature.Steps) -> list[Stage]:
    half = whole.amplitude / 2
    return [
        Stage(times[:-1], whole.transition, (whole.amplitude,)),
        Stage(_ends_with_noise(schedule, times), whole.transition, (half, half)),
    ]


def _runge_kutta(schedule: NoiseSchedule, times: Any, whole: quadrature.Steps) -> list[Stage]:
    """The classical method for kappa, with the transfer of DDIM to the middle in time (arXiv 2202.09778, Eq. 13)."""
    middle = (times[:-1] + times[1:]) / 2
    there = quadrature.noise_steps(schedule.levels(times[:-1]), schedule.levels(middle))
    zero, sixth = 0 * whole.amplitude, whole.amplitude / 6
    return [
        Stage(times[:-1], there.transition, (there.amplitude,)),
        Stage(middle, there.transition, (zero, there.amplitude)),
        Stage(middle, whole.transition, (zero, zero, whole.amplitude)),
        Stage(_ends_with_noise(schedule, times), whole.transition, (sixth, 2 * sixth, 2 * sixth, sixth)),
    ]


def _ends_with_noise(schedule: NoiseSchedule, times: Any) -> Any:
    """The steps' ends, where noise can be predicted; of a step to sigma = 0, where it can't, the start."""
    lambda_ = schedule.levels(times).lambda_
    return namespace(times).where(quadrature.bounded(lambda_), times[1:], times[:-1])


def _moments_in_time(schedule: NoiseSchedule, times: Any, count: int) -> list[Any]:
    """The moments of dkappa, as a density over the position of the time in the step."""
    xp = namespace(times)
    lambda_ = quadrature.finite(schedule.levels(times).lambda_)
    points, gauss = np.polynomial.legendre.leggauss(_GAUSS_POINTS)
    inside = lambda_[:-1, None] + (lambda_[1:] - lambda_[:-1])[:, None] * (points + 1) / 2
    position = (quadrature.time_at(schedule, inside) - times[:-1, None]) / (times[1:] - times[:-1])[:, None]
    density = gauss * xp.exp(lambda_[:-1, None] - inside)
    density = density / xp.sum(density, axis=1, keepdims=True)
    return [xp.sum(density * position**k, axis=1) for k in range(count)]


def _released_weights(nodes: list[Any], points: int) -> list[list[Any]]:
    """The weights of `ipndm_v` for three and four outputs."""
    if points < 3:
        return []
    # The lengths of the steps before this one, in units of it, and the quotients of the divided differences.
    h_1, h_2 = -nodes[1], nodes[1] - nodes[2]
    second = (1 - 1 / (3 * (1 + h_1)) * (1 + h_1) / (h_1 * (h_1 + h_2))) / 2
    q = h_1 / h_2
    three = [1 + 1 / (2 * h_1) + second, -1 / (2 * h_1) - (1 + q) * second, q * second]
    if points == 3:
        return [three]
    h_3 = nodes[2] - nodes[3]
    third = (
        ((1 - 1 / (3 * (1 + h_1))) / 2 + (1 - 1 / (2 * (1 + h_1))) / (6 * (1 + h_1 + h_2)))
        * ((1 + h_1) * (1 + h_1 + h_2))
        / (h_1 * (h_1 + h_2) * (h_1 + h_2 + h_3))
    )
    s = h_1 * (h_1 + h_2) / (h_2 * (h_2 + h_3))
    differences = [third, -(1 + q + s) * third, (q + s * (1 + h_2 / h_3)) * third, -s * q * third]
    return [three, [a + b for a, b in zip([*three, 0.0], differences, strict=True)]]
