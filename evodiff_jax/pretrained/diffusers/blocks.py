"""What diffusers' U-Nets and autoencoder have in common: residual blocks, attention, resampling, times, and the U.

Modules are named as in the files, "down_blocks_0_resnets_1" for "down_blocks.0.resnets.1"; `RENAMED` says so. Images
are (B, H, W, C), tokens (B, T, C) with T = H W in the order of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained import blocks

RENAMED = ((r"(?<!linear)_(\d+)[_.]", r".\1."), (r"mid_block_", "mid_block."))
ALIASES = tuple(
    (rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
"""Of attention in files from before version 0.17."""


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut, modulated by an embedding of the time where there is one.

    Attributes:
      width: channels of the output.
      groups: of the norms.
      epsilon: of the norms.
      scale_shift: whether the embedding scales and shifts after the second norm, or is added before it.
      resample: "" or "down" or "up", after the first norm and in the shortcut.
      divisor: of the output.
      dtype: of the computation.
    """

    width: int
    groups: int
    epsilon: float
    scale_shift: bool = False
    resample: str = ""
    divisor: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Maps x (B, H, W, C) with the condition (B, D)."""
        resampled = _RESAMPLERS[self.resample]
        h = resampled(nn.silu(norm("norm1", self.groups, self.epsilon, self.dtype)(x)))
        h = blocks.conv(self.width, 3, self.dtype, "conv1")(h)
        after = norm("norm2", self.groups, self.epsilon, self.dtype)
        if condition is None:
            h = after(h)
        else:
            modulation = (2 if self.scale_shift else 1) * self.width
            e = nn.Dense(modulation, dtype=self.dtype, name="time_emb_proj")(nn.silu(condition))[:, None, None]
            scaled = self.scale_shift
            h = after(h) * (1 + e[..., : self.width]) + e[..., self.width :] if scaled else after(h + e)
        h = blocks.conv(self.width, 3, self.dtype, "conv2")(nn.silu(h))
        x = resampled(x)
        if x.shape[-1] != self.width:
            x = blocks.conv(self.width, 1, self.dtype, "conv_shortcut")(x)
        return (x + h) / self.divisor


class SelfAttention(nn.Module):
    """Attention of the positions of an image to one another, with a shortcut.

    Attributes:
      heads: their number.
      groups: of the norm, 0 for none.
      epsilon: of the norm.
      divisor: of the output.
      dtype: of the computation.
    """

    heads: int
    groups: int
    epsilon: float
    divisor: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C)."""
        h = norm("group_norm", self.groups, self.epsilon, self.dtype)(x) if self.groups else x
        tokens = h.reshape(x.shape[0], -1, x.shape[-1])
        return (x + attended(tokens, tokens, self.heads, True, self.dtype).reshape(x.shape)) / self.divisor


class Embedding(nn.Module):
    """Two linear layers, of sinusoids of a time or of a vector that conditions.

    Attributes:
      width: of the output.
      dtype: of the computation.
    """

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps (B, C) to (B, width)."""
        dense = lambda name: nn.Dense(self.width, dtype=self.dtype, name=name)
        return dense("linear_2")(nn.silu(dense("linear_1")(h)))


class Downsampler(nn.Module):
    """Halves height and width by a convolution; padding 0 is one zero on the right and at the bottom."""

    padding: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / 2, W / 2, C)."""
        pad = [(1, 1)] * 2 if self.padding else [(0, 1)] * 2
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=pad, dtype=self.dtype, name="conv")(x)


