"""EVODiff: its limits, its invariances, the run of the scales beside the sample's, and the released form."""

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
from evodiff_jax.solvers import _evodiff
from evodiff_jax.tables import append_denoising

EDM = SCHEDULES["edm"]
FLOW = ed.schedules.flow(t_min=0.0, t_max=1.0)  # alpha = 0 at the start, sigma = 0 at the end
ALL_SCHEDULES = {**SCHEDULES, "flow": ed.schedules.flow(), "vp_cosine": ed.schedules.vp_cosine()}
REFERENCE = ed.solvers.evodiff_reference()
BOTH = [ed.solvers.evodiff(), REFERENCE]
both = pytest.mark.parametrize("solver", BOTH, ids=["evodiff", "evodiff_reference"])
every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def constant(value):
    return lambda x, t: jnp.full_like(x, value)


def median_error(x, exact):
    """Of samples, whose few between two modes may end in another one than the exact trajectory."""
    return float(jnp.median(jnp.sqrt(jnp.mean((x - exact) ** 2, axis=range(1, x.ndim)))))


# ---- what is integrated exactly, and what is found out


@functools.partial(jax.jit, static_argnums=0)
def run_plan(denoise, x_T, plan):
    """Compiled once for all plans of as many rows."""
    return ed.sample(denoise, x_T, plan)


def three_tenths(x, t):
    return jnp.full_like(x, 0.3)


@every_schedule
@every_grid
def test_a_constant_model_is_integrated_exactly(schedule, grid, x64):
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    for steps in (1, 3, 8, 25):
        times = grid(schedule, steps)
        alpha, sigma, _ = schedule.levels(times)
        x = run_plan(three_tenths, x_T, ed.plan(schedule, times, max_calls=26))
        exact = 0.3 * alpha[-1] + sigma[-1] / sigma[0] * (x_T - 0.3 * alpha[0])
        np.testing.assert_allclose(x, exact, rtol=1e-12, atol=1e-13)
        denoised = run_plan(three_tenths, x_T, ed.plan(schedule, times, denoise_to_zero=True, max_calls=26))
        np.testing.assert_array_equal(denoised, np.full_like(x_T, 0.3))


@jax.jit
def run_constant(x_T, value, plan):
    return ed.sample(constant(value), x_T, plan)


@settings(deadline=None, max_examples=30)
@given(
    value=st.floats(-3, 3, width=32),
    grid=st.sampled_from(list(GRIDS.values())),
    schedule=st.sampled_from(list(ALL_SCHEDULES.values())),
)
def test_any_constant_comes_back_in_float32(value, grid, schedule):
    x_T = initial_state(schedule, (2, 4, 4, 2))
    x = run_constant(x_T, value, ed.plan(schedule, grid(schedule, 6)))
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    exact = value * alpha[1] + sigma[1] / sigma[0] * (x_T - value * alpha[0])
    np.testing.assert_allclose(x, exact, rtol=1e-4, atol=2e-5)


def test_the_released_form_does_not_return_a_constant():
    x = ed.sample(constant(0.3), initial_state(EDM, (2, 4, 4, 1)), ed.plan(EDM, ed.grids.log_snr(EDM, 8), REFERENCE))
    assert np.min(np.abs(x - 0.3)) > 0.02


@pytest.mark.parametrize("steps", [8, 10, 12])
def test_normal_data_is_integrated_far_better_than_by_fixed_coefficients(steps, x64):
    """Its one scale is found, wherever it is."""
    times = ed.grids.log_snr(EDM, steps)
    x_T = initial_state(EDM, (2, 8), jnp.float64)

    @jax.jit
    def run(std, plan):
        return ed.sample(lambda x, t: std**2 / (std**2 + t**2) * x, x_T, plan)

    stds, errors = np.geomspace(0.2, 6, 13), []
    for solver in (ed.solvers.evodiff(), ed.solvers.dpm_solver_pp(2)):
        plan = ed.plan(EDM, times, solver)
        gains = np.array([run(std, plan)[0, 0] / x_T[0, 0] for std in stds])
        errors.append(np.abs(gains / np.sqrt((stds**2 + times[-1] ** 2) / (stds**2 + times[0] ** 2)) - 1))
    ours, theirs = errors
    assert np.max(ours) < np.max(theirs) / 5
    assert np.median(ours) < np.median(theirs) / 10


