"""Every prediction with every guidance and thresholding, on a tiny network, against the formulas in NumPy.

A solver sees nothing but data predictions, so solvers are no part of the combinations.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES

from evodiff_jax.denoisers import (
    PREDICTIONS,
    classifier_free_guidance,
    classifier_guidance,
    clip,
    dynamic_threshold,
    from_prediction,
)

pytestmark = pytest.mark.fast

VP = SCHEDULES["vp_linear"]
X = np.random.default_rng(0).standard_normal((2, 4, 4, 2)).astype(np.float32)
LABEL = np.array([1.0, 2.0], np.float32)
T = np.float32(0.4)
ALPHA, SIGMA, _ = (float(level) for level in VP.levels(np.float64(T)))
KAPPA, SIGMA_DATA = SIGMA / ALPHA, 0.5


def network(x, t, label):
    return jnp.tanh(x) * jnp.cos(t) + 0.1 * label.reshape(-1, 1, 1, 1)


def data_prediction(prediction, label):
    """What the network says of the data, by the definitions of the predictions."""
    raw = lambda x, t: np.tanh(x) * np.cos(t) + 0.1 * label.reshape(-1, 1, 1, 1)
    if prediction == "edm":
        norm = np.hypot(KAPPA, SIGMA_DATA)
        output = raw(X / ALPHA / norm, np.log(KAPPA) / 4)
        return (SIGMA_DATA / norm) ** 2 * X / ALPHA + KAPPA * SIGMA_DATA / norm * output
    output = raw(X, T)
    return {
        "data": output,
        "epsilon": (X - SIGMA * output) / ALPHA,
        "v": ALPHA * X - SIGMA * output,  # alpha^2 + sigma^2 = 1
        "velocity": (X - SIGMA * output) / (ALPHA + SIGMA),
        "score": (X + SIGMA**2 * output) / ALPHA,
    }[prediction]


def free(denoise, **options):
    return classifier_free_guidance(denoise, LABEL, 0 * LABEL, **options)


def deviation(m):
    return m.std(axis=(1, 2, 3), keepdims=True)


def rescaled(m, null):
    guided = null + 2 * (m - null)
    return (0.3 + 0.7 * deviation(m) / deviation(guided)) * guided


# The guidance, and the same of the two data predictions.
GUIDANCE = {
    "none": (lambda denoise: lambda x, t: denoise(x, t, LABEL), lambda m, null: m),
    "batched": (lambda denoise: free(denoise, scale=2.0), lambda m, null: null + 2 * (m - null)),
    "two calls": (
        lambda denoise: free(denoise, scale=LABEL, batched=False),
        lambda m, null: null + LABEL.reshape(-1, 1, 1, 1) * (m - null),
    ),
    "inside an interval": (
        lambda denoise: free(denoise, scale=2.0, rescale=0.7, interval=(0.1, 5.0), schedule=VP),
        rescaled,
    ),
    "outside an interval": (
        lambda denoise: free(denoise, scale=2.0, rescale=0.7, interval=(0.1, 0.5), schedule=VP),
        lambda m, null: m,
    ),
    "classifier": (
        lambda denoise: classifier_guidance(
            lambda x, t: denoise(x, t, LABEL), lambda x, t: -jnp.sum(x**2, axis=(1, 2, 3)), VP, 0.01
        ),
        lambda m, null: m - 0.01 * SIGMA**2 / ALPHA * 2 * X,
    ),
}


def percentile(m):
    s = np.maximum(np.percentile(np.abs(m), 99.5, axis=(1, 2, 3), keepdims=True), 1)
    return np.clip(m, -s, s) / s


THRESHOLDING = {
    "none": (lambda denoise: denoise, lambda m: m),
    "clip": (clip, lambda m: np.clip(m, -1, 1)),
    "dynamic": (dynamic_threshold, percentile),
}


@pytest.mark.parametrize("thresholding", THRESHOLDING)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_combination_is_its_formulas_one_after_the_other(prediction, guidance, thresholding):
    (guide, guided), (correct, corrected) = GUIDANCE[guidance], THRESHOLDING[thresholding]
    assert 0.5 < KAPPA < 5
    x = correct(guide(from_prediction(network, VP, prediction)))(X, T)
    assert x.dtype == np.float32
    expected = corrected(guided(data_prediction(prediction, LABEL), data_prediction(prediction, 0 * LABEL)))
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
