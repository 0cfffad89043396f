"""Schedules of models trained at n discrete noise levels: DDPM and its descendants."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from evodiff_jax.numerics import checked_arguments, concrete_array, is_integer, namespace
from evodiff_jax.schedules._schedule import NoiseSchedule

_LOG_OF_NOTHING = -100.0  # of alphas_cumprod before the last level, whose smallest published value is e^-20
_NEAR_ZERO = 0.02  # models are trained down to 0.005 (Stable Diffusion) or less, whose square root is 0.07


@checked_arguments
def discrete(
    betas: ArrayLike | None = None, *, alphas_cumprod: ArrayLike | None = None, t_min: float = 0.0
) -> NoiseSchedule:
    """The variance-preserving schedule through n discrete noise levels, t being their index, 0 .. n - 1.

    alpha(i)^2 = alphas_cumprod[i] = prod_{j <= i} (1 - betas[j]) and sigma^2 = 1 - alpha^2. Between the levels the
    angle arctan(sigma / alpha) is linear in t, which is smooth also where the last level has no signal left (zero
    terminal SNR). At t = -1 there is no noise.

    Args:
      betas: (n,) the variances of the forward process; `linear_betas`, `scaled_linear_betas` and `cosine_betas` make
        the usual ones.
      alphas_cumprod: (n,) the squares of alpha, in place of betas.
      t_min: where sampling ends: 0, the lowest level the model was trained at, or -1, where sigma is 0.

    Returns:
      The schedule; `num_timesteps` is n.

    Raises:
      ValueError: unless one of betas and alphas_cumprod is given, one-dimensional with n >= 2, and alphas_cumprod
        decreases strictly from below 1 to at most 0.02; or when t_min is not from -1 up to below n - 1.

    References:
      Ho, Jain, Abbeel, arXiv 2006.11239.

    Examples:
      >>> schedule = discrete(scaled_linear_betas())  # Stable Diffusion 1 and 2
      >>> schedule.num_timesteps, schedule.t_max, round(float(schedule.sigma(999) / schedule.alpha(999)), 2)
      (1000, 999.0, 14.61)
    """
    if (betas is None) == (alphas_cumprod is None):
        raise ValueError("discrete needs either betas or alphas_cumprod")
    name, value = ("betas", betas) if alphas_cumprod is None else ("alphas_cumprod", alphas_cumprod)
    given = concrete_array(name, value)
    if given.ndim != 1 or given.size < 2:
        raise ValueError(f"discrete needs one-dimensional {name} of at least 2 levels, got shape {given.shape}")
    if alphas_cumprod is None:
        if not ((given > 0) & (given <= 1)).all():
            raise ValueError(f"betas must be above 0 and at most 1, got {given.min()} to {given.max()}")
        if (given[:-1] == 1).any() or np.log1p(-given[:-1]).sum() < _LOG_OF_NOTHING:
            raise ValueError(
                f"betas from {given.min():.4g} to {given.max():.4g} leave no signal long before the last level: they "
                "are the variances of single steps (not alphas = 1 - betas, nor alphas_cumprod)"
            )
        with np.errstate(divide="ignore"):  # a last beta of 1 is zero terminal SNR
            log_cumprod = np.cumsum(np.log1p(-given))
        signal, noise = np.exp(log_cumprod), -np.expm1(log_cumprod)
    else:
        signal, noise = given, 1 - given
    if not (np.diff(signal, prepend=1.0) < 0).all() or signal[-1] < 0:
        raise ValueError("alphas_cumprod must decrease strictly from below 1 to 0 or more")
    if alphas_cumprod is not None and signal[-1] > _NEAR_ZERO:
        raise ValueError(
            f"alphas_cumprod must fall to near 0, to {_NEAR_ZERO} at most, got {signal[-1]:.4g} at the last level: it "
            "is the cumulative product of 1 - betas (not 1 - betas, nor the square root); or give betas"
        )
    if not -1 <= t_min < given.size - 1:
        raise ValueError(f"discrete needs -1 <= t_min < {given.size - 1}, got {t_min}")
    # Two angles, as either is known more exactly where it is small: node k stands for t = k - 1.
    nodes = np.arange(-1.0, given.size)
    from_data = np.concatenate([[0.0], np.arctan2(np.sqrt(noise), np.sqrt(signal))])
    from_noise = np.concatenate([[math.pi / 2], np.arctan2(np.sqrt(signal), np.sqrt(noise))])

    return NoiseSchedule(
        alpha=functools.partial(_sine, from_noise),
        sigma=functools.partial(_sine, from_data),
        time=functools.partial(_time, from_data, from_noise, nodes),
        t_min=t_min,
        t_max=given.size - 1.0,
        num_timesteps=given.size,
    )


def _sine(angles: np.ndarray, t: Any) -> Any:
    return namespace(t).sin(_interpolated(t, angles))


def _time(from_data: np.ndarray, from_noise: np.ndarray, nodes: np.ndarray, lambda_: Any) -> Any:
    xp = namespace(lambda_)
    near_data = xp.interp(xp.arctan(xp.exp(-lambda_)), *_like(lambda_, from_data, nodes))
    near_noise = xp.interp(-xp.arctan(xp.exp(lambda_)), *_like(lambda_, -from_noise, nodes))
    return xp.where(lambda_ > 0, near_data, near_noise)


@checked_arguments
def linear_betas(num_timesteps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """Equally spaced betas (Ho, Jain, Abbeel, arXiv 2006.11239, section 4).

    Args:
      num_timesteps: their number n.
      first: the first of them, above 0.
      last: the last and largest, at most 1.

    Returns:
      (n,), float64.

    Raises:
      ValueError: when n is not a positive integer, or unless 0 < first <= last <= 1.
    """
    _check_betas("linear_betas", num_timesteps, first, last)
    return np.linspace(first, last, num_timesteps)


@checked_arguments
def scaled_linear_betas(num_timesteps: int = 1000, first: float = 0.00085, last: float = 0.012) -> np.ndarray:
    """Betas with equally spaced square roots, of latent diffusion (Rombach et al., arXiv 2112.10752).

    Args:
      num_timesteps: their number n.
      first: the first of them, above 0.
      last: the last and largest, at most 1.

    Returns:
      (n,), float64.

    Raises:
      ValueError: when n is not a positive integer, or unless 0 < first <= last <= 1.
    """
    _check_betas("scaled_linear_betas", num_timesteps, first, last)
    return np.linspace(math.sqrt(first), math.sqrt(last), num_timesteps) ** 2


@checked_arguments
def cosine_betas(num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """The betas of the cosine schedule, limited (Nichol & Dhariwal, arXiv 2102.09672, Eq. 17).

    Args:
      num_timesteps: their number n.
      s: the offset of the paper, which keeps the first betas from vanishing, at least 0.
      max_beta: what no beta exceeds, above 0 and at most 1.

    Returns:
      (n,), float64.

    Raises:
      ValueError: when n is not a positive integer, s is negative, or unless 0 < max_beta <= 1.
    """
    _check_betas("cosine_betas", num_timesteps, max_beta, max_beta)
    if not 0 <= s < math.inf:
        raise ValueError(f"cosine_betas needs s of at least 0, got {s}")
    angle = math.pi / 2 * (np.arange(num_timesteps + 1) / num_timesteps + s) / (1 + s)
    level = np.cos(angle) ** 2
    return np.minimum(1 - level[1:] / level[:-1], max_beta)


def zero_terminal_snr(alphas_cumprod: ArrayLike) -> np.ndarray:
    """Shifts and scales alpha so that the last level has no signal and the first keeps its own, for `discrete`.

    Models trained so predict v, or the data: at alpha = 0 the noise says nothing about the data.

    Args:
      alphas_cumprod: (n,), decreasing.

    Returns:
      The new ones, float64.

    Raises:
      ValueError: unless it is one-dimensional and decreases from its first to its last element.

    References:
      Lin, Liu, Li, Yang, arXiv 2305.08891, algorithm 1.
    """
    given = concrete_array("alphas_cumprod", alphas_cumprod)
    if given.ndim != 1 or given.size < 2 or not ((given >= 0) & (given <= 1)).all() or not given[0] > given[-1]:
        raise ValueError(
            "zero_terminal_snr needs a one-dimensional, decreasing alphas_cumprod from 0 to 1, got "
            f"{np.array2string(given, threshold=6)}"
        )
    root = np.sqrt(given)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _check_betas(name: str, num_timesteps: int, first: float, last: float) -> None:
    if not is_integer(num_timesteps) or num_timesteps < 1:
        raise ValueError(f"{name} needs a positive integer for num_timesteps, got {num_timesteps!r}")
    if not 0 < first <= last <= 1:
        raise ValueError(f"{name} needs betas above 0 that do not decrease and are at most 1, got {first} to {last}")


def _interpolated(t: Any, table: np.ndarray) -> Any:
    """The table, whose element k stands for t = k - 1, linear in between."""
    xp = namespace(t)
    t = xp.asarray(t)
    values = _like(t, table)[0]
    index = xp.clip(xp.floor(t), -1, table.size - 3)
    fraction, node = t - index, index.astype(np.int32) + 1
    return values[node] * (1 - fraction) + values[node + 1] * fraction


def _like(value: Any, *tables: np.ndarray) -> tuple[Any, ...]:
    """The tables where `value` lives: in its dtype on a device, in float64 on the host."""
    return tables if namespace(value) is np else tuple(jnp.asarray(t, value.dtype) for t in tables)
