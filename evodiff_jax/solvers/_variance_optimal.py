"""The project's own rule: a table of coefficients made before the run, among which two scalars a sample choose.

In u = x / alpha and kappa = sigma / alpha, with q = kappa_t / kappa_0, the step from t_0 to t is

    u_t = q u_0 + (1 - q) (m_0 + sum_a c_a D_a),        a = 0, 1, 2,

where m_0 is the newest model output and D_0, D_1, D_2 are the differences of adjacent outputs, newest first: up to m_0
in the predictor, up to m_t in the corrector, which is applied when m_t is known. The rule chooses the coefficients c.

Normal data of standard deviation s has the output s^2 / (s^2 + kappa^2) u and the exact path u* ~ sqrt(s^2 + kappa^2).
A prior is an energy E(s) ~ s^POWER of SCALES scales s, evenly spaced in log s. The host samples each scale, every step
from the exact state, and finds for that step, with |D|^2 = sum_s E D^2 / u*_t^2,

    c = argmin sum_s E (u_t - u*_t)^2 / u*_t^2 + eps^2 sum_a |D_a|^2 (c_a - c*_a)^2,        c* = (c*_0, 0, 0)

which is c = k0 + c*_0 k1 with k0 and k1 from the table. A sample tells T = <u - m_0, D_0> / |D_0|^2 at each output.

1. A single scale has T = (1 + w) / (w^2 / q^2 - 1), w being the ratio of its u* at the ends of the last step. The rule
   solves for w, and c*_0 is the coefficient that makes the step exact for that scale.
2. log T at the second output, which is larger for smaller scales, fixes the shares of two priors, narrow and wide.
3. Normal data has T >= 0. A sample whose outputs first moved along u - m_0 and then against it has chosen one of
   several modes. No prior describes what follows, and c = c* from there.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import factory, namespace
from evodiff_jax.tables import Choice, Rule, Solver, Table, exportable

# Pure numbers, settled by trial, see `variance_optimal`; docs/variance_optimal.md has what half and twice of each cost.
POWER, SCALES = 1.5, 24  # of the priors; more scales change nothing, the sums over s are integrals
SMALLEST, NARROW, WIDE = 0.1, 0.15, 1.0  # the smallest scale over the least kappa; the largest over the second kappa
SHARPNESS = 3.0  # the share is 1 from 1 / SHARPNESS of the way from the narrow prior's log T to the wide one's
RIDGE_CORRECTOR, RIDGE_PREDICTOR = 0.5, 0.13  # eps of the corrector, and of the predictor over h = |log q|
GROWTH, MOST = 1.5, 7.0  # in longer steps eps grows as the GROWTH max(h, 1)-th power of the ratio, at most e^MOST-fold
CLEAR = 2.0  # outputs moved clearly where <u - m_0, D_0> is so many standard deviations, kappa |D_0| each
FAR = 2.3  # an infinite lambda counts as this far beyond the finite ones


class Data(NamedTuple):
    """What the rule reads of a row; tables (R, 2, 2, 5): narrow and wide prior, k0 and k1 - (1, 0, 0)."""

    alpha: Any
    kappa: Any
    q: Any  # of the step that ends here
    following: Any  # q of the step that begins here
    exists: Any  # 1 where there is an earlier output, else 0
    narrow: Any  # log |T| of the narrow prior
    slope: Any  # of the share of the wide prior over log |T|; 0 except at the second output
    shift: Any  # (R, 2), T of the corrected state less that of the probe
    corrector: Any  # coefficients of outputs, as the predictor's
    predictor: Any


exportable(Data)


@factory
def variance_optimal(channel_axis: int | None = None, per_leaf: bool = True) -> Solver:
    """This project's own rule, not a paper's: coefficients of least expected error, for each sample and step.

    It shares EVODiff's objective (arXiv 2509.26096): the conditional variance of the reverse transition is to be least,
    by a predictor and a corrector on data predictions, from inner products of outputs. Its variance is that of a prior
    over scales, see the module. Use it for 5 to 20 calls, from 8 with noise predictions where alpha is below 0.01. Its
    constants were settled on mixture-64d, digits-0.1, digits-0.3, galaxies-hsc, fashion-1 of benchmarks/quality.py.

    Args:
      channel_axis: an axis, of states of three or more, with coefficients for each index; None for one choice a sample.
      per_leaf: whether each leaf of a state has coefficients of its own; if not, inner products are of the whole.

    Returns:
      The solver, of one model call a step.

    Raises:
      ValueError: when per_leaf is False and channel_axis is not None.
    """
    return Solver("variance_optimal", table, Rule(terms, choose, init, channel_axis, per_leaf))


def terms(data: Data, x: Any, output: Any) -> tuple[Any, Any]:
    """The terms of <u - m_0, D_0> and |D_0|^2."""
    m, change = output(0), output(0) - output(1)
    return (x * (1 / data.alpha) - m) * change, change * change


def init(data: Data) -> tuple[Any, Any, Any]:
    """The last predictor; the wide prior's share; how outputs moved: along u - m_0, against it, against after along."""
    return jnp.zeros(5), jnp.zeros(()), jnp.zeros(3)


