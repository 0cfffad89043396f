"""From files of weights to models, in the library and on the command line."""

import json
import re
import shlex
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import safetensors.numpy
import writers

import evodiff_jax as ed
from evodiff_jax import cli, pretrained
from evodiff_jax.pretrained import loading
from evodiff_jax.pretrained.reading import read

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]

EDM = networks.drawn("edm", *networks.TINY_EDM)
ADM = networks.drawn("adm", *networks.TINY_ADM)
CLASSIFIER = networks.drawn("adm", *networks.TINY_CLASSIFIER)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_told", set())
    return tmp_path


@pytest.fixture
def edm_file(folder):
    writers.write_edm_pickle(folder / "tiny.pkl", *networks.TINY_EDM, EDM)
    return "tiny.pkl"


@pytest.fixture
def adm_file(folder):
    writers.write_torch_zip(folder / "adm.pt", ADM)
    return "adm.pt"


@pytest.fixture
def classifier_file(folder):
    writers.write_torch_legacy(folder / "guide.pt", CLASSIFIER)
    return "guide.pt"


ADM_CONFIG = json.dumps(networks.TINY_ADM[1])
GUIDE_CONFIG = json.dumps(networks.TINY_CLASSIFIER[1])


def run(capsys, *arguments):
    """The exit code, and what was printed to stdout and stderr."""
    code = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys, folder, arguments, reason):
    before = sorted(folder.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.startswith("evodiff-jax: error: ")
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


# Loading


@pytest.mark.parametrize("stored", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("write", [writers.write_torch_zip, writers.write_torch_legacy, safetensors.numpy.save_file])
def test_the_same_model_from_every_format(folder, write, stored):
    arrays = {name: array.astype(stored) for name, array in ADM.items()}
    path = folder / "weights.any"
    if write is safetensors.numpy.save_file:
        write(arrays, path)
    else:
        write(path, arrays)
    model = pretrained.load(path, config=networks.TINY_ADM[1])
    expected = pretrained.from_state("adm", *networks.TINY_ADM, arrays)
    chex.assert_trees_all_equal(model.params, expected.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert (model.name, model.image_shape, model.num_classes, model.null_class) == ("weights.any", (8, 8, 1), 3, None)
    assert (model.source, model.licence, len(model.digest)) == ("openai/guided-diffusion", "MIT", 64)
    assert model.schedule.num_timesteps == 1000


def test_an_edm_pickle_brings_its_configuration(folder, edm_file, capsys):
    model = pretrained.load(edm_file)
    expected = pretrained.from_state("edm", *networks.TINY_EDM, EDM)
    chex.assert_trees_all_equal(model.params, expected.params)
    assert (model.cls, model.image_shape, model.num_classes, model.null_class) == ("EDMPrecond", (8, 8, 1), 3, 3)
    assert (model.schedule.t_min, model.schedule.t_max) == (0.002, 80.0)
    assert "non-commercial" in model.licence
    pretrained.load(edm_file)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("CC BY-NC-SA 4.0") == 1


def test_settings_of_the_caller_go_before_those_of_the_file(folder, edm_file):
    assert pretrained.load(edm_file, config={"sigma_max": 10.0}).schedule.t_max == 10.0
    with pytest.raises(ValueError, match=r"tiny\.pkl: EDMPrecond has no setting colour"):
        pretrained.load(edm_file, config={"colour": 1})
    with pytest.raises(ValueError, match="has its configuration with it"):
        pretrained.load("fashion_mnist", config={"heads": 2})


def test_the_state_dict_of_a_training_checkpoint(folder):
    zeros = {name: 0 * array for name, array in ADM.items()}
    wrap = lambda state: {"model": writers.state_dict(zeros), "ema": state, "steps": 3}
    writers.write_torch_zip(folder / "run.pt", ADM, wrap=wrap)
    with pytest.raises(ValueError, match=r"'model', 'ema'"):
        pretrained.load("run.pt", config=networks.TINY_ADM[1])
    model = pretrained.load("run.pt", config=networks.TINY_ADM[1], entry="ema")
    expected = pretrained.from_state("adm", *networks.TINY_ADM, ADM)
    chex.assert_trees_all_equal(model.params, expected.params)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("other.pt", None, r"named like none of the released ones \(64x64_diffusion.*give config"),
        ("64x64_diffusion.pt", None, r"64x64_diffusion\.pt: UNetModel needs the arrays .* \(\d+ in all\)"),
        ("64_256_upsampler.pt", None, "enlarges images, which is not supported"),
        ("other.pt", {"model_channels": 32}, "UNetModel needs image_size, in_channels, out_channels"),
        ("other.pt", {**networks.TINY_ADM[1], "cls": "Net"}, "unknown class 'Net' of family 'adm'"),
        ("other.pt", {**networks.TINY_ADM[1], "num_res_blocks": 2}, r"needs the arrays input_blocks\.2\.0"),
        ("other.pt", {**networks.TINY_ADM[1], "num_classes": None}, r"has no use for the arrays label_emb\.weight"),
    ],
)
def test_guided_diffusion_needs_a_configuration_that_fits(folder, name, config, message):
    writers.write_torch_zip(folder / name, ADM)
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(folder / name, config=config)
    assert "\n" not in str(error.value)


def test_flags_of_the_release_will_do_for_a_configuration(folder):
    flags = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "num_heads": 2}
    flags |= {"attention_resolutions": "8", "class_cond": True, "learn_sigma": True, "noise_schedule": "cosine"}
    module = pretrained.model.build("adm", "UNetModel", flags).module
    expected = pretrained.model.build("adm", "UNetModel", {**networks.TINY_ADM[1], "in_channels": 3, "out_channels": 6})
    assert module == expected.module.clone(num_classes=1000)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w": np.zeros(3, np.float32)}, r"holds no network that is known here .*its arrays begin with w"),
        (dict(EDM), "a network of EDM without its configuration: give config"),
        ({**ADM, "time_embed.0.bias": np.zeros(128, np.int64)}, "float"),
    ],
)
def test_arrays_that_are_no_network(folder, arrays, message):
    writers.write_torch_zip(folder / "x.pt", arrays)
    config = networks.TINY_ADM[1] if "time_embed.0.bias" in arrays else None
    with pytest.raises(ValueError, match=message):
        pretrained.load("x.pt", config=config)


