"""What the tables of linear solvers are made of: steps as integrals, and the weights that integrate them.

Over the step from t_0 to t_1 the exact solution of the probability-flow ODE (or the reverse SDE) is

    x_1 = transition x_0 + amplitude integral_0^1 w(theta) y(theta) dtheta  (+ nu z)

with y the data prediction m or the noise prediction eps as a function of theta, the position in the step on some clock
(lambda = log(alpha / sigma), kappa = sigma / alpha or t), and w a density. A linear multistep solver replaces y by a
polynomial through the outputs it remembers: it is its clock and the moments of w that it uses.
"""

from collections.abc import Sequence
from math import factorial
from typing import Any, NamedTuple

import numpy as np

from evodiff_jax.numerics import is_integer, namespace, on_host
from evodiff_jax.schedules import Levels, NoiseSchedule
from evodiff_jax.tables import Table

_SERIES = 20  # terms of phi_k for |z| <= 1: the first one left out is below 1e-19


class Steps(NamedTuple):
    """The steps of a run as integrals; each entry has one element a step.

    Attributes:
      transition: the coefficient of the state at the step's start.
      amplitude: the coefficient of the integral, so that a constant y contributes amplitude y.
      exponent: z where w is proportional to e^(z (1 - theta)) on the lambda clock.
      noise: nu, or None for the ODE.
      history: (keep_x, keep_m) at the step's start where y is not the data prediction, else None.
    """

    transition: Any
    amplitude: Any
    exponent: Any
    noise: Any = None
    history: tuple[Any, Any] | None = None


def data_steps(start: Levels, end: Levels, tau: Any = None) -> Steps:
    """Steps for the data prediction: of the ODE, or of the reverse SDE with tau times its noise.

    x_1 = (sigma_1 / sigma_0) e^(-tau^2 h) x_0 + alpha_1 (1 + tau^2) integral e^(-(1 + tau^2) (lambda_1 - lambda)) m
    dlambda + sigma_1 sqrt(1 - e^(-2 tau^2 h)) z with h = lambda_1 - lambda_0 (arXiv 2309.05019, proposition 4.2; for
    tau = 0 arXiv 2211.01095, Eq. 8).

    Args:
      start: alpha, sigma and lambda at the steps' starts.
      end: the same at their ends.
      tau: None for the ODE, else one number a step.
    """
    xp = namespace(end.lambda_)
    ratio, exact = end.sigma / start.sigma, end.lambda_ - start.lambda_
    h = _finite_gap(exact)
    if tau is None:
        return Steps(ratio, -end.alpha * xp.expm1(-exact), -h)
    return Steps(
        transition=ratio * xp.exp(-(tau**2) * h),
        amplitude=-end.alpha * xp.expm1(-(1 + tau**2) * exact),
        exponent=-(1 + tau**2) * h,
        noise=end.sigma * xp.sqrt(-xp.expm1(-2 * tau**2 * h)),
    )


def noise_steps(start: Levels, end: Levels) -> Steps:
    """Steps of the ODE for the noise prediction eps = (x - alpha m) / sigma (arXiv 2206.00927, Eq. 3.4).

    x_1 = (alpha_1 / alpha_0) x_0 + alpha_1 integral eps dkappa.

    Args:
      start: alpha, sigma and lambda at the steps' starts.
      end: the same at their ends.

    Raises:
      ValueError: when alpha vanishes at the first time, where a noise prediction tells nothing about the data.
    """
    xp = namespace(end.lambda_)
    if xp is np and start.alpha[0] == 0:
        raise ValueError(
            "alpha is 0 at times[0]: a noise-prediction solver cannot start there, use a data-prediction one "
            "such as dpm_solver_pp"
        )
    exact = end.lambda_ - start.lambda_
    amplitude = end.alpha * (start.sigma / start.alpha) * xp.expm1(-exact)
    return Steps(end.alpha / start.alpha, amplitude, _finite_gap(exact), history=noise_history(start))


def noise_history(levels: Levels) -> tuple[Any, Any]:
    """(keep_x, keep_m) of the noise prediction."""
    return 1 / levels.sigma, -levels.alpha / levels.sigma


def ends(levels: Levels) -> tuple[Levels, Levels]:
    """The levels at the starts and at the ends of a run's steps."""
    return Levels(*(a[:-1] for a in levels)), Levels(*(a[1:] for a in levels))


def _finite_gap(gap: Any) -> Any:
    """The lengths of steps in lambda, the infinite ones replaced: those are of first order and don't use it."""
    xp = namespace(gap)
    return xp.where(xp.isfinite(gap), gap, 50.0)


def finite(lambda_: Any) -> Any:
    """Lambda with its infinite ends (sigma = 0 or alpha = 0) far away but finite, for ratios of steps."""
    xp = namespace(lambda_)
    inner = xp.where(xp.isfinite(lambda_), lambda_, 0.0)
    far = xp.max(xp.abs(inner)) + 50.0
    return xp.where(xp.isfinite(lambda_), lambda_, xp.where(lambda_ > 0, far, -far))


