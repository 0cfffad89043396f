"""What holds of the one loop for every solver: calls, plans as arguments, dtypes, traces, gradients, keys, hooks."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, SOLVERS, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.numerics import enable_x64
from evodiff_jax.solvers import FORMS

EDM = SCHEDULES["edm"]
SHAPE = (3, 4, 4, 2)
KEY = jax.random.key(3)
MAX_CALLS = 24
EVERY = {name: make() for name, make in SOLVERS.items()} | {
    "ancestral": ed.solvers.ddim(eta=1.0),
    "churned heun": ed.solvers.heun(s_churn=10.0),
    "sa_solver": ed.solvers.sa_solver(),
    "dpm_solver_pp 3S": ed.solvers.dpm_solver_pp(3, "singlestep"),
}
# One of each kind: two rules, without memory, with a corrector, with noise predictions for outputs, with noise.
KINDS = ("evodiff", "variance_optimal", "ddim", "unipc-2", "dpm_solver-2", "sa_solver")
OTHERS = [name for name in EVERY if name not in KINDS]  # which differ from the kinds by the numbers in their tables
kinds = pytest.mark.parametrize("name", KINDS)
linear_kinds = pytest.mark.parametrize("name", [name for name in KINDS if EVERY[name].rule is None])


def but_slow(*quick):
    """All kinds, of which the quick ones alone are among the default tests."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name not in quick]
    return pytest.mark.parametrize("name", [*quick, *slow])


# The same for all kinds, of which the rules, whose programs take long to compile, are not among the default tests.
rules_are_slow = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if EVERY[name].rule is not None else name for name in KINDS]
)


def denoise(x, t):
    """Smooth, not linear, and quick to compile."""
    t = jnp.asarray(t, x.dtype)
    return (x + t * jnp.tanh(x)) / (1 + t**2)


@jax.jit
def run(x_T, plan, key=KEY):
    return ed.sample(denoise, x_T, plan, key=key)


@jax.jit
def run_with_trace(x_T, plan, key=KEY):
    return ed.sample_with_trace(denoise, x_T, plan, key=key)


def plan_of(name, steps=6, grid=ed.grids.karras, schedule=EDM, **options):
    return ed.plan(schedule, grid(schedule, steps), EVERY[name], **options)


def uniform(plans):
    """Plans of solvers without a rule with the columns, slots and rows of all of them, which share their programs."""
    stacked = ed.stack(plans)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(plans))]


def state(dtype=jnp.float32, shape=SHAPE):
    return initial_state(EDM, shape, dtype)


@functools.cache
def reference(name):
    """The plain run in float64, of a plan without padding."""
    with enable_x64():
        return np.asarray(run(state(jnp.float64), plan_of(name, denoise_to_zero=True)))


# -- calls and compilations


@pytest.mark.parametrize("names", [*([name] for name in KINDS), OTHERS], ids=[*KINDS, "others"])
def test_the_model_is_called_as_often_as_the_plan_says_at_its_times(names):
    called = []

    def counting(x, t):
        jax.debug.callback(lambda t: called.append(t), t, ordered=True)
        return denoise(x, t)

    sample = jax.jit(lambda x, plan: ed.sample(counting, x, plan, key=KEY))
    for steps, to_zero in ((5, True), (3, False), (1, True), (1, False)):
        plans = [plan_of(name, steps, denoise_to_zero=to_zero, max_calls=MAX_CALLS) for name in names]
        for plan in uniform(plans) if names == OTHERS else plans:
            called.clear()
            sample(state(jnp.bfloat16), plan).block_until_ready()
            jax.effects_barrier()
            assert called[0].dtype == np.float32  # unrounded, whatever the state
            np.testing.assert_allclose(called, plan.table.time[: plan.calls], rtol=1e-6)
    assert sample._cache_size() == 1


