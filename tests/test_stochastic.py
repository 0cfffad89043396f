"""Stochastic solvers beside what `check_solver` checks: their noise, deterministic counterparts, churn and tau."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture
from test_solvers import STOCHASTIC

import evodiff_jax as ed
from evodiff_jax.testing import gaussian, moments

pytestmark = pytest.mark.fast

s = ed.solvers

PROBLEMS = {"vp_linear": ed.schedules.vp_linear(), "edm": ed.schedules.edm(0.002, 40.0)}

MEAN, STD = np.array([0.7, -0.4]), np.array([0.9, 0.3])


def test_samples_have_the_mean_and_deviation_of_their_table():
    """The noise of the rows is standard normal, of each row anew, and in the table's strength."""
    schedule, (noise_key, key) = PROBLEMS["vp_linear"], jax.random.split(jax.random.key(0))
    model, times = gaussian(schedule, MEAN, STD), ed.grids.log_snr(schedule, 5)
    x_0 = MEAN + STD * np.random.default_rng(0).standard_normal((50_000, 2))
    x_T = schedule.add_noise(jnp.asarray(x_0, jnp.float32), schedule.t_max, noise_key)
    plans = [ed.plan(schedule, times, solver) for solver, _ in STOCHASTIC.values()]
    together = jax.jit(jax.vmap(lambda plan: ed.sample(model.denoise, x_T, plan, key=key)))(ed.stack(plans))
    for name, plan, x in zip(STOCHASTIC, plans, together, strict=True):
        mean, std = moments(plan, schedule, MEAN, STD)  # four standard errors
        np.testing.assert_allclose((np.mean(x, 0) - mean) / std, 0, atol=4 * 0.0045, err_msg=name)
        np.testing.assert_allclose(np.std(x, 0) / std, 1, atol=4 * 0.0032, err_msg=name)


# Correlated normal data are independent along the axes of their covariance, and so is what linear solvers make of them.
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
VARIANCES, AXES = np.linalg.eigh(COVARIANCE)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_mean_and_covariance_converge_to_the_exact_ones(problem, name):
    """At sharper bounds than those of `check_solver`, on both schedules."""
    schedule, (solver, order) = PROBLEMS[problem], STOCHASTIC[name]
    alpha, sigma, _ = schedule.levels(schedule.t_min)
    errors = []
    for steps in (160, 320, 640):
        plan = ed.plan(schedule, ed.grids.log_snr(schedule, steps), solver)
        mean, std = moments(plan, schedule, MEAN @ AXES, np.sqrt(VARIANCES))
        np.testing.assert_allclose(AXES @ mean, alpha * MEAN, rtol=1e-11)  # a state at the mean stays there
        off = std**2 - (alpha**2 * VARIANCES + sigma**2)
        errors.append(np.abs(AXES * off @ AXES.T).max())
    observed = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(observed, order, atol=0.5 if order == 2.5 else 0.11)
    assert errors[-1] < {1: 0.008, 2: 3e-4}.get(order, 4e-6)


def test_stochastic_solvers_need_a_key():
    x_T, times = initial_state(SCHEDULES["vp_linear"], (4, 2)), ed.grids.log_snr(SCHEDULES["vp_linear"], 5)
    for solver, _ in STOCHASTIC.values():
        plan = ed.plan(SCHEDULES["vp_linear"], times, solver)
        with pytest.raises(ValueError, match="stochastic: pass key"):
            jax.eval_shape(lambda plan=plan: ed.sample(jnp.tanh, x_T, plan))


def adams_by_quadrature(schedule, times, x, denoise, memory):
    """Adams-Bashforth for the data prediction in lambda, its integrals by Gauss-Legendre, orders rising only."""
    _, sigma, lambda_ = schedule.levels(times)
    points, gauss = np.polynomial.legendre.leggauss(40)
    known = []
    for i in range(len(times) - 1):
        known.insert(0, (lambda_[i], denoise(x, times[i])))
        used = known[:memory]
        h = lambda_[i + 1] - lambda_[i]
        at = lambda_[i] + h * (points + 1) / 2
        x = sigma[i + 1] / sigma[i] * x
        for j, (node, m) in enumerate(used):
            others = [other for k, (other, _) in enumerate(used) if k != j]
            basis = np.prod([(at - other) / (node - other) for other in others], axis=0) * np.ones_like(at)
            x = x + sigma[i + 1] * m * np.sum(gauss * np.exp(at) * basis) * h / 2
    return x