def time_at(schedule: NoiseSchedule, lambda_: Any) -> Any:
    """The times at which the schedule has the given lambda, on the host for concrete ones."""
    return on_host(schedule.time, lambda_) if namespace(lambda_) is np else schedule.time(lambda_)


def times_within(schedule: NoiseSchedule, times: Any, lambda_: Any, fraction: float) -> Any:
    """The times at a fraction of each step in lambda, in the middle of the time where lambda is infinite at an end.

    Steps with an infinite end are of first order: the times there are only to be harmless.
    """
    xp = namespace(lambda_)
    safe = xp.where(xp.isfinite(lambda_), lambda_, 0.0)
    inside = xp.where(bounded(lambda_), (1 - fraction) * safe[:-1] + fraction * safe[1:], xp.max(safe))
    return xp.where(bounded(lambda_), time_at(schedule, inside), (times[:-1] + times[1:]) / 2)


def last_steps(orders: np.ndarray, lower_order_final: bool, euler_at_final: bool) -> np.ndarray:
    """The orders of a run's steps after the options for its last ones."""
    if lower_order_final:
        orders = np.minimum(orders, np.arange(orders.size, 0, -1))
    if euler_at_final:
        orders = np.append(orders[:-1], 1)
    return orders


def multistep_orders(times: Any, order: int, lower_order_final: bool, euler_at_final: bool, sigma_end: Any) -> Any:
    """The order of each step: as many outputs as there are, and what the options for the last steps leave.

    A last step to sigma = 0 is of first order, which lands on the data prediction: lambda is infinite there.
    """
    num_steps = times.shape[0] - 1
    index = np.arange(num_steps)
    orders = last_steps(np.minimum(order, index + 1), lower_order_final, euler_at_final)
    return namespace(sigma_end).where((index == num_steps - 1) & (sigma_end == 0), 1, orders)


def singlestep_orders(times: Any, order: int, lower_order_final: bool, euler_at_final: bool, lambda_: Any) -> Any:
    """The order of each step, static because it is the number of calls.

    A step from alpha = 0 or to sigma = 0, in which lambda has no middle, is of order 1 where times are concrete. Where
    they are traced it keeps its calls, and `singlestep_table` gives it the weights of order 1.
    """
    orders = last_steps(np.full(times.shape[0] - 1, order), lower_order_final, euler_at_final)
    if namespace(lambda_) is np:
        orders = np.where(bounded(lambda_), orders, 1)
    return orders


def bounded(lambda_: Any) -> Any:
    """Whether lambda is finite at both ends of each step."""
    xp = namespace(lambda_)
    return xp.isfinite(lambda_[:-1]) & xp.isfinite(lambda_[1:])


def past_nodes(clock: Any, count: int) -> list[Any]:
    """The positions of the `count` newest outputs on the clock of each step: 0 is its start and 1 its end.

    Where there are fewer outputs, distinct numbers that no weight will use.
    """
    xp = namespace(clock)
    step = clock[1:] - clock[:-1]
    index = np.arange(step.shape[0])
    nodes = []
    for age in range(count):
        passed = clock[np.maximum(index - age, 0)] - clock[:-1]
        nodes.append(xp.where(index >= age, passed / step, -float(age)))
    return nodes


def phi(k: int, z: Any) -> Any:
    """phi_k(z) = sum_n z^n / (n + k)!, elementwise and without cancellation at small z.

    phi_0 is the exponential, phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z, and integral_0^1 e^(z (1 - theta)) theta^k dtheta
    = k! phi_{k+1}(z).
    """
    xp = namespace(z)
    small = xp.abs(z) <= 1
    near, far = xp.where(small, z, 0.0), xp.where(small, 1.0, z)
    series = xp.zeros_like(near)
    for n in reversed(range(_SERIES)):
        series = series * near + 1 / factorial(n + k)
    value = xp.expm1(far) / far if k else xp.exp(far)
    for j in range(1, k):
        value = (value - 1 / factorial(j)) / far
    return xp.where(small, series, value)


def exponential_moments(z: Any, count: int) -> list[Any]:
    """The first moments of the density proportional to e^(z (1 - theta)) on [0, 1]."""
    return [factorial(k) * phi(k + 1, z) / phi(1, z) for k in range(count)]


def uniform_moments(count: int) -> list[float]:
    """The first moments of the uniform density on [0, 1]."""
    return [1 / (k + 1) for k in range(count)]


def weights(nodes: Sequence[Any], moments: Sequence[Any]) -> list[Any]:
    """The weights on the values at the nodes that integrate polynomials of degree below len(nodes), given its moments.

    Elementwise over steps: nodes and moments are numbers or (N,) arrays.
    """
    result = []
    for j, own in enumerate(nodes):
        coefficients: list[Any] = [1.0]  # of the product of (theta - other), lowest degree first
        scale: Any = 1.0
        for m, other in enumerate(nodes):
            if m != j:
                shifted = [0.0, *coefficients]
                coefficients = [s - other * c for s, c in zip(shifted, [*coefficients, 0.0], strict=True)]
                scale = scale * (own - other)
        result.append(sum(c * moment for c, moment in zip(coefficients, moments, strict=False)) / scale)
    return result