class Upsampler(nn.Module):
    """Doubles height and width by repetition, then a convolution; where a side was odd, it is one less than that."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """Maps (B, H, W, C) to (B, 2 H, 2 W, C), or to the size given."""
        _, height, width, channels = x.shape
        if size in (None, (2 * height, 2 * width)):
            h = blocks.upsample(x, _BOX)
        else:
            h = x[:, np.arange(size[0]) * height // size[0]][:, :, np.arange(size[1]) * width // size[1]]
        return blocks.conv(channels, 3, self.dtype, "conv")(h)


def u_shaped(
    h: jax.Array,
    layers: Sequence[int],
    layer: Callable[[str, int, int, jax.Array], jax.Array],
    down: Callable[[int, jax.Array], jax.Array],
    middle: Callable[[jax.Array], jax.Array],
    up: Callable[[int, jax.Array, tuple[int, int]], jax.Array],
) -> jax.Array:
    """Goes down the levels and up again, where every layer is given an output of the way down beside its input.

    Args:
      h: (B, H, W, C), the input convolved.
      layers: per level, the number of layers on the way down; one more is on the way up.
      layer: layer(way, index, level, h), of the way "down_blocks_0" or "up_blocks_0", a block, and a layer's index.
      down: down(level, h) -> half the size, from a level to the next.
      middle: between the ways.
      up: up(level, h, size) -> twice the size, from a level to the one above, whose height and width are given.

    Returns:
      (B, H, W, width of level 0).
    """
    skips = [h]
    last = len(layers) - 1
    for level, count in enumerate(layers):
        for i in range(count):
            h = layer(f"down_blocks_{level}", i, level, h)
            skips.append(h)
        if level < last:
            h = down(level, h)
            skips.append(h)
    h = middle(h)
    for level in range(last, -1, -1):
        for i in range(layers[level] + 1):
            h = layer(f"up_blocks_{last - level}", i, level, jnp.concatenate([h, skips.pop()], axis=-1))
        if level:
            _, height, width, _ = skips[-1].shape
            h = up(level, h, (height, width))
    return h


def norm(name: str, groups: int, epsilon: float, dtype: Any) -> nn.GroupNorm:
    """Group normalisation with the given name."""
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def condition(net: Any, timesteps: Any, labels: Any, wide: Any) -> jax.Array:
    """The embedding of the times, and of the classes where the network has them.

    Args:
      net: the module that calls, a U-Net.
      timesteps: (B,).
      labels: as `class_embed_type` has it, "timestep" (B,), "identity" or "projection" (B, D); else classes (B,).
      wide: the type of sinusoids.

    Returns:
      (B, width).

    Raises:
      ValueError: labels are missing, superfluous, or no classes of the network.
    """
    first, of = net.block_out_channels[0], type(net).__name__
    width = net.time_embedding_dim or 4 * first
    table = not net.class_embed_type and net.num_class_embeds
    if (net.class_embed_type or table) and labels is None:
        raise ValueError(f"{of} with this configuration has classes: give class_labels")
    if not (net.class_embed_type or table) and labels is not None:
        raise ValueError(f"{of} with this configuration has no classes: leave class_labels out")
    if table and not isinstance(labels, Tracer):
        known = np.asarray(labels)  # on the host, which is possible inside a trace too
        if np.any((known < 0) | (known >= table)):
            raise ValueError(f"class_labels of this {of} must be in 0 .. {table - 1}, got {known.tolist()}")
    time = Embedding(width, net.dtype, name="time_embedding")(sinusoids(net, timesteps, first, wide))
    if labels is None:
        return time
    if table:
        return time + nn.Embed(net.num_class_embeds, width, dtype=net.dtype, name="class_embedding")(labels)
    if net.class_embed_type == "identity":
        return time + jnp.asarray(labels, time.dtype)
    timed = net.class_embed_type == "timestep"
    h = sinusoids(net, labels, first, wide) if timed else jnp.asarray(labels, wide)
    return time + Embedding(width, net.dtype, name="class_embedding")(h)


def sinusoids(net: Any, values: Any, count: int, wide: Any) -> jax.Array:
    """Sinusoids of numbers (B,), in the order and of the frequencies of a U-Net's settings: (B, count)."""
    half = count // 2
    cos, sin = blocks.sinusoids(jnp.asarray(values).astype(wide), blocks.frequencies(half, half - net.freq_shift))
    return jnp.concatenate([cos, sin] if net.flip_sin_to_cos else [sin, cos], axis=-1)


def check_image(of: str, x: Any, channels: int, factor: int, what: str = "images") -> None:
    """Checks the shape of images.

    Raises:
      ValueError: they are not (B, H, W, channels), or a side is no multiple of the factor.
    """
    shape = jnp.shape(x)
    if len(shape) != 4 or shape[-1] != channels:
        raise ValueError(f"{of} needs {what} of shape (B, H, W, {channels}), got {shape}")
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(f"{of} needs {what} with sides that are multiples of {factor}, got {shape[1]} x {shape[2]}")


def widened(h: jax.Array) -> jax.Array:
    """In float32 at least."""
    return h.astype(at_least_float32(h.dtype))


def attended(tokens: jax.Array, context: jax.Array, heads: int, bias: bool, dtype: Any) -> jax.Array:
    """Attention between linear layers, which are of the module that calls.

    Args:
      tokens: (B, T, C).
      context: (B, S, D), which keys and values are of.
      heads: their number.
      bias: whether queries, keys and values have one.
      dtype: of the computation.

    Returns:
      (B, T, C).
    """
    channels = tokens.shape[-1]

    def apart(name: str, x: jax.Array) -> jax.Array:
        h = nn.Dense(channels, use_bias=bias, dtype=dtype, name=name)(x)
        return h.reshape(*x.shape[:2], heads, channels // heads)

    h = blocks.attend(apart("to_q", tokens), apart("to_k", context), apart("to_v", context))
    return nn.Dense(channels, dtype=dtype, name="to_out_0")(h.reshape(tokens.shape))


_BOX = (1, 1)
_RESAMPLERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "down": lambda x: blocks.downsample(x, _BOX),
    "up": lambda x: blocks.upsample(x, _BOX),
}
