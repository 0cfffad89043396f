"""From a folder in the layout of diffusers to the pipeline that it holds."""

from __future__ import annotations

from pathlib import Path

import jax

from evodiff_jax.pretrained import folder_models as folder_of
from evodiff_jax.pretrained.folders import components, index_of, is_folder_of
from evodiff_jax.pretrained.loading import tell
from evodiff_jax.pretrained.model import Model, digest_of_all
from evodiff_jax.pretrained.pipeline import Encoder, Pipeline
from evodiff_jax.pretrained.text.tokenizer import load_tokenizer

_AUTOENCODERS = ("vae", "vqvae")
_TEXTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


def load_pipeline(path: str | Path, *, dtype: str | None = None) -> Pipeline:
    """Loads a folder in the layout of diffusers: a latent diffusion model with text encoders, or of classes.

    Stable Diffusion 1, 2 and XL with its refiner, their inpainting models, DiT. Of the scheduler the noise schedule and
    the prediction are taken; a safety checker is not loaded.

    Args:
      path: the folder, with its model_index.json.
      dtype: what the networks compute in, "float32" or "bfloat16", by default the latter on accelerators. The
        autoencoder of Stable Diffusion XL computes in float32 always.

    Returns:
      The pipeline.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is no such folder, a file in it is missing or damaged, or a component is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}; check the path")
    if is_folder_of(path) == "network":
        raise ValueError(f"{path} is the folder of one network: load it with pretrained.load, or give the folder above")
    found = components(path)
    name = path.resolve().name
    dtype = default_dtype() if dtype is None else dtype
    autoencoder = next((found[key] for key in _AUTOENCODERS if key in found), None)
    if autoencoder is None:
        raise ValueError(f"{path} has no autoencoder: load it with pretrained.load")
    if "image_encoder" in found:
        raise ValueError(f"{path} has an image_encoder, of a model conditioned on images, which is not supported")
    sampled = folder_of.sampled_component(path, found)
    texts = [(found[model], found.get(tokens)) for model, tokens in _TEXTS if model in found]
    for component in (sampled, autoencoder, *(text for text, _ in texts)):
        folder_of.class_of(component)  # before gigabytes are read
    for text, tokens in texts:
        if tokens is None:
            raise ValueError(f"{path} has a {text.name} without its tokenizer")
    tokenizers = [load_tokenizer(tokens.path) for _, tokens in texts if tokens is not None]
    scheduler = folder_of.scheduler_of(path, found)
    network = folder_of.load_component(sampled, name, dtype)
    tell(name, network.network.origin)
    xl = getattr(network.module, "addition_embed_type", None) == "text_time"
    model = folder_of.load_component(autoencoder, f"{name}/{autoencoder.name}", "float32" if xl else dtype)
    encoders = [folder_of.load_component(text, f"{name}/{text.name}", dtype) for text, _ in texts]
    return Pipeline(
        name=name,
        network=folder_of.scheduled(network, scheduler),
        autoencoder=model,
        encoders=tuple(map(Encoder, encoders, tokenizers)),
        zeros_for_no_prompt=xl and index_of(path).get("force_zeros_for_empty_prompt", True) is True,
        digest=digest_of_all([part.digest for part in (network, model, *encoders)]),
    )


def is_pipeline(path: Path) -> bool:
    """Whether a folder holds a model of latents, so that `load_pipeline` reads it, and not `load`."""
    return is_folder_of(path) == "components" and any(name in components(path) for name in _AUTOENCODERS)


def with_autoencoder(model: Model, autoencoder: Model) -> Pipeline:
    """The pipeline of a model of classes in latents and of the autoencoder that these are of.

    Raises:
      ValueError: the second is no autoencoder, or one of latents of another number of channels.
    """
    channels = getattr(autoencoder.module, "latent_channels", None)
    if channels is None:
        raise ValueError(f"{autoencoder.name} ({autoencoder.cls}) is no autoencoder")
    if channels != model.image_shape[2]:
        of_model = model.image_shape[2]
        raise ValueError(f"{autoencoder.name} has latents of {channels} channels, {model.name} of {of_model}")
    digest = digest_of_all([model.digest, autoencoder.digest])
    return Pipeline(model.name, model, autoencoder, (), False, digest)


def default_dtype() -> str:
    """What networks of this size compute in: bfloat16 where there is an accelerator."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