def scales_of(solver, schedule, times):
    """The scales that the solver samples beside the state."""
    kappa = np.exp(-schedule.levels(times[:1]).lambda_)
    return kappa / np.sqrt(1 / solver.table(schedule, times).rule.response[0] - 1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scale", [0, 5, 9, 11])
def test_data_of_one_of_the_scales_runs_as_that_scale_does(schedule, scale, x64):
    """What the rule computes for the scale and what the kernel computes for the sample are the same numbers."""
    solver, times = ed.solvers.evodiff(), ed.grids.karras(schedule, 8)
    std, alpha = scales_of(solver, schedule, times)[scale], schedule.levels(times).alpha
    denoise = mixture(schedule, np.zeros((1, 3, 2)), std)
    start = solver.table(schedule, times).rule.start[0, scale]
    x_T = jnp.full((2, 3, 2), alpha[0] * std * start)
    states = ed.sample_with_trace(denoise, x_T, ed.plan(schedule, times, solver))[1].states
    state = ed.stepping.init(x_T, ed.plan(schedule, times, solver))
    for i in range(8):
        state = ed.stepping.update(state, denoise(state.x, state.t))
        (memory,) = state.carry.memories
        assert memory.shape == (2, solver.memory)
        at, probe = (np.broadcast_to(memory[:, k, None, None], x_T.shape) for k in (scale, 12 + scale))
        np.testing.assert_allclose(states[i] / (alpha[i] * std), at, rtol=1e-6)
        np.testing.assert_allclose(state.x / (alpha[i + 1] * std), probe, rtol=1e-6)


@pytest.mark.parametrize("scale", [4, 7, 10])
def test_the_spectrum_of_normal_data_is_found(scale, x64):
    """Most of the estimated energy is at the scale of the data and its neighbours."""
    solver, times = ed.solvers.evodiff(), ed.grids.log_snr(EDM, 20)
    std = scales_of(solver, EDM, times)[scale]
    state = ed.stepping.init(initial_state(EDM, (2, 50), jnp.float64), ed.plan(EDM, times, solver))
    while state.t > std:
        state = ed.stepping.update(state, std**2 / (std**2 + state.t**2) * state.x)
    energy = state.carry.memories[0][:, 5 * 12 : 6 * 12]
    assert np.all(np.abs(np.argmax(energy, axis=1) - scale) <= 1)


@settings(deadline=None, max_examples=100)
@given(
    std=st.floats(-6, 6),
    end=st.floats(-3, 3),
    steps=st.tuples(st.floats(0.02, 3), st.floats(0.02, 3)),
    sign=st.sampled_from([1, -1]),
)
def test_the_noise_in_the_state_tells_the_scale_and_its_exact_steps(std, end, steps, sign):
    """For normal data, from the noise and the change of the output over the last step, from the noise and to it."""
    with enable_x64():
        std, kappa = np.exp(std), np.exp(end + sign * np.array([steps[0], 0, -steps[1]]))
        x = np.sqrt(std**2 + kappa**2)
        m = std**2 / (std**2 + kappa**2) * x
        q, following = kappa[1] / kappa[0], kappa[2] / kappa[1]
        w = _evodiff._shrinkage(q, (x[1] - m[1]) * (m[1] - m[0]), (m[1] - m[0]) ** 2)
        corrector, predictor = _evodiff._corrector_of_scale(w, q), _evodiff._predictor_of_scale(w, q, following)
        np.testing.assert_allclose(w, x[1] / x[0], rtol=1e-5)
        exact = (x[1:] - kappa[1:] / kappa[:-1] * x[:-1]) / (1 - kappa[1:] / kappa[:-1]) - m[:-1]
        np.testing.assert_allclose([corrector, predictor], exact / (m[1] - m[0]), rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_whatever_the_noise_steps_are_bounded_and_of_second_order(sign):
    T, h, h_next = np.meshgrid(
        [-np.inf, -1e6, -1.0, 0.0, 1e-3, 1e3, 1e30], [1e-3, 0.1, 1.0, 4.0, 12.0], [1e-3, 1.0, 12.0]
    )
    T, q, following = (jnp.asarray(values, jnp.float32) for values in (T, np.exp(-sign * h), np.exp(-sign * h_next)))
    w = _evodiff._shrinkage(q, T, jnp.ones_like(T))
    corrector, predictor = _evodiff._corrector_of_scale(w, q), _evodiff._predictor_of_scale(w, q, following)
    settled, growing = 1 / (1 + q), 0.5  # of a scale far above kappa, and of one far below
    assert np.all(corrector >= jnp.minimum(growing, settled) - 1e-3)
    assert np.all(corrector <= jnp.maximum(growing, settled) + 1e-3)
    assert np.all((predictor > 0) & (predictor < np.inf))
    if sign == 1:  # times D_0: no more than the noise along it
        assert np.all(predictor <= 1.01 * jnp.maximum(T, 2 * q**2 / (1 - q**2)))
    small = np.maximum(h, h_next) < 0.01
    np.testing.assert_allclose(corrector[small], 0.5, rtol=0.01)
    np.testing.assert_allclose(predictor[small], (h_next / h / 2)[small], rtol=0.01)


def course_of(denoise, x_T, times, schedule):
    """How far the outputs of each sample moved with the noise, moved against it at first, and turned against it."""
    state = ed.stepping.init(x_T, ed.plan(schedule, times))
    while not state.done:
        state = ed.stepping.update(state, denoise(state.x, state.t))
    return np.asarray(state.carry.memories[0][:, -_evodiff._SIZES.course :])


def test_a_commitment_to_a_mode_is_noticed_and_nothing_else_taken_for_one():
    times, x_T = ed.grids.log_snr(EDM, 10), initial_state(EDM, (64, 32))
    centers = np.random.default_rng(1).normal(0, 1, (20, 32))

    def leaky(x, t):
        """A network that leaves more of the noise in its prediction the more noise there is."""
        return mixture(EDM, centers, 0.1)(x, t) + 2e-3 * x

    modes = course_of(mixture(EDM, centers, 0.1), x_T, times, EDM)
    normal = course_of(lambda x, t: x / (1 + t**2), x_T, times, EDM)
    leaking = course_of(leaky, x_T, times, EDM)
    for course in (modes, normal, leaking):
        assert np.all(course >= -1e-6)
        assert np.all(course.sum(axis=1) <= 1 + 1e-5)
    assert np.mean(modes[:, 2] > 0.5) > 0.8
    assert np.all(normal[:, 0] > 0.75)  # the last output of a probe that overshot turns back
    np.testing.assert_allclose(leaking, np.broadcast_to([0, 1.0, 0], leaking.shape), atol=1e-6)


# ---- hard models, ends and dtypes


@both
@pytest.mark.parametrize("grid", [ed.grids.log_snr, ed.grids.time_uniform], ids=lambda grid: grid.__name__)
def test_a_constant_model_has_finite_values_and_gradients(solver, grid):
    x_T = initial_state(EDM, (2, 2, 2, 2))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(x, value):
        return jnp.sum(ed.sample(lambda x, t: jnp.full_like(x, 1.0) * value, x, ed.plan(EDM, grid(EDM, 5), solver)))

    for value in (0.0, 0.3, 1e-25, 1e15):
        chex.assert_tree_all_finite(run(x_T, jnp.float32(value)))


@both
def test_tiny_and_huge_models_have_finite_values_and_gradients(solver):
    """Models whose outputs differ by so little, or so much, that their squares nearly leave float32, or do."""
    x_T = initial_state(EDM, (2, 4))

    @jax.jit
    @jax.value_and_grad
    def run(x, size):
        model = lambda x, t: size * jnp.tanh(x / (1 + t))
        return jnp.sum(ed.sample(model, x, ed.plan(EDM, ed.grids.log_snr(EDM, 7), solver)))

    for size in (1e-25, 1e-20, 1e-15, 1e-8, 1e8, 1e15):
        chex.assert_tree_all_finite(run(x_T, size))


@pytest.mark.parametrize("channel_axis", [None, -1])
@pytest.mark.parametrize("make", [ed.solvers.evodiff, ed.solvers.evodiff_reference], ids=lambda make: make.__name__)
def test_a_channel_on_which_the_model_is_zero_stays_finite(make, channel_axis):
    x_T = initial_state(EDM, (3, 4, 4, 2))
    times = ed.grids.log_snr(EDM, 8)

    def masked(x, t):
        return mixture(EDM)(x, t) * jnp.array([1.0, 0.0], x.dtype)

    run = jax.value_and_grad(lambda x: jnp.sum(ed.sample(masked, x, ed.plan(EDM, times, make(channel_axis)))))
    chex.assert_tree_all_finite(jax.jit(run)(x_T))


@pytest.mark.parametrize("steps", [5, 6])
def test_samples_that_commit_in_steps_that_grow_long_are_better_than_by_fixed_coefficients(steps):
    schedule = ed.schedules.edm()
    denoise = ed.denoisers.gaussian_mixture(schedule, np.random.default_rng(0).normal(0, 0.6, (32, 64)), 0.1)
    x_T = schedule.t_max * jax.random.normal(jax.random.key(0), (200, 64))
    exact = ed.sample(denoise, x_T, ed.plan(schedule, ed.grids.log_snr(schedule, 300), ed.solvers.unipc(3)))
    times = ed.grids.karras(schedule, steps)  # in the last steps, half as long again as those before, samples commit

    def errors(solver):
        return jnp.sqrt(jnp.mean((ed.sample(denoise, x_T, ed.plan(schedule, times, solver)) - exact) ** 2, axis=1))

    ours, theirs = errors(ed.solvers.evodiff()), errors(ed.solvers.dpm_solver_pp(2))
    assert jnp.median(ours) < 0.6 * jnp.median(theirs)
    assert jnp.mean(ours**2) < 0.8**2 * jnp.mean(theirs**2)


@pytest.mark.parametrize("steps", [5, 8, 12])
def test_a_run_from_alpha_zero_to_sigma_zero_is_better_than_ddim(steps, x64):
    x_T = initial_state(FLOW, (32, 4, 4, 2), jnp.float64)
    denoise = mixture(FLOW)
    exact = ed.sample(denoise, x_T, ed.plan(FLOW, np.linspace(1, 0, 1001), ed.solvers.dpm_solver_pp(2)))
    solvers = (ed.solvers.evodiff(), ed.solvers.ddim())
    x, by_ddim = (ed.sample(denoise, x_T, ed.plan(FLOW, np.linspace(1, 0, steps + 1), solver)) for solver in solvers)
    assert median_error(x, exact) < median_error(by_ddim, exact)


@pytest.mark.parametrize("steps", [2, 8])
def test_a_run_from_alpha_zero_to_sigma_zero_has_finite_values_and_gradients(steps):
    run = lambda x: jnp.sum(
        ed.sample(mixture(FLOW), x, ed.plan(FLOW, np.linspace(1, 0, steps + 1), ed.solvers.variance_optimal()))
    )
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(run))(initial_state(FLOW, (2, 4, 4, 2))))


