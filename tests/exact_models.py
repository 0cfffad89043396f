"""Models whose data prediction is known exactly, and the runs of the golden data."""

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


def written_as(prediction: str, denoise: Any, schedule: ed.NoiseSchedule, sigma_data: float = 0.5) -> Any:
    """The network that predicts what `prediction` names and from which `denoise` follows; its time is the default."""

    def edm(scaled: jax.Array, c_noise: jax.Array, *conditions: Any) -> jax.Array:
        kappa = jnp.exp(4 * c_noise)
        t = schedule.time(-4 * c_noise)
        unscaled = scaled * jnp.hypot(kappa, sigma_data)
        variance = kappa**2 + sigma_data**2
        m = denoise(schedule.alpha(t) * unscaled, t, *conditions)
        return (m - sigma_data**2 / variance * unscaled) * jnp.sqrt(variance) / (kappa * sigma_data)

    def network(x: jax.Array, t: jax.Array, *conditions: Any) -> jax.Array:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        m = denoise(x, t, *conditions)
        epsilon = (x - alpha * m) / sigma
        return {
            "data": m,
            "epsilon": epsilon,
            "v": alpha * epsilon - sigma * m,
            "velocity": epsilon - m,
            "score": -epsilon / sigma,
        }[prediction]

    return edm if prediction == "edm" else network


def initial_state(schedule: ed.NoiseSchedule, shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Noise of the standard deviation sigma(t_max)."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(noise * schedule.sigma(schedule.t_max), dtype)
