"""Empirical model statistics of a network along the noise levels, for DPM-Solver-v3.

With u = x / alpha, kappa = sigma / alpha, lambda = -log kappa and the data prediction m(u, lambda), the
probability-flow ODE is du/dlambda = m - u. DPM-Solver-v3 splits it into a linear part and the rest,

    du/dlambda = -l u - f,    f = (1 - l) u - m,    df/dlambda = s f + b + what is left,

and chooses l, s, b for each coordinate and level so that f depends least on u, and least is left, on average over the
states that occur:

    l = 1 - E[diag dm/du],    s = Cov(f, f') / Var(f),    b = E[f'] - s E[f].

Zheng, Lu, Chen, Zhu, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics", arXiv 2310.13268,
section 3.2 and appendix; l, s, b here are the paper's, in terms of the data prediction.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from evodiff_jax.files import write_atomically
from evodiff_jax.numerics import at_least_float32, checked_arguments, is_integer, on_host
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule, expect_schedule, some_levels
from evodiff_jax.types import Denoiser, check_function, check_keys, check_state

_FORMAT = "evodiff_jax/model_statistics/1"
# Where the model is smooth f goes from kappa^-2 at high noise to kappa at low noise: s lies between 2 and -1. Estimates
# beyond, seen where l is known less well than f is small, are noise that the solver would exponentiate.
_STEEPEST = 2.0
_PROBES = 65  # times at which a file records its schedule


class Statistics(NamedTuple):
    """Statistics of a model at M levels, for samples of a given shape.

    Attributes:
      lambda_: (M,), the levels, increasing; between them the solver interpolates by cubic splines.
      l: (M, ...), the linear coefficient of the ODE.
      s: (M, ...), the linear coefficient of df/dlambda; estimates are kept within -2 and 2.
      b: (M, ...), the constant of df/dlambda.
    """

    lambda_: np.ndarray
    l: np.ndarray  # noqa: E741  # the paper's name
    s: np.ndarray
    b: np.ndarray


@checked_arguments
def estimate(
    denoise: Denoiser,
    x_0: ArrayLike,
    schedule: NoiseSchedule,
    *,
    key: jax.Array,
    num_levels: int = 120,
    batch_size: int | None = None,
) -> Statistics:
    """Estimates the statistics of a model on samples of its data.

    At every level each sample is noised once; the diagonal of the Jacobian is estimated by Hutchinson's method with one
    Rademacher vector a sample. Takes three JVPs and two calls of the model for each sample and level. Samples are few
    when estimates of neighbouring levels differ: hundreds at least for images.

    Args:
      denoise: denoise(x, t) -> x_0, the data prediction, for batches of `batch_size`.
      x_0: (B, ...), samples of the data (or of the model itself), in the floating-point dtype to compute in.
      schedule: the model's noise schedule, of finite log-SNR at both ends.
      key: a JAX random key.
      num_levels: the number of levels M, equally spaced in lambda from t_max to t_min.
      batch_size: how many samples go through the model at once, by default all; it must divide B.

    Returns:
      The statistics, float64.

    Raises:
      TypeError: when denoise is no function, x_0 not floating-point, the schedule something else, or key no random key.
      ValueError: when denoise was made for another schedule, there are fewer than two samples or levels, batch_size
        does not divide B, or the log-SNR is infinite at an end.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    expect_schedule(schedule)
    check_same_schedule(denoise, some_levels(schedule), "the schedule given for the statistics")
    x_0 = jnp.asarray(x_0)
    check_state(x_0, "x_0")
    key = check_keys(key, 1)
    if len(x_0) < 2 or not is_integer(num_levels) or num_levels < 2:
        raise ValueError(
            f"estimate needs two samples and two levels at least, got x_0 {x_0.shape}, {num_levels!r} levels"
        )
    batch_size = len(x_0) if batch_size is None else batch_size
    if not is_integer(batch_size) or batch_size < 1 or len(x_0) % batch_size:
        raise ValueError(f"batch_size must divide the number of samples, {len(x_0)}, got {batch_size}")
    start, end = on_host(schedule.lambda_, [schedule.t_max, schedule.t_min])
    if not np.isfinite([start, end]).all():
        raise ValueError(f"the log-SNR must be finite at t_max and t_min, got lambda {start} and {end}")
    lambda_ = np.linspace(start, end, num_levels)
    times = on_host(schedule.time, lambda_).clip(schedule.t_min, schedule.t_max)
    dtype = at_least_float32(x_0.dtype)
    batches = x_0.reshape(-1, batch_size, *x_0.shape[1:])

    def mean_over_batches(moments: Any, level: Any, key: jax.Array) -> Any:
        def one(batch_and_key: Any) -> Any:
            batch, key = batch_and_key
            return jax.tree.map(lambda a: jnp.mean(a, 0), moments(batch.astype(dtype), level, key))

        sums = jax.lax.map(one, (batches, jax.random.split(key, len(batches))))
        return jax.tree.map(lambda a: jnp.mean(a, 0), sums)

    def prediction(u: jax.Array, t: jax.Array) -> jax.Array:
        return denoise((schedule.alpha(t) * u).astype(x_0.dtype), t).astype(dtype)

    def noised(x: jax.Array, t: jax.Array, key: jax.Array) -> jax.Array:
        return x + schedule.sigma(t) / schedule.alpha(t) * jax.random.normal(key, x.shape, dtype)

    def diagonal(x: jax.Array, t: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, probe_key = jax.random.split(key)
        probe = jax.random.rademacher(probe_key, x.shape, dtype)
        _, product = jax.jvp(lambda u: prediction(u, t), (noised(x, t, noise_key),), (probe,))
        return 1 - probe * product

    def regression(x: jax.Array, level: Any, key: jax.Array) -> tuple[jax.Array, ...]:
        t, linear, slope, center, center_of_df = level
        u = noised(x, t, jax.random.split(key)[0])  # the states that l was estimated on
        t_by_lambda = 1 / jax.grad(schedule.lambda_)(t)
        # du/dlambda = m - u needs m first: one call beside the JVP.
        m = prediction(u, t)
        du = m - u
        _, dm = jax.jvp(prediction, (u, t), (du, t_by_lambda))
        f = (1 - linear) * u - m - center
        df = (1 - linear) * du - slope * u - dm - center_of_df
        return f, df, f * f, f * df, u * u

    t, keys = jnp.asarray(times, dtype), jax.random.split(key, num_levels)

    def over_levels(moments: Any, levels: Any) -> Any:
        return jax.lax.map(lambda a: mean_over_batches(moments, *a), (levels, keys))

    linear = over_levels(diagonal, t)
    slope = jnp.gradient(linear, (lambda_[1] - lambda_[0]).item(), axis=0)
    # Means first, then moments about them: differences of products of means would cancel.
    zero = jnp.zeros_like(linear)
    f, df, _, _, _ = over_levels(regression, (t, linear, slope, zero, zero))
    _, _, variance, covariance, power = over_levels(regression, (t, linear, slope, f, df))
    f, df, variance, covariance, power = (np.asarray(a, np.float64) for a in (f, df, variance, covariance, power))
    # A coordinate on which f varies no more than rounding of the state makes it has no slope.
    floor = (64 * float(jnp.finfo(dtype).eps)) ** 2 * power
    s = np.where(variance > floor, covariance / np.maximum(variance, floor), 0.0)
    s = np.clip(s, -_STEEPEST, _STEEPEST)
    return Statistics(lambda_, np.asarray(linear, np.float64), s, df - s * f)


def save(path: str | os.PathLike[str], statistics: Statistics, schedule: NoiseSchedule) -> None:
    """Writes statistics as a safetensors file, atomically, with the schedule they belong to.

    Args:
      path: the file to write; its folder must exist.
      statistics: from `estimate`.
      schedule: the schedule they were estimated with.

    Raises:
      OSError: when the file cannot be written.
    """
    from safetensors.numpy import save as serialize  # not loaded with the library

    arrays = {name: np.ascontiguousarray(array) for name, array in statistics._asdict().items()}
    content = serialize({**arrays, "schedule": _signature(schedule)}, {"format": _FORMAT})
    write_atomically(Path(path), lambda file: file.write(content))


def load(path: str | os.PathLike[str], schedule: NoiseSchedule) -> Statistics:
    """Reads statistics written by `save`.

    Args:
      path: the file.
      schedule: the schedule of the run they are for.

    Returns:
      The statistics.

    Raises:
      OSError: when the file cannot be read.
      ValueError: when it is no such file, or its statistics belong to another schedule.
    """
    import safetensors  # not loaded with the library

    content = Path(path).read_bytes()
    try:
        import safetensors.numpy

        arrays = safetensors.numpy.load(content)
        signature = arrays.pop("schedule")
        statistics = Statistics(**arrays)
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of model statistics written by evodiff_jax") from error
    expected = _signature(schedule)
    if signature.shape != expected.shape or not np.allclose(signature, expected, rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"the statistics in {path} belong to another schedule, from t = {signature[0, -1]} to {signature[0, 0]}: "
            "estimate them again for this one"
        )
    return statistics


def _signature(schedule: NoiseSchedule) -> np.ndarray:
    """(3, P): times across the schedule, alpha and sigma there."""
    times = np.linspace(schedule.t_min, schedule.t_max, _PROBES)
    alpha, sigma, _ = schedule.levels(times)
    return np.stack([times, alpha, sigma])
