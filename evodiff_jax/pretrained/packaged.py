"""The models that come with the package, as values to pass around.

    model = load("fashion_mnist")
    x0 = model.denoise(model.params, x, sigma, label)

Parameters are an argument of every function here, so that inside your own jitted function they stay inputs of the
program rather than constants baked into it.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from evodiff_jax.denoisers import classifier_free_guidance
from evodiff_jax.preconditioning import precondition
from evodiff_jax.pretrained import checkpoint
from evodiff_jax.pretrained.classifier import Classifier, ClassifierConfig, ClassifierOutput, apply_classifier
from evodiff_jax.pretrained.unet import UNet, UNetConfig, apply_unet
from evodiff_jax.types import Denoiser

_SUFFIX = ".safetensors"
_CLASSIFIER = "_classifier"


class Model(NamedTuple):
    """A class-conditional diffusion model in EDM's parameterization (alpha = 1, time = sigma).

    Attributes:
      config: the network's settings.
      params: its weights, float32.
      name: what it was loaded as.
      metadata: what is known about it: steps, batch, loss, date, the command that trained it.
      sigma_data: standard deviation of its training data.
      sigma_min: lowest noise level it is meant for.
      sigma_max: highest noise level it is meant for.
    """

    config: UNetConfig
    params: Any
    name: str
    metadata: dict[str, Any]
    sigma_data: float
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.config.image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.config.num_classes

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    def denoise(self, params: Any, x: jax.Array, sigma: ArrayLike, label: ArrayLike) -> jax.Array:
        """Predicts the clean image, see `apply_denoiser`."""
        return apply_denoiser(self.config, self.sigma_data, params, x, sigma, label)

    def denoiser(self, params: Any, label: jax.Array, guidance: ArrayLike = 1.0) -> Denoiser:
        """Returns denoise(x, t) for `evodiff_jax.sample`, with classifier-free guidance.

        Args:
          params: the weights, usually `model.params`.
          label: integer classes (B,), `null_class` for none.
          guidance: scale of the guidance, see `denoisers.classifier_free_guidance`; 1 is none.
        """

        def conditional(x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
            return self.denoise(params, x, t, label)

        return classifier_free_guidance(conditional, label, jnp.full_like(label, self.null_class), guidance)


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


def load(name_or_path: str | os.PathLike[str] = "fashion_mnist") -> Model:
    """Loads a diffusion model.

    Args:
      name_or_path: the name of a packaged model, or the path of a file that training wrote (it ends in
        ".safetensors").

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no packaged model has this name, or the file is no diffusion model.
    """
    path = _locate(name_or_path, "")
    found = checkpoint.load(path, kind="diffusion model")
    settings = dict(found.config)
    sigma_data = settings.pop("sigma_data", None)
    if not isinstance(sigma_data, float) or not sigma_data > 0:
        raise ValueError(f"{path} states no sigma_data; train anew or pass another file")
    config = _read_config(UNetConfig, settings, path)
    arguments = (
        jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    params = _restore_params(UNet(config), arguments, found, path)
    return Model(config, params, Path(name_or_path).stem, found.card, sigma_data)


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
    path = _locate(name_or_path, _CLASSIFIER)
    found = checkpoint.load(path, kind="classifier")
    config = _read_config(ClassifierConfig, found.config, path)
    arguments = (jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32),)
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


def _locate(name_or_path: str | os.PathLike[str], ending: str) -> Path:
    """Returns the file of a packaged name, or the given path."""
    name = os.fspath(name_or_path)
    if name.endswith(_SUFFIX) or os.sep in name:
        return Path(name)
    if name not in _packaged(ending):
        known = ", ".join(_packaged(ending)) or "none"
        raise ValueError(f"no packaged model {name!r}; there are: {known}; or pass the path of a {_SUFFIX} file")
    return _weights() / f"{name}{ending}{_SUFFIX}"


def _read_config(cls: Any, settings: dict[str, Any], path: Path) -> Any:
    try:
        return cls.from_dict(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _restore_params(net: Any, arguments: tuple[Any, ...], found: checkpoint.Checkpoint, path: Path) -> Any:
    """Checks the stored arrays against the network's shapes and returns them as JAX arrays."""
    template = jax.eval_shape(lambda *args: net.init(jax.random.key(0), *args), *arguments)["params"]
    return jax.tree.map(jnp.asarray, checkpoint.restore(template, found, path))
