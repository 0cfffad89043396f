"""The noise schedule: functions alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) eps, and their inverse.

Every function accepts Python and NumPy numbers, for which it computes in float64 on the host, and JAX arrays, traced
or not, for which it computes in float32, or in float64 where they are. Solver tables are built from the first kind
wherever the times are known. Times beyond t_min and t_max are not checked: the functions are then extrapolated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.numerics import at_least_float32, concrete_array, is_integer, namespace, on_host, widened
from evodiff_jax.types import State, batch_size, check_keys, check_state, normal_like, per_sample, widest

ScheduleFn = Callable[[Any], Any]
"""A function of times, of any shape, that NumPy and jax.numpy arrays may be given to."""

_BISECTIONS = 64  # halves [t_min, t_max] down to float64 round-off


class Levels(NamedTuple):
    """Noise levels at some times: alpha, sigma and lambda = log(alpha / sigma), arrays of the times' shape."""

    alpha: Any
    sigma: Any
    lambda_: Any


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule x_t = alpha(t) x_0 + sigma(t) eps on t_min <= t <= t_max.

    Build one from your own functions of an array of times; they may use NumPy, jax.numpy or plain arithmetic.

    Attributes:
      alpha: the signal scale, elementwise in t.
      sigma: the noise scale, elementwise in t.
      t_min: the time at which sampling ends.
      t_max: the time at which sampling starts.
      time: the inverse of `lambda_`, elementwise; left out, it is found by bisection.
      num_timesteps: n for a model trained at n discrete noise levels, t being their index 0 .. n - 1, else None.

    Raises:
      TypeError: when alpha, sigma or time is no function, t_min or t_max no number, or num_timesteps no positive
        integer.
      ValueError: when t_min >= t_max, or alpha or sigma is negative or not finite, or alpha / sigma does not
        decrease with t, or `time` is not the inverse of `lambda_`.

    Examples:
      >>> import jax.numpy as jnp
      >>> cosine = NoiseSchedule(lambda t: jnp.cos(t), lambda t: jnp.sin(t), t_min=0.01, t_max=1.5)
      >>> round(float(cosine.time(cosine.lambda_(0.7))), 6)
      0.7
    """

    alpha: ScheduleFn
    sigma: ScheduleFn
    t_min: float
    t_max: float
    time: ScheduleFn = None  # pyright: ignore[reportAssignmentType]  # __post_init__ replaces None
    num_timesteps: int | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "time"):
            if not callable(getattr(self, name)) and not (name == "time" and self.time is None):
                raise TypeError(f"a schedule needs a function of t for {name}, got {getattr(self, name)!r}")
        if not (self.num_timesteps is None or (is_integer(self.num_timesteps) and self.num_timesteps > 0)):
            raise TypeError(f"num_timesteps must be a positive integer or None, got {self.num_timesteps!r}")
        for name in ("t_min", "t_max"):
            object.__setattr__(self, name, _scalar(name, getattr(self, name)))
        if not (math.isfinite(self.t_min) and math.isfinite(self.t_max) and self.t_min < self.t_max):
            raise ValueError(f"a schedule needs finite t_min < t_max, got t_min={self.t_min}, t_max={self.t_max}")
        for name in ("alpha", "sigma"):
            object.__setattr__(self, name, _of_floats(getattr(self, name)))
        time = functools.partial(_bisect, self.alpha, self.sigma, self.t_min, self.t_max)
        object.__setattr__(self, "time", _of_floats(time if self.time is None else self.time))
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
        return _lambda(self.alpha, self.sigma, t)

    def levels(self, t: Any) -> Levels:
        """Alpha, sigma and lambda at times `t`: float64 NumPy arrays on the host for concrete `t`, else traced."""
        if namespace(t) is np:
            return Levels(*(on_host(f, t) for f in (self.alpha, self.sigma, self.lambda_)))
        return Levels(self.alpha(t), self.sigma(t), self.lambda_(t))

    def noise(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> State:
        """Pure noise of the deviation sigma(t_max), from which a run over the whole schedule starts.

        For a run from another time t it is `add_noise(jnp.zeros(shape), t, key)`.

        Args:
          key: a random key, or one for each sample (B,), with which sample k depends on key k alone.
          shape: (B, ...), or a pytree of such tuples for a state that is a pytree.
          dtype: a floating-point dtype.

        Returns:
          The noise, x_T for `sample`.

        Raises:
          TypeError: when key is no random key, shape is no tuple of integers, or dtype is not floating-point.
          ValueError: when the shape has no batch axis, or there is neither one key nor one a sample.

        Examples:
          >>> import jax, evodiff_jax as ed
          >>> x_T = ed.schedules.edm(sigma_max=80.0).noise(jax.random.key(0), (1000, 100))
          >>> bool(abs(x_T.std() - 80) < 1)
          True
        """
        is_shape = lambda value: isinstance(value, tuple | list) and all(map(is_integer, value)) and len(value) > 0
        shapes = [tuple(shape)] if is_shape(shape) else jax.tree.leaves(shape, is_leaf=is_shape)
        if not all(map(is_shape, shapes)) or not shapes:
            raise TypeError(f"shape must be a tuple of integers (B, ...), or a pytree of such, got {shape!r}")
        try:
            floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            floating = False
        if dtype is None or not floating:
            raise TypeError(f"dtype must be a floating-point dtype, for example jnp.bfloat16, got {dtype!r}")
        empty = jax.tree.map(lambda s: jnp.zeros(tuple(s), dtype), shape, is_leaf=is_shape)
        return self.add_noise(empty, self.t_max, key)

    def add_noise(self, x_0: State, t: Any, key: jax.Array) -> State:
        """Data with the noise of time t, alpha(t) x_0 + sigma(t) eps: where image-to-image sampling starts.

        Args:
          x_0: the data, (B, ...) or a pytree of such.
          t: the time, a scalar: for sampling, the first time of the run that follows. Or one for each sample, (B,), as
            for training.
          key: a random key, or one for each sample (B,), with which sample k depends on key k alone.

        Returns:
          The noisy data, of the structure, shapes and dtypes of x_0.

        Raises:
          TypeError: when x_0 is not floating-point, or key is no random key.
          ValueError: when x_0 has no batch axis, t is of another shape or outside the schedule, or there is neither one
            key nor one a sample.

        Examples:
          >>> import jax, evodiff_jax as ed
          >>> schedule = ed.schedules.edm()
          >>> times = ed.grids.last_steps(ed.grids.log_snr(schedule, 20), strength=0.5)  # 10 steps
          >>> x = schedule.add_noise(jax.numpy.ones((4, 8)), times[0], jax.random.key(0))
          >>> x = ed.sample(lambda x, t: x / (1 + t**2), x, ed.plan(schedule, times, ed.solvers.unipc(2)))
        """
        x_0 = check_state(x_0, "x_0")
        if not isinstance(t, Tracer):
            concrete = concrete_array("t", t)
            slack = 1e-6 * (self.t_max - self.t_min)  # a float32 time of a float64 grid
            if not ((concrete >= self.t_min - slack) & (concrete <= self.t_max + slack)).all():
                raise ValueError(f"t must be within the schedule's {self.t_min:g} to {self.t_max:g}, got {t}")
        times = per_sample(t, x_0, "t", widest(jax.tree.leaves(x_0)))

        def noisy(x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
            wide = at_least_float32(x.dtype)
            alpha, sigma = self.alpha(t).astype(wide), self.sigma(t).astype(wide)
            return (alpha * x.astype(wide) + sigma * noise).astype(x.dtype)

        return jax.tree.map(noisy, x_0, normal_like(check_keys(key, batch_size(x_0)), x_0), times)


def _scalar(name: str, value: Any) -> float:
    number = concrete_array(name, value)
    if number.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {number.shape}")
    return float(number)


def expect_schedule(schedule: Any) -> None:
    """Raises TypeError for anything but a schedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, for example schedules.edm(), got {schedule!r}")


