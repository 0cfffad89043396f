"""From folders in the layout of diffusers, and prompts, to pictures.

`data/golden_pipelines.npz` holds pictures that diffusers 0.42.1 made with torch of folders that `pipelines.py` writes,
from the `latents` and the prompts below, guidance 7.5: "ddim" is DDIMScheduler in 10 steps, "dpm"
DPMSolverMultistepScheduler in 9 with timestep_spacing "linspace" and final_sigmas_type "sigma_min".
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pipelines
import pytest
import safetensors.numpy
import writers
from PIL import Image

import evodiff_jax as ed
from evodiff_jax import cli, evaluation, pretrained
from evodiff_jax.evaluation import _problems
from evodiff_jax.pretrained import loading
from evodiff_jax.pretrained.folders import read_scheduler
from evodiff_jax.pretrained.model import digest_of

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden_pipelines.npz"))
TABLES = json.loads((networks.DATA / "tables" / "tables.json").read_text())
PROMPTS, NEGATIVE = ["a photo of a cat", "two dogs!"], ["bad", "ugly"]
SOLVERS = {
    "ddim": lambda schedule: ed.plan(schedule, ed.grids.leading(schedule, 10, 1), ed.solvers.ddim()),
    "dpm": lambda schedule: ed.plan(schedule, ed.grids.time_uniform(schedule, 9), ed.solvers.dpm_solver_pp(2)),
}
QUICK = (("xl", "ddim"),)
RUNS = [(name, solver) for name in ("sd1", "sd2", "xl") for solver in SOLVERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    pipelines.write_sd1(root / "sd1")
    pipelines.write_ddpm(root / "ddpm")
    pipelines.write_dit(root / "dit")
    return root


@pytest.fixture
def sd1(folders, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(folders / "sd1", tmp_path / "sd1"))


def make(pipeline, params, text, x_T, laid_out):
    return pipeline.decode(params, ed.sample(pipeline.denoiser(params, text, 7.5), x_T, laid_out))


@pytest.mark.parametrize(
    ("name", "solver"),
    [pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow, id="-".join(run)) for run in RUNS],
)
def test_pictures_of_diffusers(tmp_path, name, solver):
    pipeline = pretrained.load_pipeline(getattr(pipelines, f"write_{name}")(tmp_path / name))
    text = pipeline.text(pipeline.params, PROMPTS, None if name == "xl" else NEGATIVE)
    run = jax.jit(lambda params, text, x_T, laid_out: make(pipeline, params, text, x_T, laid_out))
    images = run(pipeline.params, text, GOLDEN["latents"], SOLVERS[solver](pipeline.schedule))
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(np.clip(images / 2 + 0.5, 0, 1), GOLDEN[f"{name}/{solver}"], atol=5e-5)


@pytest.mark.slow
def test_sides_that_cannot_be_halved(tmp_path):
    """`odd/y` is what the U-Net of the folder in diffusers makes of latents of 7 x 9."""
    unet = pretrained.load(pipelines.write_sd1(tmp_path / "sd1") / "unet")
    given = {name: GOLDEN[f"odd/{name}"] for name in ("x", "encoder_hidden_states", "timesteps")}
    output = jax.jit(lambda params: unet.apply(params, **given))(unet.params)
    np.testing.assert_allclose(output, GOLDEN["odd/y"], atol=1e-5)


# -- what a scheduler says


def config(**settings):
    return {**pipelines.SCHEDULER, **settings}


@pytest.mark.parametrize(
    ("table", "settings"),
    [
        ("diffusers SD scaled_linear (float32)", {}),
        (
            "diffusers ddpm linear 1e-4..0.02 (float32)",
            {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": None},
        ),
        ("diffusers squaredcos_cap_v2 (float32)", {"beta_schedule": "squaredcos_cap_v2"}),
        (
            "diffusers SD scaled_linear, rescale_betas_zero_snr (float32)",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ),
    ],
)
def test_noise_levels_of_diffusers(table, settings):
    schedule = read_scheduler(config(**settings)).schedule
    stored = TABLES[table]
    alphas = schedule.alpha(np.array(stored["index"], np.float64)) ** 2
    # Stored in float32: its products of a thousand factors are off by as many roundings.
    np.testing.assert_allclose(alphas, stored["alphas_cumprod"], rtol=1e-4, atol=1e-7)


def test_what_a_scheduler_says_of_the_data():
    plain = read_scheduler(config())
    assert (plain.prediction, plain.limit, plain.percentile) == ("epsilon", None, None)
    assert plain.ignored == ("set_alpha_to_one", "skip_prk_steps", "steps_offset")
    assert read_scheduler(config(clip_sample=True, clip_sample_range=2)).limit == 2
    assert read_scheduler({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}).limit == 1
    assert read_scheduler({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}).limit is None
    dynamic = read_scheduler(config(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5))
    assert (dynamic.percentile, dynamic.limit) == (95, 1.5)
    assert read_scheduler(config(prediction_type="v_prediction")).prediction == "v"
    assert read_scheduler(config(prediction_type="sample")).prediction == "data"
    betas = list(np.linspace(0.001, 0.02, 1000))
    trained = read_scheduler({"_class_name": "DDIMScheduler", "trained_betas": betas}).schedule
    assert trained.alpha(0.0) == pytest.approx(np.sqrt(0.999))
    sigmoid = read_scheduler(config(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02)).schedule
    assert 1 - sigmoid.alpha(0.0) ** 2 == pytest.approx(1e-4 + 0.0199 / (1 + np.exp(6)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "cubic"}, "unknown beta_schedule 'cubic'; known: linear, scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "unknown prediction_type 'flow_prediction' of PNDMScheduler; known"),
        ({"num_train_timesteps": 10.5}, "a setting num_train_timesteps of the kind int, got 10.5"),
        ({"beta_start": "low"}, "a number for beta_start, got 'low'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type epsilon"),
        ({"clip_sample": "yes"}, "a setting clip_sample of the kind bool, got 'yes'"),
    ],
)
def test_schedulers_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read_scheduler(config(**settings))


def test_schedulers_of_flows_are_refused():
    with pytest.raises(ValueError, match="the scheduler is FlowMatchEulerDiscreteScheduler, without beta_schedule"):
        read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


# -- folders


def test_a_folder_of_pixels_is_a_model(folders, tmp_path):
    model = pretrained.load(folders / "ddpm")
    old = pretrained.load(pipelines.write_ddpm(tmp_path / "old", old=True))
    assert pretrained.describe_folder(tmp_path / "old")["unet"].problem == ""
    assert (model.name, model.cls, model.network.prediction) == ("ddpm", "UNet2DModel", "epsilon")
    assert model.network.limit == 1
    assert old.digest == model.digest
    x = 30 * jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    assert float(jnp.abs(jax.jit(model.denoiser(model.params))(x, 999.0)).max()) == 1


def test_a_component_is_a_model(folders):
    autoencoder = pretrained.load(folders / "sd1" / "vae")
    image = jnp.zeros((1, 32, 32, 3))
    latent = jnp.zeros((1, 8, 8, 4))
    assert jax.eval_shape(autoencoder.encode, autoencoder.params, image).shape == (1, 8, 8, 8)
    assert jax.eval_shape(autoencoder.decode, autoencoder.params, latent).shape == image.shape
    file = pretrained.load(folders / "sd1" / "vae" / "diffusion_pytorch_model.safetensors")
    assert file.digest == autoencoder.digest
    unet = pretrained.load(folders / "sd1" / "unet")
    with pytest.raises(ValueError, match=r"no noise schedule: .*; load the folder that its scheduler is in too"):
        unet.schedule  # noqa: B018
    with pytest.raises(ValueError, match=r"unet \(UNet2DConditionModel\) is no autoencoder"):
        unet.decode(unet.params, image)


def reference(folder):
    return pretrained.load(folder / "vae").params


def test_weights_in_other_files(sd1):
    expected = reference(sd1)
    file = sd1 / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    file.unlink()
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    safetensors.numpy.save_file(halves, file.with_suffix(".fp16.safetensors"))
    near = reference(sd1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3), near, expected)
    writers.write_torch_zip(sd1 / "vae" / "diffusion_pytorch_model.bin", arrays)
    jax.tree.map(np.testing.assert_array_equal, reference(sd1), expected)
    (sd1 / "vae" / "diffusion_pytorch_model.bin").unlink()
    (sd1 / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    names = sorted(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, inside in parts.items():
        safetensors.numpy.save_file({name: arrays[name] for name in inside}, sd1 / "vae" / part)
    index = sd1 / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    pipelines.write_json(index, {"weight_map": {name: part for part, inside in parts.items() for name in inside}})
    jax.tree.map(np.testing.assert_array_equal, reference(sd1), expected)
    first = digest_of(index)
    safetensors.numpy.save_file({name: arrays[name] + 1 for name in names[::2]}, sd1 / "vae" / "a.safetensors")
    assert digest_of(index) != first


def test_null_entries_of_the_index_are_no_components(folders):
    described = pretrained.describe_folder(folders / "sd1")
    assert set(described) == {"text_encoder", "unet", "vae"}
    assert {found.problem for found in described.values()} == {""}


def spoil(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(*names):
    return lambda folder: [shutil.rmtree(folder / n) if (folder / n).is_dir() else (folder / n).unlink() for n in names]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("model_index.json"),
            r"is no folder in diffusers' layout: it has neither model_index\.json nor config",
        ),
        (
            without("unet/diffusion_pytorch_model.safetensors"),
            r"unet has no file of weights: diffusion_pytorch_model\.",
        ),
        (without("scheduler"), r"has no scheduler/scheduler_config\.json, which tells the noise schedule"),
        (without("tokenizer/vocab.json"), "tokenizer"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is no JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), r"model_index\.json holds no JSON object"),
        (lambda f: spoil(f / "model_index.json", unet=[None, None]), "has neither a unet nor a transformer; its index"),
        (
            lambda f: spoil(f / "model_index.json", vae=[None, None]),
            r"has no autoencoder: load it with pretrained\.load",
        ),
        (lambda f: spoil(f / "model_index.json", tokenizer=[None, None]), "has a text_encoder without its tokenizer"),
        (lambda f: spoil(f / "model_index.json", image_encoder=["a", "B"]), "a model conditioned on images"),
        (
            lambda f: spoil(f / "vae" / "config.json", _class_name="VQModel"),
            "holds a VQModel as vae, which is not supp",
        ),
        (
            lambda f: spoil(f / "unet" / "config.json", block_out_channels=[32, 32]),
            r"unet.*safetensors: UNet2DConditionModel has",
        ),
        (
            lambda f: spoil(f / "scheduler" / "scheduler_config.json", beta_schedule="x"),
            "scheduler: unknown beta_schedule",
        ),
    ],
)
def test_folders_that_are_refused(sd1, damage, message):
    damage(sd1)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        pretrained.load_pipeline(sd1)
    assert "\n" not in str(raised.value)


def test_functions_for_other_folders_say_so(folders, tmp_path):
    with pytest.raises(ValueError, match=r"holds several networks .* load it with pretrained\.load_pipeline"):
        pretrained.load(folders / "sd1")
    with pytest.raises(ValueError, match=r"is the folder of one network: load it with pretrained\.load"):
        pretrained.load_pipeline(folders / "sd1" / "vae")
    with pytest.raises(FileNotFoundError, match="no folder"):
        pretrained.load_pipeline(tmp_path / "none")
    pipeline = pretrained.load_pipeline(folders / "dit")
    with pytest.raises(ValueError, match="has no text encoder: it takes no prompt"):
        pipeline.text(pipeline.params, ["a"])
    single = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((4, 4, 3, 3), np.float32)}
    safetensors.numpy.save_file(single, tmp_path / "v1-5.safetensors")
    with pytest.raises(ValueError, match=r"is a single file of Stable Diffusion .* as a folder in diffusers' layout"):
        pretrained.load(tmp_path / "v1-5.safetensors")


# -- parts of a pipeline


@pytest.fixture(scope="module")
def pipeline(folders):
    return pretrained.load_pipeline(folders / "sd1")


def test_a_latents_distribution(pipeline):
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)
    encode = jax.jit(pipeline.encode)
    mean, drawn = (encode(pipeline.params, images, key) for key in (None, jax.random.key(1)))
    moments = jax.jit(pipeline.autoencoder.encode)(pipeline.params["autoencoder"], images)
    np.testing.assert_allclose(mean, 0.18215 * moments[..., :4], rtol=1e-5, atol=1e-6)
    noise = jax.random.normal(jax.random.key(1), mean.shape)
    deviation = 0.18215 * np.exp(np.clip(moments[..., 4:], -30, 20) / 2)
    np.testing.assert_allclose(drawn - mean, deviation * noise, rtol=1e-3, atol=1e-5)


def test_prompts_that_are_too_long(pipeline):
    prompt = " ".join(["cat"] * 100)
    with pytest.warns(UserWarning, match="cat"):
        cut = pipeline.text(pipeline.params, [prompt])
    assert cut.condition["encoder_hidden_states"].shape == (1, 77, 32)
    whole = pipeline.text(pipeline.params, [prompt], chunks=True)
    assert whole.condition["encoder_hidden_states"].shape == (1, 3 * 77, 32)
    assert whole.null["encoder_hidden_states"].shape == (1, 3 * 77, 32)
    with pytest.raises(ValueError, match="one negative prompt a prompt is needed, got 2 prompts, 1 negative"):
        pipeline.text(pipeline.params, ["a", "b"], ["c"])


def test_clip_skip_leaves_layers_out(pipeline):
    whole, skipped = (pipeline.text(pipeline.params, ["a cat"], clip_skip=skip) for skip in (0, 1))
    different = whole.condition["encoder_hidden_states"] - skipped.condition["encoder_hidden_states"]
    assert float(jnp.abs(different).max()) > 0.1


@pytest.mark.slow
def test_an_inpainting_network_is_given_the_mask_and_the_rest_of_the_image(tmp_path):
    folder = pipelines.write_sd1(tmp_path / "inpaint", in_channels=9)
    pipeline = pretrained.load_pipeline(folder)
    assert pipeline.takes_mask
    text = pipeline.text(pipeline.params, ["a cat"])
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3), minval=-1)
    repaint = jnp.zeros((1, 32, 32, 1), bool).at[:, :5].set(True)
    given = jax.jit(pipeline.with_mask)(pipeline.params, text, image, repaint)
    beside = given.condition["beside"]
    assert beside.shape == (1, 8, 8, 5)
    np.testing.assert_array_equal(beside[0, :, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0])
    denoised = jax.jit(lambda given: pipeline.denoiser(pipeline.params, given, 2.0)(jnp.ones((1, 8, 8, 4)), 500.0))
    assert denoised(given).shape == (1, 8, 8, 4)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(tmp_path / "mask.png")
    options = ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    out = str(tmp_path / "out.png")
    assert (
        cli.main(["sample", "--checkpoint", str(folder), "--prompt", "a", "--steps", "2", "--out", out, *options]) == 0
    )


@pytest.mark.slow
def test_tiles_are_blended(pipeline):
    latents = jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
    whole, tiled = (jax.jit(pipeline.decode, static_argnums=2)(pipeline.params, latents, tile) for tile in (None, 48))
    assert tiled.shape == whole.shape == (1, 64, 64, 3)
    assert 0 < float(jnp.abs(tiled - whole).mean()) < 0.5 * float(jnp.std(whole))


# -- the command


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def sample(capsys, folder, *arguments):
    return run(capsys, "sample", "--checkpoint", folder, "--steps", 2, "--solver", "ddim", *arguments)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_command_from_prompts_to_pictures(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "info", folders / "sd1")
    assert (code, err) == (0, "")
    assert "unet           UNet2DConditionModel, " in out
    assert out.count("loads: yes") == 3

    (tmp_path / "prompts.txt").write_text("a cat\n\ntwo dogs\n")
    options = ("--guidance", 7.5, "--negative-prompt", "bad", "--guidance-rescale", 0.5, "--batch", 2, "--out", "a.png")
    code, out, err = sample(capsys, folders / "sd1", "--prompts", "prompts.txt", "--seed", 4, *options)
    assert (code, err) == (0, "")
    assert "NFE      2 model calls a sample, 4 network evaluations, guidance 7.5" in out
    assert "pictures 2 of 32 x 32, seeds 4, 5" in out
    with Image.open("a-1.png") as image:
        written = image.text
    assert written["prompt"] == "two dogs"
    assert written["seed"] == "5"
    assert written["negative prompt"] == "bad"
    assert written["calls"] == "2"
    assert written["solver"] == "ddim, 2 steps on the log_snr grid"
    assert written["digest"] == pretrained.load_pipeline(folders / "sd1").digest

    mask = np.zeros((32, 32), np.uint8)
    mask[3:17, 5:20] = 255
    Image.fromarray(mask).save("mask.png")
    changed = ("--prompt", "a cat", "--image", "a-1.png", "--mask", "mask.png", "--strength", 0.5, "--out", "c.png")
    code, out, err = sample(capsys, folders / "sd1", *changed)
    assert (code, err) == (0, "")
    assert "2 steps on the log_snr grid, the last 1 of them from the image" in out
    same = (pixels("c.png") == pixels("a-1.png")).all(-1)
    assert same[mask == 0].all()
    assert not same[mask > 0].all()


@pytest.mark.slow
def test_a_picture_is_that_of_its_prompt_and_seed_in_every_batch(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--guidance", 7.5, "--negative-prompt", "bad")
    two = ("--prompt", "a cat", "--prompt", "two dogs", "--seed", 4, "--out", "a.png")
    assert sample(capsys, folders / "sd1", *two, *options)[0] == 0
    alone = ("--prompt", "two dogs", "--seeds", 5, "--out", "b.png")
    assert sample(capsys, folders / "sd1", *alone, *options)[0] == 0
    # But for the rounding of another program.
    assert np.abs(np.int16(pixels("b.png")) - pixels("a-1.png")).max() <= 1
    assert np.abs(np.int16(pixels("a-0.png")) - pixels("a-1.png")).max() > 50
    assert sample(capsys, folders / "sd1", *alone, "--image", "b.png", "--strength", 0.01)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "makes pictures of texts: give --prompt, which the command sample has"),
        (
            ["--size", "30x32", "--prompt", "a"],
            "argument --size: sd1 makes images whose sides are multiples of 4, got 30",
        ),
        (["--size", "wide", "--prompt", "a"], "argument --size: must be height and width in pixels, such as 512x768"),
        (["--strength", "0", "--prompt", "a"], "argument --strength: must be above 0 and at most 1, got '0'"),
        (["--strength", "0.5", "--prompt", "a"], "argument --strength: not without --image"),
        (["--mask", "m.png", "--prompt", "a"], "argument --mask: not without --image"),
        (
            ["--image", "small.png", "--size", "32", "--prompt", "a"],
            "argument --image: is 8 x 16 pixels, 32 x 32 are need",
        ),
        (["--image", "no.png", "--prompt", "a"], "argument --image: cannot read 'no.png': No such file"),
        (["--image", "text.png", "--prompt", "a"], "argument --image: cannot read 'text.png': is no picture"),
        (
            ["--image", "image.png", "--mask", "small.png", "--prompt", "a"],
            "argument --mask: is 8 x 16 pixels, 32 x 32",
        ),
        (["--image", "image.png", "--mask", "black.png", "--prompt", "a"], "argument --mask: is black everywhere"),
        (["--image", "image.png"], "argument --image: not without --prompt"),
        (["--prompt", "a", "--class", "3"], "argument --class: not with --prompt"),
        (["--prompt", "a", "--seeds", "1", "2"], "argument --seeds: one a picture is needed, 1, got 2"),
        (["--prompts", "empty.txt"], "argument --prompts: 'empty.txt' has no prompt"),
        (["--prompts", "no.txt"], "argument --prompts: cannot read 'no.txt': No such file"),
        (["--prompt", "a", "--guidance-rescale", "2"], "argument --guidance-rescale: must be from 0 to 1, got '2'"),
        (["--prompt", "a", "--guidance-interval", "5", "1"], r"interval must be (low, high) with 0 <= low < high"),
        (["--prompt", "a", "--plan", "fashion_mnist-5"], "argument --plan: not with --prompt"),
        (["--prompt", "a", "--clip-skip", "9"], "skip"),
    ],
)
def test_bad_arguments_of_prompts(folders, pipeline, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_pipeline", lambda *_, **__: pipeline)  # once for all cases
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save("small.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("image.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("black.png")
    Path("text.png").write_text("no picture")
    Path("empty.txt").write_text("\n \n")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, "sample", "--checkpoint", folders / "sd1", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_prompts_for_a_model_without_text_encoder(folders, capsys):
    for checkpoint in ("fashion_mnist", folders / "ddpm", folders / "sd1" / "vae"):
        code, _, err = run(capsys, "sample", "--checkpoint", checkpoint, "--prompt", "a")
        assert code == 2
        assert "has no text encoder; it needs a folder in diffusers' layout" in err
    code, _, err = run(capsys, "sample", "--checkpoint", folders / "dit", "--prompt", "a")
    assert (code, "argument --prompt: " in err, "has no text encoder" in err) == (2, True, True)


def test_the_command_from_classes_to_pictures(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--num", 2, "--class", 3, "--guidance", 4, "--npz", "a.npz", "--out", "a.png")
    code, out, err = sample(capsys, folders / "dit", *options)
    assert code == 0
    assert "4 network evaluations, guidance 4" in out
    assert np.load("a.npz")["images"].shape == (2, 32, 32, 3)
    transformer, autoencoder = folders / "dit" / "transformer", folders / "dit" / "vae"
    code, _, err = sample(capsys, transformer, "--num", 1, "--class", 3)
    assert code == 2
    assert "makes images of 4 channels; a PNG shows 1 or 3: if they are latents, give --autoencoder" in err
    code, _, err = sample(capsys, folders / "ddpm", "--autoencoder", autoencoder)
    assert code == 2
    assert "vae has latents of 4 channels, ddpm of 3" in err


def test_a_file_of_classes_with_an_autoencoder(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_told", set())
    case = networks.Case("dit", "dit_learn_sigma")
    writers.write_torch_zip(tmp_path / "DiT-tiny.pt", case.arrays())
    heads = json.dumps({"num_heads": case.arguments["num_heads"]})
    options = ("--autoencoder", folders / "sd1" / "vae", "--config", heads, "--num", 1, "--class", 3, "--npz", "a.npz")
    code, _, err = sample(capsys, "DiT-tiny.pt", *options)
    assert code == 0
    assert "non-commercial" in err
    assert np.load("a.npz")["images"].shape == (1, 32, 32, 3)


# -- the page


PAGE = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()


def read_page(folder, headings=None):
    """Runs the blocks of the page, or of some sections, in a folder that has small models under the names in them."""
    pipelines.write_sd1(folder / "stable-diffusion-v1-5")
    pipelines.write_xl(folder / "stable-diffusion-xl-base-1.0")
    shutil.copytree(folder / "stable-diffusion-v1-5" / "vae", folder / "sd-vae-ft-ema")
    case = networks.Case("dit", "sit_learn_sigma")
    writers.write_torch_zip(folder / "SiT.pt", case.arrays())
    pretrained.convert(folder / "SiT.pt", folder / "SiT.safetensors", config=case.arguments)
    (folder / "SiT.safetensors").rename(folder / "SiT-XL-2-256x256.pt")  # a file is known by its content
    names = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.split("\n")[0]
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            if headings is None or heading in headings:
                exec(compile(block, heading, "exec"), names)
    return names


@pytest.mark.slow
def test_the_code_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read_page(tmp_path)
    assert found["make"]._cache_size() == 1  # for all numbers of steps
    image = np.asarray(found["image"])
    np.testing.assert_array_equal(pixels("cat.png"), found["picture"])
    for name in ("images", "changed", "filled", "retriever", "again", "pictures"):
        assert found[name].shape == (1, 32, 32, 3)
        assert np.isfinite(found[name]).all()
    np.testing.assert_array_equal(found["filled"][:, 16:], image[:, 16:])
    assert np.abs(found["filled"][:, :16] - image[:, :16]).max() > 0.1
    np.testing.assert_allclose(found["pictures"], made_alone(found), atol=1e-4)
    assert found["shape"] == (192, 336, 4)
    expected = [1536, 2688, 0, 0, 768, 1344]
    np.testing.assert_array_equal(found["told"].condition["added_cond_kwargs"]["time_ids"], [expected])
    assert found["latents"].shape == (1, 8, 8, 4)


def made_alone(found):
    """The pictures of the sharded run, one after the other on one device, by parameters in one place."""
    text = found["pipeline"].text(found["params"], ["a cat"], ["blurry"])
    return np.concatenate([found["make"](found["params"], text, x_T[None], found["plan"]) for x_T in found["noises"]])


@pytest.mark.slow
def test_parameters_in_parts_and_a_batch_over_four_devices_give_the_same_pictures(tmp_path):
    """In a process of its own, whose CPU JAX takes for four devices."""
    code = """
        import pathlib

        import jax
        import numpy as np

        jax.config.update("jax_disable_most_optimizations", True)
        import test_pipelines

        assert jax.device_count() == 4
        found = test_pipelines.read_page(pathlib.Path("."), ["In your own code", "Many devices"])
        pictures = found["pictures"]
        assert pictures.addressable_shards[0].data.shape == (1, 32, 32, 3)
        leaves = jax.tree.leaves(found["spread"])
        held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        assert held < 0.27 * sum(leaf.size for leaf in leaves)
        alone = test_pipelines.made_alone(found)
        assert np.abs(alone[0] - alone[1]).max() > 0.1
        np.testing.assert_allclose(pictures, alone, atol=1e-4)
        print("checked", np.abs(pictures - alone).max(), held / sum(leaf.size for leaf in leaves))
    """
    root = Path(__file__).parents[1]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "tests"), str(root)])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert result.stdout.startswith("checked"), result.stderr[-3000:]


def test_the_commands_of_the_page_are_understood():
    commands = re.findall(r"^    evodiff-jax (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        cli._parser().parse_args(shlex.split(command))


# -- comparisons


def test_samples_of_latents_are_judged_once_they_are_decoded(folders):
    pipeline = pretrained.load_pipeline(folders / "dit")
    with pytest.raises(ValueError, match="dit makes images of 4 channels, FID is of images with 1 or 3"):
        evaluation.source_of(pipeline.network)
    decode = lambda params, x: jnp.repeat(x[..., :1], 3, axis=-1)
    source = evaluation.source_of(pipeline.network, decode=decode)
    images = evaluation._fid._sampler(source, "diffusers")
    plan = SOLVERS["ddim"](pipeline.schedule)
    indices = np.arange(2, dtype=np.uint32)
    shapes = jax.eval_shape(images, source.params, jax.random.key(0), indices, None, plan)
    assert shapes[0].shape == (2, 8, 8, 3)


def test_noise_of_a_discrete_schedule_has_its_deviation(folders, tmp_path, monkeypatch):
    model = pretrained.load(folders / "ddpm")
    monkeypatch.setattr(_problems, "judged_by_itself", lambda problem, *_: problem)
    noise = evaluation.image_model("ddpm", model, 2, tmp_path).noise
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_solvers_are_compared_on_prompts(folders, capsys, tmp_path):
    options = ("--guidance", 4, "--samples", 10, "--batch", 10, "--calls", 5, "--grids", "log_snr", "--out", tmp_path)
    solvers = ("--solvers", "ddim", "dpm_solver_pp-2")
    given = ("--prompt", "a cat", "--prompt", "a dog")
    code, out, err = run(capsys, "compare", "--checkpoint", folders / "sd1", *given, *options, *solvers)
    assert (code, err) == (0, "")
    assert "judged   by the latents' means over blocks, against 20 converged samples" in out
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "results.csv", "sd1_log_snr_5_calls.png"}
    code, _, err = run(capsys, "compare", "--checkpoint", folders / "sd1", *options, *solvers)
    assert (code, "makes pictures of texts: give --prompt" in err) == (2, True)
    code, _, err = run(capsys, "compare", *given, *options, *solvers)
    assert (code, "argument --prompt: fashion_mnist has no text encoder" in err) == (2, True)
