"""Flax models: the network, its preconditioning, its file format, and the models that come with the package."""

from evodiff_jax.models.classifier import Classifier, ClassifierConfig, ClassifierOutput
from evodiff_jax.models.pretrained import (
    ImageClassifier,
    Model,
    apply_denoiser,
    available,
    load,
    load_classifier,
)
from evodiff_jax.models.unet import UNet, UNetConfig
from evodiff_jax.preconditioning import precondition

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
    "precondition",
]