def choose(data: Data, sums: tuple[Any, Any], memory: tuple[Any, Any, Any]) -> tuple[Choice, tuple[Any, Any, Any]]:
    """The corrector of the last step and the predictor of the next, as coefficients of the outputs, newest first."""
    (noise, square), (last, share, (along, against, turned)) = sums, memory
    changed = square > 10 * jnp.sqrt(jnp.finfo(square.dtype).tiny)  # 1 / square has a finite derivative
    square = jnp.where(changed, square, 1)
    T = jnp.where(changed, noise / square, 0)
    deviations = jnp.where(changed, noise / (CLEAR * data.kappa * jnp.sqrt(square)), 0) * data.exists
    plus, minus, undecided = jnp.clip(deviations, 0, 1), jnp.clip(-deviations, 0, 1), 1 - along - against - turned
    moved = along * (1 - minus) + undecided * plus, against + undecided * minus, turned + along * minus
    seen = jnp.clip(data.slope * (jnp.log(jnp.abs(bounded(T, data.q))) - data.narrow), 0, 1)
    share = jnp.where(data.slope == 0, share, seen)
    shift, corrector, predictor = (p[0] + share * (p[1] - p[0]) for p in (data.shift, data.corrector, data.predictor))
    alone, trust = of_outputs(jnp.eye(1, 3, dtype=square.dtype)[0]), 1 - moved[2]
    coefficients = lambda k, first: first * alone + trust * (k[0] + first * k[1])  # first is c*_0
    corrector = coefficients(corrector, data.exists / (1 + data.q / ratio(T, data.q)))  # c*_0 = w / (q + w)
    predictor = coefficients(
        predictor, data.exists * predictor_weight(ratio(T + shift, data.q), data.q, data.following)
    )
    change = corrector - jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    trace = {"T": T, "wide": share, "trust": trust}
    return Choice(predictor, change, trace), (predictor, share, jnp.stack(moved))


def bounded(T: Any, q: Any) -> Any:
    """The nearest T that a scale has, from that of one far above kappa, w = 1; T < 0 in runs to the noise, q > 1."""
    xp, least = namespace(T, q), 2 * q**2 / (1 - q**2)
    return least + xp.sign(least) * xp.clip((T - least) * xp.sign(least), 0, 1e6)


def ratio(T: Any, q: Any) -> Any:
    """The w of T."""
    xp, T = namespace(T, q), bounded(T, q)
    return (1 + xp.sign(T) * xp.sqrt(1 + 4 * T * (T + 1) / q**2)) * q**2 / (2 * T)


def predictor_weight(w: Any, q: Any, following: Any) -> Any:
    """The predictor's c*_0 in a step of ratio `following`, of the scale of w in the step of ratio q before."""
    xp = namespace(w, q)
    part = xp.clip((q / w) ** 2, xp.minimum(q**2, 1), xp.maximum(q**2, 1))
    after = xp.sqrt((1 - part + following**2 * (part - q**2)) / (1 - q**2))  # w of the step predicted
    return (1 - following**2) * part * (1 + w) / ((1 - q**2) * (1 + after) * (following + after))


def table(schedule: Any, times: Any) -> Table:
    """Row i calls the model at t_i, corrects the step to t_i where i >= 1, and predicts the step to t_{i+1}."""
    xp = namespace(times)
    alpha, sigma, lambda_ = schedule.levels(times)
    known = xp.isfinite(lambda_)  # lambda beyond the finite ones by FAR where alpha or sigma is 0
    no_bound = xp.where(xp.any(known), xp.inf, 0.0)
    low, high = xp.min(xp.where(known, lambda_, no_bound)) - FAR, xp.max(xp.where(known, lambda_, -no_bound)) + FAR
    kappa = xp.exp(-xp.clip(lambda_, low, high))
    q, index = kappa[1:] / kappa[:-1], np.arange(times.shape[0] - 1)
    before, zero = np.maximum(index - 1, 0), xp.zeros_like(q)
    priors = zip(host_run(kappa, NARROW), host_run(kappa, WIDE), strict=True)
    log_T, shift, corrector, predictor = (xp.stack(of_both, 1) for of_both in priors)
    slope = xp.where(index == 1, SHARPNESS / xp.minimum(log_T[:, 1] - log_T[:, 0], -1e-3), 0.0)
    alpha_or_1, exists = xp.where(alpha[:-1] > 0, alpha[:-1], 1.0), xp.where(index > 0, zero + 1, zero)
    data = Data(alpha_or_1, kappa[:-1], q[before], q, exists, log_T[:, 0], slope, shift, corrector, predictor)
    amplitude = -alpha[1:] * xp.expm1(lambda_[:-1] - lambda_[1:])  # alpha_t (1 - q)
    plain = xp.stack([amplitude, *[zero] * 4], 1)
    predicts = xp.where((index == index[-1]) & (sigma[-1] == 0), 0.0, amplitude)
    corrects = xp.where(index > 0, amplitude[before], 0.0)
    return Table(times[:-1], sigma[1:] / sigma[:-1], plain, 0 * plain, data=data, predicts=predicts, corrects=corrects)


