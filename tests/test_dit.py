"""DiT, SiT and diffusers' DiT against stored outputs of the originals, and files of them."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import writers

from evodiff_jax import pretrained
from evodiff_jax.denoisers import classifier_free_guidance
from evodiff_jax.numerics import enable_x64
from evodiff_jax.pretrained import loading
from evodiff_jax.pretrained.dit.transformer2d import positions
from evodiff_jax.pretrained.model import FAMILIES
from evodiff_jax.pretrained.states import original_shapes

CASES = networks.names("dit")
RELEASED = ("DiT-XL-2-256x256", "DiT-XL-2-512x512", "SiT-XL-2-256x256", "diffusers-DiT-XL-2-256")
GUIDED = ("dit_learn_sigma", "sit_learn_sigma")
BUILD = FAMILIES["dit"].build
# Those that are like others are among the slow tests.
ALIKE = ("dit_learn_sigma", "diffusers_dit_small", "sit_patch4_own_pos_embed", "DiT-XL-2-512x512")


def load(case, arrays, **options):
    return pretrained.from_state(case.family, case.cls, case.arguments, arrays, **options)


def quick(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in names]


@pytest.mark.parametrize("name", quick(CASES))
def test_outputs_of_the_original(name):
    case = networks.Case("dit", name)
    model = load(case, case.arrays())
    output = jax.jit(model.apply)(model.params, **case.inputs())
    assert output.dtype == jnp.float32
    assert networks.error(output, case.output("out32")) < 1e-5
    assert networks.error(output, case.output("out64")) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_outputs_in_float64(name):
    case = networks.Case("dit", name)
    with enable_x64():
        model = load(case, case.arrays(np.float64))
        output = jax.jit(model.apply)(model.params, **case.inputs(np.float64))
    assert output.dtype == jnp.float64
    assert networks.error(output, case.output("out64")) < 1e-12


@pytest.mark.parametrize("name", GUIDED)
def test_guided_outputs_of_the_original(name):
    case = networks.Case("dit", name)
    channels, sign = case.arguments["in_channels"], -1 if case.cls == "SiT" else 1
    with enable_x64():
        model, inputs = load(case, case.arrays(np.float64)), case.inputs(np.float64)
        t = inputs["timesteps"] if sign == 1 else 1 - inputs["timesteps"]

        def predict(params, x, label):
            fn = lambda x, _, label: model.network.predict(model.module, params, x, t, label)
            null, scale = jnp.full_like(label, model.null_class), case.facts["inputs"]["guidance"]
            guided = model.network.guided_channels
            return classifier_free_guidance(fn, label, null, scale, batched=False, channels=guided)(x, None)

        output = np.asarray(jax.jit(predict)(model.params, inputs["x"], inputs["y"]))
    assert networks.error(sign * output, case.output("guided64")[..., :channels]) < 1e-12


@pytest.mark.parametrize("name", quick(RELEASED))
def test_arrays_of_the_released_files(name):
    released = networks.full_size(name)
    shapes = original_shapes(BUILD(released["cls"], released["arguments"], None))
    assert shapes == {entry[0]: tuple(entry[1]) for entry in released["state"]}
    assert released["parameters"] == sum(np.prod(s) for n, s in shapes.items() if n not in released["buffers"])
    if not name.startswith("diffusers"):  # known by the name of the file and the shapes alone
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        contents = loading.Contents("", arrays)
        found = loading.recognise(networks.DATA / f"{name}.pt", contents)
        assert found[:2] == ("dit", released["cls"])
        assert BUILD(*found[1:], None).module == BUILD(released["cls"], released["arguments"], None).module


def test_positions_are_those_of_the_released_files():
    stored = networks.Case("dit", "dit_learn_sigma").stored["const:pos_embed"]
    np.testing.assert_array_equal(positions(4, 48), stored)


class Exact(nn.Module):
    """The velocity d x / d s of Gaussian data of variance 4, in SiT's time s from noise to data."""

    along: str

    @nn.compact
    def __call__(self, x, timesteps, y):
        s = timesteps[:, None, None, None]
        if self.along == "Linear":
            (alpha, sigma), (d_alpha, d_sigma) = (s, 1 - s), (1, -1)
        else:
            angle = math.pi / 2 * s
            alpha, sigma = jnp.sin(angle), jnp.cos(angle)
            d_alpha, d_sigma = math.pi / 2 * sigma, -math.pi / 2 * alpha
        return (d_alpha * alpha * 4 + d_sigma * sigma) / (alpha**2 * 4 + sigma**2) * x


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_the_denoiser_of_sit_is_the_posterior_mean(path, x64):
    case = networks.Case("dit", "sit_learn_sigma")
    network = BUILD("SiT", {**case.arguments, "path": path}, None)
    model = pretrained.Model("", "SiT", network._replace(module=Exact(path)), {}, "", {})
    denoise, x = model.denoiser({}), case.inputs(np.float64)["x"]
    schedule = model.schedule
    for t in (schedule.t_min, 0.3, 0.8, schedule.t_max):
        alpha, sigma = (1 - t, t) if path == "Linear" else (math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t))
        np.testing.assert_allclose([schedule.alpha(t), schedule.sigma(t)], [alpha, sigma], rtol=1e-12)
        np.testing.assert_allclose(denoise(x, t), 4 * alpha / (4 * alpha**2 + sigma**2) * x, rtol=1e-9)


