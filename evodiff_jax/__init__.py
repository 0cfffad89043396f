"""Few-step sampling of diffusion and flow models in JAX: EVODiff and the solvers it is compared with."""

from evodiff_jax import interrupts

interrupts.watch_command()  # before JAX is imported, which takes most of the command's start

from evodiff_jax import (
    denoisers,
    diagnostics,
    editing,
    grids,
    plotting,
    quadrature,
    schedules,
    solvers,
    statistics,
    tables,
    testing,
)
from evodiff_jax.citations import citation
from evodiff_jax.sampling import RunState, Trace, init, plan, sample, sample_with_trace, update
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Plan, Solver, stack

__version__ = "0.2.0"

__all__ = [
    "NoiseSchedule",
    "Plan",
    "RunState",
    "Solver",
    "Trace",
    "citation",
    "denoisers",
    "diagnostics",
    "editing",
    "grids",
    "init",
    "plan",
    "plotting",
    "quadrature",
    "sample",
    "sample_with_trace",
    "schedules",
    "solvers",
    "stack",
    "statistics",
    "tables",
    "testing",
    "update",
]
