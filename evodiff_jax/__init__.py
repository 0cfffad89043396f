"""Few-step sampling of diffusion and flow models in JAX: EVODiff and the solvers it is compared with."""

from evodiff_jax import denoisers, grids, schedules, solvers
from evodiff_jax.sampling import Trace, sample, sample_with_trace
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver

__version__ = "0.1.0"

__all__ = [
    "NoiseSchedule",
    "Solver",
    "Trace",
    "denoisers",
    "grids",
    "sample",
    "sample_with_trace",
    "schedules",
    "solvers",
]
