"""The models that come with the package, and models that its training wrote."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from evodiff_jax.files import packaged_or_path
from evodiff_jax.preconditioning import precondition
from evodiff_jax.pretrained import checkpoint
from evodiff_jax.pretrained.classifier import Classifier, ClassifierConfig, ClassifierOutput, apply_classifier
from evodiff_jax.pretrained.model import Model, digest_of
from evodiff_jax.pretrained.states import Network, Origin, floats, integers
from evodiff_jax.pretrained.unet import UNet, UNetConfig, apply_unet
from evodiff_jax.schedules import edm

_SUFFIX = ".safetensors"
_CLASSIFIER = "_classifier"
_ORIGIN = Origin("evodiff_jax", "Apache-2.0")


class ImageClassifier(NamedTuple):
    """A classifier of images, for measuring samples.

    Attributes:
      config: the network's settings.
      params: its weights, float32.
      name: what it was loaded as.
      metadata: what is known about it.
    """

    config: ClassifierConfig
    params: Any
    name: str
    metadata: dict[str, Any]

    def predict(self, params: Any, x: jax.Array) -> ClassifierOutput:
        """Classifies images.

        Args:
          params: the weights, usually `classifier.params`.
          x: images (B, H, W, C) in [-1, 1].

        Returns:
          float32 logits (B, num_classes) and features (B, features).
        """
        return apply_classifier(self.config, params, x)


def apply_denoiser(
    config: UNetConfig, sigma_data: float, params: Any, x: jax.Array, sigma: ArrayLike, label: ArrayLike
) -> jax.Array:
    """Predicts the clean image from a noisy one.

    Args:
      config: the network's settings.
      sigma_data: standard deviation of the training data.
      params: the weights.
      x: images plus noise of standard deviation sigma, (B, H, W, C).
      sigma: noise level above 0, a scalar or (B,).
      label: integer classes, a scalar or (B,); num_classes for "no class". Values outside 0 .. num_classes are not
        detected inside jit.

    Returns:
      The prediction of the clean images, of x's shape and dtype.

    Raises:
      ValueError: a shape does not fit the network.
    """
    label = jnp.asarray(label).astype(jnp.int32)
    if label.shape not in ((), x.shape[:1]):
        raise ValueError(f"label must be a scalar or ({x.shape[0]},), got shape {label.shape}")
    label = jnp.broadcast_to(label, x.shape[:1])
    denoise = precondition(lambda scaled, c_noise: apply_unet(config, params, scaled, c_noise, label), sigma_data)
    return denoise(x, sigma)


def load_model(path: Path, name: str, dtype: str = "float32") -> Model:
    """Loads a diffusion model that training wrote, the packaged ones among them.

    Args:
      path: the file.
      name: what to call it.
      dtype: what the network computes in, "float32" or "bfloat16".

    Returns:
      The model; its `null_class` is one beyond the classes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no diffusion model of this kind.
    """
    found = checkpoint.load(path, kind="diffusion model")
    settings = dict(found.config)
    sigma_data = settings.pop("sigma_data", None)
    if not isinstance(sigma_data, float) or not sigma_data > 0:
        raise ValueError(f"{path} states no sigma_data; train anew or pass another file")
    config = _read_config(UNetConfig, settings | {"dtype": dtype}, path)
    inputs = {"x": floats(1, *config.image_shape), "c_noise": floats(1), "label": integers(1)}

    def predict(_: Any, params: Any, x: jax.Array, sigma: jax.Array, label: jax.Array) -> jax.Array:
        return apply_denoiser(config, sigma_data, params, x, sigma, label)

    network = Network(
        module=UNet(config),
        inputs=inputs,
        image_shape=config.image_shape,
        num_classes=config.num_classes,
        origin=_ORIGIN,
        schedule=edm(),
        prediction="data",
        predict=predict,
        null_class=config.num_classes,
    )
    params = _restore_params(UNet(config), tuple(inputs.values()), found, path)
    return Model(name, "UNet", network, params, digest_of(path), found.card)


def load_classifier(name_or_path: str | os.PathLike[str] = "fashion_mnist") -> ImageClassifier:
    """Loads a classifier.

    Args:
      name_or_path: the name of a packaged classifier, or the path of a file that training wrote.

    Returns:
      The classifier.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no packaged classifier has this name, or the file is no classifier.
    """
    path = locate(name_or_path, _CLASSIFIER)
    found = checkpoint.load(path, kind="classifier")
    config = _read_config(ClassifierConfig, found.config, path)
    arguments = (floats(1, *config.image_shape),)
    params = _restore_params(Classifier(config), arguments, found, path)
    return ImageClassifier(config, params, Path(name_or_path).stem, found.card)


def available() -> tuple[str, ...]:
    """Returns the names of the packaged diffusion models."""
    return _packaged("")


def _packaged(ending: str) -> tuple[str, ...]:
    files = [entry.name for entry in _weights().iterdir() if entry.name.endswith(_SUFFIX)]
    stems = [name.removesuffix(_SUFFIX) for name in files]
    chosen = [stem for stem in stems if stem.endswith(_CLASSIFIER) == (ending == _CLASSIFIER)]
    return tuple(sorted(stem.removesuffix(ending) for stem in chosen))


def _weights() -> Path:
    # The weights are plain files wherever the package is installed by pip; nothing is unpacked.
    return Path(str(resources.files("evodiff_jax.pretrained") / "weights"))


def locate(name_or_path: str | os.PathLike[str], ending: str = "") -> Path:
    """Returns the file of a packaged name, or the given path.

    Raises:
      ValueError: it is neither a packaged name nor, by its looks, a path.
    """
    packaged = {name: _weights() / f"{name}{ending}{_SUFFIX}" for name in _packaged(ending)}
    return packaged_or_path("model", name_or_path, packaged)


def _read_config(cls: Any, settings: dict[str, Any], path: Path) -> Any:
    try:
        return cls.from_dict(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _restore_params(net: Any, arguments: tuple[Any, ...], found: checkpoint.Checkpoint, path: Path) -> Any:
    """Checks the stored arrays against the network's shapes and returns them as JAX arrays."""
    template = jax.eval_shape(lambda *args: net.init(jax.random.key(0), *args), *arguments)["params"]
    return jax.tree.map(jnp.asarray, checkpoint.restore(template, found, path))
