"""Ports of public networks against stored outputs of the originals, and against the arrays of released files."""

import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from evodiff_jax import pretrained
from evodiff_jax.numerics import enable_x64
from evodiff_jax.pretrained.adm_release import RELEASED as KNOWN
from evodiff_jax.pretrained.model import FAMILIES
from evodiff_jax.pretrained.states import original_shapes

CASES = [(folder, name) for folder in ("edm", "adm", "adm_classifier") for name in networks.names(folder)]
# By default float64 for all but those that are like others, and float32 for two; the rest is among the slow tests.
QUICK = ("vp_ddpmpp_uncond", "adm_cond_new_order")
ALIKE = (
    *("ve_ncsnpp_uncond", "edm_ncsnpp_uncond", "iddpm_adm_cond", "adm_plain_conv_resample"),
    *("classifier_adaptive", "classifier_half_mult"),
)
IN_FLOAT64 = [pytest.param(*case, marks=pytest.mark.slow if case[1] in ALIKE else ()) for case in CASES]
IN_FLOAT32 = [pytest.param(*case, marks=() if case[1] in QUICK else pytest.mark.slow) for case in CASES]
FILES = ("edm-cifar10-32x32-cond-vp", "edm-imagenet-64x64-cond-adm", "adm-256x256_diffusion", "adm-64x64_classifier")
RELEASED = sorted(path.name.removesuffix(".json.gz") for path in (networks.DATA / "full_size").glob("[abe]*.gz"))


def load(case, stored=np.float32, **options):
    return pretrained.from_state(case.family, case.cls, case.arguments, case.arrays(stored), **options)


@pytest.mark.parametrize(("folder", "name"), IN_FLOAT32, ids=[name for _, name in CASES])
def test_outputs_of_the_original(folder, name):
    case = networks.Case(folder, name)
    model = load(case)
    output = jax.jit(lambda params: model.apply(params, **case.inputs()))(model.params)
    assert output.dtype == jnp.float32
    assert networks.error(output, case.output("out32")) < 1e-5
    assert networks.error(output, case.output("out64")) < 1e-5


@pytest.mark.parametrize(("folder", "name"), IN_FLOAT64, ids=[name for _, name in CASES])
def test_outputs_and_gradients_in_float64(folder, name):
    case = networks.Case(folder, name)
    labels = case.facts["inputs"].get("gradient_labels")
    with enable_x64():
        model = load(case, np.float64)
        inputs = case.inputs(np.float64)

        def total(x):
            output = model.apply(model.params, **{**inputs, "x": x})
            if labels is None:
                return 0.0, output
            return jnp.sum(jax.nn.log_softmax(output)[jnp.arange(len(labels)), jnp.array(labels)]), output

        if labels is None:
            output = jax.jit(total)(inputs["x"])[1]
        else:
            (_, output), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs["x"])
            assert networks.error(gradient, case.output("grad64")) < 1e-12
    assert output.dtype == jnp.float64
    assert networks.error(output, case.output("out64")) < 1e-12


@pytest.mark.slow
def test_images_in_float64_are_computed_with_in_float64():
    case = networks.Case("edm", "edm_ncsnpp_uncond")
    with enable_x64():
        model = load(case)
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
        output = jax.jit(model.apply)(model.params, **case.inputs(np.float64))
    assert networks.error(output, case.output("out64")) < 1e-12


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FILES else pytest.mark.slow) for name in RELEASED]
)
def test_arrays_of_the_released_files(name):
    released = networks.full_size(name)
    family = "adm" if name.startswith("adm") else "edm"
    network = FAMILIES[family].build(released["cls"], released["arguments"], None)
    stored = {entry[0]: tuple(entry[1]) for entry in released["state"]}
    unused = re.compile("|".join(network.unused) or "(?!)")
    needed = original_shapes(network)
    assert needed == {name: shape for name, shape in stored.items() if not unused.fullmatch(name)}
    parameters = sum(np.prod(shape) for name, shape in stored.items() if name not in released["buffers"])
    assert parameters == released["parameters"]
    if family == "adm":  # known by the name of the file alone
        known = FAMILIES["adm"].build(released["cls"], KNOWN[name.removeprefix("adm-")], None)
        assert known.module == network.module


