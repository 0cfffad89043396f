"""A denoiser that needs no network: the exact posterior mean of a mixture of Gaussians."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from evodiff_jax.numerics import at_least_float32, checked_arguments, concrete_array
from evodiff_jax.schedules import NoiseSchedule, expect_schedule, of_schedule
from evodiff_jax.types import Denoiser


@checked_arguments
def gaussian_mixture(schedule: NoiseSchedule, centers: ArrayLike, std: float) -> Denoiser:
    """The exact data prediction for equally likely Gaussians: a model without error, to test solvers on.

    With the data set for centers it is the exact model of the data smoothed with bandwidth `std`.

    Args:
      schedule: the noise schedule.
      centers: (K, ...) the means, of the shape of one sample.
      std: their common standard deviation, above 0.

    Returns:
      denoise(x, t) for x (B, ...).

    Raises:
      TypeError: when the schedule is something else, centers no array of numbers, or std no number.
      ValueError: when there are no centers or std is not positive; when called, when x is of another shape.

    Examples:
      >>> import evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> denoise = gaussian_mixture(schedule, [[-1.0, 0.0], [1.0, 0.0]], 0.1)
      >>> denoise(jnp.array([[3.0, 0.0]]), jnp.float32(0.1)).round(2)
      Array([[2., 0.]], dtype=float32)
    """
    expect_schedule(schedule)
    centers = concrete_array("centers", centers)
    if centers.ndim < 1 or len(centers) < 1 or not std > 0:
        raise ValueError(f"gaussian_mixture needs centers (K, ...) and std > 0, got {centers.shape} and {std}")

    def denoise(x: jax.Array, t: Any) -> jax.Array:
        if x.shape[1:] != centers.shape[1:]:
            raise ValueError(f"x must be (B, ...) of the centers' shape {centers.shape[1:]}, got {x.shape}")
        wide = x.astype(at_least_float32(x.dtype))
        t = jnp.asarray(t, wide.dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        c = jnp.asarray(centers.reshape(len(centers), -1), wide.dtype)
        flat = wide.reshape(len(x), -1)
        variance = (alpha * std) ** 2 + sigma**2
        # log-weights -|x - alpha c|^2 / (2 variance) without their common |x|^2, which would cost float32 digits, and
        # with the differences taken before the sums, where a matrix product would lose some too.
        products = jnp.sum((flat[:, None] - alpha / 2 * c) * (alpha * c), axis=2)
        mean = jnp.matmul(jax.nn.softmax(products / variance), c, precision="highest")
        gain = alpha * std**2 / variance
        return (mean + gain * (flat - alpha * mean)).reshape(x.shape).astype(x.dtype)

    return of_schedule(denoise, schedule)