@both
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_sampling_may_end_at_sigma_zero(solver, steps):
    schedule = ed.schedules.edm(0.0, 80.0)
    times = np.append(ed.grids.log_snr(EDM, steps)[:-1], 0.0)
    x_T = initial_state(schedule, (3, 4, 4, 2))
    chex.assert_tree_all_finite(ed.sample(mixture(EDM), x_T, ed.plan(schedule, times, solver)))
    if solver is not REFERENCE:  # the last step is the model's own prediction
        x = ed.sample(clock_model, x_T, ed.plan(schedule, times, solver))
        chex.assert_trees_all_close(x, clock_model(x_T, times[-2]), rtol=1e-5)


def clock_model(x, t):
    """A data prediction that depends on the time alone, so that it is known without the probe."""
    return jnp.broadcast_to(jnp.array([0.5, -0.2], x.dtype) / (1 + t), x.shape)


def test_the_first_step_is_corrected_once_its_end_is_known(x64):
    times = ed.grids.log_snr(EDM, 8)
    x_T = initial_state(EDM, (4, 4, 4, 2), jnp.float64)
    first = ed.sample_with_trace(mixture(EDM), x_T, ed.plan(EDM, times, ed.solvers.variance_optimal()))[1].states[1]
    exact = ed.sample(
        mixture(EDM), x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 800, end=times[1]), ed.solvers.dpm_solver_pp(2))
    )
    probe = ed.sample(mixture(EDM), x_T, ed.plan(EDM, times[:2], ed.solvers.ddim()))
    assert median_error(first, exact) < median_error(probe, exact) / 3


