"""EVODiff, the paper's solver: predictor and corrector with coefficients in closed form from products of model outputs.

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

and every ratio of inner products is clipped to [-2, 2]. In runs of more than 20 steps

    zeta  = sigmoid(-(|zeta*| - 1/2) c)             c = sigmoid(clip(<m_0, D> / <D, D>) (2 - (sigma_t / sigma_0)^2))

with D = (m_0 - m_1) / h. w = (1 - ((t + t_N) / (t_0' + t_N))^2) / 2 with the first time t_0' and the last t_N of the
run, and b = sqrt((sigma_t / sigma_0) / (sigma_0 / sigma_1)). The first step is DDIM. The last one makes no call; as
released it is

    x = f x_e + A / 2 (m_0 - g m_1)                 f = 1 - sqrt(sigma_t sigma_0)
                                                    g = 1 - sqrt(q) / 2 if q < 1/2 else 1 - sqrt(q - 1/2) / 2

with q = sigma_t / sigma_0. All of it is linear in the outputs, so that a step is one row of a table whose coefficients
a rule chooses from inner products. These are taken from squared norms N_i = |m_i|^2 and squared distances D_ij =
|m_i - m_j|^2: adjacent outputs differ little, and products of their differences are not recovered from products of the
outputs in float32.

Li, Chen, Zeng, "EVODiff: Entropy-aware Variance Optimized Diffusion Inference", NeurIPS 2025,
arXiv 2509.26096.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import factory, namespace
from evodiff_jax.quadrature import check_choice, finite
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Choice, Rule, Solver, Table, exportable

_CLIP = 2.0  # of every ratio of inner products, as released
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


class Memory(NamedTuple):
    """N_0, N_1 and D_01 of the row before: with this row's sums they are all products of three outputs."""

    norm_new: Any
    norm_old: Any
    distance: Any


exportable(Step, Steps, Memory)


@factory
def evodiff(channel_axis: int | None = -1, per_leaf: bool = True, last_step: str = "ddim") -> Solver:
    """EVODiff as published (EDM style, second order): one model call a step.

    Coefficients are as in the authors' release, reproduced to 1e-10 in float64. Where an inner product in a denominator
    vanishes the release returns NaN; here the ratio is 0.

    Args:
      channel_axis: the axis of the state that holds channels, whose coefficients are chosen separately as in the
        released code; None for one choice per sample as the paper writes it. States of fewer than three axes
        have no channel axis.
      per_leaf: for states that are pytrees, whether each leaf has coefficients of its own; if not, inner products are
        summed over the leaves, which takes channel_axis=None.
      last_step: "ddim", or "released". The release's last step multiplies the sample by 1 - sqrt(sigma_t sigma_0):
        harmless at EDM's sigma_min of 0.002, ruinous for a model that ends at sigma = 0.1. "released" is for
        reproduction.

    Returns:
      The solver. NFE: N for N steps. Its order of convergence is 1.

    Raises:
      ValueError: when per_leaf is False and channel_axis is not None, or for another last_step.

    References:
      Li, Chen, Zeng, arXiv 2509.26096, algorithm 1, and the authors' public code.
    """
    check_choice("evodiff", "last_step", last_step, ("ddim", "released"))
    table = _released_table if last_step == "released" else _table
    rule = Rule(_terms, _choose, _init, channel_axis, per_leaf)
    return Solver("evodiff", table, rule, keeps_constants=last_step != "released")


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
    of_probes = lambda values: xp.where(probes, values, ones)
    step = Step(
        amplitude=amplitude,
        h=of_probes(xp.exp(safe_lambda[1:]) - xp.exp(safe_lambda[:-1])),
        ratio=of_probes(gap[before] / gap),
        weight=(1 - ((times[1:] + times[-1]) / (times[0] + times[-1])) ** 2) / 2,
        balance=xp.sqrt(of_probes(sigma_ratio) / of_probes(sigma_ratio[before])),
        sigma_ratio=sigma_ratio,
        few_steps=ones * float(num_steps <= _FEW_STEPS),
    )
    zero = xp.zeros_like(ones)
    corrects = xp.concatenate([probes[:1], probes[:-1]])  # the first step is never adaptive
    return Table(
        time=times[:-1],
        transition=sigma_ratio,
        predictor=xp.stack([amplitude, zero, zero], axis=-1),
        corrector=xp.stack([zero, zero, zero], axis=-1),
        data=Steps(jax.tree.map(lambda a: a[before], step), step),
        predicts=xp.where(probes, ones, zero),
        corrects=xp.where(corrects, ones, zero),
    )