@pytest.mark.parametrize("form", ["sample", "remat", "trace", "together"])
def test_the_network_is_traced_once_and_stands_once_in_the_program(form):
    traces = []
    weights = jnp.ones((2, 5))

    def network(x, t):
        traces.append(t)
        return 0 * jnp.sin(x @ weights @ weights.T)

    plans = [ed.plan(EDM, ed.grids.log_snr(EDM, 6), solver, max_calls=20) for solver in EVERY.values()]
    fn = {
        "sample": lambda plan: ed.sample(network, jnp.ones(SHAPE), plan, key=KEY),
        "remat": lambda plan: ed.sample(network, jnp.ones(SHAPE), plan, key=KEY, remat=True),
        "trace": lambda plan: ed.sample_with_trace(network, jnp.ones(SHAPE), plan, key=KEY)[0],
    }.get(form, jax.vmap(lambda plan: ed.sample(network, jnp.ones(SHAPE), plan, key=KEY)))
    if form == "together":
        plans = [ed.stack([plan for plan in plans if plan.rule is None])]
    for plan in plans if form in ("sample", "together") else plans[:2]:
        traces.clear()
        lowered = jax.jit(fn).lower(plan)
        assert len(traces) <= 2  # once, and once for its shapes
        assert lowered.as_text().count("stablehlo.sine") == 1


def test_one_program_serves_all_steps_grids_and_solvers_of_one_memory():
    sample = jax.jit(lambda x_T, plan: ed.sample(denoise, x_T, plan))
    for solver in (ed.solvers.dpm_solver_pp(2), ed.solvers.dpm_solver_pp(2, "singlestep"), ed.solvers.dpm_solver_pp(2)):
        for steps in (3, 5, 9):
            for to_zero in (False, True):
                plan = ed.plan(EDM, ed.grids.log_snr(EDM, steps), solver, denoise_to_zero=to_zero, max_calls=20)
                sample(state(), plan)
    assert sample._cache_size() == 1


# -- all forms of the loop are one


@kinds
def test_padding_changes_nothing_and_spare_rows_are_never_read(name, x64):
    plan = plan_of(name, denoise_to_zero=True, max_calls=MAX_CALLS)
    spare = np.arange(MAX_CALLS) >= plan.calls
    assert spare.any()

    def poison(column):
        return np.where(spare.reshape(-1, *(1,) * (column.ndim - 1)), np.nan, column)

    x, poisoned = (
        run(state(jnp.float64), dataclasses.replace(plan, table=jax.tree.map(change, plan.table)))
        for change in (lambda column: column, poison)
    )
    chex.assert_trees_all_close(x, reference(name), rtol=1e-12, atol=1e-13)
    chex.assert_trees_all_equal(poisoned, x)


@rules_are_slow
def test_without_jit_it_is_the_same(name, x64):
    with jax.disable_jit():
        x = ed.sample(denoise, state(jnp.float64), plan_of(name, denoise_to_zero=True), key=KEY)
    chex.assert_trees_all_close(x, reference(name), rtol=1e-9, atol=1e-11)


@pytest.mark.fast
@kinds
def test_a_loop_of_ones_own_is_the_same(name, x64):
    plan = plan_of(name, denoise_to_zero=True, max_calls=20)
    now = ed.init(state(jnp.float64), plan, key=KEY)
    compiled, called = ed.update._cache_size(), []
    while not now.done:
        called.append(now.t)
        following = ed.update(now, denoise(now.x, now.t), plan)
        chex.assert_trees_all_equal_structs(following, now)
        chex.assert_trees_all_equal_shapes_and_dtypes(following, now)
        now = following
    np.testing.assert_allclose(called, plan.table.time[: plan.calls], rtol=1e-14)
    chex.assert_trees_all_close(now.x, reference(name), rtol=1e-12, atol=1e-13)
    assert ed.update._cache_size() - compiled <= 1
    chex.assert_trees_all_equal(ed.update(now, jnp.full(SHAPE, jnp.nan), plan), now)  # a finished run stays so


@pytest.mark.parametrize("name", ["evodiff", "sa_solver"])
def test_a_loop_of_ones_own_lives_in_compiled_loops_and_side_by_side(name, x64):
    plan = plan_of(name, denoise_to_zero=True, max_calls=15)
    step = lambda now: ed.update(now, denoise(now.x, now.t), plan)
    start = lambda: ed.init(state(jnp.float64), plan, key=KEY)
    side_by_side = lambda: jax.vmap(lambda _: jax.lax.fori_loop(0, 20, lambda _, s: step(s), start()))(jnp.arange(2))
    for loop in (
        lambda: jax.lax.while_loop(lambda s: ~s.done, step, start()),
        lambda: jax.lax.scan(lambda s, _: (step(s), None), start(), length=20)[0],
        lambda: jax.tree.map(lambda a: a[1], side_by_side()),
    ):
        now = jax.jit(loop)()
        assert bool(now.done)
        chex.assert_trees_all_close(now.x, reference(name), rtol=1e-12, atol=1e-13)


