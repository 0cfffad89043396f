"""The project's own rule: what it solves exactly, its invariances, errors on mixtures.

Nothing here depends on how it chooses its coefficients. `test_rules` has what holds of both rules.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_programs import EDM, FLOW, MAX_CALLS, SHAPE, median_error, of_any_schedule, plan_of, run

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS
from evodiff_jax.numerics import enable_x64
from evodiff_jax.solvers import ddim, dpm_solver_pp, unipc, variance_optimal
from evodiff_jax.solvers._variance_optimal import Data, choose, init

ALL_SCHEDULES = {**SCHEDULES, "flow": ed.schedules.flow(), "vp_cosine": ed.schedules.vp_cosine()}


@functools.partial(jax.jit, static_argnums=0)
def run_model(denoise, x_T, plan):
    """Compiled once for a model and all plans of as many rows."""
    return ed.sample(denoise, x_T, plan)


# -- constants


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_a_constant_model_is_integrated_exactly(schedule, x64):
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    for name, grid in GRIDS.items():
        for steps in (1, 3, 8, 25) if name == "karras" else (1, 3, 6):
            alpha, sigma, _ = schedule.levels(grid(schedule, steps))
            x, _ = run("constant", x_T, plan_of(steps, variance_optimal(), grid, schedule))
            exact = 0.3 * alpha[-1] + sigma[-1] / sigma[0] * (x_T - 0.3 * alpha[0])
            np.testing.assert_allclose(x, exact, rtol=1e-12, atol=1e-13, err_msg=name)


@settings(deadline=None, max_examples=10)
@given(
    value=st.floats(-3, 3, width=32),
    grid=st.sampled_from(list(GRIDS.values())),
    schedule=st.sampled_from(list(ALL_SCHEDULES.values())),
)
def test_any_constant_comes_back_in_float32(value, grid, schedule):
    x_T = initial_state(schedule, SHAPE)
    x, _ = run("constant", x_T, plan_of(6, variance_optimal(), grid, schedule), value)
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    exact = value * alpha[1] + sigma[1] / sigma[0] * (x_T - value * alpha[0])
    np.testing.assert_allclose(x, exact, rtol=1e-4, atol=2e-5)


# -- data of one scale


@pytest.mark.fast
@pytest.mark.parametrize(("steps", "worst"), [(8, 0.6), (10, 0.45), (12, 0.3)])
def test_normal_data_of_any_deviation_are_solved_far_better_than_by_fixed_coefficients(steps, worst, x64):
    """Its one scale is found, wherever it is."""
    x_T, times = initial_state(EDM, (2, 8), jnp.float64), ed.grids.log_snr(EDM, steps)
    deviations, errors = np.geomspace(0.2, 6, 13), []
    for solver in (variance_optimal(), dpm_solver_pp(2)):
        plan = plan_of(steps, solver)
        gains = np.array([run("normal", x_T, plan, deviation)[0][0, 0] / x_T[0, 0] for deviation in deviations])
        exact = np.sqrt((deviations**2 + times[-1] ** 2) / (deviations**2 + times[0] ** 2))
        errors.append(np.abs(gains / exact - 1))
    ours, theirs = errors
    assert np.max(ours) < worst * np.max(theirs)
    assert np.median(ours) < np.median(theirs) / 4


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [1e-4, 0.02, 1.0, 50.0])
def test_normal_data_far_from_the_usual_are_no_worse_than_by_ddim(deviation, x64):
    x_T, times = initial_state(EDM, (2, 8), jnp.float64), ed.grids.log_snr(EDM, 10)
    exact = x_T * np.sqrt((deviation**2 + times[-1] ** 2) / (deviation**2 + times[0] ** 2))
    ours, theirs = (
        float(jnp.abs(run("normal", x_T, plan_of(10, solver), deviation)[0] - exact).max())
        for solver in (variance_optimal(), ddim())
    )
    assert ours < theirs


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_without_a_prior_the_rule_is_exact_for_data_of_one_scale(scale, x64):
    """Its own coefficients c*, which the table of a prior completes, make both steps exact."""
    kappa = np.array([3.0, 1.2, 0.7])
    u = np.sqrt(scale**2 + kappa**2)  # the exact path, and the outputs on it
    m = scale**2 / (scale**2 + kappa**2) * u
    q, following = kappa[1:] / kappa[:-1]
    nothing = jnp.zeros((2, 2, 5))
    data = Data(1.0, kappa[1], q, following, 1.0, 0.0, 0.0, jnp.zeros(2), nothing, nothing)
    change = m[1] - m[0]
    sums = jnp.asarray((u[1] - m[1]) * change), jnp.asarray(change**2)
    choice, _ = choose(data, sums, init(data))
    outputs = np.array([m[1], m[0], 0, 0, 0])
    corrected = q * u[0] + (1 - q) * (m[0] + choice.corrector @ outputs)
    predicted = following * u[1] + (1 - following) * (m[1] + choice.predictor @ outputs)
    np.testing.assert_allclose([corrected, predicted], u[1:], rtol=1e-10)


# -- errors on mixtures


@pytest.mark.slow
def test_samples_that_commit_in_steps_that_grow_long_are_better_than_by_fixed_coefficients():
    denoise = ed.denoisers.gaussian_mixture(EDM, np.random.default_rng(0).normal(0, 0.6, (32, 64)), 0.1)
    x_T = EDM.noise(jax.random.key(0), (200, 64))
    exact = run_model(denoise, x_T, plan_of(300, unipc(3), max_calls=300))

    def errors(solver, steps):  # in the last steps, half as long again as those before, samples commit
        x = run_model(denoise, x_T, plan_of(steps, solver, ed.grids.karras, max_calls=6))
        return jnp.sqrt(jnp.mean((x - exact) ** 2, axis=1))

    for steps in (5, 6):
        ours, theirs = errors(variance_optimal(), steps), errors(dpm_solver_pp(2), steps)
        assert jnp.median(ours) < 0.6 * jnp.median(theirs)
        assert jnp.mean(ours**2) < 0.8**2 * jnp.mean(theirs**2)


def test_the_first_step_is_corrected_once_its_end_is_known(x64):
    times, x_T = ed.grids.log_snr(EDM, 8), initial_state(EDM, SHAPE, jnp.float64)
    _, trace = run("mixture", x_T, plan_of(8, variance_optimal()))
    fine = lambda schedule, steps: ed.grids.log_snr(schedule, steps, end=times[1])
    exact, _ = run("mixture", x_T, plan_of(800, dpm_solver_pp(2), fine, max_calls=800))
    probe, _ = run("mixture", x_T, ed.plan(EDM, times[:2], ddim(), max_calls=MAX_CALLS))
    assert median_error(trace.states[1], exact) < median_error(probe, exact) / 3


# -- ends of schedules


def test_a_run_from_alpha_0_to_sigma_0_is_better_than_ddim(x64):
    states = [initial_state(FLOW, SHAPE, jnp.float64, seed=seed) for seed in range(10)]

    def samples(solver, steps, max_calls=MAX_CALLS):
        plan = plan_of(steps, solver, ed.grids.time_uniform, FLOW, max_calls)
        return jnp.concatenate([run("mixture on flow", x_T, plan)[0] for x_T in states])

    exact = samples(dpm_solver_pp(2), 800, 800)
    for steps in (5, 8, 12):
        assert median_error(samples(variance_optimal(), steps), exact) < median_error(samples(ddim(), steps), exact)


@pytest.mark.slow
def test_samples_of_traced_times_have_finite_gradients_in_them():
    x_T = initial_state(EDM, (2, 6))
    loss = lambda times: jnp.sum(
        ed.sample(lambda x, t: jnp.tanh(x) / (1 + t), x_T, ed.plan(EDM, times, variance_optimal()))
    )
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(ed.grids.log_snr(EDM, 3), jnp.float32))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


# -- dtypes


@pytest.mark.slow
def test_float32_is_close_to_float64(x64):
    for seed in range(10):
        x_T = initial_state(EDM, SHAPE, jnp.float64, seed=seed)
        for grid in (ed.grids.log_snr, ed.grids.karras):
            plan = plan_of(10, variance_optimal(), grid)
            exact, x = (run("mixture", x_T.astype(dtype), plan)[0] for dtype in (jnp.float64, jnp.float32))
            assert x.dtype == jnp.float32
            np.testing.assert_allclose(x, exact, atol=1e-3)


# -- invariances


@pytest.mark.parametrize("name", ["vp_linear", "flow", "vp_cosine"])
def test_runs_of_one_problem_on_the_same_noise_levels_agree_on_all_schedules(name, x64):
    schedule = ALL_SCHEDULES[name]
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    ve = ed.schedules.edm(*(sigma / alpha)[::-1])
    x_T, denoise = initial_state(schedule, SHAPE, jnp.float64), mixture(schedule)
    for grid in GRIDS.values():
        for steps in (5, 25) if grid is ed.grids.karras else (5,):
            times = grid(schedule, steps)
            alpha, sigma, _ = schedule.levels(times)
            here, there = (
                ed.plan(on, at, variance_optimal(), max_calls=MAX_CALLS)
                for on, at in ((schedule, times), (ve, sigma / alpha))
            )
            x, (of_ve, _) = run_model(denoise, x_T, here), run("mixture", x_T / alpha[0], there)
            np.testing.assert_allclose(x / alpha[-1], of_ve, rtol=1e-8, atol=1e-9)


@jax.jit
def run_mixture(centers, deviation, x_T, plan):
    """With alpha = 1."""

    def denoise(x, t):
        variance = deviation**2 + t**2
        squares = jnp.sum((x[:, None] - centers) ** 2, axis=-1)
        mean = jax.nn.softmax(-squares / (2 * variance), axis=-1) @ centers
        return mean + deviation**2 / variance * (x - mean)

    return ed.sample(denoise, x_T, plan)


@settings(deadline=None, max_examples=8)
@given(log_scale=st.floats(-8, 8), shift=st.floats(-10, 10), seed=st.integers(0, 2**32 - 1))
def test_it_does_not_depend_on_units_origin_and_axes_of_the_data(log_scale, shift, seed):
    """Data, state and noise levels scaled alike, and rotated and shifted: the same problem."""
    with enable_x64():
        rng, scale = np.random.default_rng(seed), np.exp(log_scale)
        centers, noise = rng.normal(size=(5, 8)), 80 * rng.normal(size=(3, 8))
        rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        times, other = ed.grids.log_snr(EDM, 8), ed.schedules.edm(0.002 * scale, 80 * scale)
        there = lambda x: scale * (x @ rotation + shift)
        x = run_mixture(centers, 0.3, noise, of_any_schedule(ed.plan(EDM, times, variance_optimal())))
        plan = of_any_schedule(ed.plan(other, scale * times, variance_optimal()))
        x_there = run_mixture(there(centers), 0.3 * scale, there(noise), plan)
        np.testing.assert_allclose(x_there, there(x), rtol=1e-6, atol=1e-7 * scale)
