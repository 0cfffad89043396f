"""The noise schedule: functions alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) eps, and their inverse.

Every function accepts Python and NumPy numbers, for which it computes in float64 on the host, and JAX arrays, traced
or not, for which it computes in their dtype. Solver tables are built from the first kind wherever the times are known.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import namespace, on_host

ScheduleFn = Callable[[Any], Any]

_BISECTIONS = 64  # halves [t_min, t_max] down to float64 round-off


class Levels(NamedTuple):
    """Noise levels at some times: alpha, sigma and lambda = log(alpha / sigma), arrays of the times' shape."""

    alpha: Any
    sigma: Any
    lambda_: Any


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule x_t = alpha(t) x_0 + sigma(t) eps on t_min <= t <= t_max.

    Build one from your own functions of an array of times; they may use NumPy, jax.numpy or plain arithmetic:

    >>> import jax.numpy as jnp
    >>> cosine = NoiseSchedule(lambda t: jnp.cos(t), lambda t: jnp.sin(t), t_min=0.01, t_max=1.5)
    >>> round(float(cosine.time(cosine.lambda_(0.7))), 6)
    0.7

    Attributes:
      alpha: the signal scale, elementwise in t.
      sigma: the noise scale, elementwise in t.
      t_min: the time at which sampling ends.
      t_max: the time at which sampling starts.
      time: the inverse of `lambda_`, elementwise; left out, it is found by bisection.
      num_timesteps: n for a model trained at n discrete noise levels, t being their index 0 .. n - 1, else None.

    Raises:
      ValueError: when t_min >= t_max, or alpha or sigma is negative or not finite, or alpha / sigma does not
        decrease with t, or `time` is not the inverse of `lambda_`.
    """

    alpha: ScheduleFn
    sigma: ScheduleFn
    t_min: float
    t_max: float
    time: ScheduleFn = None  # pyright: ignore[reportAssignmentType]  # __post_init__ replaces None
    num_timesteps: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.t_min) and math.isfinite(self.t_max) and self.t_min < self.t_max):
            raise ValueError(f"a schedule needs finite t_min < t_max, got t_min={self.t_min}, t_max={self.t_max}")
        if self.time is None:
            object.__setattr__(self, "time", functools.partial(_bisect, self.lambda_, self.t_min, self.t_max))
        times = np.linspace(self.t_min, self.t_max, 65)
        alpha, sigma, lambda_ = self.levels(times)
        if alpha.shape != times.shape or sigma.shape != times.shape:
            raise ValueError(
                f"alpha and sigma must be elementwise: for times of shape {times.shape} they returned "
                f"shapes {alpha.shape} and {sigma.shape}"
            )
        # sigma may be 0 at the end and alpha 0 at the start (zero terminal SNR), nowhere else.
        if not (np.isfinite([alpha, sigma]).all() and (alpha[:-1] > 0).all() and (sigma[1:] > 0).all()):
            raise ValueError("alpha and sigma must be finite, and positive between t_min and t_max")
        if not (np.diff(lambda_) < 0).all():
            raise ValueError("alpha(t) / sigma(t) must decrease from t_min to t_max")
        inner = lambda_[1:-1]
        round_trip = on_host(self.time, inner)
        if not np.allclose(round_trip, times[1:-1], rtol=1e-4, atol=1e-4 * (self.t_max - self.t_min)):
            raise ValueError("time must be the inverse of lambda_: time(lambda_(t)) does not give t back")

    def lambda_(self, t: Any) -> Any:
        """log(alpha(t) / sigma(t)), half the log-SNR, elementwise."""
        xp = namespace(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if xp is np:
            with np.errstate(divide="ignore", invalid="ignore"):  # the caller judges infinities
                return np.log(np.asarray(alpha, np.float64)) - np.log(np.asarray(sigma, np.float64))
        return jnp.log(alpha) - jnp.log(sigma)

    def levels(self, t: Any) -> Levels:
        """Alpha, sigma and lambda at times `t`: float64 NumPy arrays on the host for concrete `t`, else traced."""
        if namespace(t) is np:
            return Levels(*(on_host(f, t) for f in (self.alpha, self.sigma, self.lambda_)))
        return Levels(self.alpha(t), self.sigma(t), self.lambda_(t))


def check_schedule(schedule: Any) -> None:
    """Raises TypeError for anything but a schedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, for example schedules.edm(), got {schedule!r}")


def _bisect(lambda_: ScheduleFn, t_min: float, t_max: float, target: Any) -> Any:
    """The time at which the decreasing function `lambda_` takes the value `target`, elementwise."""
    xp = namespace(target)
    target = xp.asarray(target)
    low, high = xp.full_like(target, t_min), xp.full_like(target, t_max)

    def halve(_: int, bracket: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bracket
        middle = low + (high - low) / 2
        later = lambda_(middle) > target
        return xp.where(later, middle, low), xp.where(later, high, middle)

    if xp is np:
        for i in range(_BISECTIONS):
            low, high = halve(i, (low, high))
    else:
        low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    return low + (high - low) / 2