def _released_table(schedule: NoiseSchedule, times: Any) -> Table:
    """The same with the release's last step, where there is more than one."""
    table = _table(schedule, times)
    xp, num_steps = namespace(times), table.time.shape[0]
    if num_steps == 1:
        return table
    sigma, ratio, amplitude = schedule.levels(times).sigma, table.transition, table.predictor[:, 0]
    last = np.arange(num_steps) == num_steps - 1
    root = xp.sqrt(xp.where(ratio < 0.5, ratio, xp.abs(ratio - 0.5)))
    scale = xp.where(last, 1 - xp.sqrt(sigma[1:] * sigma[:-1]), 1.0)
    first = scale * amplitude + xp.where(last, amplitude / 2, 0.0)
    second = xp.where(last, -amplitude / 2 * (1 - root / 2), 0.0)
    predictor = xp.stack([first, second, xp.zeros_like(first)], axis=-1)
    return table._replace(transition=scale * ratio, predictor=predictor)


def _init(steps: Steps) -> Memory:
    return Memory(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def _terms(steps: Steps, x: Any, output: Any) -> tuple[Any, Any, Any]:
    """The terms of N_0, D_01 and D_02."""
    newest = output(0)
    return jnp.square(newest), jnp.square(newest - output(1)), jnp.square(newest - output(2))


def _choose(steps: Steps, sums: tuple[Any, ...], memory: Memory) -> tuple[Choice, Memory]:
    """The corrector of the last step and the probe of the next, as coefficients of the outputs (newest first)."""
    norm_t, distance_t0, distance_t1 = sums
    norm_0, norm_1, distance_01 = memory
    norms, distances = (norm_t, norm_0, norm_1), (distance_t0, distance_t1, distance_01)
    step = steps.corrected
    # u = 1 - rho is known more exactly than rho, which is near 1, and it is what norms enter with.
    u1 = _one_minus_rho(step, norm_0, norm_1, distance_01)
    u2 = _one_minus_rho(step, norm_t, norm_0, distance_t0)
    d1, d2 = (0.0, 1.0, u1 - 1), (1.0, u2 - 1, 0.0)
    product = lambda a, b, sum_a, sum_b: _product(a, b, sum_a, sum_b, norms, distances)
    d1_d1, d1_d2, d2_d2 = product(d1, d1, u1, u1), product(d1, d2, u1, u2), product(d2, d2, u2, u2)

    r = step.ratio
    forward, backward = r**2 * d2_d2, d1_d1 / r**2
    eta = jax.nn.sigmoid(jnp.abs(_clipped_ratio(forward - backward, forward - 2 * d1_d2 + backward) / 2)) / 2
    probe_ratio = _probe_ratio(step, u1)
    # <P, D_1> / <D_1, D_1> with P = A / (2 r_i) (D_1 - B)
    projection = step.amplitude / (2 * probe_ratio) * (d1_d1 * (1 + eta / r) - r * (1 - eta) * d1_d2)
    zeta_star = _clipped_ratio(projection, d1_d1) / step.amplitude
    curvature = _clipped_ratio(step.h * (norm_0 - norm_1 + distance_01) / 2, distance_01)
    many = -jax.nn.sigmoid(curvature * (2 - step.sigma_ratio**2))
    sharpness = step.few_steps + (1 - step.few_steps) * many
    zeta = jax.nn.sigmoid((jnp.abs(zeta_star) - 0.5) * sharpness)

    half_step = step.amplitude / (2 * zeta)
    on_d2, on_d1 = half_step * r * (1 - eta), -half_step * eta / r - step.amplitude / (2 * probe_ratio)
    corrector = [on_d2 * b + on_d1 * a for a, b in zip(d1, d2, strict=True)]

    # In the next step m_t and m_0 are what m_0 and m_1 are in this one.
    step = steps.predicted
    u1 = _one_minus_rho(step, norm_t, norm_0, distance_t0)
    half_probe = step.amplitude / (2 * _probe_ratio(step, u1))
    predictor = jnp.pad(jnp.stack([half_probe, half_probe * (u1 - 1)]), (0, 1))
    choice = Choice(predictor, jnp.stack(corrector), {"zeta": zeta, "eta": eta})
    return choice, Memory(norm_t, norm_0, distance_t0)


def _product(
    a: Sequence[Any], b: Sequence[Any], sum_a: Any, sum_b: Any, norms: Sequence[Any], distances: Sequence[Any]
) -> Any:
    """The inner product of sum_i a_i m_i and sum_j b_j m_j.

    By polarization it is (sum_b sum_i a_i N_i + sum_a sum_j b_j N_j - sum_ij a_i b_j D_ij) / 2. The norms, large beside
    the distances, enter only as far as a combination is no difference: as the sums of a and b, which the caller knows
    without cancellation.
    """
    of_norms = sum(sum_b * p * n + sum_a * q * n for p, q, n in zip(a, b, norms, strict=True))
    pairs = zip(((0, 1), (0, 2), (1, 2)), distances, strict=True)
    return (of_norms - sum((a[i] * b[j] + a[j] * b[i]) * d for (i, j), d in pairs)) / 2


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