def test_the_last_step_is_safe_at_a_final_sigma_of_a_tenth_where_the_released_one_is_not(x64):
    schedule = ed.schedules.edm(0.1, 10.0)
    x_T = initial_state(schedule, (16, 4, 4, 2), jnp.float64)
    exact = ed.sample(mixture(schedule), x_T, ed.plan(schedule, ed.grids.log_snr(schedule, 2000), ed.solvers.ddim()))
    times = ed.grids.log_snr(schedule, 10)
    errors = [
        median_error(ed.sample(mixture(schedule), x_T, ed.plan(schedule, times, solver)), exact) for solver in BOTH
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("grid", [ed.grids.log_snr, ed.grids.karras], ids=lambda grid: grid.__name__)
def test_float32_is_close_to_float64(grid, x64):
    x_T = initial_state(EDM, (32, 4, 4, 2), jnp.float64)
    exact, x = (
        ed.sample(mixture(EDM), x_T.astype(t), ed.plan(EDM, grid(EDM, 10), ed.solvers.variance_optimal()))
        for t in (jnp.float64, jnp.float32)
    )
    np.testing.assert_allclose(x, exact, atol=1e-3)


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_bfloat16_runs_are_finite(channel_axis):
    x_T = initial_state(EDM, (8, 4, 4, 2), jnp.bfloat16)
    x = ed.sample(mixture(EDM), x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 10), ed.solvers.evodiff(channel_axis)))
    assert x.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(x)
    assert np.max(np.abs(x)) < 10


