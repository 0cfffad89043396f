"""A denoiser of one schedule and a plan of another are told apart, wherever both are known."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evodiff_jax as ed

EDM, VP = ed.schedules.edm(), ed.schedules.vp_linear()
DISCRETE = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
X = jnp.ones((2, 3))
KEY = jax.random.key(0)


def network(x, t):
    return 0.1 * x


def plan_of(schedule, solver=None):
    return ed.plan(schedule, ed.grids.time_uniform(schedule, 3), solver or ed.solvers.ddim())


def wrapped(denoise):
    """Everything that makes a denoiser of a denoiser."""
    guided = ed.denoisers.classifier_free_guidance(lambda x, t, c: denoise(x, t), X, X, 2.0)
    inpainting = lambda schedule: ed.editing.inpaint(denoise, X, jnp.array([True, False, False]), schedule, key=KEY)
    return {
        "as it is": denoise,
        "clip": ed.denoisers.clip(denoise),
        "dynamic_threshold": ed.denoisers.dynamic_threshold(denoise),
        "counted": ed.denoisers.counted(denoise, print),
        "clip of clip": ed.denoisers.clip(ed.denoisers.clip(denoise)),
        "classifier_guidance": ed.denoisers.classifier_guidance(denoise, lambda x, t: x.sum(1), VP, 1.0),
        "classifier_free_guidance": guided,  # of a function of the user's, which knows no schedule
        "inpaint": inpainting(VP).denoise,
    }


FROM_PREDICTION = ed.denoisers.from_prediction(network, VP, "epsilon")
CONDITIONAL = ed.denoisers.from_prediction(lambda x, t, c: 0.1 * x, VP, "epsilon")


@pytest.mark.parametrize("name", [name for name in wrapped(FROM_PREDICTION) if name != "classifier_free_guidance"])
def test_a_plan_of_another_schedule_is_an_error(name):
    denoise = wrapped(FROM_PREDICTION)[name]
    with pytest.raises(ValueError, match=r"denoise was made for another schedule than the plan's: at t = .* alpha"):
        ed.sample(denoise, X, plan_of(EDM))


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.0])
def test_guidance_keeps_the_schedule_of_its_network(scale):
    guided = ed.denoisers.classifier_free_guidance(CONDITIONAL, X, X, scale)
    with pytest.raises(ValueError, match="another schedule"):
        ed.sample(guided, X, plan_of(EDM))
    guided = ed.denoisers.classifier_free_guidance(CONDITIONAL, X, X, scale, interval=(0.1, 1.0), schedule=VP)
    with pytest.raises(ValueError, match="another schedule"):
        ed.sample(guided, X, plan_of(EDM))


def test_in_every_form_of_the_loop_before_compilation():
    run = plan_of(EDM)
    for call in (
        lambda: ed.sample(FROM_PREDICTION, X, run),
        lambda: jax.jit(lambda x, plan: ed.sample(FROM_PREDICTION, x, plan))(X, run),
        lambda: jax.vmap(lambda plan: ed.sample(FROM_PREDICTION, X, plan))(ed.stack([run, run])),
        lambda: jax.jit(lambda times: ed.sample(FROM_PREDICTION, X, ed.plan(EDM, times, ed.solvers.ddim())))(
            jnp.array([9.0, 1.0])
        ),
        lambda: ed.sample_with_trace(FROM_PREDICTION, X, run),
        lambda: ed.editing.invert(FROM_PREDICTION, X, EDM, [9.0, 1.0], ed.solvers.ddim()),
    ):
        with pytest.raises(ValueError, match="another schedule than the plan's"):
            call()


def test_functions_of_a_schedule_and_a_denoiser_of_another():
    mask = jnp.array([True, False, False])
    for call in (
        lambda: ed.denoisers.classifier_guidance(FROM_PREDICTION, lambda x, t: x.sum(1), EDM, 1.0),
        lambda: ed.denoisers.classifier_free_guidance(CONDITIONAL, X, X, 2.0, interval=(0.0, 1.0), schedule=EDM),
        lambda: ed.editing.inpaint(FROM_PREDICTION, X, mask, EDM, key=KEY),
        lambda: ed.statistics.estimate(FROM_PREDICTION, X, EDM, key=KEY),
    ):
        with pytest.raises(ValueError, match="another schedule than the schedule given for"):
            call()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ed.schedules.edm(0.0, 80.0), ed.schedules.edm(0.01, 50.0)),
        (DISCRETE, ed.schedules.discrete(ed.schedules.scaled_linear_betas(), t_min=-1.0)),
        (DISCRETE, ed.schedules.discrete(ed.schedules.scaled_linear_betas().astype(np.float32))),
        (VP, dataclasses.replace(VP, t_max=0.5)),
        (VP, ed.NoiseSchedule(VP.alpha, VP.sigma, 1e-4, 1.0)),
    ],
)
def test_the_same_levels_over_another_range_pass(one, other):
    for a, b in ((one, other), (other, one)):
        denoise = ed.denoisers.from_prediction(network, a, "v")
        assert jnp.isfinite(ed.sample(denoise, X, plan_of(b))).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ed.schedules.flow(1.0), ed.schedules.flow(3.0)),
        (DISCRETE, ed.schedules.discrete(ed.schedules.linear_betas())),
        (VP, ed.schedules.sub_vp()),
        (VP, ed.schedules.vp_linear(0.1, 19.0)),
        (DISCRETE, VP),
    ],
)
def test_schedules_that_are_alike_are_told_apart(one, other):
    for a, b in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="another schedule"):
            ed.sample(ed.denoisers.from_prediction(network, a, "v"), X, plan_of(b))


def test_what_does_not_know_its_schedule_is_not_checked():
    assert jnp.isfinite(ed.sample(lambda x, t: FROM_PREDICTION(x, t / 100), X, plan_of(EDM))).all()
    mixed = ed.stack([plan_of(EDM), plan_of(VP)])
    assert mixed.levels == ()
    assert jax.vmap(lambda plan: ed.sample(FROM_PREDICTION, X, plan))(mixed).shape == (2, 2, 3)


def test_plans_of_one_schedule_run_in_one_program_and_can_be_saved():
    run = jax.jit(lambda plan: ed.sample(FROM_PREDICTION, X, plan))
    for steps in (3, 5):
        run(ed.plan(VP, ed.grids.log_snr(VP, steps), ed.solvers.ddim(), max_calls=6))
    assert run._cache_size() == 1
    assert pickle.loads(pickle.dumps(plan_of(VP))).levels == plan_of(VP).levels