@kinds
def test_the_trace_has_the_corrected_states_and_the_result(name, x64):
    x_T = state(jnp.float64)
    for steps, to_zero in ((6, True), (3, False)):
        plan = plan_of(name, steps, denoise_to_zero=to_zero, max_calls=MAX_CALLS)
        x, trace = run_with_trace(x_T, plan)
        calls = int(plan.calls)
        chex.assert_shape(trace.states, (MAX_CALLS + 1, *SHAPE))
        chex.assert_trees_all_equal(trace.states[calls], x)
        chex.assert_trees_all_equal(trace.states[0], x_T)
        np.testing.assert_array_equal(np.asarray(trace.states[calls + 1 :]), 0)
        if to_zero:  # the data prediction itself, without noise, history and rule
            expected = denoise(trace.states[calls - 1], plan.table.time[calls - 1])
            chex.assert_trees_all_close(x, expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(trace.times[:calls], plan.table.time[:calls], rtol=1e-14)
        assert float(trace.times[calls]) == pytest.approx(EDM.t_min)
        chex.assert_trees_all_close(x, run(x_T, plan), rtol=1e-12, atol=1e-13)
        if EVERY[name].rule is not None:
            leaves = jax.tree.leaves(trace.rule)
            assert leaves
            for leaf in leaves:
                assert leaf.shape[:2] == (MAX_CALLS, SHAPE[0])
                np.testing.assert_array_equal(np.asarray(leaf[calls:]), 0)


# -- transformations


EDM_SHORT = ed.schedules.edm(0.05, 10.0)


@functools.partial(jax.jit, static_argnames="remat")
def value_and_gradients(x, scale, plan, remat=False):
    def loss(x, scale):
        scaled = lambda x, t: scale * mixture(EDM_SHORT)(x, t)
        return jnp.sum(jnp.sin(ed.sample(scaled, x, plan, key=KEY, remat=remat)))

    return jax.value_and_grad(loss, argnums=(0, 1))(x, scale)


@rules_are_slow
def test_gradients_are_those_of_finite_differences(name, x64):
    plan = plan_of(name, 5, ed.grids.log_snr, EDM_SHORT, max_calls=11)
    x_T = initial_state(EDM_SHORT, SHAPE, jnp.float64)
    _, (gradient, of_scale) = value_and_gradients(x_T, 1.1, plan)
    chex.assert_tree_all_finite(gradient)
    direction, step = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE)), 1e-6
    up, down = (value_and_gradients(x_T + s * direction, 1.1 + s, plan)[0] for s in (step, -step))
    assert float(jnp.vdot(gradient, direction) + of_scale) == pytest.approx(float((up - down) / (2 * step)), rel=1e-4)


@pytest.mark.parametrize(
    "name", ["sa_solver", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "sa_solver")]
)
def test_gradients_of_every_form_are_the_same(name, x64):
    whole, padded = (plan_of(name, 5, ed.grids.log_snr, EDM_SHORT, max_calls=m) for m in (None, 11))
    x_T = initial_state(EDM_SHORT, SHAPE, jnp.float64)
    _, expected = value_and_gradients(x_T, 1.1, padded)
    for plan, remat in ((whole, False), (padded, True), (whole, True)):
        _, other = value_and_gradients(x_T, 1.1, plan, remat)
        chex.assert_trees_all_close(other, expected, rtol=1e-8, atol=1e-11)


@but_slow("unipc-2")
def test_plans_can_be_differentiated(name, x64):
    plan = jax.tree.map(jnp.asarray, plan_of(name, 4))
    x_T = state(jnp.float64)

    @jax.jit
    def loss(predictor):
        table = plan.table._replace(predictor=predictor)
        return jnp.sum(jnp.sin(ed.sample(denoise, x_T, dataclasses.replace(plan, table=table), key=KEY)))

    direction = jnp.asarray(np.random.default_rng(0).normal(size=plan.table.predictor.shape))
    numeric = (loss(plan.table.predictor + 1e-6 * direction) - loss(plan.table.predictor - 1e-6 * direction)) / 2e-6
    gradient = jax.grad(loss)(plan.table.predictor)
    assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(numeric), rel=1e-4)