# ---- invariances


def test_vp_and_ve_runs_of_one_problem_agree(x64):
    vp = SCHEDULES["vp_linear"]
    alpha, sigma, _ = vp.levels(np.array([vp.t_max, vp.t_min]))
    ve = ed.schedules.edm(*(sigma / alpha)[::-1])
    of_vp, of_ve = mixture(vp), mixture(ve)
    x_T = initial_state(vp, (3, 4, 4, 2), jnp.float64)
    for grid in GRIDS.values():
        for steps in (5, 10, 25):
            times = grid(vp, steps)
            alpha, sigma, _ = vp.levels(times)
            in_vp = run_plan(of_vp, x_T, ed.plan(vp, times, max_calls=25))
            in_ve = run_plan(of_ve, x_T / alpha[0], ed.plan(ve, sigma / alpha, max_calls=25))
            np.testing.assert_allclose(in_vp / alpha[-1], in_ve, rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=5)
@given(log_scale=st.floats(-8, 8), shift=st.floats(-10, 10), seed=st.integers(0, 2**32 - 1))
def test_the_coefficients_do_not_depend_on_units_origin_and_axes_of_the_data(log_scale, shift, seed):
    """Data, state and noise levels scaled alike, and rotated and shifted: the same problem."""
    with enable_x64():
        rng, scale = np.random.default_rng(seed), np.exp(log_scale)
        centers, noise = rng.normal(size=(5, 8)), 80 * rng.normal(size=(3, 8))
        rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        times, other = ed.grids.log_snr(EDM, 8), ed.schedules.edm(0.002 * scale, 80 * scale)
        there = lambda x: scale * (x @ rotation + shift)
        x, trace = ed.sample_with_trace(
            mixture(EDM, centers, 0.3), jnp.asarray(noise), ed.plan(EDM, times, ed.solvers.variance_optimal())
        )
        moved = mixture(other, there(centers), 0.3 * scale)
        x_there, trace_there = ed.sample_with_trace(
            moved, jnp.asarray(there(noise)), ed.plan(other, scale * times, ed.solvers.variance_optimal())
        )
        np.testing.assert_allclose(x_there, there(x), rtol=1e-6, atol=1e-7 * scale)
        np.testing.assert_allclose(
            trace_there.coefficients["variance"], trace.coefficients["variance"], rtol=1e-4, atol=1e-12
        )


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_samples_of_a_batch_do_not_depend_on_each_other(channel_axis, x64):
    x_T, times = initial_state(EDM, (4, 4, 4, 2), jnp.float64), ed.grids.log_snr(EDM, 8)
    run = jax.jit(lambda x: ed.sample(mixture(EDM), x, ed.plan(EDM, times, ed.solvers.evodiff(channel_axis))))
    together = run(x_T)
    for i in range(4):
        np.testing.assert_allclose(run(x_T[i : i + 1])[0], together[i], rtol=1e-9, atol=1e-11)


