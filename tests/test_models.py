import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evodiff_jax import preconditioning, pretrained
from evodiff_jax.pretrained.classifier import apply_classifier
from evodiff_jax.pretrained.unet import UNetConfig, apply_unet, fold, unfold

TINY = UNetConfig(image_shape=(8, 8, 2), num_classes=3, widths=(8, 16), blocks=(1, 1), heads=2, condition_width=16)
SIGMA_DATA = 0.7
HALF_THOUSAND = np.load(Path(__file__).parent / "data" / "fashion_mnist_test_500.npz")


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.fixture(scope="module")
def params():
    """Weights of a tiny network, none of them at its zero start; drawn by NumPy, which compiles nothing."""
    args = jnp.zeros((1, 8, 8, 2)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(pretrained.UNet(TINY).init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.standard_normal(p.shape).astype(np.float32)), shapes)


@pytest.fixture(scope="module")
def run(params):
    return jax.jit(lambda x, c_noise, label: apply_unet(TINY, params, x, c_noise, label))


@pytest.fixture(scope="module")
def inputs():
    return normal(0, (2, 8, 8, 2)), jnp.asarray([0.0, 0.5], jnp.float32), jnp.asarray([0, 1], jnp.int32)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(HALF_THOUSAND["images"][..., None] / np.float32(127.5) - np.float32(1))


@pytest.fixture(scope="module")
def labels():
    return jnp.asarray(HALF_THOUSAND["labels"].astype(np.int32))


@pytest.fixture(scope="module")
def model():
    return pretrained.load("fashion_mnist")


# EDM preconditioning


@pytest.mark.fast
@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.7, 5.0, 80.0])
def test_input_and_target_have_unit_variance(sigma):
    x0 = SIGMA_DATA * normal(0, (200_000,))
    x = x0 + sigma * normal(1, x0.shape)
    c = preconditioning.coefficients(jnp.float32(sigma), SIGMA_DATA)
    target = (x0 - c.c_skip * x) / c.c_out
    np.testing.assert_allclose(jnp.var(c.c_in * x), 1.0, rtol=0.02)
    np.testing.assert_allclose(jnp.var(target), 1.0, rtol=0.02)
    # c_skip is the choice that amplifies the network's errors least: the target is uncorrelated with the input.
    np.testing.assert_allclose(jnp.mean(target * x * c.c_in), 0.0, atol=0.02)


def test_limits_of_the_denoiser():
    x = normal(0, (3, 4, 4, 1))
    denoise = preconditioning.precondition(lambda x, c_noise: jnp.tanh(x) + c_noise[0], SIGMA_DATA)
    np.testing.assert_allclose(denoise(x, 1e-7), x, atol=1e-5)
    np.testing.assert_allclose(denoise(x, 1e6), SIGMA_DATA * (jnp.log(1e6) / 4) * jnp.ones_like(x), rtol=1e-4)


