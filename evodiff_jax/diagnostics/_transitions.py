"""The reverse transition from one noise level to a lower one: its variance, its entropy, what it tells of the data.

For t > s, kappa = sigma / alpha and q = kappa_s / kappa_t, the transition with the data known is normal,

    x_s | x_t, x_0 ~ N((alpha_s / alpha_t) q^2 x_t + alpha_s (1 - q^2) x_0,  sigma_s^2 (1 - q^2) I),

so that by the law of total variance the reverse transition x_s | x_t has

    Cov[x_s | x_t] = sigma_s^2 (1 - q^2) I + alpha_s^2 (1 - q^2)^2 Cov[x_0 | x_t].

Its entropy, if it were normal of that covariance (an upper bound of the true one), is 1/2 log det(2 pi e Cov). With V
the mean posterior variance per coordinate, `posterior_variance`, in the place of the covariance it is per coordinate

    H = 1/2 log(2 pi e (sigma_s^2 (1 - q^2) + alpha_s^2 (1 - q^2)^2 V)),

again an upper bound, as a log-determinant is concave. The conditional entropy H(x_{t_i} | x_{t_{i+1}}) of the reverse
transition and the conditional variance it follows from under the normal approximation are the objectives of Li, Chen,
Zeng, "EVODiff", NeurIPS 2025, arXiv 2509.26096; the transition with the data known is that of
Ho, Jain, Abbeel, arXiv 2006.11239, Eqs. 6 and 7, and of Kingma, Salimans, Poole, Ho, arXiv 2107.00630, appendix A.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from evodiff_jax.diagnostics._states import check_time
from evodiff_jax.numerics import at_least_float32
from evodiff_jax.schedules import NoiseSchedule, expect_schedule

_ENTROPY_OF_UNIT_VARIANCE = 0.5 * math.log(2 * math.pi * math.e)


class Transition(NamedTuple):
    """Scalars of a reverse transition.

    Attributes:
      known: sigma_s^2 (1 - q^2), the variance with the data known.
      gain: (alpha_s (1 - q^2))^2, the factor of the posterior covariance.
    """

    known: Any
    gain: Any


def transition_variance(schedule: NoiseSchedule, t: Any, s: Any, variance: Any) -> jax.Array:
    """The variance of the reverse transition, sigma_s^2 (1 - q^2) + alpha_s^2 (1 - q^2)^2 V.

    Args:
      schedule: the noise schedule.
      t: the time of the state, a scalar.
      s: the time of the next state, below t.
      variance: V, the posterior variance at t, of any shape: a mean (B,) or that of every coordinate.

    Returns:
      The variance, like V.

    Raises:
      TypeError: when the schedule is something else, or a time no number.
      ValueError: when a concrete time is outside the schedule, or s is not below t.
    """
    variance = jnp.asarray(variance)
    found = _transition(schedule, t, s, at_least_float32(variance.dtype))
    return found.known + found.gain * variance


def transition_entropy(schedule: NoiseSchedule, t: Any, s: Any, variance: Any) -> jax.Array:
    """The conditional entropy of the reverse transition under the normal approximation, in nats per coordinate.

    1/2 log(2 pi e (sigma_s^2 (1 - q^2) + alpha_s^2 (1 - q^2)^2 V)).

    Args:
      schedule: the noise schedule.
      t: the time of the state, a scalar.
      s: the time of the next state, below t.
      variance: V, the posterior variance at t: a mean (B,) for the entropy per coordinate of each sample, or that of
        every coordinate for the entropy of every coordinate.

    Returns:
      The entropy, like V; NaN where a network's V is so negative that the variance is.

    Raises:
      TypeError: as `transition_variance`.
      ValueError: as `transition_variance`.

    Examples:
      >>> import evodiff_jax as ed
      >>> transition_entropy(ed.schedules.edm(), 2.0, 1.0, 0.8).round(4)
      Array(1.5101, dtype=float32)
    """
    return _ENTROPY_OF_UNIT_VARIANCE + 0.5 * jnp.log(transition_variance(schedule, t, s, variance))


def transition_entropy_of_covariance(schedule: NoiseSchedule, t: Any, s: Any, covariance: Any) -> jax.Array:
    """The conditional entropy of the reverse transition from the whole posterior covariance, per coordinate.

    log det(2 pi e (sigma_s^2 (1 - q^2) I + alpha_s^2 (1 - q^2)^2 C)) / (2 D) with C made symmetric.

    Args:
      schedule: the noise schedule.
      t: the time of the state, a scalar.
      s: the time of the next state, below t.
      covariance: (B, D, D), C, from `posterior_covariance`.

    Returns:
      (B,), in nats per coordinate; NaN where the covariance of a network's transition is not positive.

    Raises:
      TypeError: as `transition_variance`.
      ValueError: as `transition_variance`, or when the covariance is not (B, D, D).
    """
    covariance = jnp.asarray(covariance)
    if covariance.ndim != 3 or covariance.shape[1] != covariance.shape[2]:
        raise ValueError(f"covariance must be (B, D, D), from posterior_covariance, got shape {covariance.shape}")
    size = covariance.shape[1]
    found = _transition(schedule, t, s, at_least_float32(covariance.dtype))
    whole = found.known * jnp.eye(size, dtype=covariance.dtype) + found.gain * (
        covariance + jnp.swapaxes(covariance, 1, 2)
    ) * jnp.asarray(0.5, covariance.dtype)
    return _ENTROPY_OF_UNIT_VARIANCE + 0.5 * jnp.sum(jnp.log(jnp.linalg.eigvalsh(whole)), 1) / size


def transition_information(schedule: NoiseSchedule, t: Any, s: Any, variance: Any) -> jax.Array:
    """What a reverse transition tells about the data under the normal approximation, in nats per coordinate.

    I(x_s; x_0 | x_t) = H(x_s | x_t) - H(x_s | x_t, x_0) = 1/2 log(1 + (1 - q^2) V / kappa_s^2). It does not depend on
    the units of the state, and summed over a run it is the information about the data that the run ends with, less that
    of its start. Steps of equal information are the entropic times of Stancevic, Handke, Ambrogioni, arXiv 2504.13612.

    Args:
      schedule: the noise schedule.
      t: the time of the state, a scalar.
      s: the time of the next state, below t, with sigma(s) > 0.
      variance: V, the posterior variance at t.

    Returns:
      The information, like V; infinite where sigma(s) is 0.

    Raises:
      TypeError: as `transition_variance`.
      ValueError: as `transition_variance`.
    """
    variance = jnp.asarray(variance)
    found = _transition(schedule, t, s, at_least_float32(variance.dtype))
    return 0.5 * jnp.log1p(found.gain / found.known * variance)


def _transition(schedule: NoiseSchedule, t: Any, s: Any, dtype: Any) -> Transition:
    expect_schedule(schedule)
    t, s = check_time(schedule, t, "t"), check_time(schedule, s, "s")
    if not any(isinstance(time, Tracer) for time in (t, s)) and not s < t:
        raise ValueError(f"s must be below t, got s = {float(s):g} and t = {float(t):g}")
    start, end = schedule.levels(t), schedule.levels(s)
    # 1 - q^2 without cancellation; a start at alpha = 0 or an end at sigma = 0 is infinitely far in lambda, q = 0.
    remaining = -jnp.expm1(2 * jnp.asarray(start.lambda_ - end.lambda_, dtype))
    alpha, sigma = jnp.asarray(end.alpha, dtype), jnp.asarray(end.sigma, dtype)
    return Transition(sigma**2 * remaining, (alpha * remaining) ** 2)
