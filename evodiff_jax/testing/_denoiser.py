"""Whether a network is read by its own convention: a wrong one gives plausible, wrong samples, and no error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.denoisers import NEED_SIGNAL, PREDICTIONS, from_prediction
from evodiff_jax.numerics import on_host
from evodiff_jax.schedules import NoiseSchedule, expect_schedule
from evodiff_jax.testing._models import as_network
from evodiff_jax.types import Denoiser, State, check_function, check_keys, check_state, fold_in, widest

_RATIOS = (0.25, 0.7, 2.0, 4.0)  # sigma over alpha times the data's deviation: where a wrong reading shows
# Of the error of the best linear prediction. Right readings are near 1 for Gaussian data and below it for all others.
_WRONG = 2.0  # no right reading is above: even a poor network predicts better than that
_BETTER = 1.4  # a reading whose error is that many times lower is the right one; a right reading is the lowest of all
_RIGHT = 1.2  # another reading has to be as good to be named
_RIGHT_OF_EDM = 0.5  # with EDM's preconditioning an output of no use is as good as the best linear prediction
_TIE = 1.25  # a simpler reading is preferred to one that is better by less than this factor


class Fit(NamedTuple):
    """How a function fits as a network of a schedule.

    Attributes:
      prediction: what the function predicts, one of `denoisers.PREDICTIONS`.
      time: how the function takes its time, as `denoisers.from_prediction` has it, or "1000 t", "t / 1000".
      error: its mean square error over that of the best linear prediction of the data, the geometric mean over four
        noise levels; below 1 for a good network on data that are not Gaussian.
    """

    prediction: str
    time: str
    error: float


class _Reading(NamedTuple):
    """A fit, and what `from_prediction` took the network's output for if the function came from there."""

    fit: Fit
    declared: str = "data"


def check_denoiser(denoise: Denoiser, schedule: NoiseSchedule, data: State, key: jax.Array) -> Fit:
    """Checks that a function predicts the data from noisy data, and says which convention fits if it does not.

    The function is tried on the data with noise of up to four levels, and its output is taken for each kind of
    prediction, with each kind of time. For a network without `from_prediction` the error names the arguments that it
    needs; for one with the wrong `prediction` there the right one. A wrong `time` there shows as a bad fit only: then
    check the network without `from_prediction`.

    Args:
      denoise: denoise(x, t) -> x_0, as for `sample`.
      schedule: the schedule of the run.
      data: (B, ...) or a pytree of such, some of the data that the network was trained on, scaled as for training. Ten
        images are enough.
      key: a random key.

    Returns:
      The fit as a data prediction at the schedule's time.

    Raises:
      TypeError: when denoise is no function, the schedule is something else, data are not floating-point, or key is no
        random key.
      ValueError: when another convention fits better or none does, the data are constant, or the schedule has none of
        the noise levels.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule, key = ed.schedules.vp_linear(), jax.random.key(0)
      >>> data = 1 + 0.5 * jax.random.normal(key, (100, 8))
      >>> denoise = ed.denoisers.gaussian_mixture(schedule, [[1.0] * 8], 0.5)
      >>> round(check_denoiser(denoise, schedule, data, key).error, 1)
      1.0
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    expect_schedule(schedule)
    data = check_state(data, "data")
    key = check_keys(key, 1)
    deviation = _deviation(data)
    if not deviation > 0:
        raise ValueError("check_denoiser needs data that vary, got a constant")
    levels = _times(schedule, deviation)
    noisy = [(t, schedule.add_noise(data, t, fold_in(key, i))) for i, t in enumerate(levels)]
    linear = np.array([_linear_error(schedule, t, deviation) for t in levels])
    network = jax.jit(denoise)

    def error(fn: Denoiser, prediction: str, time: Any) -> float:
        """The error of a function read in one way, infinite for one that can't be."""
        if prediction in NEED_SIGNAL and on_host(schedule.alpha, schedule.t_max) == 0:
            return np.inf
        read = from_prediction(fn, schedule, prediction, time=time, sigma_data=deviation)
        errors = np.array([_mean_square(read(x, t), data) for t, x in noisy])
        relative = np.maximum(errors, 1e-30) / linear
        return float(np.exp(np.mean(np.log(relative)))) if np.isfinite(relative).all() else np.inf

    own = Fit("data", "t", error(network, "data", "t"))
    others = [  # the simplest first
        _Reading(Fit(prediction, "t", error(as_network(declared, network, schedule), prediction, "t")), declared)
        for declared in PREDICTIONS[:-1]  # all but "edm"
        for prediction in PREDICTIONS[:-1]
        if prediction != declared
    ]
    for time, taken in _ways_to_take_time(schedule).items():
        others += [_Reading(Fit(p, time, error(network, p, taken))) for p in PREDICTIONS if (p, time) != ("data", "t")]
    right = [r for r in others if r.fit.error <= (_RIGHT_OF_EDM if r.fit.prediction == "edm" else _RIGHT)]
    lowest = min((r.fit.error for r in right), default=np.inf)
    if own.error <= min(_WRONG, _BETTER * lowest):
        return own
    found = f"as a data prediction denoise has {own.error:.3g} times the error of the best linear prediction"
    if not right:
        raise ValueError(
            f"{found}, and it fits no other convention: check the scale of the data, the schedule, and the network "
            "alone, without from_prediction"
        )
    best, declared = next(r for r in right if r.fit.error <= _TIE * lowest)
    if declared != "data":
        raise ValueError(
            f"{found}, and {best.error:.3g} if the network that was given to from_prediction as {declared!r} "
            f"predicts {best.prediction!r}: give from_prediction that"
        )
    code = {"1000 t": "lambda t: 1000 * t", "t / 1000": "lambda t: t / 1000"}.get(best.time, repr(best.time))
    argument = "" if best.time == "t" else f", time={code}"
    raise ValueError(
        f"{found}, and {best.error:.3g} as prediction {best.prediction!r} with time {best.time}: use "
        f"denoisers.from_prediction(fn, schedule, {best.prediction!r}{argument})"
        f"{'' if best.time == 't' else '; if denoise is from from_prediction, check the time that was given there'}"
    )


