"""The networks of EDM (Karras et al. 2022, arXiv 2206.00364): SongUNet and DhariwalUNet.

SongUNet is the DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456), DhariwalUNet the ADM of Dhariwal & Nichol 2021
(arXiv 2105.05233). Modules are named as in the released files, with "enc_" and "dec_" for the lists "enc." and "dec.";
R below is the resolution of a level. Written from a description of the released classes, not from their code.

    encoder   RxR_conv or RxR_down, RxR_block0, RxR_block1, ...        finest level first
    decoder   RxR_in0 and RxR_in1, or RxR_up, then RxR_block0, ...     coarsest level first; blocks take one output of
                                                                       the encoder each, the last one first
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained import blocks

_HEAD_WIDTH = 64  # of DhariwalUNet; narrower layers have no attention


class SongUNet(nn.Module):
    """DDPM++ and NCSN++; attributes are the arguments of the released class, `dtype` is that of the computation.

    Called with x (B, H, W, in_channels), noise_labels (B,) and labels (B,) of integers, or None for no class; a label
    outside 0 .. label_dim - 1 is no class either. Returns (B, H, W, out_channels).
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1, 1)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, noise_labels: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Evaluates the network."""
        c, taps = self.model_channels, self.resample_filter
        condition = self._condition(x, noise_labels, labels)
        levels = [(self.img_resolution >> level, c * mult) for level, mult in enumerate(self.channel_mult)]

        def block(h: jax.Array, name: str, width: int, attends: bool = False, resample: str = "") -> jax.Array:
            heads = 1 if attends else 0
            return _SongBlock(width, heads, resample, taps, self.dtype, name=name)(h, condition)

        aux = h = x.astype(at_least_float32(x.dtype) if self.dtype is None else self.dtype)
        skips = []
        for resolution, width in levels:
            at = f"enc_{resolution}x{resolution}"
            if not skips:
                h = blocks.conv(c, 3, self.dtype, f"{at}_conv")(h)
            else:
                h = block(h, f"{at}_down", h.shape[-1], resample="down")
                if self.encoder_type == "skip":
                    aux = blocks.downsample(aux, taps)
                    h = h + blocks.conv(h.shape[-1], 1, self.dtype, f"{at}_aux_skip")(aux)
                if self.encoder_type == "residual":
                    halved = _FusedDownsample(h.shape[-1], taps, self.dtype, name=f"{at}_aux_residual")(aux)
                    aux = h = (h + halved) * math.sqrt(0.5)
            skips.append(h)
            for i in range(self.num_blocks):
                h = block(h, f"{at}_block{i}", width, resolution in self.attn_resolutions)
                skips.append(h)

        output = None
        for resolution, width in reversed(levels):
            at = f"dec_{resolution}x{resolution}"
            attending = [False] * self.num_blocks + [resolution in self.attn_resolutions]
            h = _decoded(block, at, resolution == levels[-1][0], h, skips, width, attending)
            if self.decoder_type == "skip" or resolution == self.img_resolution:
                normed = nn.silu(_song_norm(h, self.dtype, f"{at}_aux_norm"))
                seen = blocks.conv(self.out_channels, 3, self.dtype, f"{at}_aux_conv")(normed)
                output = seen if output is None else seen + blocks.upsample(output, taps)
        assert output is not None  # level 0 makes it
        return output

    def _condition(self, x: jax.Array, noise_labels: jax.Array, labels: jax.Array | None) -> jax.Array:
        width = self.model_channels * self.channel_mult_noise
        wide = _widened(noise_labels, x)
        if self.embedding_type == "fourier":
            embedding = _FourierEmbedding(width, name="map_noise")(wide)
        else:
            cos, sin = blocks.sinusoids(wide, blocks.frequencies(width // 2, width // 2 - 1))
            embedding = jnp.concatenate([sin, cos], axis=-1)
        embedding = embedding if self.dtype is None else embedding.astype(self.dtype)
        if self.label_dim:
            named = _one_hot(labels, self.label_dim, embedding) * math.sqrt(self.label_dim)
            embedding = embedding + nn.Dense(width, dtype=self.dtype, name="map_label")(named)
        for name in ("map_layer0", "map_layer1"):
            dense = nn.Dense(self.model_channels * self.channel_mult_emb, dtype=self.dtype, name=name)
            embedding = nn.silu(dense(embedding))
        return embedding


class DhariwalUNet(nn.Module):
    """ADM as EDM has it; attributes and call as those of `SongUNet`."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    label_dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, noise_labels: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Evaluates the network."""
        c = self.model_channels
        condition = self._condition(x, noise_labels, labels)
        levels = [(self.img_resolution >> level, c * mult) for level, mult in enumerate(self.channel_mult)]

        def block(h: jax.Array, name: str, width: int, attends: bool = False, resample: str = "") -> jax.Array:
            heads = width // _HEAD_WIDTH if attends else 0
            return _DhariwalBlock(width, heads, resample, self.dtype, name=name)(h, condition)

        h = x.astype(at_least_float32(x.dtype) if self.dtype is None else self.dtype)
        skips = []
        for resolution, width in levels:
            at = f"enc_{resolution}x{resolution}"
            if not skips:
                h = blocks.conv(width, 3, self.dtype, f"{at}_conv")(h)
            else:
                h = block(h, f"{at}_down", h.shape[-1], resample="down")
            skips.append(h)
            for i in range(self.num_blocks):
                h = block(h, f"{at}_block{i}", width, resolution in self.attn_resolutions)
                skips.append(h)
        for resolution, width in reversed(levels):
            at = f"dec_{resolution}x{resolution}"
            attending = [resolution in self.attn_resolutions] * (self.num_blocks + 1)
            h = _decoded(block, at, resolution == levels[-1][0], h, skips, width, attending)
        h = nn.silu(blocks.group_norm(h.shape[-1], 32, 1e-5, self.dtype, "out_norm")(h))
        return blocks.conv(self.out_channels, 3, self.dtype, "out_conv")(h)

    def _condition(self, x: jax.Array, noise_labels: jax.Array, labels: jax.Array | None) -> jax.Array:
        wide = _widened(noise_labels, x)
        half = self.model_channels // 2
        embedding = jnp.concatenate(blocks.sinusoids(wide, blocks.frequencies(half, half)), axis=-1)
        embedding = embedding if self.dtype is None else embedding.astype(self.dtype)
        dense = lambda name, bias=True: nn.Dense(
            self.model_channels * self.channel_mult_emb, use_bias=bias, dtype=self.dtype, name=name
        )
        embedding = dense("map_layer1")(nn.silu(dense("map_layer0")(embedding)))
        if self.label_dim:
            embedding = embedding + dense("map_label", bias=False)(_one_hot(labels, self.label_dim, embedding))
        return nn.silu(embedding)