@both
def test_coefficients_are_chosen_for_channels_or_for_samples(solver):
    make = getattr(ed.solvers, solver.name)
    x_T = initial_state(EDM, (3, 4, 4, 2))
    times = ed.grids.log_snr(EDM, 6)

    def trace(channel_axis, x, model):
        return ed.sample_with_trace(model, x, ed.plan(EDM, times, make(channel_axis)))[1]

    assert make().channel_axis == (None if solver.name == "evodiff" else -1)
    of_channels, of_samples = (trace(channel_axis, x_T, mixture(EDM)) for channel_axis in (-1, None))
    assert of_channels.zeta.shape == (4, 3, 2)
    assert of_samples.zeta.shape == (4, 3)

    def swapped(x, t):
        return jnp.moveaxis(mixture(EDM)(jnp.moveaxis(x, 1, -1), t), -1, 1)

    chex.assert_trees_all_close(
        trace(1, jnp.moveaxis(x_T, -1, 1), swapped).states[-1],
        jnp.moveaxis(of_channels.states[-1], -1, 1),
        atol=1e-4,
    )
    # A vector has no channels: one choice a sample, whatever is asked for.
    flat = x_T.reshape(3, -1)

    def flattened(x, t):
        return mixture(EDM)(x.reshape(x_T.shape), t).reshape(x.shape)

    of_vectors = trace(-1, flat, flattened)
    assert of_vectors.zeta.shape == (4, 3)
    chex.assert_trees_all_close(of_vectors.states[-1], of_samples.states[-1].reshape(3, -1), atol=1e-4)


# ---- the trace and the table


