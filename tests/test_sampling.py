"""What holds for every solver: calls, tracing, transformations, dtypes, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.solvers import SOLVERS

EDM = SCHEDULES["edm"]
# One of each kind: adaptive, without memory, with a corrector, with noise predictions for outputs.
KINDS = ("evodiff", "evodiff_reference", "ddim", "unipc", "dpm_solver")
solvers = pytest.mark.parametrize("solver", [SOLVERS[name]() for name in KINDS], ids=KINDS)
SHAPES = [(5,), (1, 3), (2, 6), (3, 4, 5), (3, 4, 4, 2), (2, 3, 4, 4, 2)]


def gaussian(x, t):
    """The posterior mean of standard normal data under EDM."""
    return x / (1 + jnp.asarray(t, x.dtype) ** 2)


@solvers
@pytest.mark.parametrize(("steps", "denoise_to_zero"), [(1, False), (1, True), (2, True), (7, False), (7, True)])
def test_exactly_one_call_a_step_at_the_times_of_the_run(solver, steps, denoise_to_zero):
    called = []

    def counting(x, t):
        jax.debug.callback(lambda t: called.append(float(t)), t, ordered=True)
        return gaussian(x, t)

    times = ed.grids.log_snr(EDM, steps)
    x_T = initial_state(EDM, (2, 4, 4, 2))
    ed.sample(counting, x_T, times, EDM, solver, denoise_to_zero=denoise_to_zero).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(called, times if denoise_to_zero else times[:-1], rtol=1e-6)


@solvers
@pytest.mark.parametrize("denoise_to_zero", [False, True])
def test_the_network_is_traced_once_and_stands_once_in_the_program(solver, denoise_to_zero):
    traces = []
    weights = jnp.ones((3, 5))

    def network(x, t):
        traces.append(t)
        return gaussian(x, t) + 0 * jnp.tanh(x @ weights @ weights.T)

    sizes = set()
    for steps in (2, 5, 50):
        traces.clear()
        times = ed.grids.log_snr(EDM, steps)
        run = jax.jit(lambda x: ed.sample(network, x, times, EDM, solver, denoise_to_zero))  # noqa: B023
        lowered = run.lower(jnp.ones((2, 4, 4, 3)))
        assert len(traces) == 1
        text = lowered.as_text()
        assert text.count("stablehlo.tanh") == 1
        sizes.add(text.count("\n"))
    assert len(sizes) == 1


@solvers
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, jnp.float32) for shape in SHAPES), ((3, 4, 4, 2), jnp.bfloat16), ((2, 6), jnp.float16)],
    ids=str,
)
def test_any_shape_keeps_its_shape_and_dtype(solver, shape, dtype, strict_promotion):
    x_T = initial_state(ed.schedules.edm(0.01, 20.0), shape, dtype)
    schedule = ed.schedules.edm(0.01, 20.0)
    x = ed.sample(gaussian, x_T, ed.grids.log_snr(schedule, 4), schedule, solver)
    chex.assert_shape(x, shape)
    chex.assert_type(x, dtype)
    chex.assert_tree_all_finite(x)


@solvers
def test_bfloat16_states_follow_float32_ones(solver):
    x_T = initial_state(EDM, (4, 4, 4, 2))
    times = ed.grids.log_snr(EDM, 8)
    wide, narrow = (
        np.asarray(ed.sample(mixture(EDM), x_T.astype(d), times, EDM, solver), np.float32)
        for d in (jnp.float32, jnp.bfloat16)
    )
    assert np.median(np.abs(wide - narrow)) < 0.05


@solvers
def test_a_bfloat16_network_leaves_the_state_and_the_times_in_float32(solver):
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return gaussian(x.astype(jnp.bfloat16), t)

    x = ed.sample(network, initial_state(EDM, (2, 4, 4, 2)), ed.grids.log_snr(EDM, 4), EDM, solver)
    assert x.dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), ())}


@solvers
def test_times_reach_a_bfloat16_model_unrounded(solver):
    times = ed.grids.log_snr(EDM, 4)
    seen = []

    def network(x, t):
        jax.debug.callback(lambda t: seen.append(t), t, ordered=True)
        return gaussian(x, t)

    ed.sample(network, initial_state(EDM, (2, 3), jnp.bfloat16), times, EDM, solver).block_until_ready()
    jax.effects_barrier()
    assert seen[0].dtype == np.float32
    np.testing.assert_allclose(seen, times[:-1], rtol=1e-6)


class Variants(chex.TestCase):
    """chex runs each test with and without jit."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_jit_equals_no_jit(self):
        x_T = initial_state(EDM, (3, 4, 4, 2))
        times = ed.grids.karras(EDM, 4)
        for name in KINDS:
            sample = functools.partial(ed.sample, mixture(EDM), times=times, schedule=EDM, solver=SOLVERS[name]())
            x = self.variant(sample)(x_T)
            with jax.disable_jit():
                expected = sample(x_T)
            chex.assert_trees_all_close(x, expected, rtol=2e-4, atol=2e-4)


