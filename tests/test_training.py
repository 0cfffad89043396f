import argparse
import dataclasses
import gzip
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train
import training
from training.objectives import diffusion_loss, edm_loss

from evodiff_jax import preconditioning, pretrained
from evodiff_jax.evaluation.data import Dataset
from evodiff_jax.pretrained import checkpoint
from evodiff_jax.pretrained.classifier import ClassifierConfig
from evodiff_jax.pretrained.unet import UNetConfig

SIGMA_DATA = 0.7
NETWORK = UNetConfig(image_shape=(8, 8, 1), num_classes=2, widths=(16,), blocks=(1,), heads=2, condition_width=16)
CONFIG = training.TrainConfig(
    network=NETWORK, steps=6, batch=4, warmup=2, log_every=2, checkpoint_every=3, sigma_data=SIGMA_DATA
)


@pytest.fixture(scope="module")
def dataset():
    """Two classes of 8 x 8 images: bright above, bright below, a little different each."""
    labels = np.arange(12, dtype=np.int32) % 2
    rows = np.where((np.arange(8) < 4)[None] == (labels == 0)[:, None], 1.0, -1.0)
    noise = 0.1 * np.random.default_rng(0).standard_normal((12, 8, 8, 1))
    return Dataset((0.7 * rows[:, :, None, None] + noise).astype(np.float32), labels)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes types; training does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def filled(config, fill):
    """A run's state with leaves from `fill(shape and dtype)`: nothing to compile, unlike a true initial state."""
    return jax.tree.map(fill, jax.eval_shape(lambda: training.initial_state(config)))


# The objective


@pytest.mark.parametrize("sigma", [0.01, 0.7, 30.0])
def test_loss_of_known_denoisers(sigma):
    # Gaussian data: a network that returns 0 gives the optimal denoiser c_skip x, whose weighted loss is 1.
    x0 = SIGMA_DATA * jax.random.normal(jax.random.key(0), (500, 64), jnp.float32)
    noise = jax.random.normal(jax.random.key(1), x0.shape, jnp.float32)
    sigmas = jnp.full((500,), sigma, jnp.float32)
    zero = preconditioning.precondition(lambda x, c_noise: jnp.zeros_like(x), SIGMA_DATA)
    loss = edm_loss(zero, x0, sigmas, noise, SIGMA_DATA)
    chex.assert_shape(loss, (500,))
    np.testing.assert_allclose(jnp.mean(loss), 1.0, rtol=0.03)
    # Any other linear network is worse, and a denoiser that knows x0 has no loss.
    for slope in (-0.2, 0.2):
        other = preconditioning.precondition(lambda x, c_noise, slope=slope: slope * x, SIGMA_DATA)
        assert jnp.mean(edm_loss(other, x0, sigmas, noise, SIGMA_DATA)) > jnp.mean(loss) + 0.03
    np.testing.assert_allclose(edm_loss(lambda x, s: x0, x0, sigmas, noise, SIGMA_DATA), 0.0, atol=1e-6)


@pytest.mark.slow
def test_label_dropout_hides_labels(dataset):
    config = training.TrainConfig(network=NETWORK)
    rng = np.random.default_rng(0)  # a new network's output layer is zero and would hide everything before it
    params = filled(config, lambda p: 0.2 * rng.standard_normal(p.shape).astype(np.float32)).params

    @jax.jit
    def loss(labels, dropout):
        of_labels = diffusion_loss(NETWORK, SIGMA_DATA, -0.85, 1.4, dropout)
        return of_labels(params, dataset.images, labels, jax.random.key(1))

    difference = lambda dropout: abs(loss(dataset.labels, dropout) - loss(1 - dataset.labels, dropout))
    assert difference(0.0) > 1e-5
    assert difference(1.0) == 0.0


# A run


def test_every_epoch_shows_every_image_once():
    epochs = [np.concatenate([training.batch_indices(3, epoch * 4 + i, 5, 20) for i in range(4)]) for epoch in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0][:5], training.batch_indices(4, 0, 5, 20))
    chex.assert_shape(training.batch_indices(0, 7, 6, 20), (6,))  # 20 is no multiple of 6: the rest is left out


SMALL_CLASSIFIER = ClassifierConfig(image_shape=(8, 8, 1), num_classes=2, widths=(8,), features=8, dropout=0.0)