COUNTERPARTS = [
    (s.ddim(0.0), s.euler()),
    (s.euler_ancestral(0.0), s.ddim()),
    (s.ddim(1e-12), s.ddim()),
    (s.sde_dpm_solver_pp(1, 0.0), s.ddim()),
    (s.sde_dpm_solver_pp(2, 0.0), s.dpm_solver_pp(2)),
    (s.sde_dpm_solver_pp(2, 1e-12), s.dpm_solver_pp(2)),
    (s.sde_dpm_solver_pp(3, 0.0, variant="heun"), s.dpm_solver_pp(3, variant="heun")),
    (s.sa_solver(1, 0, 0.0), s.ddim()),
    (s.sa_solver(1, 0, lambda t: 0 * t), s.ddim()),
    (s.sa_solver(2, 2, 1e-12), s.sa_solver(2, 2, 0.0)),
    (s.sa_solver(3, 0, 0.0), s.dpm_solver_pp(3, exact_curvature=True)),
    (s.heun(s_churn=0.0), s.heun()),
    (s.heun(s_churn=10.0, s_tmin=1e6, s_tmax=1e7), s.heun()),
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_noise_each_is_its_deterministic_counterpart(name, x64):
    """All of them in one program."""
    schedule, plans = SCHEDULES[name], []
    for pair in COUNTERPARTS:
        steps = 2 if pair[0].name == "sa_solver" else 7  # two steps: the same starting orders
        plans += [ed.plan(schedule, ed.grids.karras(schedule, steps), solver) for solver in pair]
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    run = jax.jit(jax.vmap(lambda plan: ed.sample(mixture(schedule), x_T, plan, key=jax.random.key(0))))
    x = run(ed.stack(plans))
    for (solver, _), own, expected in zip(COUNTERPARTS, x[::2], x[1::2], strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-10, atol=1e-10, err_msg=solver.name)


def test_sa_solver_without_noise_is_adams_bashforth(x64):
    schedule, orders = SCHEDULES["vp_linear"], (1, 2, 3, 4)
    times = ed.grids.time_uniform(schedule, 7)
    x_T, denoise = initial_state(schedule, (3, 4, 4, 2), jnp.float64), jax.jit(mixture(schedule))
    plans = [ed.plan(schedule, times, s.sa_solver(order, 0, 0.0, lower_order_final=False)) for order in orders]
    together = jax.jit(jax.vmap(lambda plan: ed.sample(denoise, x_T, plan)))(ed.stack(plans))
    for order, x in zip(orders, together, strict=True):
        expected = adams_by_quadrature(schedule, times, x_T, denoise, order)
        np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-10, err_msg=str(order))


def test_churn_stays_below_the_first_level_and_inside_its_range(x64):
    schedule = SCHEDULES["edm"]
    times = ed.grids.log_snr(schedule, 40)
    table = s.heun(s_churn=100.0, s_tmin=0.05, s_tmax=50.0).table(schedule, times)
    starts = table.time[::2]
    assert starts.max() == times[0]
    inside = (times[:-1] >= 0.05) & (times[:-1] <= 50.0)
    np.testing.assert_allclose(starts[~inside], times[:-1][~inside])
    raised = np.minimum(times[:-1] * np.sqrt(2), times[0])
    np.testing.assert_allclose(starts[inside], raised[inside])
    np.testing.assert_allclose(table.noise[1::2][:-1], np.sqrt(starts**2 - times[:-1] ** 2)[1:], atol=1e-12)
    np.testing.assert_allclose(table.noise[::2], 0)


def test_churn_raises_the_level_by_its_share_of_a_step(x64):
    """By s_churn / N of N steps, and never above the first level of the run."""
    schedule = SCHEDULES["edm"]
    times = ed.grids.log_snr(schedule, 40)
    starts = s.heun(s_churn=10.0).table(schedule, times).time[::2]
    np.testing.assert_allclose(starts, np.minimum(1.25 * times[:-1], times[0]), rtol=1e-12)


def test_churn_is_in_the_range_of_levels_with_its_ends_and_its_noise_is_scaled():
    """At s_tmin and at s_tmax there is churn; s_noise multiplies the noise and moves no level."""
    schedule, times = SCHEDULES["edm"], np.array([80.0, 2.0, 1.0, 0.5, 0.1])
    for low, high, churned in ((1.0, 1.0, [2]), (1.0, 10.0, [1, 2]), (0.5, 1.0, [2, 3])):
        starts = s.heun(s_churn=1.0, s_tmin=low, s_tmax=high).table(schedule, times).time[::2]
        raised = np.where(np.isin(np.arange(4), churned), 1.25, 1.0)
        np.testing.assert_allclose(starts, raised * times[:-1], rtol=1e-12)
    plain, scaled = (s.heun(s_churn=1.0, s_noise=noise).table(schedule, times) for noise in (1.0, 1.2))
    np.testing.assert_allclose(scaled.noise, 1.2 * plain.noise)
    assert plain.noise.max() > 0
    chex.assert_trees_all_equal(scaled._replace(noise=None), plain._replace(noise=None))


def test_sa_solver_takes_tau_at_the_ends_of_steps():
    schedule, times = PROBLEMS["vp_linear"], np.array([1.0, 0.6, 0.4, 0.2, 0.05])
    noise = s.sa_solver(2, 2, lambda t: 0.0 + (t > 0.3)).table(schedule, times).noise
    assert (noise[:2] > 0).all()
    np.testing.assert_array_equal(noise[2:], 0)


@pytest.mark.parametrize("orders", [(1, 2), (2, 2), (2, 3), (3, 4)])
def test_sa_solver_corrects_its_first_step_with_the_outputs_at_both_ends(orders, x64):
    """A data prediction that is linear in lambda is then integrated exactly."""
    schedule, x_T = PROBLEMS["edm"], jnp.ones((1, 1))
    times = ed.grids.log_snr(schedule, 4)
    _, sigma, lambda_ = schedule.levels(times[:2])
    denoise = lambda x, t: jnp.full_like(x, schedule.lambda_(t))
    plan = ed.plan(schedule, times, s.sa_solver(*orders, 0.0))
    _, trace = ed.sample_with_trace(denoise, x_T, plan)
    start, end = (lambda_ - 1) * np.exp(lambda_)  # the integral of lambda e^lambda
    np.testing.assert_allclose(trace.states[1], sigma[1] / sigma[0] + sigma[1] * (end - start), rtol=1e-12)
