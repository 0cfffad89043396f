"""The transformer in the levels of U-Nets that attend to a text."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.pretrained.blocks import conv
from evodiff_jax.pretrained.diffusers import blocks

_EPSILON = 1e-6  # of the norm before the transformer, whatever norm_eps is


class Transformer(nn.Module):
    """Transformer blocks over the positions of an image, which attend to a text too.

    Attributes:
      heads: their number.
      depth: the number of blocks.
      groups: of the norm.
      linear: whether the projections before and after are linear layers, or convolutions of size 1.
      dtype: of the computation.
    """

    heads: int
    depth: int
    groups: int
    linear: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C) with the context (B, S, D)."""
        channels = x.shape[-1]

        def project(name: str, h: jax.Array) -> jax.Array:
            if self.linear:
                return nn.Dense(channels, dtype=self.dtype, name=name)(h)
            return conv(channels, 1, self.dtype, name)(h)

        h = project("proj_in", blocks.norm("norm", self.groups, _EPSILON, self.dtype)(x))
        h = h.reshape(x.shape[0], -1, channels)
        for i in range(self.depth):
            h = _TransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{i}")(h, context)
        return x + project("proj_out", h.reshape(x.shape))


class _TransformerBlock(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        layer_norm = lambda name: nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=name)
        h = layer_norm("norm1")(x)
        x = x + _Attention(self.heads, self.dtype, name="attn1")(h, h)
        x = x + _Attention(self.heads, self.dtype, name="attn2")(layer_norm("norm2")(x), context)
        return x + _FeedForward(self.dtype, name="ff")(layer_norm("norm3")(x))


class _Attention(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, context: jax.Array) -> jax.Array:
        return blocks.attended(tokens, context, self.heads, False, self.dtype)


class _FeedForward(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        h = nn.Dense(8 * channels, dtype=self.dtype, name="net_0_proj")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        return nn.Dense(channels, dtype=self.dtype, name="net_2")(value * nn.gelu(gate, approximate=False))
