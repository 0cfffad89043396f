"""EDM preconditioning: from a raw network to a denoiser (Karras et al. 2022, arXiv 2206.00364, Table 1 and Eq. 7).

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)        c_out   = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    c_in   = 1 / sqrt(sigma^2 + sigma_data^2)               c_noise = log(sigma) / 4

They make the network's input and its training target unit variance at every noise level, and D(x; 0) = x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from evodiff_jax.numerics import at_least_float32, checked_arguments

Raw = Callable[..., jax.Array]
"""A network F(scaled_x, c_noise, *args): x's shape and c_noise (B,) to x's shape."""


class Coefficients(NamedTuple):
    """The four functions of sigma of EDM's Table 1, each of sigma's shape."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array


def coefficients(sigma: ArrayLike, sigma_data: float) -> Coefficients:
    """Evaluates Table 1's preconditioning at `sigma`, in float32 or wider.

    Args:
      sigma: noise level, at least 0, any shape.
      sigma_data: standard deviation of the data.

    Returns:
      The coefficients, of sigma's shape.
    """
    sigma = jnp.asarray(sigma)
    sigma = sigma.astype(at_least_float32(sigma.dtype))
    norm = jnp.hypot(sigma, jnp.asarray(sigma_data, sigma.dtype))
    return Coefficients(
        c_skip=jnp.square(sigma_data / norm),
        c_out=sigma * sigma_data / norm,
        c_in=1.0 / norm,
        # At sigma = 0, where c_out is 0, the network's input is still to be finite.
        c_noise=jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)) / 4.0,
    )


@checked_arguments
def precondition(raw: Raw, sigma_data: float) -> Raw:
    """Turns a raw network into a denoiser.

    Args:
      raw: `raw(scaled_x, c_noise, *args)`; gets scaled_x in float32 or wider (it may compute in
        less) and c_noise (B,).
      sigma_data: standard deviation of the data.

    Returns:
      `denoise(x, sigma, *args) -> x0`, for x (B, ...) and sigma a scalar or (B,); x0 has the shape and dtype of x,
      with the arithmetic around the network in float32 or wider.

    Raises:
      TypeError: sigma_data is no number.
      ValueError: sigma_data is not positive; when called, sigma is neither a scalar nor (B,).
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")

    def denoise(x: jax.Array, sigma: ArrayLike, *args: Any) -> jax.Array:
        wide = at_least_float32(x.dtype)
        sigma = jnp.asarray(sigma).astype(wide)
        if sigma.shape not in ((), x.shape[:1]):
            raise ValueError(f"sigma must be a scalar or ({x.shape[0]},), got shape {sigma.shape}")
        c = coefficients(jnp.broadcast_to(sigma, x.shape[:1]), sigma_data)
        per_image = lambda v: v.reshape(v.shape + (1,) * (x.ndim - 1))
        x_wide = x.astype(wide)
        f = raw(per_image(c.c_in) * x_wide, c.c_noise, *args).astype(wide)
        return (per_image(c.c_skip) * x_wide + per_image(c.c_out) * f).astype(x.dtype)

    return denoise
