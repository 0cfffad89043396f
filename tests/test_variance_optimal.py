"""The project's own rule: what it solves exactly, its invariances, hard models, ends of schedules, errors on mixtures.

Nothing here depends on how it chooses its coefficients.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture
from hypothesis import given, settings
from hypothesis import strategies as st

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS
from evodiff_jax.numerics import enable_x64
from evodiff_jax.solvers import ddim, dpm_solver_pp, unipc, variance_optimal

EDM, VP = SCHEDULES["edm"], SCHEDULES["vp_linear"]
FLOW = ed.schedules.flow(t_min=0.0, t_max=1.0)  # alpha = 0 at the start, sigma = 0 at the end
ALL_SCHEDULES = {**SCHEDULES, "flow": ed.schedules.flow(), "vp_cosine": ed.schedules.vp_cosine()}
SHAPE = (3, 4, 4, 2)
MAX_CALLS = 26


@functools.partial(jax.jit, static_argnums=0)
def run(denoise, x_T, plan):
    """Compiled once for a model and all plans of as many rows."""
    return ed.sample(denoise, x_T, plan)


@functools.cache
def model(schedule):
    """The golden mixture."""
    return mixture(schedule)


@jax.jit
def run_constant(x_T, value, plan):
    return ed.sample(lambda x, t: jnp.full_like(x, 1.0) * value, x_T, plan)


@jax.jit
def run_normal(x_T, deviation, plan):
    """Of normal data on EDM's schedule."""
    return ed.sample(lambda x, t: deviation**2 / (deviation**2 + t**2) * x, x_T, plan)


def plan_of(steps, solver=None, grid=ed.grids.log_snr, schedule=EDM, **options):
    return ed.plan(schedule, grid(schedule, steps), variance_optimal() if solver is None else solver, **options)


def median_error(x, exact):
    """Of samples, whose few between two modes may end in another one than the exact trajectory."""
    return float(jnp.median(jnp.sqrt(jnp.mean((x - exact) ** 2, axis=range(1, x.ndim)))))


# -- constants


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_constant_model_is_integrated_exactly(schedule, grid, x64):
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    for steps in (1, 3, 8, 25):
        times = grid(schedule, steps)
        alpha, sigma, _ = schedule.levels(times)
        x = run_constant(x_T, 0.3, ed.plan(schedule, times, variance_optimal(), max_calls=MAX_CALLS))
        exact = 0.3 * alpha[-1] + sigma[-1] / sigma[0] * (x_T - 0.3 * alpha[0])
        np.testing.assert_allclose(x, exact, rtol=1e-12, atol=1e-13)
        to_zero = ed.plan(schedule, times, variance_optimal(), denoise_to_zero=True, max_calls=MAX_CALLS)
        np.testing.assert_array_equal(run_constant(x_T, 0.3, to_zero), np.full_like(x_T, 0.3))


@settings(deadline=None, max_examples=30)
@given(
    value=st.floats(-3, 3, width=32),
    grid=st.sampled_from(list(GRIDS.values())),
    schedule=st.sampled_from(list(ALL_SCHEDULES.values())),
)
def test_any_constant_comes_back_in_float32(value, grid, schedule):
    x_T = initial_state(schedule, SHAPE)
    x = run_constant(x_T, jnp.float32(value), plan_of(6, grid=grid, schedule=schedule))
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    exact = value * alpha[1] + sigma[1] / sigma[0] * (x_T - value * alpha[0])
    np.testing.assert_allclose(x, exact, rtol=1e-4, atol=2e-5)


# -- data of one scale


@pytest.mark.parametrize(("steps", "worst"), [(8, 0.6), (10, 0.45), (12, 0.3)])
def test_normal_data_of_any_deviation_are_solved_far_better_than_by_fixed_coefficients(steps, worst, x64):
    """Its one scale is found, wherever it is."""
    x_T, times = initial_state(EDM, (2, 8), jnp.float64), ed.grids.log_snr(EDM, steps)
    deviations, errors = np.geomspace(0.2, 6, 13), []
    for solver in (variance_optimal(), dpm_solver_pp(2)):
        plan = plan_of(steps, solver, max_calls=12)
        gains = np.array([run_normal(x_T, deviation, plan)[0, 0] / x_T[0, 0] for deviation in deviations])
        exact = np.sqrt((deviations**2 + times[-1] ** 2) / (deviations**2 + times[0] ** 2))
        errors.append(np.abs(gains / exact - 1))
    ours, theirs = errors
    assert np.max(ours) < worst * np.max(theirs)
    assert np.median(ours) < np.median(theirs) / 4