@pytest.mark.fast
def test_sigma_of_each_image():
    x, sigma = normal(0, (3, 4, 4, 1)), jnp.asarray([0.1, 1.0, 10.0], jnp.float32)
    seen = []

    def raw(x, c_noise):
        seen.append(c_noise)
        return jnp.sin(x)

    denoise = preconditioning.precondition(raw, SIGMA_DATA)
    together = denoise(x, sigma)
    np.testing.assert_allclose(seen[0], np.log([0.1, 1.0, 10.0]) / 4, rtol=1e-5)
    small = preconditioning.coefficients(jnp.float32(1e-9), SIGMA_DATA).c_noise  # small, and told from sigma = 0
    np.testing.assert_allclose(small, np.log(1e-9) / 4, rtol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(together[i], denoise(x[i : i + 1], sigma[i])[0], rtol=1e-6)


@pytest.mark.usefixtures("x64", "strict_promotion")
def test_denoiser_keeps_the_dtype_of_x():
    raw_dtypes = []

    def raw(x, c_noise):
        raw_dtypes.append(x.dtype)
        return jnp.zeros(x.shape, jnp.bfloat16)

    denoise = preconditioning.precondition(raw, SIGMA_DATA)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
        assert denoise(normal(0, (2, 4), dtype), 1.0).dtype == dtype
    assert raw_dtypes == [jnp.float32, jnp.float32, jnp.float64]


def test_wrong_sigmas_are_refused():
    denoise = preconditioning.precondition(lambda x, c_noise: x, SIGMA_DATA)
    with pytest.raises(ValueError, match=r"sigma must be a scalar or \(2,\)"):
        denoise(jnp.zeros((2, 4)), jnp.ones(3))
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_data must be positive"):
            preconditioning.precondition(lambda x, c_noise: x, wrong)


# U-Net


def test_unfold_inverts_fold_and_keeps_neighbours_together():
    x = normal(0, (2, 8, 12, 3))
    folded = fold(x, 4)
    chex.assert_shape(folded, (2, 2, 3, 48))
    chex.assert_trees_all_equal(unfold(folded, 4), x)
    chex.assert_trees_all_equal(folded[0, 0, 0], x[0, :4, :4].reshape(-1))


def test_new_network_returns_zeros(inputs):
    config = dataclasses.replace(TINY, widths=(8,), blocks=(1,))
    output, _ = jax.jit(pretrained.UNet(config).init_with_output)(jax.random.key(0), *inputs)
    chex.assert_trees_all_equal(output, jnp.zeros((2, 8, 8, 2), jnp.float32))


def test_every_input_reaches_the_output(run, inputs):
    x, c_noise, label = inputs
    base = run(x, c_noise, label)
    chex.assert_shape(base, x.shape)
    # A change to the second image's inputs changes the second output and leaves the first alone.
    for changed in (
        run(x.at[1, 3, 4, 0].add(1.0), c_noise, label),
        run(x, c_noise.at[1].add(0.1), label),
        run(x, c_noise, label.at[1].set(2)),
        run(x, c_noise, label.at[1].set(TINY.num_classes)),
    ):
        np.testing.assert_allclose(changed[0], base[0], atol=1e-5)
        assert jnp.max(jnp.abs(changed[1] - base[1])) > 1e-3


def test_every_pixel_sees_the_whole_image(run, inputs):
    x, c_noise, label = inputs
    changed = run(x.at[0, 0, 0, 0].add(3.0), c_noise, label) != run(x, c_noise, label)
    assert jnp.all(jnp.any(changed[0], axis=-1))


def test_bfloat16_agrees_with_float32(params, run, inputs):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    exact = run(*inputs)
    with jax.numpy_dtype_promotion("standard"):  # Flax's normalisation mixes bfloat16 and float32
        rounded = jax.jit(lambda *args: apply_unet(config, params, *args))(*inputs)
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.05


def test_dropout_acts_only_with_a_key(params, run, inputs):
    config = dataclasses.replace(TINY, dropout=0.5)
    program = lambda config: str(jax.make_jaxpr(lambda *args: apply_unet(config, params, *args))(*inputs))
    assert program(config) == program(TINY)
    dropped = jax.jit(lambda key, *args: apply_unet(config, params, *args, key))(jax.random.key(0), *inputs)
    assert jnp.all(jnp.any(dropped != run(*inputs), axis=(1, 2, 3)))


def test_other_sizes_work_and_wrong_ones_say_what_fits(params):
    def shape(*size):
        x = jax.ShapeDtypeStruct(size, jnp.float32)
        return jax.eval_shape(lambda x: apply_unet(TINY, params, x, jnp.zeros(1), jnp.zeros(1, jnp.int32)), x).shape

    assert shape(1, 4, 12, 2) == (1, 4, 12, 2)
    with pytest.raises(ValueError, match=r"multiples of .* = 4, got 8 x 10"):
        shape(1, 8, 10, 2)
    for wrong in ((1, 8, 8, 1), (8, 8, 2)):
        with pytest.raises(ValueError, match="batch, height, width, 2"):
            shape(*wrong)


def test_config_survives_json():
    config = UNetConfig(widths=(8, 16, 24), blocks=(1, 2, 3), image_shape=(16, 24, 3), dtype="bfloat16")
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = pretrained.ClassifierConfig(widths=(4, 8), features=3)
    assert pretrained.ClassifierConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (30, 30, 1)}, "multiples of .* = 4, got 30 x 30"),
        ({"image_shape": (28, 28)}, "three positive numbers"),
        ({"widths": (8,)}, "one entry a level"),
        ({"widths": (), "blocks": ()}, "one entry a level"),
        ({"blocks": (1, 0)}, "at least 1"),
        ({"widths": (8, 12)}, "multiples of 8"),
        ({"heads": 3}, "heads=3"),
        ({"condition_width": 3}, "even"),
        ({"dropout": 1.0}, "dropout"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"nothing": 1}, "unknown network setting nothing"),
        ({"blocks": "ab"}, "wrong type"),
    ],
)
def test_wrong_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(UNetConfig().to_dict() | change)


@pytest.mark.parametrize("change", [{"widths": ()}, {"features": 0}, {"dropout": -0.1}, {"nothing": 1}])
def test_wrong_classifier_configs_are_refused(change):
    with pytest.raises(ValueError, match=r"at least 1|dropout|unknown"):
        pretrained.ClassifierConfig.from_dict(pretrained.ClassifierConfig().to_dict() | change)


# Packaged models


