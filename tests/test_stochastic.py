"""Stochastic solvers: the exact mean and covariance on a Gaussian, their deterministic counterparts, their keys."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed

s = ed.solvers

STOCHASTIC = {
    "ddim(1)": s.ddim(1.0),
    "ddim(0.5)": s.ddim(0.5),
    "sde_dpm_solver_pp(1)": s.sde_dpm_solver_pp(1),
    "sde_dpm_solver_pp(2)": s.sde_dpm_solver_pp(2),
    "sde_dpm_solver_pp(2, tau=0.5)": s.sde_dpm_solver_pp(2, 0.5),
    "sa_solver()": s.sa_solver(),
    "sa_solver(3, 4, tau=0.8)": s.sa_solver(3, 4, 0.8),
    "sa_solver(tau of t)": s.sa_solver(2, 2, lambda t: 0.0 + (t > 0.1)),
    "heun(s_churn=10)": s.heun(s_churn=10.0),
    "heun(s_churn=40, s_tmin=0.05, s_tmax=10)": s.heun(s_churn=40.0, s_tmin=0.05, s_tmax=10.0),
}
stochastic = pytest.mark.parametrize("solver", list(STOCHASTIC.values()), ids=list(STOCHASTIC))

MEAN = np.array([0.7, -0.4])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])


def gaussian(schedule):
    """The posterior mean of normal data with MEAN and COVARIANCE."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        marginal = alpha**2 * COVARIANCE + sigma**2 * jnp.eye(2)
        gain = alpha * jnp.linalg.solve(marginal, jnp.asarray(COVARIANCE, x.dtype))
        return MEAN.astype(x.dtype) + (x - alpha * MEAN) @ gain

    return denoise


PROBLEMS = {"vp_linear": ed.schedules.vp_linear(), "edm": ed.schedules.edm(0.002, 40.0)}


@functools.cache
def sampler(name):
    """Compiled once for all solvers of one memory."""
    schedule, (noise_key, key) = PROBLEMS[name], jax.random.split(jax.random.key(0))
    alpha, sigma, _ = schedule.levels(np.array([schedule.t_max]))
    # Started from the true distribution at t_max, so that what is measured is the solver.
    root = np.linalg.cholesky(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    x_T = alpha * MEAN + jax.random.normal(noise_key, (50_000, 2)) @ root.T
    return jax.jit(lambda plan: ed.sample(gaussian(schedule), x_T, plan, key=key))


@stochastic
@pytest.mark.parametrize("name", PROBLEMS)
def test_mean_and_covariance_converge_to_the_exact_ones(name, solver):
    schedule = PROBLEMS[name]

    def error(steps):
        x = sampler(name)(ed.plan(schedule, ed.grids.log_snr(schedule, steps), solver, max_calls=400))
        return np.abs(np.mean(x, 0) - MEAN).max(), np.abs(np.cov(x.T) - COVARIANCE).max()

    remembers = ed.plan(schedule, ed.grids.log_snr(schedule, 2), solver).table.predictor.shape[1] > 1
    few, more, many = error(8), error(40), error(160 if remembers else 400)  # others are of first order
    # Four standard errors, of 0.0032 for the mean and the covariance, and as much for the steps.
    assert max(many) < 0.025
    assert sum(few) > sum(many)
    assert max(more) < max(0.025, 0.7 * max(few))


@stochastic
def test_the_same_key_gives_the_same_samples_and_another_gives_others(solver):
    schedule = SCHEDULES["vp_linear"]
    times = ed.grids.log_snr(schedule, 5)
    x_T = initial_state(schedule, (4, 4, 4, 2))
    sample = jax.jit(lambda key: ed.sample(mixture(schedule), x_T, ed.plan(schedule, times, solver), key=key))
    x = sample(jax.random.key(1))
    chex.assert_trees_all_equal(x, sample(jax.random.key(1)))
    assert np.max(np.abs(x - sample(jax.random.key(2)))) > 1e-3
    with pytest.raises(ValueError, match="stochastic: pass key"):
        ed.sample(mixture(schedule), x_T, ed.plan(schedule, times, solver))


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


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("solver", "counterpart"),
    [
        (s.ddim(0.0), s.euler()),
        (s.euler_ancestral(0.0), s.ddim()),
        (s.ddim(1e-12), s.ddim()),
        (s.sde_dpm_solver_pp(1, 0.0), s.ddim()),
        (s.sde_dpm_solver_pp(2, 0.0), s.dpm_solver_pp(2)),
        (s.sde_dpm_solver_pp(2, 1e-12), s.dpm_solver_pp(2)),
        (s.sa_solver(1, 0, 0.0), s.ddim()),
        (s.sa_solver(1, 0, lambda t: 0 * t), s.ddim()),
        (s.sa_solver(2, 2, 1e-12), s.sa_solver(2, 2, 0.0)),
        (s.sa_solver(3, 0, 0.0), s.dpm_solver_pp(3, exact_curvature=True)),
        (s.heun(s_churn=0.0), s.heun()),
        (s.heun(s_churn=10.0, s_tmin=1e6, s_tmax=1e7), s.heun()),
    ],
    ids=lambda solver: solver.name,
)
def test_without_noise_each_is_its_deterministic_counterpart(name, solver, counterpart, x64):
    schedule = SCHEDULES[name]
    times = ed.grids.karras(schedule, 2 if solver.name == "sa_solver" else 7)  # two steps: the same starting orders
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    x, expected = (
        ed.sample(mixture(schedule), x_T, ed.plan(schedule, times, which), key=jax.random.key(0))
        for which in (solver, counterpart)
    )
    chex.assert_trees_all_close(x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sa_solver_without_noise_is_adams_bashforth(order, x64):
    schedule = SCHEDULES["vp_linear"]
    times = ed.grids.time_uniform(schedule, 7)
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    solver = s.sa_solver(order, 0, 0.0, lower_order_final=False)
    expected = adams_by_quadrature(schedule, times, x_T, mixture(schedule), order)
    x = ed.sample(mixture(schedule), x_T, ed.plan(schedule, times, solver))
    chex.assert_trees_all_close(x, expected, rtol=1e-10, atol=1e-10)


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