@pytest.mark.parametrize("deviation", [1e-4, 0.02, 1.0, 50.0])
def test_normal_data_far_from_the_usual_are_no_worse_than_by_ddim(deviation, x64):
    x_T, times = initial_state(EDM, (2, 8), jnp.float64), ed.grids.log_snr(EDM, 10)
    exact = x_T * np.sqrt((deviation**2 + times[-1] ** 2) / (deviation**2 + times[0] ** 2))
    ours, theirs = (
        float(jnp.abs(run_normal(x_T, deviation, plan_of(10, solver, max_calls=12)) - exact).max())
        for solver in (variance_optimal(), ddim())
    )
    assert ours < theirs


# -- errors on mixtures


@pytest.mark.parametrize("steps", [5, 6])
def test_samples_that_commit_in_steps_that_grow_long_are_better_than_by_fixed_coefficients(steps):
    denoise = ed.denoisers.gaussian_mixture(EDM, np.random.default_rng(0).normal(0, 0.6, (32, 64)), 0.1)
    x_T = EDM.noise(jax.random.key(0), (200, 64))
    exact = run(denoise, x_T, plan_of(300, unipc(3)))

    def errors(solver):  # in the last steps, half as long again as those before, samples commit
        x = run(denoise, x_T, plan_of(steps, solver, ed.grids.karras))
        return jnp.sqrt(jnp.mean((x - exact) ** 2, axis=1))

    ours, theirs = errors(variance_optimal()), errors(dpm_solver_pp(2))
    assert jnp.median(ours) < 0.6 * jnp.median(theirs)
    assert jnp.mean(ours**2) < 0.8**2 * jnp.mean(theirs**2)


def test_the_first_step_is_corrected_once_its_end_is_known(x64):
    times, x_T = ed.grids.log_snr(EDM, 8), initial_state(EDM, (4, 4, 4, 2), jnp.float64)
    first = ed.sample_with_trace(model(EDM), x_T, ed.plan(EDM, times, variance_optimal()))[1].states[1]
    exact = run(model(EDM), x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 800, end=times[1]), dpm_solver_pp(2)))
    probe = run(model(EDM), x_T, ed.plan(EDM, times[:2], ddim()))
    assert median_error(first, exact) < median_error(probe, exact) / 3


# -- ends of schedules


@pytest.mark.parametrize("steps", [5, 8, 12])
def test_a_run_from_alpha_0_to_sigma_0_is_better_than_ddim(steps, x64):
    x_T = initial_state(FLOW, (32, 4, 4, 2), jnp.float64)
    x, by_ddim, exact = (
        run(model(FLOW), x_T, plan_of(n, solver, ed.grids.time_uniform, FLOW, max_calls=max(n, 12)))
        for solver, n in ((variance_optimal(), steps), (ddim(), steps), (dpm_solver_pp(2), 1000))
    )
    assert median_error(x, exact) < median_error(by_ddim, exact)


def test_a_run_from_alpha_0_to_sigma_0_has_finite_values_and_gradients():
    gradients = jax.jit(jax.value_and_grad(lambda x, plan: jnp.sum(ed.sample(model(FLOW), x, plan))))
    for steps in (1, 2, 3, 8):
        plan = plan_of(steps, None, ed.grids.time_uniform, FLOW, max_calls=8)
        chex.assert_tree_all_finite(gradients(initial_state(FLOW, (2, 4, 4, 2)), plan))


