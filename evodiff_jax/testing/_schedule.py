"""Whether a noise schedule of one's own is what solvers and grids take it for."""

import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import enable_x64, on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule

_TIMES, _FEW = 2001, 101  # times looked at on the host, and in programs
_INVERSE = 1e-9  # of t_max - t_min: the error of `time` in float64; bisection has 1e-16
_INVERSE_FLOAT32 = 1e-4  # the same in float32; 2e-7 is the most in the package
_LEVEL = 1e-4  # the relative error of alpha and sigma in float32; 5e-7 is the most in the package
_LAMBDA = 1e-4  # the error of lambda in float32, of alpha / sigma a relative one; 8e-7 is the most in the package
_ROUNDING = 1e-6  # what lambda may rise in float32 between times that are near each other
_NAMES = ("alpha", "sigma", "lambda_", "time")
_SLOPE = 0.02  # the relative error of the gradient of lambda


class ScheduleReport(NamedTuple):
    """What `check_schedule` measured.

    Attributes:
      inverse_error: the largest |time(lambda_(t)) - t| over t_max - t_min in float64.
      inverse_error_float32: the same in float32.
      level_error_float32: the largest difference of alpha and sigma in float32 from float64, over the larger of 0.05
        and their size.
      picklable: whether the schedule can be pickled: its functions stand at the top of a module.
    """

    inverse_error: float
    inverse_error_float32: float
    level_error_float32: float
    picklable: bool


def check_schedule(schedule: NoiseSchedule) -> ScheduleReport:
    """Checks a noise schedule at many times, on the host in float64 and in compiled programs in float32.

    * alpha and sigma are finite and not negative, and alpha / sigma decreases from t_min to t_max, in both precisions.
    * `time` is the inverse of `lambda_`, in both precisions.
    * The levels in float32 are those in float64 to 4 digits: a difference such as 1 - alpha^2 loses them where alpha is
      near 1. float32 times give float32 levels in a program whose other numbers are float64.
    * Times of any shape give levels of this shape, under `jax.jit` and `jax.vmap` as without.
    * Gradients of alpha, sigma, lambda and `time` are finite between t_min and t_max, those of the last two are slopes.

    Args:
      schedule: yours.

    Returns:
      What was measured.

    Raises:
      TypeError: when schedule is no NoiseSchedule.
      ValueError: for the first check that fails; the message says at which time and by how much.

    Examples:
      >>> import evodiff_jax as ed
      >>> check_schedule(ed.schedules.flow(3.0)).picklable
      True
    """
    expect_schedule(schedule)
    times = _times(schedule, _TIMES)
    alpha, sigma, lambda_ = schedule.levels(times)
    _check_levels(times, alpha, sigma, lambda_)
    span = schedule.t_max - schedule.t_min
    inner = slice(1, -1)
    recovered = on_host(schedule.time, lambda_[inner])
    inverse = _largest(
        np.abs(recovered - times[inner]) / span,
        times[inner],
        _INVERSE,
        "time must be the inverse of lambda_: time(lambda_(t)) differs from t by {0:.3g} of t_max - t_min at t = "
        "{1:.6g}",
    )
    _check_shapes(schedule, times)
    inverse_float32, level = _check_float32(schedule, span)
    return ScheduleReport(inverse, inverse_float32, level, _is_picklable(schedule, times))


