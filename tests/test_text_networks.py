"""CLIP's text encoders against stored outputs of transformers, and against the arrays of released files."""

import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from evodiff_jax import pretrained
from evodiff_jax.numerics import enable_x64
from evodiff_jax.pretrained.model import FAMILIES
from evodiff_jax.pretrained.states import original_shapes

CASES = networks.names("clip_text")
QUICK = ("clip_l_like", "clip_g_like_projection")
RELEASED = ("sd15-text-encoder", "sd21-text-encoder", "sdxl-text-encoder-2")
OUTPUTS = ("last", "penultimate", "penultimate_normed", "pooled", "text_embeds")


def load(case, arrays, **options):
    return pretrained.from_state(case.family, case.cls, case.arguments, arrays, **options)


def errors(case, outputs, kind):
    stored = [name for name in OUTPUTS if f"{name}{kind}" in case.stored]
    assert ("text_embeds" in outputs) == ("text_embeds" in stored) == (case.cls == "CLIPTextModelWithProjection")
    return max(networks.error(outputs[name], case.output(f"{name}{kind}")) for name in stored)


@pytest.mark.parametrize("name", [pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_outputs_of_the_original(name):
    case = networks.Case("clip_text", name)
    model = load(case, case.arrays())
    outputs = jax.jit(model.apply)(model.params, **case.inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    assert errors(case, outputs, 32) < 1e-5
    assert errors(case, outputs, 64) < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_outputs_in_float64(name):
    case = networks.Case("clip_text", name)
    with enable_x64():
        model = load(case, case.arrays(np.float64))
        outputs = jax.jit(model.apply)(model.params, **case.inputs(np.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float64")}
    assert errors(case, outputs, 64) < 1e-12


def test_layers_that_are_skipped():
    case = networks.Case("clip_text", "clip_h_like")
    model, ids = load(case, case.arrays()), case.inputs()["input_ids"]

    @jax.jit
    def encode(params):
        return [model.module.apply({"params": params}, ids, skip) for skip in range(3)]

    whole, less, embeddings = encode(model.params)
    np.testing.assert_array_equal(whole["skipped_normed"], whole["last"])
    np.testing.assert_array_equal(less["skipped"], whole["penultimate"])
    np.testing.assert_array_equal(less["skipped_normed"], whole["penultimate_normed"])
    tables = [model.params[f"{name}_embedding"]["embedding"] for name in ("token", "position")]
    np.testing.assert_allclose(embeddings["skipped"], tables[0][ids] + tables[1], rtol=1e-6)
    # A network without the last layer ends in the state that the whole one skips to.
    arrays = {name: array for name, array in case.arrays().items() if ".layers.1." not in name}
    short = pretrained.from_state("clip_text", case.cls, {**case.arguments, "num_hidden_layers": 1}, arrays)
    ends = jax.jit(short.apply)(short.params, input_ids=ids)["last"]
    np.testing.assert_allclose(less["skipped_normed"], ends, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="skip must be from 0 to 2, the number of layers, got 3"):
        model.module.apply({"params": model.params}, ids, 3)


def test_names_with_and_without_prefix():
    case = networks.Case("clip_text", "clip_g_like_projection")
    arrays, positions = case.arrays(), np.arange(10)[None]
    bare = {name.removeprefix("text_model."): array for name, array in arrays.items()}
    old, new = {"text_model.embeddings.position_ids": positions}, {"embeddings.position_ids": positions}
    expected = load(case, arrays).params
    for others in (bare, arrays | old, bare | new):
        jax.tree.map(np.testing.assert_array_equal, load(case, others).params, expected)
    with pytest.raises(ValueError, match=r"array text_model\.final_layer_norm\.bias twice"):
        load(case, {**arrays, "final_layer_norm.bias": arrays["text_model.final_layer_norm.bias"]})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("sd21") else ()) for name in RELEASED]
)
def test_arrays_of_the_released_files(name):
    released = networks.full_size(name)
    shapes = original_shapes(FAMILIES["clip_text"].build(released["cls"], released["arguments"], None))
    assert shapes == {entry[0]: tuple(entry[1]) for entry in released["state"]}
    assert sum(np.prod(shape) for shape in shapes.values()) == released["parameters"]


def test_a_whole_configuration_of_transformers():
    case = networks.Case("clip_text", "clip_h_like")
    written = {
        **case.arguments,
        "_name_or_path": "",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "dtype": "float16",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "clip_text_model",
        "transformers_version": "5.24.0",
    }
    build = FAMILIES["clip_text"].build
    assert build(case.cls, written, None).module == build(case.cls, case.arguments, None).module


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        ("CLIPVisionModel", {}, "unknown class 'CLIPVisionModel' of family 'clip_text'; known: CLIPTextModel, CLIPTex"),
        ("CLIPTextModel", {"hidden_act": "relu"}, "unsupported hidden_act 'relu'; supported: quick_gelu, gelu"),
        ("CLIPTextModel", {"num_attention_heads": 5}, "can't split hidden_size 48 by num_attention_heads 5"),
        ("CLIPTextModel", {"num_attention_heads": 0}, "can't split hidden_size 48 by num_attention_heads 0"),
        ("CLIPTextModel", {"num_hidden_layers": 0}, "needs num_hidden_layers of at least 1, got 0"),
        ("CLIPTextModel", {"hidden_size": "48"}, "needs a setting hidden_size of the kind int, got '48'"),
        ("CLIPTextModel", {"model_type": "clip"}, "the configuration of a 'clip_text_model', got that of a 'clip'"),
        ("CLIPTextModel", {"quantization_config": {"bits": 4}}, "can't have quantised weights"),
        ("CLIPTextModel", {"num_hidden_layers": 1}, r"no use for the arrays .*layers\.1\..*\(16 in all\)"),
        ("CLIPTextModelWithProjection", {}, r"needs the arrays text_projection\.weight, which are missing"),
    ],
)
def test_configurations_that_do_not_fit(cls, arguments, message):
    case = networks.Case("clip_text", "clip_h_like")
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.from_state("clip_text", cls, case.arguments | arguments, case.arrays())
    assert "\n" not in str(raised.value)


def test_more_tokens_than_positions():
    case = networks.Case("clip_text", "clip_h_like")
    model = load(case, case.arrays())
    with pytest.raises(ValueError, match="texts must have at most 10 tokens, got 11"):
        model.apply(model.params, input_ids=np.zeros((1, 11), np.int32))
    with pytest.raises(ValueError, match=r"is no diffusion model, it predicts: text"):
        model.denoiser(model.params)


@pytest.mark.slow
def test_shorter_texts_are_the_beginnings_of_longer_ones():
    case = networks.Case("clip_text", "clip_h_like")
    model, ids = load(case, case.arrays()), case.inputs()["input_ids"]
    both = jax.jit(lambda params: [model.apply(params, input_ids=some)["last"] for some in (ids, ids[:, :6])])
    whole, part = both(model.params)
    np.testing.assert_allclose(whole[:, :6], part, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_near_and_keeps_norms_in_float32():
    case = networks.Case("clip_text", "clip_g_like_projection")
    model = load(case, case.arrays(), dtype="bfloat16")
    assert model.params["layers_0"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert model.params["final_layer_norm"]["scale"].dtype == jnp.float32
    apply = jax.jit(model.apply)
    outputs = apply(model.params, **case.inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    assert 1e-5 < errors(case, outputs, 64) < 2e-2
    program = apply.lower(model.params, **case.inputs()).as_text()
    products = re.findall(r"stablehlo\.dot_general .*: \((tensor<\S+>)", program)
    assert products
    assert [kind for kind in products if "bf16" not in kind] == []