def host_run(kappa: Any, largest: float) -> tuple[Any, ...]:
    """Of one prior log |T|, and what `Data` has of it, a row each."""
    xp, dtype = namespace(kappa), kappa.dtype
    low, high = xp.log(SMALLEST * xp.minimum(kappa[0], kappa[-1])), xp.log(largest * xp.maximum(kappa[1], kappa[-2]))
    s = xp.exp(low + np.linspace(0, 1, SCALES, dtype=dtype) * (high - low))
    energy, exact = (s / s[-1])[None] ** POWER, xp.sqrt(1 + (kappa[:, None] / s[None]) ** 2)  # u* / s
    q, h = kappa[1:] / kappa[:-1], xp.abs(xp.log(kappa[1:] / kappa[:-1]))
    outputs, c, changes = [1 / exact[0], *[0 * s] * 3], xp.zeros(3, dtype), xp.zeros((3, SCALES), dtype)
    found = [(0 * h[0], 0 * h[0], xp.zeros((2, 5), dtype), xp.zeros((2, 5), dtype))]
    for i in range(1, len(q)):
        probe = q[i - 1] * exact[i - 1] + (1 - q[i - 1]) * (outputs[0] + xp.sum(c[:, None] * changes, 0))
        outputs = [probe / exact[i] ** 2, *outputs[:3]]
        changes = xp.stack([(outputs[a] - outputs[a + 1]) * float(a < i) for a in range(3)])
        noise = energy * (xp.stack([probe, exact[i]]) - outputs[0][None]) * changes[:1]
        of_probe, T = xp.sum(noise, 1) / xp.sum(energy * changes[:1] ** 2)
        longer = GROWTH * xp.maximum(h[i], 1) * xp.log(xp.maximum(h[i] / h[i - 1], 1))
        ridge = RIDGE_PREDICTOR * h[i] * xp.exp(xp.minimum(longer, MOST))
        corrector = best(exact[i - 1], outputs[1], q[i - 1], exact[i], changes, energy, RIDGE_CORRECTOR)
        predictor = best(exact[i], outputs[0], q[i], exact[i + 1], changes, energy, ridge)
        alone = predictor_weight(ratio(T, q[i - 1]), q[i - 1], q[i]) * np.eye(3, dtype=dtype)[0]
        c = predictor[0] + alone[0] * predictor[1] + alone
        log_T = xp.log(xp.abs(bounded(of_probe, q[i - 1])))
        found.append((log_T, T - of_probe, of_outputs(corrector), of_outputs(predictor)))
    return tuple(xp.stack(column) for column in zip(*found, strict=True))


def best(start: Any, m: Any, q: Any, end: Any, changes: Any, energy: Any, ridge: Any) -> Any:
    """k0 and k1 - (1, 0, 0), for a step of all scales from start to end with output m."""
    xp, weights = namespace(end), energy / end[None] ** 2
    square = xp.sum(changes**2 * weights, 1)
    unit = changes / (length := xp.sqrt(xp.where(square > 0, square, 1))[:, None])
    diagonal = np.eye(3, dtype=square.dtype) * (ridge**2 + xp.where(square > 0, 0.0, 1.0))[None]
    normal = xp.sum(unit[:, None] * unit[None] * weights[None], 2) + diagonal
    missing = (end - q * start - (1 - q) * m) / (1 - q)
    targets = xp.stack([xp.sum(unit * weights * target[None], 1) for target in (missing, -changes[0])], 1)
    return (xp.linalg.solve(normal, targets) / length).T


def of_outputs(c: Any) -> Any:
    """Coefficients (..., 3) of the differences as (..., 5) of the outputs they are of."""
    xp, none = namespace(c), 0 * c[..., :1]
    return xp.concatenate([c, none, none], -1) - xp.concatenate([none, c, none], -1)
