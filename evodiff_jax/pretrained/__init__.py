"""Flax models: public checkpoints, read without PyTorch, and the models that come with the package."""

from evodiff_jax.extras import require

require("flax", "safetensors", extra="models")

from evodiff_jax.pretrained.classifier import Classifier, ClassifierConfig, ClassifierOutput
from evodiff_jax.pretrained.loading import convert, describe, describe_folder, load
from evodiff_jax.pretrained.model import Model, from_state
from evodiff_jax.pretrained.packaged import ImageClassifier, apply_denoiser, available, load_classifier
from evodiff_jax.pretrained.pipeline import Pipeline, Text
from evodiff_jax.pretrained.pipeline_loading import default_dtype, is_pipeline, load_pipeline, with_autoencoder
from evodiff_jax.pretrained.unet import UNet, UNetConfig

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "ClassifierOutput",
    "ImageClassifier",
    "Model",
    "Pipeline",
    "Text",
    "UNet",
    "UNetConfig",
    "apply_denoiser",
    "available",
    "convert",
    "default_dtype",
    "describe",
    "describe_folder",
    "from_state",
    "is_pipeline",
    "load",
    "load_classifier",
    "load_pipeline",
    "with_autoencoder",
]