def by_order(orders: Any, choices: Sequence[Sequence[Any]], columns: int) -> Any:
    """(N, columns): for each step the weights of its order, choices[order - 1], padded with zeros."""
    xp = namespace(orders, *(w for choice in choices for w in choice))
    zero = np.zeros(orders.shape)
    table = [zero] * columns
    for order, choice in enumerate(choices, 1):
        padded = [*choice, *[0.0] * (columns - len(choice))]
        table = [xp.where(orders == order, new, old) for new, old in zip(padded, table, strict=True)]
    return xp.stack(table, axis=-1)


def multistep_table(times: Any, steps: Steps, predictor: Any, corrector: Any = None) -> Table:
    """The table of a linear multistep solver of one call a step.

    Args:
      times: (N + 1,), the times of the run.
      steps: its steps.
      predictor: (N, K) weights on the outputs, newest first, that predict each step.
      corrector: None, or (N, K + 1) weights, first on the output at the step's end, that correct it once that is known.
        The last step, whose end is not evaluated, is not corrected.
    """
    xp = namespace(times, predictor)
    amplitude = steps.amplitude[:, None]
    predictor = amplitude * predictor
    corrections = xp.zeros_like(predictor)
    if corrector is not None:
        # The corrected state as a change of the probe, in which the predictor's outputs are one call older.
        older = xp.pad(predictor, [(0, 0), (1, 0)])
        change = amplitude * corrector - older
        corrections = xp.concatenate([xp.zeros_like(change[:1]), change[:-1]])
        predictor = xp.pad(predictor, [(0, 0), (0, 1)])
    return Table(
        time=times[:-1],
        transition=steps.transition,
        predictor=predictor,
        corrector=corrections,
        history=steps.history,
        noise=steps.noise,
    )


class Stage(NamedTuple):
    """One model call of a single-step method; entries have one element a step.

    Attributes:
      time: when the model is called.
      transition: from the step's start to the state after this stage, for the linear part.
      weights: of the step's outputs so far, oldest first, in the state after this stage.
    """

    time: Any
    transition: Any
    weights: tuple[Any, ...]


def singlestep_table(methods: Sequence[Sequence[Stage]], orders: np.ndarray, lambda_: Any, history: Any) -> Table:
    """The table of a single-step solver: as many rows a step as its method has stages.

    Each state is written from the one before: x_{j+1} = T_{j+1} x_0 + sum W_{j+1,l} y_l, x_0 = (x_j - sum W_{j,l} y_l)
    / T_j.

    Args:
      methods: methods[order - 1], the stages of the method of each order; the first has one stage.
      orders: (N,), the order of each step, static.
      lambda_: (N + 1,), lambda at the times of the run. A step that is infinitely long in it has the weights of order
        1, whatever its calls: the later ones count nothing.
      history: history(times) -> (keep_x, keep_m), or None where the outputs are data predictions.
    """
    slots = len(methods[-1])  # whatever the orders, so that runs of one solver have one shape
    xp = namespace(methods[0][0].time)
    zero = xp.zeros_like(methods[0][0].time)
    of_first_order = [methods[0][0].weights[0], *[0.0] * (slots - 1)]
    first, stages = [], []  # where each method's stages begin, and what they make a row of each step
    for method in methods:
        first.append(len(stages))
        before, previous = 1.0, ()
        for stage in method:
            ratio, weights = stage.transition / before, stage.weights
            if stage is method[-1]:
                pairs = zip(weights, of_first_order, strict=False)
                weights = tuple(xp.where(bounded(lambda_), w, euler) for w, euler in pairs)
            new = [w - ratio * v for w, v in zip(weights, [*previous, 0.0], strict=True)]
            stages.append(xp.stack([stage.time, ratio, *reversed(new), *[zero] * (slots - len(new))]))
            before, previous = stage.transition, weights
    which = np.concatenate([first[order - 1] + np.arange(len(methods[order - 1])) for order in orders])
    step = np.repeat(np.arange(orders.size), [len(methods[order - 1]) for order in orders])
    rows = xp.stack(stages)[which, :, step]
    time, predictor = rows[:, 0], rows[:, 2:]
    return Table(
        time=time,
        transition=rows[:, 1],
        predictor=predictor,
        corrector=xp.zeros_like(predictor),
        history=None if history is None else history(time),
    )


def check_order(solver: str, order: int, highest: int) -> None:
    """Raises ValueError unless `order` is an integer from 1 to `highest`."""
    if not is_integer(order) or not 1 <= order <= highest:
        raise ValueError(f"{solver} needs an order of 1 to {highest}, got {order!r}")


def check_choice(solver: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{solver} needs {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")