@kinds
def test_vmap_over_runs_and_over_plans(name, x64):
    x_T = state(jnp.float64, (2, *SHAPE))
    grids = (ed.grids.log_snr, ed.grids.karras)
    plans = [plan_of(name, steps, grid, max_calls=MAX_CALLS) for steps, grid in zip((6, 3), grids, strict=True)]
    separate = [run(x, plan) for x, plan in zip(x_T, plans, strict=True)]
    stacked = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))(x_T, ed.stack(plans), KEY)
    for x, expected in zip(stacked, separate, strict=True):
        chex.assert_trees_all_close(x, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.fast
def test_stacked_plans_may_differ_in_length_memory_history_and_noise(x64):
    runs = [
        ("ddim", 3, True, None),
        ("dpm_solver-2", 9, False, None),  # remembers noise predictions
        ("unipc-2", 5, True, 8),
        ("heun", 3, False, None),
        ("ancestral", 6, True, None),
        ("sa_solver", 4, False, 10),
    ]
    x_T = state(jnp.float64)
    plans = [plan_of(n, steps, denoise_to_zero=zero, max_calls=m) for n, steps, zero, m in runs]
    stacked = ed.stack(plans)
    np.testing.assert_array_equal(stacked.calls, [4, 9, 6, 6, 7, 4])
    together = jax.jit(jax.vmap(lambda plan: run(x_T, plan)))
    for x, plan in zip(together(stacked), plans, strict=True):
        chex.assert_trees_all_close(x, run(x_T, plan), rtol=1e-12, atol=1e-13)
    # Spare rows of the shorter ones change nothing, whatever is in them.
    spare = np.arange(stacked.table.time.shape[1]) >= np.asarray(stacked.calls)[:, None]
    poison = lambda column: np.where(spare.reshape(*spare.shape, *(1,) * (column.ndim - 2)), np.nan, column)
    poisoned = dataclasses.replace(stacked, table=jax.tree.map(poison, stacked.table))
    chex.assert_trees_all_equal(together(poisoned), together(stacked))


def test_hooks_and_traces_of_plans_of_different_lengths_side_by_side(x64):
    """Rows that are padding for one of the plans leave its state alone, hook and all."""
    x_T = state(jnp.float64)
    hook = lambda x, t, index, key: x + 0.1
    plans = [plan_of("unipc-2", 3), plan_of("unipc-2", 6)]
    traced = lambda plan: ed.sample_with_trace(denoise, x_T, plan, on_state=hook)
    together, traces = jax.vmap(traced)(ed.stack(plans))
    for i, plan in enumerate(plans):
        x, trace = traced(plan)
        chex.assert_trees_all_close(together[i], x, rtol=1e-12)
        chex.assert_trees_all_close(traces.states[i, : len(trace.states)], trace.states, rtol=1e-12)


def test_gradients_of_stacked_plans(x64):
    x_T, stacked = state(jnp.float64), ed.stack([plan_of("unipc-2", 3), plan_of("unipc-2", 6)])
    loss = lambda x, plan: jnp.sum(jnp.sin(ed.sample(denoise, x, plan)))
    alone = jax.grad(loss)(x_T, plan_of("unipc-2", 3))
    inside = jax.vmap(jax.grad(loss), in_axes=(None, 0))(x_T, stacked)[0]
    outside = jax.jacrev(lambda x: jax.vmap(loss, in_axes=(None, 0))(x, stacked))(x_T)[0]
    chex.assert_trees_all_close(inside, alone, rtol=1e-10)
    chex.assert_trees_all_close(outside, alone, rtol=1e-10)


@pytest.mark.parametrize("name", ["unipc-2", "sa_solver", pytest.param("variance_optimal", marks=pytest.mark.slow)])
def test_traced_times_equal_concrete_ones(name, x64):
    """Of several grids side by side."""
    grids = np.stack([grid(EDM, 5) for grid in (ed.grids.log_snr, ed.grids.karras)])
    x_T = state(jnp.float64)
    make = lambda times: ed.plan(EDM, times, EVERY[name], max_calls=MAX_CALLS)
    together = jax.jit(jax.vmap(lambda times: ed.sample(denoise, x_T, make(times), key=KEY)))(grids)
    for times, x in zip(grids, together, strict=True):
        chex.assert_trees_all_close(x, run(x_T, make(times)), rtol=1e-9, atol=1e-11)


@kinds
def test_samples_do_not_depend_on_their_batch(name):
    """Each is the same in another order and among other samples, and by itself."""
    keys, plan = jax.random.split(KEY, 3), plan_of(name, 7, max_calls=MAX_CALLS)
    x_T, others, other_keys = state(), initial_state(EDM, SHAPE, seed=1), jax.random.split(jax.random.key(4), 3)
    whole = run(x_T, plan, keys)
    for i in range(3):
        among = [jnp.roll(a.at[i].set(b[i]), 1, axis=0) for a, b in ((others, x_T), (other_keys, keys))]
        x = run(among[0], plan, among[1])[(i + 1) % 3]
        chex.assert_trees_all_close(x, whole[i], rtol=1e-5, atol=1e-5)
    alone = run(x_T[1:2], plan, keys[1:2])
    chex.assert_trees_all_close(alone[0], whole[1], rtol=1e-5, atol=1e-5)


# -- shapes and dtypes


SHAPES = [
    *((shape, jnp.float32) for shape in [(5,), (1, 3), (2, 6), (3, 4, 5), (3, 4, 4, 2), (2, 3, 4, 4, 2)]),
    ((3, 4, 4, 2), jnp.bfloat16),
    ((2, 6), jnp.float16),
]


@kinds
def test_any_shape_keeps_its_shape_and_dtype_without_implicit_promotion(name, strict_promotion):
    """Tracing tells; only vectors without axes and states in half precision are run."""
    schedule = ed.schedules.edm(0.01, 20.0)
    plan = plan_of(name, 4, schedule=schedule, max_calls=6)
    gaussian = lambda x, t: x / (1 + jnp.asarray(t, x.dtype) ** 2)
    sample = lambda x_T: ed.sample(gaussian, x_T, plan, key=KEY)
    for shape, dtype in SHAPES:
        x_T = jax.ShapeDtypeStruct(shape, dtype)
        with jax.numpy_rank_promotion("raise"):
            x = jax.eval_shape(sample, x_T)
            step = lambda x_T, m: ed.update(ed.init(x_T, plan, key=KEY), m, plan)
            following = jax.eval_shape(step, x_T, jax.ShapeDtypeStruct(shape, jnp.float32)).x
        assert (x.shape, x.dtype) == (following.shape, following.dtype) == (shape, dtype)
        if len(shape) == 1 or dtype == jnp.float16:
            chex.assert_tree_all_finite(jax.jit(sample)(initial_state(schedule, shape, dtype)))


@but_slow("variance_optimal", "unipc-2", "sa_solver")
def test_bfloat16_states_follow_float32_ones(name):
    plan = plan_of(name, 8, max_calls=MAX_CALLS)
    wide, narrow = (np.asarray(run(state().astype(d), plan), np.float32) for d in (jnp.float32, jnp.bfloat16))
    assert np.median(np.abs(wide - narrow)) < 0.05


@kinds
def test_a_bfloat16_network_leaves_the_state_and_the_times_in_float32(name):
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return denoise(x.astype(jnp.bfloat16), t)

    x = jax.eval_shape(lambda x_T: ed.sample(network, x_T, plan_of(name, 4), key=KEY), state())
    assert x.dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), ())}


