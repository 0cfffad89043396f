"""Schedules in continuous time: variance-exploding, variance-preserving, flow, and from a log-SNR."""

import functools
import math
from collections.abc import Callable
from typing import Any

from evodiff_jax.numerics import checked_arguments, factory, namespace
from evodiff_jax.schedules._schedule import NoiseSchedule, ScheduleFn
from evodiff_jax.types import check_function


@factory
def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
    """The variance-exploding schedule of EDM: alpha = 1, sigma = t (Karras et al. 2022, arXiv 2206.00364).

    Args:
      sigma_min: the noise level at which sampling ends, and t_min.
      sigma_max: the noise level at which it starts, and t_max.

    Raises:
      ValueError: unless 0 <= sigma_min < sigma_max.
    """
    if not 0 <= sigma_min < sigma_max:
        raise ValueError(f"edm needs 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return NoiseSchedule(_one, _same, t_min=sigma_min, t_max=sigma_max, time=_kappa)


@factory
def ve(sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 0.0, t_max: float = 1.0) -> NoiseSchedule:
    """The variance-exploding schedule in the time of score SDEs (Song et al. 2021, arXiv 2011.13456, Eq. 30).

    alpha = 1 and sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    Args:
      sigma_min: sigma(0).
      sigma_max: sigma(1).
      t_min: the time at which sampling ends.
      t_max: the time at which it starts.

    Raises:
      ValueError: unless 0 < sigma_min < sigma_max and t_min < t_max.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"ve needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    logs = math.log(sigma_min), math.log(sigma_max / sigma_min)
    sigma, time = functools.partial(_ve_sigma, *logs), functools.partial(_ve_time, *logs)
    return NoiseSchedule(_one, sigma, t_min=t_min, t_max=t_max, time=time)


@factory
def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3, t_max: float = 1.0) -> NoiseSchedule:
    """The variance-preserving schedule whose beta grows linearly (Song et al. 2021, arXiv 2011.13456, appendix B).

    log alpha(t) = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2 and sigma^2 = 1 - alpha^2.

    Args:
      beta_min: beta(0).
      beta_max: beta(1).
      t_min: the time at which sampling ends.
      t_max: the time at which it starts.

    Raises:
      ValueError: unless 0 <= beta_min <= beta_max, beta_max > 0 and 0 <= t_min < t_max.
    """
    return _linear_beta("vp_linear", _vp_sigma, _vp_half, beta_min, beta_max, t_min, t_max)


@factory
def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3, t_max: float = 1.0) -> NoiseSchedule:
    """The sub-variance-preserving schedule with linear beta (Song et al. 2021, arXiv 2011.13456, Eq. 29).

    alpha is that of `vp_linear` and sigma = 1 - alpha^2.

    Args:
      beta_min: beta(0).
      beta_max: beta(1).
      t_min: the time at which sampling ends.
      t_max: the time at which it starts.

    Raises:
      ValueError: unless 0 <= beta_min <= beta_max, beta_max > 0 and 0 <= t_min < t_max.
    """
    return _linear_beta("sub_vp", _sub_vp_sigma, _sub_vp_half, beta_min, beta_max, t_min, t_max)


@factory
def vp_cosine(s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> NoiseSchedule:
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17), variance-preserving.

    alpha(t) = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)) and sigma^2 = 1 - alpha^2.

    Args:
      s: the offset, which keeps the noise at small t from vanishing.
      t_min: the time at which sampling ends.
      t_max: the time at which it starts; at 1 alpha is 0. The default is where the log-SNR ends that continuous-time
        solvers use (arXiv 2206.00927, appendix D.4).

    Raises:
      ValueError: unless s >= 0 and 0 <= t_min < t_max <= 1.
    """
    if not (s >= 0 and 0 <= t_min < t_max <= 1):
        raise ValueError(f"vp_cosine needs s >= 0 and 0 <= t_min < t_max <= 1, got s={s}, t_min={t_min}, t_max={t_max}")
    angles = math.pi / 2 / (1 + s), math.pi / 2 / (1 + s) * s
    alpha, sigma, time = (functools.partial(fn, *angles) for fn in (_cosine_alpha, _cosine_sigma, _cosine_time))
    return NoiseSchedule(alpha, sigma, t_min=t_min, t_max=t_max, time=time)


@factory
def flow(shift: float = 1.0, t_min: float = 1e-3, t_max: float = 0.999) -> NoiseSchedule:
    """The straight path of rectified flow, alpha = 1 - sigma, whose times can be shifted towards noise.

    sigma(t) = shift t / (1 + (shift - 1) t): with shift 1 sigma = t; large images, which keep more of their signal at
    one noise level, take a larger shift. Networks of this family are trained with sigma for their time: beside a shift
    give `denoisers.from_prediction` time="sigma".

    Args:
      shift: a number (3 for Stable Diffusion 3), or what `resolution_shift` or `sequence_shift` returns.
      t_min: the time at which sampling ends; at 0 sigma is 0.
      t_max: the time at which it starts; at 1 alpha is 0, where no solver that works with noise predictions can start
        and no grid in the log-SNR.

    Raises:
      ValueError: unless shift > 0 and 0 <= t_min < t_max <= 1.

    References:
      Liu, Gong, Liu, arXiv 2209.03003; the shift is that of Esser et al., arXiv 2403.03206, Eq. 23.
    """
    if not (shift > 0 and 0 <= t_min < t_max <= 1):
        raise ValueError(f"flow needs shift > 0 and 0 <= t_min < t_max <= 1, got {shift}, {t_min} and {t_max}")
    alpha, sigma, time = (functools.partial(fn, shift) for fn in (_flow_alpha, _flow_sigma, _flow_time))
    return NoiseSchedule(alpha, sigma, t_min=t_min, t_max=t_max, time=time)


@checked_arguments
def resolution_shift(tokens: float, base_tokens: float, base_shift: float = 1.0) -> float:
    """The shift that gives a larger image the signal of a base size: base_shift sqrt(tokens / base_tokens).

    Args:
      tokens: the number of pixels, or of tokens, of the images to be sampled.
      base_tokens: the same of images that take `base_shift`.
      base_shift: the shift at the base size.

    Raises:
      ValueError: unless all are positive.

    References:
      Esser et al., arXiv 2403.03206, Eq. 23.

    Examples:
      >>> resolution_shift(64 * 64, base_tokens=32 * 32, base_shift=1.5)
      3.0
    """
    if not (tokens > 0 and base_tokens > 0 and base_shift > 0):
        raise ValueError(f"resolution_shift needs positive numbers, got {tokens}, {base_tokens} and {base_shift}")
    return base_shift * math.sqrt(tokens / base_tokens)


@checked_arguments
def sequence_shift(
    tokens: float,
    base_tokens: float = 256,
    max_tokens: float = 4096,
    base_log_shift: float = 0.5,
    max_log_shift: float = 1.15,
) -> float:
    """The shift e^mu with mu linear in the length of the sequence, as the Flux models take it.

    Args:
      tokens: the length of the sequence of image tokens.
      base_tokens: where mu is `base_log_shift`.
      max_tokens: where mu is `max_log_shift`.
      base_log_shift: mu of short sequences.
      max_log_shift: mu of long ones.

    Raises:
      ValueError: when tokens is not positive or base_tokens and max_tokens are equal.

    Examples:
      >>> round(sequence_shift(4096), 4)
      3.1582
    """
    if not tokens > 0 or base_tokens == max_tokens:
        raise ValueError(
            "sequence_shift needs tokens > 0 and base_tokens different from max_tokens, got "
            f"tokens={tokens}, base_tokens={base_tokens}, max_tokens={max_tokens}"
        )
    log_shift = base_log_shift + (max_log_shift - base_log_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    if not abs(log_shift) < 100:
        raise ValueError(f"sequence_shift needs a log-shift within -100 .. 100, got {log_shift} for tokens={tokens}")
    return math.exp(log_shift)


@checked_arguments
def from_log_snr(log_snr: ScheduleFn, t_min: float, t_max: float, time: ScheduleFn | None = None) -> NoiseSchedule:
    """The variance-preserving schedule with a log-SNR of your own: alpha^2 = sigmoid(log_snr), sigma^2 = 1 - alpha^2.

    For another scale of the state, such as alpha = 1, give `NoiseSchedule` alpha and sigma.

    Args:
      log_snr: log(alpha^2 / sigma^2), elementwise and decreasing in t, in NumPy, jax.numpy or plain arithmetic.
      t_min: the time at which sampling ends.
      t_max: the time at which it starts.
      time: the inverse of lambda = log_snr / 2; left out, it is found by bisection.

    Raises:
      ValueError: as `NoiseSchedule`.

    Examples:
      >>> schedule = from_log_snr(lambda t: 10 - 20 * t, t_min=0.0, t_max=1.0)
      >>> round(float(schedule.time(schedule.lambda_(0.3))), 6)
      0.3
    """
    check_function("log_snr", log_snr, "log_snr(t)")
    alpha, sigma = (functools.partial(_root_sigmoid, log_snr, sign) for sign in (1, -1))
    return NoiseSchedule(alpha, sigma, t_min, t_max, time)  # pyright: ignore[reportArgumentType]


# The functions of the schedules stand here, at the top of the module, so that schedules can be pickled.


def _one(t: Any) -> Any:
    return namespace(t).ones_like(t)


def _same(t: Any) -> Any:
    return t


def _kappa(lambda_: Any) -> Any:
    return namespace(lambda_).exp(-lambda_)


def _ve_sigma(log_min: float, log_ratio: float, t: Any) -> Any:
    return namespace(t).exp(log_min + log_ratio * t)


def _ve_time(log_min: float, log_ratio: float, lambda_: Any) -> Any:
    return (-lambda_ - log_min) / log_ratio


def _linear_beta(
    name: str,
    sigma: Callable[..., Any],
    half: Callable[[Any], Any],
    beta_min: float,
    beta_max: float,
    t_min: float,
    t_max: float,
) -> NoiseSchedule:
    """The schedule of a beta that grows linearly, from sigma(t) and from -2 log alpha as a function of lambda."""
    if not 0 <= beta_min <= beta_max or not beta_max > 0:
        raise ValueError(
            f"{name} needs 0 <= beta_min <= beta_max and beta_max > 0, got beta_min={beta_min}, beta_max={beta_max}"
        )
    if not 0 <= t_min < t_max:
        raise ValueError(f"{name} needs 0 <= t_min < t_max, got t_min={t_min}, t_max={t_max}")
    parameters = beta_min, beta_max - beta_min
    return NoiseSchedule(
        alpha=functools.partial(_vp_alpha, *parameters),
        sigma=functools.partial(sigma, *parameters),
        t_min=t_min,
        t_max=t_max,
        time=functools.partial(_vp_time, half, *parameters),
    )


def _log_alpha(beta_min: float, slope: float, t: Any) -> Any:
    return -(slope * t / 4 + beta_min / 2) * t


def _vp_alpha(beta_min: float, slope: float, t: Any) -> Any:
    return namespace(t).exp(_log_alpha(beta_min, slope, t))


def _vp_sigma(beta_min: float, slope: float, t: Any) -> Any:
    xp = namespace(t)
    return xp.sqrt(-xp.expm1(2 * _log_alpha(beta_min, slope, t)))


def _sub_vp_sigma(beta_min: float, slope: float, t: Any) -> Any:
    return -namespace(t).expm1(2 * _log_alpha(beta_min, slope, t))


def _vp_half(lambda_: Any) -> Any:
    """-2 log alpha = log(1 + e^(-2 lambda))."""
    xp = namespace(lambda_)
    return xp.logaddexp(-2 * lambda_, xp.zeros_like(lambda_))


def _sub_vp_half(lambda_: Any) -> Any:
    """-2 log alpha, from sigma / alpha = 1 / alpha - alpha = 2 sinh(-log alpha)."""
    xp = namespace(lambda_)
    return 2 * xp.arcsinh(xp.exp(-lambda_) / 2)


def _vp_time(half: Callable[[Any], Any], beta_min: float, slope: float, lambda_: Any) -> Any:
    minus_two_log_alpha = half(lambda_)  # the root of a quadratic in the form that does not cancel
    root = namespace(lambda_).sqrt(beta_min**2 + 2 * slope * minus_two_log_alpha)
    return 2 * minus_two_log_alpha / (root + beta_min)


def _cosine_alpha(scale: float, offset: float, t: Any) -> Any:
    return namespace(t).sin(scale * (1 - t)) / math.cos(offset)


def _cosine_sigma(scale: float, offset: float, t: Any) -> Any:
    """From cos^2(b) - cos^2(a + b) = sin(a) sin(a + 2 b), which does not cancel."""
    xp = namespace(t)
    return xp.sqrt(xp.sin(scale * t) * xp.sin(scale * t + 2 * offset)) / math.cos(offset)


def _cosine_time(scale: float, offset: float, lambda_: Any) -> Any:
    xp = namespace(lambda_)
    half = _vp_half(lambda_) / 2  # -log alpha
    cosine = math.cos(offset) * xp.exp(-half)
    sine = xp.sqrt(math.sin(offset) ** 2 + math.cos(offset) ** 2 * -xp.expm1(-2 * half))
    return 1 - xp.arctan2(cosine, sine) / scale


def _flow_alpha(shift: float, t: Any) -> Any:
    return (1 - t) / (1 + (shift - 1) * t)


def _flow_sigma(shift: float, t: Any) -> Any:
    return shift * t / (1 + (shift - 1) * t)


def _flow_time(shift: float, lambda_: Any) -> Any:
    return 1 / (1 + shift * namespace(lambda_).exp(lambda_))


def _root_sigmoid(log_snr: ScheduleFn, sign: int, t: Any) -> Any:
    value = sign * log_snr(t)
    xp = namespace(value)
    return xp.exp(-xp.logaddexp(xp.zeros_like(value), -value) / 2)