def test_unknown_names_and_missing_files(folder):
    with pytest.raises(ValueError, match="no packaged model 'cifar10'; there are: fashion_mnist"):
        pretrained.load("cifar10")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.pkl"):
        pretrained.load("nowhere.pkl")
    with pytest.raises(ValueError, match="is no folder in diffusers"):
        pretrained.load(folder)


# What a model does


def test_labels_and_guidance_are_checked_before_anything_is_computed(folder):
    edm = pretrained.from_state("edm", *networks.TINY_EDM, EDM)
    adm = pretrained.from_state("adm", *networks.TINY_ADM, ADM)
    guide = pretrained.from_state("adm", *networks.TINY_CLASSIFIER, CLASSIFIER)
    settings = {**networks.TINY_EDM[1], "label_dim": 0}
    unconditional = pretrained.from_state(
        "edm", "EDMPrecond", settings, {name: a for name, a in EDM.items() if "map_label" not in name}
    )
    for call, message in (
        (lambda: unconditional.denoiser(unconditional.params, np.zeros(2, np.int32)), "which takes no label"),
        (lambda: unconditional.denoiser(unconditional.params, guidance=2.0), "guidance must be 1, got 2.0"),
        (lambda: adm.denoiser(adm.params), r"needs labels, integers in 0 \.\. 2"),
        (lambda: adm.denoiser(adm.params, np.array([0, 3])), r"must be in 0 \.\. 2, got 0 to 3"),
        (lambda: adm.denoiser(adm.params, np.array([0, 1]), guidance=2.0), "guide with a classifier"),
        (lambda: edm.denoiser(edm.params, guidance=2.0), "needs labels"),
        (lambda: edm.denoiser(edm.params, np.array([4])), r"must be in 0 \.\. 3 \(3 is no class\), got 4 to 4"),
        (lambda: guide.denoiser(guide.params, np.array([0])), "is no diffusion model, it predicts: class"),
        (lambda: edm.log_prob(edm.params, np.array([0])), "is no classifier of noisy images"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_guidance_of_an_edm_network_is_away_from_no_class():
    model = pretrained.from_state("edm", *networks.TINY_EDM, EDM)
    x, label = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), np.array([0, 2])
    of = lambda label, guidance=1.0: jax.jit(model.denoiser(model.params, label, guidance))(x, 1.0)
    null, conditional = of(np.array([3, 3])), of(label)
    np.testing.assert_allclose(of(label, 2.5), null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of(None), null, rtol=1e-6)
    assert float(jnp.max(jnp.abs(conditional - null))) > 1e-3


def test_a_classifier_guides_a_model_of_its_schedule():
    model = pretrained.from_state("adm", *networks.TINY_ADM, ADM)
    guide = pretrained.from_state("adm", *networks.TINY_CLASSIFIER, CLASSIFIER)
    x, label = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), np.array([0, 2])
    denoise, log_prob = model.denoiser(model.params, label), guide.log_prob(guide.params, label)
    t = jnp.float32(500.0)
    logits = jax.jit(guide.apply)(guide.params, x=x, timesteps=np.float32([500, 500]))
    np.testing.assert_allclose(jax.jit(log_prob)(x, t), jax.nn.log_softmax(logits)[np.arange(2), label], rtol=1e-5)
    guided = jax.jit(ed.denoisers.classifier_guidance(denoise, log_prob, model.schedule, 3.0))(x, t)
    gradient = jax.jit(jax.grad(lambda x: log_prob(x, t).sum()))(x)
    alpha, sigma = (float(f(500.0)) for f in (model.schedule.alpha, model.schedule.sigma))
    np.testing.assert_allclose(guided, jax.jit(denoise)(x, t) + 3 * sigma**2 / alpha * gradient, rtol=1e-4, atol=1e-5)


