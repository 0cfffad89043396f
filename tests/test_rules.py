"""What holds of both adaptive rules: hard models, ends of schedules, channels, samples that do not depend on others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import initial_state
from rule_programs import EDM, FLOW, SHAPE, plan_of, run

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import ddim, evodiff, variance_optimal
from evodiff_jax.testing import _runs, check_rule
from evodiff_jax.testing._solver import padded

RULES = {"evodiff": evodiff, "variance_optimal": variance_optimal}
CHANNELS = {"evodiff": -1, "variance_optimal": None}  # by default
rules = pytest.mark.parametrize("name", RULES)
# Each rule with the channel axis of its default, and the others, which compile another program.
axes = pytest.mark.parametrize(
    ("name", "axis"),
    [
        *CHANNELS.items(),
        pytest.param("variance_optimal", -1, marks=pytest.mark.slow),
        pytest.param("evodiff", None, marks=pytest.mark.slow),
    ],
)


# -- constant models


@rules
def test_denoising_to_zero_gives_a_constant_back_exactly(name, x64):
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    for grid in GRIDS.values():
        for steps in (1, 3, 8, 25):
            plan = plan_of(steps, RULES[name](), grid, denoise_to_zero=True)
            np.testing.assert_array_equal(run("constant", x_T, plan)[0], np.full_like(x_T, 0.3))


# -- hard models, and gradients


@axes
def test_rules_pass(name, axis):
    """Finite values and gradients on hard models, from alpha = 0 to sigma = 0 too; a choice for each sample."""
    report = check_rule(RULES[name](axis))
    assert report.constant_error < {"evodiff": 0.01, "variance_optimal": 1e-5}[name]


@rules
def test_gradients_are_those_of_finite_differences(name):
    """In the program of `check_rule`; `test_sampling` has it in float64."""
    schedule, step = ed.schedules.edm(0.05, 10.0), 0.01
    x_T, plan = initial_state(EDM, _runs.SHAPE), ed.plan(schedule, ed.grids.log_snr(schedule, 5), RULES[name]())
    program = lambda size, x: _runs.run_and_gradients(_runs.Model(size, 0.0), x, padded(plan), _runs.keys())
    _, (of_model, of_x) = program(1.5, x_T)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=_runs.SHAPE), jnp.float32)
    up, down = (program(1.5 + s, x_T + s * direction)[0].sum() for s in (step, -step))
    found = float(jnp.vdot(of_x, direction) + of_model.size)
    assert found == pytest.approx(float(up - down) / (2 * step), rel=1e-3)


@pytest.mark.parametrize(("name", "axis"), [("evodiff", -1), ("evodiff", None), ("variance_optimal", None)])
def test_bfloat16_runs_are_finite(name, axis):
    x_T = initial_state(EDM, SHAPE, jnp.bfloat16)
    for steps in (10, 25):
        x, _ = run("mixture", x_T, plan_of(steps, RULES[name](axis)))
        assert x.dtype == jnp.bfloat16
        chex.assert_tree_all_finite(x)
        assert np.max(np.abs(x)) < 10


# -- ends of schedules


@pytest.mark.fast
@rules
def test_a_last_step_to_sigma_0_returns_the_models_own_prediction(name):
    x_T, schedule = initial_state(EDM, SHAPE), ed.schedules.edm(0.0)
    for steps in (1, 2, 3, 6):
        times = np.append(ed.grids.log_snr(EDM, steps)[:-1], 0.0)
        plan = plan_of(steps, RULES[name](), lambda schedule, steps, times=times: times, schedule)
        np.testing.assert_allclose(run("clock", x_T, plan)[0], 0.5 / (1 + times[-2]), rtol=1e-5)
        chex.assert_tree_all_finite(run("mixture", x_T, plan))


@pytest.mark.parametrize("schedule", [EDM, ed.schedules.vp_linear(), FLOW], ids=["edm", "vp_linear", "flow"])
def test_a_run_of_one_step_is_ddim(schedule, x64):
    x_T = initial_state(schedule, SHAPE, jnp.float64)
    plans = [plan_of(1, make(), ed.grids.time_uniform, schedule) for make in (ddim, *RULES.values())]
    expected, *found = (run("smooth", x_T, plan)[0] for plan in plans)
    for x in found:
        np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12)


# -- samples and channels


@pytest.mark.fast
@rules
def test_samples_of_a_batch_do_not_depend_on_each_other(name, x64):
    """The others are other samples, in another order."""
    plan = plan_of(8, RULES[name]())
    x_T, others = (initial_state(EDM, SHAPE, jnp.float64, seed=seed) for seed in (0, 1))
    whole, trace = run("mixture", x_T, plan)
    for i in range(3):
        x, other_trace = run("mixture", jnp.roll(others.at[i].set(x_T[i]), 1, axis=0), plan)
        np.testing.assert_allclose(x[(i + 1) % 3], whole[i], rtol=1e-12)
        for ours, theirs in zip(jax.tree.leaves(trace.rule), jax.tree.leaves(other_trace.rule), strict=True):
            np.testing.assert_allclose(theirs[:, (i + 1) % 3], ours[:, i], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@rules
def test_coefficients_are_chosen_for_channels_or_for_samples(name, x64):
    rule, x_T = RULES[name], initial_state(EDM, SHAPE, jnp.float64)
    assert rule().rule.channel_axis == CHANNELS[name]
    of_channels, of_samples = (run("smooth", x_T, plan_of(6, rule(axis)))[1] for axis in (-1, None))
    for leaf in jax.tree.leaves(of_channels.rule):
        chex.assert_shape(leaf, (26, 3, 2, ...))
    for leaf in jax.tree.leaves(of_samples.rule):
        assert leaf.shape[:2] == (26, 3)
    leaves = zip(jax.tree.leaves(of_channels.rule), jax.tree.leaves(of_samples.rule), strict=True)
    assert all(theirs.ndim == ours.ndim - 1 for ours, theirs in leaves)
    assert np.abs(of_channels.states[6] - of_samples.states[6]).max() > 1e-6
    # A model of each channel for itself: what is chosen for a channel is what is chosen for it as a sample, a vector.
    channels = jnp.moveaxis(x_T, -1, 0).reshape(6, 16)
    alone = run("smooth", channels, plan_of(6, rule(None)))[0].reshape(2, 3, 4, 4)
    np.testing.assert_allclose(jnp.moveaxis(of_channels.states[6], -1, 0), alone, rtol=1e-9, atol=1e-11)
    moved = run("smooth", jnp.moveaxis(x_T, -1, 1), plan_of(6, rule(1)))[0]
    np.testing.assert_allclose(moved, jnp.moveaxis(of_channels.states[6], -1, 1), rtol=1e-9, atol=1e-11)
    # A vector has no channels: one choice a sample, whatever is asked for.
    of_vectors = run("smooth", x_T.reshape(3, -1), plan_of(6, rule(-1)))[0]
    np.testing.assert_allclose(of_vectors, of_samples.states[6].reshape(3, -1), rtol=1e-9, atol=1e-11)


# -- traced times


@pytest.mark.slow
@rules
def test_traced_times_give_the_samples_of_concrete_ones(name, x64):
    """From alpha = 0 and to sigma = 0 too, and in one step."""
    cases = [
        (EDM, ed.grids.karras(EDM, 4)),
        (ed.schedules.edm(0.0), [80.0, 5.0, 0.5, 0.0]),
        (FLOW, [1.0, 0.6, 0.0]),
        (FLOW, [1.0, 0.0]),
    ]
    for schedule, times in cases:
        x_T, times = initial_state(schedule, SHAPE, jnp.float64), np.asarray(times, np.float64)
        make = lambda times, schedule=schedule: ed.plan(schedule, times, RULES[name](), max_calls=26)
        x, expected = (run("smooth", x_T, plan)[0] for plan in (jax.jit(make)(times), make(times)))
        np.testing.assert_allclose(x, expected, rtol=1e-8, atol=1e-9)


@rules
def test_solvers_are_cached_so_that_nothing_recompiles(name):
    rule = RULES[name]
    assert rule() is rule(CHANNELS[name], True)
    assert len({rule(-1), rule(None), rule(1)}) == 3
    assert len({evodiff(), evodiff(last_step="released")}) == 2