@solvers
def test_vmap_over_runs_equals_a_loop(solver):
    times = ed.grids.log_snr(EDM, 6)
    x_T = initial_state(EDM, (5, 3, 4, 4, 2))
    sample = jax.jit(lambda x: ed.sample(mixture(EDM), x, times, EDM, solver))
    together = jax.jit(jax.vmap(sample))(x_T)
    chex.assert_trees_all_close(together, jnp.stack([sample(x) for x in x_T]), rtol=1e-4, atol=1e-4)


@solvers
def test_vmap_over_times_equals_a_loop(solver, x64):
    grids = np.stack([grid(EDM, 6) for grid in (ed.grids.log_snr, ed.grids.karras, ed.grids.time_quadratic)])
    x_T = initial_state(EDM, (3, 4, 4, 2), jnp.float64)
    together = jax.jit(jax.vmap(lambda t: ed.sample(mixture(EDM), x_T, t, EDM, solver)))(grids)
    for times, x in zip(grids, together, strict=True):
        chex.assert_trees_all_close(x, ed.sample(mixture(EDM), x_T, times, EDM, solver), rtol=1e-10)


@solvers
def test_traced_times_equal_concrete_ones(solver):
    times = ed.grids.log_snr(EDM, 6)
    x_T = initial_state(EDM, (3, 4, 4, 2))
    traced = jax.jit(lambda x, t: ed.sample(mixture(EDM), x, t, EDM, solver))(x_T, times)
    chex.assert_trees_all_close(traced, ed.sample(mixture(EDM), x_T, times, EDM, solver), rtol=2e-4, atol=2e-4)


@solvers
@pytest.mark.parametrize("shape", [(6, 4, 4, 2), (6, 5)], ids=str)
def test_samples_do_not_depend_on_their_batch(solver, shape):
    times = ed.grids.log_snr(EDM, 7)
    x_T = initial_state(EDM, shape)
    sample = jax.jit(lambda x: ed.sample(lambda x, t: jnp.tanh(x) / (1 + t), x, times, EDM, solver))
    whole = sample(x_T)
    order = np.array([3, 0, 5, 1, 4, 2])
    chex.assert_trees_all_close(sample(x_T[order]), whole[order], rtol=1e-5, atol=1e-5)
    for i in range(6):
        chex.assert_trees_all_close(sample(x_T[i : i + 1])[0], whole[i], rtol=1e-5, atol=1e-5)


@solvers
def test_gradients_are_finite_and_those_of_finite_differences(solver, x64):
    schedule = ed.schedules.edm(0.05, 10.0)
    times = ed.grids.log_snr(schedule, 6)
    x_T = initial_state(schedule, (2, 4, 4, 2), jnp.float64)
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(ed.sample(mixture(schedule), x, times, schedule, solver))))
    gradient = jax.grad(loss)(x_T)
    chex.assert_tree_all_finite(gradient)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=x_T.shape))
    step = 1e-6
    numeric = (loss(x_T + step * direction) - loss(x_T - step * direction)) / (2 * step)
    assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(numeric), rel=1e-4)


@solvers
def test_the_trace_has_the_states_the_model_saw_corrected(solver):
    times = ed.grids.log_snr(EDM, 6)
    x_T = initial_state(EDM, (3, 4, 4, 2))
    for denoise_to_zero in (False, True):
        x, trace = ed.sample_with_trace(mixture(EDM), x_T, times, EDM, solver, denoise_to_zero)
        chex.assert_shape(trace.states, (7, *x_T.shape))
        np.testing.assert_allclose(trace.times, times, rtol=1e-6)
        chex.assert_trees_all_equal(trace.states[0], x_T)
        expected = ed.sample(mixture(EDM), x_T, times, EDM, solver, denoise_to_zero)
        chex.assert_trees_all_close(x, expected, rtol=1e-5, atol=1e-5)
        last = trace.states[-1]
        last = mixture(EDM)(last, jnp.float32(times[-1])) if denoise_to_zero else last
        chex.assert_trees_all_close(x, last, rtol=1e-4, atol=1e-5)