@pytest.mark.parametrize(
    ("network", "load"),
    [
        pytest.param(SMALL_CLASSIFIER, pretrained.load_classifier, marks=pytest.mark.slow),
        pytest.param(NETWORK, pretrained.load, marks=pytest.mark.slow),
    ],
    ids=["classifier", "diffusion model"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dataset, monkeypatch, network, load):
    config = dataclasses.replace(CONFIG, network=network)
    write = training.write_checkpoint

    def write_and_keep_the_first(config, state, out, facts):
        write(config, state, out, facts)
        if state.step == 3:
            shutil.copytree(out, tmp_path / "resumed")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_checkpoint", write_and_keep_the_first)
        training.train(config, dataset, tmp_path / "whole")
    model = load(tmp_path / "resumed" / training.MODEL_FILE)
    assert model.metadata["steps"] == 3
    training.train(config, dataset, tmp_path / "resumed", resume=True)
    runs = [tmp_path / "whole", tmp_path / "resumed"]
    states = [checkpoint.load(run / training.STATE_FILE, kind="training state").arrays for run in runs]
    chex.assert_trees_all_equal(*states)
    assert states[0]["step"] == 6
    exported = [load(run / training.MODEL_FILE) for run in runs]
    chex.assert_trees_all_equal(exported[0].params, exported[1].params)
    assert exported[0].metadata["steps"] == 6
    assert any(
        np.any(old != new) for old, new in zip(*map(jax.tree.leaves, (model.params, exported[1].params)), strict=True)
    )


@pytest.mark.slow
def test_a_tiny_network_learns_a_tiny_set(tmp_path, dataset):
    config = training.TrainConfig(
        network=NETWORK, steps=600, batch=12, learning_rate=1e-2, warmup=20, checkpoint_every=600, sigma_data=SIGMA_DATA
    )
    model = pretrained.load(training.train(config, dataset, tmp_path))
    label = jnp.asarray([0, 1], jnp.int32)
    # In pure noise only the label says which half is bright.
    noise = 80.0 * jax.random.normal(jax.random.key(0), (2, 8, 8, 1), jnp.float32)
    x0 = jax.jit(model.denoise)(model.params, noise, jnp.float32(80.0), label)
    error = jnp.mean(jnp.square(x0 - dataset.images[:2]))
    assert error < 0.1 * SIGMA_DATA**2


@pytest.mark.slow
def test_averaged_weights_follow_the_power_function(dataset):
    config = training.TrainConfig(network=SMALL_CLASSIFIER, batch=4, warmup=2)
    state = filled(config, lambda p: np.full(p.shape, 0.1, p.dtype))
    step = jax.jit(training.make_step(config))
    history = []
    for i in range(5):
        state, _ = step(state, dataset.images[:4], dataset.labels[:4])
        history.append(np.asarray(state.params["logits"]["kernel"]))
        if i == 0:  # nothing of the start is left after one step
            np.testing.assert_array_equal(state.average["logits"]["kernel"], history[0])
    # Step i of n has the weight of the integral of t^exponent over its share of the run.
    weights = np.diff((np.arange(6) / 5.0) ** (config.ema_exponent + 1))
    expected = sum(weight * params for weight, params in zip(weights, history, strict=True))
    np.testing.assert_allclose(state.average["logits"]["kernel"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_classifier_learns(tmp_path, dataset):
    config = training.TrainConfig(
        network=SMALL_CLASSIFIER, steps=60, batch=12, learning_rate=2e-2, warmup=5, checkpoint_every=60
    )
    classifier = pretrained.load_classifier(training.train(config, dataset, tmp_path))
    output = jax.jit(classifier.predict)(classifier.params, dataset.images)
    np.testing.assert_array_equal(output.logits.argmax(-1), dataset.labels)


# What a user can get wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": -1}, "batch must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"sigma_data": float("inf")}, "sigma_data must be positive"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"seed": -1}, "seed"),
        ({"ema_exponent": -1.0}, "ema_exponent"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        training.TrainConfig(**change)


def test_data_that_do_not_fit(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"network takes \(8, 8, 1\), images are \(4, 8, 1\)"):
        training.train(CONFIG, Dataset(dataset.images[:, :4], dataset.labels), tmp_path)
    with pytest.raises(ValueError, match="at most the 3 images"):
        training.train(CONFIG, Dataset(dataset.images[:3], dataset.labels[:3]), tmp_path)
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 1, got 2"):
        training.train(CONFIG, Dataset(dataset.images, dataset.labels + 1), tmp_path)


def test_folders_that_do_not_fit(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match="no file"):
        training.train(CONFIG, dataset, tmp_path / "new", resume=True)
    state = filled(CONFIG, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    training.write_checkpoint(CONFIG, state, tmp_path, {})
    with pytest.raises(ValueError, match="already holds a run"):
        training.train(CONFIG, dataset, tmp_path)
    other = training.TrainConfig(**{**vars(CONFIG), "seed": 5})
    with pytest.raises(ValueError, match="of a run with seed=0"):
        training.train(other, dataset, tmp_path, resume=True)
    training.write_checkpoint(CONFIG, state._replace(step=jnp.int32(6)), tmp_path, {})
    with pytest.raises(ValueError, match="taken 6 steps already"):
        training.train(CONFIG, dataset, tmp_path, resume=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        training.train(CONFIG, dataset, file)


def parse(*words):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words)


def test_command_errors_come_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        train.run(parse("--data", str(tmp_path), "--out", str(tmp_path / "run")))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        train.run(parse("--steps", "0", "--out", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "network", "steps", "batch"),
    [
        (["--steps", "7", "--batch", "5"], UNetConfig(), 7, 5),
        (["--what", "classifier"], ClassifierConfig(), 3_000, 128),
    ],
)
def test_command_passes_its_arguments_on(tmp_path, monkeypatch, capsys, words, network, steps, batch):
    for name, shape in (("images-idx3", (4, 28, 28)), ("labels-idx1", (4,))):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + bytes(math.prod(shape))))
    calls = []

    def trained(config, dataset, out, *, resume, command):
        calls.append((config, len(dataset.labels), out, resume))
        assert command == " ".join(["benchmarks/train.py", *words])
        return tmp_path / "model.safetensors"

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setattr("sys.argv", ["benchmarks/train.py", *words])
    train.run(parse(*words, "--data", str(tmp_path), "--out", "run", "--seed", "3", "--resume"))
    [(config, size, out, resume)] = calls
    assert (config.network, config.steps, config.batch, config.seed) == (network, steps, batch, 3)
    assert (size, out, resume) == (4, "run", True)
    assert capsys.readouterr().out == f"{tmp_path / 'model.safetensors'}\n"


def test_the_rate_falls_linearly_to_zero_at_the_end():
    config = dataclasses.replace(CONFIG, steps=10, cooldown=4, warmup=1, decay_start=100, learning_rate=1.0, clip=1e3)
    update = training.optimizer(config)
    gradient = jnp.ones(3)
    state = update.init(gradient)
    rates = []
    for _ in range(10):
        updates, state = update.update(gradient, state)  # a constant gradient: Adam's steps are the rate
        rates.append(-float(updates[0]))
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-4)