# -- keys


@pytest.mark.parametrize("name", ["ancestral", "churned heun", "sa_solver"])
def test_one_key_a_sample_makes_each_sample_its_own(name):
    keys, plan = jax.random.split(KEY, 3), plan_of(name, max_calls=MAX_CALLS)
    whole = run(state(), plan, keys)
    for order in ([2, 0, 1], [1, 1, 1]):
        order = np.array(order)
        chex.assert_trees_all_close(run(state()[order], plan, keys[order]), whole[order], rtol=1e-5, atol=1e-5)
    other = run(state(), plan, keys.at[0].set(jax.random.key(77)))
    chex.assert_trees_all_close(other[1:], whole[1:], rtol=1e-6, atol=1e-6)
    assert np.abs(other[0] - whole[0]).max() > 1e-2
    now = ed.init(state(), plan, key=keys)
    while not now.done:
        now = ed.update(now, denoise(now.x, now.t), plan)
    chex.assert_trees_all_close(now.x, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.fast
def test_raw_keys_are_keys_too():
    plan = plan_of("ancestral", max_calls=MAX_CALLS)
    for old, new in (
        (jax.random.PRNGKey(3), KEY),
        (jax.random.split(jax.random.PRNGKey(3), 3), jax.random.split(KEY, 3)),
    ):
        chex.assert_trees_all_equal(run(state(), plan, old), run(state(), plan, new))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (0, TypeError, r"key must be a JAX random key, got 0: pass .*jax.random.key\(0\)"),
        (0.5, TypeError, "key must be a JAX random key, got 0.5"),
        ("seed", TypeError, "key must be a JAX random key, got 'seed'"),
        (np.zeros(3), TypeError, r"got an array of float64 \(3,\)"),
        (np.zeros((2, 3), np.uint32), TypeError, r"got an array of uint32 \(2, 3\)"),
        (jax.random.split(KEY, 4), ValueError, r"one for each of the 3 samples, got \(4,\) keys"),
    ],
)
def test_what_is_no_key_is_an_error(key, error, message):
    for fn in (
        lambda: ed.sample(denoise, state(), plan_of("ancestral"), key=key),
        lambda: ed.init(state(), plan_of("ancestral"), key=key),
        lambda: EDM.noise(key, SHAPE),
        lambda: EDM.add_noise(state(), 1.0, key),
    ):
        with pytest.raises(error, match=message):
            jax.eval_shape(fn)