def _decoded(
    block: Any, at: str, coarsest: bool, h: jax.Array, skips: list[jax.Array], width: int, attending: list[bool]
) -> jax.Array:
    """One level of the decoder; `attending` says of each block whether it attends."""
    if coarsest:
        h = block(block(h, f"{at}_in0", width, attends=True), f"{at}_in1", width)
    else:
        h = block(h, f"{at}_up", h.shape[-1], resample="up")
    for i, attends in enumerate(attending):
        h = block(jnp.concatenate([h, skips.pop()], axis=-1), f"{at}_block{i}", width, attends)
    return h


class _SongBlock(nn.Module):
    width: int
    heads: int
    resample: str
    taps: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        resampled = _resampler(self.resample, self.taps)
        h = resampled(nn.silu(_song_norm(x, self.dtype, "norm0")))
        h = blocks.conv(self.width, 3, self.dtype, "conv0")(h)
        h = h + nn.Dense(self.width, dtype=self.dtype, name="affine")(condition)[:, None, None]
        h = blocks.conv(self.width, 3, self.dtype, "conv1")(nn.silu(_song_norm(h, self.dtype, "norm1")))
        if self.resample or x.shape[-1] != self.width:
            x = blocks.conv(self.width, 1, self.dtype, "skip")(resampled(x))
        x = (x + h) * math.sqrt(0.5)
        if not self.heads:
            return x
        attended = _attended(_song_norm(x, self.dtype, "norm2"), self.heads, self.dtype)
        return (x + attended) * math.sqrt(0.5)


class _DhariwalBlock(nn.Module):
    width: int
    heads: int
    resample: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        resampled = _resampler(self.resample, (1, 1))
        norm = lambda h, name: blocks.group_norm(h.shape[-1], 32, 1e-5, self.dtype, name)(h)
        h = blocks.conv(self.width, 3, self.dtype, "conv0")(resampled(nn.silu(norm(x, "norm0"))))
        affine = nn.Dense(2 * self.width, dtype=self.dtype, name="affine")(condition)[:, None, None]
        scale, shift = jnp.split(affine, 2, axis=-1)
        h = blocks.conv(self.width, 3, self.dtype, "conv1")(nn.silu(norm(h, "norm1") * (1 + scale) + shift))
        x = resampled(x)
        if x.shape[-1] != self.width:
            x = blocks.conv(self.width, 1, self.dtype, "skip")(x)
        x = x + h
        return x + _attended(norm(x, "norm2"), self.heads, self.dtype) if self.heads else x


class _FourierEmbedding(nn.Module):
    """Sines and cosines at frequencies that the file stores."""

    width: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        freqs = self.param("freqs", nn.initializers.normal(16.0), (self.width // 2,))
        t = t.astype(jnp.promote_types(t.dtype, freqs.dtype))
        cos, sin = blocks.sinusoids(t, 2 * math.pi * freqs.astype(t.dtype))
        return jnp.concatenate([sin, cos], axis=-1)


class _FusedDownsample(nn.Module):
    """A 3x3 convolution and the filter that halves its output, padded once and together, then the bias."""

    width: int
    taps: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        pad = 1 + (len(self.taps) - 1) // 2
        layout = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=layout)
        return blocks.downsample_without_padding(h, self.taps) + bias


def _attended(x: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Attention over positions with its projections "qkv" and "proj", whose parameters become the caller's."""
    channels = x.shape[-1]
    qkv = blocks.conv(3 * channels, 1, dtype, "qkv")(x).reshape(x.shape[0], -1, 3 * channels)
    attended = blocks.attention(qkv, heads, "heads channels qkv")
    return blocks.conv(channels, 1, dtype, "proj")(attended.reshape(x.shape))


def _song_norm(x: jax.Array, dtype: Any, name: str) -> jax.Array:
    return blocks.group_norm(x.shape[-1], 32, 1e-6, dtype, name)(x)


def _resampler(kind: str, taps: tuple[float, ...]) -> Any:
    resample = {"up": blocks.upsample, "down": blocks.downsample}.get(kind)
    return (lambda x: x) if resample is None else (lambda x: resample(x, taps))


def _widened(noise_labels: jax.Array, x: jax.Array) -> jax.Array:
    return noise_labels.astype(jnp.promote_types(at_least_float32(x.dtype), noise_labels.dtype))


def _one_hot(labels: jax.Array | None, classes: int, like: jax.Array) -> jax.Array:
    if labels is None:
        return jnp.zeros((like.shape[0], classes), like.dtype)
    return jax.nn.one_hot(labels, classes, dtype=like.dtype)
