"""Diagnostics against closed forms of exact models: normal data of several scales, and mixtures."""

import csv
import io
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state

import evodiff_jax as ed
from evodiff_jax import diagnostics, plotting
from evodiff_jax.cli import main
from evodiff_jax.denoisers import gaussian_mixture
from evodiff_jax.diagnostics._geometry import calls_of_steps

KEY = jax.random.key(0)
EDM, VP = SCHEDULES["edm"], SCHEDULES["vp_linear"]
WHOLE = ed.NoiseSchedule(lambda t: 1 - t, lambda t: t, 0.0, 1.0)  # from alpha = 0 to sigma = 0
CENTERS = np.random.default_rng(1).uniform(-1, 1, (6, 5))
STD = 0.2
SCALES = np.array([2.0, 1.0, 0.5, 0.2, 0.05])
T = 0.6


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def normal(schedule, scales=SCALES):
    """The data prediction of normal data with these standard deviations and mean 0."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (alpha * scales**2 / (alpha**2 * scales**2 + sigma**2)).astype(x.dtype) * x

    return denoise


def normal_variance(schedule, t, scales=SCALES):
    kappa2 = np.exp(-2 * schedule.levels(t).lambda_)
    return scales**2 * kappa2 / (scales**2 + kappa2)


def mixture_covariance(schedule, x, t, centers=CENTERS, std=STD):
    """The posterior covariance of equally likely normals, in float64."""
    alpha, sigma, _ = schedule.levels(t)
    variance = (alpha * std) ** 2 + sigma**2
    logits = -np.square(x[:, None] - alpha * centers).sum(2) / (2 * variance)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    means = centers + alpha * std**2 / variance * (x[:, None] - alpha * centers)
    apart = means - np.einsum("bk,bkd->bd", weights, means)[:, None]
    return std**2 * sigma**2 / variance * np.eye(x.shape[1]) + np.einsum("bk,bkd,bke->bde", weights, apart, apart)


def noisy(schedule, t, count=8, seed=3):
    random = np.random.default_rng(seed)
    data = random.choice(CENTERS, count) + STD * random.standard_normal((count, CENTERS.shape[1]))
    alpha, sigma, _ = schedule.levels(t)
    return alpha * data + sigma * random.standard_normal(data.shape)


# ---- the posterior


@pytest.mark.parametrize("schedule", [EDM, pytest.param(VP, marks=pytest.mark.slow)])
def test_the_exact_covariance_is_that_of_the_mixture(schedule, x64):
    x = noisy(schedule, T)
    denoise = gaussian_mixture(schedule, CENTERS, STD)
    of_chunk = jax.jit(lambda x: diagnostics.posterior_covariance(denoise, schedule, x, T, chunk=2))
    np.testing.assert_allclose(of_chunk(x), mixture_covariance(schedule, x, T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [EDM, pytest.param(VP, marks=pytest.mark.slow)])
def test_hutchinson_estimates_the_mixture_within_its_standard_error(schedule):
    x = noisy(schedule, T, 64)
    exact = mixture_covariance(schedule, x, T)
    denoise = gaussian_mixture(schedule, CENTERS, STD)
    estimate = jax.jit(
        lambda x: diagnostics.posterior_variance(denoise, schedule, x, jnp.float32(T), key=KEY, probes=200)
    )
    found = estimate(jnp.asarray(x, jnp.float32))
    z = (found.value - np.trace(exact, axis1=1, axis2=2) / 5) / (found.error + 1e-7)
    assert np.abs(z).max() < 5
    assert 0.5 < np.std(z) < 1.5  # the standard errors are neither too small nor too large
    assert abs(np.mean(z)) < 5 / np.sqrt(len(z))


@pytest.mark.slow
def test_the_variance_of_every_coordinate(x64):
    x = noisy(EDM, T, 4)
    found = diagnostics.posterior_variance(
        gaussian_mixture(EDM, CENTERS, STD), EDM, jnp.asarray(x), T, key=KEY, probes=400, per_coordinate=True
    )
    exact = np.diagonal(mixture_covariance(EDM, x, T), axis1=1, axis2=2)
    assert (np.abs(found.value - exact) / (found.error + 1e-9)).max() < 5
    assert float(jnp.mean(found.error)) < 0.1 * exact.mean()


def test_independent_coordinates_need_one_probe():
    x = jnp.asarray(noisy(EDM, T), jnp.float32)
    of_coordinates = jax.jit(
        lambda x: diagnostics.posterior_variance(normal(EDM), EDM, x, T, key=KEY, probes=2, per_coordinate=True)
    )
    found = of_coordinates(x)
    np.testing.assert_allclose(found.value, np.broadcast_to(normal_variance(EDM, T), x.shape), rtol=1e-5)
    np.testing.assert_allclose(found.error, 0, atol=1e-7)


@pytest.mark.slow
def test_states_that_are_pytrees_and_keys_of_samples():
    x = jnp.asarray(noisy(EDM, T, 3), jnp.float32)
    parts = {"a": x[:, :2], "b": x[:, 2:].reshape(3, 3, 1)}
    both = lambda x, t: {"a": normal(EDM, SCALES[:2])(x["a"], t), "b": normal(EDM, SCALES[2:, None])(x["b"], t)}
    found = diagnostics.posterior_variance(both, EDM, parts, T, key=jax.random.split(KEY, 3), probes=2)
    np.testing.assert_allclose(found.value, np.full(3, normal_variance(EDM, T).mean()), rtol=1e-5)
    covariance = diagnostics.posterior_covariance(both, EDM, parts, T)
    np.testing.assert_allclose(covariance[1], np.diag(normal_variance(EDM, T)), rtol=1e-5, atol=1e-7)


# ---- the reverse transition


@pytest.mark.parametrize("schedule", [pytest.param(EDM, marks=pytest.mark.slow), VP])
def test_the_entropy_of_the_transition_of_normal_data_is_exact(schedule, x64):
    t, s = 0.8, 0.3
    alpha, sigma, _ = schedule.levels(np.array([t, s]))
    # x_t and x_s are jointly normal: their covariance from x_t = (alpha_t / alpha_s) x_s + noise.
    of_t, of_s = (alpha**2 * SCALES[:, None] ** 2 + sigma**2).T
    covariance = alpha[0] / alpha[1] * of_s
    conditional = of_s - covariance**2 / of_t
    exact = 0.5 * np.log(2 * np.pi * np.e * conditional)
    variance = normal_variance(schedule, t)
    found = jax.jit(
        lambda v: (
            diagnostics.transition_variance(schedule, t, s, v),
            diagnostics.transition_entropy(schedule, t, s, v),
            diagnostics.transition_entropy(schedule, t, s, jnp.mean(v)),
            diagnostics.transition_entropy_of_covariance(schedule, t, s, jnp.diag(v)[None]),
        )
    )(variance)
    np.testing.assert_allclose(found[0], conditional, rtol=1e-9)
    np.testing.assert_allclose(found[1], exact, rtol=1e-9)
    np.testing.assert_allclose(found[3], [exact.mean()], rtol=1e-9)
    assert found[2] > found[3][0]  # the bound of the mean


def test_the_variance_of_the_transition_of_a_mixture_is_that_of_its_draws():
    t, s, x = 0.8, 0.3, noisy(EDM, 0.8, 1)
    random, draws = np.random.default_rng(0), 200_000
    variance = STD**2 + t**2
    logits = -np.square(x - CENTERS).sum(1) / (2 * variance)
    weights = np.exp(logits - logits.max())
    centers = CENTERS[random.choice(len(CENTERS), draws, p=weights / weights.sum())]
    data = centers + STD**2 / variance * (x - centers)
    data = data + STD * t / np.sqrt(variance) * random.standard_normal(data.shape)
    q2 = (s / t) ** 2
    after = q2 * x + (1 - q2) * data + s * np.sqrt(1 - q2) * random.standard_normal(data.shape)
    posterior = np.diagonal(mixture_covariance(EDM, x, t), axis1=1, axis2=2)
    np.testing.assert_allclose(
        diagnostics.transition_variance(EDM, t, s, posterior), after.var(0)[None], rtol=6 * np.sqrt(2 / draws)
    )


@pytest.mark.slow
def test_the_information_of_all_steps_is_that_of_the_whole(x64):
    times = ed.grids.log_snr(VP, 9)
    total = sum(
        diagnostics.transition_information(VP, t, s, normal_variance(VP, t)) for t, s in itertools.pairwise(times)
    )
    start, end = (0.5 * np.log1p(SCALES**2 * np.exp(2 * VP.levels(t).lambda_)) for t in (times[0], times[-1]))
    np.testing.assert_allclose(total, end - start, rtol=1e-9)


# ---- runs


@pytest.mark.parametrize("name", ["evodiff", *slow("variance_optimal", "sa_solver", "heun", "dpm_solver-2")])
def test_following_a_plan_is_sampling(name):
    solver = ed.solvers.FORMS[name].make()
    denoise, x_T = gaussian_mixture(VP, CENTERS, STD), initial_state(VP, (3, 5))
    plan = ed.plan(VP, ed.grids.log_snr(VP, 5), solver, max_calls=12)
    run = jax.jit(lambda x: diagnostics.follow(denoise, x, plan, key=KEY))(x_T)
    x, trace = ed.sample_with_trace(denoise, x_T, plan, key=KEY)
    calls = int(plan.calls)
    assert run.times.shape == (calls + 1,)
    np.testing.assert_allclose(run.states[-1], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.states, trace.states[: calls + 1], rtol=1e-5, atol=1e-5)
    ours, theirs = jax.tree.leaves(run.rule), jax.tree.leaves(trace.rule)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b[:calls], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_coefficients_of_single_coordinates():
    data = jnp.asarray(noisy(VP, VP.t_min, 32), jnp.float32)
    denoise, times, x_T = gaussian_mixture(VP, CENTERS, STD), ed.grids.log_snr(VP, 5), initial_state(VP, (3, 5))
    statistics = ed.statistics.estimate(denoise, data, VP, key=KEY, num_levels=20)
    plan = ed.plan(VP, times, ed.solvers.dpm_solver_v3(statistics))
    run = diagnostics.follow(denoise, x_T, plan)
    np.testing.assert_allclose(run.states[-1], ed.sample(denoise, x_T, plan), rtol=1e-5, atol=1e-6)
    assert run.gains.shape == (5, 3)
    path = diagnostics.converge(denoise, x_T, VP, times)
    errors = diagnostics.transition_errors(denoise, plan, path)
    np.testing.assert_allclose(diagnostics.state_errors(run, path)[1], errors[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unipc-3", "evodiff", "variance_optimal", "ddim", "dpm_solver-3"])
def test_the_gain_is_the_derivative_of_the_next_state(name, x64):
    """In rules the coefficients depend on the output too; they are held fixed in the gain."""
    solver = ed.solvers.FORMS[name].make()
    denoise, x_T = gaussian_mixture(VP, CENTERS, STD), initial_state(VP, (3, 5), jnp.float64)
    times = ed.grids.log_snr(VP, 5)
    plan = ed.plan(VP, times, solver)
    run = diagnostics.follow(denoise, x_T, plan)
    if plan.rule is None:
        coefficient = plan.table.transition * plan.table.corrector[:, 0] + plan.table.predictor[:, 0]
        coefficient = coefficient * (1 if plan.table.history is None else plan.table.history[1])
        np.testing.assert_allclose(run.gains, np.repeat(coefficient[:, None] ** 2, 3, 1), rtol=1e-9)
        state = ed.init(x_T, plan)
        for i in range(3):
            step = lambda m, state=state: ed.update(state, m, plan).x
            m = denoise(state.x, state.t)
            _, tangent = jax.jvp(step, (m,), (jnp.ones_like(m),))
            np.testing.assert_allclose(tangent**2, np.repeat(run.gains[i][:, None], 5, 1), rtol=1e-9)
            state = ed.update(state, m, plan)
    else:  # the first step is DDIM in both
        alpha, _, lambda_ = VP.levels(times)
        np.testing.assert_allclose(
            run.gains[0], np.full(3, (alpha[1] * np.expm1(lambda_[0] - lambda_[1])) ** 2), rtol=1e-9
        )
        assert (np.ptp(run.gains[2:4], axis=1) > 0).all()  # and later ones are of each sample


@pytest.mark.parametrize("schedule", [EDM, pytest.param(VP, marks=pytest.mark.slow)])
def test_the_converged_trajectory_of_normal_data_and_its_curvature(schedule, x64):
    times = ed.grids.log_snr(schedule, 6)
    x_T = initial_state(schedule, (4, 5), jnp.float64)
    converge = lambda scales, x: diagnostics.converge(normal(schedule, scales), x, schedule, times, substeps=40)
    found = jax.jit(lambda x: converge(SCALES, x))(x_T)
    alpha, _, lambda_ = schedule.levels(times)
    kappa = np.exp(-lambda_)[:, None]
    u = np.sqrt(SCALES**2 + kappa**2)
    exact = (x_T / alpha[0] / u[0]) * (alpha[:, None] * u)[:, None]
    np.testing.assert_allclose(found.states, exact, rtol=2e-4, atol=1e-8)
    np.testing.assert_allclose(found.outputs[3], normal(schedule)(exact[3], times[3]), rtol=2e-4, atol=1e-8)
    # Of one scale all samples have the same curvature.
    q, s = kappa[1:] / kappa[:-1], SCALES[2]
    u = u[:, 2:3]
    straight = u[:-1] * (q + (1 - q) * s**2 / (s**2 + kappa[:-1] ** 2))
    of_scale = jax.tree.map(lambda leaf: leaf[..., 2:3] if leaf.ndim > 1 else leaf, found)
    curvature = diagnostics.curvature(of_scale, schedule)
    np.testing.assert_allclose(
        curvature, np.repeat(abs((u[1:] - straight) / (u[1:] - u[:-1])), 4, 1), rtol=0.02, atol=1e-4
    )


@pytest.mark.slow
def test_infinite_ends_of_lambda_are_refined():
    times = ed.grids.time_uniform(WHOLE, 4)
    denoise = gaussian_mixture(WHOLE, CENTERS, STD)
    found = diagnostics.converge(denoise, initial_state(WHOLE, (3, 5)), WHOLE, times)
    diagnostics.check_finite(found, WHOLE)
    curvature = diagnostics.curvature(found, WHOLE)
    np.testing.assert_array_equal(curvature[0], 0)
    assert np.isfinite(curvature).all()
    fine = ed.plan(WHOLE, ed.grids.time_uniform(WHOLE, 400), ed.solvers.dpm_solver_pp(2))
    np.testing.assert_allclose(found.states[-1], ed.sample(denoise, found.states[0], fine), atol=2e-3)


@pytest.mark.parametrize("name", ["ddim", *slow("unipc-2", "evodiff", "variance_optimal")])
def test_transition_errors_of_normal_data(name, x64):
    """With each step from the exact state, and with the exact first outputs, against the steps written out."""
    scales = np.array([0.5])
    times = ed.grids.log_snr(EDM, 6)
    x_T = initial_state(EDM, (4, 1), jnp.float64)
    denoise, solver = normal(EDM, scales), ed.solvers.FORMS[name].make()
    plan = ed.plan(EDM, times, solver)

    @jax.jit
    def measure(x_T):
        reference = diagnostics.converge(denoise, x_T, EDM, times, substeps=200)
        run = diagnostics.follow(denoise, x_T, plan)
        errors = diagnostics.transition_errors(denoise, plan, reference)
        return errors, diagnostics.state_errors(run, reference), run.states[-1]

    errors, of_states, result = measure(x_T)
    x_T = np.asarray(x_T)
    assert errors.shape == (6, 4)
    exact = x_T * np.sqrt((scales**2 + times**2) / (scales**2 + times[0] ** 2))[:, None, None]
    if name == "ddim":
        expected = [
            q * exact[i] + (1 - q) * denoise(exact[i], times[i]) - exact[i + 1]
            for i, q in enumerate(times[1:] / times[:-1])
        ]
        # The model is called at the solver's own prediction of the state, one step off the trajectory.
        off = [np.zeros_like(x_T), *expected[:-1]]
        gain = lambda i: scales**2 / (scales**2 + times[i] ** 2) * (1 - times[i + 1] / times[i])
        expected = [abs(e + gain(i) * o)[:, 0] for i, (e, o) in enumerate(zip(expected, off, strict=True))]
        np.testing.assert_allclose(errors[:2], expected[:2], rtol=1e-3)
    np.testing.assert_allclose(of_states[1], errors[0], rtol=1e-6)  # the first step starts on the trajectory
    np.testing.assert_allclose(of_states[-1], abs(result - exact[-1])[:, 0], rtol=1e-2, atol=1e-7)


@pytest.mark.slow
def test_errors_of_stages_are_no_transitions():
    denoise, x_T, times = normal(EDM), initial_state(EDM, (2, 5)), ed.grids.log_snr(EDM, 4)
    reference = diagnostics.converge(denoise, x_T, EDM, times, substeps=5)
    plan = ed.plan(EDM, times, ed.solvers.heun())
    with pytest.raises(ValueError, match="calls the model at 8 times, the reference has 4 steps"):
        diagnostics.transition_errors(denoise, plan, reference)
    errors = diagnostics.state_errors(diagnostics.follow(denoise, x_T, plan), reference)
    assert np.isfinite(errors).all()
    elsewhere = reference._replace(times=reference.times.at[2].multiply(1.01))
    assert np.isnan(diagnostics.state_errors(diagnostics.follow(denoise, x_T, plan), elsewhere)[2]).all()


@pytest.mark.slow
def test_reconstruction_errors_are_those_of_the_data_predictions():
    random = np.random.default_rng(0)
    x_0 = jnp.asarray(SCALES * random.standard_normal((500, 5)), jnp.float32)
    x = EDM.add_noise(x_0, T, KEY)
    times = ed.grids.log_snr(EDM, 3, start=T)
    run = diagnostics.follow(normal(EDM), x, ed.plan(EDM, times, ed.solvers.ddim()))
    found = np.mean(diagnostics.reconstruction_errors(run, x_0)[0] ** 2)
    # The mean square error of the exact model is the posterior variance.
    assert abs(found / normal_variance(EDM, times[0]).mean() - 1) < 5 * np.sqrt(2 / (500 * 2))


@pytest.mark.slow
def test_a_point_is_reached_in_a_straight_line():
    point = lambda x, t: jnp.zeros_like(x) + 0.3
    path = diagnostics.converge(point, initial_state(EDM, (2, 3)), EDM, ed.grids.log_snr(EDM, 4), substeps=3)
    np.testing.assert_allclose(diagnostics.curvature(path, EDM), 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_the_density_of_calls_of_normal_data(order, x64):
    s = 0.5
    times = ed.grids.log_snr(EDM, 120)
    x_T = initial_state(EDM, (2, 1), jnp.float64)
    path = diagnostics.converge(normal(EDM, np.array([s])), x_T, EDM, times, substeps=4)
    found = diagnostics.call_density(path, EDM, order)
    # m is proportional to (s^2 + kappa^2)^(-1/2), kappa = exp(-lambda).
    kappa2 = np.exp(-2 * np.asarray(found.lambda_))
    first = kappa2 * (s**2 + kappa2) ** -1.5
    second = (-2 * kappa2 * (s**2 + kappa2) + 3 * kappa2**2) * (s**2 + kappa2) ** -2.5
    exact = np.abs(first if order == 1 else second) ** (1 / (order + 1))
    exact /= np.trapezoid(exact, found.lambda_)
    near_zero = exact < 0.3 * exact.max()  # differences smooth the kink of the second derivative's root
    np.testing.assert_allclose(found.density[~near_zero], exact[~near_zero], rtol=0.02)
    assert abs(np.trapezoid(found.density, found.lambda_) - 1) < 1e-6
    spread = diagnostics.times_by_density(EDM, found, times[0], times[-1], 10)
    assert spread.shape == (11,)
    assert spread[0] == times[0]
    assert spread[-1] == times[-1]
    ed.plan(EDM, spread, ed.solvers.ddim())


@pytest.mark.slow
def test_times_that_follow_the_density_lower_the_error_of_ddim():
    denoise, x_T = gaussian_mixture(EDM, CENTERS, STD), initial_state(EDM, (200, 5))
    grid = ed.grids.log_snr(EDM, 40)
    path = diagnostics.converge(denoise, initial_state(EDM, (50, 5), seed=1), EDM, grid, substeps=4)
    density = diagnostics.call_density(path, EDM, order=1)
    exact = diagnostics.converge(denoise, x_T, EDM, grid, substeps=10).states[-1]
    run = jax.jit(lambda plan: ed.sample(denoise, x_T, plan))
    followed, even = (
        float(jnp.sqrt(jnp.mean((run(ed.plan(EDM, times, ed.solvers.ddim())) - exact) ** 2)))
        for times in (diagnostics.times_by_density(EDM, density, grid[0], grid[-1], 8), ed.grids.log_snr(EDM, 8))
    )
    assert followed < 0.85 * even


def test_where_half_of_the_calls_belong_and_the_share_of_every_step():
    nodes = np.linspace(-4, 6, 400)
    bell = np.exp(-np.square(nodes - 1) / 2) / np.sqrt(2 * np.pi)
    density = diagnostics.Density(jnp.asarray(nodes, jnp.float32), jnp.asarray(bell, jnp.float32))
    np.testing.assert_allclose(diagnostics.densest_half(density), [1 - 0.6745, 1 + 0.6745], atol=0.01)
    shares = calls_of_steps(density, np.array([-np.inf, 0, 1, 2, np.inf]))
    np.testing.assert_allclose(shares, [0.1587, 0.3413, 0.3413, 0.1587], atol=1e-3)
    with pytest.raises(ValueError, match="must be finite and positive somewhere"):
        diagnostics.densest_half(diagnostics.Density(density.lambda_, 0 * density.density))


# ---- what is refused, and where numbers cease to be finite


def test_where_outputs_cease_to_be_finite():
    times = ed.grids.log_snr(EDM, 6)
    broken = lambda x, t: jnp.where((t < times[2]) & (jnp.arange(len(x))[:, None] == 1), jnp.nan, normal(EDM)(x, t))
    x_T = initial_state(EDM, (3, 5))
    plan = ed.plan(EDM, times, ed.solvers.unipc(2))
    run = jax.jit(lambda x: diagnostics.follow(broken, x, plan))(x_T)
    with pytest.raises(
        ValueError, match=r"data prediction .* t = 0\.4 .* call 4 of 6, in 1 of 3 .*input there is finite"
    ):
        diagnostics.check_finite(run, EDM)
    path = jax.jit(lambda x: diagnostics.converge(broken, x, EDM, times[1:], substeps=3))(x_T)
    with pytest.raises(
        ValueError, match=r"data prediction .* t = 2\.\d* .*step 2 of 5, in 1 of 3 .*input there is finite"
    ):
        diagnostics.check_finite(path, EDM)  # in the middle of that step
    run = run._replace(states=run.states.at[0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match=r"state is not finite from t = 80 .*call 1 of 6, in 1 .*initial state"):
        diagnostics.check_finite(run, EDM)


def test_bad_input_is_refused_before_anything_is_compiled():
    def never(x, t):
        raise AssertionError("the model was called")

    x, plan = jnp.ones((2, 5)), ed.plan(EDM, ed.grids.log_snr(EDM, 3), ed.solvers.ddim())
    d = diagnostics
    for error, match, call in (
        (TypeError, "denoise must be a function", lambda: d.posterior_variance(3, EDM, x, T, key=KEY)),
        (TypeError, "schedule must be a NoiseSchedule", lambda: d.posterior_variance(never, None, x, T, key=KEY)),
        (TypeError, "x must be floating-point", lambda: d.posterior_covariance(never, EDM, jnp.arange(3), T)),
        (TypeError, "key must be a JAX random key", lambda: d.posterior_variance(never, EDM, x, T, key=3)),
        (ValueError, "t must be within", lambda: d.posterior_variance(never, EDM, x, 100.0, key=KEY)),
        (ValueError, "t must be a scalar", lambda: d.posterior_variance(never, EDM, x, jnp.ones(2), key=KEY)),
        (ValueError, "probes must be an integer", lambda: d.posterior_variance(never, EDM, x, T, key=KEY, probes=1)),
        (ValueError, "alpha is 0", lambda: d.posterior_covariance(never, WHOLE, x, 1.0)),
        (ValueError, "5000 coordinates", lambda: d.posterior_covariance(never, EDM, jnp.ones((1, 5000)), T)),
        (ValueError, "s must be below t", lambda: d.transition_entropy(EDM, 0.5, 0.7, 1.0)),
        (ValueError, r"\(B, D, D\)", lambda: d.transition_entropy_of_covariance(EDM, 0.7, 0.5, x)),
        (TypeError, "plan must be a Plan", lambda: d.follow(never, x, None)),
        (TypeError, "plan must be concrete", lambda: jax.jit(lambda p: d.follow(never, x, p).gains)(plan)),
        (ValueError, "substeps must be", lambda: d.converge(never, x, EDM, [2.0, 1.0], substeps=0)),
        (ValueError, "one model call a step", lambda: d.converge(never, x, EDM, [2.0, 1.0], solver=ed.solvers.heun())),
        (ValueError, "strictly decreasing", lambda: d.converge(never, x, EDM, [1.0, 2.0])),
        (TypeError, "reference must be a Trajectory", lambda: d.transition_errors(never, plan, x)),
        (TypeError, "trajectory must be a Trajectory", lambda: d.curvature(x, EDM)),
        (TypeError, "concrete Run or Trajectory", lambda: d.check_finite(x, EDM)),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(ValueError, match="must return the shape of x"):
        diagnostics.posterior_variance(lambda x, t: x[:, :1], EDM, x, T, key=KEY)
    other = gaussian_mixture(VP, CENTERS, STD)
    with pytest.raises(ValueError, match="made for another schedule"):
        diagnostics.posterior_variance(other, EDM, x, T, key=KEY)
    path = diagnostics.Trajectory(
        jnp.array([2.0, 1.0, 0.5]), jnp.ones((3, 2, 5)), jnp.ones((2, 2, 5)), jnp.zeros((2, 2), bool)
    )
    for error, match, call in (
        (ValueError, "order must be 1, 2 or 3", lambda: d.call_density(path, EDM, 4)),
        (ValueError, "needs 3 times of finite lambda", lambda: d.call_density(path, EDM, 1)),
        (ValueError, "must have the shape", lambda: d.reconstruction_errors(path, x[:1])),
        (ValueError, "start and end must be decreasing", lambda: d.times_by_density(EDM, (x[0], x[0]), 1.0, 2.0, 3)),
        (TypeError, "run must be a Run", lambda: d.update_variance(path, x)),
    ):
        with pytest.raises(error, match=match):
            call()


# ---- all of it, and the command

NAMES = ("ddim", "evodiff", "heun")


def diagnosed(**options):
    times = ed.grids.log_snr(EDM, 4)
    made = {name: ed.solvers.FORMS[name].make() for name in options.pop("names", NAMES)}
    given = {"key": KEY, "probes": 2, "substeps": 30, **options}
    denoise = given.pop("denoise", normal(EDM))
    return diagnostics.diagnose(denoise, initial_state(EDM, (5, 5)), EDM, times, made, **given)


@pytest.mark.slow
def test_a_diagnosis_of_normal_data():
    found = diagnosed()
    times = ed.grids.log_snr(EDM, 4)
    for name in NAMES:
        values = found[name].values
        assert set(diagnostics.QUANTITIES) <= set(values)
        assert all(value.shape == (4, 5) for value in values.values())
        for i, (t, after) in enumerate(itertools.pairwise(times)):
            variance = normal_variance(EDM, t).mean()
            np.testing.assert_allclose(values["posterior_variance"][i], variance, rtol=1e-4)
            entropy = diagnostics.transition_entropy(EDM, t, after, variance)
            np.testing.assert_allclose(values["entropy"][i], entropy, rtol=1e-4)
        assert np.isfinite(values["state_error"]).all()
    several = found["heun"].values
    assert np.isnan(several["transition_error"]).all()
    assert np.isnan(several["update_variance"]).all()
    ddim, evodiff = found["ddim"].values, found["evodiff"].values
    gain = (1 - times[1:] / times[:-1]) ** 2
    np.testing.assert_allclose(ddim["update_variance"], gain[:, None] * ddim["posterior_variance"], rtol=1e-4)
    np.testing.assert_array_equal(np.isnan(evodiff["zeta"]).all(1), [True, True, False, False])
    assert ((evodiff["zeta"][2:] > 0) & (evodiff["zeta"][2:] < 1)).all()
    # m of a coordinate is c s^2 (s^2 + kappa^2)^(-1/2), where c is set by its noise.
    assert set(found["ddim"].density) == {1, 2}
    density = found["ddim"].density[1]
    kappa2 = np.exp(-2 * np.asarray(density.lambda_)[:, None])
    c2 = np.mean(np.square(initial_state(EDM, (5, 5))), 0) / (SCALES**2 + times[0] ** 2)
    exact = np.mean(c2 * (SCALES**2 * kappa2) ** 2 * (SCALES**2 + kappa2) ** -3.0, 1) ** 0.25
    exact /= np.trapezoid(exact, density.lambda_)
    np.testing.assert_allclose(density.density, exact, rtol=0.05)


@pytest.mark.slow
def test_a_diagnosis_in_batches_with_weights_and_conditions_is_the_same():
    whole = diagnosed(names=["evodiff"])
    weighted = lambda params, x, t, label: params * normal(EDM)(x, t) + 0 * label[:, None]
    parts = diagnosed(names=["evodiff"], denoise=weighted, params=1.0, condition=np.arange(5.0), batch=2)
    for name in ("state_error", "transition_error", "zeta", "reconstruction_error", "curvature", "entropy"):
        a, b = (found["evodiff"].values[name] for found in (whole, parts))
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)
    for order in (1, 2):
        a, b = (found["evodiff"].density[order] for found in (whole, parts))
        np.testing.assert_allclose(b.density, a.density, rtol=1e-3)


@pytest.mark.slow
def test_a_straight_trajectory_has_no_density_of_calls():
    point = lambda x, t: jnp.zeros_like(x) + 0.3
    found = diagnosed(names=["ddim"], denoise=point)
    assert found["ddim"].density == {}
    assert "calls_of_order" not in diagnostics.csv_of(found)
    assert "Where calls help" not in diagnostics.markdown_of(found)
    assert len(plotting.diagnoses(found).legends[0].get_texts()) == 1


@pytest.mark.slow
def test_tables_and_figure_of_a_diagnosis():
    found = diagnosed(names=["ddim", "evodiff"])
    rows = list(csv.DictReader(io.StringIO(diagnostics.csv_of(found))))
    assert [row["solver"] for row in rows] == ["ddim"] * 4 + ["evodiff"] * 4
    value = found["evodiff"].values["state_error"][3]
    assert float(rows[7]["state_error"]) == pytest.approx(value.mean(), rel=1e-4)
    assert float(rows[7]["state_error_interval"]) == pytest.approx(1.96 * value.std(ddof=1) / np.sqrt(5), rel=1e-3)
    assert rows[0]["zeta"] == ""
    shares = [float(row["calls_of_order_2"]) for row in rows]
    assert shares[:4] == shares[4:]
    assert sum(shares[:4]) == pytest.approx(1, abs=1e-5)
    text = diagnostics.markdown_of(found)
    assert "## evodiff" in text
    assert text.count("\n| 4 |") == 3
    assert f"| 1 | 80 | -8.76 | {float(rows[0]['calls_of_order_1']):.1%} | {shares[0]:.1%} |" in text
    figure = plotting.diagnoses(found, "title")
    assert [panel.get_title() for panel in figure.axes if panel.get_visible()][-3:] == [
        "zeta",
        "eta",
        "where calls help",
    ]
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue()[:4] == b"\x89PNG"


def test_a_diagnosis_refuses_what_has_no_trajectory():
    with pytest.raises(ValueError, match="sa_solver is stochastic"):
        diagnosed(names=["sa_solver"])
    with pytest.raises(TypeError, match="solvers must be a dictionary"):
        diagnosed(names=[])
    with pytest.raises(ValueError, match="batch must be an integer of at least 1"):
        diagnosed(batch=0)


@pytest.mark.slow
def test_a_diagnosis_says_of_which_run_numbers_are_not_finite():
    times = ed.grids.log_snr(EDM, 4)
    broken = lambda x, t: jnp.where(t < times[2], jnp.nan, normal(EDM)(x, t))
    with pytest.raises(
        ValueError,
        match=r"the converged trajectory: the data prediction is not finite from t = 0\.4 .*step 21 of 40.*input",
    ):
        diagnosed(denoise=broken)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--solvers sa_solver", "argument --solvers: must be of variance_optimal"),
        ("--exact circle", "argument --exact: must be one of mixture-2d"),
        ("--exact mixture-2d --class 3", "argument --class: not with --exact"),
        ("--exact mixture-2d --checkpoint model.pkl", "argument --checkpoint: not with --exact"),
        ("--denoise-to-zero", "argument --denoise-to-zero: not here"),
        ("--probes 1", "must be an integer in 2"),
        ("--out missing/folder", "there is no folder"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_writes_tables_and_a_figure(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["diagnose", "--steps", "4", "--samples", "6", "--probes", "2", "--substeps", "4", "--out", "out"]
    assert main([*run, "--exact", "mixture-2d", "--solvers", "evodiff", "heun"]) == 0
    printed = capsys.readouterr().out
    assert "mean entropy falls in 3 of 3 steps" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("calls")]
    number = r"([\d.]+)"
    found = re.fullmatch(
        rf"calls    (Half of the calls belong between sigma/alpha {number} and {number} \(order 1\), "
        rf"{number} and {number} \(order 2\)\.)",
        line,
    )
    sentence, *ends = found.groups()
    for high, low in (ends[:2], ends[2:]):
        assert 80 > float(high) > float(low) > 0.002
    assert sentence in (tmp_path / "out" / "diagnosis.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"diagnosis.{e}" for e in ("csv", "md", "png")
    ]
    assert main([*run, "--solvers", "ddim", "--class", "bag"]) == 0
    assert "model    fashion_mnist" in capsys.readouterr().out
    assert (tmp_path / "out" / "diagnosis.md").read_text().startswith("# Solvers on fashion_mnist, step by step")


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/diagnostics.md", "exec"), names)
    assert abs(names["z"]) < 5
