"""diffusers' UNet2DModel: the U-Net of DDPM's releases and of networks trained with the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained.blocks import conv
from evodiff_jax.pretrained.diffusers import _settings, blocks
from evodiff_jax.pretrained.states import Network, Origin, apply, floats, integers

ORIGIN = Origin("huggingface/diffusers", "Apache-2.0 (code); the weights are under that of their model card")

_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_CLASSES = ("", "timestep", "identity")
_RESAMPLING = ("conv", "resnet")
_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2D",),
    "time_embedding_type": ("positional",),
}


class UNet2DModel(nn.Module):
    """The network; attributes are the settings of `config.json`, 0 and "" for null.

    An `attention_head_dim` of 0 is one head of all channels.
    """

    sample_size: tuple[int, ...] = (64, 64)  # height and width
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int = 0
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (_DOWN[0], _DOWN[1], _DOWN[1], _DOWN[1])
    up_block_types: tuple[str, ...] = (_UP[1], _UP[1], _UP[1], _UP[0])
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int = 0
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str = ""
    num_class_embeds: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, timesteps: jax.Array, class_labels: jax.Array | None = None) -> jax.Array:
        """Evaluates the network.

        Args:
          x: (B, H, W, in_channels), of sides that are multiples of 2^(levels - 1).
          timesteps: (B,), which may be fractions.
          class_labels: (B,), integer classes with `num_class_embeds` and numbers with `class_embed_type` "timestep", or
            (B, D) with "identity", of the width of the time's embedding.

        Returns:
          (B, H, W, out_channels) in float32 at least.

        Raises:
          ValueError: an input is missing, superfluous or of another shape.
        """
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        blocks.check_image("UNet2DModel", x, self.in_channels, 2**last)
        wide = at_least_float32(jnp.result_type(x))
        condition = blocks.condition(self, timesteps, class_labels, wide)
        shift = self.resnet_time_scale_shift == "scale_shift"

        def resnet(name: str, level: int, h: jax.Array, resample: str = "", divisor: float = 1.0) -> jax.Array:
            settings = (self.norm_num_groups, self.norm_eps, shift, resample, divisor, self.dtype)
            return blocks.ResnetBlock(widths[level], *settings, name=name)(h, condition)

        def attention(name: str, h: jax.Array, groups: int, divisor: float = 1.0) -> jax.Array:
            heads = h.shape[-1] // (self.attention_head_dim or h.shape[-1])
            return blocks.SelfAttention(heads, groups, self.norm_eps, divisor, self.dtype, name=name)(h)

        def layer(way: str, i: int, level: int, h: jax.Array) -> jax.Array:
            h = resnet(f"{way}_resnets_{i}", level, h)
            kind = self.down_block_types[level] if way.startswith("down") else self.up_block_types[last - level]
            return attention(f"{way}_attentions_{i}", h, self.norm_num_groups) if kind.startswith("Attn") else h

        def down(level: int, h: jax.Array) -> jax.Array:
            name = f"down_blocks_{level}_downsamplers_0"
            if _by_resnet(self.down_block_types[level], self.downsample_type):
                return resnet(name, level, h, "down")
            return blocks.Downsampler(self.downsample_padding, self.dtype, name=name)(h)

        def middle(h: jax.Array) -> jax.Array:
            divisor = self.mid_block_scale_factor
            h = resnet("mid_block_resnets_0", last, h, divisor=divisor)
            if self.add_attention:
                groups = self.attn_norm_num_groups or (0 if shift else self.norm_num_groups)
                h = attention("mid_block_attentions_0", h, groups, divisor)
            return resnet("mid_block_resnets_1", last, h, divisor=divisor)

        def up(level: int, h: jax.Array, _: tuple[int, int]) -> jax.Array:
            name = f"up_blocks_{last - level}_upsamplers_0"
            if _by_resnet(self.up_block_types[last - level], self.upsample_type):
                return resnet(name, level, h, "up")
            return blocks.Upsampler(self.dtype, name=name)(h)

        h = x.astype(self.dtype or wide)
        h = conv(widths[0], 3, self.dtype, "conv_in")(2 * h - 1 if self.center_input_sample else h)
        h = blocks.u_shaped(h, (self.layers_per_block,) * len(widths), layer, down, middle, up)
        h = nn.silu(blocks.norm("conv_norm_out", self.norm_num_groups, self.norm_eps, self.dtype)(h))
        return blocks.widened(conv(self.out_channels, 3, self.dtype, "conv_out")(h))


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of UNet2DModel.

    Args:
      cls: "UNet2DModel".
      arguments: of the constructor, or the contents of `config.json`.
      dtype: of the computation and of the kernels, or None for that of inputs and parameters.

    Returns:
      The module and what is known of it; the prediction has the first `in_channels` of the network's outputs.

    Raises:
      ValueError: the class or a setting is unknown, or a value is impossible or unsupported.
    """
    if cls != "UNet2DModel":
        raise ValueError(f"unknown class {cls!r} of family 'unet2d'; known: UNet2DModel")
    settings = _settings.given(arguments)
    if arguments.get("attention_head_dim", 8) is None:
        settings["attention_head_dim"] = 0
    _settings.only(settings, cls, _ONLY)
    default = UNet2DModel()
    down = _settings.block_types(settings, cls, "down_block_types", _DOWN, default.down_block_types)
    up = _settings.block_types(settings, cls, "up_block_types", _UP, default.up_block_types)
    _settings.sides(settings, cls, 64, 2 ** (len(down) - 1))
    module = _settings.built(UNet2DModel, settings, dtype, down_block_types=down, up_block_types=up)
    _check(module, cls)
    shape = (*module.sample_size, module.in_channels)
    inputs = {"x": floats(1, *shape), "timesteps": floats(1)}
    classes = 0
    if module.class_embed_type == "identity":
        inputs["class_labels"] = floats(1, module.time_embedding_dim or 4 * module.block_out_channels[0])
    elif module.class_embed_type:
        inputs["class_labels"] = floats(1)
    elif module.num_class_embeds:
        inputs["class_labels"] = integers(1)
        classes = module.num_class_embeds
    return Network(
        *(module, inputs, shape, classes, ORIGIN, blocks.RENAMED, blocks.ALIASES),
        stored=dtype,
        prediction="epsilon",
        predict=_predict,
    )


