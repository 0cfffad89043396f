"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) eps, for the usual families and your own."""

from evodiff_jax.schedules._consistency import SomeLevels, check_same_schedule, made_of, of_schedule, some_levels
from evodiff_jax.schedules._continuous import (
    edm,
    flow,
    from_log_snr,
    resolution_shift,
    sequence_shift,
    sub_vp,
    ve,
    vp_cosine,
    vp_linear,
)
from evodiff_jax.schedules._discrete import (
    cosine_betas,
    discrete,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from evodiff_jax.schedules._schedule import Levels, NoiseSchedule, ScheduleFn, expect_schedule

__all__ = [
    "Levels",
    "NoiseSchedule",
    "ScheduleFn",
    "SomeLevels",
    "check_same_schedule",
    "cosine_betas",
    "discrete",
    "edm",
    "expect_schedule",
    "flow",
    "from_log_snr",
    "linear_betas",
    "made_of",
    "of_schedule",
    "resolution_shift",
    "scaled_linear_betas",
    "sequence_shift",
    "some_levels",
    "sub_vp",
    "ve",
    "vp_cosine",
    "vp_linear",
    "zero_terminal_snr",
]
