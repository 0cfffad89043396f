"""Few-step sampling of diffusion and flow models in JAX: EVODiff and the solvers it is compared with."""

from evodiff_jax import denoisers, editing, grids, plans, schedules, solvers, statistics, stepping
from evodiff_jax.plans import plan
from evodiff_jax.sampling import Trace, sample, sample_plan, sample_with_trace
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Plan, Solver

__version__ = "0.1.0"

__all__ = [
    "NoiseSchedule",
    "Plan",
    "Solver",
    "Trace",
    "denoisers",
    "editing",
    "grids",
    "plan",
    "plans",
    "sample",
    "sample_plan",
    "sample_with_trace",
    "schedules",
    "solvers",
    "statistics",
    "stepping",
]
