"""The Inception network of FID against stored outputs of the original, and against the arrays of its released file."""

import functools
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from evodiff_jax import pretrained
from evodiff_jax.numerics import enable_x64
from evodiff_jax.pretrained import inception
from evodiff_jax.pretrained.model import FAMILIES
from evodiff_jax.pretrained.states import original_shapes

OUTPUTS = {"pool3": inception.FEATURES, "block0": 64, "block1": 192, "block2": 768}


@functools.cache
def case(name="inception_no_resize"):
    return networks.Case("inception", name)


@functools.cache
def arrays():
    return case().arrays()


def images(shape):
    return np.random.default_rng(networks.zlib.crc32(b"input:images")).integers(0, 256, shape, np.uint8)


@functools.cache
def load():
    """The model without what a file need not have: the classifier and the counts of batches."""
    needed = original_shapes(FAMILIES["inception"].build("InceptionV3", {}, None))
    assert len(needed) < len(arrays())
    return pretrained.from_state("inception", "InceptionV3", {}, {name: arrays()[name] for name in needed})


@functools.cache
def applied(*outputs, **arguments):
    """The network as a function of images, compiled for each of their shapes; few outputs take less of it."""
    module = FAMILIES["inception"].build("InceptionV3", arguments, None).module

    def chosen(params, images):
        found = module.apply({"params": params}, images)
        return {name: found[name] for name in outputs}

    return functools.partial(jax.jit(chosen), load().params)


def resized(x, size=299):
    """Bilinear between pixel centres, for one axis after the other, in the plainest way."""
    for axis in (1, 2):
        count = x.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        low = np.minimum(place.astype(int), count - 2)
        shape = [1] * x.ndim
        shape[axis] = size
        weight = (place - low).reshape(shape)
        x = x.take(low, axis) * (1 - weight) + x.take(low + 1, axis) * weight
    return x


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("inception_32", False),
        pytest.param("inception_32", True, marks=pytest.mark.slow),
        pytest.param("inception_no_resize", False, marks=pytest.mark.slow),
        pytest.param("inception_no_resize", True, marks=pytest.mark.slow),
    ],
)
def test_outputs_of_the_original(name, wide):
    facts, stored = case(name).facts, case(name).stored
    given = images(facts["inputs"]["images"]["shape"])
    if not wide:
        found = applied(*OUTPUTS, **facts["arguments"])(given)
    else:
        with enable_x64():
            widened = {name: array.astype(np.float64) for name, array in arrays().items()}
            model = pretrained.from_state(facts["family"], facts["cls"], facts["arguments"], widened)
            found = jax.jit(lambda params: model.apply(params, images=given))(model.params)
    assert {name: output.shape[1] for name, output in found.items()} == OUTPUTS
    for name, output in found.items():
        assert output.dtype == (jnp.float64 if wide else jnp.float32)
        assert networks.error(output, stored[f"{name}_64"]) < (1e-12 if wide else 1e-5)
        if not wide:
            assert networks.error(output, stored[f"{name}_32"]) < 1e-5


def test_arrays_of_the_released_file():
    released = networks.full_size("pytorch-fid-inception")
    network = FAMILIES["inception"].build("InceptionV3", {}, None)
    stored = {entry[0]: tuple(entry[1]) for entry in released["state"]}
    unused = re.compile("|".join(network.unused))
    assert original_shapes(network) == {n: shape for n, shape in stored.items() if not unused.fullmatch(n)}
    parameters = sum(np.prod(shape) for name, shape in stored.items() if name not in released["buffers"])
    assert parameters == released["parameters"]
    assert {name for name in stored if unused.fullmatch(name)} == {
        name for name in stored if name.endswith("num_batches_tracked") or name.startswith("fc.")
    }


@pytest.mark.parametrize("shape", [(1, 40, 50, 3), (1, 401, 330, 3)], ids=["enlarged", "shrunk"])
def test_images_are_resized_without_a_filter(shape):
    given = images(shape)
    expected = applied("block0", resize_input=False)(resized(given / 255).astype(np.float32))["block0"]
    assert networks.error(applied("block0")(given)["block0"], expected) < 1e-5


@pytest.mark.slow
def test_integers_are_0_to_255_and_floating_point_numbers_0_to_1():
    run = applied("block0", resize_input=False)
    given = images((1, 107, 139, 3))
    expected, scaled = run(given)["block0"], given.astype(np.float32) / 255
    np.testing.assert_array_equal(run(given.astype(np.int32))["block0"], expected)
    assert networks.error(run(scaled)["block0"], expected) < 1e-6
    raw = applied("block0", resize_input=False, normalize_input=False)
    assert networks.error(raw(2 * scaled - 1)["block0"], expected) < 1e-6


@pytest.mark.slow
def test_images_do_not_influence_each_other():
    run = applied("pool3", resize_input=False)
    given = images((2, 80, 80, 3))
    assert networks.error(run(given[1:])["pool3"], run(given)["pool3"][1:]) < 1e-6


def test_it_is_a_network_of_features_and_no_diffusion_model():
    model = load()
    assert (model.network.prediction, model.licence) == ("features", "Apache-2.0")
    with pytest.raises(ValueError, match=r"InceptionV3 \(InceptionV3\) is no diffusion model, it predicts: features"):
        model.denoiser(model.params)


@pytest.mark.parametrize(
    ("cls", "arguments", "extra", "message"),
    [
        ("ResNet", {}, {}, "unknown class 'ResNet' of family 'inception'; known: InceptionV3"),
        ("InceptionV3", {"dims": 64}, {}, "InceptionV3 has no setting dims; known: resize_input, normalize_input"),
        ("InceptionV3", {"resize_input": 1}, {}, "resize_input of the kind bool, got 1"),
        # Those of torchvision are other weights of nearly the same network.
        (
            "InceptionV3",
            {},
            {"AuxLogits.fc.weight": np.zeros((1000, 768), np.float32)},
            r"no use for the arrays AuxLogits\.fc",
        ),
    ],
)
def test_what_is_refused(cls, arguments, extra, message):
    with pytest.raises(ValueError, match=message):
        pretrained.from_state("inception", cls, arguments, {**arrays(), **extra})
