"""The recipes for networks of other libraries, live, where these are installed.

KERAS_BACKEND=jax pytest -n 0 -m live tests/test_recipes_live.py
"""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evodiff_jax as ed

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]  # warnings of the other libraries

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def block(heading):
    """The code under a heading."""
    return re.search(rf"### {re.escape(heading)}\n.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]


def tiny_stable_diffusion_3():
    from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder
    from keras_hub.src.models.stable_diffusion_3.stable_diffusion_3_backbone import StableDiffusion3Backbone
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    clips = {name: CLIPTextEncoder(50, 8, 8, 2, 2, 16, intermediate_output_index=0, name=name) for name in ("l", "g")}
    return StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=8,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=VAEBackbone([32] * 4, [1] * 4, [32] * 4, [1] * 4),
        clip_l=clips["l"],
        clip_g=clips["g"],
        image_shape=(64, 64, 3),
    )


class Preprocessor:
    """Stands for the tokenizers."""

    def generate_preprocess(self, prompts):
        ids = np.full((len(prompts), 77), 49, np.int32)
        ids[:, :5] = [[48, *(ord(letter) % 40 for letter in f"{prompt}    "[:4])] for prompt in prompts]
        return {"clip_l": ids, "clip_g": ids}


def test_stable_diffusion_3_through_keras_hub(monkeypatch):
    """The recipe runs, and its denoiser does what the network's own loop of Euler's method does."""
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras cannot be imported", exc_type=ImportError)
    models = pytest.importorskip("keras_hub", reason="keras_hub cannot be imported", exc_type=ImportError).models
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend than JAX: set KERAS_BACKEND=jax")
    keras.utils.set_random_seed(0)
    backbone = tiny_stable_diffusion_3()
    monkeypatch.setattr(models.StableDiffusion3Backbone, "from_preset", lambda preset: backbone)
    monkeypatch.setattr(models.StableDiffusion3TextToImagePreprocessor, "from_preset", lambda preset: Preprocessor())
    found = {}
    exec(compile(block("Stable Diffusion 3 through keras-hub"), "docs/recipes.md", "exec"), found)
    assert found["images"].shape == (1, 64, 64, 3)
    assert np.isfinite(found["images"]).all()
    assert np.std(found["images"]) > 0

    embeddings = backbone.encode_text_step(*found["tokens"])
    x = latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 16)), jnp.float32)
    backbone.configure_scheduler(6)
    for step in range(6):
        latents = backbone.denoise_step(latents, embeddings, step, 6, 7.0)
    sigmas = np.asarray(backbone.scheduler.sigmas, np.float64)
    schedule = ed.schedules.flow(3.0, t_min=0.0, t_max=1.0)
    plan = ed.plan(schedule, sigmas / (3 - 2 * sigmas), ed.solvers.ddim())
    text, null = embeddings[::2], embeddings[1::2]

    @jax.jit
    def run(params, text, null, x_T, plan):
        velocity = lambda x, sigma, text: found["velocity"](params, x, sigma, text)
        guided = ed.denoisers.classifier_free_guidance(velocity, text, null, 7.0)
        return ed.sample(ed.denoisers.from_prediction(guided, schedule, "velocity", time="sigma"), x_T, plan)

    ours = run(found["params"], text, null, x, plan)
    assert np.abs(latents - x).max() > 0.1
    np.testing.assert_allclose(ours, latents, rtol=1e-4, atol=1e-4)


def of_torch(torch):
    """A small network with a convolution, norm, attention and embedded times."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(4, 8, 3, padding=1)
            self.time = torch.nn.Linear(8, 8)
            self.norm = torch.nn.GroupNorm(2, 8)
            self.qkv = torch.nn.Linear(8, 24)
            self.last = torch.nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x, t):
            angles = t[:, None] * 10.0 ** -torch.arange(4.0, device=t.device)
            embedded = self.time(torch.cat([torch.sin(angles), torch.cos(angles)], -1))
            h = torch.nn.functional.silu(self.norm(self.first(x) + embedded[:, :, None, None]))
            q, k, v = self.qkv(h.flatten(2).mT).chunk(3, -1)
            attended = torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            return self.last(h + attended.mT.reshape(h.shape))

    torch.manual_seed(0)
    return Network()


def test_a_pytorch_network_through_torchax():
    """The recipe's samples are those of a loop that calls the module itself."""
    torch = pytest.importorskip("torch", reason="torch cannot be imported", exc_type=ImportError)
    try:
        import torchax  # noqa: F401
    except (ImportError, AttributeError) as error:
        pytest.skip(f"torchax cannot be imported: {error}")
    module = of_torch(torch)
    found = {"module": module}
    exec(compile(block("A PyTorch network through torchax"), "docs/recipes.md", "exec"), found)
    schedule = found["schedule"]

    def predict(x, t):
        as_tensor = torch.from_numpy(np.array(jnp.moveaxis(x, -1, 1)))
        with torch.no_grad():
            found = module(as_tensor, torch.full((len(x),), float(t)))
        return jnp.moveaxis(jnp.asarray(found.numpy()), 1, -1)

    denoise = ed.denoisers.from_prediction(predict, schedule, "epsilon")
    plan = ed.plan(schedule, ed.grids.log_snr(schedule, 10), ed.solvers.unipc(2))
    state = ed.init(found["x_T"], plan)
    while not state.done:
        state = ed.update(state, denoise(state.x, state.t), plan)
    np.testing.assert_allclose(found["x"], state.x, rtol=1e-3, atol=1e-3)
