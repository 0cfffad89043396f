"""A pretrained network as a value to pass around: its parameters, and what turns them into a denoiser.

Parameters are an argument of every function here, so that inside your own jitted function they stay inputs of the
program rather than constants baked into it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.denoisers import classifier_free_guidance, clip, dynamic_threshold, from_prediction
from evodiff_jax.pretrained import adm_release, edm, inception
from evodiff_jax.pretrained.diffusers import autoencoder_kl, unet2d, unet2d_condition
from evodiff_jax.pretrained.dit import release as dit
from evodiff_jax.pretrained.states import Network, Origin, apply, restore
from evodiff_jax.pretrained.text import clip as clip_text
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.types import Denoiser


class Family(NamedTuple):
    """Networks of one project.

    Attributes:
      origin: source and licence.
      build: build(cls, arguments, dtype) -> the network.
    """

    origin: Origin
    build: Callable[[str, Mapping[str, Any], Any], Network]


FAMILIES = {
    "edm": Family(edm.ORIGIN, edm.build),
    "adm": Family(adm_release.ORIGIN, adm_release.build),
    "inception": Family(inception.ORIGIN, inception.build),
    "unet2d": Family(unet2d.ORIGIN, unet2d.build),
    "unet2d_condition": Family(unet2d_condition.ORIGIN, unet2d_condition.build),
    "autoencoder_kl": Family(autoencoder_kl.ORIGIN, autoencoder_kl.build),
    "clip_text": Family(clip_text.ORIGIN, clip_text.build),
    "dit": Family(dit.ORIGIN, dit.build),
}
"""Families by name."""

DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
"""By name, the type that a module computes in; None is that of its inputs and parameters, float32 at least."""


class Model(NamedTuple):
    """A pretrained network: a diffusion model, a classifier of noisy images, or a network of features.

    Attributes:
      name: what it was loaded as.
      cls: the class of the original.
      network: the Flax module and what is known of it.
      params: its parameters, a tree of arrays.
      digest: SHA-256 of the file in hexadecimal, "" where there is none.
      metadata: what else is known of the weights.
    """

    name: str
    cls: str
    network: Network
    params: Any
    digest: str
    metadata: Mapping[str, Any]

    @property
    def module(self) -> nn.Module:
        """The Flax linen module of the parameters."""
        return self.network.module

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule.

        Raises:
          ValueError: the network is no diffusion model, nor a classifier of noisy images.
        """
        if self.network.schedule is None:
            where = "; load the folder that its scheduler is in too" if self.network.predict is not None else ""
            raise ValueError(
                f"{self.name} ({self.cls}) has no noise schedule: it is no diffusion model by itself{where}"
            )
        return self.network.schedule

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.network.image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for an unconditional model."""
        return self.network.num_classes

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class", None where the network has none."""
        return self.network.null_class

    @property
    def licence(self) -> str:
        """The licence of the weights."""
        return self.network.origin.licence

    @property
    def source(self) -> str:
        """The project that released the weights."""
        return self.network.origin.source

    def apply(self, params: Any, **inputs: Any) -> Any:
        """Evaluates the network as the original does, with the original's inputs by name.

        Args:
          params: the parameters, usually `model.params`.
          **inputs: images (B, H, W, C), times and noise levels (B,), classes integers (B,).

        Returns:
          What the original returns, images as (B, H, W, C), features as a dictionary; in float32, or in float64 where a
          parameter or an image is.
        """
        return apply(self.module, params, **inputs)

    def encode(self, params: Any, image: Any) -> jax.Array:
        """The moments of an autoencoder's latents: mean and logarithm of the variance, before it is limited.

        Args:
          params: the parameters, usually `model.params`.
          image: (B, H, W, C) from -1 to 1; the sides are multiples of the autoencoder's factor.

        Returns:
          (B, H / factor, W / factor, 2 L), the means in the first L channels.

        Raises:
          ValueError: the network is no autoencoder, or the image is of another size.
        """
        return apply(self._autoencoder(), params, method="encode", image=image)

    def decode(self, params: Any, latent: Any) -> jax.Array:
        """The images of an autoencoder's latents, as they come from `encode`, without a scaling factor.

        Args:
          params: the parameters, usually `model.params`.
          latent: (B, H, W, L).

        Returns:
          (B, factor H, factor W, C), from about -1 to 1.

        Raises:
          ValueError: the network is no autoencoder.
        """
        return apply(self._autoencoder(), params, method="decode", latent=latent)

    def _autoencoder(self) -> nn.Module:
        if not hasattr(self.module, "decode"):
            raise ValueError(f"{self.name} ({self.cls}) is no autoencoder")
        return self.module

    def denoiser(
        self,
        params: Any,
        label: Any = None,
        guidance: Any = 1.0,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> Denoiser:
        """Returns denoise(x, t) for `evodiff_jax.sample`, at the times of `schedule`.

        Data predictions are clipped where the model's own samplers clip them.

        Args:
          params: the parameters, usually `model.params`.
          label: integer classes (B,), `null_class` for none. Left out, a model that has a null class uses that.
          guidance: scale of classifier-free guidance away from the null class, see
            `denoisers.classifier_free_guidance`; 1 is none. EDM's networks take the absence of a class as input, but
            the released ones never saw it in training.
          rescale: of guidance, see there.
          interval: the noise levels (low, high] of sigma / alpha in which to guide, see there.

        Raises:
          TypeError: the labels are no integers.
          ValueError: the network is no diffusion model; a label is missing, out of range, or given to an unconditional
            model; or guidance is asked for of a model without a null class.
        """
        predict = self.network.predict
        if predict is None:
            what = f", it predicts: {self.network.prediction}" if self.network.prediction else " by itself"
            raise ValueError(f"{self.name} ({self.cls}) is no diffusion model{what}")
        self._check_guidance(label, guidance)

        def fn(x: jax.Array, t: jax.Array, label: Any = None) -> jax.Array:
            if label is None and self.null_class is not None:
                label = jnp.full(x.shape[:1], self.null_class, jnp.int32)
            return predict(self.module, params, x, t, label)

        denoise = from_prediction(fn, self.schedule, self.network.prediction, per_sample_time=True)
        if label is None:
            return limited(denoise, self.network)
        label = self._checked(label)
        null = label if self.null_class is None else jnp.full_like(label, self.null_class)
        guided = classifier_free_guidance(
            denoise,
            label,
            null,
            guidance,
            rescale=rescale,
            interval=interval,
            schedule=self.schedule,
            channels=self.network.guided_channels,
        )
        return limited(guided, self.network)

    def log_prob(self, params: Any, label: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The classifier as `denoisers.classifier_guidance` takes it.

        Args:
          params: the parameters, usually `model.params`.
          label: integer classes (B,).

        Returns:
          log_prob(x, t) -> (B,), the logarithm of the classes' probability given the noisy images x (B, H, W, C).

        Raises:
          TypeError: the labels are no integers.
          ValueError: the network is no classifier of noisy images, or a label is out of range.
        """
        if self.network.prediction != "class":
            raise ValueError(f"{self.name} ({self.cls}) is no classifier of noisy images")
        label = self._checked(label)

        def log_prob(x: jax.Array, t: jax.Array) -> jax.Array:
            logits = self.apply(params, x=x, timesteps=jnp.broadcast_to(t, x.shape[:1]))
            return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]

        return log_prob

    def _check_guidance(self, label: Any, guidance: Any) -> None:
        guided = not (isinstance(guidance, int | float | np.number) and guidance == 1)
        if self.num_classes == 0 and label is not None:
            raise ValueError(f"{self.name} is an unconditional model, which takes no label")
        if self.num_classes == 0 and guided:
            raise ValueError(f"{self.name} is an unconditional model, whose guidance must be 1, got {guidance}")
        if self.num_classes and self.null_class is None and guided:
            raise ValueError(
                f"{self.name} has no prediction without class, which guidance of {guidance} needs: guide with a "
                "classifier (denoisers.classifier_guidance), or use 1"
            )
        if self.num_classes and label is None and (guided or self.null_class is None):
            raise ValueError(f"{self.name} needs labels, integers in 0 .. {self.num_classes - 1}")

    def _checked(self, label: Any) -> jax.Array:
        label = label if isinstance(label, Tracer) else np.asarray(label)
        if not jnp.issubdtype(label.dtype, jnp.integer):
            raise TypeError(f"label must be integers, got {label.dtype}")
        if label.ndim != 1:
            raise ValueError(f"label must be (B,), one class a sample, got shape {label.shape}")
        highest = self.num_classes - 1 if self.null_class is None else self.null_class
        if not isinstance(label, Tracer) and label.size and not 0 <= int(label.min()) <= int(label.max()) <= highest:
            none = "" if self.null_class is None else f" ({self.null_class} is no class)"
            raise ValueError(
                f"labels of {self.name} must be in 0 .. {highest}{none}, got {int(label.min())} to {int(label.max())}"
            )
        return jnp.asarray(label, jnp.int32)


def limited(denoise: Denoiser, network: Network) -> Denoiser:
    """The denoiser with its predictions limited as the network's own samplers limit them."""
    if network.limit is None:
        return denoise
    if network.percentile is not None:
        return dynamic_threshold(denoise, network.percentile, network.limit)
    return clip(denoise, -network.limit, network.limit)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of weights in parts that of the digests of all files."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.suffix != ".json":
        return digest
    parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    return digest_of_all([digest, *(digest_of(path.parent / part) for part in parts)])


def digest_of_all(digests: Sequence[str]) -> str:
    """One digest of several."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def build(family: str, cls: str, arguments: Mapping[str, Any], dtype: str = "float32") -> Network:
    """The network of `from_state`, before it has parameters; arguments and errors as there."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return FAMILIES[family].build(cls, arguments, DTYPES[dtype])


def from_state(
    family: str,
    cls: str,
    arguments: Mapping[str, Any],
    arrays: Mapping[str, Any],
    *,
    dtype: str = "float32",
    name: str = "",
    digest: str = "",
) -> Model:
    """A model from the arrays of an original state dict.

    Args:
      family: "edm" (EDM), "adm" (guided-diffusion), "inception" (pytorch-fid), "unet2d", "unet2d_condition" and
        "autoencoder_kl" (diffusers), "clip_text" (transformers) or "dit" (DiT, SiT, and DiT of diffusers).
      cls: the class of the original, such as "EDMPrecond", "UNet2DConditionModel" or "CLIPTextModel".
      arguments: the arguments of its constructor, as plain numbers, strings and lists; for classes of diffusers and
        transformers the content of config.json will do too. Beside those of "adm" may stand "noise_schedule" and
        "diffusion_steps"; the flags of the release in place of the arguments will do too.
      arrays: original name to array in the original layout, (out, in, height, width) for a convolution.
      dtype: what the network computes in, "float32" or "bfloat16"; norms, softmax, embeddings of the time and
        preconditioning are computed in float32 at least. Parameters are float32, but for kernels and tables of the
        families of diffusers, transformers and DiT, which are stored in `dtype`.
      name: what to call the model, by default its class.
      digest: of the file that the arrays are from.

    Returns:
      The model.

    Raises:
      ValueError: the family, class, dtype or an argument is unknown, or an array is missing, left over, of another
        shape or not floating-point.
    """
    network = build(family, cls, arguments, dtype)
    return Model(name or cls, cls, network, restore(network, arrays, cls), digest, {})
