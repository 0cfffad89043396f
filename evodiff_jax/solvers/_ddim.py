"""DDIM, deterministic and ancestral, under the names it goes by."""

import functools
from typing import Any

import numpy as np

from evodiff_jax.numerics import factory, namespace
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Solver, Table


@factory
def ddim(eta: float = 0.0) -> Solver:
    """DDIM; for eta = 0 the first-order exponential integrator of the probability-flow ODE (Euler's method for EDM).

    From t_0 to t, with lambda = log(alpha / sigma) and the data prediction m_0,

        nu  = eta sigma_t sqrt(1 - e^(2 (lambda_0 - lambda_t)))          s = sqrt(sigma_t^2 - nu^2)
        x_t = (s / sigma_0) x + (alpha_t - alpha_0 s / sigma_0) m_0 + nu z.

    Args:
      eta: 0 for the deterministic solver, 1 for ancestral sampling; above 0 sampling needs a key.

    Returns:
      The solver. NFE: N for N steps.

    Raises:
      ValueError: unless 0 <= eta <= 1.

    References:
      Song, Meng, Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502, Eqs. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim needs 0 <= eta <= 1, got {eta}")
    return Solver("ddim", functools.partial(_ddim_table, eta=eta))


def _ddim_table(schedule: NoiseSchedule, times: Any, eta: float) -> Table:
    xp = namespace(times)
    alpha, sigma, lambda_ = schedule.levels(times)
    step = lambda_[:-1] - lambda_[1:]
    forgotten = eta**2 * xp.expm1(2 * step)  # -(nu / sigma_t)^2
    kept = step if eta == 1 else xp.log1p(forgotten) / 2  # log(s / sigma_t)
    return Table(
        time=times[:-1],
        transition=sigma[1:] / sigma[:-1] * xp.exp(kept),
        predictor=(-alpha[1:] * xp.expm1(step + kept))[:, None],
        corrector=np.zeros((times.shape[0] - 1, 1)),
        noise=sigma[1:] * xp.sqrt(-forgotten) if eta > 0 else None,
    )


def euler() -> Solver:
    """Euler's method for the probability-flow ODE in sigma / alpha, which is `ddim()`; NFE: N for N steps.

    References:
      Karras, Aittala, Aila, Laine, arXiv 2206.00364, Eq. 4, without the second-order correction of algorithm 1.
    """
    return ddim()


def euler_ancestral(eta: float = 1.0) -> Solver:
    """Euler's method down to a lower noise level and noise up to the next, which is `ddim(eta)`; NFE: N for N steps.

    sigma_up = eta sigma_t sqrt(1 - sigma_t^2 / sigma_0^2) and sigma_down^2 = sigma_t^2 - sigma_up^2, in units of alpha.

    Args:
      eta: 1 for ancestral sampling, less for less noise.

    Raises:
      ValueError: unless 0 <= eta <= 1.

    References:
      Song et al., arXiv 2011.13456, appendix F (ancestral sampling); the name is k-diffusion's.
    """
    return ddim(eta)
