"""What a scheduler_config.json says of the model: its noise schedule, its prediction, the range of its data.

The file names a sampler too, and its settings; those are of no use to another solver, and are listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from evodiff_jax.schedules import (
    NoiseSchedule,
    cosine_betas,
    discrete,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "data"}
_OF_THE_MODEL = {
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type"),
    *("rescale_betas_zero_snr", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio"),
    "sample_max_value",
}


class Scheduler(NamedTuple):
    """What a scheduler_config.json says of a model.

    Attributes:
      schedule: the noise schedule, t being the index of a noise level.
      prediction: what the network predicts, as for `denoisers.from_prediction`.
      limit: the magnitude that data predictions are clipped to, None for no clipping.
      percentile: of dynamic thresholding in place of that, see `denoisers.dynamic_threshold`; None for none.
      ignored: the file's settings of the sampler it names, which are not used.
    """

    schedule: NoiseSchedule
    prediction: str
    limit: float | None = None
    percentile: float | None = None
    ignored: tuple[str, ...] = ()


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """Reads the content of a scheduler_config.json; defaults are those of diffusers' DDIMScheduler.

    Raises:
      ValueError: the scheduler is of another kind, as those of flow matching, or a setting is unknown or impossible.
    """
    cls = config.get("_class_name", "a scheduler")
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(
            f"the scheduler is {cls}, without beta_schedule: supported are those of discrete noise levels, such as "
            "DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler"
        )
    betas = _betas(config)
    zero_snr = _known(config, "rescale_betas_zero_snr", False, bool)
    prediction = _known(config, "prediction_type", "epsilon", str)
    if prediction not in _PREDICTIONS:
        raise ValueError(f"unknown prediction_type {prediction!r} of {cls}; known: {', '.join(_PREDICTIONS)}")
    if zero_snr and prediction == "epsilon":
        raise ValueError(
            f"{cls} has rescale_betas_zero_snr with prediction_type epsilon, which says nothing of the data where "
            "there is no signal"
        )
    schedule = discrete(alphas_cumprod=zero_terminal_snr(np.cumprod(1 - betas))) if zero_snr else discrete(betas)
    limit = percentile = None
    if _known(config, "thresholding", False, bool):
        percentile = 100 * _number(config, "dynamic_thresholding_ratio", 0.995)
        limit = _number(config, "sample_max_value", 1.0)
    elif _known(config, "clip_sample", _clips(cls), bool):
        limit = _number(config, "clip_sample_range", 1.0)
    ignored = tuple(sorted(name for name in config if name not in _OF_THE_MODEL and not name.startswith("_")))
    return Scheduler(schedule, _PREDICTIONS[prediction], limit, percentile, ignored)


def _clips(cls: str) -> bool:
    """Whether a scheduler clips where its file does not say."""
    return cls.startswith(("DDPM", "DDIM"))


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    kind = config["beta_schedule"]
    if kind not in _BETAS:
        raise ValueError(f"unknown beta_schedule {kind!r}; known: {', '.join(_BETAS)}")
    count = _known(config, "num_train_timesteps", 1000, int)
    return _BETAS[kind](count, _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02))


def _sigmoid_betas(count: int, first: float, last: float) -> np.ndarray:
    return first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, count)))


_BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda count, first, last: cosine_betas(count),
    "sigmoid": _sigmoid_betas,
}


def _known(config: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"the scheduler needs a setting {name} of the kind {kind.__name__}, got {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"the scheduler needs a number for {name}, got {value!r}")
    return float(value)
