"""The step-by-step form: the user's loop, whatever kind it is, runs as `sample` does."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state

import evodiff_jax as ed
from evodiff_jax.numerics import enable_x64
from evodiff_jax.solvers import SOLVERS

EDM = SCHEDULES["edm"]
SHAPE = (3, 4, 4, 2)
TIMES = ed.grids.karras(EDM, 6)
KEY = jax.random.key(3)
EVERY = {name: make() for name, make in SOLVERS.items()} | {"ancestral": ed.solvers.ddim(eta=1.0)}
solvers = pytest.mark.parametrize("solver", list(EVERY.values()), ids=list(EVERY))


def denoise(x, t):
    """Smooth, not linear, and quick to compile."""
    t = jnp.asarray(t, x.dtype)
    return (x + t * jnp.tanh(x)) / (1 + t**2)


call = jax.jit(denoise)


@functools.cache
def expected(solver):
    """The run of `sample` in float64."""
    with enable_x64():
        return np.asarray(jax.jit(lambda x: ed.sample(denoise, x, TIMES, EDM, solver, True, KEY))(noise()))


def noise(dtype=jnp.float64):
    return initial_state(EDM, SHAPE, dtype)


def plan_of(solver, max_calls=15):
    return ed.plan(EDM, TIMES, solver, denoise_to_zero=True, max_calls=max_calls)


def step(state):
    return ed.stepping.update(state, denoise(state.x, state.t))


@jax.jit
def start(x_T, plan):
    return ed.stepping.init(x_T, plan, KEY)


@solvers
def test_the_loop_runs_as_sample_does(solver, x64):
    plan = plan_of(solver)
    state = ed.stepping.init(noise(), plan, KEY)
    compiled = ed.stepping.update._cache_size()
    called = []
    while not state.done:
        called.append(state.t)
        following = ed.stepping.update(state, call(state.x, state.t))
        chex.assert_trees_all_equal_structs(following, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(following, state)
        state = following
    np.testing.assert_allclose(called, plan.table.time[: plan.calls], rtol=1e-14)
    chex.assert_shape(called[0], ())
    chex.assert_trees_all_close(state.x, expected(solver), rtol=1e-12, atol=1e-13)
    assert ed.stepping.update._cache_size() - compiled <= 1


def while_loop(state):
    return jax.lax.while_loop(lambda state: ~state.done, step, state)


def fori_loop(state):
    return jax.lax.fori_loop(0, 20, lambda _, state: step(state), state)


def scan(state):
    return jax.lax.scan(lambda state, _: (step(state), None), state, length=20)[0]


LOOPS = {loop.__name__: jax.jit(loop) for loop in (while_loop, fori_loop, scan)}


@solvers
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_it_lives_inside_compiled_loops(solver, loop, x64):
    state = loop(start(noise(), plan_of(solver)))
    assert bool(state.done)
    chex.assert_trees_all_close(state.x, expected(solver), rtol=1e-12, atol=1e-13)


@solvers
def test_an_update_of_a_finished_run_changes_nothing(solver, x64):
    state = LOOPS["while_loop"](start(noise(), plan_of(solver)))
    assert int(state.carry.row) == state.plan.calls
    assert float(state.t) == pytest.approx(TIMES[-1])
    chex.assert_trees_all_equal(ed.stepping.update(state, jnp.full(SHAPE, jnp.nan)), state)


@solvers
def test_a_bfloat16_state_stays_one_whatever_the_prediction_is(solver, strict_promotion):
    state = jax.eval_shape(lambda: start(noise(jnp.bfloat16), plan_of(solver)))
    assert state.x.dtype == jnp.bfloat16
    for dtype in (jnp.float32, jnp.bfloat16):
        following = jax.eval_shape(ed.stepping.update, state, jax.ShapeDtypeStruct(SHAPE, dtype))
        chex.assert_trees_all_equal_shapes_and_dtypes(following, state)


def test_a_run_can_start_and_go_on_in_different_programs(x64):
    plan = plan_of(EVERY["evodiff"], max_calls=None)
    state = jax.jit(lambda x, plan: step(step(ed.stepping.init(x, plan))))(noise(), plan)
    assert int(state.carry.row) == 2
    while not state.done:
        state = ed.stepping.update(state, call(state.x, state.t))
    chex.assert_trees_all_close(state.x, expected(EVERY["evodiff"]), rtol=1e-12, atol=1e-13)


def test_one_compilation_for_all_numbers_of_steps():
    ed.stepping.update.clear_cache()
    for steps in (3, 5, 8):
        times = ed.grids.log_snr(EDM, steps)
        state = ed.stepping.init(noise(jnp.float32), ed.plan(EDM, times, max_calls=10))
        while not state.done:
            state = ed.stepping.update(state, call(state.x, state.t))
        assert int(state.carry.row) == steps
    assert ed.stepping.update._cache_size() == 1


def test_runs_of_different_lengths_side_by_side(x64):
    plans = [plan_of(EVERY[name]) for name in ("heun", "unipc", "ancestral")]
    stacked = ed.plans.stack(plans)
    states = jax.vmap(lambda plan: ed.stepping.init(noise(), plan, KEY))(stacked)
    chex.assert_trees_all_equal(jax.jit(jax.vmap(step))(states).carry.row, jnp.ones(3, jnp.int32))
    states = jax.jit(jax.vmap(fori_loop))(states)
    assert states.done.all()
    np.testing.assert_array_equal(states.carry.row, [plan.calls for plan in plans])
    for name, x in zip(("heun", "unipc", "ancestral"), states.x, strict=True):
        chex.assert_trees_all_close(x, expected(EVERY[name]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["evodiff", "unipc", "heun"])
def test_gradients_through_an_unrolled_run_are_those_of_sample(name, x64):
    schedule = ed.schedules.edm(0.05, 10.0)
    times = ed.grids.log_snr(schedule, 3)
    plan = ed.plan(schedule, times, EVERY[name], max_calls=10)
    x_T = initial_state(schedule, SHAPE, jnp.float64)

    def unrolled(x):
        state = ed.stepping.init(x, plan, KEY)
        for _ in range(int(plan.calls) + 1):
            state = step(state)
        return jnp.sum(jnp.sin(state.x))

    gradient = jax.jit(jax.grad(unrolled))(x_T)
    chex.assert_tree_all_finite(gradient)
    assert np.abs(gradient).max() > 1e-3
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(ed.sample(denoise, x, times, schedule, EVERY[name], key=KEY))))
    chex.assert_trees_all_close(gradient, jax.grad(loss)(x_T), rtol=1e-9, atol=1e-12)


X = np.ones((2, 3), np.float32)
PLAN = ed.plan(EDM, TIMES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x_T": np.ones((2, 3), int)}, TypeError, "x_T must be floating-point, got int"),
        ({"x_T": np.float32(1)}, ValueError, "batch axis"),
        ({"plan": TIMES}, TypeError, "plan must be a Plan, from evodiff_jax.plan"),
        ({"plan": None}, TypeError, "plan must be a Plan"),
        ({"plan": ed.plan(EDM, TIMES, EVERY["ancestral"])}, ValueError, "stochastic: pass key"),
        (
            {"x_T": np.ones(SHAPE, np.float32), "plan": ed.plan(EDM, TIMES, ed.solvers.evodiff(7))},
            ValueError,
            "channel_axis=7",
        ),
    ],
)
def test_bad_arguments_of_init(arguments, error, message):
    with pytest.raises(error, match=message):
        ed.stepping.init(**{"x_T": X, "plan": PLAN, **arguments})


@pytest.mark.parametrize(
    ("prediction", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        ((X, X), TypeError, "tuple"),
        (X > 0, TypeError, "an array of bool"),
        (np.ones((2, 3), np.int32), TypeError, "an array of int32"),
        (np.ones((2, 3), np.complex64), TypeError, "an array of complex64"),
        (X[:1], ValueError, "\\(2, 3\\), it returned \\(1, 3\\)"),
        (1.0, ValueError, "\\(2, 3\\), it returned \\(\\)"),
    ],
)
def test_bad_predictions(prediction, error, message):
    state = ed.stepping.init(X, PLAN)
    with pytest.raises(error, match=message):
        ed.stepping.update(state, prediction)
