"""The posterior covariance of the data given a noisy state, from the Jacobian of the data prediction.

For x_t = alpha x_0 + sigma eps and the exact data prediction m(x, t) = E[x_0 | x_t = x], Tweedie's formula of second
order is

    Cov[x_0 | x_t = x] = (sigma^2 / alpha) dm/dx.

A network is no exact model: its Jacobian need not be symmetric, and its trace may be negative. Then these numbers say
how the network answers to noise, and not how uncertain data are.

Robbins 1956, "An empirical Bayes approach to statistics"; Efron 2011, "Tweedie's formula and selection bias"; Meng,
Song, Li, Ermon, arXiv 2111.04726, theorem 1 (second order); Hutchinson 1990, "A stochastic estimator of the trace".
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.diagnostics._states import check_count, check_model, check_time, dimension, like, rows_of
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.types import Denoiser, State, as_state, batch_size, check_keys, fold_in, widest

_MOST_COORDINATES = 4096  # of the exact Jacobian: 64 MiB a sample in float32
_CHUNK = 64  # columns of the exact Jacobian at a time


class Estimated(NamedTuple):
    """An estimate from random probes.

    Attributes:
      value: the mean over the probes.
      error: its standard error.
    """

    value: jax.Array
    error: jax.Array


def posterior_variance(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x: State,
    t: Any,
    *,
    key: jax.Array,
    probes: int = 8,
    per_coordinate: bool = False,
) -> Estimated:
    """The variance of the data given the state, per coordinate on average or for each.

    The mean over coordinates is V = (sigma^2 / alpha) tr(dm/dx) / D, estimated by Hutchinson's method: E[v . J v] =
    tr J for v of independent random signs, one JVP of the model a probe. The variance of coordinate i is the mean of
    v_i (J v)_i, whose error is that of the off-diagonal entries of row i: it takes many more probes.

    Probes are run one after the other, in the memory of one JVP. A pure function, to be jitted by the caller.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction.
      schedule: the model's noise schedule.
      x: (B, ...) noisy states, or a pytree of such.
      t: their time, a scalar. A concrete time with alpha(t) = 0 is refused; of a traced one the result is NaN.
      key: a random key.
      probes: the number of probes, at least 2.
      per_coordinate: the variance of every coordinate, as a state like x, in place of the mean (B,).

    Returns:
      The estimate and its standard error, in squared units of the data.

    Raises:
      TypeError: when an argument is of another type.
      ValueError: when denoise was made for another schedule, t is outside the schedule or has alpha = 0, or there are
        fewer than 2 probes.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> denoise = ed.denoisers.gaussian_mixture(schedule, [[0.0] * 5], 2.0)  # normal data of variance 4
      >>> found = posterior_variance(denoise, schedule, jax.numpy.ones((1, 5)), 1.0, key=jax.random.key(0))
      >>> found.value.round(3)  # 4 / (4 + 1)
      Array([0.8], dtype=float32)
    """
    x, t = check_model(denoise, schedule, x), check_time(schedule, t)
    probes, key = check_count("probes", probes, 2), check_keys(key, batch_size(x))
    scale, t = _scale(schedule, t, x)

    def prediction(x: State) -> State:
        return as_state(denoise(x, t), x, "denoise(x, t)")

    def of_probe(index: jax.Array) -> jax.Array:
        signs = _signs(fold_in(key, index), x)
        products = rows_of(signs) * rows_of(jax.jvp(prediction, (x,), (signs,))[1])
        return scale * (products if per_coordinate else jnp.mean(products, 1))

    def add(moments: Any, index: jax.Array) -> tuple[Any, None]:
        # Welford's update: sums of squares would cancel.
        mean, squares = moments
        new = of_probe(index)
        after = mean + (new - mean) / (index + 1).astype(new.dtype)
        return (after, squares + (new - mean) * (new - after)), None

    shape = jax.eval_shape(of_probe, jnp.zeros((), jnp.int32))
    start = jnp.zeros(shape.shape, shape.dtype)
    (mean, squares), _ = jax.lax.scan(add, (start, start), jnp.arange(probes))
    error = jnp.sqrt(squares / (probes * (probes - 1)))
    wide = jax.tree.map(lambda leaf: leaf.astype(mean.dtype), x)
    return Estimated(like(mean, wide), like(error, wide)) if per_coordinate else Estimated(mean, error)


def posterior_covariance(
    denoise: Denoiser, schedule: NoiseSchedule, x: State, t: Any, *, chunk: int = _CHUNK
) -> jax.Array:
    """The posterior covariance itself, (sigma^2 / alpha) dm/dx by one JVP a coordinate; for small states.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction.
      schedule: the model's noise schedule.
      x: (B, ...) noisy states of at most 4096 coordinates, or a pytree of such.
      t: their time, a scalar with alpha(t) > 0.
      chunk: JVPs at a time; memory grows with it.

    Returns:
      (B, D, D), not made symmetric: [b, i, j] is the derivative of output i with respect to coordinate j. The
      coordinates of a pytree follow each other as its leaves do.

    Raises:
      TypeError: when an argument is of another type.
      ValueError: when denoise was made for another schedule, t is outside the schedule or has alpha = 0, there are more
        coordinates, or chunk is below 1.
    """
    x, t = check_model(denoise, schedule, x), check_time(schedule, t)
    chunk = check_count("chunk", chunk, 1)
    size = dimension(x)
    if size > _MOST_COORDINATES:
        raise ValueError(
            f"the exact covariance of {size} coordinates has {size}^2 entries a sample, the most are "
            f"{_MOST_COORDINATES}^2: use posterior_variance"
        )
    scale, t = _scale(schedule, t, x)

    def prediction(x: State) -> State:
        return as_state(denoise(x, t), x, "denoise(x, t)")

    def column(index: jax.Array) -> jax.Array:
        unit = jnp.broadcast_to(jnp.arange(size) == index, (batch_size(x), size)).astype(widest(jax.tree.leaves(x)))
        return rows_of(jax.jvp(prediction, (x,), (like(unit, x),))[1])

    columns = jax.lax.map(column, jnp.arange(size), batch_size=min(chunk, size))
    return scale * jnp.moveaxis(columns, 0, 2)


def _scale(schedule: NoiseSchedule, t: Any, x: State) -> tuple[jax.Array, jax.Array]:
    """The factor sigma^2 / alpha and the time, in the scalar dtype of the state."""
    dtype = widest(jax.tree.leaves(x))
    alpha, sigma, _ = schedule.levels(t)
    if not isinstance(t, Tracer) and not np.asarray(alpha) > 0:
        raise ValueError(f"alpha is 0 at t = {float(t):g}: a state there tells nothing about the data")
    safe = jnp.where(alpha > 0, alpha, 1)
    scale = jnp.where(alpha > 0, sigma**2 / safe, jnp.nan)
    return scale.astype(dtype), jnp.asarray(t, dtype)


def _signs(key: jax.Array, x: State) -> State:
    """Independent random signs like x; with one key a sample, those of sample k depend on key k alone."""
    leaves, structure = jax.tree.flatten(x)
    made = []
    for i, leaf in enumerate(leaves):
        of_leaf, draw = fold_in(key, i), functools.partial(jax.random.rademacher, dtype=leaf.dtype)
        of_samples = functools.partial(draw, shape=leaf.shape[1:])
        made.append(jax.vmap(of_samples)(of_leaf) if key.ndim else draw(of_leaf, shape=leaf.shape))
    return jax.tree.unflatten(structure, made)