def _ways_to_take_time(schedule: NoiseSchedule) -> dict[str, str | Callable[[Any], Any]]:
    ways: dict[str, str | Callable[[Any], Any]] = {name: name for name in ("t", "sigma", "log_sigma", "c_noise")}
    if schedule.num_timesteps is not None:
        ways["index"] = "index"
    return {**ways, "1000 t": lambda t: 1000 * t, "t / 1000": lambda t: t / 1000}


def _times(schedule: NoiseSchedule, deviation: float) -> list[float]:
    """Times at which the noise is of the order of the data, within the schedule."""
    lambdas = -np.log(np.array(_RATIOS) * deviation)
    high, low = on_host(schedule.lambda_, [schedule.t_min, schedule.t_max])
    within = lambdas[(lambdas <= high) & (lambdas >= low)]
    if not within.size:
        raise ValueError(
            f"check_denoiser needs noise of the order of the data, of deviation {deviation:.3g}; the schedule has "
            f"sigma / alpha from {np.exp(-high):.3g} to {np.exp(-low):.3g}: scale the data as for training"
        )
    return [float(t) for t in on_host(schedule.time, within)]


def _deviation(data: State) -> float:
    values = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(data)])
    return float(values.std())


def _linear_error(schedule: NoiseSchedule, t: float, deviation: float) -> float:
    """The mean square error of the best linear prediction of uncorrelated data."""
    alpha, sigma, _ = schedule.levels(t)
    return float((deviation * sigma) ** 2 / ((alpha * deviation) ** 2 + sigma**2))


def _mean_square(prediction: State, data: State) -> float:
    wide = widest(jax.tree.leaves(data))
    differences = jax.tree.map(lambda a, b: jnp.square(a.astype(wide) - b.astype(wide)), prediction, data)
    leaves = jax.tree.leaves(differences)
    return float(sum(jnp.sum(leaf) for leaf in leaves)) / sum(leaf.size for leaf in leaves)