def _of_floats(fn: ScheduleFn) -> ScheduleFn:
    """The function with its argument in float32 at least; as it is where it has been through here."""
    return fn if isinstance(fn, functools.partial) and fn.func is _widen else functools.partial(_widen, fn)


def _widen(fn: ScheduleFn, t: Any) -> Any:
    return fn(widened(t))


def _lambda(alpha: ScheduleFn, sigma: ScheduleFn, t: Any) -> Any:
    if namespace(t) is np:
        with np.errstate(divide="ignore", invalid="ignore"):  # the caller judges infinities
            return np.log(np.asarray(alpha(t), np.float64)) - np.log(np.asarray(sigma(t), np.float64))
    return jnp.log(alpha(t)) - jnp.log(sigma(t))


def _bisect(alpha: ScheduleFn, sigma: ScheduleFn, t_min: float, t_max: float, target: Any) -> Any:
    """The time at which the decreasing log(alpha / sigma) takes the value `target`, elementwise."""
    xp = namespace(target)
    wanted = xp.asarray(target) if xp is np else jax.lax.stop_gradient(xp.asarray(target))
    low, high = xp.full_like(wanted, t_min), xp.full_like(wanted, t_max)

    def halve(_: int, bracket: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bracket
        middle = low + (high - low) / 2
        later = _lambda(alpha, sigma, middle) > wanted
        return xp.where(later, middle, low), xp.where(later, high, middle)

    if xp is np:
        for i in range(_BISECTIONS):
            low, high = halve(i, (low, high))
        return low + (high - low) / 2
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    t = low + (high - low) / 2
    return t + _slope_of_inverse(alpha, sigma, t, xp.asarray(target))


def _slope_of_inverse(alpha: ScheduleFn, sigma: ScheduleFn, t: Any, target: Any) -> Any:
    """Zero, with the gradient in target that the time t has, at which log(alpha / sigma) is the target."""
    _, slope = jax.jvp(functools.partial(_lambda, alpha, sigma), (t,), (jnp.ones_like(t),))
    known = jnp.isfinite(slope) & (slope < 0) & jnp.isfinite(target)
    zero = jnp.where(known, target - jax.lax.stop_gradient(target), 0)
    return zero / jnp.where(known, jax.lax.stop_gradient(slope), 1)