def test_bfloat16_is_near_and_keeps_the_preconditioning_in_float32():
    case = networks.Case("edm", "edm_ddpmpp_cond")
    model = load(case, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    inputs = case.inputs()
    apply = jax.jit(model.apply)
    output = apply(model.params, **inputs)
    assert output.dtype == jnp.float32
    assert 1e-5 < networks.error(output, case.output("out64")) < 2e-2
    # Where hardly any noise is, D(x) is x; a skip path in bfloat16 would be off by 2^-9.
    quiet = apply(model.params, **{**inputs, "sigma": np.full(2, 1e-4, np.float32)})
    np.testing.assert_allclose(quiet, inputs["x"], atol=2e-3)
    program = apply.lower(model.params, **inputs).as_text()
    convolutions = re.findall(r"stablehlo\.convolution.* -> (tensor<\S+>)", program)
    assert convolutions
    assert [result for result in convolutions if "bf16" not in result] == []


def test_labels_left_out_of_an_edm_network_are_zeros():
    case = networks.Case("edm", "edm_ddpmpp_cond")
    model, inputs = load(case), case.inputs()
    del inputs["labels"]
    without = jax.jit(model.apply)(model.params, **inputs)
    beyond = jax.jit(model.apply)(model.params, **inputs, labels=np.full(2, model.null_class))
    np.testing.assert_allclose(without, beyond, rtol=1e-6, atol=1e-6)
    assert networks.error(without, case.output("out64")) > 1e-3


@pytest.mark.slow
def test_iddpm_rounds_the_noise_level_that_the_network_sees_and_no_other():
    case = networks.Case("edm", "iddpm_adm_cond")
    model, x = load(case), case.inputs()["x"][:1]
    u = case.stored["const:u"]
    off = np.float32((0.6 * u[500] + 0.4 * u[501],))
    c_in = 1 / np.sqrt(1 + off**2)
    inner = pretrained.from_state(
        "edm",
        "DhariwalUNet",
        {k: v for k, v in case.arguments.items() if k not in ("img_channels", "model_type")}
        | {"in_channels": 3, "out_channels": 6},
        {k.removeprefix("model."): v for k, v in case.arrays().items() if k != "u"},
    )
    raw = jax.jit(inner.apply)(inner.params, x=c_in * x, noise_labels=np.float32([999 - 500]))[..., :3]
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, x=x, sigma=off), x - off * raw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        ("EDMPrecond2", {}, "unknown class 'EDMPrecond2' of family 'edm'; known: EDMPrecond, VPPrecond"),
        ("EDMPrecond", {"colour": 1}, "EDMPrecond has no setting colour; known: img_resolution"),
        ("EDMPrecond", {"model_type": "UNet"}, "unknown model_type 'UNet'; known: SongUNet, DhariwalUNet"),
        ("EDMPrecond", {"img_channels": None}, "EDMPrecond needs img_channels"),
        (
            "EDMPrecond",
            {"channel_mult": []},
            r"needs a setting channel_mult of the kind tuple\[int, \.\.\.\], got \(\)",
        ),
        ("EDMPrecond", {"model_channels": "16"}, "needs a setting model_channels of the kind int, got '16'"),
        ("EDMPrecond", {"num_blocks": True}, "needs a setting num_blocks of the kind int, got True"),
        ("EDMPrecond", {"encoder_type": "fancy"}, "unknown encoder_type 'fancy'; known: standard, skip, residual"),
        ("EDMPrecond", {"model_channels": 10**9}, "model_channels"),
        ("EDMPrecond", {"sigma_data": "much"}, "sigma_data"),
        ("EDMPrecond", {"model_channels": 32}, r"weight has shape \(3, 16, 3, 3\), .* needs \(3, 32, 3, 3\)"),
        ("EDMPrecond", {"num_blocks": 3}, r"EDMPrecond needs the arrays .*, .*, .*, \.\.\. \(\d+ in all\), which"),
        ("EDMPrecond", {"attn_resolutions": [1]}, r"EDMPrecond has no use for the arrays .*\(\d+ in all\)"),
    ],
)
def test_configurations_that_do_not_fit(cls, arguments, message):
    case = networks.Case("edm", "edm_ddpmpp_cond")
    given = {k: v for k, v in (case.arguments | arguments).items() if v is not None}
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.from_state("edm", cls, given, case.arrays())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        ("SuperResModel", {}, "unknown class 'SuperResModel' of family 'adm'; known: UNetModel, EncoderUNetModel"),
        ("UNetModel", {"pool": "attention"}, "UNetModel has no setting pool"),
        ("UNetModel", {"dims": 3}, "supported with dims=2, got 3"),
        ("UNetModel", {"noise_schedule": "sigmoid"}, "unknown noise_schedule 'sigmoid'; known: linear, cosine"),
        ("UNetModel", {"channel_mult": [1, 1.3]}, "multiples of 32 channels, channel_mult 1.3 makes 41"),
        ("UNetModel", {"image_size": 17}, "halves images 1 times"),
        ("UNetModel", {"use_new_attention_order": 1}, "use_new_attention_order of the kind bool, got 1"),
        ("UNetModel", {"num_classes": None}, r"UNetModel has no use for the arrays label_emb\.weight"),
        ("UNetModel", {"num_classes": 12}, r"label_emb\.weight has shape \(10, 128\), .* needs \(12, 128\)"),
        ("UNetModel", {"num_head_channels": 48}, "num_head_channels"),
        ("EncoderUNetModel", {"pool": "spatial"}, "unsupported pool 'spatial'"),
    ],
)
def test_configurations_of_guided_diffusion_that_do_not_fit(cls, arguments, message):
    case = networks.Case("adm", "adm_cond_new_order")
    drop = {"num_classes"} if cls == "EncoderUNetModel" else set()
    given = {k: v for k, v in (case.arguments | arguments).items() if k not in drop}
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.from_state("adm", cls, given, case.arrays())
    assert "\n" not in str(raised.value)


def test_arrays_that_are_not_floating_point_are_refused():
    case = networks.Case("adm", "adm_plain_pool_resample")
    arrays = case.arrays()
    arrays["time_embed.0.bias"] = arrays["time_embed.0.bias"].astype(np.int32)
    with pytest.raises(ValueError, match=r"time_embed\.0\.bias has numbers of type int32"):
        pretrained.from_state(case.family, case.cls, case.arguments, arrays)


def test_half_precision_arrays_are_widened_exactly():
    case = networks.Case("adm", "adm_plain_pool_resample")
    halves = {name: array.astype(jnp.bfloat16) for name, array in case.arrays().items()}
    model = pretrained.from_state(case.family, case.cls, case.arguments, halves)
    kernel = model.params["input_blocks_0_0"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, halves["input_blocks.0.0.weight"].transpose(2, 3, 1, 0).astype(np.float32))


@pytest.mark.parametrize(("family", "dtype"), [("unet", "float32"), ("edm", "float16")])
def test_unknown_families_and_types(family, dtype):
    with pytest.raises(ValueError, match=r"unknown family 'unet'; known: edm, adm|dtype must be one of float32, bf"):
        pretrained.from_state(family, "EDMPrecond", {}, {}, dtype=dtype)
