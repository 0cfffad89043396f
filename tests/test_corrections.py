"""Thresholding, and hooks on the data and on the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.denoisers import clip, dynamic_threshold
from evodiff_jax.solvers import SOLVERS

EDM, VP = SCHEDULES["edm"], SCHEDULES["vp_linear"]
M = 2 * jax.random.normal(jax.random.key(0), (6, 8, 8, 3)) * jnp.arange(6)[:, None, None, None] / 3
identity = lambda x, t: x  # noqa: E731
every_solver = pytest.mark.parametrize("name", SOLVERS)


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


def test_a_hook_on_the_data_is_a_function_around_the_denoiser_and_one_on_the_state_an_argument():
    """Both inside the scan: the times they see are those of the model calls, and on_state sees the end too."""
    on_data, on_state, times = [], [], ed.grids.log_snr(EDM, 4)

    def watch(seen):
        def hook(x, t):
            jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
            return x

        return hook

    denoise = mixture(EDM)
    hooked = lambda x, t: watch(on_data)(denoise(x, t), t)  # noqa: E731
    x_T = initial_state(EDM, (2, 4, 4, 2))
    x = jax.jit(lambda x: ed.sample(hooked, x, times, EDM, on_state=watch(on_state)))(x_T)
    jax.effects_barrier()
    np.testing.assert_allclose(on_data, times[:-1], rtol=1e-6)
    np.testing.assert_allclose(on_state, times, rtol=1e-6)
    np.testing.assert_allclose(x, ed.sample(denoise, x_T, times, EDM), rtol=1e-5, atol=1e-6)


@every_solver
def test_hooks_on_the_state_act_before_every_call_and_on_the_result_in_every_form_of_the_loop(name):
    times, denoise = ed.grids.log_snr(EDM, 4), mixture(EDM)
    x_T = initial_state(EDM, (2, 4, 4, 2))
    halve_right = lambda x, t: x.at[..., 1].multiply(0.5)  # noqa: E731
    arguments = {"solver": SOLVERS[name](), "on_state": halve_right}
    seen = []

    def watched(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return denoise(x, t)

    x, trace = ed.sample_with_trace(watched, x_T, times, EDM, **arguments)
    jax.effects_barrier()
    np.testing.assert_allclose(seen[0], halve_right(x_T, 0), rtol=1e-6)
    np.testing.assert_array_equal(trace.states[-1], x)
    plan = ed.plan(EDM, times, arguments["solver"], max_calls=12)
    for other in (
        ed.sample(denoise, x_T, times, EDM, **arguments),
        ed.sample(denoise, x_T, times, EDM, **arguments, remat=True),
        ed.sample_plan(denoise, x_T, plan, on_state=halve_right),
    ):
        np.testing.assert_allclose(other, x, rtol=1e-4, atol=1e-5)
    kept = ed.sample(denoise, x_T, times, EDM, arguments["solver"], on_state=lambda x, t: jnp.zeros_like(x))
    np.testing.assert_array_equal(kept, 0)


def test_the_hook_does_not_touch_the_data_that_denoise_to_zero_returns():
    times, x_T = ed.grids.log_snr(EDM, 4), initial_state(EDM, (2, 4, 4, 2))
    zero = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    denoise = lambda x, t: x + 3  # noqa: E731
    x = ed.sample(denoise, x_T, times, EDM, denoise_to_zero=True, on_state=zero)
    np.testing.assert_array_equal(x, 3)
