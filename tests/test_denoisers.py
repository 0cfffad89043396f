"""Predictions and guidance."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed

VP = SCHEDULES["vp_linear"]


def as_epsilon(denoise, schedule):
    return lambda x, t: (x - schedule.alpha(t) * denoise(x, t)) / schedule.sigma(t)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_one_network_written_in_both_predictions_gives_the_same_samples(schedule, x64):
    data = mixture(schedule)
    x_T = initial_state(schedule, (4, 4, 4, 2), jnp.float64)
    times = ed.grids.log_snr(schedule, 8)
    samples = [
        ed.sample(ed.denoisers.from_prediction(fn, schedule, prediction), x_T, times, schedule)
        for prediction, fn in (("data", data), ("epsilon", as_epsilon(data, schedule)))
    ]
    np.testing.assert_allclose(samples[0], samples[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("prediction", ed.denoisers.PREDICTIONS)
def test_a_bfloat16_network_gives_data_in_the_dtype_of_the_state(prediction, strict_promotion):
    denoise = ed.denoisers.from_prediction(lambda x, t: x.astype(jnp.bfloat16), VP, prediction)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((2, 3), dtype)
        chex.assert_type(denoise(x, jnp.float32(0.5)), dtype)
        chex.assert_type(denoise(x, 0.5), dtype)


def test_the_noise_of_a_pure_noise_state_leaves_no_data():
    denoise = ed.denoisers.from_prediction(lambda x, t: x / VP.sigma(t), VP, "epsilon")
    np.testing.assert_allclose(denoise(jnp.ones((2, 3)), jnp.float32(0.7)), 0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["noise", "", None, "V"])
def test_unknown_predictions_are_named_with_what_there_is(prediction):
    with pytest.raises(ValueError, match="choose one of 'data', 'epsilon'"):
        ed.denoisers.from_prediction(lambda x, t: x, VP, prediction)


def conditional(calls):
    def fn(x, t, condition):
        calls.append(x.shape[0])
        return x * condition[:, None]

    return fn


@pytest.mark.parametrize(("scale", "evaluated"), [(0, 2), (1, 2), (1.0, 2), (3.5, 4), (0.5, 4)])
def test_guidance_extrapolates_and_costs_a_second_evaluation_only_where_needed(scale, evaluated):
    calls = []
    guided = ed.denoisers.classifier_free_guidance(conditional(calls), jnp.array([2.0, 3.0]), jnp.zeros(2), scale)
    x = jnp.ones((2, 5))
    np.testing.assert_allclose(guided(x, 1.0), scale * x * jnp.array([[2.0], [3.0]]), rtol=1e-6)
    assert calls == [evaluated]


@pytest.mark.parametrize("null", [jnp.zeros(3), jnp.zeros(2, int), {"a": jnp.zeros(2)}])
def test_guidance_needs_conditions_of_one_kind(null):
    with pytest.raises(ValueError, match="same structure, shapes and dtypes"):
        ed.denoisers.classifier_free_guidance(conditional([]), jnp.zeros(2), null, 2.0)


def test_guided_sampling_runs_under_jit_with_conditions_as_arguments():
    schedule = SCHEDULES["edm"]

    def fn(x, t, mean):
        return mean[:, None] + (x - mean[:, None]) * 0.01 / (0.01 + t**2)

    @jax.jit
    def run(x_T, mean):
        denoise = ed.denoisers.classifier_free_guidance(fn, mean, jnp.zeros_like(mean), 2.0)
        return ed.sample(denoise, x_T, ed.grids.log_snr(schedule, 10), schedule)

    x = run(initial_state(schedule, (500, 2)), jnp.full(500, 0.5))
    assert float(jnp.mean(x)) == pytest.approx(1.0, abs=0.1)
