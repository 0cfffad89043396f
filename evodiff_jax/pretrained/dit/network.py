"""The transformers of DiT (Peebles & Xie 2022, arXiv 2212.09748) and SiT (Ma et al. 2024, arXiv 2401.08740).

Written from a description of the released classes, not from their code. Modules are named as in the released files,
"blocks_3.attn_qkv" for "blocks.3.attn.qkv". Norms, softmax, sinusoids and the sum of the residual branches are in
float32 at least, and so is the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained import blocks

TIME_FEATURES = 256
EPSILON = 1e-6  # of layer norms


class DiT(nn.Module):
    """DiT; attributes are the arguments of the released class.

    With class_dropout_prob above 0 the table of classes has a row for "no class", the last one.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, timesteps: jax.Array, y: jax.Array) -> jax.Array:
        """Evaluates the network.

        Args:
          x: (B, H, W, in_channels) with H = W = input_size.
          timesteps: (B,): for DiT from 0 to 999, which may be fractions; for SiT from 0, noise, to 1, data.
          y: (B,), integer classes; num_classes for none.

        Returns:
          (B, H, W, in_channels) in float32 at least; of DiT with learn_sigma twice the channels, the second half being
          the variance.
        """
        check_image(x, self.input_size, self.in_channels)
        width, side = self.hidden_size, self.input_size // self.patch_size
        h = patches(x, width, self.patch_size, self.dtype, "x_embedder_proj")
        h = h + self.param("pos_embed", nn.initializers.normal(0.02), (1, side**2, width))
        features = time_features(timesteps, at_least_float32(x.dtype), TIME_FEATURES // 2)
        dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
        c = widened(dense("t_embedder_mlp_2")(nn.silu(dense("t_embedder_mlp_0")(features))))
        rows = self.num_classes + (self.class_dropout_prob > 0)
        c = nn.silu(c + widened(nn.Embed(rows, width, name="y_embedder_embedding_table")(y)))
        inner = math.floor(width * self.mlp_ratio + 1e-6)  # an inferred ratio may be rounded
        for i in range(self.depth):
            h = _Block(self.num_heads, inner, self.dtype, name=f"blocks_{i}")(h, c)
        shift, scale = modulation(2, c, width, self.dtype, "final_layer_adaLN_modulation_1")
        out = self.in_channels * (2 if self.learn_sigma else 1)
        h = normed(h) * (1 + scale) + shift
        h = nn.Dense(self.patch_size**2 * out, name="final_layer_linear")(h)
        return self.outputs(image(h, self.patch_size, out))

    def outputs(self, h: jax.Array) -> jax.Array:
        """The channels that the class returns."""
        return h


class SiT(DiT):
    """SiT, which has the arrays of DiT and returns no variance; attributes are the arguments of the released class."""

    def outputs(self, h: jax.Array) -> jax.Array:
        """The channels that the class returns."""
        return h[..., : self.in_channels]


class _Block(nn.Module):
    heads: int
    inner: int
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array, c: jax.Array) -> jax.Array:
        width = h.shape[-1]
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)
        first, second = branches(modulation(6, c, width, self.dtype, "adaLN_modulation_1"))
        attention = lambda h: dense(width, "attn_proj")(
            blocks.attention(dense(3 * width, "attn_qkv")(h), self.heads, "qkv heads channels")
        )
        mlp = lambda h: dense(width, "mlp_fc2")(nn.gelu(dense(self.inner, "mlp_fc1")(h)))
        return second(first(h, attention), mlp)


def branches(six: Sequence[jax.Array], epsilon: float = EPSILON) -> Any:
    """The two residual branches of a block, h + gate f(norm(h) (1 + scale) + shift), as functions of h and f.

    Args:
      six: shift, scale and gate of the first, then of the second, each (B, 1, D).
      epsilon: of the second one's norm.
    """

    def branch(shift: jax.Array, scale: jax.Array, gate: jax.Array, epsilon: float) -> Any:
        return lambda h, fn: h + gate * fn(normed(h, epsilon) * (1 + scale) + shift)

    return branch(six[0], six[1], six[2], EPSILON), branch(six[3], six[4], six[5], epsilon)


def modulation(parts: int, c: jax.Array, width: int, dtype: Any, name: str) -> list[jax.Array]:
    """Shifts, scales and gates (B, 1, width) from the activated condition (B, D), inside a compact method."""
    out = widened(nn.Dense(parts * width, dtype=dtype, name=name)(c))[:, None]
    return jnp.split(out, parts, axis=-1)


def patches(x: jax.Array, width: int, size: int, dtype: Any, name: str) -> jax.Array:
    """Linear embeddings (B, T, width) of the patches of an image, row by row, inside a compact method."""
    embed = nn.Conv(width, (size, size), strides=size, padding="VALID", dtype=dtype, name=name)
    return widened(embed(x).reshape(x.shape[0], -1, width))


def image(h: jax.Array, size: int, channels: int) -> jax.Array:
    """The image (B, H, W, channels) of tokens (B, T, size * size * channels)."""
    side = math.isqrt(h.shape[1])
    apart = h.reshape(-1, side, side, size, size, channels)
    return apart.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * size, side * size, channels)


def time_features(timesteps: jax.Array, dtype: Any, intervals: int) -> jax.Array:
    """Cosines and sines (B, 256) of t 10000^(-i / intervals)."""
    t = jnp.asarray(timesteps).astype(dtype)
    return jnp.concatenate(blocks.sinusoids(t, blocks.frequencies(TIME_FEATURES // 2, intervals)), axis=-1)


def normed(h: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """Layer normalisation without parameters."""
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)


def widened(h: jax.Array) -> jax.Array:
    """Out of half precision."""
    return h.astype(at_least_float32(h.dtype))


def check_image(x: jax.Array, size: int, channels: int) -> None:
    """Checks the shape of a network's input.

    Raises:
      ValueError: it is another one.
    """
    if x.shape[1:] != (size, size, channels):
        raise ValueError(f"the network needs x of shape {('B', size, size, channels)}, got {x.shape}".replace("'", ""))
