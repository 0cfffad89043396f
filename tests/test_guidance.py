"""Guidance: what it computes, what it costs, in which noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state

import evodiff_jax as ed
from evodiff_jax.denoisers import classifier_free_guidance, classifier_guidance, counted, from_prediction

pytestmark = pytest.mark.fast

EDM = SCHEDULES["edm"]
X = jax.random.normal(jax.random.key(0), (2, 5))
CONDITION, NULL = jnp.array([2.0, 3.0]), jnp.array([0.5, -1.0])


def network(x, t, condition):
    return jnp.tanh(x) * condition[:, None] + t


def guided(calls=None, scale=3.5, **options):
    fn = network if calls is None else counted(network, calls.append)
    return classifier_free_guidance(fn, CONDITION, NULL, scale, **options)


def formula(scale, x=X, t=1.0):
    return network(x, t, NULL) + scale * (network(x, t, CONDITION) - network(x, t, NULL))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("scale", "twice"),
    [(0, False), (1, False), (1.0, False), (np.float32(0), False), (3.5, True), (0.5, True), (-1, True)],
)
def test_guidance_extrapolates_and_costs_a_second_evaluation_only_where_needed(scale, twice, batched):
    calls = []
    x = guided(calls, scale, batched=batched)(X, 1.0)
    jax.effects_barrier()
    np.testing.assert_allclose(x, formula(scale), rtol=1e-5)
    assert calls == ([2] if not twice else [4] if batched else [2, 2])


def test_scales_may_differ_between_samples_and_be_arguments_of_the_program():
    scales = jnp.array([0.0, 4.0])
    run = jax.jit(lambda scale: guided(scale=scale)(X, 1.0))
    np.testing.assert_allclose(run(scales), formula(scales[:, None]), rtol=1e-5)
    np.testing.assert_allclose(run(jnp.float32(1.5)), formula(1.5), rtol=1e-5)
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    of_images = classifier_free_guidance(lambda x, t, c: x * c[:, None, None, None], CONDITION, NULL, scales)
    for i in range(2):
        alone = classifier_free_guidance(lambda x, t, c: x * c[:, None, None, None], CONDITION, NULL, float(scales[i]))
        np.testing.assert_allclose(of_images(images, 1.0)[i], alone(images, 1.0)[i], rtol=1e-5, atol=1e-6)


def test_negative_conditions_push_the_other_way():
    """From a negative condition, in one dimension of the condition: away from it, past the condition."""
    x = classifier_free_guidance(network, CONDITION, -CONDITION, 2.0)(X, 0.0)
    np.testing.assert_allclose(x, 3 * network(X, 0.0, CONDITION), rtol=1e-5)


def test_channels_beyond_those_guided_are_conditional():
    guided = classifier_free_guidance(network, CONDITION, NULL, 3.0)(X, 1.0)
    partly = classifier_free_guidance(network, CONDITION, NULL, 3.0, channels=1)(X, 1.0)
    np.testing.assert_array_equal(partly[..., :1], guided[..., :1])
    np.testing.assert_array_equal(partly[..., 1:], network(X, 1.0, CONDITION)[..., 1:])
    away = classifier_free_guidance(network, CONDITION, NULL, 0, channels=1)(X, 1.0)
    np.testing.assert_array_equal(away[..., 1:], network(X, 1.0, CONDITION)[..., 1:])
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
        classifier_free_guidance(network, CONDITION, NULL, 3.0, channels=0)


def test_rescaled_guidance_is_that_of_the_paper():
    x = formula(3.5)
    std = lambda a: np.std(a, axis=1, keepdims=True)
    rescaled = x * std(network(X, 1.0, CONDITION)) / std(x)
    for phi in (0.7, 1.0):
        np.testing.assert_allclose(guided(rescale=phi)(X, 1.0), phi * rescaled + (1 - phi) * x, rtol=1e-5)
    at_zero = classifier_free_guidance(network, CONDITION, NULL, 0, rescale=1.0)(X, 1.0)
    np.testing.assert_allclose(std(at_zero), std(network(X, 1.0, CONDITION)), rtol=1e-5)


def test_rescaling_constant_predictions_leaves_values_and_gradients_finite():
    constant = classifier_free_guidance(lambda x, t, c: 0 * x + c[:, None], CONDITION, NULL, 2.0, rescale=1.0)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(constant(x, 1.0)))(X)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [3.5, 0])
@pytest.mark.parametrize("kappa", [0.1, 0.2, 0.3, 2.0, 2.1])
@pytest.mark.parametrize("schedule", [EDM, SCHEDULES["vp_linear"]], ids=["edm", "vp"])
def test_guidance_in_an_interval_of_noise_levels(schedule, kappa, scale, batched):
    calls = []
    t = jnp.float32(schedule.time(-np.log(kappa)) * (1 + 1e-6))
    denoise = guided(calls, scale, batched=batched, interval=(0.2, 2.0 * (1 + 1e-4)), schedule=schedule)
    x = jax.jit(denoise)(X, t)
    jax.effects_barrier()
    inside = 0.2 <= kappa <= 2.0
    np.testing.assert_allclose(x, formula(scale if inside else 1, t=t), rtol=1e-5)
    assert sum(calls) == (4 if inside and scale else 2)


@pytest.mark.parametrize(("kappa", "inside"), [(0.25, False), (0.5, True), (2.0, True), (2.5, False)])
def test_the_interval_has_its_upper_end_and_not_its_lower_one(kappa, inside):
    """On EDM's schedule sigma / alpha is the time itself, without rounding."""
    t = jnp.float32(kappa)
    x = guided(interval=(0.25, 2.0), schedule=EDM)(X, t)
    np.testing.assert_allclose(x, formula(3.5 if inside else 1, t=t), rtol=1e-5)


