"""A small convolutional classifier, for measuring what a sampler produced.

Its logits say whether a sample is what was asked for; its features are a space in which to compare sets of images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp


class ClassifierOutput(NamedTuple):
    """What the classifier says about images.

    Attributes:
      logits: float32 (B, num_classes).
      features: float32 (B, features), the layer before the logits.
    """

    logits: jax.Array
    features: jax.Array


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Everything that determines the classifier's parameters.

    Attributes:
      image_shape: height, width and channels of one image.
      num_classes: number of classes.
      widths: channels of each stage; every stage halves the resolution.
      features: width of the layer before the logits.
      dropout: dropout rate before the logits, used in training only.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    num_classes: int = 10
    widths: tuple[int, ...] = (32, 64, 96)
    features: int = 64
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be three positive numbers (H, W, C), got {self.image_shape}")
        if not self.widths or min(*self.widths, self.features, self.num_classes) < 1:
            raise ValueError(f"widths, features and num_classes must be at least 1, got {self}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a dictionary that `json.dumps` takes."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassifierConfig:
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: a field is unknown or has a value or type that the network cannot have.
        """
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"unknown or mistyped classifier settings: {error}") from error


class Classifier(nn.Module):
    """Convolutional classifier; see `ClassifierConfig` for its sizes.

    Called with x (B, H, W, C) in [-1, 1]; computes in float32 whatever x's type. With `train=True` and a dropout rate
    above 0 it needs a "dropout" key.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> ClassifierOutput:
        """Returns logits and features."""
        c = self.config
        h = x.astype(jnp.float32)
        for i, width in enumerate(c.widths):
            h = nn.Conv(width, (3, 3), strides=(2, 2), name=f"conv_{i}_0")(h)
            h = nn.silu(nn.LayerNorm(name=f"norm_{i}_0")(h))
            h = nn.Conv(width, (3, 3), name=f"conv_{i}_1")(h)
            h = nn.silu(nn.LayerNorm(name=f"norm_{i}_1")(h))
        h = jnp.mean(h, axis=(1, 2))
        features = nn.silu(nn.Dense(c.features, name="features")(h))
        h = nn.Dropout(c.dropout, deterministic=not train)(features)
        return ClassifierOutput(nn.Dense(c.num_classes, name="logits")(h), features)


def apply_classifier(
    config: ClassifierConfig, params: Any, x: jax.Array, dropout_key: jax.Array | None = None
) -> ClassifierOutput:
    """Classifies images.

    Args:
      config: the network's settings.
      params: its weights.
      x: images (B, H, W, C) in [-1, 1].
      dropout_key: a key turns dropout on, for training.

    Returns:
      float32 logits (B, num_classes) and features (B, features).

    Raises:
      ValueError: x is not (B, H, W, C) with the configured channels.
    """
    if x.ndim != 4 or x.shape[-1] != config.image_shape[2]:
        raise ValueError(f"x must be (batch, height, width, {config.image_shape[2]}), got {x.shape}")
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    output = Classifier(config).apply({"params": params}, x, train=dropout_key is not None, rngs=rngs)
    return cast(ClassifierOutput, output)
