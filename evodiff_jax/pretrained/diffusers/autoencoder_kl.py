"""diffusers' AutoencoderKL: the autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained.blocks import conv
from evodiff_jax.pretrained.diffusers import _settings, blocks
from evodiff_jax.pretrained.states import Network, Origin, floats

ORIGIN = Origin("huggingface/diffusers", "Apache-2.0 (code); the weights are under that of their model card")

_EPSILON = 1e-6  # of all norms
_ONLY: dict[str, tuple[Any, ...]] = {"act_fn": ("silu", "swish"), "latents_mean": (), "latents_std": ()}


class AutoencoderKL(nn.Module):
    """The autoencoder; attributes are the settings of `config.json`.

    The latents that a diffusion model has are (z - shift_factor) scaling_factor for the z here.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: tuple[int, ...] = (32, 32)  # height and width
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = None

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images, per side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self) -> None:
        """Makes the parts."""
        shared = (self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention, self.dtype)
        self.encoder = _Encoder(self.block_out_channels, 2 * self.latent_channels, *shared)
        self.decoder = _Decoder(self.block_out_channels, self.out_channels, *shared)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Encodes images and decodes the means: (B, H, W, in_channels) to (B, H, W, out_channels)."""
        return self.decode(self.encode(image)[..., : self.latent_channels])

    def encode(self, image: jax.Array) -> jax.Array:
        """The moments of the latents.

        Args:
          image: (B, H, W, in_channels), from -1 to 1, of sides that are multiples of `factor`.

        Returns:
          (B, H / factor, W / factor, 2 latent_channels) in float32 at least: the means, then the logarithms of the
          variances, which the library limits to [-30, 20].

        Raises:
          ValueError: the images have another shape.
        """
        blocks.check_image("AutoencoderKL", image, self.in_channels, self.factor)
        h = self.encoder(self._narrowed(image))
        return blocks.widened(self.quant_conv(h) if self.use_quant_conv else h)

    def decode(self, latent: jax.Array) -> jax.Array:
        """The images of latents, which are as from `encode`, without scaling and shift.

        Args:
          latent: (B, H, W, latent_channels).

        Returns:
          (B, factor H, factor W, out_channels) in float32 at least, from about -1 to 1.

        Raises:
          ValueError: the latents have another shape.
        """
        blocks.check_image("AutoencoderKL", latent, self.latent_channels, 1, "latents")
        h = self._narrowed(latent)
        return blocks.widened(self.decoder(self.post_quant_conv(h) if self.use_post_quant_conv else h))

    def _narrowed(self, x: jax.Array) -> jax.Array:
        return x.astype(self.dtype or at_least_float32(x.dtype))


class _Encoder(nn.Module):
    widths: tuple[int, ...]
    channels: int
    layers: int
    groups: int
    attends: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = conv(self.widths[0], 3, self.dtype, "conv_in")(x)
        for level, width in enumerate(self.widths):
            for i in range(self.layers):
                h = _resnet(self, f"down_blocks_{level}_resnets_{i}", width)(h)
            if level < len(self.widths) - 1:
                h = blocks.Downsampler(0, self.dtype, name=f"down_blocks_{level}_downsamplers_0")(h)
        return _end(self, _middle(self, h))


class _Decoder(nn.Module):
    widths: tuple[int, ...]
    channels: int
    layers: int
    groups: int
    attends: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _middle(self, conv(self.widths[-1], 3, self.dtype, "conv_in")(x))
        for level, width in enumerate(reversed(self.widths)):
            for i in range(self.layers + 1):
                h = _resnet(self, f"up_blocks_{level}_resnets_{i}", width)(h)
            if level < len(self.widths) - 1:
                h = blocks.Upsampler(self.dtype, name=f"up_blocks_{level}_upsamplers_0")(h)
        return _end(self, h)


def _resnet(part: Any, name: str, width: int) -> blocks.ResnetBlock:
    return blocks.ResnetBlock(width, part.groups, _EPSILON, dtype=part.dtype, name=name)


def _middle(part: Any, h: jax.Array) -> jax.Array:
    h = _resnet(part, "mid_block_resnets_0", h.shape[-1])(h)
    if part.attends:
        h = blocks.SelfAttention(1, part.groups, _EPSILON, dtype=part.dtype, name="mid_block_attentions_0")(h)
    return _resnet(part, "mid_block_resnets_1", h.shape[-1])(h)


def _end(part: Any, h: jax.Array) -> jax.Array:
    h = nn.silu(blocks.norm("conv_norm_out", part.groups, _EPSILON, part.dtype)(h))
    return conv(part.channels, 3, part.dtype, "conv_out")(h)


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of AutoencoderKL.

    Args:
      cls: "AutoencoderKL".
      arguments: of the constructor, or the contents of `config.json`.
      dtype: of the computation and of the kernels, or None for that of inputs and parameters.

    Returns:
      The module, with methods `encode` and `decode`, and what is known of it.

    Raises:
      ValueError: the class or a setting is unknown, or a value is impossible or unsupported.
    """
    if cls != "AutoencoderKL":
        raise ValueError(f"unknown class {cls!r} of family 'autoencoder_kl'; known: AutoencoderKL")
    settings = _settings.given(arguments, ("force_upcast",))
    _settings.only(settings, cls, _ONLY)
    default = AutoencoderKL()
    down = _settings.block_types(settings, cls, "down_block_types", default.down_block_types, default.down_block_types)
    up = _settings.block_types(settings, cls, "up_block_types", default.up_block_types, default.up_block_types)
    _settings.sides(settings, cls, 32, 2 ** (len(down) - 1))
    module = _settings.built(AutoencoderKL, settings, dtype, down_block_types=down, up_block_types=up)
    shape = (*module.sample_size, module.in_channels)
    inputs = {"image": floats(1, *shape)}
    return Network(module, inputs, shape, 0, ORIGIN, blocks.RENAMED, blocks.ALIASES, stored=dtype)


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array], latent: jax.Array, factor: int, *, tile: int, overlap: float = 0.25
) -> jax.Array:
    """Decodes a large latent in overlapping tiles, one after another, which bounds the memory by that of one tile.

    Where tiles overlap, linear ramps that sum to one blend them. Tiles do not see one another: with a network whose
    outputs depend on distant positions, as by attention or group norms, the image differs from that of `decode`.

    Args:
      decode: maps (B, h, w, L) to (B, factor h, factor w, C).
      latent: (B, H, W, L).
      factor: how many times larger the image is, per side.
      tile: side of a tile, in positions of the latent; a latent that is not larger is decoded at once.
      overlap: the least part of a tile that it shares with the next, from 0 to 1, 1 excluded.

    Returns:
      (B, factor H, factor W, C), of the type that `decode` returns.

    Raises:
      ValueError: the tile or the overlap is out of range.
    """
    if tile < 1 or not 0 <= overlap < 1:
        raise ValueError(f"tile must be at least 1 and overlap in [0, 1), got {tile} and {overlap}")
    batch, height, width = latent.shape[:3]
    if max(height, width) <= tile:
        return decode(latent)
    (rows, down), (columns, across) = (_tiles(side, factor, tile, overlap) for side in (height, width))
    each = [(row, column, i, j) for i, row in enumerate(rows) for j, column in enumerate(columns)]
    shape = (batch, min(tile, height), min(tile, width), latent.shape[3])
    example = jax.eval_shape(decode, jax.ShapeDtypeStruct(shape, latent.dtype))
    down, across = (jnp.asarray(weights, example.dtype) for weights in (down, across))

    def add(image: jax.Array, position: jax.Array) -> tuple[jax.Array, None]:
        row, column, i, j = position
        part = decode(jax.lax.dynamic_slice(latent, (0, row, column, 0), shape))
        part = part * down[i][:, None, None] * across[j][:, None]
        at = (0, factor * row, factor * column, 0)
        return jax.lax.dynamic_update_slice(image, jax.lax.dynamic_slice(image, at, part.shape) + part, at), None

    image = jnp.zeros((batch, factor * height, factor * width, example.shape[3]), example.dtype)
    return jax.lax.scan(add, image, jnp.asarray(each))[0]


def _tiles(side: int, factor: int, tile: int, overlap: float) -> tuple[list[int], np.ndarray]:
    """First positions of the tiles along a side, and each tile's weights (tiles, factor tile), which sum to one."""
    tile = min(tile, side)
    stride = max(1, tile - int(np.ceil(tile * overlap)))
    starts = [*range(0, side - tile, stride), side - tile]
    weights = np.ones((len(starts), factor * tile))
    for i, (before, start) in enumerate(itertools.pairwise(starts), 1):
        shared = factor * (before + tile - start)
        ramp = (np.arange(shared) + 0.5) / max(shared, 1)
        weights[i, :shared] *= ramp
        weights[i - 1, factor * tile - shared :] *= ramp[::-1]
    total = np.zeros(factor * side)  # above one where three tiles meet
    for start, weight in zip(starts, weights, strict=True):
        total[factor * start : factor * (start + tile)] += weight
    shares = [total[factor * start : factor * (start + tile)] for start in starts]
    return starts, weights / np.stack(shares)
