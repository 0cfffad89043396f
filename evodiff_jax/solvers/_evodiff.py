"""EVODiff: coefficients that minimise, per sample and step, the conditional variance of the reverse transition.

The variance needs a distribution, and the sample's own model outputs tell it. In the coordinates x / alpha, with kappa
= sigma / alpha, data that is normal with standard deviation s along a direction has along it the data prediction m =
s^2 / (s^2 + kappa^2) x, and the exact trajectory x proportional to sqrt(s^2 + kappa^2). A sample is a sum of such
directions with energies E(s), the spectrum of its data. The solver is linear, so its own run on one scale is the run of
one number: twelve scales are sampled beside the state, by the same coefficients, and at every model call

1. the spectrum is estimated: the squared distances |m_i - m_j|^2 of the newest four outputs are, in the model, sums
   over s of E(s) times those of its scale. Energies E >= 0 are fitted to the six distances by multiplicative updates
   (Richardson 1972, Lucy 1974). What no spectrum explains, as when a sample commits to one mode of its distribution, is
   energy v >= 0 of a single difference that says nothing about the others;
2. the step that has just ended is corrected, and the next one predicted, by
       x_t = q x + (1 - q) (m_0 + sum_a c_a D_a)          q = kappa_t / kappa_0
   with the differences D_a of adjacent outputs, newest first (for the correction D_0 = m_t - m_0), and the c that
   minimise the variance of the error of x_t, in units of what of it is left at the end of the run,
       sum_s E(s) (x_s - x_s*)^2 / x_s*^2 + sum_a (v_a + eps^2 E_a) (c_a - c_a*)^2,
   where x_s is the run of scale s, errors made so far included, x_s* its exact solution, and E_a the energy of D_a: a
   least-squares problem of three unknowns. eps^2 is the part of every difference that the model is not trusted with;
   in a step longer than the one before, eps grows with the power 2 max(h, 1) of their ratio, h the step's length in
   lambda;
3. c* is the exact step of one scale, the one that the noise left in the state tells. By Tweedie's formula that scale
   moves its prediction in proportion to the noise along it, so that over the last step
       T = <x - m_0, D_0> / |D_0|^2 = (1 + w) / (w^2 / q^2 - 1),    w the ratio of its x* at the ends of the step,
   and D_0 has the weight w / (q + w) in the correction. Where T is below that of a scale far above kappa, w is 1;
4. outputs that move against the noise, T < 0, are those of no normal data. Where they turn against it after moving with
   it, the sample commits to a mode of its distribution, and what was learnt before says nothing about what follows: c
   is c* from then on. Where the first ones do so already, the network has left a part of the noise in them.

For normal data x_t - x_t* has the entropy (1/2) log(variance) + constant along every direction: minimising one
minimises the other. Coefficients stay within O(h) of c*, so that the order is that of c*, 2.

The corrector in the form of the paper, x = x_e + A / (2 zeta) (r (1 - eta) D_0 - (eta / r) D_1), r the ratio of the
last two steps in lambda, has the zeta and eta that a trace shows.

Li, Lin, Yang, Zhang, Zhang, "EVODiff: Entropy-aware Variance Optimized Diffusion Inference", NeurIPS 2025,
arXiv 2509.26096, propose the objective and the two-parameter form; the estimate of the variance is ours.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.gram import Gram
from evodiff_jax.numerics import namespace
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.solvers import _quadrature as quadrature
from evodiff_jax.solvers._evodiff_reference import check_leaves
from evodiff_jax.tables import Coefficients, Solver, Table

_SCALES = 12
_SMALLEST, _LARGEST = 0.1, 0.1  # scales from this part of the last kappa to this part of the first, or the second
_DIFFERENCES = 3
_PAIRS = ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3))  # of the newest outputs; the first three are differences
_SPANS = np.array([[i <= a < j for a in range(_DIFFERENCES)] for i, j in _PAIRS], np.float64)
_UPDATES = 2
_UNEXPLAINED = math.exp(-4.0)  # part of a new difference's energy that no spectrum is expected to explain
_CAUTION = 0.15  # how much of the unexplained energy counts
_RIDGE_CORRECTOR, _RIDGE_PREDICTOR, _RIDGE_FIRST = 0.5, 0.15, 0.3  # eps
_MOST = math.log(1e3)  # eps grows by so much at most: c is c* long before
_LARGE = 1e6  # T beyond that of w = 1; w is q in float32 before
_CLEAR = 2.0  # noise along a difference is clear at so many standard deviations
_FAR = math.log(10.0)  # an infinite lambda is taken to be this far beyond the finite ones
_TINY = 1e-3  # 1 / (2 zeta) in a trace is at least this

# Matrix units of accelerators round their operands to half precision unless told not to.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Step(NamedTuple):
    """What the rule needs of one step; entries of a table have a leading axis of rows.

    Attributes:
      ratio: q.
      amplitude: alpha_t (1 - q).
      exact: (S,), x_s* at the step's end.
    """

    ratio: Any
    amplitude: Any
    exact: Any


class Row(NamedTuple):
    """What the rule needs of a row.

    Attributes:
      corrected: the step that ends where the model is called.
      predicted: the step that begins there.
      response: (S,), the data prediction of each scale for x_s = 1.
      start: (S,), x_s at the beginning of the run.
      prior: (S,), E before anything is known.
      outputs: the number of earlier outputs.
      ratio: r.
      kappa: where the model is called.
      ridge: eps of the predictor.
    """

    corrected: Step
    predicted: Step
    response: Any
    start: Any
    prior: Any
    outputs: Any
    ratio: Any
    kappa: Any
    ridge: Any


class Memory(NamedTuple):
    """What the rule keeps of a sample: the run of each scale, and what is known of the spectrum.

    Attributes:
      state: (S,), the corrected x_s.
      probe: (S,), the predicted x_s.
      outputs: (3, S), the newest data predictions of the scales.
      energy: (S,), E.
      unexplained: (3,), v_a as a part of the energy of D_a.
      predictor: (3,), the c of the last prediction.
      course: (3,), how far the outputs first moved with the noise and still do, first moved against it, and turned
        against it after moving with it: at most 1 in all.
    """

    state: Any
    probe: Any
    outputs: Any
    energy: Any
    unexplained: Any
    predictor: Any
    course: Any


_SIZES = Memory(_SCALES, _SCALES, _DIFFERENCES * _SCALES, _SCALES, _DIFFERENCES, _DIFFERENCES, 3)


@functools.cache
def evodiff(channel_axis: int | None = None, per_leaf: bool = True) -> Solver:
    """EVODiff, the default solver: one model call a step, coefficients chosen per sample and step.

    See `evodiff_jax.solvers._evodiff` for the rule, and benchmarks/EVODIFF.md for its derivation and measurements. It
    is exact for models that predict a constant, does not depend on the units of the data nor on whether the schedule
    preserves variance, and has order 2. The first step is corrected once its end is known. A last step to sigma = 0 is
    of first order. For the released algorithm see `evodiff_reference`.

    Args:
      channel_axis: an axis of the state over which coefficients are chosen separately, as the released code does with
        channels; None for one choice per sample as the paper writes it. States of fewer than three axes have one.
      per_leaf: for states that are pytrees, whether each leaf has coefficients of its own; if not, inner products are
        summed over the leaves, which makes one choice for the whole sample and needs channel_axis=None.

    Returns:
      The solver. NFE: N for N steps.

    Raises:
      ValueError: when per_leaf is False and channel_axis is not None.

    References:
      arXiv 2509.26096, for the objective.
    """
    check_leaves("evodiff", channel_axis, per_leaf)
    return Solver("evodiff", _table, _rule, channel_axis, per_leaf, sum(_SIZES))


def _table(schedule: NoiseSchedule, times: Any) -> Table:
    """Row i calls the model at t_i, corrects the step to t_i where i >= 1, and predicts the step to t_{i+1}."""
    xp = namespace(times)
    levels = schedule.levels(times)
    steps = quadrature.data_steps(*quadrature.ends(levels))
    lambda_ = _bounded(levels.lambda_)
    kappa, h = xp.exp(-lambda_), lambda_[1:] - lambda_[:-1]
    index = np.arange(h.shape[0])
    before = np.maximum(index - 1, 0)

    smallest, largest = xp.log(_SMALLEST * kappa[-1]), xp.log(xp.minimum(_LARGEST * kappa[0], kappa[1]))
    scales = xp.exp(smallest + np.linspace(0, 1, _SCALES) * (largest - smallest))
    exact = xp.sqrt(1 + (kappa[:, None] / scales) ** 2)  # x_s*, in units of the data along its direction
    growth = 2 * xp.maximum(h, 1.0) * xp.log(xp.maximum(h / h[before], 1.0))
    of_rows = lambda values: xp.broadcast_to(values, (h.shape[0], _SCALES))  # noqa: E731

    ratio, amplitude = xp.exp(-h), steps.amplitude
    rule = Row(
        corrected=Step(ratio[before], amplitude[before], exact[:-1]),
        predicted=Step(ratio, amplitude, exact[1:]),
        response=1 / exact[:-1] ** 2,
        start=of_rows(exact[0]),
        prior=of_rows(scales / scales[-1]),
        outputs=xp.ones_like(h) * index,
        ratio=h[np.maximum(index - 2, 0)] / h[before],
        kappa=kappa[:-1],
        ridge=xp.where(index == 1, _RIDGE_FIRST, _RIDGE_PREDICTOR) * xp.exp(xp.minimum(growth, _MOST)),
    )
    zero = xp.zeros_like(h)
    to_data = (index == index[-1]) & (levels.sigma[-1] == 0)
    return Table(
        time=times[:-1],
        transition=steps.transition,
        predictor=xp.stack([amplitude, *[zero] * (_DIFFERENCES + 1)], axis=-1),
        corrector=xp.stack([zero] * (_DIFFERENCES + 2), axis=-1),
        adaptive=xp.stack([zero + (index > 0), xp.where(to_data, 0.0, zero + (index > 0))], axis=-1),
        rule=rule,
        alpha=xp.where(levels.alpha[:-1] > 0, levels.alpha[:-1], 1.0),
    )


def _bounded(lambda_: Any) -> Any:
    """Lambda with infinite ends (sigma = 0 or alpha = 0) a fixed way beyond the finite ones."""
    xp = namespace(lambda_)
    finite = xp.isfinite(lambda_)
    lowest = xp.min(xp.where(finite, lambda_, xp.inf)) - _FAR
    highest = xp.max(xp.where(finite, lambda_, -xp.inf)) + _FAR
    bounded = xp.where(finite, lambda_, xp.where(lambda_ > 0, highest, lowest))
    return xp.where(xp.isfinite(bounded), bounded, xp.where(lambda_ > 0, _FAR, -_FAR))  # no finite one between


def _rule(
    row: Row,
    gram: Gram,
    memory: Any,
    *,
    spectrum: Any = None,
    least_squares: Any = None,
    exact_scales: bool = False,
    corrects: bool = True,
) -> tuple[Coefficients, Any]:
    """The corrector of the last step and the predictor of the next, as coefficients of the outputs (newest first).

    The keyword arguments are for benchmarks/ablation.py.
    """
    known = _unpack(row, memory)
    m = row.response * known.probe
    outputs = jnp.concatenate([m[None], known.outputs])
    differences = outputs[:-1] - outputs[1:]
    available = (row.outputs > jnp.arange(_DIFFERENCES, dtype=m.dtype)).astype(m.dtype)
    differences = differences * available[:, None]
    energy, unexplained, caution = (spectrum or _spectrum)(row, gram, known, outputs)
    course = _course(row, gram, known.course)
    trusted = 1 - course[2]

    def step(start: Any, m: Any, to: Step, weight: Any, ridge: Any) -> tuple[Any, Any, Any]:
        """The c of a step of the scales from `start` with the data prediction m there, its end, its variance."""
        weights = energy / to.exact**2
        linear = to.ratio * start + (1 - to.ratio) * (m + weight * differences[0])
        missing = (to.exact - linear) / (1 - to.ratio)
        c = (least_squares or _least_squares)(missing, differences, weights, ridge**2 + caution) * trusted
        c = available * c.at[0].add(weight)
        end = to.exact if exact_scales else to.ratio * start + (1 - to.ratio) * (m + _matmul(c, differences))
        return c, end, _matmul(weights, (end - to.exact) ** 2) / jnp.sum(energy)

    q, following, square = row.corrected.ratio, row.predicted.ratio, gram.distance(0, 1)
    weight = _corrector_of_scale(_shrinkage(q, gram.noise, square), q)
    corrector, state, variance = step(known.state, outputs[1], row.corrected, weight, _RIDGE_CORRECTOR)
    state = jnp.where((row.outputs > 0) & corrects, state, known.probe)
    corrected = float(corrects) * (_of_outputs(corrector) - jnp.roll(_of_outputs(known.predictor), 1))

    # <x - m_0, D_0> with the corrected state in place of the probe.
    along = jnp.stack([gram.distance(i, 1) - gram.distance(i, 0) for i in range(corrected.shape[0])]) / 2
    noise = gram.noise + (1 - q) * _matmul(corrected, along)
    weight = _predictor_of_scale(_shrinkage(q, noise, square), q, following)
    predictor, probe, _ = step(state, m, row.predicted, weight, row.ridge)

    kept = Memory(state, probe, outputs[:-1], energy, unexplained, predictor, course)
    on_new, on_old = corrector[0] / row.ratio, -corrector[1] * row.ratio
    both = on_new + on_old
    both = jnp.where(jnp.abs(both) > _TINY, both, _TINY)
    trace = {"zeta": 1 / (2 * both), "eta": on_old / both, "variance": variance}
    coefficients = Coefficients(
        tuple(row.predicted.amplitude * _of_outputs(predictor)), tuple(row.corrected.amplitude * corrected), trace
    )
    return coefficients, jnp.concatenate([jnp.ravel(part) for part in kept])


def _unpack(row: Row, memory: Any) -> Memory:
    """The memory by name, and in the first row what it starts from."""
    parts = Memory(*jnp.split(memory, np.cumsum(_SIZES)[:-1]))
    first = row.outputs < 1
    return parts._replace(
        state=jnp.where(first, row.start, parts.state),
        probe=jnp.where(first, row.start, parts.probe),
        outputs=parts.outputs.reshape(_DIFFERENCES, _SCALES),
        energy=jnp.where(first, row.prior, parts.energy),
    )


def _spectrum(
    row: Row, gram: Gram, known: Memory, outputs: Any, unexplained: float = _UNEXPLAINED
) -> tuple[Any, Any, Any]:
    """E, v as a part of the energy of each difference, and v over what the spectrum explains of it."""
    observed = jnp.stack([gram.distance(i, j) for i, j in _PAIRS])
    observed = jnp.where(row.outputs >= np.array([j for _, j in _PAIRS], observed.dtype), observed, 0)
    total = jnp.sum(observed)
    # Nothing to learn from one difference, nor from outputs that do not change.
    informative = (row.outputs > 1) & _above_zero(total)
    observed = observed / jnp.where(informative, total, 1)
    seen = (observed > 0).astype(observed.dtype)
    of_scales = jnp.stack([(outputs[i] - outputs[j]) ** 2 for i, j in _PAIRS])

    energy = known.energy * _ratio(1.0, jnp.sum(seen[:, None] * of_scales * known.energy))
    parts = jnp.concatenate([jnp.full((1,), unexplained, observed.dtype), known.unexplained[:-1]])
    single = parts * observed[:_DIFFERENCES]
    spans = _SPANS.astype(observed.dtype)
    for _ in range(_UPDATES):
        modelled = _matmul(of_scales, energy) + _matmul(spans, single)
        agreement = jnp.clip(_ratio(observed, modelled), math.exp(-4), math.exp(4))
        sensitivity = seen * _ratio(1.0, modelled)
        update = lambda by: _ratio(_matmul(sensitivity * agreement, by), _matmul(sensitivity, by), 1.0)  # noqa: B023, E731
        energy, single = energy * update(of_scales), single * update(spans)

    explained = _matmul(of_scales[:_DIFFERENCES], energy)
    caution = _CAUTION * jnp.clip(_ratio(single, explained), 0, 1e4)
    fraction = jnp.clip(_ratio(single, observed[:_DIFFERENCES]), 0, 1e4)
    energy = energy * _ratio(1.0, jnp.max(energy))
    return (
        jnp.where(informative, energy, known.energy),
        jnp.where(informative, fraction, jnp.where(row.outputs > 1, known.unexplained, unexplained)),
        jnp.where(informative, caution, 0.0),
    )


def _shrinkage(q: Any, noise: Any, square: Any) -> Any:
    """w, the ratio of x* at the ends of a step of ratio q, of the scale for which <x - m_0, D_0> / |D_0|^2 is so."""
    settled = 2 * q**2 / (1 - q**2)  # where w = 1
    sign = jnp.where(q > 1, -1.0, 1.0).astype(square.dtype)  # of T in runs from the noise, and in runs to it
    T = settled + sign * jnp.clip(sign * (_ratio(noise, square, settled) - settled), 0, _LARGE)
    return (1 + sign * jnp.sqrt(1 + 4 * T * (T + 1) / q**2)) * q**2 / (2 * T)


def _corrector_of_scale(w: Any, q: Any) -> Any:
    """c*_0 of the corrector of a step of ratio q, exact for the scale whose x* has the ratio w at its ends."""
    return w / (q + w)


def _predictor_of_scale(w: Any, q: Any, following: Any) -> Any:
    """c*_0 of the predictor of the next step, of ratio `following`, exact for the scale of w in the last."""
    # The ratio of x* at the ends of the next step, and the change of m in it over that in the last, without 0 / 0.
    part = jnp.clip((q / w) ** 2, jnp.minimum(q**2, 1), jnp.maximum(q**2, 1))
    next_w = jnp.sqrt((1 - part + following**2 * (part - q**2)) / (1 - q**2))
    growth = (1 - following**2) * part * (1 + w) / ((1 - q**2) * next_w * (1 + next_w))
    return growth * _corrector_of_scale(next_w, following)


def _course(row: Row, gram: Gram, course: Any) -> Any:
    """The new `Memory.course`."""
    square = gram.distance(0, 1)
    changes = _above_zero(square)
    length = jnp.sqrt(jnp.where(changes, square, 1))
    deviations = jnp.where(changes & (row.outputs > 0), gram.noise / (row.kappa * length), 0)
    with_it, against_it = jnp.clip(deviations / _CLEAR, 0, 1), jnp.clip(-deviations / _CLEAR, 0, 1)
    aligned, opposed, turned = course
    open_ = 1 - aligned - opposed - turned
    return jnp.stack(
        [aligned * (1 - against_it) + open_ * with_it, opposed + open_ * against_it, turned + aligned * against_it]
    )


def _least_squares(missing: Any, differences: Any, weights: Any, ridge: Any) -> Any:
    """The c that minimise sum_s w (missing - c . D)^2 + sum_a ridge_a |D_a|^2 c_a^2."""
    squares = _matmul(differences**2, weights)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    unit = differences / length[:, None]
    gram, b = _matmul(unit * weights, unit.T), _matmul(unit * weights, missing)
    d0, d1, d2 = jnp.diagonal(gram) + ridge + (squares <= 0).astype(squares.dtype)
    l10, l20 = gram[1, 0] / d0, gram[2, 0] / d0
    d1 = d1 - l10 * gram[1, 0]
    l21 = (gram[2, 1] - l20 * gram[1, 0]) / d1
    d2 = d2 - l20 * gram[2, 0] - l21**2 * d1
    y1 = b[1] - l10 * b[0]
    c2 = (b[2] - l20 * b[0] - l21 * y1) / d2
    c1 = y1 / d1 - l21 * c2
    c0 = b[0] / d0 - l10 * c1 - l20 * c2
    return jnp.stack([c0, c1, c2]) / length


def _of_outputs(c: Any) -> Any:
    """Coefficients of differences as those of the outputs they are differences of, and of one output more."""
    zero = jnp.zeros_like(c[:1])
    return jnp.concatenate([c, zero, zero]) - jnp.concatenate([zero, c, zero])


def _above_zero(square: Any) -> Any:
    """Whether a sum of squares, and its own square in derivatives, is a number that float arithmetic can divide by."""
    return square > 10 * jnp.sqrt(jnp.finfo(jnp.asarray(square).dtype).tiny)


def _ratio(numerator: Any, denominator: Any, otherwise: float = 0.0) -> Any:
    """The ratio, or `otherwise` where the denominator, a sum of squares, vanishes."""
    positive = _above_zero(denominator)
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), otherwise)
