"""Noise schedules: closed forms, inverses, precision, custom ones, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st

import evodiff_jax as ed
from evodiff_jax.numerics import on_host

CUSTOM = ed.NoiseSchedule(lambda t: jnp.cos(t), lambda t: jnp.sin(t), t_min=0.01, t_max=1.5)
ALL = {**SCHEDULES, "custom": CUSTOM}
schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


@schedules
def test_time_inverts_lambda_to_round_off_on_the_host(schedule):
    times = np.linspace(schedule.t_min, schedule.t_max, 2001)
    np.testing.assert_allclose(on_host(schedule.time, schedule.levels(times).lambda_), times, rtol=2e-15 * 16)


@schedules
def test_time_inverts_lambda_in_float32(schedule):
    times = jnp.linspace(schedule.t_min, schedule.t_max, 501, dtype=jnp.float32)
    recovered = jax.jit(lambda t: schedule.time(schedule.lambda_(t)))(times)
    assert recovered.dtype == jnp.float32
    # A relative error e of float32 in alpha / sigma moves t by e / |d lambda / dt|.
    slope = np.abs(np.gradient(schedule.levels(np.asarray(times, np.float64)).lambda_, np.asarray(times, np.float64)))
    assert np.all(np.abs(recovered - times) < 1e-6 * (times + 4 / slope))


@schedules
def test_log_snr_decreases_and_is_log_alpha_over_sigma(schedule):
    alpha, sigma, lambda_ = schedule.levels(np.linspace(schedule.t_min, schedule.t_max, 999))
    assert np.all(np.diff(lambda_) < 0)
    np.testing.assert_allclose(alpha / sigma, np.exp(lambda_), rtol=1e-13)


@given(st.floats(0.0, 10.0), st.floats(0.001, 30.0), st.floats(1e-5, 1.0))
def test_vp_linear_solves_its_equation(beta_min, extra, t):
    schedule = ed.schedules.vp_linear(beta_min, beta_min + extra, t_min=1e-6)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-14)
    integral = beta_min * t + extra * t**2 / 2
    assert -2 * np.log(alpha) == pytest.approx(integral, rel=1e-9, abs=1e-15)


def test_vp_linear_with_constant_beta():
    schedule = ed.schedules.vp_linear(2.0, 2.0, t_min=1e-3, t_max=3.0)
    assert float(schedule.alpha(1.5)) == pytest.approx(np.exp(-1.5))
    assert float(schedule.time(schedule.lambda_(1.5))) == pytest.approx(1.5, rel=1e-14)


def test_edm_is_alpha_one_sigma_t():
    schedule = ed.schedules.edm(0.01, 50.0)
    assert (schedule.t_min, schedule.t_max) == (0.01, 50.0)
    assert (schedule.alpha(3.0), schedule.sigma(3.0)) == (1.0, 3.0)
    assert schedule.lambda_(3.0) == -np.log(3.0)


def test_equal_schedules_are_one_object_so_that_nothing_recompiles():
    assert ed.schedules.edm() is ed.schedules.edm()
    assert hash(ed.schedules.vp_linear()) == hash(ed.schedules.vp_linear())


def test_tables_of_jax_functions_are_float64_even_inside_jit():
    seen = []

    def f(x):
        seen.append(CUSTOM.levels(np.array([0.5, 0.1])))
        return x

    jax.jit(f)(1.0)
    assert isinstance(seen[0].alpha, np.ndarray)
    np.testing.assert_allclose(seen[0].alpha, np.cos([0.5, 0.1]), rtol=1e-15)


def test_a_schedule_without_inverse_finds_it_by_bisection_also_when_traced():
    lambda_ = jnp.asarray([2.0, 0.0, -2.0])
    np.testing.assert_allclose(jax.jit(CUSTOM.time)(lambda_), np.arctan(np.exp(-np.asarray(lambda_))), rtol=1e-5)


def good(t):
    return 1 + 0 * t


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ed.schedules.edm(-1.0, 80.0), "0 <= sigma_min < sigma_max"),
        (lambda: ed.schedules.edm(80.0, 80.0), "0 <= sigma_min < sigma_max"),
        (lambda: ed.schedules.vp_linear(t_min=1.0, t_max=0.5), "t_min < t_max"),
        (lambda: ed.schedules.vp_linear(-0.1), "beta"),
        (lambda: ed.schedules.vp_linear(1.0, -2.0), "beta"),
        (lambda: ed.NoiseSchedule(good, lambda t: t, 1.0, 1.0), "t_min < t_max"),
        (lambda: ed.NoiseSchedule(good, lambda t: t, 0.0, float("inf")), "finite t_min"),
        (lambda: ed.NoiseSchedule(good, lambda t: 1 - t, 0.0, 0.5), "must decrease"),
        (lambda: ed.NoiseSchedule(lambda t: -good(t), lambda t: t, 0.1, 1.0), "positive"),
        (lambda: ed.NoiseSchedule(lambda t: t / 0.0, lambda t: t, 0.1, 1.0), "finite"),
        (lambda: ed.NoiseSchedule(lambda t: 1.0, lambda t: t, 0.1, 1.0), "elementwise"),
        (lambda: ed.NoiseSchedule(good, lambda t: t, 0.1, 1.0, time=lambda lambda_: lambda_), "inverse"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()