# The command line


def test_from_a_pickle_to_pictures(folder, edm_file, capsys):
    code, out, _ = run(capsys, "info", edm_file)
    assert code == 0
    for line in (
        "tiny.pkl, EDM pickle",
        "EDMPrecond (family edm)",
        '"label_dim": 3',
        "CC BY-NC-SA 4.0",
        "loads    yes",
    ):
        assert line in out
    assert f"arrays   {len(EDM)} ({len(EDM)} float32)" in out
    sampling = ("--num", 4, "--steps", 3, "--solver", "unipc-2", "--npz", "x.npz")
    code, out, err = run(capsys, "sample", "--checkpoint", edm_file, *sampling)
    assert code == 0
    assert err == "tiny.pkl: weights of NVlabs/edm, licence CC BY-NC-SA 4.0, for non-commercial use\n"
    assert "3 model calls a sample" in out
    images = dict(np.load("x.npz"))
    assert images["images"].shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(images["labels"], [0, 1, 2, 0])

    code, out, _ = run(capsys, "convert", edm_file, "tiny.safetensors")
    assert (code, out) == (0, f"output   tiny.safetensors, {(folder / 'tiny.safetensors').stat().st_size:,} bytes\n")
    assert set(read("tiny.safetensors").arrays) == set(EDM)
    assert run(capsys, "sample", "--checkpoint", "tiny.safetensors", *sampling)[0] == 0
    chex.assert_trees_all_equal(dict(np.load("x.npz")), images)
    code, out, _ = run(capsys, "info", "tiny.safetensors")
    assert "EDMPrecond (family edm)" in out
    assert "CC BY-NC-SA 4.0" in out


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float64])
def test_converting_keeps_every_bit(folder, stored):
    arrays = {name: array.astype(stored) for name, array in ADM.items()}
    writers.write_torch_zip(folder / "half.pt", arrays)
    pretrained.convert("half.pt", "half.safetensors", config=networks.TINY_ADM[1])
    found = read("half.safetensors").arrays
    assert {array.dtype for array in found.values()} == {np.dtype(stored)}
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in arrays.items()}
    original = pretrained.load("half.pt", config=networks.TINY_ADM[1])
    converted = pretrained.load("half.safetensors")
    chex.assert_trees_all_equal(converted.params, original.params)
    assert converted.network.schedule.levels(500.0) == original.network.schedule.levels(500.0)


def test_a_classifier_on_the_command_line(folder, adm_file, classifier_file, capsys):
    sampling = (
        "sample",
        "--checkpoint",
        adm_file,
        "--config",
        ADM_CONFIG,
        "--num",
        2,
        "--steps",
        2,
        "--solver",
        "ddim",
    )
    (folder / "guide.json").write_text(GUIDE_CONFIG)
    guided = ("--classifier", classifier_file, "--classifier-config", "guide.json", "--classifier-scale", 5)
    assert run(capsys, *sampling, "--npz", "plain.npz")[0] == 0
    code, out, _ = run(capsys, *sampling, *guided, "--npz", "guided.npz")
    assert code == 0
    assert "guided by guide.pt, scale 5" in out
    plain, moved = (np.load(name)["images"] for name in ("plain.npz", "guided.npz"))
    assert np.abs(plain - moved).max() > 1e-3


