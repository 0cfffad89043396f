"""What networks predict and what they take for time; networks of the usual libraries; the count of evaluations."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture
from flax import nnx

import evodiff_jax as ed
from evodiff_jax.denoisers import PREDICTIONS, counted, from_prediction, split_nnx
from evodiff_jax.preconditioning import precondition
from evodiff_jax.testing import as_network, gaussian

VP = SCHEDULES["vp_linear"]
FLOW = ed.schedules.flow(shift=3.0)
DISCRETE = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
SHAPE = (4, 4, 2)


@pytest.mark.parametrize("solver", [ed.solvers.unipc(2), ed.solvers.sa_solver()], ids=lambda solver: solver.name)
def test_one_network_written_in_six_forms_gives_the_same_samples(solver, x64):
    data = mixture(VP)
    x_T = initial_state(VP, (3, *SHAPE), jnp.float64)
    times, key = ed.grids.log_snr(VP, 6), jax.random.key(0)

    @jax.jit
    def in_all_forms(x_T):
        forms = [from_prediction(as_network(p, data, VP), VP, p) for p in PREDICTIONS]
        return [ed.sample(denoise, x_T, ed.plan(VP, times, solver), key=key) for denoise in forms]

    first, *others = in_all_forms(x_T)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-8, atol=1e-9)


@pytest.mark.fast
@pytest.mark.parametrize(
    "schedule",
    [SCHEDULES["edm"], FLOW, ed.schedules.sub_vp(), DISCRETE],
    ids=["edm", "flow", "sub_vp", "discrete"],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_give_the_data_back_on_schedules_of_any_kind(schedule, prediction, x64):
    data = mixture(schedule)
    denoise = from_prediction(as_network(prediction, data, schedule), schedule, prediction)
    for fraction in (0.02, 0.3, 0.7, 1.0):
        t = jnp.asarray(schedule.t_min + fraction * (schedule.t_max - schedule.t_min))
        x = initial_state(schedule, (3, *SHAPE), jnp.float64)
        np.testing.assert_allclose(denoise(x, t), data(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["data", "v", "velocity"])
def test_data_v_and_velocity_start_where_there_is_no_signal(prediction):
    """At alpha = 0 the posterior mean of unit normal data around 2 is 2."""
    schedule = ed.schedules.flow(t_min=0.0, t_max=1.0)
    exact = gaussian(schedule, 2.0, 1.0)
    denoise = from_prediction(as_network(prediction, exact.denoise, schedule), schedule, prediction)
    x_T = initial_state(schedule, (3, *SHAPE))
    times, run = ed.grids.time_uniform(schedule, 30), jax.jit(lambda plan: ed.sample(denoise, x_T, plan))
    linear = [
        ed.plan(schedule, times, s) for s in (ed.solvers.ddim(), ed.solvers.dpm_solver_pp(2), ed.solvers.unipc(3))
    ]
    for x in (*jax.vmap(run)(ed.stack(linear)), run(ed.plan(schedule, times, ed.solvers.evodiff()))):
        np.testing.assert_allclose(x, exact.solve(x_T, 1.0, 0.0), atol=0.25)  # the map of the ODE is a shift by 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_bfloat16_network_gives_data_in_the_dtype_of_the_state(prediction, strict_promotion):
    denoise = from_prediction(lambda x, t: x.astype(jnp.bfloat16), VP, prediction)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((2, 3), dtype)
        chex.assert_type(denoise(x, jnp.float32(0.5)), dtype)
        chex.assert_type(denoise(x, 0.5), dtype)


def test_the_noise_of_a_pure_noise_state_leaves_no_data():
    denoise = from_prediction(lambda x, t: x / VP.sigma(t), VP, "epsilon")
    np.testing.assert_allclose(denoise(jnp.ones((2, 3)), jnp.float32(0.7)), 0, atol=1e-6)


def time_seen(schedule, prediction, t, **options):
    seen = []
    fn = lambda x, time: (seen.append(time), x)[1]
    from_prediction(fn, schedule, prediction, **options)(jnp.ones((3, 2)), t)
    return seen[0]


@pytest.mark.fast
def test_networks_see_the_time_they_were_trained_with():
    edm = SCHEDULES["edm"]
    assert time_seen(VP, "epsilon", 0.25) == 0.25
    assert time_seen(FLOW, "velocity", 0.25, time="sigma") == 0.5  # 3 t / (1 + 2 t)
    assert time_seen(edm, "data", 2.0, time="sigma") == 2.0
    np.testing.assert_allclose(time_seen(edm, "data", 2.0, time="log_sigma"), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(time_seen(edm, "data", 2.0, time="c_noise"), np.log(2) / 4, rtol=1e-6)
    np.testing.assert_allclose(time_seen(edm, "edm", 2.0), np.log(2) / 4, rtol=1e-6)
    kappa = VP.sigma(0.3) / VP.alpha(0.3)
    np.testing.assert_allclose(time_seen(VP, "edm", 0.3), np.log(kappa) / 4, rtol=1e-5)
    np.testing.assert_allclose(time_seen(VP, "edm", 0.3, time="sigma"), kappa, rtol=1e-5)
    np.testing.assert_allclose(time_seen(VP, "v", 0.3, time="c_noise"), np.log(kappa) / 4, rtol=1e-5)
    np.testing.assert_allclose(time_seen(VP, "v", 0.3, time="log_sigma"), np.log(VP.sigma(0.3)), rtol=1e-5)
    np.testing.assert_allclose(
        time_seen(ed.schedules.edm(0.0), "data", 1e-9, time="log_sigma"), np.log(1e-9), rtol=1e-6
    )
    np.testing.assert_allclose(time_seen(VP, "v", 0.3, time=lambda t: 1000 * t - 1), 299, rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(("t", "index"), [(0.0, 0), (498.4, 498), (498.6, 499), (999.0, 999), (-1.0, 0)])
def test_the_nearest_index_and_the_interpolated_one(t, index):
    schedule = ed.schedules.discrete(ed.schedules.scaled_linear_betas(), t_min=-1)
    nearest = time_seen(schedule, "epsilon", t, time="index")
    assert (nearest, nearest.dtype) == (index, jnp.int32)
    assert time_seen(schedule, "epsilon", t) == pytest.approx(t)


@pytest.mark.parametrize("time", [None, "sigma", "index", lambda t: t / 2], ids=["t", "sigma", "index", "own"])
def test_times_for_every_sample(time):
    t = time_seen(DISCRETE, "v", 10.0, time=time, per_sample_time=True)
    chex.assert_shape(t, (3,))
    np.testing.assert_array_equal(t, time_seen(DISCRETE, "v", 10.0, time=time))


@pytest.mark.parametrize("name", ["log_sigma", "c_noise"])
def test_times_in_the_logarithm_stay_finite_where_sigma_ends_at_0(name):
    assert np.isfinite(time_seen(ed.schedules.edm(0.0), "data", 0.0, time=name))


def test_the_packaged_preconditioning_is_the_edm_prediction():
    def raw(x, c_noise):
        return jnp.tanh(x) + c_noise.reshape(-1, *(1,) * (x.ndim - 1))

    x = 3 * jax.random.normal(jax.random.key(0), (4, *SHAPE))
    here = from_prediction(raw, SCHEDULES["edm"], "edm", sigma_data=0.7, per_sample_time=True)
    np.testing.assert_allclose(here(x, 1.5), precondition(raw, 0.7)(x, 1.5), rtol=1e-6)


@pytest.mark.parametrize("schedule", [VP, FLOW, SCHEDULES["edm"]], ids=["vp", "flow", "edm"])
def test_the_exact_model_of_a_mixture_is_its_posterior_mean(schedule, x64):
    """Against the score of the noisy density by automatic differentiation: x_0 = (x + sigma^2 score) / alpha."""
    centers, std = np.random.default_rng(1).standard_normal((5, 2, 3)), 0.3
    x = jax.random.normal(jax.random.key(0), (4, 2, 3))

    def log_density(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        squares = jnp.sum((x - alpha * centers) ** 2, axis=(1, 2))
        return jax.scipy.special.logsumexp(-squares / 2 / ((alpha * std) ** 2 + sigma**2))

    denoise = jax.jit(ed.denoisers.gaussian_mixture(schedule, centers, std))
    score = jax.jit(jax.vmap(jax.grad(log_density), in_axes=(0, None)))
    for fraction in (0.1, 0.5, 1.0):
        t = jnp.asarray(schedule.t_min + fraction * (schedule.t_max - schedule.t_min))
        expected = (x + schedule.sigma(t) ** 2 * score(x, t)) / schedule.alpha(t)
        np.testing.assert_allclose(denoise(x, t), expected, rtol=1e-8, atol=1e-8)


def test_the_exact_model_where_there_is_no_signal_is_the_mean():
    denoise = ed.denoisers.gaussian_mixture(ed.schedules.flow(t_max=1.0), [[1.0, 2.0], [3.0, 0.0]], 0.1)
    np.testing.assert_allclose(denoise(jnp.ones((2, 2)), 1.0), [[2.0, 1.0]] * 2, rtol=1e-6)


# ---- networks: parameters are arguments

WIDTH = 300


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.shape[-1])(nn.Dense(WIDTH)(x) + t)


class Nnx(nnx.Module):
    def __init__(self, size, rngs):
        self.first, self.last = nnx.Linear(size, WIDTH, rngs=rngs), nnx.Linear(WIDTH, size, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # a random stream, which every call changes

    def __call__(self, x, t):
        return self.last(self.dropout(self.first(x) + t))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, size, key):
        first, last = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(size, WIDTH, key=first), eqx.nn.Linear(WIDTH, size, key=last)

    def __call__(self, x, t):
        return self.last(self.first(x) + t)


def linen():
    module = Linen()
    return module.apply, module.init(jax.random.key(0), jnp.ones((1, 8)), 0.0)


def of_nnx():
    return split_nnx(Nnx(8, nnx.Rngs(0)))


def equinox():
    arrays, static = eqx.partition(Equinox(8, jax.random.key(0)), eqx.is_array)
    return lambda arrays, x, t: jax.vmap(eqx.combine(arrays, static), in_axes=(0, None))(x, t), arrays


def plain():
    first, last = jax.random.split(jax.random.key(0))
    params = [jax.random.normal(first, (8, WIDTH)) / 8, jax.random.normal(last, (WIDTH, 8)) / WIDTH]
    return lambda params, x, t: (x @ params[0] + t) @ params[1], params


@pytest.mark.parametrize("make", [linen, of_nnx, equinox, plain])
def test_parameters_are_arguments_of_the_program_and_not_constants_in_it(make):
    fn, params = make()
    times = ed.grids.log_snr(VP, 5)

    @jax.jit
    def sample(params, x_T):
        return ed.sample(
            from_prediction(lambda x, t: fn(params, x, t), VP, "v"),
            x_T,
            ed.plan(VP, times, ed.solvers.unipc(2)),
        )

    x_T = initial_state(VP, (3, 8))
    lowered = sample.lower(params, x_T)
    text = lowered.as_text()
    weights = f"tensor<8x{WIDTH}xf32>", f"tensor<{WIDTH}x8xf32>"
    if make is equinox:
        weights = weights[::-1]
    main = text[text.index("@main") :].splitlines()[0]
    assert all(f": {weight}" in main for weight in weights)
    assert not any("constant" in line and str(WIDTH) in line and 'dense<"' in line for line in text.splitlines())
    x = sample(params, x_T)
    chex.assert_tree_all_finite(x)
    doubled = jax.tree.map(lambda leaf: 2 * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
    assert np.abs(sample(doubled, x_T) - x).max() > 1e-3
    assert sample._cache_size() == 1


def test_an_nnx_module_is_left_as_it_was():
    module = Nnx(8, nnx.Rngs(0))
    fn, params = split_nnx(module)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    first = fn(params, x, 0.5)
    np.testing.assert_allclose(jax.jit(fn)(params, x, 0.5), first, rtol=1e-5)
    np.testing.assert_array_equal(module(x, 0.5), first)
    assert np.abs(module(x, 0.5) - first).max() > 1e-3  # its own stream has moved on
    np.testing.assert_array_equal(fn(params, x, 0.5), first)


@pytest.mark.parametrize("jit", [False, True])
def test_evaluations_are_counted_when_they_are_run(jit):
    calls = []
    denoise = counted(lambda x, t: x / (1 + t), calls.append)

    def run(x_T):
        return ed.sample(denoise, x_T, ed.plan(VP, ed.grids.log_snr(VP, 7), ed.solvers.unipc(2)))

    run = jax.jit(run) if jit else run
    for _ in range(2):
        run(jnp.ones((3, 5))).block_until_ready()
    jax.effects_barrier()
    assert calls == [3] * 14


def test_a_network_that_fails_with_a_scalar_time_gets_a_note_on_it():
    schedule = ed.schedules.vp_linear()
    network = lambda x, t: x * t[:, None]
    with pytest.raises(IndexError) as caught:
        ed.denoisers.from_prediction(network, schedule, "epsilon")(jnp.ones((2, 3)), 0.5)
    assert "one time for the whole batch" in caught.value.__notes__[0]
    assert "per_sample_time=True" in caught.value.__notes__[0]
    ed.denoisers.from_prediction(network, schedule, "epsilon", per_sample_time=True)(jnp.ones((2, 3)), 0.5)
