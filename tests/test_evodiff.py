"""EVODiff as published: its first and last steps, its coefficients and their bounds.

`test_golden` compares it with the authors' release, `test_rules` has what holds of both rules.
"""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state
from rule_programs import EDM, FLOW, MAX_CALLS, SHAPE, median_error, plan_of, run

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import ddim, evodiff

# -- the first steps and the last one


@pytest.mark.parametrize("schedule", [EDM, SCHEDULES["vp_linear"], FLOW], ids=["edm", "vp_linear", "flow"])
def test_a_run_of_two_steps_is_ddim(schedule, x64):
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    plans = (plan_of(2, solver, ed.grids.time_uniform, schedule) for solver in (evodiff(), ddim()))
    x, expected = (run("smooth", x_T, plan)[0] for plan in plans)
    np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12)


def test_the_first_step_is_ddim_and_is_not_corrected(x64):
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    times = ed.grids.karras(EDM, 6)
    plan = ed.plan(EDM, times, evodiff(), max_calls=MAX_CALLS)
    _, trace = run("mixture", x_T, plan)
    expected, _ = run("mixture", x_T, ed.plan(EDM, times[:2], ddim(), max_calls=MAX_CALLS))
    chex.assert_trees_all_close(trace.states[1], expected, rtol=1e-12)
    m, _ = run("mixture", x_T, ed.plan(EDM, times[:2], ddim(), max_calls=MAX_CALLS, denoise_to_zero=True))
    assert np.abs(m - expected).max() > 0.1
    now = ed.init(x_T, plan)
    m_0 = x_T + (expected - x_T) / (1 - times[1] / times[0])  # of the step by DDIM
    chex.assert_trees_all_close(ed.update(now, m_0, plan).x, expected, rtol=1e-12)


def test_the_last_step_is_safe_at_a_final_sigma_of_a_tenth_where_the_released_one_is_not(x64):
    schedule = ed.schedules.edm(0.1, 10.0)
    states = [initial_state(schedule, SHAPE, jnp.float64, seed=seed) for seed in range(5)]
    fine = plan_of(2000, ddim(), schedule=schedule, max_calls=2000)

    def errors(solver):
        plan = plan_of(10, solver, schedule=schedule)
        return np.median([median_error(run("mixture", x_T, plan)[0], x) for x_T, x in zip(states, exact, strict=True)])

    exact = [run("mixture", x_T, fine)[0] for x_T in states]
    assert errors(evodiff()) < errors(evodiff(last_step="released")) / 2


def test_an_unknown_last_step():
    with pytest.raises(ValueError, match="last_step to be one of 'ddim', 'released', got 'euler'"):
        evodiff(last_step="euler")


# -- constant models


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), ed.schedules.flow()], ids=[*SCHEDULES, "flow"])
def test_a_constant_comes_back_as_far_as_the_balanced_differences_vanish(schedule, x64):
    """rho = 1 in m_0 - rho m_1 for equal steps of log sigma; elsewhere what is left of a constant is small."""
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    for name, grid in GRIDS.items():
        for steps in (1, 3, 8, 25):
            alpha, sigma, _ = schedule.levels(grid(schedule, steps))
            x, _ = run("constant", x_T, plan_of(steps, evodiff(), grid, schedule))
            exact = 0.3 * alpha[-1] + sigma[-1] / sigma[0] * (x_T - 0.3 * alpha[0])
            equal = schedule is EDM and name in ("log_snr", "exponential", "polyexponential")
            np.testing.assert_allclose(x, exact, rtol=1e-12 if equal else 0.02, atol=1e-13, err_msg=name)


def test_the_released_last_step_does_not_return_a_constant(x64):
    x, _ = run("constant", initial_state(EDM, SHAPE, jnp.float64), plan_of(8, evodiff(last_step="released")))
    assert np.min(np.abs(x - 0.3)) > 0.02


# -- trace


@pytest.mark.parametrize("steps", [12, 25])
def test_zeta_and_eta_are_within_the_bounds_of_their_definition(steps, x64):
    for seed in range(3):
        _, trace = run("mixture", initial_state(EDM, SHAPE, jnp.float64, seed=seed), plan_of(steps, evodiff()))
        zeta, eta = (trace.rule[name][2:steps] for name in ("zeta", "eta"))
        assert set(trace.rule) == {"zeta", "eta"}
        assert np.all((eta >= 0.25) & (eta <= 0.5 / (1 + np.exp(-1)) + 1e-12))
        assert np.all((zeta > 0) & (zeta < 1))
        if steps <= 20:
            assert np.all(zeta >= 1 / (1 + np.exp(0.5)) - 1e-12)


def test_the_form_of_zeta_changes_above_twenty_steps_as_in_the_release():
    for steps, few in ((19, 1), (20, 1), (21, 0)):
        data = evodiff().table(EDM, ed.grids.log_snr(EDM, steps)).data
        np.testing.assert_array_equal(data.corrected.few_steps, few)
        np.testing.assert_array_equal(data.predicted.few_steps, few)
