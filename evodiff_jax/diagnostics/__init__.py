"""How uncertain a model is along a run, and how far the run is from the exact trajectory.

`posterior_variance` and `posterior_covariance` are of a denoiser at given states; `transition_entropy` and the like
follow from them. `follow` runs a plan and keeps what it did, `converge` makes the exact trajectory, and the errors,
the curvature and the density of calls are of these two. `diagnose` is all of it for several solvers.
`plotting.diagnoses` draws what it returns.
"""

from evodiff_jax.diagnostics._diagnose import QUANTITIES, Diagnosis, diagnose
from evodiff_jax.diagnostics._errors import reconstruction_errors, state_errors, transition_errors, update_variance
from evodiff_jax.diagnostics._finite import check_finite
from evodiff_jax.diagnostics._geometry import Density, call_density, curvature, densest_half, times_by_density
from evodiff_jax.diagnostics._posterior import Estimated, posterior_covariance, posterior_variance
from evodiff_jax.diagnostics._runs import Run, Trajectory, converge, follow
from evodiff_jax.diagnostics._tables import csv_of, markdown_of
from evodiff_jax.diagnostics._transitions import (
    transition_entropy,
    transition_entropy_of_covariance,
    transition_information,
    transition_variance,
)

__all__ = [
    "QUANTITIES",
    "Density",
    "Diagnosis",
    "Estimated",
    "Run",
    "Trajectory",
    "call_density",
    "check_finite",
    "converge",
    "csv_of",
    "curvature",
    "densest_half",
    "diagnose",
    "follow",
    "markdown_of",
    "posterior_covariance",
    "posterior_variance",
    "reconstruction_errors",
    "state_errors",
    "times_by_density",
    "transition_entropy",
    "transition_entropy_of_covariance",
    "transition_errors",
    "transition_information",
    "transition_variance",
    "update_variance",
]