@solvers
def test_all_solvers_agree_in_the_limit_of_many_steps(solver, x64):
    schedule = ed.schedules.edm(0.1, 10.0)
    if solver.name == "evodiff_reference":
        pytest.skip("its last step scales the sample by 1 - sqrt(sigma_t sigma_0): it does not converge")
    x_T = initial_state(schedule, (4, 4, 4, 2), jnp.float64)
    exact = ed.sample(mixture(schedule), x_T, ed.grids.log_snr(schedule, 4000), schedule, ed.solvers.ddim())
    x = ed.sample(mixture(schedule), x_T, ed.grids.log_snr(schedule, 400), schedule, solver)
    assert float(jnp.sqrt(jnp.mean((x - exact) ** 2))) < 0.01


def test_ddim_is_exact_for_gaussian_data_in_the_limit_and_contracts_as_the_ode_does(x64):
    x_T = initial_state(EDM, (4, 3), jnp.float64)
    x = ed.sample(gaussian, x_T, ed.grids.log_snr(EDM, 20000), EDM, ed.solvers.ddim())
    np.testing.assert_allclose(x, x_T * np.sqrt((1 + EDM.t_min**2) / (1 + EDM.t_max**2)), rtol=1e-3)


def test_stochastic_ddim_has_the_exact_covariance_and_depends_on_its_key_alone():
    schedule = SCHEDULES["vp_linear"]

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * x

    times = ed.grids.log_snr(schedule, 800)
    x_T = initial_state(schedule, (20000, 2))
    ancestral = ed.solvers.ddim(eta=1.0)
    sample = jax.jit(lambda key: ed.sample(denoise, x_T, times, schedule, ancestral, key=key))
    x = sample(jax.random.key(0))
    np.testing.assert_allclose(np.cov(x.T), 0.25 * np.eye(2), atol=0.01)
    chex.assert_trees_all_equal(x, sample(jax.random.key(0)))
    assert np.max(np.abs(x - sample(jax.random.key(1)))) > 0.1


def test_ddim_without_noise_is_the_deterministic_one(x64):
    times = ed.grids.karras(EDM, 5)
    x_T = initial_state(EDM, (4, 3), jnp.float64)
    little = ed.sample(gaussian, x_T, times, EDM, ed.solvers.ddim(eta=1e-9), key=jax.random.key(0))
    chex.assert_trees_all_close(little, ed.sample(gaussian, x_T, times, EDM, ed.solvers.ddim()), atol=1e-7)


X = np.ones((2, 3), np.float32)
TIMES = ed.grids.log_snr(EDM, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x_T": np.ones((2, 3), int)}, TypeError, "x_T must be floating-point, got int"),
        ({"x_T": np.ones((2, 3), complex)}, TypeError, "x_T must be floating-point, got complex"),
        ({"x_T": np.float32(1)}, ValueError, "batch axis"),
        ({"times": TIMES[:1]}, ValueError, "N \\+ 1 >= 2 times"),
        ({"times": TIMES[None]}, ValueError, "in one dimension"),
        ({"times": TIMES[::-1]}, ValueError, "strictly decreasing.*times\\[0\\] = 0.002"),
        ({"times": np.array([3.0, 2.0, 2.0, 1.0])}, ValueError, "times\\[1\\] = 2.0 and times\\[2\\] = 2.0"),
        ({"times": np.array([3.0, np.nan])}, ValueError, "finite"),
        ({"times": np.array([81.0, 1.0])}, ValueError, "within the schedule's 0.002 to 80.0"),
        ({"times": np.array([80.0, 0.0])}, ValueError, "within the schedule's"),
        ({"solver": ed.solvers.ddim(eta=1.0)}, ValueError, "stochastic: pass key"),
        ({"solver": ed.solvers.evodiff}, TypeError, "solver must be a Solver"),
        ({"solver": "evodiff"}, TypeError, "solver must be a Solver"),
        ({"schedule": ed.schedules.edm}, TypeError, "schedule must be a NoiseSchedule"),
        ({"denoise": lambda x, t: None}, TypeError, "it returned NoneType"),
        ({"denoise": lambda x, t: (x, x)}, TypeError, "it returned tuple"),
        ({"denoise": lambda x, t: x > 0}, TypeError, "an array of bool"),
        ({"denoise": lambda x, t: x[:1]}, ValueError, "the shape of x, \\(2, 3\\), it returned \\(1, 3\\)"),
        ({"x_T": np.ones((2, 4, 4, 2), np.float32), "solver": ed.solvers.evodiff(7)}, ValueError, "channel_axis=7"),
    ],
)
@pytest.mark.parametrize("sample", [ed.sample, ed.sample_with_trace])
def test_bad_arguments_are_errors_before_compilation(arguments, error, message, sample):
    arguments = {"denoise": gaussian, "x_T": X, "times": TIMES, "schedule": EDM, **arguments}
    with pytest.raises(error, match=message):
        sample(**arguments)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_bad_ddim_eta(eta):
    with pytest.raises(ValueError, match="0 <= eta <= 1"):
        ed.solvers.ddim(eta)
