"""Fitted plans: the times and weights of a solver, fitted to a model for few calls.

`fit` starts from the plan of a published solver and needs the extra `fit`; its result is a plan like any other.
"""

from evodiff_jax.fitting._files import is_fitted, load, save
from evodiff_jax.fitting._fit import Figures, Fitted, Report, fit
from evodiff_jax.fitting._offsets import Offsets, Start, realise, start_of
from evodiff_jax.fitting._packaged import available
from evodiff_jax.fitting._teacher import converge, default_teacher

__all__ = [
    "Figures",
    "Fitted",
    "Offsets",
    "Report",
    "Start",
    "available",
    "converge",
    "default_teacher",
    "fit",
    "is_fitted",
    "load",
    "realise",
    "save",
    "start_of",
]
