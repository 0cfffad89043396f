"""From a network to `denoise(x, t)`, the data prediction that every solver works with, and guidance of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.schedules import NoiseSchedule

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

PREDICTIONS = ("data", "epsilon")


def from_prediction(fn: Denoiser, schedule: NoiseSchedule, prediction: str) -> Denoiser:
    """Turns a network's prediction into the data prediction, the posterior mean of x_0 given x_t.

    With x_t = alpha x_0 + sigma eps, a noise prediction gives x_0 = (x_t - sigma eps) / alpha.

    Args:
      fn: the network, fn(x, t) with x of any shape and a scalar t, returning x's shape. It may return a lower
        precision than x's; the conversion is made in float32 at least.
      schedule: the schedule the network was trained with.
      prediction: "data" when fn predicts x_0, "epsilon" when it predicts the noise.

    Returns:
      denoise(x, t), of the shape and dtype of x.

    Raises:
      ValueError: when `prediction` is neither.

    Example:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.vp_linear()
      >>> denoise = from_prediction(lambda x, t: x, schedule, "epsilon")
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(map(repr, PREDICTIONS))}")

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        output = fn(x, t)
        if prediction == "data":
            return output.astype(x.dtype)
        t = jnp.asarray(t, at_least_float32(x.dtype))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return ((x.astype(t.dtype) - sigma * output.astype(t.dtype)) / alpha).astype(x.dtype)

    return denoise


def classifier_free_guidance(
    fn: Callable[[jax.Array, jax.Array, Any], jax.Array], condition: Any, null_condition: Any, scale: float
) -> Denoiser:
    """Guides a conditional denoiser away from its unconditional prediction (Ho & Salimans 2022, arXiv 2207.12598).

    x_0 = null + scale (conditional - null): 1 is no guidance, 0 unconditional, both of one network evaluation a
    call; other scales evaluate the network once on a batch of twice the size.

    Args:
      fn: fn(x, t, condition) -> x_0, for a batch x (B, ...) and conditions with the same leading axis.
      condition: the conditions, a pytree of arrays (B, ...).
      null_condition: what stands for no condition, of the same structure and shapes.
      scale: the guidance scale, a Python number.

    Returns:
      denoise(x, t), of the shape of x.

    Raises:
      ValueError: when the two conditions differ in structure, shapes or dtypes.
    """
    described = [jax.tree.map(lambda c: (jnp.shape(c), jnp.result_type(c)), c) for c in (condition, null_condition)]
    if described[0] != described[1]:
        raise ValueError(
            f"condition and null_condition must have the same structure, shapes and dtypes, got {described[0]} "
            f"and {described[1]}"
        )
    if scale == 1:
        return lambda x, t: fn(x, t, condition)
    if scale == 0:
        return lambda x, t: fn(x, t, null_condition)
    both = jax.tree.map(lambda c, n: jnp.concatenate([jnp.asarray(c), jnp.asarray(n)]), condition, null_condition)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        conditional, null = jnp.split(fn(jnp.concatenate([x, x]), t, both), 2)
        return null + jnp.asarray(scale, null.dtype) * (conditional - null)

    return denoise