def clock_model(x, t):
    """A data prediction that depends on the time alone, so that it is known without the probe."""
    return jnp.broadcast_to(jnp.array([0.5, -0.2], x.dtype) / (1 + t), x.shape)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_last_step_to_sigma_0_returns_the_models_own_prediction(steps):
    times = np.append(ed.grids.log_snr(EDM, steps)[:-1], 0.0)
    plan, x_T = ed.plan(ed.schedules.edm(0.0), times, variance_optimal(), max_calls=6), initial_state(EDM, SHAPE)
    chex.assert_trees_all_close(run(clock_model, x_T, plan), clock_model(x_T, times[-2]), rtol=1e-5)
    chex.assert_tree_all_finite(run(model(EDM), x_T, plan))


@pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (EDM, ed.grids.karras(EDM, 6)),
        (VP, ed.grids.log_snr(VP, 6)),
        (ed.schedules.edm(0.0), np.array([80.0, 5.0, 0.5, 0.0])),
        (FLOW, np.linspace(1, 0, 7)),
        (FLOW, np.array([1.0, 0.0])),
    ],
    ids=["edm", "vp", "to sigma 0", "from alpha 0 to sigma 0", "in one step"],
)
def test_traced_times_give_the_samples_of_concrete_ones(schedule, times, x64):
    x_T, make = initial_state(schedule, SHAPE, jnp.float64), lambda t: plan_at(schedule, t)
    x, expected = (run(model(schedule), x_T, plan) for plan in (jax.jit(make)(times), make(times)))
    chex.assert_trees_all_close(x, expected, rtol=1e-8, atol=1e-9)


def plan_at(schedule, times):
    return ed.plan(schedule, times, variance_optimal(), max_calls=7)


def test_samples_of_traced_times_have_finite_gradients_in_them():
    x_T = initial_state(EDM, (2, 6))
    loss = lambda times: jnp.sum(ed.sample(lambda x, t: jnp.tanh(x) / (1 + t), x_T, plan_at(EDM, times)))
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(ed.grids.log_snr(EDM, 6), jnp.float32))
    chex.assert_tree_all_finite(gradient)
    assert np.abs(gradient).max() > 0


# -- hard models, and dtypes


def test_a_constant_model_has_finite_values_and_gradients():
    x_T = initial_state(EDM, (2, 2, 2, 2))
    loss = lambda x, value, plan: jnp.sum(run_constant(x, value, plan))
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for grid in (ed.grids.log_snr, ed.grids.time_uniform):
        for value in (0.0, 0.3, 1e-25, 1e15):
            chex.assert_tree_all_finite(gradients(x_T, jnp.float32(value), plan_of(5, grid=grid)))


def test_tiny_and_huge_models_have_finite_values_and_gradients():
    """Models whose outputs differ by so little, or so much, that their squares nearly leave float32, or do."""
    x_T, plan = initial_state(EDM, (2, 4)), plan_of(7)

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(x, size):
        return jnp.sum(ed.sample(lambda x, t: size * jnp.tanh(x / (1 + t)), x, plan))

    for size in (1e-25, 1e-20, 1e-15, 1e-8, 1e8, 1e15):
        chex.assert_tree_all_finite(value_and_gradient(x_T, size))


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_a_channel_on_which_the_model_is_zero_stays_finite(channel_axis):
    x_T, plan = initial_state(EDM, SHAPE), plan_of(8, variance_optimal(channel_axis))
    masked = lambda x, t: model(EDM)(x, t) * jnp.array([1.0, 0.0], x.dtype)
    loss = lambda x: jnp.sum(ed.sample(masked, x, plan))
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss))(x_T))


@pytest.mark.parametrize("grid", [ed.grids.log_snr, ed.grids.karras], ids=lambda grid: grid.__name__)
def test_float32_is_close_to_float64(grid, x64):
    x_T = initial_state(EDM, (32, 4, 4, 2), jnp.float64)
    exact, x = (run(model(EDM), x_T.astype(dtype), plan_of(10, grid=grid)) for dtype in (jnp.float64, jnp.float32))
    np.testing.assert_allclose(x, exact, atol=1e-3)


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_bfloat16_runs_are_finite(channel_axis):
    x = run(model(EDM), initial_state(EDM, (8, 4, 4, 2), jnp.bfloat16), plan_of(10, variance_optimal(channel_axis)))
    assert x.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(x)
    assert np.max(np.abs(x)) < 10


