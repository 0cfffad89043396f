"""Every solver with every prediction, guidance and thresholding, on a tiny network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES
from test_denoisers import EVERY_SOLVER

import evodiff_jax as ed
from evodiff_jax.denoisers import (
    PREDICTIONS,
    classifier_free_guidance,
    classifier_guidance,
    clip,
    dynamic_threshold,
    from_prediction,
)

VP = SCHEDULES["vp_linear"]
KEY = jax.random.key(0)
TIMES = ed.grids.log_snr(VP, 3)
X_T = np.random.default_rng(0).standard_normal((2, 4, 4, 2)).astype(np.float32)
LABEL = np.array([1.0, 2.0], np.float32)


def network(x, t, label):
    return jnp.tanh(x) * jnp.cos(t) + 0.1 * label.reshape(-1, 1, 1, 1)


def free(denoise, **options):
    return classifier_free_guidance(denoise, LABEL, 0 * LABEL, **options)


GUIDANCE = {
    "none": lambda denoise: lambda x, t: denoise(x, t, LABEL),
    "batched": lambda denoise: free(denoise, scale=2.0),
    "two calls": lambda denoise: free(denoise, scale=LABEL, batched=False),
    "interval": lambda denoise: free(denoise, scale=2.0, rescale=0.7, interval=(0.1, 5.0), schedule=VP),
    "classifier": lambda denoise: classifier_guidance(
        lambda x, t: denoise(x, t, LABEL), lambda x, t: -jnp.sum(x**2, axis=(1, 2, 3)), VP, 0.01
    ),
}
THRESHOLDING = {"none": lambda denoise: denoise, "clip": clip, "dynamic": dynamic_threshold}


@functools.cache
def denoiser(prediction, guidance, thresholding):
    """Compiled once for all solvers."""
    denoise = GUIDANCE[guidance](from_prediction(network, VP, prediction))
    return jax.jit(THRESHOLDING[thresholding](denoise))


@functools.cache
def start(solver):
    plan = ed.plan(VP, TIMES, EVERY_SOLVER[solver])
    return plan, ed.init(X_T, plan, key=KEY)


@pytest.mark.parametrize("thresholding", THRESHOLDING)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_every_combination_runs(solver, prediction, guidance, thresholding):
    """Step by step, so that a solver is compiled once and so is a denoiser."""
    denoise, (plan, state) = denoiser(prediction, guidance, thresholding), start(solver)
    while not state.done:
        m = denoise(state.x, state.t)
        state = ed.update(state, m, plan)
        assert thresholding == "none" or np.abs(m).max() <= 1 + 1e-6
    assert state.x.shape == X_T.shape
    assert state.x.dtype == jnp.float32
    assert np.isfinite(state.x).all()
    assert np.abs(state.x - X_T).max() > 1e-3
