"""Thresholding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evodiff_jax.denoisers import clip, dynamic_threshold

pytestmark = pytest.mark.fast

M = 2 * jax.random.normal(jax.random.key(0), (6, 8, 8, 3)) * jnp.arange(6)[:, None, None, None] / 3
identity = lambda x, t: x


def test_clipping_keeps_values_within_the_range_of_the_data():
    np.testing.assert_array_equal(clip(identity)(M, 1.0), np.clip(M, -1, 1))
    np.testing.assert_array_equal(clip(identity, 0.0, 2.0)(M, 1.0), np.clip(M, 0, 2))


@pytest.mark.parametrize("percentile", [99.5, 90.0, 100.0])
@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_dynamic_thresholding_is_in_per_cent_of_each_sample(percentile, limit):
    x = dynamic_threshold(identity, percentile, limit)(M, 1.0)
    for sample, m in zip(x, np.asarray(M), strict=True):
        s = max(np.percentile(np.abs(m), percentile), limit)
        np.testing.assert_allclose(sample, np.clip(m, -s, s) * limit / s, rtol=1e-5, atol=1e-7)
        assert np.abs(sample).max() <= limit * (1 + 1e-6)


def test_predictions_within_the_range_are_left_alone():
    small = M / 100
    np.testing.assert_array_equal(dynamic_threshold(identity)(small, 1.0), small)


@pytest.mark.parametrize("quantile", [0.995, 0.5, 1.0])
def test_a_quantile_in_place_of_a_percentile_is_refused(quantile):
    with pytest.raises(ValueError, match=r"in per cent, above 1 and at most 100, for example 99.5, got"):
        dynamic_threshold(identity, quantile)


def test_corrections_keep_the_dtype(strict_promotion):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = M.astype(dtype)
        assert clip(dynamic_threshold(identity))(x, jnp.float32(1.0)).dtype == dtype
