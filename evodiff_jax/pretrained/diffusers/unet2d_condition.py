"""diffusers' UNet2DConditionModel: the U-Net of Stable Diffusion 1, 2 and XL, which attends to a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained.blocks import conv
from evodiff_jax.pretrained.diffusers import _settings, blocks
from evodiff_jax.pretrained.diffusers.transformer import Transformer
from evodiff_jax.pretrained.states import Network, Origin, apply, floats, integers

ORIGIN = Origin("huggingface/diffusers", "Apache-2.0 (code); the weights are under that of their model card")

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_CLASSES = ("", "timestep", "projection")
_ADDITIONS = ("", "text_time")
_TOKENS = 77  # of the text in the example input; a text may have any number
_SIZES = 6  # numbers beside the text in the example input of text_time, as XL has; the refiner has 5
_IGNORED = ("upcast_attention", "addition_embed_type_num_heads")
_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "mid_block_only_cross_attention": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (),
    "time_cond_proj_dim": (),
    "time_embedding_act_fn": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
}


class UNet2DConditionModel(nn.Module):
    """The network; attributes are the settings of `config.json`, those of levels as tuples, 0 and "" for null.

    `attention_head_dim` is the number of heads, as in the files.
    """

    sample_size: tuple[int, ...] = (64, 64)  # height and width
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (_DOWN[1], _DOWN[1], _DOWN[1], _DOWN[0])
    up_block_types: tuple[str, ...] = (_UP[0], _UP[1], _UP[1], _UP[1])
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    use_linear_projection: bool = False
    class_embed_type: str = ""
    num_class_embeds: int = 0
    addition_embed_type: str = ""
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        class_labels: jax.Array | None = None,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Evaluates the network.

        Args:
          x: (B, H, W, in_channels).
          timesteps: (B,), which may be fractions.
          encoder_hidden_states: (B, T, cross_attention_dim), the text.
          class_labels: (B,), integer classes with `num_class_embeds` and numbers with `class_embed_type` "timestep", or
            (B, projection_class_embeddings_input_dim) with "projection".
          added_cond_kwargs: with `addition_embed_type` "text_time", "text_embeds" (B, D) and "time_ids" (B, N).

        Returns:
          (B, H, W, out_channels) in float32 at least.

        Raises:
          ValueError: an input is missing, superfluous or of another shape.
        """
        blocks.check_image("UNet2DConditionModel", x, self.in_channels, 1)
        text = jnp.asarray(encoder_hidden_states)
        if text.ndim != 3 or text.shape[-1] != self.cross_attention_dim:
            needed = f"(B, T, {self.cross_attention_dim})"
            raise ValueError(f"encoder_hidden_states must have the shape {needed}, got {text.shape}")
        wide = at_least_float32(jnp.result_type(x, text))
        condition = blocks.condition(self, timesteps, class_labels, wide) + self._added(added_cond_kwargs, wide)
        text = text.astype(self.dtype or wide)
        h = x.astype(self.dtype or wide)
        h = 2 * h - 1 if self.center_input_sample else h
        h = conv(self.block_out_channels[0], 3, self.dtype, "conv_in")(h)
        last = len(self.block_out_channels) - 1

        def resnet(name: str, level: int, h: jax.Array, divisor: float = 1.0) -> jax.Array:
            shift = self.resnet_time_scale_shift == "scale_shift"
            made = blocks.ResnetBlock(
                *(self.block_out_channels[level], self.norm_num_groups, self.norm_eps, shift, "", divisor, self.dtype),
                name=name,
            )
            return made(h, condition)

        def attention(name: str, level: int, h: jax.Array) -> jax.Array:
            heads, depth = self.attention_head_dim[level], self.transformer_layers_per_block[level]
            settings = (heads, depth, self.norm_num_groups, self.use_linear_projection, self.dtype)
            return Transformer(*settings, name=name)(h, text)

        def layer(way: str, i: int, level: int, h: jax.Array) -> jax.Array:
            h = resnet(f"{way}_resnets_{i}", level, h)
            kind = self.down_block_types[level] if way.startswith("down") else self.up_block_types[last - level]
            return attention(f"{way}_attentions_{i}", level, h) if kind.startswith("Cross") else h

        def down(level: int, h: jax.Array) -> jax.Array:
            name = f"down_blocks_{level}_downsamplers_0"
            return blocks.Downsampler(self.downsample_padding, self.dtype, name=name)(h)

        def middle(h: jax.Array) -> jax.Array:
            h = resnet("mid_block_resnets_0", last, h, self.mid_block_scale_factor)
            h = attention("mid_block_attentions_0", last, h)
            return resnet("mid_block_resnets_1", last, h, self.mid_block_scale_factor)

        def up(level: int, h: jax.Array, size: tuple[int, int]) -> jax.Array:
            return blocks.Upsampler(self.dtype, name=f"up_blocks_{last - level}_upsamplers_0")(h, size)

        h = blocks.u_shaped(h, self.layers_per_block, layer, down, middle, up)
        h = nn.silu(blocks.norm("conv_norm_out", self.norm_num_groups, self.norm_eps, self.dtype)(h))
        return blocks.widened(conv(self.out_channels, 3, self.dtype, "conv_out")(h))

    def _added(self, added: Mapping[str, Any] | None, wide: Any) -> jax.Array | float:
        """The embedding of a pooled text and of sizes (B, D), 0 for a network without."""
        needed = ("text_embeds", "time_ids") if self.addition_embed_type else ()
        if sorted(added or ()) != sorted(needed):
            names = " and ".join(needed) or "nothing"
            got = ", ".join(added or ()) or "nothing"
            raise ValueError(f"added_cond_kwargs of this UNet2DConditionModel must have {names}, got {got}")
        if not added:
            return 0.0
        pooled, sizes = jnp.asarray(added["text_embeds"], wide), jnp.asarray(added["time_ids"])
        waves = blocks.sinusoids(self, sizes.reshape(-1), self.addition_time_embed_dim, wide)
        vector = jnp.concatenate([pooled, waves.reshape(sizes.shape[0], -1)], axis=-1)
        count, all_ = vector.shape[-1], self.projection_class_embeddings_input_dim
        if count != all_:
            given = f"text_embeds of {pooled.shape[-1]} and {sizes.shape[-1]} time_ids"
            raise ValueError(f"{given} make {count} numbers, the network needs {all_}")
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]
        return blocks.Embedding(width, self.dtype, name="add_embedding")(vector)


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of UNet2DConditionModel.

    Args:
      cls: "UNet2DConditionModel".
      arguments: of the constructor, or the contents of `config.json`.
      dtype: of the computation and of the kernels, or None for that of inputs and parameters.

    Returns:
      The module and what is known of it; `predict` takes as label a dictionary of the inputs beside x and the times.

    Raises:
      ValueError: the class or a setting is unknown, or a value is impossible or unsupported.
    """
    if cls != "UNet2DConditionModel":
        raise ValueError(f"unknown class {cls!r} of family 'unet2d_condition'; known: UNet2DConditionModel")
    settings = _settings.given(arguments, _IGNORED)
    for name in ("only_cross_attention", "cross_attention_dim"):
        value = settings.get(name)
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            settings[name] = value[0]
    _settings.only(settings, cls, _ONLY)
    default = UNet2DConditionModel()
    down = _settings.block_types(settings, cls, "down_block_types", _DOWN, default.down_block_types)
    up = _settings.block_types(settings, cls, "up_block_types", _UP, default.up_block_types)
    for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
        _settings.per_level(settings, name, getattr(default, name)[0], len(down))
    _settings.sides(settings, cls, 64, 2 ** (len(down) - 1))
    module = _settings.built(UNet2DConditionModel, settings, dtype, down_block_types=down, up_block_types=up)
    _check(module, cls)
    shape = (*module.sample_size, module.in_channels)
    text = floats(1, _TOKENS, module.cross_attention_dim)
    inputs: dict[str, Any] = {"x": floats(1, *shape), "timesteps": floats(1), "encoder_hidden_states": text}
    if module.class_embed_type == "projection":
        inputs["class_labels"] = floats(1, module.projection_class_embeddings_input_dim)
    elif module.class_embed_type or module.num_class_embeds:
        inputs["class_labels"] = floats(1) if module.class_embed_type else integers(1)
    if module.addition_embed_type:
        width, all_ = module.addition_time_embed_dim, module.projection_class_embeddings_input_dim
        count = min(_SIZES, (all_ - 1) // width)
        inputs["added_cond_kwargs"] = {"text_embeds": floats(1, all_ - count * width), "time_ids": floats(1, count)}
    return Network(
        *(module, inputs, shape, 0, ORIGIN, blocks.RENAMED, blocks.ALIASES),
        stored=dtype,
        prediction="epsilon",
        predict=_predict,
    )


def _check(module: UNet2DConditionModel, cls: str) -> None:
    _settings.one_of(module.class_embed_type, cls, "class_embed_type", _CLASSES)
    _settings.one_of(module.addition_embed_type, cls, "addition_embed_type", _ADDITIONS)
    _settings.check_unet(module, cls)
    for width, heads in zip(module.block_out_channels, module.attention_head_dim, strict=True):
        if not heads or width % heads:
            raise ValueError(f"{cls} can't split {width} channels into attention_head_dim {heads}, its number of heads")
    input_dim = module.projection_class_embeddings_input_dim
    if "projection" in module.class_embed_type and not input_dim:
        raise ValueError(f"{cls} with class_embed_type 'projection' needs projection_class_embeddings_input_dim")
    if module.addition_embed_type and not 0 < module.addition_time_embed_dim < input_dim:
        needed = "addition_time_embed_dim and a larger projection_class_embeddings_input_dim"
        raise ValueError(f"{cls} with addition_embed_type 'text_time' needs {needed}")


def _predict(module: nn.Module, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The prediction for a label such as {"encoder_hidden_states": ...}, passed on by name."""
    return apply(module, params, x=x, timesteps=t, **(label or {}))
