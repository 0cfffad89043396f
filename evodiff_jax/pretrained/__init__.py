"""Flax models: the network, its file format, and the models that come with the package."""

from evodiff_jax.extras import require

require("flax", "safetensors", extra="models")

from evodiff_jax.pretrained.classifier import Classifier, ClassifierConfig, ClassifierOutput
from evodiff_jax.pretrained.packaged import (
    ImageClassifier,
    Model,
    apply_denoiser,
    available,
    load,
    load_classifier,
)
from evodiff_jax.pretrained.unet import UNet, UNetConfig

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "ClassifierOutput",
    "ImageClassifier",
    "Model",
    "UNet",
    "UNetConfig",
    "apply_denoiser",
    "available",
    "load",
    "load_classifier",
]
