"""A diffusion model in the latents of an autoencoder, with the text encoders that condition it.

    prompts --(tokenizers, text encoders)--> Text --(network, solver)--> latents --(autoencoder)--> pictures

Parameters are an argument of every function here, as in `model`: they may be sharded, or cast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evodiff_jax.denoisers import classifier_free_guidance, from_prediction
from evodiff_jax.pretrained.diffusers.autoencoder_kl import decode_tiled
from evodiff_jax.pretrained.model import Model, limited
from evodiff_jax.pretrained.text.tokenizer import Tokenizer, tokenize
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.types import Denoiser

_SCORE, _NEGATIVE_SCORE = 6.0, 2.5  # aesthetic scores that XL's refiner is given
_LOG_VARIANCE = (-30.0, 20.0)  # the range that the logarithm of a latent's variance is limited to


class Encoder(NamedTuple):
    """A text encoder and its tokenizer."""

    model: Model
    tokenizer: Tokenizer


class Text(NamedTuple):
    """Encoded prompts.

    Attributes:
      condition: what the network is given, arrays with the batch axis in front.
      null: the same for the negative prompts.
    """

    condition: dict[str, Any]
    null: dict[str, Any]


class Pipeline(NamedTuple):
    """The networks of a folder.

    Attributes:
      name: of the folder.
      network: the diffusion model of the latents, with its schedule.
      autoencoder: from images to latents and back.
      encoders: the text encoders; none for a model of classes.
      zeros_for_no_prompt: whether zeros stand for a negative prompt that is not given, in place of an empty one.
      digest: SHA-256 of the digests of all files.
    """

    name: str
    network: Model
    autoencoder: Model
    encoders: tuple[Encoder, ...]
    zeros_for_no_prompt: bool
    digest: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of all networks: "network", "autoencoder" and, a tuple, "encoders"."""
        encoders = tuple(encoder.model.params for encoder in self.encoders)
        return {"network": self.network.params, "autoencoder": self.autoencoder.params, "encoders": encoders}

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the latents."""
        return self.network.schedule

    @property
    def factor(self) -> int:
        """Pixels of an image to one position of its latents, along a side."""
        return self.autoencoder.module.factor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the network was trained on."""
        height, width, _ = self.network.image_shape
        return height * self.factor, width * self.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The shape (h, w, channels) of the latents of images of (height, width).

        Raises:
          ValueError: the sides are no multiples of what the networks halve them to.
        """
        step = self.factor * _step(self.network)
        if any(side < 1 or side % step for side in size):
            raise ValueError(f"{self.name} makes images whose sides are multiples of {step}, got {size[0]} x {size[1]}")
        height, width = (side // self.factor for side in size)
        return height, width, self.autoencoder.module.latent_channels

    def text(
        self,
        params: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        size: tuple[int, int] | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        clip_skip: int = 0,
        chunks: bool = False,
    ) -> Text:
        """Encodes prompts. Runs on the host but for the encoders, which are compiled once for a number of prompts.

        Args:
          params: the parameters, usually `pipeline.params`.
          prompts: B texts.
          negative_prompts: what to guide away from, one text a prompt; None for none.
          size: height and width of the images, by default `size`; Stable Diffusion XL is conditioned on it.
          original_size: the height and width that XL is told the image had before it was cut, by default `size`.
          crop: the top and left that XL is told it was cut at.
          clip_skip: how many of the last layers of the text encoders to leave out.
          chunks: encode prompts that are too long in parts, beside each other; by default they are cut, with a warning
            that names what was cut.

        Returns:
          The conditions and those of the negative prompts.

        Raises:
          ValueError: the model has no text encoder, there is no prompt, or there are not as many negative ones.
        """
        if not self.encoders:
            raise ValueError(f"{self.name} has no text encoder: it takes no prompt")
        if not prompts or (negative_prompts is not None and len(negative_prompts) != len(prompts)):
            negative = 0 if negative_prompts is None else len(negative_prompts)
            raise ValueError(f"one negative prompt a prompt is needed, got {len(prompts)} prompts, {negative} negative")
        xl = self._takes_sizes
        both = [*prompts, *([""] * len(prompts) if negative_prompts is None else negative_prompts)]
        states: list[jax.Array] = []
        pooled: dict[str, jax.Array] = {}
        for encoder, given in zip(self.encoders, params["encoders"], strict=True):
            ids, _ = tokenize(encoder.tokenizer, both, chunks=chunks)
            output = _encode(encoder.model.module, clip_skip + xl, given, ids)
            states.append(output["skipped"] if xl else output["skipped_normed"])
            pooled |= {"text_embeds": output["text_embeds"]} if "text_embeds" in output else {}
        given = {"encoder_hidden_states": jnp.concatenate(states, axis=-1), **(pooled if xl else {})}
        condition, null = ({name: part[i] for name, part in _halves(given).items()} for i in (0, 1))
        if negative_prompts is None and self.zeros_for_no_prompt:
            null = jax.tree.map(jnp.zeros_like, null)
        if not xl:
            return Text(condition, null)
        size = self.size if size is None else size
        numbers = (*(size if original_size is None else original_size), *crop)
        return Text(
            *(
                self._with_sizes(given, numbers, size, score)
                for given, score in ((condition, _SCORE), (null, _NEGATIVE_SCORE))
            )
        )

    @property
    def takes_mask(self) -> bool:
        """Whether the network is one of inpainting, which is given the mask and the rest of the image."""
        return self.network.module.in_channels == 2 * self.autoencoder.module.latent_channels + 1

    def latent_mask(self, pixels: Any) -> jax.Array:
        """The latents of which any pixel is chosen.

        Args:
          pixels: booleans (B, H, W, 1).

        Returns:
          Booleans (B, h, w, 1).
        """
        batch, height, width, _ = jnp.shape(pixels)
        factor = self.factor
        apart = jnp.reshape(pixels, (batch, height // factor, factor, width // factor, factor, 1))
        return apart.any((2, 4))

    def with_mask(self, params: Any, text: Text, image: Any, repaint: Any) -> Text:
        """The conditions with what an inpainting network is given beside its latents.

        Args:
          params: the parameters, usually `pipeline.params`.
          text: from `text`, of B prompts.
          image: (1, H, W, C) from -1 to 1.
          repaint: booleans (1, H, W, 1), True where the image is to be painted anew.
        """
        batch = text.condition["encoder_hidden_states"].shape[0]
        mask = self.latent_mask(repaint).astype(jnp.float32)
        kept = self.encode(params, jnp.where(repaint, 0.0, image))
        beside = jnp.concatenate([mask, kept], axis=-1)
        beside = jnp.broadcast_to(beside, (batch, *beside.shape[1:]))
        return Text(*({**given, "beside": beside} for given in text))

    def denoiser(
        self,
        params: Any,
        text: Text,
        guidance: Any = 1.0,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> Denoiser:
        """Returns denoise(x, t) of latents for `evodiff_jax.sample`, at the times of `schedule`.

        For a model of classes take that of `network`.

        Args:
          params: the parameters, usually `pipeline.params`.
          text: from `text`.
          guidance: scale of classifier-free guidance, see `denoisers.classifier_free_guidance`; 1 is none.
          rescale: how far the deviation is brought back, see there; of the network's predictions, as in diffusers.
          interval: the noise levels (low, high] of sigma / alpha in which to guide.
        """
        network = self.network.network
        assert network.predict is not None
        module, predict = network.module, network.predict

        def fn(x: jax.Array, t: jax.Array, given: dict[str, Any]) -> jax.Array:
            given = dict(given)
            beside = given.pop("beside", None)
            x = x if beside is None else jnp.concatenate([x, beside.astype(x.dtype)], axis=-1)
            return predict(module, params["network"], x, jnp.broadcast_to(t, x.shape[:1]), given)

        guided = classifier_free_guidance(
            fn, text.condition, text.null, guidance, rescale=rescale, interval=interval, schedule=self.schedule
        )
        return limited(from_prediction(guided, self.schedule, network.prediction), network)

    def encode(self, params: Any, images: Any, key: jax.Array | None = None) -> jax.Array:
        """The latents of images, at the scale that the network was trained on.

        Args:
          params: the parameters, usually `pipeline.params`.
          images: (B, H, W, C) from -1 to 1.
          key: draws from the autoencoder's distribution; None takes its mean.

        Returns:
          (B, h, w, channels).
        """
        mean, log_variance = jnp.split(self.autoencoder.encode(params["autoencoder"], images), 2, axis=-1)
        if key is not None:
            deviation = jnp.exp(jnp.clip(log_variance, *_LOG_VARIANCE) / 2)
            mean = mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)
        module = self.autoencoder.module
        return (mean - module.shift_factor) * module.scaling_factor

    def decode(self, params: Any, latents: Any, tile: int | None = None) -> jax.Array:
        """The images of latents.

        Args:
          params: the parameters, usually `pipeline.params`.
          latents: (B, h, w, channels), as sampled.
          tile: side of the tiles, in pixels, that are decoded one after another and blended, so that memory does not
            grow with the image as it otherwise does; None for all at once.

        Returns:
          (B, H, W, C), from about -1 to 1.
        """
        module = self.autoencoder.module
        latents = latents / module.scaling_factor + module.shift_factor
        decode = functools.partial(self.autoencoder.decode, params["autoencoder"])
        if tile is None:
            return decode(latents)
        return decode_tiled(decode, latents, self.factor, tile=max(1, tile // self.factor))

    def decode_each(self, params: Any, latents: jax.Array) -> jax.Array:
        """As `decode`, one after another in the memory of one."""
        return jax.lax.map(lambda latent: self.decode(params, latent[None])[0], latents)

    @property
    def _takes_sizes(self) -> bool:
        """Whether this is Stable Diffusion XL, whose network is told of sizes and of the pooled text."""
        return getattr(self.network.module, "addition_embed_type", None) == "text_time"

    def _with_sizes(
        self, given: dict[str, Any], numbers: tuple[int, ...], size: tuple[int, int], score: float
    ) -> dict[str, Any]:
        module, pooled = self.network.module, given["text_embeds"]
        count = (module.projection_class_embeddings_input_dim - pooled.shape[-1]) // module.addition_time_embed_dim
        known = {6: (*numbers, *size), 5: (*numbers, score)}
        if count not in known:
            raise ValueError(f"{self.name} takes {count} numbers beside the text; XL takes 6, its refiner 5")
        time_ids = jnp.broadcast_to(jnp.asarray(known[count], jnp.float32), (len(pooled), count))
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return {"encoder_hidden_states": given["encoder_hidden_states"], "added_cond_kwargs": added}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(module: Any, skip: int, params: Any, ids: Any) -> dict[str, jax.Array]:
    """The encoder's outputs of ids (N, T), or of chunks (N, K, T), which come to stand one after another."""
    run = lambda ids: module.apply({"params": params}, ids, skip)
    if ids.ndim == 2:
        return run(ids)
    count, chunks, length = ids.shape
    joined = lambda of: of.reshape(count, chunks * length, -1) if of.ndim == 3 else of.reshape(count, chunks, -1)[:, 0]
    return jax.tree.map(joined, run(ids.reshape(-1, length)))


def _halves(given: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
    return {name: jnp.split(value, 2) for name, value in given.items()}


def _step(network: Model) -> int:
    """What the sides of latents must be multiples of."""
    module = network.module
    if network.cls == "UNet2DModel":
        return 2 ** (len(module.block_out_channels) - 1)
    return getattr(module, "patch_size", 1)
