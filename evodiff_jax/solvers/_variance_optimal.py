"""The redesigned rule: coefficients of a prior spectrum from a host-computed table, and one closed-form scalar a sample.

Coordinates: u = x / alpha, kappa = sigma / alpha, q = kappa_t / kappa_0. One step is

    u_t = q u_0 + (1 - q) (m_0 + sum_a c_a D_a),        D_a = m_a - m_{a+1}, m_0 the newest output.

Data with standard deviation s along a direction ("scale s") has the output s^2 / (s^2 + kappa^2) u and the exact path
sqrt(s^2 + kappa^2) along it, so a scale is a scalar ODE that the host integrates. For the prior spectrum E(s) ~ s^1.5

    c = argmin sum_s E(s) ((u_t(s) - u*_t(s)) / u*_t(s))^2 + eps^2 sum_a |D_a|^2 (c_a - c*_a)^2,    c* = (c*_0, 0, 0),

which is affine in c*_0: c = k0 + c*_0 k1. Only c*_0 depends on the sample: it makes the step exact for the one scale that

    T = <u - m_0, D_0> / |D_0|^2 = (1 + w) / (w^2 / q^2 - 1)

determines (Tweedie), w = u*_t / u*_0 of that scale. Where the outputs first moved along the noise left and then turn
against it, the sample has chosen a mode and the prior no longer applies: c = c*.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import factory
from evodiff_jax.tables import Choice, Rule, Solver, Table, exportable

DIFFERENCES = 3
SCALES, POWER = 24, 1.5  # of the prior spectrum
SMALLEST, LARGEST = 0.1, 0.1  # scales from this part of the last kappa to this part of the first, or the second kappa
RIDGE_CORRECTOR, RIDGE_PREDICTOR, RIDGE_FIRST = 0.5, 0.15, 0.3  # eps
CLEAR = 2.0  # <u - m_0, D_0> counts as clear at so many standard deviations kappa |D_0|
FAR = math.log(10.0)  # an infinite lambda counts as this far beyond the finite ones


class Data(NamedTuple):
    """What the rule reads of a row: the step that ends there, and the one that begins there. (R,) or (R, 5)."""

    alpha: Any
    kappa: Any
    q: Any  # of the step that ends here; in the first row any
    following: Any  # q of the step that begins here
    exists: Any  # 1 where there is an earlier output
    corrector: Any  # k0, of outputs and times the step's amplitude; 0 in the first row
    corrector_slope: Any  # k1 less that of c* alone
    corrector_amplitude: Any
    predictor: Any
    predictor_slope: Any
    predictor_amplitude: Any


class Memory(NamedTuple):
    predicted: Any  # (5,), the last prediction's coefficients of outputs in units of the amplitude
    commitment: Any  # (3,): moved along the noise so far; against it from the start; along it first and then against


exportable(Data, Memory)


@factory
def variance_optimal(channel_axis: int | None = None, per_leaf: bool = True) -> Solver:
    return Solver("variance_optimal", table, Rule(terms, choose, init, channel_axis, per_leaf))


def terms(data: Data, x: Any, output: Any) -> tuple[Any, Any]:
    m, change = output(0), output(0) - output(1)
    return (x * (1 / data.alpha) - m) * change, change * change


def init(data: Data) -> Memory:
    return Memory(jnp.zeros(DIFFERENCES + 2), jnp.zeros(3))


def choose(data: Data, sums: tuple[Any, Any], memory: Memory) -> tuple[Choice, Memory]:
    noise, square = sums
    changed = square > 10 * jnp.sqrt(jnp.finfo(square.dtype).tiny)
    safe = jnp.where(changed, square, 1)
    commitment = commit(memory.commitment, jnp.where(changed, noise / (data.kappa * jnp.sqrt(safe)), 0) * data.exists)
    trusted = 1 - commitment[2]
    w = shrinkage(data.q, jnp.where(changed, noise / safe, settled(data.q)))
    of_corrector, of_predictor = (
        data.exists * corrector_weight(w, data.q),
        data.exists * predictor_weight(w, data.q, data.following),
    )
    alone = jnp.asarray(_of_outputs(np.eye(DIFFERENCES)[0]), square.dtype)
    corrected = of_corrector * alone + trusted * (data.corrector + of_corrector * data.corrector_slope)
    corrected = corrected - jnp.concatenate([jnp.zeros(1), memory.predicted[:-1]])
    predicted = of_predictor * alone + trusted * (data.predictor + of_predictor * data.predictor_slope)
    choice = Choice(
        data.predictor_amplitude * predicted, data.corrector_amplitude * corrected, {"w": w, "trusted": trusted}
    )
    return choice, Memory(predicted, commitment)


def commit(commitment: Any, deviations: Any) -> Any:
    along, against = jnp.clip(deviations / CLEAR, 0, 1), jnp.clip(-deviations / CLEAR, 0, 1)
    aligned, opposed, turned = commitment
    open_ = 1 - aligned - opposed - turned
    return jnp.stack([aligned * (1 - against) + open_ * along, opposed + open_ * against, turned + aligned * against])


# ------------------------------------------------------------- one scale: the same code on the host and in the program


def settled(q: Any) -> Any:
    """T of a scale far above kappa, w = 1."""
    return 2 * q**2 / (1 - q**2)


def shrinkage(q: Any, T: Any) -> Any:
    """W of the scale with this T, for q < 1 (denoising)."""
    xp = jnp if isinstance(T, jax.Array) else np
    T = settled(q) + xp.clip(T - settled(q), 0, 1e6)
    return (1 + xp.sqrt(1 + 4 * T * (T + 1) / q**2)) * q**2 / (2 * T)


def corrector_weight(w: Any, q: Any) -> Any:
    """c*_0 of the corrector of a step of ratio q that is exact for the scale of w."""
    return w / (q + w)


def predictor_weight(w: Any, q: Any, following: Any) -> Any:
    """c*_0 of the predictor of the next step, exact for the scale that had w in the last."""
    xp = jnp if isinstance(w, jax.Array) else np
    part = xp.clip((q / w) ** 2, q**2, 1)
    next_w = xp.sqrt((1 - part + following**2 * (part - q**2)) / (1 - q**2))
    return (
        (1 - following**2) * part * (1 + w) / ((1 - q**2) * next_w * (1 + next_w)) * corrector_weight(next_w, following)
    )


# --------------------------------------------------------------------------------------------------- the host's table


def table(schedule: Any, times: np.ndarray) -> Table:
    alpha, sigma, lambda_ = schedule.levels(times)
    kappa = np.exp(-_bounded(lambda_))
    q = kappa[1:] / kappa[:-1]
    log_scales = np.linspace(np.log(SMALLEST * kappa[-1]), np.log(min(LARGEST * kappa[0], kappa[1])), SCALES)
    scales = np.exp(log_scales)
    exact = np.sqrt(1 + (kappa[:, None] / scales) ** 2)  # u* in units of s
    energy = (scales / scales[-1]) ** POWER
    rows = len(q)
    corrector, predictor = np.zeros((2, rows, 2, DIFFERENCES + 2))

    probe, outputs = exact[0], np.zeros((DIFFERENCES + 1, SCALES))  # of each scale
    for i in range(rows):
        outputs = np.concatenate([probe[None] / exact[i] ** 2, outputs[:-1]])
        changes = (outputs[:-1] - outputs[1:]) * (np.arange(DIFFERENCES) < i)[:, None]
        c = np.zeros(DIFFERENCES)
        if i > 0:
            corrector[i] = best(exact[i - 1], outputs[1], q[i - 1], exact[i], changes, energy, RIDGE_CORRECTOR)[1]
            of_c, predictor[i] = best(exact[i], outputs[0], q[i], exact[i + 1], changes, energy, _ridge(i, np.log(q)))
            T = np.sum(energy * (exact[i] - outputs[0]) * changes[0]) / np.sum(energy * changes[0] ** 2)
            c = of_c[0] + predictor_weight(shrinkage(q[i - 1], T), q[i - 1], q[i]) * of_c[1]
        probe = q[i] * exact[i] + (1 - q[i]) * (outputs[0] + c @ changes)

    amplitude = -alpha[1:] * np.expm1(lambda_[:-1] - lambda_[1:])
    zeros, index = np.zeros(rows), np.arange(rows)
    before = np.maximum(index - 1, 0)
    to_data = (index == rows - 1) & (sigma[-1] == 0)
    data = Data(
        alpha=np.where(alpha[:-1] > 0, alpha[:-1], 1.0),
        kappa=kappa[:-1],
        q=q[before],
        following=q,
        exists=np.sign(index),
        corrector=corrector[:, 0],
        corrector_slope=corrector[:, 1],
        corrector_amplitude=np.where(index > 0, amplitude[before], 0),
        predictor=predictor[:, 0],
        predictor_slope=predictor[:, 1],
        predictor_amplitude=np.where(to_data, 0, amplitude),
    )
    plain = np.concatenate([amplitude[:, None], np.zeros((rows, DIFFERENCES + 1))], axis=1)
    return Table(times[:-1], sigma[1:] / sigma[:-1], plain, np.zeros_like(plain), data=data)


def best(start: Any, m: Any, q: Any, end: Any, changes: Any, energy: Any, ridge: float) -> tuple[Any, Any]:
    """(k0, k1) of c = k0 + c*_0 k1, and (k0, k1 - e_0) as coefficients of outputs."""
    weights = energy / end**2
    square = changes**2 @ weights
    length = np.sqrt(np.where(square > 0, square, 1))
    unit = changes / length[:, None]
    normal = (unit * weights) @ unit.T + np.diag(ridge**2 + (square <= 0))
    missing = (end - q * start - (1 - q) * m) / (1 - q)
    solve = lambda target: np.linalg.solve(normal, (unit * weights) @ target) / length * (square > 0)
    alone = np.eye(DIFFERENCES)[0]
    k0, slope = solve(missing), -solve(changes[0])
    return np.stack([k0, alone + slope]), np.stack([_of_outputs(k0), _of_outputs(slope)])


def _ridge(i: int, log_q: np.ndarray) -> float:
    """Eps of the predictor of step i, larger where the step is longer than the one before."""
    growth = 2 * max(-log_q[i], 1.0) * math.log(max(log_q[i] / log_q[i - 1], 1.0))
    return (RIDGE_FIRST if i == 1 else RIDGE_PREDICTOR) * math.exp(min(growth, math.log(1e3)))


def _of_outputs(c: np.ndarray) -> np.ndarray:
    """Coefficients of differences as those of the outputs they are differences of, and of one output more."""
    return np.concatenate([c, [0, 0]]) - np.concatenate([[0], c, [0]])


def _bounded(lambda_: np.ndarray) -> np.ndarray:
    finite = lambda_[np.isfinite(lambda_)]
    low, high = (finite.min() - FAR, finite.max() + FAR) if finite.size else (-FAR, FAR)
    return np.where(np.isfinite(lambda_), lambda_, np.where(lambda_ > 0, high, low))
