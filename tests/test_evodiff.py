"""EVODiff as published: its first and last steps, its coefficients, their axes, hard models and ends of schedules.

`test_golden` compares it with the authors' release.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import ddim, evodiff

EDM = SCHEDULES["edm"]
FLOW = ed.schedules.flow(t_min=0.0, t_max=1.0)  # alpha = 0 at the start, sigma = 0 at the end
SHAPE = (3, 4, 4, 2)
MAX_CALLS = 26


@jax.jit
def run(x_T, plan):
    """Of the golden mixture on EDM's schedule; compiled once for all plans of as many rows."""
    return ed.sample_with_trace(mixture(EDM), x_T, plan)


@jax.jit
def run_constant(x_T, value, plan):
    return ed.sample(lambda x, t: jnp.full_like(x, 1.0) * value, x_T, plan)


def plan_of(steps, solver=None, grid=ed.grids.log_snr, schedule=EDM, **options):
    return ed.plan(schedule, grid(schedule, steps), evodiff() if solver is None else solver, **options)


def median_error(x, exact):
    return float(jnp.median(jnp.sqrt(jnp.mean((x - exact) ** 2, axis=range(1, x.ndim)))))


# -- the first steps and the last one


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("schedule", [EDM, SCHEDULES["vp_linear"], FLOW], ids=["edm", "vp_linear", "flow"])
def test_runs_of_one_and_two_steps_are_ddim(steps, schedule, x64):
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    x, expected = (
        ed.sample(mixture(schedule), x_T, plan_of(steps, solver, ed.grids.time_uniform, schedule))
        for solver in (evodiff(), ddim())
    )
    chex.assert_trees_all_close(x, expected, rtol=1e-12, atol=1e-12)


def test_the_first_step_is_ddim_and_is_not_corrected(x64):
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    times = ed.grids.karras(EDM, 6)
    _, trace = run(x_T, ed.plan(EDM, times, evodiff()))
    expected, _ = run(x_T, ed.plan(EDM, times[:2], ddim()))
    chex.assert_trees_all_close(trace.states[1], expected, rtol=1e-12)
    now = ed.init(x_T, ed.plan(EDM, times, evodiff()))
    now = ed.update(now, mixture(EDM)(now.x, now.t), ed.plan(EDM, times, evodiff()))
    chex.assert_trees_all_close(now.x, expected, rtol=1e-12)


def test_the_last_step_is_safe_at_a_final_sigma_of_a_tenth_where_the_released_one_is_not(x64):
    schedule = ed.schedules.edm(0.1, 10.0)
    x_T = initial_state(schedule, (16, 4, 4, 2), jnp.float64)
    sample = jax.jit(lambda plan: ed.sample(mixture(schedule), x_T, plan))
    exact = sample(plan_of(2000, ddim(), schedule=schedule))
    plain, released = (
        median_error(sample(plan_of(10, evodiff(last_step=last), schedule=schedule)), exact)
        for last in ("ddim", "released")
    )
    assert plain < released / 2


def test_an_unknown_last_step():
    with pytest.raises(ValueError, match="last_step to be one of 'ddim', 'released', got 'euler'"):
        evodiff(last_step="euler")


# -- constant models


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), ed.schedules.flow()], ids=[*SCHEDULES, "flow"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_constant_comes_back_as_far_as_the_balanced_differences_vanish(schedule, grid, x64):
    """rho = 1 in m_0 - rho m_1 for equal steps of log sigma; elsewhere what is left of a constant is small."""
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    for steps in (1, 3, 8, 25):
        times = grid(schedule, steps)
        alpha, sigma, _ = schedule.levels(times)
        x = run_constant(x_T, 0.3, ed.plan(schedule, times, evodiff(), max_calls=MAX_CALLS))
        exact = 0.3 * alpha[-1] + sigma[-1] / sigma[0] * (x_T - 0.3 * alpha[0])
        equal = schedule is EDM and grid in (ed.grids.log_snr, ed.grids.exponential, ed.grids.polyexponential)
        np.testing.assert_allclose(x, exact, rtol=1e-12 if equal else 0.02, atol=1e-13)
        to_zero = ed.plan(schedule, times, evodiff(), denoise_to_zero=True, max_calls=MAX_CALLS)
        np.testing.assert_array_equal(run_constant(x_T, 0.3, to_zero), np.full_like(x_T, 0.3))


def test_the_released_last_step_does_not_return_a_constant():
    x = run_constant(initial_state(EDM, SHAPE), 0.3, plan_of(8, evodiff(last_step="released"), max_calls=MAX_CALLS))
    assert np.min(np.abs(x - 0.3)) > 0.02


# -- values and gradients of hard models


@pytest.mark.parametrize("last_step", ["ddim", "released"])
@pytest.mark.parametrize("grid", [ed.grids.log_snr, ed.grids.time_uniform], ids=lambda grid: grid.__name__)
def test_a_constant_model_has_finite_values_and_gradients(last_step, grid):
    x_T, plan = initial_state(EDM, (2, 2, 2, 2)), plan_of(5, evodiff(last_step=last_step), grid)
    for value in (0.0, 0.3, 1e-25, 1e15):
        chex.assert_tree_all_finite(constant_gradients(x_T, jnp.float32(value), plan))


@jax.jit
def constant_gradients(x_T, value, plan):
    return jax.value_and_grad(lambda x, value: jnp.sum(run_constant(x, value, plan)), argnums=(0, 1))(x_T, value)


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
    x_T, plan = initial_state(EDM, SHAPE), plan_of(8, evodiff(channel_axis))
    masked = lambda x, t: mixture(EDM)(x, t) * jnp.array([1.0, 0.0], x.dtype)
    loss = lambda x: jnp.sum(ed.sample(masked, x, plan))
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss))(x_T))


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_bfloat16_runs_are_finite(channel_axis):
    x, _ = run(initial_state(EDM, (8, 4, 4, 2), jnp.bfloat16), plan_of(10, evodiff(channel_axis)))
    assert x.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(x)
    assert np.max(np.abs(x)) < 10


