"""States that are pytrees: predictions, guidance, corrections and editing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state

import evodiff_jax as ed
from evodiff_jax.denoisers import classifier_free_guidance, clip, dynamic_threshold, from_prediction

EDM, KEY = SCHEDULES["edm"], jax.random.key(0)
TIMES = ed.grids.log_snr(EDM, 6)
JOINT = ed.solvers.evodiff(channel_axis=None, per_leaf=False)


def latents(dtype=jnp.float32):
    """Image and audio latents."""
    image = initial_state(EDM, (3, 4, 4, 2), dtype)
    return {"audio": (initial_state(EDM, (3, 7), dtype, seed=1),), "image": image}


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
    denoise, on_state = ed.editing.inpaint(denoise, known, mask, EDM, key=KEY)
    x = jax.jit(lambda x: ed.sample(denoise, x, ed.plan(EDM, TIMES, JOINT), on_state=on_state))(x_T)
    chex.assert_tree_all_finite(x)
    np.testing.assert_array_equal(x["image"], 1)
    back = ed.editing.invert(lambda x, t: jax.tree.map(jnp.tanh, x), x, EDM, TIMES, JOINT)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, x)
    chex.assert_tree_all_finite(ed.editing.slerp(x_T, known, 0.5))
