"""Plans and the extension seam: what a plan is made of, and what is said of a table or a rule that is none."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, SOLVERS

import evodiff_jax as ed
from evodiff_jax.tables import Choice, Rule, Solver, Table

pytestmark = pytest.mark.fast

EDM = SCHEDULES["edm"]
TIMES = ed.grids.log_snr(EDM, 4)
X = np.ones((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize("name", SOLVERS)
def test_plans_of_one_solver_have_the_same_shapes_and_lie_on_the_host(name):
    def make(steps):
        times = ed.grids.karras(EDM, steps)
        return ed.plan(EDM, times, SOLVERS[name](), denoise_to_zero=steps == 2, max_calls=40)

    plans = [make(steps) for steps in (1, 2, 3, 15)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*plans)
    chex.assert_trees_all_equal_structs(*plans)
    inside = []
    jax.jit(lambda x: inside.append(make(3)) or x)(0.0)
    chex.assert_trees_all_equal(inside[0], plans[2])
    for column in jax.tree.leaves(inside[0].table):
        assert isinstance(column, np.ndarray)
        assert column.dtype == np.float64
        assert column.shape[0] == 40
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(plans[0]))  # what checkpoint libraries take
    again = pickle.loads(pickle.dumps(plans[3]))
    chex.assert_trees_all_equal_structs(again, plans[3])
    chex.assert_trees_all_equal(again, plans[3])


def test_a_stack_of_one_is_that_plan():
    plan = ed.plan(EDM, TIMES, ed.solvers.unipc(), max_calls=7)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], ed.stack([plan])), plan)


DDIM = ed.plan(EDM, TIMES, ed.solvers.ddim())


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([], "at least one plan"),
        ([None], "at least one plan"),
        ([DDIM, ed.plan(EDM, TIMES, ed.solvers.evodiff())], "plans of one rule"),
        ([ed.plan(EDM, TIMES, ed.solvers.evodiff(c)) for c in (-1, None)], "plans of one rule"),
        ([ed.stack([DDIM, DDIM])] * 2, "not stacked yet"),
    ],
)
def test_what_cannot_be_stacked(plans, message):
    with pytest.raises(ValueError, match=message):
        ed.stack(plans)


def test_a_stack_needs_vmap():
    stacked = ed.stack([DDIM] * 3)
    for fn in (ed.sample, ed.sample_with_trace, lambda denoise, x, plan: ed.init(x, plan)):
        with pytest.raises(ValueError, match=r"stack of 3 plans: use jax.vmap over it"):
            fn(lambda x, t: x, X, stacked)


# -- tables


def table_of(**columns):
    def table(schedule, times):
        sigma = schedule.levels(times).sigma
        ratio = (sigma[1:] / sigma[:-1])[:, None]
        zero = np.zeros((len(times) - 1, 1))
        good = Table(times[:-1], ratio[:, 0], 1 - ratio, zero)
        return good._replace(**{name: make(good) for name, make in columns.items()})

    return table


def test_a_good_table_is_taken():
    np.testing.assert_allclose(
        ed.sample(lambda x, t: x / 2, X, ed.plan(EDM, TIMES, Solver("mine", table_of()))),
        ed.sample(lambda x, t: x / 2, X, DDIM),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (lambda s, t: None, TypeError, "the table of solver 'mine' must be a Table, got NoneType"),
        (lambda s, t: (t, t), TypeError, "must be a Table, got tuple"),
        (table_of(time=lambda good: 3.0), ValueError, "must have a time for each of its rows"),
        (table_of(transition=lambda good: [1.0] * 4), TypeError, "transition.*must be an array of numbers"),
        (
            table_of(transition=lambda good: good.transition > 0),
            TypeError,
            "column .*transition must be an array of num",
        ),
        (table_of(transition=lambda good: good.transition[1:]), ValueError, "transition must have 4 rows"),
        (
            table_of(corrector=lambda good: np.zeros((4, 2))),
            ValueError,
            r"of one shape \(R, K \+ 1\), got \(4, 1\) and",
        ),
        (table_of(predictor=lambda good: good.predictor[:, 0]), ValueError, r"of one shape \(R, K \+ 1\)"),
        (table_of(noise=lambda good: np.full(4, np.nan)), ValueError, "noise must be finite"),
        (table_of(data=lambda good: {"a": np.zeros(3)}), ValueError, r"data\['a'\] must have 4 rows"),
        (
            table_of(predictor=lambda good: 1.01 * good.predictor),
            ValueError,
            "row 0 takes a model that predicts the con",
        ),
        (table_of(transition=lambda good: -good.transition), ValueError, "its coefficients are inconsistent"),
        (table_of(corrector=lambda good: 0.1 + good.corrector), ValueError, "where alpha is 1: its coefficients"),
    ],
)
def test_a_bad_table_is_an_error_that_names_the_solver(table, error, message):
    with pytest.raises(error, match=message) as raised:
        ed.plan(EDM, TIMES, Solver("mine", table))
    assert "'mine'" in str(raised.value)


def test_a_solver_may_say_that_constants_do_not_come_back():
    ed.plan(EDM, TIMES, Solver("mine", table_of(predictor=lambda good: 2 * good.predictor), keeps_constants=False))


# -- rules


def nothing(data, x, output):
    return (output(0),)


def rule_of(choose, **options):
    solver = Solver("mine", table_of(data=lambda good: good.time), Rule(nothing, choose, **options))
    return ed.plan(EDM, TIMES, solver)


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        (lambda d, s, m: (Choice(jnp.zeros(2), jnp.zeros(1)), m), ValueError, r"1 predictor coeff.*chose shape \(2,\)"),
        (lambda d, s, m: (Choice(jnp.zeros(1), jnp.zeros(3)), m), ValueError, r"1 corrector coeff.*chose shape \(3,\)"),
        (lambda d, s, m: (Choice((0.0,), (0.0,)), m), ValueError, "must choose an array of 1 predictor"),
        (lambda d, s, m: (Choice(jnp.zeros(()), jnp.zeros(1)), m), ValueError, "must choose an array of 1 predictor"),
        (lambda d, s, m: (jnp.zeros(1), m), TypeError, r"must return \(Choice, memory\)"),
    ],
)
def test_a_choice_of_another_length_is_an_error_while_tracing(choose, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: ed.sample(lambda x, t: x, X, rule_of(choose)))


def counting(data, sums, memory):
    rows, largest = memory
    return Choice(jnp.zeros(1), jnp.zeros(1), {"rows": rows, "sum": sums[0]}), (rows + 1, jnp.maximum(largest, sums[0]))


def first(data):
    return jnp.int32(0), data - 3.0


@pytest.mark.parametrize(("channel_axis", "kept"), [(None, (2,)), (-1, (2, 3)), (1, (2, 4))])
def test_a_rule_keeps_a_memory_of_any_structure(channel_axis, kept):
    plan = rule_of(counting, init=first, channel_axis=channel_axis)
    x, trace = ed.sample_with_trace(lambda x, t: x / 2, X, plan)
    chex.assert_shape(trace.rule["sum"], (4, *kept))
    for row in range(4):
        np.testing.assert_array_equal(trace.rule["rows"][row], row)
    chex.assert_trees_all_close(x, ed.sample(lambda x, t: x / 2, X, DDIM), rtol=1e-6)


def test_factors_of_a_row_switch_its_rule_off():
    add = lambda data, sums, memory: (Choice(jnp.ones(1), jnp.zeros(1)), memory)
    solver = Solver("mine", table_of(predicts=lambda good: np.array([0.0, 1.0, 0.0, 0.0])), Rule(nothing, add))
    _, trace = ed.sample_with_trace(lambda x, t: 0 * x, X, ed.plan(EDM, TIMES, solver))
    _, plain = ed.sample_with_trace(lambda x, t: 0 * x, X, DDIM)
    np.testing.assert_allclose(trace.states, plain.states, rtol=1e-6)  # outputs are 0, and so is what is added
    _, trace = ed.sample_with_trace(lambda x, t: 0 * x + 1, X, ed.plan(EDM, TIMES, solver))
    _, plain = ed.sample_with_trace(lambda x, t: 0 * x + 1, X, DDIM)
    np.testing.assert_allclose(trace.states[:2], plain.states[:2], rtol=1e-6)
    np.testing.assert_allclose(trace.states[2], plain.states[2] + 1, rtol=1e-6)


def test_a_joint_rule_has_no_channels():
    with pytest.raises(ValueError, match="per_leaf=False sums over the whole sample"):
        Rule(nothing, counting, channel_axis=-1, per_leaf=False)


def test_the_rule_has_no_part_in_denoising_to_zero():
    add = lambda data, sums, memory: (Choice(jnp.ones(1), jnp.ones(1)), memory)
    solver = Solver("mine", table_of(data=lambda good: good.time), Rule(nothing, add))
    plan = ed.plan(EDM, TIMES, solver, denoise_to_zero=True)
    np.testing.assert_array_equal(ed.sample(lambda x, t: 0 * x + 7, X, plan), 7)


# -- bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_calls": 3}, ValueError, "ddim takes 4 model calls for these times, max_calls is 3"),
        ({"max_calls": 4, "denoise_to_zero": True}, ValueError, "takes 5 model calls"),
        ({"max_calls": 7, "solver": ed.solvers.heun()}, ValueError, "heun takes 8 model calls"),
        ({"max_calls": 40.0}, TypeError, "max_calls must be an integer or None, got 40.0"),
        ({"denoise_to_zero": "no"}, TypeError, "plan needs True or False for denoise_to_zero, got 'no'"),
        ({"times": TIMES[:1]}, ValueError, "N \\+ 1 >= 2 times"),
        ({"times": TIMES[None]}, ValueError, "in one dimension"),
        ({"times": 4}, ValueError, r"in one dimension, for example grids.log_snr\(schedule, 10\), got shape \(\)"),
        ({"times": TIMES[::-1]}, ValueError, "strictly decreasing.*times\\[0\\] = 0.002"),
        ({"times": np.array([3.0, np.nan])}, ValueError, "finite"),
        ({"times": np.array([81.0, 1.0])}, ValueError, "within the schedule's 0.002 to 80.0"),
        ({"solver": ed.solvers.evodiff}, TypeError, "solver must be a Solver"),
        ({"solver": "evodiff"}, TypeError, "solver must be a Solver"),
        ({"schedule": ed.schedules.edm}, TypeError, "schedule must be a NoiseSchedule"),
        ({"schedule": None}, TypeError, "schedule must be a NoiseSchedule"),
        (
            {
                "schedule": ed.schedules.discrete(ed.schedules.scaled_linear_betas()),
                "times": [14.6146, 5.0, 1.0, 0.1],
            },
            ValueError,
            "largest sigma / alpha, 14.6146, .*use grids.from_sigmas",
        ),
        (
            {"schedule": ed.schedules.vp_linear(), "times": [80.0, 5.0, 0.1]},
            ValueError,
            "within the schedule's 0.001 to 1.0, got 0.1 to 80.0; for noise levels .* use grids.from_sigmas",
        ),
    ],
)
def test_bad_arguments_of_plan(arguments, error, message):
    with pytest.raises(error, match=message):
        ed.plan(**{"schedule": EDM, "times": TIMES, "solver": ed.solvers.ddim(), **arguments})


def test_the_solver_is_a_required_argument():
    with pytest.raises(TypeError, match="solver"):
        ed.plan(EDM, TIMES)
    with pytest.raises(TypeError, match="positional"):
        ed.plan(EDM, TIMES, ed.solvers.ddim(), True)


@pytest.mark.parametrize("name", ed.solvers.FORMS)
def test_citations(name):
    found = ed.citation(ed.solvers.FORMS[name].make())
    assert found.count("@") == found.count("\n}") >= 2
    assert "@software{evodiff_jax" in found
    assert ("EVODiff" in found) == (name in ("evodiff", "variance_optimal"))


def test_citations_of_what_is_no_solver():
    with pytest.raises(TypeError, match="citation needs a Solver"):
        ed.citation("evodiff")
    assert ed.citation(Solver("mine", table_of())).count("@") == 1
