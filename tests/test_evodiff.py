"""EVODiff: its limits, its invariances and what sets the default apart from the released form."""

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
from evodiff_jax.tables import append_denoising

EDM = SCHEDULES["edm"]
BOTH = [ed.solvers.evodiff(), ed.solvers.evodiff_reference()]
both = pytest.mark.parametrize("solver", BOTH, ids=["evodiff", "evodiff_reference"])


def constant(value):
    return lambda x, t: jnp.full_like(x, value)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("steps", [1, 3, 8, 25])
def test_a_constant_model_is_integrated_exactly(schedule, grid, steps, x64):
    times = grid(schedule, steps)
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    alpha, sigma, _ = schedule.levels(times)
    denoised, trace = ed.sample_with_trace(constant(0.3), x_T, times, schedule, denoise_to_zero=True)
    np.testing.assert_array_equal(denoised, np.full_like(x_T, 0.3))
    for i in range(steps + 1):
        exact = 0.3 * alpha[i] + sigma[i] / sigma[0] * (x_T - 0.3 * alpha[0])
        np.testing.assert_allclose(trace.states[i], exact, rtol=1e-12, atol=1e-13)


@settings(deadline=None, max_examples=10)
@given(
    value=st.floats(-3, 3, width=32),
    grid=st.sampled_from(list(GRIDS.values())),
    schedule=st.sampled_from(list(SCHEDULES.values())),
)
def test_any_constant_comes_back_in_float32(value, grid, schedule):
    x_T = initial_state(schedule, (2, 4, 4, 2))
    x = ed.sample(constant(value), x_T, grid(schedule, 6), schedule)
    chex.assert_tree_all_finite(x)
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    exact = value * alpha[1] + sigma[1] / sigma[0] * (x_T - value * alpha[0])
    np.testing.assert_allclose(x, exact, rtol=1e-4, atol=2e-5)


@both
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_constant_model_has_finite_values_and_gradients(solver, grid):
    x_T = initial_state(EDM, (2, 2, 2, 2))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(x, value):
        return jnp.sum(ed.sample(lambda x, t: jnp.full_like(x, 1.0) * value, x, grid(EDM, 5), EDM, solver))

    for value in (0.0, 0.3, 1e-25, 1e15):
        chex.assert_tree_all_finite(run(x_T, jnp.float32(value)))


def test_the_released_form_does_not_return_a_constant():
    x = ed.sample(constant(0.3), initial_state(EDM, (2, 4, 4, 1)), ed.grids.log_snr(EDM, 8), EDM, BOTH[1])
    assert np.min(np.abs(x - 0.3)) > 0.02


@both
def test_a_channel_on_which_the_model_is_zero_stays_finite(solver):
    x_T = initial_state(EDM, (3, 4, 4, 2))
    times = ed.grids.log_snr(EDM, 8)

    def masked(x, t):
        return mixture(EDM)(x, t) * jnp.array([1.0, 0.0], x.dtype)

    x = ed.sample(masked, x_T, times, EDM, solver)
    chex.assert_tree_all_finite(x)
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(ed.sample(masked, x, times, EDM, solver)))(x_T))


