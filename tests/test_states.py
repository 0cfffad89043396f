"""States that are pytrees with one time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.denoisers import classifier_free_guidance, clip, dynamic_threshold, from_prediction
from evodiff_jax.solvers import SOLVERS

EDM, KEY = SCHEDULES["edm"], jax.random.key(0)
TIMES = ed.grids.log_snr(EDM, 6)
every_solver = pytest.mark.parametrize("name", SOLVERS)
JOINT = ed.solvers.evodiff(channel_axis=None, per_leaf=False)


def latents(dtype=jnp.float32):
    """Image and audio latents."""
    image = initial_state(EDM, (3, 4, 4, 2), dtype)
    return {"audio": (initial_state(EDM, (3, 7), dtype, seed=1),), "image": image}


def denoise(x, t):
    """Every leaf by a model of its own."""
    audio = x["audio"][0]
    return {"audio": (jnp.tanh(audio / (1 + t**2)),), "image": mixture(EDM)(x["image"], t)}


@every_solver
def test_leaves_with_models_of_their_own_run_as_each_alone(name, x64):
    x_T, solver = latents(jnp.float64), SOLVERS[name]()
    x = jax.jit(lambda x_T: ed.sample(denoise, x_T, TIMES, EDM, solver))(x_T)
    chex.assert_trees_all_equal_shapes_and_dtypes(x, x_T)
    image = ed.sample(mixture(EDM), x_T["image"], TIMES, EDM, solver)
    audio = ed.sample(lambda x, t: jnp.tanh(x / (1 + t**2)), x_T["audio"][0], TIMES, EDM, solver)
    np.testing.assert_allclose(x["image"], image, rtol=1e-10)
    np.testing.assert_allclose(x["audio"][0], audio, rtol=1e-10)


def test_inner_products_summed_over_leaves_are_those_of_one_vector(x64):
    """A vector cut in two and put back in the model: one choice of coefficients for both parts."""

    def cut(x):
        return {"first": x[:, :20], "rest": x[:, 20:].reshape(-1, 4, 3)}

    def joined(parts):
        return jnp.concatenate([parts["first"], parts["rest"].reshape(-1, 12)], axis=1)

    model = lambda x, t: mixture(EDM)(x.reshape(-1, 4, 4, 2), t).reshape(-1, 32)  # noqa: E731
    x_T = initial_state(EDM, (3, 32), jnp.float64)
    whole, trace = ed.sample_with_trace(model, x_T, TIMES, EDM, ed.solvers.evodiff(channel_axis=None))
    parts, of_parts = ed.sample_with_trace(lambda x, t: cut(model(joined(x), t)), cut(x_T), TIMES, EDM, JOINT)
    np.testing.assert_allclose(joined(parts), whole, rtol=1e-10)
    np.testing.assert_allclose(of_parts.zeta, trace.zeta, rtol=1e-9)
    np.testing.assert_allclose(of_parts.eta, trace.eta, rtol=1e-9)
    chex.assert_trees_all_close(of_parts.gram, trace.gram, rtol=1e-9)

    per_leaf, of_leaves = ed.sample_with_trace(
        lambda x, t: cut(model(joined(x), t)), cut(x_T), TIMES, EDM, ed.solvers.evodiff(channel_axis=-1)
    )
    assert np.abs(joined(per_leaf) - whole).max() > 1e-6
    assert set(of_leaves.zeta) == {"first", "rest"}
    chex.assert_shape(of_leaves.zeta["first"], (4, 3))
    chex.assert_shape(of_leaves.zeta["rest"], (4, 3, 3))


@pytest.mark.parametrize(
    "solver", [ed.solvers.evodiff(), JOINT, ed.solvers.sde_dpm_solver_pp(2)], ids=["per leaf", "joint", "sde"]
)
def test_all_forms_of_the_loop_and_all_transformations_take_them(solver, x64):
    x_T = latents(jnp.float64)
    x, trace = ed.sample_with_trace(denoise, x_T, TIMES, EDM, solver, key=KEY)
    chex.assert_shape(trace.states["image"], (7, 3, 4, 4, 2))
    plan = ed.plan(EDM, TIMES, solver, max_calls=9)
    state = ed.stepping.init(x_T, plan, KEY)
    while not state.done:
        state = ed.stepping.update(state, denoise(state.x, state.t))
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), x_T)
    mapped = jax.vmap(lambda x: ed.sample(denoise, x, TIMES, EDM, solver, key=KEY))(several)
    for other in (
        ed.sample(denoise, x_T, TIMES, EDM, solver, key=KEY),
        ed.sample(denoise, x_T, TIMES, EDM, solver, key=KEY, remat=True),
        ed.sample_plan(denoise, x_T, plan, KEY),
        state.x,
        jax.tree.map(lambda leaf: leaf[0], mapped),
    ):
        chex.assert_trees_all_close(other, x, rtol=1e-9)
    gradient = jax.grad(lambda x: jnp.sum(ed.sample(denoise, x, TIMES, EDM, solver, key=KEY)["image"] ** 2))(x_T)
    chex.assert_tree_all_finite(gradient)


def test_noise_differs_between_leaves():
    x_T = {"a": jnp.zeros((500, 2)), "b": jnp.zeros((500, 2))}
    x = ed.sample(lambda x, t: x, x_T, TIMES, EDM, ed.solvers.sde_dpm_solver_pp(2), key=KEY)
    assert abs(np.corrcoef(x["a"].ravel(), x["b"].ravel())[0, 1]) < 0.1


def test_leaves_keep_dtypes_of_their_own(strict_promotion):
    x_T = {"low": latents(jnp.bfloat16)["image"], "high": latents()["image"]}

    def model(x, t):
        return jax.tree.map(lambda leaf: (leaf.astype(jnp.float32) / (1 + t**2)).astype(leaf.dtype), x)

    for solver in (ed.solvers.evodiff(), JOINT, ed.solvers.unipc()):
        x = ed.sample(model, x_T, TIMES, EDM, solver)
        chex.assert_trees_all_equal_dtypes(x, x_T)
        np.testing.assert_allclose(x["low"].astype(jnp.float32), x["high"], atol=0.1)


@pytest.mark.parametrize("prediction", ed.denoisers.PREDICTIONS)
def test_predictions_guidance_corrections_and_editing_take_them(prediction):
    x_T = latents()
    condition = {"text": jnp.ones((3, 2, 4)), "label": jnp.arange(3.0)}

    def network(x, t, c):
        shift = jnp.mean(c["text"], axis=(1, 2)) + c["label"]
        return jax.tree.map(lambda leaf: jnp.tanh(leaf + t + shift.reshape(-1, *(1,) * (leaf.ndim - 1))), x)

    denoise = from_prediction(network, EDM, prediction)
    null = jax.tree.map(jnp.zeros_like, condition)
    denoise = classifier_free_guidance(
        denoise, condition, null, jnp.array([1.0, 2.0, 3.0]), rescale=0.7, interval=(0.1, 5.0), schedule=EDM
    )
    denoise = clip(dynamic_threshold(denoise))
    denoise = ed.denoisers.classifier_guidance(denoise, lambda x, t: jnp.sum(x["audio"][0], axis=1), EDM, 0.1)
    known = jax.tree.map(jnp.ones_like, x_T)
    mask = {"audio": (jnp.arange(7) < 3,), "image": np.ones((4, 4, 1), bool)}
    denoise, on_state = ed.editing.inpaint(denoise, known, mask, EDM, KEY)
    x = jax.jit(lambda x: ed.sample(denoise, x, TIMES, EDM, JOINT, on_state=on_state))(x_T)
    chex.assert_tree_all_finite(x)
    np.testing.assert_allclose(x["image"], 1, atol=0.02)
    back = ed.editing.invert(lambda x, t: jax.tree.map(jnp.tanh, x), x, TIMES, EDM, JOINT)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, x)
    chex.assert_tree_all_finite(ed.editing.slerp(x_T, known, 0.5))