def test_packaged_names():
    assert "fashion_mnist" in pretrained.available()
    with pytest.raises(ValueError, match=r"no packaged model 'cifar'; there are: fashion_mnist"):
        pretrained.load("cifar")
    with pytest.raises(ValueError, match=r"no packaged model 'cifar'; there are: fashion_mnist"):
        pretrained.load_classifier("cifar")


def test_packaged_model_describes_itself(model):
    assert (model.image_shape, model.num_classes, model.null_class) == ((28, 28, 1), 10, 10)
    assert (model.schedule.t_min, model.schedule.t_max) == (0.002, 80.0)
    assert len(model.digest) == 64
    assert {"steps", "loss", "date", "command", "training"} <= set(model.metadata)
    chex.assert_tree_all_finite(model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    folder = Path(pretrained.__file__).parent / "weights"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6


def test_packaged_model_denoises(model, images, labels):
    denoise = jax.jit(lambda params, x, sigma, label: model.denoiser(params, label)(x, sigma))
    x0, label = images[:64], labels[:64]

    def error(sigma, label):
        x = x0 + sigma * normal(0, x0.shape)
        prediction = denoise(model.params, x, jnp.float32(sigma), label)
        chex.assert_trees_all_equal_shapes_and_dtypes(prediction, x)
        return float(jnp.mean(jnp.square(prediction - x0)))

    for sigma in (0.05, 0.2, 0.7, 2.0, 10.0, 80.0):
        trivial = sigma**2 * SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)  # c_skip x, on data of that deviation
        assert error(sigma, label) < 0.6 * trivial
    # Where noise hides the picture, the class tells most of it: knowing it helps, a wrong one misleads.
    nothing, wrong = jnp.full_like(label, model.null_class), (label + 5) % 10
    assert error(20.0, label) < 0.8 * error(20.0, nothing)
    assert error(20.0, nothing) < error(20.0, wrong)


@pytest.mark.usefixtures("x64", "strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_packaged_model_keeps_the_dtype_of_x(model, dtype):
    x = jax.ShapeDtypeStruct((2, 28, 28, 1), dtype)
    for sigma in (1.0, np.float64(1.0)):
        x0 = jax.eval_shape(lambda x, s=sigma: model.denoiser(model.params, np.array([3, 10]))(x, s), x)
        assert (x0.shape, x0.dtype) == (x.shape, dtype)


def test_weights_are_inputs_of_the_program(model):
    x, label = jnp.zeros((2, 28, 28, 1), jnp.float32), jnp.zeros(2, jnp.int32)
    denoise = lambda params, x, sigma, label: model.denoiser(params, label)(x, sigma)
    program = jax.make_jaxpr(denoise)(model.params, x, jnp.float32(1.0), label)
    assert sum(np.size(constant) for constant in program.consts) < 1000


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (
            np.array([0, 11]),
            ValueError,
            r"labels of fashion_mnist must be in 0 \.\. 10 \(10 is no class\), got 0 to 11",
        ),
        (np.array([-1, 3]), ValueError, "got -1 to 3"),
        (np.array([0.0, 1.0]), TypeError, "label must be integers, got float64"),
        (np.array(3), ValueError, r"label must be \(B,\)"),
    ],
)
def test_wrong_labels_are_refused(model, label, error, message):
    with pytest.raises(error, match=message):
        model.denoiser(model.params, label)


def test_labels_of_another_number_than_samples_are_refused(model):
    denoise = model.denoiser(model.params, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="3"):
        denoise(jnp.zeros((2, 28, 28, 1)), 1.0)
    with pytest.raises(ValueError, match=r"label must be a scalar or \(2,\)"):
        pretrained.apply_denoiser(model.module.config, 0.7, model.params, jnp.zeros((2, 28, 28, 1)), 1.0, jnp.zeros(3))


def test_a_label_left_out_stands_for_no_class(model):
    x = normal(0, (2, 28, 28, 1))
    nothing = jax.jit(model.denoiser(model.params, jnp.full(2, model.null_class)))(x, 1.0)
    np.testing.assert_allclose(jax.jit(model.denoiser(model.params))(x, 1.0), nothing, rtol=1e-5, atol=1e-6)


def test_packaged_classifier_knows_clothes(images, labels):
    classifier = pretrained.load_classifier("fashion_mnist")
    output = jax.jit(classifier.predict)(classifier.params, images)
    chex.assert_shape(output.logits, (500, 10))
    chex.assert_shape(output.features, (500, classifier.config.features))
    assert np.mean(np.asarray(output.logits).argmax(axis=-1) == np.asarray(labels)) >= 0.88


def test_classifier_says_which_images_it_takes():
    with pytest.raises(ValueError, match="batch, height, width, 1"):
        apply_classifier(pretrained.ClassifierConfig(), {}, jnp.zeros((2, 28, 28)))
