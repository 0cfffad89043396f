"""Corrections of the data prediction that keep its values in the range of the data."""

from typing import Any

import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32, checked_arguments
from evodiff_jax.schedules import made_of
from evodiff_jax.types import Denoiser, State, check_function, check_like


@checked_arguments
def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clips data predictions to the range of the data, also called static thresholding.

    Args:
      denoise: denoise(x, t) -> x_0.
      low: the smallest value of the data.
      high: the largest.

    Returns:
      denoise(x, t).

    Raises:
      TypeError: when denoise is no function, or low or high no number.
      ValueError: unless low < high.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    if not low < high:
        raise ValueError(f"clip needs low < high, got {low} and {high}")

    def clipped(x: State, t: Any, *conditions: Any) -> State:
        return jax.tree.map(lambda m: jnp.clip(m, low, high), _checked(denoise(x, t, *conditions), x))

    return made_of(clipped, denoise)


@checked_arguments
def dynamic_threshold(denoise: Denoiser, percentile: float = 99.5, limit: float = 1.0) -> Denoiser:
    """Clips each sample's data prediction to a percentile of its magnitudes and scales it back into the data's range.

    s = max(percentile of |x_0|, limit) and x_0 becomes clip(x_0, -s, s) limit / s: predictions within the range stay
    as they are, and strong guidance does not saturate.

    Args:
      denoise: denoise(x, t) -> x_0.
      percentile: above 1 and at most 100, in per cent.
      limit: the largest magnitude of the data.

    Returns:
      denoise(x, t); for a state that is a pytree, every leaf has a threshold of its own.

    Raises:
      TypeError: when denoise is no function, or percentile or limit no number.
      ValueError: when percentile is outside, as the quantile 0.995 is, which would cut almost all to nothing, or limit
        is not positive.

    References:
      Saharia et al. 2022 (Imagen), arXiv 2205.11487, section 2.3.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    if not 1 < percentile <= 100:
        raise ValueError(f"percentile must be in per cent, above 1 and at most 100, for example 99.5, got {percentile}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")

    def threshold(m: jax.Array) -> jax.Array:
        wide = m.astype(at_least_float32(m.dtype))
        magnitude = jnp.percentile(jnp.abs(wide), percentile, axis=tuple(range(1, m.ndim)), keepdims=True)
        s = jnp.maximum(magnitude, limit)
        return (jnp.clip(wide, -s, s) * (limit / s)).astype(m.dtype)

    def thresholded(x: State, t: Any, *conditions: Any) -> State:
        return jax.tree.map(threshold, _checked(denoise(x, t, *conditions), x))

    return made_of(thresholded, denoise)


def _checked(output: Any, x: State) -> State:
    return check_like(output, x, "denoise(x, t)")