@pytest.mark.parametrize("name", ["dit_learn_sigma", "diffusers_dit"])
def test_the_denoiser_of_dit(name):
    case = networks.Case("dit", name)
    model, inputs = load(case, case.arrays()), case.inputs()
    if name == "diffusers_dit":
        assert model.network.schedule is None
        model = model._replace(network=model.network._replace(schedule=BUILD("DiT", {}, None).schedule))
    label, x, t, scale = np.array([3, 4]), inputs["x"], 300.0, 2.5
    y = "class_labels" if name == "diffusers_dit" else "y"

    @jax.jit
    def outputs(params):
        apply = lambda label: model.apply(params, x=x, timesteps=np.full(2, t, np.float32), **{y: label})[..., :4]
        null = np.full(2, model.null_class)
        return apply(label), apply(null), model.denoiser(params, label, scale)(x, t), model.denoiser(params)(x, t)

    conditional, null, guided, unconditional = outputs(model.params)
    channels = 4 if name == "diffusers_dit" else 3
    epsilon = jnp.concatenate([(null + scale * (conditional - null))[..., :channels], conditional[..., channels:]], -1)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    np.testing.assert_allclose(guided, (x - sigma * epsilon) / alpha, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(unconditional, (x - sigma * null) / alpha, rtol=1e-4, atol=1e-4)


def test_a_network_without_a_row_for_no_class_needs_labels():
    case = networks.Case("dit", "sit_patch4_own_pos_embed")
    model = load(case, case.arrays())
    assert model.null_class is None
    with pytest.raises(ValueError, match=r"needs labels, integers in 0 \.\. 4"):
        model.denoiser(model.params)
    with pytest.raises(ValueError, match="needs x of shape \\(B, 16, 16, 3\\), got \\(1, 8, 8, 3\\)"):
        model.apply(model.params, x=np.zeros((1, 8, 8, 3)), timesteps=np.zeros(1), y=np.zeros(1, int))


@pytest.mark.parametrize("name", ["dit_learn_sigma", pytest.param("diffusers_dit", marks=pytest.mark.slow)])
def test_bfloat16_is_near_and_keeps_the_ends_in_float32(name):
    case = networks.Case("dit", name)
    model = load(case, case.arrays(), dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16", "float32"}
    apply = jax.jit(model.apply)
    output = apply(model.params, **case.inputs())
    assert output.dtype == jnp.float32
    assert 1e-5 < networks.error(output, case.output("out64")) < 3e-2
    program = apply.lower(model.params, **case.inputs()).as_text()
    products = re.findall(r"stablehlo\.dot_general .*: \((tensor<\S+>)", program)
    assert [kind for kind in products if "bf16" not in kind] == ["tensor<2x16x48xf32>"]  # the last layer


@pytest.mark.parametrize(
    ("name", "write", "config", "heads"),
    [
        ("DiT-S-2.pt", "zip", {}, 4),
        ("sit_xl.pt", "legacy", {"path": "GVP"}, 4),
        ("model.safetensors", "safetensors", {"cls": "SiT"}, 4),
        ("My-SiT.safetensors", "safetensors", {"num_heads": 12}, 12),
    ],
)
def test_single_files(tmp_path, monkeypatch, capsys, name, write, config, heads):
    monkeypatch.setattr(loading, "_told", set())
    case = networks.Case("dit", "dit_learn_sigma")
    config = {"num_heads": 4, **config}
    if write == "safetensors":
        writers.write_safetensors(tmp_path / name, case.arrays())
    elif write == "legacy":
        writers.write_torch_legacy(tmp_path / name, case.arrays())
    else:
        writers.write_torch_zip(tmp_path / name, case.arrays(), wrap=lambda s: {"model": {}, "ema": s, "opt": {}})
    model = pretrained.load(tmp_path / name, config=config)
    cls = config.get("cls", name.replace("My-", "")[:3].replace("sit", "SiT"))
    assert model.cls == cls
    expected = BUILD(cls, {**case.arguments, "num_heads": heads}, None)
    assert model.module == expected.module
    assert (model.network.prediction == "v") == (config.get("path") == "GVP")
    jax.tree.map(np.testing.assert_array_equal, model.params, load(case, case.arrays()).params)
    told = "licence CC BY-NC 4.0, for non-commercial use" in capsys.readouterr().err
    assert told == (cls == "DiT")
    described = pretrained.describe(tmp_path / name, config=config)
    assert (described.problem, described.licence == "MIT") == ("", cls == "SiT")


def test_a_converted_file_needs_no_configuration(tmp_path):
    case = networks.Case("dit", "sit_patch4_own_pos_embed")
    writers.write_safetensors(tmp_path / "SiT.safetensors", case.arrays())
    config = {"num_heads": 3, "class_dropout_prob": 0.0}
    pretrained.convert(tmp_path / "SiT.safetensors", tmp_path / "other.safetensors", config=config)
    model = pretrained.load(tmp_path / "other.safetensors")
    assert model.module == BUILD("SiT", case.arguments, None).module
    rows = loading.recognise(
        tmp_path / "SiT.pt", loading.Contents("", case.arrays()), {"num_heads": 3, "num_classes": 5}
    )
    assert BUILD(*rows[1:], None).module == model.module


def shrunk(name, shape):
    return lambda arrays: {**arrays, name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("name", "config", "change", "message"),
    [
        (
            "model.pt",
            {"num_heads": 4},
            dict,
            r"holds a DiT or SiT, .*: give config with the class as 'cls', DiT or SiT",
        ),
        (
            "DiT-to-SiT.pt",
            {"num_heads": 4},
            dict,
            "give config with the class as 'cls', DiT or SiT, or rename the file",
        ),
        ("DiT.pt", {}, dict, "a DiT of hidden size 48, whose number of heads .*: give config with num_heads"),
        (
            "DiT.pt",
            {"cls": "UViT", "num_heads": 4},
            dict,
            "unknown class 'UViT' of family 'dit'; known: DiT, SiT, DiTTr",
        ),
        ("DiT.pt", {"num_heads": 4}, shrunk("pos_embed", (1, 15, 48)), "holds no DiT: its 15 positions are no square"),
        (
            "DiT.pt",
            {"num_heads": 4},
            shrunk("pos_embed", (15, 48)),
            r"holds no DiT: its array pos_embed has the shape \(",
        ),
        (
            "DiT.pt",
            {"num_heads": 4},
            shrunk("final_layer.linear.weight", (48, 48)),
            "of 4 channels it makes 12, neither",
        ),
        (
            "DiT.pt",
            {"num_heads": 4},
            lambda arrays: {k: v for k, v in arrays.items() if k != "y_embedder.embedding_table.weight"},
            r"holds no DiT: its array y_embedder\.embedding_table\.weight is missing",
        ),
        (
            "DiT.pt",
            {"num_heads": 4, "depth": 3},
            dict,
            r"needs the arrays blocks\.2\..*\(10 in all\), which are missing",
        ),
    ],
)
def test_files_that_can_not_be_told(tmp_path, name, config, change, message):
    arrays = change(networks.Case("dit", "dit_learn_sigma").arrays())
    writers.write_torch_zip(tmp_path / name, arrays)
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.load(tmp_path / name, config=config)
    assert str(raised.value).startswith(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        ("UViT", {}, "unknown class 'UViT' of family 'dit'; known: DiT, SiT, DiTTransformer2DModel"),
        ("DiT", {"path": "Linear"}, "DiT has no setting path; known: input_size"),
        ("SiT", {"path": "VP"}, "SiT has the unsupported path 'VP'; supported: Linear, GVP"),
        ("SiT", {"num_heads": 5}, "SiT can't split hidden_size 1152 by num_heads 5"),
        ("DiT", {"patch_size": 3}, "DiT can't cut input_size 32 into patches of 3"),
        ("DiT", {"depth": 0}, "DiT needs a positive depth, got 0"),
        ("DiT", {"mlp_ratio": math.nan}, "DiT needs a positive mlp_ratio, got nan"),
        ("DiT", {"class_dropout_prob": 2.0}, "DiT needs a class_dropout_prob from 0 to 1, got 2.0"),
        ("DiT", {"learn_sigma": 1}, "DiT needs a setting learn_sigma of the kind bool, got 1"),
        (
            "DiTTransformer2DModel",
            {"activation_fn": "geglu"},
            "supported with activation_fn='gelu-approximate', got 'ge",
        ),
        (
            "DiTTransformer2DModel",
            {"norm_type": "ada_norm"},
            "supported with norm_type='ada_norm_zero', got 'ada_norm'",
        ),
        (
            "DiTTransformer2DModel",
            {"colour": 1},
            "DiTTransformer2DModel has no setting colour; known: num_attention_head",
        ),
        (
            "DiTTransformer2DModel",
            {"num_layers": 0},
            "DiTTransformer2DModel needs a positive setting num_layers, got 0",
        ),
        ("DiTTransformer2DModel", {"out_channels": 6}, "needs out_channels of in_channels 4 or twice that, got 6"),
        ("DiTTransformer2DModel", {"patch_size": 3}, "can't cut sample_size 32 into patches of 3"),
        (
            "DiTTransformer2DModel",
            {"num_attention_heads": 3, "attention_head_dim": 2},
            "multiple of 4 .* together, got 6",
        ),
        ("DiTTransformer2DModel", {"cross_attention_dim": 768}, "supported with no cross_attention_dim, got 768"),
    ],
)
def test_configurations_that_do_not_fit(cls, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        BUILD(cls, arguments, None)
    assert "\n" not in str(raised.value)


def test_whole_configurations_of_diffusers():
    case = networks.Case("dit", "diffusers_dit")
    expected = BUILD(case.cls, case.arguments, None).module
    assert BUILD(case.cls, case.facts["config_json"], None).module == expected
    before = {  # as Transformer2DModel wrote it
        **{"_class_name": "Transformer2DModel", "attention_type": "default", "caption_channels": None},
        **{"cross_attention_dim": None, "double_self_attention": False, "num_vector_embeds": None},
        **{"only_cross_attention": False, "use_linear_projection": False},
    }
    assert BUILD(case.cls, {**case.facts["config_json"], **before}, None).module == expected
    assert BUILD(case.cls, {"out_channels": None}, None).module.out_channels == 0


def test_attention_without_biases():
    arguments = {**networks.Case("dit", "diffusers_dit_small").arguments, "attention_bias": False}
    shapes = original_shapes(BUILD("DiTTransformer2DModel", arguments, None))
    biases = [name.split("attn1.")[1] for name in shapes if "attn1" in name and name.endswith("bias")]
    assert biases == ["to_out.0.bias"]