# -- hooks


def test_a_hook_sees_every_call_and_the_result_with_its_number_and_a_key_of_its_own():
    seen, on_data = [], []

    def hook(x, t, index, key):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda *a: seen.append([np.asarray(v) for v in a]), t, index, data, ordered=True)
        return x

    def hooked(x, t):
        jax.debug.callback(lambda t: on_data.append(float(t)), t, ordered=True)
        return denoise(x, t)

    plan = plan_of("unipc-2", 4, max_calls=9)
    x = jax.jit(lambda x, plan: ed.sample(hooked, x, plan, on_state=hook, key=KEY))(state(), plan)
    jax.effects_barrier()
    np.testing.assert_allclose(on_data, plan.table.time[:4], rtol=1e-6)
    np.testing.assert_allclose([t for t, *_ in seen], [*plan.table.time[:4], EDM.t_min], rtol=1e-6)
    assert [int(index) for _, index, _ in seen] == [0, 1, 2, 3, -1]
    assert len({data.tobytes() for *_, data in seen}) == 5
    np.testing.assert_allclose(x, run(state(), plan), rtol=1e-5, atol=1e-6)


def test_a_hook_without_a_key_gets_none_and_one_key_a_sample_as_many():
    keys = []

    def hook(x, t, index, key):
        keys.append(None if key is None else key.shape)
        return x

    ed.sample(denoise, state(), plan_of("ddim"), on_state=hook)
    ed.sample(denoise, state(), plan_of("ddim"), on_state=hook, key=jax.random.split(KEY, 3))
    assert set(keys) == {None, (3,)}


def test_the_key_of_a_hook_is_not_that_of_the_noise():
    """Noise that a hook draws and the noise of the step after it add up as independent ones."""
    plan = ed.plan(EDM, [1.0, 0.5], EVERY["ancestral"])
    draw = lambda x, t, index, key: jnp.where(index < 0, x, jax.random.normal(key, x.shape))
    x = ed.sample(lambda x, t: 0 * x, jnp.zeros((100, 100)), plan, on_state=draw, key=KEY)
    transition, noise = plan.table.transition.item(), plan.table.noise.item()
    assert float(jnp.var(x)) == pytest.approx(transition**2 + noise**2, rel=0.06)  # four standard errors
    assert transition * noise > 0.1 * (transition**2 + noise**2)