# -- invariances


@pytest.mark.parametrize("name", ["vp_linear", "flow", "vp_cosine"])
def test_runs_of_one_problem_on_the_same_noise_levels_agree_on_all_schedules(name, x64):
    schedule = ALL_SCHEDULES[name]
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    ve = ed.schedules.edm(*(sigma / alpha)[::-1])
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    for grid in GRIDS.values():
        for steps in (5, 10, 25):
            times = grid(schedule, steps)
            alpha, sigma, _ = schedule.levels(times)
            here, there = (
                ed.plan(on, at, variance_optimal(), max_calls=MAX_CALLS)
                for on, at in ((schedule, times), (ve, sigma / alpha))
            )
            x, of_ve = run(model(schedule), x_T, here), run(model(ve), x_T / alpha[0], there)
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


@settings(deadline=None, max_examples=20)
@given(log_scale=st.floats(-8, 8), shift=st.floats(-10, 10), seed=st.integers(0, 2**32 - 1))
def test_it_does_not_depend_on_units_origin_and_axes_of_the_data(log_scale, shift, seed):
    """Data, state and noise levels scaled alike, and rotated and shifted: the same problem."""
    with enable_x64():
        rng, scale = np.random.default_rng(seed), np.exp(log_scale)
        centers, noise = rng.normal(size=(5, 8)), 80 * rng.normal(size=(3, 8))
        rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        times, other = ed.grids.log_snr(EDM, 8), ed.schedules.edm(0.002 * scale, 80 * scale)
        there = lambda x: scale * (x @ rotation + shift)
        x = run_mixture(centers, 0.3, noise, ed.plan(EDM, times, variance_optimal()))
        plan = ed.plan(other, scale * times, variance_optimal())
        x_there = run_mixture(there(centers), 0.3 * scale, there(noise), plan)
        np.testing.assert_allclose(x_there, there(x), rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_samples_of_a_batch_do_not_depend_on_each_other(channel_axis, x64):
    x_T, plan = initial_state(EDM, (4, 4, 4, 2), jnp.float64), plan_of(8, variance_optimal(channel_axis))
    together = run(model(EDM), x_T, plan)
    for i in range(0, 4, 2):
        np.testing.assert_allclose(run(model(EDM), x_T[i : i + 2], plan), together[i : i + 2], rtol=1e-9, atol=1e-11)


def test_coefficients_are_chosen_for_samples_or_for_channels(x64):
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    smooth = lambda x, t: jnp.tanh(x) / (1 + t**2)
    assert variance_optimal().rule.channel_axis is None
    trace_of = lambda axis: ed.sample_with_trace(smooth, x_T, plan_of(6, variance_optimal(axis)))[1]
    of_channels, of_samples = trace_of(-1), trace_of(None)
    assert all(leaf.shape[:3] == (6, 3, 2) for leaf in jax.tree.leaves(of_channels.rule))
    assert all(leaf.shape[:2] == (6, 3) for leaf in jax.tree.leaves(of_samples.rule))
    # A model of each channel for itself runs on it as alone.
    for channel in range(2):
        alone = ed.sample(smooth, x_T[..., channel].reshape(3, -1), plan_of(6))
        chex.assert_trees_all_close(of_channels.states[-1][..., channel].reshape(3, -1), alone, rtol=1e-9, atol=1e-11)
    moved = ed.sample(smooth, jnp.moveaxis(x_T, -1, 1), plan_of(6, variance_optimal(1)))
    chex.assert_trees_all_close(moved, jnp.moveaxis(of_channels.states[-1], -1, 1), rtol=1e-9, atol=1e-11)
    # A vector has no channels: one choice a sample, whatever is asked for.
    of_vectors = ed.sample(smooth, x_T.reshape(3, -1), plan_of(6, variance_optimal(-1)))
    chex.assert_trees_all_close(of_vectors, of_samples.states[-1].reshape(3, -1), rtol=1e-9, atol=1e-11)


def test_solvers_are_cached_so_that_nothing_recompiles():
    assert variance_optimal() is variance_optimal(None, True)
    assert variance_optimal() != variance_optimal(-1)