# -- ends of schedules


def clock_model(x, t):
    """A data prediction that depends on the time alone, so that it is known without the probe."""
    return jnp.broadcast_to(jnp.array([0.5, -0.2], x.dtype) / (1 + t), x.shape)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_last_step_to_sigma_0_returns_the_models_own_prediction(steps):
    times = np.append(ed.grids.log_snr(EDM, steps)[:-1], 0.0)
    plan = ed.plan(ed.schedules.edm(0.0), times, evodiff(), max_calls=6)
    x_T = initial_state(EDM, SHAPE)
    chex.assert_trees_all_close(run_clock(x_T, plan), clock_model(x_T, times[-2]), rtol=1e-5)
    chex.assert_tree_all_finite(run(x_T, plan)[0])


@jax.jit
def run_clock(x_T, plan):
    return ed.sample(clock_model, x_T, plan)


@pytest.mark.parametrize("last_step", ["ddim", "released"])
def test_a_run_from_alpha_0_to_sigma_0_has_finite_values_and_gradients(last_step):
    plans = [plan_of(n, evodiff(last_step=last_step), ed.grids.time_uniform, FLOW, max_calls=8) for n in (1, 2, 3, 8)]
    run = jax.jit(jax.value_and_grad(lambda x, plan: jnp.sum(ed.sample(mixture(FLOW), x, plan))))
    for plan in plans:
        chex.assert_tree_all_finite(run(initial_state(FLOW, (2, 4, 4, 2)), plan))


# -- channels, samples, trace


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_samples_of_a_batch_do_not_depend_on_each_other(channel_axis, x64):
    x_T, plan = initial_state(EDM, (4, 4, 4, 2), jnp.float64), plan_of(8, evodiff(channel_axis))
    together, _ = run(x_T, plan)
    for i in range(0, 4, 2):
        np.testing.assert_allclose(run(x_T[i : i + 2], plan)[0], together[i : i + 2], rtol=1e-9, atol=1e-11)


def test_coefficients_are_chosen_for_channels_or_for_samples(x64):
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    of_channels, of_samples = (run(x_T, plan_of(6, evodiff(axis)))[1] for axis in (-1, None))
    assert evodiff().rule.channel_axis == -1
    chex.assert_shape([of_channels.rule["zeta"], of_channels.rule["eta"]], (6, 3, 2))
    chex.assert_shape([of_samples.rule["zeta"], of_samples.rule["eta"]], (6, 3))

    def swapped(x, t):
        return jnp.moveaxis(mixture(EDM)(jnp.moveaxis(x, 1, -1), t), -1, 1)

    moved = ed.sample(swapped, jnp.moveaxis(x_T, -1, 1), plan_of(6, evodiff(1)))
    chex.assert_trees_all_close(moved, jnp.moveaxis(of_channels.states[-1], -1, 1), rtol=1e-8, atol=1e-9)

    # A vector has no channels: one choice a sample, whatever is asked for.
    def flattened(x, t):
        return mixture(EDM)(x.reshape(x_T.shape), t).reshape(x.shape)

    x, of_vectors = ed.sample_with_trace(flattened, x_T.reshape(3, -1), plan_of(6, evodiff(-1)))
    chex.assert_shape(of_vectors.rule["zeta"], (6, 3))
    chex.assert_trees_all_close(x, of_samples.states[-1].reshape(3, -1), rtol=1e-8, atol=1e-9)


def test_channels_run_as_each_alone(x64):
    """A model of each channel for itself: what is chosen for a channel is what is chosen for it as a sample."""
    model = lambda x, t: jnp.tanh(x) / (1 + t**2)
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    x = ed.sample(model, x_T, plan_of(6))
    for channel in range(2):
        alone = ed.sample(model, x_T[..., channel].reshape(3, -1), plan_of(6, evodiff(None)))
        chex.assert_trees_all_close(x[..., channel].reshape(3, -1), alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [12, 25])
def test_zeta_and_eta_are_within_the_bounds_of_their_definition(steps):
    _, trace = run(initial_state(EDM, (8, 4, 4, 2)), plan_of(steps, max_calls=MAX_CALLS))
    zeta, eta = (trace.rule[name][2:steps] for name in ("zeta", "eta"))
    assert set(trace.rule) == {"zeta", "eta"}
    assert np.all((eta >= 0.25) & (eta <= 0.5 / (1 + np.exp(-1)) + 1e-6))
    assert np.all((zeta > 0) & (zeta < 1))
    if steps <= 20:
        assert np.all(zeta >= 1 / (1 + np.exp(0.5)) - 1e-6)


def test_solvers_are_cached_so_that_nothing_recompiles():
    assert evodiff() is evodiff(-1, True, "ddim")
    assert len({evodiff(), evodiff(None), evodiff(last_step="released")}) == 3