def test_what_can_not_be_sampled_is_one_line(folder, edm_file, adm_file, classifier_file, capsys):
    of_adm = ("--checkpoint", adm_file, "--config", ADM_CONFIG)
    guided = ("--classifier", classifier_file, "--classifier-config", GUIDE_CONFIG)
    for arguments, reason in (
        (("--checkpoint", "nowhere.pkl"), "no file nowhere.pkl"),
        (("--checkpoint", adm_file), "named like none of the released ones"),
        (("--checkpoint", adm_file, "--config", "[1]"), "cannot read '[1]'"),
        (("--checkpoint", adm_file, "--config", '{"a": 1'), "must be JSON"),
        (("--checkpoint", adm_file, "--config", "nowhere.json"), "cannot read 'nowhere.json'"),
        ((*of_adm, "--guidance", "2"), "guide with a classifier"),
        ((*of_adm, "--class", "3"), "must be in 0 .. 2, got '3'"),
        ((*of_adm, "--entry", "ema"), "ema"),
        (("--checkpoint", edm_file, "--classifier", adm_file, "--classifier-config", ADM_CONFIG), "is no classifier"),
        (("--checkpoint", edm_file, *guided), "another schedule"),
        (("--checkpoint", classifier_file, "--config", GUIDE_CONFIG), "is no diffusion model"),
        ((*of_adm, "--classifier-config", GUIDE_CONFIG), "argument --classifier-config: not without --classifier"),
    ):
        loading._told.add(pretrained.model.FAMILIES["edm"].origin.licence)
        refused(capsys, folder, ["sample", "--num", "1", "--steps", "2", *arguments], reason)


def test_info_and_convert_refuse_in_one_line(folder, adm_file, capsys):
    (folder / "page.pt").write_text("<!DOCTYPE html><html></html>")
    for arguments, reason in (
        (("info", "nowhere.pt"), "no file nowhere.pt"),
        (("info", folder), "is no folder in diffusers"),
        (("info", "page.pt"), "web page"),
        (("convert", "nowhere.pt", "x.safetensors"), "no file nowhere.pt"),
        (("convert", adm_file, "x.safetensors"), "named like none of the released ones"),
        (("convert", adm_file, "x.pt"), "must end in .safetensors"),
        (("convert", adm_file, "nowhere/x.safetensors"), "there is no folder"),
    ):
        refused(capsys, folder, arguments, reason)


def test_info_of_a_file_that_wants_to_run_something(folder, capsys):
    (folder / "evil.pt").write_bytes(b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00touch ownedq\x00\x85q\x01Rq\x02.")
    code, out, err = run(capsys, "info", "evil.pt")
    assert code == 2
    assert "refused  posix system" in out
    assert "posix system" in err
    assert err.count("\n") == 1
    assert not (folder / "owned").exists()
    refused(capsys, folder, ["sample", "--checkpoint", "evil.pt"], "posix system")


def test_info_says_why_a_file_does_not_load(folder, adm_file, capsys):
    code, out, _ = run(capsys, "info", adm_file)
    assert code == 0
    assert f"arrays   {len(ADM)}" in out
    assert "loads    no: " in out
    code, out, _ = run(capsys, "info", adm_file, "--config", ADM_CONFIG)
    assert "UNetModel (family adm)" in out
    assert "loads    yes" in out
    code, out, _ = run(capsys, "info", adm_file, "--config", json.dumps({**networks.TINY_ADM[1], "num_classes": 4}))
    assert "loads    no: label_emb.weight has shape (3, 128), UNetModel with this configuration needs (4, 128)" in out


# The documentation


@pytest.mark.slow
def test_the_code_of_the_page(folder):
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    cls, arguments = networks.TINY_EDM
    arguments = arguments | {"img_channels": 3, "label_dim": 10}
    writers.write_edm_pickle(
        folder / "edm-cifar10-32x32-cond-vp.pkl", cls, arguments, networks.drawn("edm", cls, arguments)
    )
    for name, (cls, arguments) in (
        ("64x64_diffusion", networks.TINY_ADM),
        ("64x64_classifier", networks.TINY_CLASSIFIER),
    ):
        arguments = arguments | ({"num_classes": 4} if name == "64x64_diffusion" else {"out_channels": 4})
        writers.write_torch_zip(folder / "arrays.pt", networks.drawn("adm", cls, arguments))
        pretrained.convert("arrays.pt", f"{name}.safetensors", config=arguments)
        (folder / f"{name}.safetensors").rename(folder / f"{name}.pt")  # a file is known by its content
    names = {}
    shapes = []
    for block in blocks:
        exec(compile(block, "docs/checkpoints.md", "exec"), names)
        shapes.append(names["x"].shape)
        assert bool(jnp.isfinite(names["x"]).all())
    assert shapes == [(4, 8, 8, 3), (4, 8, 8, 1)]


def test_the_commands_of_the_page_are_understood():
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    commands = re.findall(r"^    evodiff-jax (.*)$", page, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        cli._parser().parse_args(shlex.split(command))
