"""Plans: runs as data, one compiled program for many of them, and solvers stacked side by side."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state

import evodiff_jax as ed
from evodiff_jax.solvers import SOLVERS

EDM = SCHEDULES["edm"]
SHAPE = (3, 4, 4, 2)
MAX_CALLS = 64  # enough for 20 steps of a solver with three calls a step
KEY = jax.random.key(3)
EVERY = {name: make() for name, make in SOLVERS.items()} | {
    "ancestral": ed.solvers.ddim(eta=1.0),
    "churned heun": ed.solvers.heun(s_churn=10.0),
    "sa_solver": ed.solvers.sa_solver(),
    "dpm_solver_pp 3S": ed.solvers.dpm_solver_pp(3, "singlestep"),
}
solvers = pytest.mark.parametrize("solver", list(EVERY.values()), ids=list(EVERY))


def denoise(x, t):
    """Smooth, not linear, and quick to compile."""
    t = jnp.asarray(t, x.dtype)
    return (x + t * jnp.tanh(x)) / (1 + t**2)


def sample(x_T, times, solver, denoise_to_zero=False):
    return jax.jit(lambda x: ed.sample(denoise, x, times, EDM, solver, denoise_to_zero, KEY))(x_T)


@jax.jit
def run(x_T, plan):
    return ed.sample_plan(denoise, x_T, plan, KEY)


@jax.jit
def run_together(x_T, stacked):
    return jax.vmap(lambda plan: ed.sample_plan(denoise, x_T, plan, KEY))(stacked)


def stack_trees(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@solvers
def test_a_plan_runs_as_sample_does(solver, x64):
    times = ed.grids.karras(EDM, 6)
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    for denoise_to_zero, max_calls in ((False, None), (True, 20)):
        x = run(x_T, ed.plan(EDM, times, solver, denoise_to_zero, max_calls))
        expected = sample(x_T, times, solver, denoise_to_zero)
        chex.assert_trees_all_close(x, expected, rtol=1e-12, atol=1e-13)


@solvers
def test_one_compilation_for_all_numbers_of_steps(solver):
    traces = []

    def network(x, t):
        traces.append(t)
        return denoise(x, t)

    run = jax.jit(lambda x_T, plan: ed.sample_plan(network, x_T, plan, KEY))
    x_T = initial_state(EDM, SHAPE)
    for steps in (5, 8, 10, 20):
        times = ed.grids.log_snr(EDM, steps)
        x = run(x_T, ed.plan(EDM, times, solver, denoise_to_zero=steps == 8, max_calls=MAX_CALLS))
        if steps == 8:
            chex.assert_trees_all_close(x, sample(x_T, times, solver, True), rtol=2e-5, atol=2e-5)
        chex.assert_tree_all_finite(x)
    assert run._cache_size() == 1
    assert len(traces) == 1


def test_linear_solvers_of_one_memory_share_a_compilation():
    run = jax.jit(lambda x_T, plan: ed.sample_plan(denoise, x_T, plan))
    x_T = initial_state(EDM, SHAPE)
    times = ed.grids.log_snr(EDM, 6)
    for solver in (ed.solvers.dpm_solver_pp(2), ed.solvers.dpm_solver_pp(2, "singlestep")):
        x = run(x_T, ed.plan(EDM, times, solver, max_calls=12))
        chex.assert_trees_all_close(x, sample(x_T, times, solver), rtol=2e-5, atol=2e-5)
    assert run._cache_size() == 1


@pytest.mark.parametrize("together", [False, True])
def test_the_network_stands_once_in_the_program(together):
    traces = []
    weights = jnp.ones((2, 5))

    def network(x, t):
        traces.append(t)
        return 0 * jnp.sin(x @ weights @ weights.T)

    plans = [ed.plan(EDM, ed.grids.log_snr(EDM, 6), solver) for solver in EVERY.values()]
    if together:
        plans = [ed.plans.stack([plan for plan in plans if plan.rule is None])]
    for plan in plans:
        traces.clear()
        run = functools.partial(ed.sample_plan, network, jnp.ones(SHAPE), key=KEY)
        lowered = jax.jit(jax.vmap(run) if together else run).lower(plan)
        assert len(traces) == 1
        assert lowered.as_text().count("stablehlo.sine") == 1


@solvers
def test_the_model_is_called_as_often_as_the_plan_says_at_its_times(solver):
    called = []

    def counting(x, t):
        jax.debug.callback(lambda t: called.append(t), t, ordered=True)
        return denoise(x, t)

    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 5), solver, denoise_to_zero=True, max_calls=20)
    ed.sample_plan(counting, initial_state(EDM, (2, 3), jnp.bfloat16), plan, KEY).block_until_ready()
    jax.effects_barrier()
    assert called[0].dtype == np.float32
    np.testing.assert_allclose(called, plan.table.time[: plan.calls], rtol=1e-6)


@solvers
def test_a_bfloat16_state_stays_one(solver, strict_promotion):
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 5), solver, max_calls=20)
    x = ed.sample_plan(denoise, initial_state(EDM, (2, 3), jnp.bfloat16), plan, KEY)
    chex.assert_type(x, jnp.bfloat16)
    chex.assert_shape(x, (2, 3))
    chex.assert_tree_all_finite(x)


@solvers
def test_spare_rows_are_never_read(solver, x64):
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 5), solver, max_calls=20)
    spare = np.arange(20) >= plan.calls
    assert spare.any()

    def without_values(column):
        return np.where(spare.reshape(-1, *(1,) * (column.ndim - 1)), np.nan, column)

    poisoned = dataclasses.replace(plan, table=jax.tree.map(without_values, plan.table))
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    chex.assert_trees_all_equal(run(x_T, poisoned), run(x_T, plan))


def test_spare_rows_change_nothing_beside_a_longer_run(x64):
    short = ed.plan(EDM, ed.grids.log_snr(EDM, 3), ed.solvers.unipc(2), max_calls=9)
    long = ed.plan(EDM, ed.grids.log_snr(EDM, 9), ed.solvers.unipc(2))
    poisoned = jax.tree.map(np.copy, short.table)
    for column in jax.tree.leaves(poisoned):
        column[3:] = np.nan
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    plans = [dataclasses.replace(short, table=poisoned), long]
    for plan, x in zip((short, long), run_together(x_T, ed.plans.stack(plans)), strict=True):
        chex.assert_trees_all_close(x, run(x_T, plan), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "solver",
    [*EVERY.values(), ed.solvers.heun(lower_order_final=True), ed.solvers.dpm_solver(3, "singlestep")],
    ids=[*EVERY, "heun_lower_order_final", "dpm_solver_singlestep"],
)
def test_plans_of_one_solver_have_the_same_shapes_and_lie_on_the_host(solver):
    def make(steps):
        return ed.plan(EDM, ed.grids.karras(EDM, steps), solver, denoise_to_zero=steps == 2, max_calls=MAX_CALLS)

    plans = [make(steps) for steps in (1, 2, 3, 15)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*plans)
    chex.assert_trees_all_equal_structs(*plans)
    inside = []
    jax.jit(lambda x: inside.append(make(3)) or x)(0.0)
    chex.assert_trees_all_equal(inside[0], plans[2])
    for column in jax.tree.leaves(inside[0].table):
        assert isinstance(column, np.ndarray)
        assert column.dtype == np.float64
        assert column.shape[0] == MAX_CALLS


@solvers
def test_vmap_over_plans_of_different_times_equals_a_loop(solver, x64):
    grids = [ed.grids.log_snr(EDM, 6), ed.grids.karras(EDM, 6), ed.grids.time_quadratic(EDM, 6)]
    plans = [ed.plan(EDM, times, solver) for times in grids]
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    for plan, x in zip(plans, run_together(x_T, stack_trees(plans)), strict=True):
        chex.assert_trees_all_close(x, run(x_T, plan), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [ed.solvers.evodiff(), ed.solvers.unipc(), ed.solvers.heun()], ids=lambda s: s.name)
def test_plans_can_be_made_of_traced_times(solver, x64):
    grids = np.stack([ed.grids.log_snr(EDM, 6), ed.grids.karras(EDM, 6)])
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    together = jax.jit(jax.vmap(lambda t: ed.sample_plan(denoise, x_T, ed.plan(EDM, t, solver, max_calls=15))))(grids)
    for times, x in zip(grids, together, strict=True):
        chex.assert_trees_all_close(x, run(x_T, ed.plan(EDM, times, solver)), rtol=1e-10, atol=1e-12)


def test_stacked_solvers_run_as_each_does_alone(x64):
    times = ed.grids.log_snr(EDM, 8)
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    stacked = (ed.solvers.ddim(), ed.solvers.dpm_solver_pp(2), ed.solvers.unipc(2))
    run = jax.jit(jax.vmap(lambda plan: ed.sample_plan(denoise, x_T, plan)))
    together = run(ed.plans.stack([ed.plan(EDM, times, solver) for solver in stacked]))
    chex.assert_shape(together, (3, *SHAPE))
    for solver, x in zip(stacked, together, strict=True):
        chex.assert_trees_all_close(x, sample(x_T, times, solver), rtol=1e-12, atol=1e-13)
    other = [ed.plan(EDM, ed.grids.karras(EDM, 8), solver) for solver in stacked]
    assert np.abs(run(ed.plans.stack(other)) - together).max() > 1e-3
    assert run._cache_size() == 1


def test_stacked_plans_may_differ_in_length_memory_history_and_noise(x64):
    # solver, steps, denoise_to_zero, max_calls
    runs = [
        (ed.solvers.ddim(), 3, True, None),
        (ed.solvers.dpm_solver(2), 9, False, None),  # remembers noise predictions
        (ed.solvers.unipc(3), 5, True, 8),
        (ed.solvers.heun(), 3, False, None),
        (ed.solvers.ddim(eta=1.0), 6, True, None),
        (ed.solvers.sa_solver(), 4, False, 10),
    ]
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    plans, separate = [], []
    for solver, steps, denoise_to_zero, max_calls in runs:
        times = ed.grids.karras(EDM, steps)
        plans.append(ed.plan(EDM, times, solver, denoise_to_zero, max_calls))
        separate.append(sample(x_T, times, solver, denoise_to_zero))
    stacked = ed.plans.stack(plans)
    np.testing.assert_array_equal(stacked.calls, [4, 9, 6, 6, 7, 4])
    for x, expected in zip(run_together(x_T, stacked), separate, strict=True):
        chex.assert_trees_all_close(x, expected, rtol=1e-12, atol=1e-13)


def test_a_stack_of_one_is_that_plan():
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 4), ed.solvers.unipc(), max_calls=7)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], ed.plans.stack([plan])), plan)


def test_plans_of_traced_times_can_be_stacked(x64):
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    stacked = (ed.solvers.ddim(), ed.solvers.dpm_solver(2))

    @jax.jit
    def together(times):
        plans = ed.plans.stack([ed.plan(EDM, times, solver) for solver in stacked])
        return jax.vmap(lambda plan: ed.sample_plan(denoise, x_T, plan))(plans)

    times = ed.grids.karras(EDM, 5)
    for solver, x in zip(stacked, together(times), strict=True):
        chex.assert_trees_all_close(x, run(x_T, ed.plan(EDM, times, solver)), rtol=1e-10, atol=1e-12)


def test_forward_derivatives_are_those_of_sample(x64):
    times = ed.grids.log_snr(EDM, 5)
    plan = ed.plan(EDM, times, max_calls=8)
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE))
    derivatives = jax.jvp(lambda x: run(x, plan), (x_T,), (direction,))
    expected = jax.jvp(lambda x: ed.sample(denoise, x, times, EDM), (x_T,), (direction,))
    chex.assert_trees_all_close(derivatives, expected, rtol=1e-9, atol=1e-12)


TIMES = ed.grids.log_snr(EDM, 4)
X = np.ones((2, 3), np.float32)
PLAN = ed.plan(EDM, TIMES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_calls": 3}, ValueError, "evodiff takes 4 model calls for these times, max_calls is 3"),
        ({"max_calls": 4, "denoise_to_zero": True}, ValueError, "takes 5 model calls"),
        ({"max_calls": 7, "solver": ed.solvers.heun()}, ValueError, "heun takes 8 model calls"),
        ({"times": TIMES[:1]}, ValueError, "N \\+ 1 >= 2 times"),
        ({"times": TIMES[None]}, ValueError, "in one dimension"),
        ({"times": 4}, ValueError, "in one dimension, got shape \\(\\)"),
        ({"times": TIMES[::-1]}, ValueError, "strictly decreasing.*times\\[0\\] = 0.002"),
        ({"times": np.array([3.0, np.nan])}, ValueError, "finite"),
        ({"times": np.array([81.0, 1.0])}, ValueError, "within the schedule's 0.002 to 80.0"),
        ({"solver": ed.solvers.evodiff}, TypeError, "solver must be a Solver"),
        ({"solver": "evodiff"}, TypeError, "solver must be a Solver"),
        ({"schedule": ed.schedules.edm}, TypeError, "schedule must be a NoiseSchedule"),
        ({"schedule": None}, TypeError, "schedule must be a NoiseSchedule"),
    ],
)
def test_bad_arguments_of_plan(arguments, error, message):
    with pytest.raises(error, match=message):
        ed.plan(**{"schedule": EDM, "times": TIMES, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"plan": TIMES}, TypeError, "plan must be a Plan, from evodiff_jax.plan"),
        ({"plan": None}, TypeError, "plan must be a Plan"),
        ({"plan": ed.solvers.ddim()}, TypeError, "plan must be a Plan"),
        ({"plan": ed.plan(EDM, TIMES, ed.solvers.ddim(eta=1.0))}, ValueError, "stochastic: pass key"),
        ({"x_T": np.ones((2, 3), int)}, TypeError, "x_T must be floating-point, got int"),
        ({"x_T": np.ones((2, 3), complex)}, TypeError, "x_T must be floating-point, got complex"),
        ({"x_T": np.float32(1)}, ValueError, "batch axis"),
        ({"denoise": lambda x, t: None}, TypeError, "it returned NoneType"),
        ({"denoise": lambda x, t: (x, x)}, TypeError, "it returned tuple"),
        ({"denoise": lambda x, t: x > 0}, TypeError, "an array of bool"),
        ({"denoise": lambda x, t: x[:1]}, ValueError, "the shape of x, \\(2, 3\\), it returned \\(1, 3\\)"),
        (
            {"x_T": np.ones(SHAPE, np.float32), "plan": ed.plan(EDM, TIMES, ed.solvers.evodiff(7))},
            ValueError,
            "channel_axis=7",
        ),
    ],
)
def test_bad_arguments_of_sample_plan(arguments, error, message):
    with pytest.raises(error, match=message):
        ed.sample_plan(**{"denoise": denoise, "x_T": X, "plan": PLAN, **arguments})


@pytest.mark.parametrize("plans", [[], (), [PLAN], [ed.plan(EDM, TIMES, ed.solvers.ddim()), PLAN]])
def test_only_plans_of_solvers_without_a_rule_can_be_stacked(plans):
    with pytest.raises(ValueError, match="whose tables alone"):
        ed.plans.stack(plans)


def test_a_stack_cannot_be_stacked_again():
    stacked = ed.plans.stack([ed.plan(EDM, TIMES, ed.solvers.ddim())])
    with pytest.raises(ValueError, match="whose tables alone"):
        ed.plans.stack([stacked, stacked])