@pytest.mark.parametrize("solver", [ed.solvers.evodiff(), ed.solvers.heun(), ed.solvers.dpm_solver_pp(2)])
@pytest.mark.parametrize("batched", [True, False])
def test_model_calls_and_network_evaluations_are_counted_apart(solver, batched):
    times = ed.grids.log_snr(EDM, 10)
    model_calls, evaluations = [], []
    inner = counted(lambda x, t, c: x / (1 + t**2) + 0 * c[:, None], evaluations.append)
    guide = classifier_free_guidance(inner, CONDITION, NULL, 2.0, batched=batched, interval=(0.05, 5.0), schedule=EDM)
    denoise = counted(guide, model_calls.append)
    jax.jit(lambda x: ed.sample(denoise, x, ed.plan(EDM, times, solver)))(X).block_until_ready()
    jax.effects_barrier()
    called = np.asarray(ed.plan(EDM, times, solver).table.time)
    assert len(model_calls) == called.size
    assert sum(evaluations) / 2 == called.size + np.sum((called > 0.05) & (called <= 5.0))


def test_guidance_of_noise_predictions_is_guidance_of_data_predictions():
    vp, scale, t = SCHEDULES["vp_linear"], 2.5, jnp.float32(0.4)
    of_data = classifier_free_guidance(from_prediction(network, vp, "epsilon"), CONDITION, NULL, scale)(X, t)
    of_noise = from_prediction(lambda x, t: formula(scale, x, t), vp, "epsilon")(X, t)
    np.testing.assert_allclose(of_data, of_noise, rtol=1e-4, atol=1e-5)


def test_conditions_of_any_structure_follow_their_samples():
    condition = {"text": jnp.arange(12.0).reshape(2, 3, 2), "label": (jnp.array([4, 7]),)}
    null = jax.tree.map(jnp.zeros_like, condition)

    def fn(x, t, c):
        return x + jnp.sum(c["text"], axis=(1, 2))[:, None] + c["label"][0][:, None]

    expected = X + 2 * (jnp.array([15.0, 51.0]) + jnp.array([4, 7]))[:, None]
    for batched in (True, False):
        x = classifier_free_guidance(fn, condition, null, 2.0, batched=batched)(X, 1.0)
        np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_guided_sampling_runs_under_jit_with_conditions_as_arguments():
    def fn(x, t, mean):
        return mean[:, None] + (x - mean[:, None]) * 0.01 / (0.01 + t**2)

    @jax.jit
    def run(x_T, mean):
        denoise = classifier_free_guidance(fn, mean, jnp.zeros_like(mean), 2.0)
        return ed.sample(denoise, x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 10), ed.solvers.variance_optimal()))

    x = run(initial_state(EDM, (500, 2)), jnp.full(500, 0.5))
    assert float(jnp.mean(x)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_classifier_guidance_samples_the_posterior(schedule):
    """Unit normal data and an observation y = x_0 + n of n of variance v: the guided model is the posterior's own."""
    v, y = 0.5, 1.3

    def prior(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * x / (alpha**2 + sigma**2)

    def log_prob(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = v + sigma**2 / (alpha**2 + sigma**2)  # of y given x_t
        return -jnp.sum((y - prior(x, t)) ** 2, axis=1) / (2 * variance)

    def posterior(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        mean, variance = y / (1 + v), v / (1 + v)
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    denoise = classifier_guidance(prior, log_prob, schedule, 1.0)
    for t in (0.01, 0.3, 0.9):
        np.testing.assert_allclose(denoise(X, jnp.float32(t)), posterior(X, jnp.float32(t)), rtol=1e-4, atol=1e-5)
    per_sample = classifier_guidance(prior, log_prob, schedule, jnp.array([0.0, 1.0]))(X, 0.3)
    np.testing.assert_allclose(per_sample[0], prior(X, 0.3)[0], rtol=1e-6)
    np.testing.assert_allclose(per_sample[1], posterior(X, 0.3)[1], rtol=1e-4)
