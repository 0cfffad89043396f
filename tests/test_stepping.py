"""The step-by-step form: equal to `sample` for every solver, and at home in anybody's loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture
from test_plans import FORMS, KEY, every_solver

import evodiff_jax as ed
from evodiff_jax import stepping

EDM = SCHEDULES["edm"]


@every_solver
def test_a_loop_of_ones_own_equals_sample(solver, x64):
    times = ed.grids.log_snr(EDM, 5)
    x_T = initial_state(EDM, (3, 4, 4, 2), jnp.float64)
    denoise = jax.jit(mixture(EDM))
    state = stepping.init(x_T, ed.plan(EDM, times, solver), KEY)
    first, called = state, []
    while not state.done:
        called.append(float(state.t))
        state = stepping.update(state, denoise(state.x, state.t))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    np.testing.assert_allclose(called, solver.table(EDM, times).time)
    expected = ed.sample(mixture(EDM), x_T, times, EDM, solver, key=KEY)
    chex.assert_trees_all_close(state.x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["evodiff", "unipc", "heun", "ddim(1)"])
def test_inside_a_jit_a_scan_and_a_fori_loop(name):
    """More iterations than calls do no harm: the state of a finished run stays as it is."""
    times = ed.grids.log_snr(EDM, 4)
    x_T = initial_state(EDM, (3, 4, 4, 2))
    plan = ed.plan(EDM, times, FORMS[name], max_calls=11)
    denoise = mixture(EDM)

    def step(state):
        return stepping.update(state, denoise(state.x, state.t))

    start = stepping.init(x_T, plan, KEY)
    ends = {
        "while_loop": jax.jit(lambda s: jax.lax.while_loop(lambda s: ~s.done, step, s))(start),
        "fori_loop": jax.jit(lambda s: jax.lax.fori_loop(0, 13, lambda _, s: step(s), s))(start),
        "scan": jax.jit(lambda s: jax.lax.scan(lambda s, _: (step(s), None), s, length=13)[0])(start),
    }
    expected = ed.sample(denoise, x_T, times, EDM, FORMS[name], key=KEY)
    for state in ends.values():
        assert state.done
        chex.assert_trees_all_close(state.x, expected, rtol=1e-4, atol=1e-4)


def test_updates_compile_once():
    state = stepping.init(initial_state(EDM, (2, 5)), ed.plan(EDM, ed.grids.log_snr(EDM, 6)))
    before = stepping.update._cache_size()
    while not state.done:
        state = stepping.update(state, state.x / (1 + state.t**2))
    assert stepping.update._cache_size() == before + 1


def test_gradients_go_through_a_loop_of_ones_own():
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 4), ed.solvers.unipc(2))

    def loss(x_T):
        state = stepping.init(x_T, plan)
        for _ in range(int(plan.calls)):
            state = stepping.update(state, mixture(EDM)(state.x, state.t))
        return jnp.sum(state.x**2)

    x_T = initial_state(EDM, (2, 4, 4, 2))
    expected = jax.grad(
        lambda x: jnp.sum(ed.sample(mixture(EDM), x, ed.grids.log_snr(EDM, 4), EDM, ed.solvers.unipc(2)) ** 2)
    )
    chex.assert_trees_all_close(jax.grad(loss)(x_T), expected(x_T), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "error", "message"),
    [
        (None, TypeError, "it returned NoneType"),
        (np.ones((1, 3), np.float32), ValueError, "the shape of x, \\(2, 3\\), it returned \\(1, 3\\)"),
        (np.ones((2, 3), bool), TypeError, "an array of bool"),
    ],
)
def test_bad_predictions(prediction, error, message):
    state = stepping.init(np.ones((2, 3), np.float32), ed.plan(EDM, ed.grids.log_snr(EDM, 4)))
    with pytest.raises(error, match=message):
        stepping.update(state, prediction)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 3), int), ed.plan(EDM, [80.0, 1.0])), TypeError, "x_T must be floating-point"),
        ((np.float32(1), ed.plan(EDM, [80.0, 1.0])), ValueError, "batch axis"),
        ((np.ones((2, 3), np.float32), [80.0, 1.0]), TypeError, "plan must be a Plan"),
        ((np.ones((2, 3), np.float32), ed.plan(EDM, [80.0, 1.0], ed.solvers.ddim(1.0))), ValueError, "pass key"),
    ],
)
def test_bad_starts(arguments, error, message):
    with pytest.raises(error, match=message):
        stepping.init(*arguments)
