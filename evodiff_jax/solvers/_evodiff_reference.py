"""EVODiff as released: predictor and corrector with coefficients in closed form from inner products of model outputs.

Notation, for the step from t_0 (alpha_0, sigma_0) to t (alpha_t, sigma_t), with the time t_1 before t_0, the model
outputs m_t, m_0, m_1 there, kappa = sigma / alpha, lambda = -log kappa and

    h   = 1/kappa_t - 1/kappa_0                     A = sigma_t h = -alpha_t expm1(lambda_0 - lambda_t)
    r   = (lambda_0 - lambda_1) / (lambda_t - lambda_0)
    x_e = (sigma_t / sigma_0) x + A m_0             (DDIM)
    rho_1 = (1 - w) b + w <m_0, m_1> / <m_1, m_1>   D_1 = m_0 - rho_1 m_1       (balanced differences)
    rho_2 = (1 - w) b + w <m_t, m_0> / <m_0, m_0>   D_2 = m_t - rho_2 m_0

each step first probes x_p = x_e + A / (2 r_i) D_1 with r_i = r sigmoid(|rho_1| / 4), calls the model there, and then
corrects, with no further call, to

    x = x_e + A / (2 zeta) B                        B = r (1 - eta) D_2 - (eta / r) D_1

where zeta and eta minimise the conditional variance of the step in closed form. With B+ = r D_2, B- = D_1 / r and
P = A / (2 r_i) (D_1 - B),

    eta*  = <B+ + B-, B+ - B-> / (2 |B+ - B-|^2)    eta  = sigmoid(|eta*|) / 2
    zeta* = <P, D_1> / (A |D_1|^2)                  zeta = sigmoid(|zeta*| - 1/2)

and every ratio of inner products is clipped to [-2, 2]. The first step is DDIM, the last one makes no call. All of it
is linear in the outputs, so that a step is one row of a table whose coefficients come from a Gram matrix.

Li, Lin, Yang, Zhang, Zhang, "EVODiff: Entropy-aware Variance Optimized Diffusion Inference", NeurIPS 2025,
arXiv 2509.26096.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.gram import Gram
from evodiff_jax.numerics import namespace
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers._quadrature import finite
from evodiff_jax.tables import Coefficients, Solver, Table

_CLIP = 2.0
_FEW_STEPS = 20  # the released code switches the form of zeta above this many steps


class Step(NamedTuple):
    """The schedule scalars of one step, or arrays of them for all steps of a run."""

    amplitude: Any  # A = sigma_t h
    h: Any
    ratio: Any  # r
    weight: Any  # w
    balance: Any  # b
    sigma_ratio: Any  # sigma_t / sigma_0
    few_steps: Any  # 1 for runs of at most 20 steps, else 0


class Steps(NamedTuple):
    """The step that a row corrects and the step that it predicts."""

    corrected: Step
    predicted: Step


@functools.cache
def evodiff_reference(channel_axis: int | None = -1, per_leaf: bool = True) -> Solver:
    """EVODiff exactly as released (EDM-style, second order), for reproduction: one model call a step.

    Where an inner product in a denominator vanishes the released code returns NaN; here the ratio is 0.

    Args:
      channel_axis: the axis of the state that holds channels, whose coefficients are chosen separately as in the
        released code; None for one choice per sample as the paper writes it. States of fewer than three axes
        have no channel axis.
      per_leaf: as for `evodiff`, with channel_axis=None where it is False.

    Returns:
      The solver. NFE: N for N steps.

    Raises:
      ValueError: when per_leaf is False and channel_axis is not None.

    References:
      arXiv 2509.26096, algorithm 1, and the authors' public code.
    """
    check_leaves("evodiff_reference", channel_axis, per_leaf)
    return Solver("evodiff_reference", _table, _rule, channel_axis, per_leaf)


def check_leaves(name: str, channel_axis: int | None, per_leaf: bool) -> None:
    """Raises ValueError for inner products over whole samples that are to be separate for channels."""
    if channel_axis is not None and not per_leaf:
        raise ValueError(
            f"{name} with per_leaf=False sums inner products over the whole sample: "
            f"it needs channel_axis=None, got {channel_axis}"
        )


def _table(schedule: NoiseSchedule, times: Any) -> Table:
    """Row i calls the model at t_i, corrects the step to t_i where i >= 2, and predicts the step to t_{i+1}."""
    xp = namespace(times)
    alpha, sigma, lambda_ = schedule.levels(times)
    num_steps = times.shape[0] - 1
    ones = xp.ones_like(lambda_[1:])
    sigma_ratio = sigma[1:] / sigma[:-1]
    amplitude = -alpha[1:] * xp.expm1(lambda_[:-1] - lambda_[1:])
    # Steps 2 .. N-1 are adaptive, unless the one before starts at alpha = 0, infinitely far in lambda.
    index = np.arange(1, num_steps + 1)
    before = np.maximum(index - 2, 0)
    probes = (index > 1) & (index < num_steps) & xp.isfinite(lambda_[before])
    safe_lambda = finite(lambda_)
    gap = safe_lambda[1:] - safe_lambda[:-1]
    of_probes = lambda values: xp.where(probes, values, ones)  # noqa: E731
    step = Step(
        amplitude=amplitude,
        h=of_probes(xp.exp(safe_lambda[1:]) - xp.exp(safe_lambda[:-1])),
        ratio=of_probes(gap[before] / gap),
        weight=(1 - ((times[1:] + times[-1]) / (times[0] + times[-1])) ** 2) / 2,
        balance=xp.sqrt(of_probes(sigma_ratio) / of_probes(sigma_ratio[before])),
        sigma_ratio=sigma_ratio,
        few_steps=ones * (num_steps <= _FEW_STEPS),
    )
    corrects = xp.concatenate([probes[:1], probes[:-1]])  # the first step is never adaptive
    zero = xp.zeros_like(ones)
    transition, first, second = sigma_ratio, amplitude, zero
    if num_steps > 1:
        last = np.arange(num_steps) == num_steps - 1
        root = xp.sqrt(xp.where(sigma_ratio < 0.5, sigma_ratio, xp.abs(sigma_ratio - 0.5)))
        scale = xp.where(last, 1 - xp.sqrt(sigma[1:] * sigma[:-1]), 1.0)
        transition = scale * sigma_ratio
        first = scale * amplitude + xp.where(last, amplitude / 2, 0.0)
        second = xp.where(last, -amplitude / 2 * (1 - root / 2), 0.0)
    return Table(
        time=times[:-1],
        transition=transition,
        predictor=xp.stack([first, second, zero], axis=-1),
        corrector=xp.stack([zero, zero, zero], axis=-1),
        adaptive=xp.stack([corrects, probes], axis=-1) * ones[:, None],
        rule=Steps(jax.tree.map(lambda a: a[before], step), step),
    )


def _rule(steps: Steps, gram: Gram, memory: Any) -> tuple[Coefficients, Any]:
    """The corrector of the last step and the probe of the next, as coefficients of the outputs (newest first)."""
    step, (norm_t, norm_0, norm_1) = steps.corrected, gram.norms
    # u = 1 - rho is known more exactly than rho, which is near 1, and it is what norms enter with.
    u1 = _one_minus_rho(step, norm_0, norm_1, gram.distance(1, 2))
    u2 = _one_minus_rho(step, norm_t, norm_0, gram.distance(0, 1))
    d1, d2 = (0.0, 1.0, u1 - 1), (1.0, u2 - 1, 0.0)
    d1_d1, d1_d2, d2_d2 = gram.inner(d1, d1, u1, u1), gram.inner(d1, d2, u1, u2), gram.inner(d2, d2, u2, u2)

    r = step.ratio
    forward, backward = r**2 * d2_d2, d1_d1 / r**2
    eta = jax.nn.sigmoid(jnp.abs(_clipped_ratio(forward - backward, forward - 2 * d1_d2 + backward) / 2)) / 2
    probe_ratio = _probe_ratio(step, u1)
    # <P, D_1> / <D_1, D_1> with P = gain / (2 r_i) (D_1 - B)
    projection = step.amplitude / (2 * probe_ratio) * (d1_d1 * (1 + eta / r) - r * (1 - eta) * d1_d2)
    zeta_star = _clipped_ratio(projection, d1_d1) / step.amplitude
    curvature = _clipped_ratio(step.h * (norm_0 - norm_1 + gram.distance(1, 2)) / 2, gram.distance(1, 2))
    many = -jax.nn.sigmoid(curvature * (2 - step.sigma_ratio**2))
    sharpness = jnp.where(step.few_steps > 0, 1.0, many)
    zeta = jax.nn.sigmoid((jnp.abs(zeta_star) - 0.5) * sharpness)

    half_step = step.amplitude / (2 * zeta)
    on_d2, on_d1 = half_step * r * (1 - eta), -half_step * eta / r - step.amplitude / (2 * probe_ratio)
    corrector = tuple(on_d2 * b + on_d1 * a for a, b in zip(d1, d2, strict=True))

    # In the next step m_t and m_0 are what m_0 and m_1 are in this one.
    step = steps.predicted
    u1 = _one_minus_rho(step, norm_t, norm_0, gram.distance(0, 1))
    half_probe = step.amplitude / (2 * _probe_ratio(step, u1))
    predictor = (half_probe, half_probe * (u1 - 1), 0.0)
    return Coefficients(predictor, corrector, {"zeta": zeta, "eta": eta}), memory


def _one_minus_rho(step: Step, norm_new: Any, norm_old: Any, distance: Any) -> Any:
    """1 - rho for rho = (1 - w) b + w clip(<new, old> / <old, old>)."""
    projection = _clipped_ratio((norm_new - norm_old - distance) / 2, norm_old, -_CLIP - 1, _CLIP - 1)
    return (1 - step.weight) * (1 - step.balance) - step.weight * projection


def _probe_ratio(step: Step, one_minus_rho: Any) -> Any:
    """r_i."""
    return jax.nn.sigmoid(jnp.abs(1 - one_minus_rho) / 4) * step.ratio


def _clipped_ratio(numerator: Any, denominator: Any, low: float = -_CLIP, high: float = _CLIP) -> Any:
    """clip(numerator / denominator, low, high), 0 where the denominator, a squared norm, vanishes.

    Clipping before the division keeps values and gradients finite for any denominator above the threshold.
    """
    denominator = jnp.asarray(denominator)
    positive = denominator > 10 * jnp.sqrt(jnp.finfo(denominator.dtype).tiny)
    safe = jnp.where(positive, denominator, 1)
    return jnp.where(positive, jnp.clip(numerator, low * safe, high * safe) / safe, 0)