def test_the_released_zeta_and_eta_are_within_the_bounds_of_their_definition():
    x_T = initial_state(EDM, (8, 4, 4, 2))
    _, trace = ed.sample_with_trace(mixture(EDM), x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 12), REFERENCE))
    assert np.all((trace.eta >= 0.25) & (trace.eta <= 0.5 / (1 + np.exp(-1)) + 1e-6))
    assert np.all((trace.zeta >= 1 / (1 + np.exp(0.5)) - 1e-6) & (trace.zeta < 1))
    assert all(entry.shape == trace.zeta.shape for entry in jax.tree.leaves(trace.gram))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_zeta_and_eta_are_those_of_the_steps_that_were_made(schedule, x64):
    """x = x_e + A / (2 zeta) (r (1 - eta) D_0 - (eta / r) D_1), and a term of D_2 that a trace does not show."""
    steps, times = 9, ed.grids.karras(schedule, 9)
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    denoise = mixture(schedule)
    _, trace = ed.sample_with_trace(denoise, x_T, ed.plan(schedule, times, ed.solvers.variance_optimal()))
    assert trace.zeta.shape == trace.eta.shape == trace.coefficients["variance"].shape == (steps - 2, 3)
    assert np.all(trace.coefficients["variance"] >= 0)
    state, outputs = ed.stepping.init(x_T, ed.plan(schedule, times)), []
    for _ in range(steps):
        outputs.append(denoise(state.x, state.t).reshape(3, -1))
        state = ed.stepping.update(state, outputs[-1].reshape(x_T.shape))
    alpha, sigma, lambda_ = schedule.levels(times)
    h, corrected = np.diff(lambda_), np.asarray(trace.states).reshape(steps + 1, 3, -1)
    for end in range(2, steps):  # the step that ends at times[end]
        amplitude, r = -alpha[end] * np.expm1(-h[end - 1]), h[end - 2] / h[end - 1]
        by_ddim = sigma[end] / sigma[end - 1] * corrected[end - 1] + amplitude * outputs[end - 1]
        differences = [outputs[end - a] - outputs[end - a - 1] for a in range(min(end, 3))]
        for b, (zeta, eta) in enumerate(zip(trace.zeta[end - 2], trace.eta[end - 2], strict=True)):
            D = np.stack([d[b] for d in differences], axis=1)
            c, *_ = np.linalg.lstsq(D, (corrected[end, b] - by_ddim[b]) / amplitude)
            np.testing.assert_allclose(D @ c, (corrected[end, b] - by_ddim[b]) / amplitude, atol=1e-8)
            np.testing.assert_allclose(c[:2], [r * (1 - eta) / (2 * zeta), -eta / r / (2 * zeta)], rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("schedule", [*ALL_SCHEDULES.values(), FLOW], ids=[*ALL_SCHEDULES, "whole flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_constant_rows_of_the_table_are_consistent(solver, schedule, steps):
    """Applied to x = alpha x_0 + sigma eps and outputs x_0, a row must give the same combination at the next time."""
    times = ed.grids.time_uniform(schedule, steps)
    table = append_denoising(solver.table(schedule, times), times[-1])
    chex.assert_tree_all_finite(table)
    alpha, sigma, _ = schedule.levels(times)
    rows = steps if solver.name == "evodiff" else steps - 1  # the released last step is not consistent
    np.testing.assert_allclose(table.transition[:rows] * sigma[:rows], sigma[1 : rows + 1], rtol=1e-12, atol=1e-15)
    signal = table.transition[:rows] * alpha[:rows] + table.predictor[:rows].sum(1)
    np.testing.assert_allclose(signal, alpha[1 : rows + 1], rtol=1e-12)
    np.testing.assert_allclose(table.corrector.sum(1), 0, atol=1e-15)
    assert table.predictor[-1].tolist() == [1, *[0] * (table.predictor.shape[1] - 1)]
    assert table.transition[-1] == 0
    if solver.name == "evodiff":  # all but the first, and of a last step to sigma = 0 the correction alone
        np.testing.assert_array_equal(table.adaptive.sum(0), [steps - 1, max(steps - 1 - (sigma[-1] == 0), 0)])


def test_solvers_are_cached_so_that_a_static_solver_argument_does_not_recompile():
    assert ed.solvers.evodiff() is ed.solvers.evodiff()
    assert ed.solvers.evodiff() != ed.solvers.evodiff(channel_axis=-1)
