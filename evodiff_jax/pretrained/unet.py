"""A small U-Net: the network inside the packaged models.

The layout is chosen for small images on a CPU. Pixels are first folded into channels (`patch`), so that no
convolution runs at full resolution with few channels, and most of the width sits at the coarsest level, where self-
attention is cheap as well. Noise level and class enter every residual block as a scale and a shift after its second
normalisation.

    x (B, H, W, C) -- fold by patch --> level 0 --> level 1 --> ... --> coarsest level (with self-attention)
                                           |           |                     |
    F (B, H, W, C) <- unfold by patch - level 0 <-- level 1 <-- ... <--------+
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

_MOST_POSITIONS = 2**14  # one head's attention weights of one image are then 1 GiB
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Everything that determines the network's parameters and their use.

    Attributes:
      image_shape: height, width and channels of one image.
      num_classes: number of classes; label `num_classes` stands for "no class".
      patch: side of the square of pixels folded into channels before the first level.
      widths: channels of each level, finest first; each level after the first halves the resolution.
      blocks: residual blocks of each level, on the way down and again on the way up.
      heads: attention heads at the coarsest level.
      condition_width: width of the embedding of noise level and class.
      dropout: dropout rate inside the residual blocks, used in training only.
      dtype: type the network computes in, "float32" or "bfloat16"; parameters are always float32.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    num_classes: int = 10
    patch: int = 2
    widths: tuple[int, ...] = (48, 128)
    blocks: tuple[int, ...] = (1, 2)
    heads: int = 4
    condition_width: int = 256
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be three positive numbers (H, W, C), got {self.image_shape}")
        if not self.widths or len(self.widths) != len(self.blocks):
            raise ValueError(f"widths and blocks need one entry a level, got {self.widths} and {self.blocks}")
        positive = (*self.widths, *self.blocks, self.patch, self.heads, self.num_classes)
        if min(positive) < 1:
            raise ValueError(f"widths, blocks, patch, heads and num_classes must be at least 1, got {self}")
        if any(width % 8 for width in self.widths) or self.widths[-1] % self.heads:
            raise ValueError(
                f"widths must be multiples of 8, the last one of heads={self.heads} too, got {self.widths}"
            )
        if self.condition_width < 2 or self.condition_width % 2:
            raise ValueError(f"condition_width must be even and positive, got {self.condition_width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        _check_size(self, self.image_shape[:2])

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a dictionary that `json.dumps` takes."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: a field is unknown or has a value or type that the network cannot have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown network setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"network settings of a wrong type: {error}") from error


def _check_size(config: UNetConfig, size: tuple[int, ...]) -> None:
    """Raises a ValueError if an image of (height, width) cannot be halved at every level, or is too large."""
    step = config.patch * 2 ** (len(config.widths) - 1)
    if any(side % step for side in size):
        raise ValueError(
            f"image sides must be multiples of patch * 2^(levels - 1) = {step}, got {size[0]} x {size[1]}; "
            "pad the images or change patch or widths"
        )
    positions = math.prod(side // step for side in size)
    if positions > _MOST_POSITIONS:
        raise ValueError(
            f"images of {size[0]} x {size[1]} have {positions:,} positions at the coarsest level, where attention takes"
            f" memory by the square of that: at most {_MOST_POSITIONS:,} are possible, add levels or use smaller images"
        )


def fold(x: jax.Array, factor: int) -> jax.Array:
    """Moves squares of `factor` x `factor` pixels into channels: (B, fH, fW, C) to (B, H, W, f f C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // factor, width // factor, -1)


def unfold(x: jax.Array, factor: int) -> jax.Array:
    """Inverse of `fold`: (B, H, W, f f C) to (B, fH, fW, C)."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, factor, factor, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * factor, width * factor, -1)


def noise_features(c_noise: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of the noise level, at periods from 8 down to 1/4; (B,) to (B, width), float32.

    EDM's c_noise = log(sigma)/4 spans about 2.7 between sigma 0.002 and 80, so these periods resolve it without
    making the network an erratic function of sigma.
    """
    periods = 8.0 * 32.0 ** (-jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32))
    angles = 2.0 * math.pi * c_noise.astype(jnp.float32)[:, None] / periods
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class _Block(nn.Module):
    """Residual block: two 3x3 convolutions, noise level and class between them, attention after them if asked."""

    width: int
    heads: int  # 0: no attention
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        h = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv_in")(nn.silu(norm("norm_in")(x)))
        modulation = nn.Dense(2 * self.width, dtype=self.dtype, name="modulation")(condition)[:, None, None, :]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        h = nn.silu(norm("norm_out")(h) * (1 + scale) + shift)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        x = x + nn.Conv(self.width, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros, name="conv_out")(h)
        if self.heads == 0:
            return x
        tokens = norm("norm_attention")(x).reshape(x.shape[0], -1, self.width)
        attended = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, out_kernel_init=nn.initializers.zeros, name="attention"
        )(tokens)
        return x + attended.reshape(x.shape)


