"""How many arrays of the state's size a compiled sampler moves a call: the counter, and the bounds that it checks."""

import jax
import jax.numpy as jnp
import pytest
import traffic

import evodiff_jax as ed
from evodiff_jax.solvers import FORMS

SHAPE = (16, 16, 16, 3)
STATE = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
SCHEDULE = ed.schedules.edm()
TIMES = ed.grids.log_snr(SCHEDULE, 10)


def test_the_counter_counts_what_a_loop_reads_and_writes(optimized):
    add = lambda x, other: jax.lax.fori_loop(0, 9, lambda _, x: x + other, x)
    assert traffic.cost(add, STATE, STATE).arrays == pytest.approx(3, rel=1e-3)
    one_of_many = lambda x, many: jax.lax.fori_loop(0, 9, lambda i, x: x + many[i], x)
    many = jax.ShapeDtypeStruct((9, *SHAPE), jnp.float32)
    assert traffic.cost(one_of_many, STATE, many).arrays == pytest.approx(3, rel=1e-3)  # the slice, not the nine
    outside = traffic.cost(lambda x: jnp.cos(x) + 1, STATE)
    assert (outside.arrays, outside.instructions) == (0, 0)


# Arrays a call: K + 3 with K remembered outputs, and the network's read and write, which fuse with the rest here.
FORWARD = {"ddim": 2, "dpm_solver_pp-2": 6, "unipc-2": 7, "ipndm-4": 8, "evodiff": 10.5, "variance_optimal": 11.4}


SLOW = ("ddim", "ipndm-4", "evodiff", "variance_optimal")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FORWARD]
)
def test_forward_traffic_of_exact_and_padded_plans(name, optimized):
    solver = FORMS[name].make()
    exact, padded = ed.plan(SCHEDULE, TIMES, solver), ed.plan(SCHEDULE, TIMES, solver, max_calls=16)
    assert traffic.cost(traffic.sampler(exact), STATE).arrays <= FORWARD[name] + 0.2  # sums of a small state count more
    assert traffic.cost(traffic.sampler(), STATE, padded).arrays <= FORWARD[name] + 0.2


# Arrays of the forward and backward loops, and states of temporary memory.
GRADIENT = {"dpm_solver_pp-2": (24, 6), "unipc-2": (32, 9), "ipndm-4": (40, 12), "evodiff": (73, 68)}


@pytest.mark.parametrize("name", [*list(GRADIENT)[:-1], pytest.param("evodiff", marks=pytest.mark.slow)])
def test_traffic_and_memory_of_gradients(name, optimized):
    plan = ed.plan(SCHEDULE, TIMES, FORMS[name].make())
    found = traffic.cost(traffic.gradient_of(traffic.sampler(plan)), STATE)
    arrays, temporaries = GRADIENT[name]
    assert found.arrays <= 1.02 * arrays
    assert found.temporaries <= 1.02 * temporaries + 0.2