def _check(module: UNet2DModel, cls: str) -> None:
    _settings.check_unet(module, cls)
    _settings.one_of(module.class_embed_type, cls, "class_embed_type", _CLASSES)
    _settings.one_of(module.downsample_type, cls, "downsample_type", _RESAMPLING)
    _settings.one_of(module.upsample_type, cls, "upsample_type", _RESAMPLING)
    size, widths = module.attention_head_dim, module.block_out_channels
    kinds = zip((*module.down_block_types, *module.up_block_types), (*widths, *widths[::-1]), strict=True)
    attending = [width for kind, width in kinds if kind.startswith("Attn")]
    attending += [widths[-1]] if module.add_attention else []
    if size and (uneven := [width for width in attending if width % size]):
        raise ValueError(f"{cls} can't split {uneven[0]} channels into heads of attention_head_dim {size}")
    if module.attn_norm_num_groups and widths[-1] % module.attn_norm_num_groups:
        raise ValueError(f"{cls} can't split {widths[-1]} channels into {module.attn_norm_num_groups} groups")


def _by_resnet(kind: str, setting: str) -> bool:
    """Whether a level resamples in a residual block; the setting is for blocks with attention only."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and setting == "resnet")


def _predict(module: nn.Module, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The prediction, without the variance that some networks predict beside it."""
    return apply(module, params, x=x, timesteps=t, class_labels=label)[..., : x.shape[-1]]
