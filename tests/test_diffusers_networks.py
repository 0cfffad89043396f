"""Ports of diffusers' U-Nets and autoencoder: stored outputs, names of released files, configurations, tiles."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from evodiff_jax import pretrained
from evodiff_jax.numerics import enable_x64
from evodiff_jax.pretrained.diffusers.autoencoder_kl import decode_tiled
from evodiff_jax.pretrained.model import FAMILIES
from evodiff_jax.pretrained.states import apply, original_shapes

FOLDERS = ("autoencoder_kl", "unet2d", "unet2d_condition")
CASES = [(folder, name) for folder in FOLDERS for name in networks.names(folder)]
# By default those that differ most; the others, and each in the other type, are among the slow tests.
QUICK64 = ("vae_small_groups", "refiner_like")
QUICK32 = ("vae_sd3", "ddpm_cifar_like")
IN_FLOAT64 = [pytest.param(*case, marks=() if case[1] in QUICK64 else pytest.mark.slow) for case in CASES]
IN_FLOAT32 = [pytest.param(*case, marks=() if case[1] in QUICK32 else pytest.mark.slow) for case in CASES]
FULL_SIZE = {
    "ddpm-256": pytest.mark.slow,
    "ddpm-cifar10-32": (),
    "sd-vae": (),
    "sd15-inpainting-unet": pytest.mark.slow,
    "sd15-unet": (),
    "sd21-unet": pytest.mark.slow,
    "sd3-vae": (),
    "sdxl-unet": pytest.mark.slow,
    "sdxl-vae": pytest.mark.slow,
}
FAMILY = {"UNet2DModel": "unet2d", "UNet2DConditionModel": "unet2d_condition", "AutoencoderKL": "autoencoder_kl"}


def load(case, stored=np.float32, arguments=None, **options):
    return pretrained.from_state(case.family, case.cls, arguments or case.arguments, case.arrays(stored), **options)


@functools.cache
def of_zeros(family, cls, arguments):
    """A module and parameters that are all zero."""
    network = FAMILIES[family].build(cls, json.loads(arguments), None)
    params = jax.eval_shape(lambda inputs: network.module.init(jax.random.key(0), **inputs), network.inputs)["params"]
    return network.module, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)


def outputs(model, inputs):
    """By their names in the stored outputs, in one program."""
    if "image" not in inputs:
        return {"out": jax.jit(model.apply)(model.params, **inputs)}
    both = jax.jit(lambda params, image, latent: (model.encode(params, image), model.decode(params, latent)))
    return dict(zip(("moments", "image"), both(model.params, **inputs), strict=True))


@pytest.mark.parametrize(("folder", "name"), IN_FLOAT32, ids=[name for _, name in CASES])
def test_outputs_of_the_original(folder, name):
    case = networks.Case(folder, name)
    for output, found in outputs(load(case), case.inputs()).items():
        assert found.dtype == jnp.float32
        assert networks.error(found, case.output(f"{output}32")) < 1e-5
        assert networks.error(found, case.output(f"{output}64")) < 1e-5


@pytest.mark.parametrize(("folder", "name"), IN_FLOAT64, ids=[name for _, name in CASES])
def test_outputs_in_float64(folder, name):
    case = networks.Case(folder, name)
    with enable_x64():
        model = load(case, np.float64, case.facts["config_json"])
        found = outputs(model, case.inputs(np.float64))
    for output, array in found.items():
        assert array.dtype == jnp.float64
        assert networks.error(array, case.output(f"{output}64")) < 1e-12


@pytest.mark.slow
def test_images_in_float64_are_computed_with_in_float64():
    case = networks.Case("unet2d_condition", "refiner_like")
    with enable_x64():
        inputs = {**case.inputs(), "x": case.inputs(np.float64)["x"]}
        found = outputs(load(case), inputs)["out"]
    assert networks.error(found, case.output("out64")) < 1e-12


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_whole_config_json_is_the_constructors_arguments(folder):
    for name in networks.names(folder):
        case = networks.Case(folder, name)
        build = FAMILIES[folder].build
        assert build(case.cls, case.facts["config_json"], None) == build(case.cls, case.arguments, None)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in FULL_SIZE.items()])
def test_arrays_of_the_released_files(name):
    released = networks.full_size(name)
    network = FAMILIES[FAMILY[released["cls"]]].build(released["cls"], released["arguments"], None)
    needed = original_shapes(network)
    assert needed == {entry[0]: tuple(entry[1]) for entry in released["state"]}
    assert sum(np.prod(shape) for shape in needed.values()) == released["parameters"]
    size = released["arguments"]["sample_size"]
    assert network.image_shape == (size, size, released["arguments"].get("in_channels", 4))


@pytest.mark.parametrize(("folder", "name"), [("autoencoder_kl", "vae_sd"), ("unet2d", "ddpm_cifar_like")])
def test_old_names_of_attention_give_the_same_parameters(folder, name):
    renames = json.loads((networks.DATA / "legacy_attention_names.json").read_text())["renames"]
    renames = renames[f"networks/{folder}/{name}.json"]
    case = networks.Case(folder, name)
    old = {renames.get(name, name): array for name, array in case.arrays().items()}
    assert set(old) != set(case.arrays())
    found = pretrained.from_state(case.family, case.cls, case.arguments, old).params
    jax.tree.map(np.testing.assert_array_equal, found, load(case).params)


def test_bfloat16_is_near_with_norms_softmax_and_sinusoids_in_float32():
    case = networks.Case("unet2d", "unet2d_scale_shift_classes")
    model = load(case, dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32), path
    program = jax.jit(model.apply).lower(model.params, **case.inputs())
    output = program.compile()(model.params, **case.inputs())
    assert output.dtype == jnp.float32
    assert 1e-5 < networks.error(output, case.output("out64")) < 3e-2
    text = program.as_text()
    types = lambda operation, shape: set(re.findall(rf"stablehlo\.{operation}\b.*tensor<{shape}x(\w+)>", text))
    assert types("convolution", r"\w+") == {"bf16"}
    assert types("exponential", r"\w+x256x256") == {"f32"}  # of softmax; others are of silu
    for operation in ("rsqrt", "cosine", "sine"):
        assert types(operation, r"\w+") == {"f32"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet2d/unet2d_no_mid_attention", {"x": np.zeros((1, 17, 16, 3))}, r"multiples of 2, got 17 x 16"),
        ("unet2d/unet2d_no_mid_attention", {"x": np.zeros((1, 16, 16, 4))}, r"\(B, H, W, 3\), got \(1, 16, 16, 4\)"),
        ("unet2d/unet2d_no_mid_attention", {"class_labels": np.zeros(1, int)}, "has no classes: leave class_labels"),
        ("unet2d/unet2d_scale_shift_classes", {"class_labels": None}, "has classes: give class_labels"),
        ("unet2d/unet2d_scale_shift_classes", {"class_labels": np.array([7, 0])}, r"must be in 0 \.\. 6, got \[7, 0\]"),
        ("unet2d_condition/refiner_like", {"added_cond_kwargs": None}, "have text_embeds and time_ids, got nothing"),
        (
            "unet2d_condition/refiner_like",
            {"added_cond_kwargs": {"text_embeds": np.zeros((1, 20)), "time_ids": np.zeros((1, 6))}},
            "text_embeds of 20 and 6 time_ids make 68 numbers, the network needs 60",
        ),
        (
            "unet2d_condition/refiner_like",
            {"encoder_hidden_states": np.zeros((1, 7, 33))},
            r"must have the shape \(B, T, 32\), got \(1, 7, 33\)",
        ),
        ("unet2d_condition/unclip_projection", {"added_cond_kwargs": {"a": 0}}, "must have nothing, got a"),
    ],
)
def test_inputs_that_do_not_fit(name, options, message):
    case = networks.Case(*name.split("/"))
    module, params = of_zeros(case.family, case.cls, json.dumps(case.arguments))
    with pytest.raises(ValueError, match=message) as raised:
        apply(module, params, **{**case.inputs(), **options})
    assert "\n" not in str(raised.value)


def test_images_and_latents_that_do_not_fit_an_autoencoder():
    case = networks.Case("autoencoder_kl", "vae_small_groups")
    module, params = of_zeros(case.family, case.cls, json.dumps(case.arguments))
    assert module.factor == 4
    with pytest.raises(ValueError, match="AutoencoderKL needs images with sides that are multiples of 4, got 16 x 18"):
        apply(module, params, method="encode", image=np.zeros((1, 16, 18, 1)))
    with pytest.raises(ValueError, match=r"needs latents of shape \(B, H, W, 3\), got \(4, 4, 3\)"):
        apply(module, params, method="decode", latent=np.zeros((4, 4, 3)))


LEVELS = {"block_out_channels": [32, 64], "sample_size": 8}
BLOCKS = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, **LEVELS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": 1}, "UNet2DModel has no setting colour; known: sample_size"),
        (
            {"time_embedding_type": "fourier"},
            "UNet2DModel is supported with time_embedding_type='positional', got 'fou",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimple"}, "supported with mid_block_type='UNetMidBlock2D', got"),
        ({"act_fn": "gelu"}, "supported with act_fn='silu', got 'gelu'"),
        (
            {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
            "unsupported block of down_block_types, 'SkipDownBlock2D'; supported: DownBlock2D, AttnDownBlock2D, Resn",
        ),
        ({"up_block_types": ["UpBlock2D"]}, "UNet2DModel has 2 levels in block_out_channels, but 1 in up_block_types"),
        ({"up_block_types": "UpBlock2D"}, "needs a setting up_block_types that lists the types of its blocks"),
        ({"block_out_channels": [32, 65]}, "multiples of norm_num_groups, 32, got 65"),
        ({"block_out_channels": [32, 0]}, "UNet2DModel needs a positive setting block_out_channels"),
        ({"block_out_channels": [33, 66], "norm_num_groups": 3}, "first block_out_channels even"),
        ({"layers_per_block": [1, 1]}, "needs a setting layers_per_block of the kind int"),
        ({"sample_size": 9}, "needs a sample_size of one or two multiples of 2, got 9"),
        ({"sample_size": [8, 8, 8]}, "needs a sample_size of one or two multiples of 2"),
        ({"attention_head_dim": 24}, "can't split 64 channels into heads of attention_head_dim 24"),
        ({"attn_norm_num_groups": 5}, "can't split 64 channels into 5 groups"),
        (
            {"class_embed_type": "projection"},
            "unsupported class_embed_type 'projection'; supported: timestep, identity",
        ),
        (
            {"resnet_time_scale_shift": "spatial"},
            "unsupported resnet_time_scale_shift 'spatial'; supported: default, s",
        ),
        ({"downsample_type": "fir"}, "unsupported downsample_type 'fir'; supported: conv, resnet"),
        ({"downsample_padding": 2}, "supported with downsample_padding 0 or 1, got 2"),
        ({"norm_eps": 0.0}, "needs a positive setting norm_eps, got 0.0"),
    ],
)
def test_configurations_of_unet2d_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        FAMILIES["unet2d"].build("UNet2DModel", {**BLOCKS, **arguments}, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": 1}, "UNet2DConditionModel has no setting colour"),
        ({"only_cross_attention": [True, True]}, "supported with only_cross_attention=False, got True"),
        ({"encoder_hid_dim": 8}, "UNet2DConditionModel is supported with no encoder_hid_dim, got 8"),
        ({"time_cond_proj_dim": 256}, "supported with no time_cond_proj_dim, got 256"),
        (
            {"class_embed_type": "simple_projection"},
            "unsupported class_embed_type 'simple_projection'; supported: time",
        ),
        ({"class_embed_type": "projection"}, "'projection' needs projection_class_embeddings_input_dim"),
        ({"addition_embed_type": "image"}, "unsupported addition_embed_type 'image'; supported: text_time"),
        ({"addition_embed_type": "text_time"}, "'text_time' needs addition_time_embed_dim and"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "supported: DownBlock2D, CrossAttnDownBlock2D"),
        ({"attention_head_dim": [2]}, "has 2 levels in block_out_channels, but 1 in attention_head_dim"),
        ({"layers_per_block": [1, 1, 1]}, "has 2 levels in block_out_channels, but 3 in layers_per_block"),
        (
            {"transformer_layers_per_block": [[1], [1]]},
            "needs a setting transformer_layers_per_block of the kind tuple",
        ),
        ({"cross_attention_dim": [8, 16]}, "needs a setting cross_attention_dim of the kind int"),
        ({"attention_head_dim": 5}, "can't split 32 channels into attention_head_dim 5, its number of heads"),
    ],
)
def test_configurations_of_unet2d_condition_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        FAMILIES["unet2d_condition"].build("UNet2DConditionModel", {**BLOCKS, **arguments}, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_vq_embeddings": 8}, "AutoencoderKL has no setting num_vq_embeddings"),
        ({"latents_mean": [0.0] * 4}, "AutoencoderKL is supported with no latents_mean"),
        ({"latents_std": [1.0] * 4}, "AutoencoderKL is supported with no latents_std"),
        ({"scaling_factor": 0}, "AutoencoderKL needs a positive setting scaling_factor, got 0"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "'AttnUpDecoderBlock2D'; supported: UpDecoderBlock2D"),
        ({"sample_size": 9}, "needs a sample_size of one or two multiples of 2, got 9"),
    ],
)
def test_configurations_of_the_autoencoder_that_do_not_fit(arguments, message):
    given = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, **LEVELS}
    with pytest.raises(ValueError, match=message) as raised:
        FAMILIES["autoencoder_kl"].build("AutoencoderKL", {**given, **arguments}, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("family", "cls"), [("autoencoder_kl", "VQModel"), ("unet2d", "UNet1DModel")])
def test_classes_that_are_not_there(family, cls):
    known = {"autoencoder_kl": "AutoencoderKL", "unet2d": "UNet2DModel"}[family]
    with pytest.raises(ValueError, match=f"unknown class '{cls}' of family '{family}'; known: {known}"):
        FAMILIES[family].build(cls, {}, None)


def test_nulls_are_defaults_and_sizes_may_be_two():
    build = FAMILIES["unet2d"].build
    null = build(
        "UNet2DModel", {**BLOCKS, "sample_size": None, "norm_num_groups": None, "class_embed_type": None}, None
    )
    assert null.image_shape == (64, 64, 3)
    assert null.module.norm_num_groups == 32
    assert build("UNet2DModel", {**BLOCKS, "sample_size": [8, 16]}, None).image_shape == (8, 16, 3)
    autoencoder = FAMILIES["autoencoder_kl"].build("AutoencoderKL", {"shift_factor": None}, None).module
    assert (autoencoder.scaling_factor, autoencoder.shift_factor, autoencoder.factor) == (0.18215, 0.0, 1)


def test_predictions_are_of_the_channels_of_images():
    case = networks.Case("unet2d", "unet2d_scale_shift_classes")
    network = FAMILIES[case.family].build(case.cls, case.arguments, None)
    module, params = of_zeros(case.family, case.cls, json.dumps(case.arguments))
    x, t = jnp.zeros((2, 16, 16, 3)), jnp.zeros(2)
    predict = lambda params, label: network.predict(module, params, x, t, label)
    assert network.num_classes == 7
    assert module.out_channels == 6
    assert jax.eval_shape(predict, params, jnp.zeros(2, jnp.int32)).shape == x.shape


def repeated(latent):
    """A decoder without a view beyond a position."""
    return jnp.sin(latent[..., :3] * 2).repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize(
    ("shape", "tile", "overlap"),
    [
        ((16, 16), 8, 0.25),
        ((13, 30), 8, 0.5),
        ((5, 19), 8, 0.0),
        ((11, 11), 8, 0.8),
        ((9, 8), 8, 0.25),
        ((3, 4), 2, 0.9),
    ],
)
def test_tiles_of_a_decoder_without_neighbours_are_its_image(shape, tile, overlap):
    latent = networks.normal("latent", (2, *shape, 4)).astype(np.float32)
    tiled = jax.jit(lambda latent: decode_tiled(repeated, latent, 4, tile=tile, overlap=overlap))(latent)
    np.testing.assert_allclose(tiled, repeated(latent), atol=1e-6)


def test_tiles_of_a_local_decoder_differ_only_beside_their_edges():
    def blurred(latent):
        padded = jnp.pad(latent, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(padded[:, 1:-1, i : i + latent.shape[2]] for i in range(3)).repeat(2, axis=1).repeat(2, axis=2)

    latent = networks.normal("latent", (1, 12, 24, 2)).astype(np.float32)
    tiled = jax.jit(lambda latent: decode_tiled(blurred, latent, 2, tile=12))(latent)
    off = np.flatnonzero(np.max(np.abs(tiled - blurred(latent)), axis=(0, 1, 3)) > 1e-5) // 2
    assert set(off.tolist()) == {9, 11, 12, 20}  # tiles are 0-11, 9-20 and 12-23


def test_a_latent_of_one_tile_is_decoded_at_once():
    latent = networks.normal("latent", (1, 5, 8, 4))
    assert decode_tiled(lambda latent: latent, latent, 1, tile=8) is latent
    for tile, overlap in ((0, 0.25), (8, 1.0), (8, -0.1)):
        with pytest.raises(ValueError, match="tile must be at least 1 and overlap in"):
            decode_tiled(repeated, latent, 4, tile=tile, overlap=overlap)


def test_tiles_are_like_the_whole_and_need_less_memory():
    case = networks.Case("autoencoder_kl", "vae_no_mid_attention")
    model = load(case)
    latent = networks.normal("input:latent", (1, 40, 40, 4)).astype(np.float32)
    plain = lambda params, latent: model.decode(params, latent)
    tiled = lambda params, latent: decode_tiled(lambda part: plain(params, part), latent, 2, tile=16)
    programs = [jax.jit(fn).lower(model.params, latent).compile() for fn in (plain, tiled)]
    whole, parts = (program(model.params, latent) for program in programs)
    assert whole.shape == parts.shape == (1, 80, 80, 3)
    difference = np.sqrt(np.mean((whole - parts) ** 2) / np.mean(whole**2))
    assert 1e-6 < difference < 0.3  # norms see a tile's statistics alone
    needed = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert needed[1] < needed[0] / 2