class UNet(nn.Module):
    """Class-conditional U-Net F(x, c_noise, label); see `UNetConfig` for its sizes.

    Called with x (B, H, W, C) of any floating type, c_noise (B,) and label (B,) of integers in 0 .. num_classes (the
    last one for "no class"), it returns an array of x's shape in the configuration's dtype. With `train=True` and a
    dropout rate above 0 it needs a "dropout" key. The output layer starts at zero, so a new network returns zeros.

    Raises:
      ValueError: x is not (B, H, W, C) with the configured channels, or its sides cannot be halved at each level.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, label: jax.Array, train: bool = False) -> jax.Array:
        """Evaluates the network."""
        c = self.config
        dtype = _DTYPES[c.dtype]
        channels = c.image_shape[2]
        if x.ndim != 4 or x.shape[-1] != channels:
            raise ValueError(f"x must be (batch, height, width, {channels}), got {x.shape}")
        _check_size(c, x.shape[1:3])

        noise = nn.Dense(c.condition_width, dtype=dtype, name="noise_in")(
            noise_features(c_noise, c.condition_width).astype(dtype)
        )
        # Flax's default would start the classes 1/sqrt(width) apart, drowned by the noise level.
        named = nn.Embed(
            c.num_classes + 1,
            c.condition_width,
            dtype=dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="label",
        )(label)
        condition = nn.Dense(c.condition_width, dtype=dtype, name="condition")(nn.silu(noise + named))
        condition = nn.silu(condition)

        last = len(c.widths) - 1
        block = lambda level, name: _Block(
            c.widths[level], c.heads if level == last else 0, c.dropout, dtype, name=name
        )
        h = nn.Conv(c.widths[0], (3, 3), dtype=dtype, name="stem")(fold(x.astype(dtype), c.patch))
        skips = []
        for level, count in enumerate(c.blocks):
            if level > 0:
                h = nn.Dense(c.widths[level], dtype=dtype, name=f"down_{level}")(fold(h, 2))
            for i in range(count):
                h = block(level, f"down_{level}_{i}")(h, condition, train)
                skips.append(h)
        for level in range(last, -1, -1):
            for i in range(c.blocks[level]):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = nn.Dense(c.widths[level], dtype=dtype, name=f"merge_{level}_{i}")(h)
                h = block(level, f"up_{level}_{i}")(h, condition, train)
            if level > 0:
                h = unfold(nn.Dense(4 * c.widths[level - 1], dtype=dtype, name=f"up_{level}")(h), 2)
        h = nn.silu(nn.LayerNorm(dtype=dtype, name="norm_out")(h))
        h = nn.Conv(channels * c.patch**2, (3, 3), dtype=dtype, kernel_init=nn.initializers.zeros, name="out")(h)
        return unfold(h, c.patch)


def apply_unet(
    config: UNetConfig,
    params: Any,
    x: jax.Array,
    c_noise: jax.Array,
    label: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Evaluates the network F(x, c_noise, label); shapes and errors as for `UNet`.

    Args:
      config: the network's settings.
      params: its weights.
      x: scaled noisy images (B, H, W, C).
      c_noise: noise levels as the network sees them, (B,).
      label: classes (B,), num_classes for "no class".
      dropout_key: a key turns dropout on, for training.

    Returns:
      The network's output, of x's shape in the configuration's dtype.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    output = UNet(config).apply({"params": params}, x, c_noise, label, train=dropout_key is not None, rngs=rngs)
    return cast(jax.Array, output)
