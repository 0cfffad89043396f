"""The networks of guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233): U-Net and classifier of noisy images.

Modules are named as in the released files, "input_blocks_3_0" for "input_blocks.3.0". Code and weights of the release
are under the MIT licence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained import blocks


class UNetModel(nn.Module):
    """The diffusion network; attributes are the arguments of the released class.

    Called with x (B, H, W, in_channels), timesteps (B,), which may be fractions, and y (B,), the classes, for a network
    with classes. Returns (B, H, W, out_channels) in float32 at least.
    """

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]  # factors of downsampling
    dropout: float = 0.0
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    num_classes: int = 0
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, timesteps: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """Evaluates the network."""
        if (y is None) != (self.num_classes == 0):
            raise ValueError("the network has classes, y is needed" if y is None else "the network has no classes")
        condition = _time_embedding(self, x, timesteps)
        if y is not None:
            condition = condition + nn.Embed(self.num_classes, condition.shape[-1], name="label_emb")(y)
        h, skips = _encode(self, x, condition)
        h = _middle(self, h, condition)
        levels = list(enumerate(self.channel_mult))
        heads = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
        index = 0
        for level, mult in reversed(levels):
            for i in range(self.num_res_blocks + 1):
                at, part = f"output_blocks_{index}", 1
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = _res_block(self, f"{at}_0", int(mult * self.model_channels))(h, condition)
                if 2**level in self.attention_resolutions:
                    h = _attention(self, f"{at}_1", h, heads)
                    part = 2
                if level and i == self.num_res_blocks:
                    h = _resampled(self, f"{at}_{part}", h, condition, "up")
                index += 1
        h = nn.silu(_norm("out_0", self.dtype)(_widened(h)))
        return blocks.conv(self.out_channels, 3, None, "out_2")(h)


class EncoderUNetModel(nn.Module):
    """The classifier of noisy images; attributes are the arguments of the released class.

    Called with x (B, H, W, in_channels) and timesteps (B,); returns logits (B, out_channels) in float32 at least.
    """

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    pool: str = "adaptive"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, timesteps: jax.Array) -> jax.Array:
        """Evaluates the classifier."""
        condition = _time_embedding(self, x, timesteps)
        h, outputs = _encode(self, x, condition)
        h = _middle(self, h, condition)
        if self.pool == "spatial_v2":
            means = [jnp.mean(_widened(output), axis=(1, 2)) for output in (*outputs, h)]
            hidden = nn.Dense(2048, name="out_0")(jnp.concatenate(means, axis=-1))
            return nn.Dense(self.out_channels, name="out_3")(nn.silu(_norm("out_1", None)(hidden)))
        h = nn.silu(_norm("out_0", self.dtype)(_widened(h)))
        if self.pool == "attention":
            return _AttentionPool(self.num_head_channels, self.out_channels, name="out_2")(h)
        return blocks.conv(self.out_channels, 1, None, "out_3")(jnp.mean(h, axis=(1, 2), keepdims=True))[:, 0, 0]


class _ResBlock(nn.Module):
    width: int
    resample: str
    scale_shift: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        resampled = _RESAMPLERS[self.resample]
        h = resampled(nn.silu(_norm("in_layers_0", self.dtype)(x)))
        h = blocks.conv(self.width, 3, self.dtype, "in_layers_2")(h)
        modulation = (2 if self.scale_shift else 1) * self.width
        e = nn.Dense(modulation, dtype=self.dtype, name="emb_layers_1")(nn.silu(condition))[:, None, None]
        norm = _norm("out_layers_0", self.dtype)
        h = norm(h) * (1 + e[..., : self.width]) + e[..., self.width :] if self.scale_shift else norm(h + e)
        h = blocks.conv(self.width, 3, self.dtype, "out_layers_3")(nn.silu(h))
        x = resampled(x)
        if x.shape[-1] != self.width:
            x = blocks.conv(self.width, 1, self.dtype, "skip_connection")(x)
        return x + h


class _Attention(nn.Module):
    heads: int
    order: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        tokens = _norm("norm", self.dtype)(x).reshape(x.shape[0], -1, channels)
        qkv = nn.Conv(3 * channels, (1,), dtype=self.dtype, name="qkv")(tokens)
        attended = blocks.attention(qkv, self.heads, self.order)
        return x + nn.Conv(channels, (1,), dtype=self.dtype, name="proj_out")(attended).reshape(x.shape)


class _AttentionPool(nn.Module):
    """The output at the mean of all positions, which attends to them and to itself."""

    head_channels: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        tokens = x.reshape(x.shape[0], -1, channels)
        tokens = jnp.concatenate([jnp.mean(tokens, axis=1, keepdims=True), tokens], axis=1)
        shape = (channels, tokens.shape[1])
        tokens = tokens + self.param("positional_embedding", nn.initializers.normal(channels**-0.5), shape).T
        qkv = nn.Conv(3 * channels, (1,), name="qkv_proj")(tokens)
        attended = blocks.attention(qkv, channels // self.head_channels, "qkv heads channels")
        return nn.Conv(self.width, (1,), name="c_proj")(attended[:, :1])[:, 0]


class _Convolved(nn.Module):
    """A convolution in a scope of its own, named as in the file."""

    name_inside: str
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return blocks.conv(x.shape[-1], 3, self.dtype, self.name_inside, self.stride)(x)


def _encode(net: Any, x: jax.Array, condition: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    h = x.astype(at_least_float32(x.dtype) if net.dtype is None else net.dtype)
    h = blocks.conv(int(net.channel_mult[0] * net.model_channels), 3, net.dtype, "input_blocks_0_0")(h)
    outputs = [h]
    for level, mult in enumerate(net.channel_mult):
        if level:
            h = _resampled(net, f"input_blocks_{len(outputs)}_0", h, condition, "down")
            outputs.append(h)
        for _ in range(net.num_res_blocks):
            at = f"input_blocks_{len(outputs)}"
            h = _res_block(net, f"{at}_0", int(mult * net.model_channels))(h, condition)
            if 2**level in net.attention_resolutions:
                h = _attention(net, f"{at}_1", h, net.num_heads)
            outputs.append(h)
    return h, outputs


def _middle(net: Any, h: jax.Array, condition: jax.Array) -> jax.Array:
    width = h.shape[-1]
    h = _attention(net, "middle_block_1", _res_block(net, "middle_block_0", width)(h, condition), net.num_heads)
    return _res_block(net, "middle_block_2", width)(h, condition)


def _res_block(net: Any, name: str, width: int, resample: str = "") -> _ResBlock:
    return _ResBlock(width, resample, net.use_scale_shift_norm, net.dtype, name=name)


def _resampled(net: Any, name: str, h: jax.Array, condition: jax.Array, kind: str) -> jax.Array:
    if net.resblock_updown:
        return _res_block(net, name, h.shape[-1], kind)(h, condition)
    if not net.conv_resample:
        return _RESAMPLERS[kind](h)
    if kind == "down":
        return _Convolved("op", 2, net.dtype, name=name)(h)
    return _Convolved("conv", 1, net.dtype, name=name)(_RESAMPLERS["up"](h))


def _attention(net: Any, name: str, h: jax.Array, heads: int) -> jax.Array:
    heads = heads if net.num_head_channels == -1 else h.shape[-1] // net.num_head_channels
    order = "qkv heads channels" if net.use_new_attention_order else "heads qkv channels"
    return _Attention(heads, order, net.dtype, name=name)(h)


def _time_embedding(net: Any, x: jax.Array, timesteps: jax.Array) -> jax.Array:
    width, half = net.model_channels, net.model_channels // 2
    t = jnp.asarray(timesteps).astype(at_least_float32(jnp.promote_types(x.dtype, jnp.float32)))
    h = jnp.concatenate(blocks.sinusoids(t, blocks.frequencies(half, half)), axis=-1)
    dense = lambda name: nn.Dense(4 * width, dtype=net.dtype, name=name)
    return dense("time_embed_2")(nn.silu(dense("time_embed_0")(h)))


def _norm(name: str, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    return nn.GroupNorm(32, epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


def _widened(h: jax.Array) -> jax.Array:
    """Out of half precision: the release leaves it before the last layers."""
    return h.astype(at_least_float32(h.dtype))


_box = lambda resample: lambda x: resample(x, (1, 1))
_RESAMPLERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "down": _box(blocks.downsample),
    "up": _box(blocks.upsample),
}