@both
def test_channels_are_chosen_separately_by_default_and_together_on_request(solver):
    make = getattr(ed.solvers, solver.name)
    x_T = initial_state(EDM, (3, 4, 4, 2))
    times = ed.grids.log_snr(EDM, 6)

    def trace(channel_axis, x, model):
        return ed.sample_with_trace(model, x, times, EDM, make(channel_axis))[1]

    assert trace(-1, x_T, mixture(EDM)).zeta.shape == (4, 3, 2)
    assert trace(None, x_T, mixture(EDM)).zeta.shape == (4, 3)

    def swapped(x, t):
        return jnp.moveaxis(mixture(EDM)(jnp.moveaxis(x, 1, -1), t), -1, 1)

    chex.assert_trees_all_close(
        trace(1, jnp.moveaxis(x_T, -1, 1), swapped).zeta, trace(-1, x_T, mixture(EDM)).zeta, rtol=1e-3
    )
    # A vector has no channels: one choice a sample, whatever is asked for.
    flat = x_T.reshape(3, -1)

    def flattened(x, t):
        return mixture(EDM)(x.reshape(x_T.shape), t).reshape(x.shape)

    assert trace(-1, flat, flattened).zeta.shape == (4, 3)
    chex.assert_trees_all_close(
        trace(-1, flat, flattened).states[-1], trace(None, x_T, mixture(EDM)).states[-1].reshape(3, -1), atol=1e-4
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("steps", [5, 10, 25])
def test_vp_and_ve_runs_of_one_problem_agree(grid, steps, x64):
    vp = SCHEDULES["vp_linear"]
    times = grid(vp, steps)
    alpha, sigma, _ = vp.levels(times)
    kappa = sigma / alpha
    ve = ed.schedules.edm(kappa[-1], kappa[0])
    x_T = initial_state(vp, (3, 4, 4, 2), jnp.float64)
    in_vp, vp_trace = ed.sample_with_trace(mixture(vp), x_T, times, vp)
    in_ve, ve_trace = ed.sample_with_trace(mixture(ve), x_T / alpha[0], kappa, ve)
    np.testing.assert_allclose(in_vp / alpha[-1], in_ve, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(vp_trace.zeta, ve_trace.zeta, rtol=1e-7)
    np.testing.assert_allclose(vp_trace.eta, ve_trace.eta, rtol=1e-7)


def test_the_coefficients_do_not_depend_on_the_scale_of_the_data(x64):
    """Data, state and noise levels scaled alike: the same problem in other units."""
    x_T = initial_state(EDM, (3, 4, 4, 2), jnp.float64)
    centers = np.random.default_rng(3).normal(size=(5, 4, 4, 2))
    times = ed.grids.log_snr(EDM, 8)
    large = ed.schedules.edm(0.02, 800.0)
    x, trace = ed.sample_with_trace(mixture(EDM, centers, 0.1), x_T, times, EDM)
    x_large, trace_large = ed.sample_with_trace(mixture(large, 10 * centers, 1.0), 10 * x_T, 10 * times, large)
    np.testing.assert_allclose(x_large, 10 * x, rtol=1e-9)
    np.testing.assert_allclose(trace_large.zeta, trace.zeta, rtol=1e-9)


def test_the_last_step_is_safe_at_a_final_sigma_of_a_tenth_where_the_released_one_is_not(x64):
    schedule = ed.schedules.edm(0.1, 10.0)
    x_T = initial_state(schedule, (16, 4, 4, 2), jnp.float64)
    exact = ed.sample(mixture(schedule), x_T, ed.grids.log_snr(schedule, 2000), schedule, ed.solvers.ddim())
    times = ed.grids.log_snr(schedule, 10)
    errors = []
    for solver in BOTH:
        x = ed.sample(mixture(schedule), x_T, times, schedule, solver)
        # The median: a few samples between two modes end in another one than the exact trajectory.
        errors.append(float(jnp.median(jnp.sqrt(jnp.mean((x - exact) ** 2, axis=(1, 2, 3))))))
    assert errors[0] < errors[1] / 2


def test_sampling_may_end_at_sigma_zero():
    schedule = ed.schedules.edm(0.0, 80.0)
    times = np.append(ed.grids.log_snr(EDM, 6), 0.0)
    x_T = initial_state(schedule, (3, 4, 4, 2))
    for solver in BOTH:
        x = ed.sample(mixture(EDM), x_T, times, schedule, solver)
        chex.assert_tree_all_finite(x)
    # The default's last step to sigma = 0 is the model's own prediction.
    x = ed.sample(clock_model, x_T, times, schedule)
    chex.assert_trees_all_close(x, clock_model(x_T, times[-2]), rtol=1e-5)


def clock_model(x, t):
    """A data prediction that depends on the time alone, so that it is known without the probe."""
    return jnp.broadcast_to(jnp.array([0.5, -0.2], x.dtype) / (1 + t), x.shape)


def test_the_last_step_is_ddim_and_the_first_the_trapezoidal_rule(x64):
    times = ed.grids.log_snr(EDM, 6)
    x_T = initial_state(EDM, (3, 4, 4, 2), jnp.float64)
    _, trace = ed.sample_with_trace(clock_model, x_T, times, EDM)
    for i in range(6):
        step = ed.sample(clock_model, trace.states[i], times[i : i + 2], EDM, ed.solvers.ddim())
        if i == 0:
            gain = 1 - times[1] / times[0]
            step += gain / 2 * (clock_model(x_T, times[1]) - clock_model(x_T, times[0]))
        same = np.allclose(trace.states[i + 1], step, rtol=1e-10, atol=1e-12)
        assert same == (i in (0, 5))


@both
def test_zeta_and_eta_are_within_the_bounds_of_their_definition(solver):
    _, trace = ed.sample_with_trace(
        mixture(EDM), initial_state(EDM, (8, 4, 4, 2)), ed.grids.log_snr(EDM, 12), EDM, solver
    )
    assert np.all((trace.eta >= 0.25) & (trace.eta <= 0.5 / (1 + np.exp(-1)) + 1e-6))
    assert np.all((trace.zeta >= 1 / (1 + np.exp(0.5)) - 1e-6) & (trace.zeta < 1))
    assert trace.gram is not None
    assert all(entry.shape == trace.zeta.shape for entry in jax.tree.leaves(trace.gram))


@both
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_constant_rows_of_the_table_are_consistent(solver, schedule, steps):
    """Applied to x = alpha x_0 + sigma eps and outputs x_0, a row must give the same combination at the next time."""
    times = ed.grids.log_snr(schedule, steps)
    table = append_denoising(solver.table(schedule, times), times[-1])
    alpha, sigma, _ = schedule.levels(times)
    rows = steps if solver.name == "evodiff" else steps - 1  # the released last step is not consistent
    np.testing.assert_allclose(table.transition[:rows] * sigma[:rows], sigma[1 : rows + 1], rtol=1e-12)
    signal = table.transition[:rows] * alpha[:rows] + table.predictor[:rows].sum(1)
    np.testing.assert_allclose(signal, alpha[1 : rows + 1], rtol=1e-12)
    np.testing.assert_allclose(table.corrector.sum(1), 0, atol=1e-15)
    assert table.predictor[-1].tolist() == [1, 0, 0]
    assert table.transition[-1] == 0
    np.testing.assert_array_equal(table.adaptive.sum(0), [max(steps - 2, 0)] * 2)


def test_observed_order_of_convergence(x64, capsys):
    """The coefficients do not tend to those of a second-order method: both forms converge with about order 1."""
    schedule = ed.schedules.edm(0.3, 10.0)
    centers = np.random.default_rng(5).normal(size=(4, 6))
    denoise = mixture(schedule, centers, 0.5)
    x_T = initial_state(schedule, (16, 6), jnp.float64)

    def run(solver, steps):
        return ed.sample(denoise, x_T, ed.grids.log_snr(schedule, steps), schedule, solver)

    exact = 2 * run(ed.solvers.ddim(), 8000) - run(ed.solvers.ddim(), 4000)  # Richardson extrapolation
    steps = np.array([40, 80, 160, 320])
    orders = {}
    for solver in (ed.solvers.evodiff(), ed.solvers.ddim()):
        errors = [float(jnp.sqrt(jnp.mean((run(solver, n) - exact) ** 2))) for n in steps]
        orders[solver.name] = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    with capsys.disabled():
        print(f"\nobserved order: {', '.join(f'{name} {order:.2f}' for name, order in orders.items())}")
    assert abs(orders["ddim"] - 1) < 0.1
    assert 0.75 < orders["evodiff"] < 1.25


def test_solvers_are_cached_so_that_a_static_solver_argument_does_not_recompile():
    assert ed.solvers.evodiff() is ed.solvers.evodiff()
    assert ed.solvers.evodiff() != ed.solvers.evodiff(channel_axis=None)
