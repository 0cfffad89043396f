"""The checks that users call: of a network's convention, and of the scale of noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evodiff_jax as ed
from evodiff_jax.preconditioning import coefficients
from evodiff_jax.testing import Fit, check_denoiser, check_noise

KEY = jax.random.key(0)
CENTERS, STD = np.array([[1.0] * 64, [-1.0] * 64]), 0.5
SCHEDULES = {
    "discrete": ed.schedules.discrete(ed.schedules.scaled_linear_betas()),
    "vp_linear": ed.schedules.vp_linear(),
    "edm": ed.schedules.edm(),
    "flow": ed.schedules.flow(3.0),
}
DATA = np.random.default_rng(0).normal(CENTERS[np.arange(16) % 2], STD).astype(np.float32)


def network(schedule, prediction):
    """The exact network of the data that predicts one thing or another."""
    exact = ed.denoisers.gaussian_mixture(schedule, CENTERS, STD)

    def predict(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        m = exact(x, t)
        epsilon = (x - alpha * m) / sigma
        outputs = {"v": alpha * epsilon - sigma * m, "velocity": epsilon - m, "score": -epsilon / sigma}
        return {"data": m, "epsilon": epsilon, **outputs}[prediction]

    return predict


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_data_prediction_passes(name):
    fit = check_denoiser(network(SCHEDULES[name], "data"), SCHEDULES[name], DATA, KEY)
    assert isinstance(fit, Fit)
    assert (fit.prediction, fit.time) == ("data", "t")
    assert fit.error < 0.6  # there are two clusters: a linear prediction is worse


@pytest.mark.parametrize(
    "prediction", ["epsilon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v", "velocity", "score"))]
)
@pytest.mark.parametrize("name", ["discrete", "edm"])
def test_a_network_as_it_is_gets_its_arguments_named(name, prediction):
    schedule = SCHEDULES[name]
    with pytest.raises(ValueError, match=rf"use denoisers.from_prediction\(fn, schedule, '{prediction}'\)"):
        check_denoiser(network(schedule, prediction), schedule, DATA, KEY)


@pytest.mark.parametrize(
    ("declared", "prediction"), [("data", "epsilon"), ("v", "epsilon"), ("score", "epsilon"), ("epsilon", "v")]
)
def test_a_wrong_prediction_is_found(declared, prediction):
    schedule = SCHEDULES["vp_linear"]
    denoise = ed.denoisers.from_prediction(network(schedule, prediction), schedule, declared)
    with pytest.raises(ValueError, match=f"'{prediction}'"):
        check_denoiser(denoise, schedule, DATA, KEY)
    right = ed.denoisers.from_prediction(network(schedule, prediction), schedule, prediction)
    assert check_denoiser(right, schedule, DATA, KEY).error < 0.6


@pytest.mark.parametrize(
    ("takes", "message"),
    [(lambda t: t * 1000, "time=lambda t: t / 1000"), (lambda t: t / 1000, "time=lambda t: 1000 *")],
)
def test_another_unit_of_time_is_found(takes, message):
    schedule = SCHEDULES["discrete"]
    of_t = network(schedule, "epsilon")
    with pytest.raises(ValueError, match=message):
        check_denoiser(lambda x, t: of_t(x, takes(t)), schedule, DATA, KEY)


def test_edms_network_as_it_is_gets_its_prediction_named():
    schedule = SCHEDULES["edm"]
    exact = ed.denoisers.gaussian_mixture(schedule, CENTERS, STD)
    std = float(DATA.std())

    def raw(scaled, c_noise):
        sigma = jnp.exp(4 * c_noise)
        c = coefficients(sigma, std)
        x = scaled / c.c_in
        return (exact(x, sigma) - c.c_skip * x) / c.c_out

    with pytest.raises(ValueError, match="'edm'"):
        check_denoiser(raw, schedule, DATA, KEY)


def test_what_fits_nothing_is_said_to():
    schedule = SCHEDULES["vp_linear"]
    with pytest.raises(ValueError, match="fits no other convention: check the scale of the data"):
        check_denoiser(network(schedule, "data"), schedule, 10 * DATA, KEY)


def test_gaussian_data_pass_with_the_error_of_the_best_linear_prediction():
    schedule = SCHEDULES["edm"]
    data = 1 + 0.5 * jax.random.normal(KEY, (50, 64))
    denoise = ed.denoisers.gaussian_mixture(schedule, [[1.0] * 64], 0.5)
    np.testing.assert_allclose(check_denoiser(denoise, schedule, data, KEY).error, 1, rtol=0.05)


def test_states_that_are_pytrees_are_checked():
    schedule = SCHEDULES["edm"]
    denoise = network(schedule, "data")
    fit = check_denoiser(lambda x, t: jax.tree.map(lambda a: denoise(a, t), x), schedule, {"a": DATA, "b": -DATA}, KEY)
    assert fit.error < 0.6


def test_bad_input():
    schedule, denoise = SCHEDULES["edm"], network(SCHEDULES["edm"], "data")
    with pytest.raises(TypeError, match="denoise must be a function"):
        check_denoiser(None, schedule, DATA, KEY)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        check_denoiser(denoise, "edm", DATA, KEY)
    with pytest.raises(TypeError, match="data must be floating-point"):
        check_denoiser(denoise, schedule, np.arange(4), KEY)
    with pytest.raises(TypeError, match="key must be a JAX random key"):
        check_denoiser(denoise, schedule, DATA, 0)
    with pytest.raises(ValueError, match="data that vary"):
        check_denoiser(denoise, schedule, np.ones((2, 64), np.float32), KEY)
    with pytest.raises(ValueError, match="needs noise of the order of the data"):
        check_denoiser(denoise, schedule, 1e6 * DATA, KEY)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_of_the_schedule_passes(name):
    for shape in ((1, 2), (4, 8, 8, 3), {"a": (2, 3), "b": (2, 5)}):
        check_noise(SCHEDULES[name], SCHEDULES[name].noise(KEY, shape))


def test_noise_of_another_scale_is_an_error():
    unit = jax.random.normal(KEY, (4, 8, 8, 3))
    with pytest.raises(ValueError, match=r"x_T has a root mean square of .*pure noise of this schedule has 80"):
        check_noise(SCHEDULES["edm"], unit)
    with pytest.raises(ValueError, match=r"schedule.noise\(key, shape\)"):
        check_noise(SCHEDULES["vp_linear"], 80 * unit)
