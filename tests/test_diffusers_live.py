"""Folders that diffusers and transformers write are read, and give their outputs: live, where these are installed.

    pytest -n 0 -m live tests/test_diffusers_live.py

Parameters are those that PyTorch starts training from. Configurations of single networks are drawn at random.
"""

import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pipelines
import pytest

import evodiff_jax as ed
from evodiff_jax import pretrained

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]  # warnings of the other libraries

PROMPTS, NEGATIVE = ["a photo of a cat", "two dogs!"], ["bad", "ugly"]
SEEDS = range(3)
# PyTorch's and XLA's convolutions in float32 sum in other orders.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def torch():
    for name in ("diffusers", "transformers"):
        pytest.importorskip(name, reason=f"{name} cannot be imported", exc_type=ImportError)
    torch = pytest.importorskip("torch", reason="torch cannot be imported", exc_type=ImportError)
    with torch.no_grad():
        yield torch


# -- from prompts to pictures


def written(torch, folder, name):
    """A pipeline of diffusers of the configurations of `pipelines`, and the folder that it wrote."""
    import diffusers
    import transformers

    config = getattr(pipelines, f"write_{name}")(folder / "configurations")
    torch.manual_seed(0)
    cls = diffusers.StableDiffusionXLPipeline if name == "xl" else diffusers.StableDiffusionPipeline
    index = json.loads((config / "model_index.json").read_text())
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {} if name == "xl" else parts
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        made = getattr(diffusers if entry[0] == "diffusers" else transformers, entry[1])
        if part == "scheduler" or part.startswith("tokenizer"):
            parts[part] = made.from_pretrained(config / part)
        elif part.startswith("text_encoder"):
            settings = transformers.CLIPTextConfig(**json.loads((config / part / "config.json").read_text()))
            parts[part] = made(settings).eval()
        else:
            parts[part] = made.from_config(made.load_config(config / part)).eval()
    pipe = cls(**parts)
    pipe.save_pretrained(folder / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder / name


def schedulers(config):
    """By name a scheduler of diffusers, its number of steps, and the plan of a schedule that does the same."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    linspace = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    return {
        "ddim": (
            DDIMScheduler.from_config(config),
            10,
            lambda schedule: ed.plan(schedule, ed.grids.leading(schedule, 10, 1), ed.solvers.ddim()),
        ),
        "dpm": (
            DPMSolverMultistepScheduler.from_config(config, **linspace),
            9,
            lambda schedule: ed.plan(schedule, ed.grids.time_uniform(schedule, 9), ed.solvers.dpm_solver_pp(2)),
        ),
    }


@pytest.mark.parametrize("name", ["sd1", "sd2", "xl"])
def test_pictures(torch, tmp_path, name):
    pipe, folder = written(torch, tmp_path, name)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    pipeline = pretrained.load_pipeline(folder)
    text = pipeline.text(pipeline.params, PROMPTS, None if name == "xl" else NEGATIVE)

    @jax.jit
    def run(params, text, x_T, plan):
        return pipeline.decode(params, ed.sample(pipeline.denoiser(params, text, 7.5), x_T, plan))

    for scheduler, steps, plan in schedulers(pipe.scheduler.config).values():
        pipe.scheduler = scheduler
        theirs = pipe(
            PROMPTS,
            negative_prompt=None if name == "xl" else NEGATIVE,
            latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=32,
            width=32,
            output_type="np",
        ).images
        assert np.std(theirs) > 0.01
        ours = run(pipeline.params, text, latents, plan(pipeline.schedule))
        np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=2e-4)


# -- networks alone, of configurations drawn at random


def nchw(torch, x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


def drawn(random, **choices):
    """One of each name's choices."""
    return {name: values[random.integers(len(values))] for name, values in choices.items()}


def levels(random):
    """Widths of up to three levels, and groups that divide them."""
    widths = [16 * int(w) for w in random.integers(1, 4, random.integers(1, 4))]
    return {"block_out_channels": widths, "norm_num_groups": int(random.choice([4, 8, 16]))}


def attending(random, count, plain, with_attention):
    """Kinds of blocks, at random those with attention, and those of the way back."""
    kinds = [bool(kind) for kind in random.integers(0, 2, count)]
    down, up = (["Down", "Up"][i] for i in (0, 1))
    make = lambda way, kinds: [(with_attention if kind else plain).format(way) for kind in kinds]
    return {"down_block_types": make(down, kinds), "up_block_types": make(up, kinds[::-1])}


def pair(torch, cls, config, folder, seed):
    """A network of diffusers, and ours from the folder that it writes."""
    torch.manual_seed(seed)
    model = cls(**config).eval()
    model.save_pretrained(folder)
    return model, pretrained.load(folder)


def ours(model, **inputs):
    return jax.jit(model.apply)(model.params, **inputs)


def close(found, expected):
    assert networks.error(found, expected) < TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_unet2d(torch, tmp_path, seed):
    from diffusers import UNet2DModel

    random = np.random.default_rng(seed)
    config = levels(random)
    count = len(config["block_out_channels"])
    config |= attending(random, count, "{}Block2D", "Attn{}Block2D")
    config |= drawn(
        random,
        layers_per_block=(1, 2),
        in_channels=(1, 3),
        out_channels=(3, 6),
        attention_head_dim=(None, 8, 16),
        downsample_padding=(0, 1),
        downsample_type=("conv", "resnet"),
        upsample_type=("conv", "resnet"),
        freq_shift=(0, 1),
        flip_sin_to_cos=(True, False),
        center_input_sample=(True, False),
        add_attention=(True, False),
        resnet_time_scale_shift=("default", "scale_shift"),
        mid_block_scale_factor=(1, 1.5),
        num_class_embeds=(None, 5),
    )
    config |= {"sample_size": 4 * 2 ** (count - 1)}
    theirs, model = pair(torch, UNet2DModel, config, tmp_path, seed)
    x = random.standard_normal((2, *[config["sample_size"]] * 2, config["in_channels"])).astype(np.float32)
    t = np.float32([3, 801.5])
    labels = None if config["num_class_embeds"] is None else np.array([0, 4])
    as_tensor = None if labels is None else torch.from_numpy(labels)
    expected = theirs(nchw(torch, x), torch.from_numpy(t), class_labels=as_tensor).sample
    close(ours(model, x=x, timesteps=t, class_labels=labels), nhwc(expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_unet2d_condition(torch, tmp_path, seed):
    from diffusers import UNet2DConditionModel

    random = np.random.default_rng(seed)
    config = levels(random)
    count = len(config["block_out_channels"])
    config |= attending(random, count, "{}Block2D", "CrossAttn{}Block2D")
    config |= drawn(
        random,
        cross_attention_dim=(24, 40),
        attention_head_dim=(2, 4, tuple(random.choice([1, 2, 4, 8], count).tolist())),
        transformer_layers_per_block=(1, 2),
        layers_per_block=(1, 2),
        in_channels=(4, 9),
        use_linear_projection=(True, False),
        freq_shift=(0, 1),
        flip_sin_to_cos=(True, False),
        downsample_padding=(0, 1),
        num_class_embeds=(None, 5),
        addition_embed_type=(None, "text_time"),
        upcast_attention=(True, False),
    )
    added = {}
    if config["addition_embed_type"]:
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 12}
        numbers = np.float32([[512, 512, 0, 0, 512, 512], [640, 384, 3, 9, 1024, 1024]])
        added = {"text_embeds": random.standard_normal((2, 12)).astype(np.float32), "time_ids": numbers}
    sides = (8 + int(random.integers(3)), 8 + int(random.integers(3)))  # they need not be multiples
    if config["downsample_padding"] == 0:
        sides = (8, 8)
    theirs, model = pair(torch, UNet2DConditionModel, {**config, "sample_size": 8}, tmp_path, seed)
    x = random.standard_normal((2, *sides, config["in_channels"])).astype(np.float32)
    text = random.standard_normal((2, 7, config["cross_attention_dim"])).astype(np.float32)
    t = np.float32([3, 801.5])
    labels = None if config["num_class_embeds"] is None else np.array([0, 4])
    expected = theirs(
        nchw(torch, x),
        torch.from_numpy(t),
        torch.from_numpy(text),
        class_labels=None if labels is None else torch.from_numpy(labels),
        added_cond_kwargs={name: torch.from_numpy(value) for name, value in added.items()} or None,
    ).sample
    inputs = {"x": x, "timesteps": t, "encoder_hidden_states": text, "class_labels": labels}
    close(ours(model, **inputs, added_cond_kwargs=added or None), nhwc(expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_autoencoder_kl(torch, tmp_path, seed):
    from diffusers import AutoencoderKL

    random = np.random.default_rng(seed)
    config = levels(random)
    count = len(config["block_out_channels"])
    config |= {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}
    config |= drawn(
        random,
        layers_per_block=(1, 2),
        latent_channels=(3, 4, 16),
        use_quant_conv=(True, False),
        use_post_quant_conv=(True, False),
        mid_block_add_attention=(True, False),
        scaling_factor=(0.18215, 0.5),
    )
    theirs, model = pair(torch, AutoencoderKL, {**config, "sample_size": 16}, tmp_path, seed)
    image = random.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    distribution = theirs.encode(nchw(torch, image)).latent_dist
    moments = jax.jit(model.encode)(model.params, image)
    mean, log_variance = np.split(moments, 2, axis=-1)
    close(mean, nhwc(distribution.mean))
    close(np.clip(log_variance, -30, 20), nhwc(distribution.logvar))
    decoded = theirs.decode(nchw(torch, np.asarray(mean))).sample
    close(jax.jit(model.decode)(model.params, mean), nhwc(decoded))
    assert model.module.scaling_factor == theirs.config.scaling_factor


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_clip_text(torch, tmp_path, seed, projection):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    random = np.random.default_rng(seed)
    config = drawn(
        random,
        hidden_size=(32, 48),
        intermediate_size=(64, 40),
        num_hidden_layers=(1, 2, 4),
        num_attention_heads=(2, 4),
        hidden_act=("quick_gelu", "gelu"),
        projection_dim=(16, 24),
        eos_token_id=(2, 49),  # 2 is that of old files, which says nothing
    )
    config = CLIPTextConfig(**config, vocab_size=50, max_position_embeddings=12, bos_token_id=48, pad_token_id=49)
    torch.manual_seed(seed)
    theirs = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    theirs.save_pretrained(tmp_path)
    model = pretrained.load(tmp_path)
    ids = random.integers(3, 48, (2, 12)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 11] = 48, 49, 49
    output = theirs(torch.from_numpy(ids).long(), output_hidden_states=True)
    found = ours(model, input_ids=ids)
    close(found["last"], output.last_hidden_state.numpy())
    close(found["penultimate"], output.hidden_states[-2].numpy())
    if projection:
        close(found["text_embeds"], output.text_embeds.numpy())
    else:
        close(found["pooled"], output.pooler_output.numpy())


@pytest.mark.parametrize("seed", SEEDS)
def test_dit(torch, tmp_path, seed):
    from diffusers import DiTTransformer2DModel

    random = np.random.default_rng(seed)
    config = drawn(
        random,
        num_attention_heads=(1, 2, 3),
        attention_head_dim=(8, 16),
        out_channels=(4, 8),
        num_layers=(1, 2, 3),
        patch_size=(1, 2, 4),
    )
    config |= {"in_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 10}
    theirs, model = pair(torch, DiTTransformer2DModel, config, tmp_path, seed)
    for parameter in theirs.parameters():  # some start at zero
        parameter.data = parameter + 0.02 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    model = pretrained.load(tmp_path)
    x = random.standard_normal((2, 8, 8, 4)).astype(np.float32)
    t, labels = np.float32([3, 801.5]), np.array([0, 10])
    expected = theirs(nchw(torch, x), torch.from_numpy(t), torch.from_numpy(labels)).sample
    close(ours(model, x=x, timesteps=t, class_labels=labels), nhwc(expected))


def test_classes_of_a_folder_of_dit(torch, tmp_path):
    """The noise is predicted beside a variance; all channels are guided, as in diffusers' pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**pipelines.DIT)
    for parameter in transformer.parameters():
        parameter.data = parameter + 0.02 * torch.randn(parameter.shape)
    parts = (transformer.eval(), AutoencoderKL(**pipelines.AUTOENCODER).eval(), DDIMScheduler(clip_sample=False))
    pipe = DiTPipeline(*parts, id2label={0: "tench"})
    pipe.save_pretrained(tmp_path / "dit")
    pipeline = pretrained.load_pipeline(tmp_path / "dit")
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    labels = jnp.array([3, 7])
    t = 500.0
    denoise = pipeline.network.denoiser(pipeline.network.params, labels, 4.0)
    found = jax.jit(denoise)(x, jnp.float32(t))
    both = [
        nhwc(transformer(nchw(torch, x), torch.full((2,), t), torch.tensor(classes)).sample)[..., :4]
        for classes in ([3, 7], [10, 10])
    ]
    eps = both[1] + 4.0 * (both[0] - both[1])
    alphas = pipe.scheduler.alphas_cumprod[int(t)].item()
    np.testing.assert_allclose(found, (x - np.sqrt(1 - alphas) * eps) / np.sqrt(alphas), rtol=1e-4, atol=1e-4)