def _times(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """Times from t_min to t_max, evenly spaced but for some that are dense at both ends."""
    even = np.linspace(0, 1, count - count // 4)
    dense = np.geomspace(1e-5, 0.1, count // 8)
    fractions = np.unique(np.round(np.concatenate([even, dense, 1 - dense]), 5))
    return schedule.t_min + fractions * (schedule.t_max - schedule.t_min)


def _largest(errors: np.ndarray, times: np.ndarray, most: float, message: str) -> float:
    """The largest error.

    Raises:
      ValueError: when it is above `most`, or not a number.
    """
    worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
    if not errors[worst] <= most:
        raise ValueError(message.format(errors[worst], times[worst]))
    return float(errors[worst])


def _check_levels(times: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, lambda_: np.ndarray, of: str = "") -> None:
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        bad = ~(np.isfinite(level) & (level >= 0))
        if bad.any():
            i = np.argmax(bad)
            raise ValueError(f"{name} must be finite and not negative{of}, it is {level[i]} at t = {times[i]:.6g}")
    nothing = (alpha[:-1] == 0) | (sigma[1:] == 0)
    if nothing.any():
        raise ValueError(
            f"alpha may be 0 at t_max alone and sigma at t_min alone{of}, one is between t = "
            f"{times[np.argmax(nothing)]:.6g} and {times[np.argmax(nothing) + 1]:.6g}"
        )
    rises = ~(np.diff(lambda_) < (_ROUNDING * np.maximum(np.abs(lambda_[1:]), 1) if of else 0))
    if rises.any():
        i = np.argmax(rises)
        raise ValueError(
            f"lambda = log(alpha / sigma) must decrease with t{of}, it goes from {lambda_[i]:.8g} at t = {times[i]:.8g}"
            f" to {lambda_[i + 1]:.8g} at t = {times[i + 1]:.8g}"
        )


def _check_shapes(schedule: NoiseSchedule, times: np.ndarray) -> None:
    for shape in ((), (1,), (2, 3)):
        some = np.resize(times[len(times) // 3 :: 7], shape)
        try:
            inside = jax.eval_shape(_everything(schedule), jax.ShapeDtypeStruct(shape, jnp.float32))
        except (TypeError, ValueError) as error:
            raise ValueError(
                "the schedule's functions must take traced times: use jax.numpy or plain arithmetic in them; NumPy "
                f"takes concrete times alone: {error}"
            ) from error
        found = dict(zip(_NAMES, schedule.levels(some), strict=False))
        found |= {f"{name} of a traced time": inside[name] for name in _NAMES}
        for name, value in found.items():
            if np.shape(value) != shape:
                raise ValueError(f"{name} must have the shape of its argument, {shape}, it has {np.shape(value)}")


def _everything(schedule: NoiseSchedule) -> Any:
    """All functions of a schedule as one of traced times."""

    def of_times(t: jax.Array) -> dict[str, jax.Array]:
        lambda_ = schedule.lambda_(t)
        return {
            "alpha": schedule.alpha(t),
            "sigma": schedule.sigma(t),
            "lambda_": lambda_,
            "time": schedule.time(lambda_),
        }

    return of_times


def _check_float32(schedule: NoiseSchedule, span: float) -> tuple[float, float]:
    """Compares a program in float32 with the host, and returns the errors of the inverse and of the levels."""
    times = _times(schedule, _FEW)[1:-1].astype(np.float32)
    everything = _everything(schedule)

    def program(t: jax.Array) -> Any:
        slope_of = lambda fn, at: jax.vmap(jax.grad(fn))(at)
        slopes = [slope_of(fn, t) for fn in (schedule.alpha, schedule.sigma, schedule.lambda_)]
        return everything(t), jax.vmap(everything)(t), [*slopes, slope_of(schedule.time, schedule.lambda_(t))]

    with enable_x64():
        shapes = jax.eval_shape(everything, jax.ShapeDtypeStruct((3,), jnp.float32))
        for name in _NAMES:
            if shapes[name].dtype != jnp.float32:
                raise ValueError(
                    f"{name} of times in float32 must be float32, it is {shapes[name].dtype} where float64 is enabled: "
                    "cast NumPy's arrays and numbers to the dtype of the time, or use Python's numbers"
                )
    found, mapped, slopes = jax.tree.map(np.asarray, jax.jit(program)(times))
    wide = times.astype(np.float64)
    alpha, sigma, lambda_ = schedule.levels(wide)
    _check_levels(wide, found["alpha"], found["sigma"], found["lambda_"], " in float32")
    level = max(
        _largest(
            np.abs(found[name] - exact) / np.maximum(exact, 0.05),
            wide,
            _LEVEL,
            f"{name} in float32 differs from float64 by {{0:.3g}} of its size at t = {{1:.6g}}: avoid differences of "
            "numbers that are nearly equal, for example with expm1",
        )
        for name, exact in (("alpha", alpha), ("sigma", sigma))
    )
    _largest(
        np.abs(found["lambda_"] - lambda_),
        wide,
        _LAMBDA,
        "lambda = log(alpha / sigma) in float32 differs from float64 by {0:.3g} at t = {1:.6g}: avoid differences of "
        "numbers that are nearly equal, for example with expm1",
    )
    inverse = _largest(
        np.abs(found["time"] - wide) / span,
        wide,
        _INVERSE_FLOAT32,
        "time(lambda_(t)) in float32 differs from t by {0:.3g} of t_max - t_min at t = {1:.6g}",
    )
    for name, values in found.items():
        if not np.allclose(mapped[name], values, rtol=1e-5, atol=1e-6):
            raise ValueError(f"{name} under jax.vmap differs from {name} of an array of times: it must be elementwise")
    for name, slope in zip(("alpha", "sigma", "lambda_", "time"), slopes, strict=True):
        if not np.isfinite(slope).all():
            where = wide[np.argmax(~np.isfinite(slope))]
            raise ValueError(
                f"the gradient of {name} must be finite between t_min and t_max, it is not at t = {where:.6g}"
            )
    step = 1e-5 * np.minimum(wide - schedule.t_min, schedule.t_max - wide)
    before, after = ((schedule.levels(wide + sign * step).lambda_ - lambda_) / (sign * step) for sign in (-1, 1))
    steep, flat = np.minimum(before, after), np.maximum(before, after)  # they differ at a kink
    for name, slope, low, high in (
        ("lambda in t", slopes[2], steep, flat),
        ("time in lambda", slopes[3], 1 / flat, 1 / steep),
    ):
        _largest(
            np.maximum(low - slope, slope - high) / np.abs(low),
            wide,
            _SLOPE,
            f"the gradient of {name} differs by {{0:.3g}} of its size from the slope at t = {{1:.6g}}",
        )
    return inverse, level


def _is_picklable(schedule: NoiseSchedule, times: np.ndarray) -> bool:
    try:
        again = pickle.loads(pickle.dumps(schedule))
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    if not all(np.array_equal(a, b) for a, b in zip(again.levels(times), schedule.levels(times), strict=True)):
        raise ValueError("the pickled schedule has other levels: functions that are pickled must not keep a state")
    return True