@pytest.mark.parametrize("name", ["variance_optimal", "unipc-2", "sa_solver"])
def test_hooks_act_before_every_call_and_on_the_result_in_every_form_of_the_loop(name):
    halve = lambda x, t, index, key: x.at[..., 1].multiply(0.5)
    seen = []

    def watched(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return denoise(x, t)

    plan, padded = plan_of(name, 4), plan_of(name, 4, max_calls=15)
    x, trace = ed.sample_with_trace(watched, state(), plan, on_state=halve, key=KEY)
    jax.effects_barrier()
    np.testing.assert_allclose(seen[0], halve(state(), 0, 0, None), rtol=1e-6)
    np.testing.assert_array_equal(trace.states[-1], x)
    for other in (
        ed.sample(denoise, state(), padded, on_state=halve, key=KEY),
        ed.sample(denoise, state(), padded, on_state=halve, key=KEY, remat=True),
    ):
        np.testing.assert_allclose(other, x, rtol=1e-4, atol=1e-5)
    zero = ed.sample(denoise, state(), padded, on_state=lambda x, *_: jnp.zeros_like(x), key=KEY)
    np.testing.assert_array_equal(zero, 0)


def test_the_hook_does_not_touch_the_data_that_denoise_to_zero_returns():
    zero = lambda x, *_: jnp.zeros_like(x)
    plan = plan_of("unipc-2", 4, denoise_to_zero=True)
    np.testing.assert_array_equal(ed.sample(lambda x, t: x + 3, state(), plan, on_state=zero), 3)


# -- convergence, and noise


def test_ddim_contracts_gaussian_data_as_the_ode_does(x64):
    gaussian = lambda x, t: x / (1 + t**2)
    x_T = state(jnp.float64, (4, 3))
    x = ed.sample(gaussian, x_T, plan_of("ddim", 20000, ed.grids.log_snr))
    np.testing.assert_allclose(x, x_T * np.sqrt((1 + EDM.t_min**2) / (1 + EDM.t_max**2)), rtol=1e-3)


def test_ddim_with_hardly_any_noise_is_the_deterministic_one(x64):
    times = ed.grids.karras(EDM, 5)
    little = ed.sample(denoise, state(jnp.float64), ed.plan(EDM, times, ed.solvers.ddim(eta=1e-9)), key=KEY)
    chex.assert_trees_all_close(little, run(state(jnp.float64), plan_of("ddim", 5)), atol=1e-7)


# -- pytrees


def latents(dtype=jnp.float32):
    """Image and audio latents."""
    return {"audio": (initial_state(EDM, (3, 7), dtype, seed=1),), "image": state(dtype)}


def of_each(x, t):
    """Every leaf by a model of its own."""
    return {"audio": (jnp.tanh(x["audio"][0] / (1 + t**2)),), "image": denoise(x["image"], t)}


@but_slow("variance_optimal", "sa_solver")
def test_leaves_with_models_of_their_own_run_as_each_alone(name, x64):
    x_T, plan = latents(jnp.float64), plan_of(name)
    if plan.table.noise is not None:
        plan = dataclasses.replace(plan, table=plan.table._replace(noise=0 * plan.table.noise))  # leaves' noises differ
    x = jax.jit(lambda x_T, plan: ed.sample(of_each, x_T, plan, key=KEY))(x_T, plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(x, x_T)
    audio = ed.sample(lambda x, t: jnp.tanh(x / (1 + t**2)), x_T["audio"][0], plan, key=KEY)
    np.testing.assert_allclose(x["image"], run(x_T["image"], plan), rtol=1e-10)
    np.testing.assert_allclose(x["audio"][0], audio, rtol=1e-10)


JOINT = [ed.solvers.evodiff(channel_axis=None, per_leaf=False), ed.solvers.variance_optimal(per_leaf=False)]


@pytest.mark.parametrize("solver", [pytest.param(JOINT[0], marks=pytest.mark.slow), JOINT[1]], ids=lambda s: s.name)
def test_sums_over_leaves_are_those_of_one_vector(solver, x64):
    """A vector cut in two and put back in the model: one choice of coefficients for both parts."""
    cut = lambda x: {"first": x[:, :20], "rest": x[:, 20:].reshape(-1, 4, 3)}
    joined = lambda parts: jnp.concatenate([parts["first"], parts["rest"].reshape(-1, 12)], axis=1)
    x_T, times = state(jnp.float64, (3, 32)), ed.grids.log_snr(EDM, 6)
    alone = solver._replace(rule=dataclasses.replace(solver.rule, per_leaf=True))
    whole, trace = ed.sample_with_trace(denoise, x_T, ed.plan(EDM, times, alone))
    parts, of_parts = ed.sample_with_trace(
        lambda x, t: cut(denoise(joined(x), t)), cut(x_T), ed.plan(EDM, times, solver)
    )
    np.testing.assert_allclose(joined(parts), whole, rtol=1e-10)
    chex.assert_trees_all_close(of_parts.rule, trace.rule, rtol=1e-8)
    per_leaf, of_leaves = ed.sample_with_trace(
        lambda x, t: cut(denoise(joined(x), t)), cut(x_T), ed.plan(EDM, times, alone)
    )
    assert np.abs(joined(per_leaf) - whole).max() > 1e-6
    assert set(of_leaves.rule) == {"first", "rest"}


@pytest.mark.parametrize(
    "solver",
    [pytest.param(EVERY["evodiff"], marks=pytest.mark.slow), JOINT[0], EVERY["ancestral"]],
    ids=["per leaf", "joint", "noise"],
)
def test_every_form_of_the_loop_takes_pytrees(solver, x64):
    x_T, times = latents(jnp.float64), ed.grids.log_snr(EDM, 5)
    plan, padded = ed.plan(EDM, times, solver), ed.plan(EDM, times, solver, max_calls=9)
    x, trace = ed.sample_with_trace(of_each, x_T, padded, key=KEY)
    chex.assert_shape(trace.states["image"], (10, *SHAPE))
    now = ed.init(x_T, plan, key=KEY)
    while not now.done:
        now = ed.update(now, of_each(now.x, now.t), plan)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), x_T)
    mapped = jax.vmap(lambda x: ed.sample(of_each, x, plan, key=KEY))(several)
    remat = ed.sample(of_each, x_T, padded, key=KEY, remat=True)
    for other in (now.x, remat, jax.tree.map(lambda leaf: leaf[0], mapped)):
        chex.assert_trees_all_close(other, x, rtol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [
        EVERY["sa_solver"],
        pytest.param(EVERY["evodiff"], marks=pytest.mark.slow),
        pytest.param(JOINT[0], marks=pytest.mark.slow),
    ],
    ids=["noise", "per leaf", "joint"],
)
def test_gradients_in_pytrees_are_finite(solver, x64):
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 5), solver)
    gradient = jax.grad(lambda x: jnp.sum(ed.sample(of_each, x, plan, key=KEY)["image"] ** 2))(latents(jnp.float64))
    chex.assert_tree_all_finite(gradient)
    assert np.abs(gradient["image"]).max() > 0


