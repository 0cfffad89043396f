"""Checks of schedules, solvers, rules, denoisers and noise of your own, and models without error to test them on.

A wrong convention, scale or coefficient raises no error in a sampler. It gives plausible, wrong samples. A check
returns what it measured, or raises an error that says in words what is wrong. `evodiff_jax.testing.strategies` has
strategies for Hypothesis. It is imported on demand and needs `evodiff-jax[testing]`.
"""

from evodiff_jax.testing._denoiser import Fit, check_denoiser
from evodiff_jax.testing._models import ExactModel, as_network, bimodal, gaussian
from evodiff_jax.testing._noise import check_noise
from evodiff_jax.testing._orders import moments
from evodiff_jax.testing._rule import RuleReport, check_rule
from evodiff_jax.testing._schedule import ScheduleReport, check_schedule
from evodiff_jax.testing._solver import SolverReport, check_solver

__all__ = [
    "ExactModel",
    "Fit",
    "RuleReport",
    "ScheduleReport",
    "SolverReport",
    "as_network",
    "bimodal",
    "check_denoiser",
    "check_noise",
    "check_rule",
    "check_schedule",
    "check_solver",
    "gaussian",
    "moments",
]
