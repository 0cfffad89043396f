"""The golden data with their model, and the schedules, solvers and initial states of many tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden_evodiff.npz"))
SCHEDULES = {"edm": ed.schedules.edm(), "vp_linear": ed.schedules.vp_linear()}
# One form of each deterministic family.
SOLVERS = {
    name: ed.solvers.FORMS[name].make
    for name in (
        *("variance_optimal", "evodiff", "ddim", "heun", "dpm_2"),
        *("dpm_solver-2", "dpm_solver_pp-2", "unipc-2", "deis-2", "ipndm-4", "ipndm_v-4"),
    )
}
RUNS = sorted({key.rsplit("/", 2)[0] for key in GOLDEN if key.endswith("/x")})


def mixture(schedule: ed.NoiseSchedule, centers: Any = None, std: Any = None) -> Callable[..., jax.Array]:
    """The posterior mean of an equally weighted Gaussian mixture, by default that of the golden data."""
    centers = GOLDEN["centers"] if centers is None else centers
    return ed.denoisers.gaussian_mixture(schedule, centers, float(GOLDEN["std"] if std is None else std))


def initial_state(schedule: ed.NoiseSchedule, shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Noise of the standard deviation sigma(t_max)."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(noise * schedule.sigma(schedule.t_max), dtype)
