import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from evodiff_jax import pretrained
from evodiff_jax.pretrained import checkpoint

pytestmark = pytest.mark.fast

TREE = {
    "layer": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4).T, "bias": np.float32([0.1, -2.5])},
    "step": np.int32(7),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.safetensors"
    checkpoint.save(path, TREE, kind="test", config={"width": 3}, card={"steps": 1})
    return path


def test_round_trip(path):
    found = checkpoint.load(path, kind="test")
    assert found.config == {"width": 3}
    assert found.card == {"steps": 1}
    assert set(found.arrays) == {"layer/kernel", "layer/bias", "step"}
    restored = checkpoint.restore(TREE, found, path)
    chex.assert_trees_all_equal(restored, TREE)
    chex.assert_trees_all_equal_dtypes(restored, TREE)


def test_half_precision_is_widened_again(path):
    checkpoint.save(path, TREE, kind="test", config={}, card={}, half=True)
    found = checkpoint.load(path, kind="test")
    assert found.arrays["layer/bias"].dtype == np.float16
    assert found.arrays["step"].dtype == np.int32
    restored = checkpoint.restore(TREE, found, path)
    assert restored["layer"]["bias"].dtype == np.float32
    np.testing.assert_allclose(restored["layer"]["bias"], TREE["layer"]["bias"], rtol=1e-3)


def test_half_precision_refuses_what_would_overflow(path):
    with pytest.raises(ValueError, match="beyond float16"):
        checkpoint.save(path, {"w": np.float32([1e5])}, kind="test", config={}, card={}, half=True)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged") as error:
        checkpoint.load(path, kind="test")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_foreign_files(path, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(2, np.float32)}, foreign)
    with pytest.raises(ValueError, match="not one that evodiff_jax wrote"):
        checkpoint.load(foreign, kind="test")
    foreign.write_text("no safetensors at all, but long enough to look like a header")
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        checkpoint.load(foreign, kind="test")
    with pytest.raises(ValueError, match="holds a test, expected a classifier"):
        checkpoint.load(path, kind="classifier")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        checkpoint.load(tmp_path / "nothing.safetensors", kind="test")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        pretrained.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({**TREE, "more": np.zeros(1)}, "lacks more"),
        ({"step": np.int32(0), "layer": {"kernel": TREE["layer"]["kernel"]}}, "unknown layer/bias"),
        ({**TREE, "step": np.zeros(3, np.int32)}, r"step has shape \(\), its settings need \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit(path, template, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(template, checkpoint.load(path, kind="test"), path)


def test_a_failed_write_leaves_the_old_file_alone(path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"w": np.zeros(2)}, kind="test", config={}, card={})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def tiny_model(path, **changes):
    config = pretrained.UNetConfig(
        image_shape=(8, 8, 1), num_classes=2, widths=(8, 8), blocks=(1, 1), condition_width=8, heads=2
    )
    args = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(pretrained.UNet(config).init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), shapes)
    settings = config.to_dict() | {"sigma_data": 0.7} | changes
    checkpoint.save(path, params, kind="diffusion model", config=settings, card={"steps": 3})
    return config, params


def test_a_model_comes_back_from_its_file(tmp_path):
    path = tmp_path / "tiny.safetensors"
    config, params = tiny_model(path)
    model = pretrained.load(path)
    assert (model.module.config, model.name, model.licence) == (config, "tiny", "Apache-2.0")
    assert model.metadata == {"steps": 3}
    chex.assert_trees_all_equal(model.params, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [8, 16]}, "settings need"),
        ({"widths": 8}, "wrong type"),
        ({"widths": [8, 9]}, "multiples of 8"),
        ({"colour": "red"}, "unknown network setting colour"),
        ({"sigma_data": None}, "no sigma_data"),
    ],
)
def test_model_files_with_wrong_settings(tmp_path, changes, message):
    path = tmp_path / "tiny.safetensors"
    tiny_model(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(path)
    assert str(path) in str(error.value)


def test_settings_that_are_no_mapping(tmp_path):
    path = tmp_path / "list.safetensors"
    checkpoint.save(path, TREE, kind="diffusion model", config=[1, 2], card={})
    with pytest.raises(ValueError, match="damaged settings"):
        pretrained.load(path)