def test_noise_differs_between_leaves():
    x_T = {"a": jnp.zeros((500, 2)), "b": jnp.zeros((500, 2))}
    for key in (KEY, jax.random.split(KEY, 500)):
        x = ed.sample(lambda x, t: x, x_T, plan_of("ancestral"), key=key)
        assert abs(np.corrcoef(x["a"].ravel(), x["b"].ravel())[0, 1]) < 0.1


@pytest.mark.slow
def test_leaves_keep_dtypes_of_their_own(strict_promotion):
    x_T = {"low": state(jnp.bfloat16), "high": state()}
    model = lambda x, t: jax.tree.map(lambda a: (a.astype(jnp.float32) / (1 + t**2)).astype(a.dtype), x)
    for solver in (EVERY["evodiff"], *JOINT, EVERY["unipc-2"]):
        x = ed.sample(model, x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 6), solver))
        chex.assert_trees_all_equal_dtypes(x, x_T)
        np.testing.assert_allclose(x["low"].astype(jnp.float32), x["high"], atol=0.1)


def test_times_are_in_the_widest_dtype_of_the_leaves(x64):
    seen = []
    model = lambda x, t: seen.append(t.dtype) or x
    for dtypes in ((jnp.float32, jnp.float64), (jnp.float64, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        x_T = [jax.ShapeDtypeStruct((2, 3), dtype) for dtype in dtypes]
        jax.eval_shape(lambda x_T: ed.sample(model, x_T, plan_of("unipc-2", 3)), x_T)
        wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32
        assert set(seen) == {jnp.dtype(wide)}
        seen.clear()


# -- the registry


@pytest.mark.fast
def test_the_registry_tells_what_its_solvers_do():
    for name, form in FORMS.items():
        plan = ed.plan(EDM, ed.grids.log_snr(EDM, 7), form.make())
        assert int(plan.calls) == 7 * form.calls, name
        assert (plan.table.noise is not None) == form.stochastic == (form.order is None), name
        corrects = plan.rule is not None or bool(np.abs(plan.table.corrector).max() > 0)
        assert corrects == form.corrects, name
        assert form.make() is form.make()
