"""What the public U-Nets have in common: normalisation, attention, resampling and embeddings of the time.

`dtype=None` computes in the widest type of inputs and parameters. With a narrower one, norms take their statistics,
attention its softmax, and embeddings their angles in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32

_MOST_BYTES = 2**30  # of the weights of attention at a time


def conv(features: int, size: int, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
    """A square convolution with zero padding of size // 2 on each side, as PyTorch's `padding=size // 2` has it."""
    return nn.Conv(features, (size, size), strides=stride, padding=size // 2, dtype=dtype, name=name)


def group_norm(channels: int, most_groups: int, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """Group normalisation in the given number of groups, or in fewer, so that each has 4 channels."""
    groups = min(most_groups, channels // 4)
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def attention(qkv: jax.Array, heads: int, order: str) -> jax.Array:
    """Self-attention, softmax(q k^T / sqrt(d)) v, with d = C / heads.

    Args:
      qkv: (B, T, 3 C), queries, keys and values in one axis.
      heads: the number of heads.
      order: how that axis is laid out, outermost first: "heads qkv channels", "qkv heads channels" or "heads channels
        qkv".

    Returns:
      (B, T, C).
    """
    axes = order.split()
    sizes = {"heads": heads, "qkv": 3, "channels": qkv.shape[-1] // (3 * heads)}
    apart = qkv.reshape(*qkv.shape[:2], *(sizes[axis] for axis in axes))
    q, k, v = (jnp.take(apart, i, axis=2 + axes.index("qkv")) for i in range(3))
    return attend(q, k, v).reshape(*qkv.shape[:2], -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """Attention, softmax(q k^T / sqrt(d)) v, with the softmax in float32 at least.

    On GPUs of compute capability 8 and more, half precision goes through cuDNN's flash attention. Elsewhere the
    weights of all queries are formed at once as long as they take at most 1 GiB, and of a part of the queries after
    another where they would take more.

    Args:
      q: (B, T, heads, d), the queries.
      k: (B, S, heads, d), the keys.
      v: (B, S, heads, d), the values.
      causal: whether a query attends only to the positions up to its own.

    Returns:
      (B, T, heads, d).
    """
    if _flash(q):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    batch, queries, heads, width = q.shape
    wide = at_least_float32(q.dtype)
    parts = _parts(queries, batch * heads * k.shape[1] * jnp.dtype(wide).itemsize)
    if parts == 1 or causal:
        return _attend(q, k, v, causal)
    apart = jnp.moveaxis(q.reshape(batch, parts, queries // parts, heads, width), 1, 0)
    return jnp.moveaxis(jax.lax.map(lambda some: _attend(some, k, v, False), apart), 0, 1).reshape(q.shape)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])  # JAX's own takes the softmax in float32
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def _parts(queries: int, bytes_each: int) -> int:
    """Into how many equal parts the queries are cut, the fewest whose weights are small enough."""
    fits = lambda parts: queries % parts == 0 and queries // parts * bytes_each <= _MOST_BYTES
    return next((parts for parts in range(1, queries) if fits(parts)), queries)


def _flash(q: jax.Array) -> bool:
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0")).split(".")[0]
    return device.platform == "gpu" and capability.isdecimal() and int(capability) >= 8


def sinusoids(t: jax.Array, frequencies: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles t w, each (B, len(frequencies)) in float32 at least."""
    wide = at_least_float32(t.dtype)
    angles = t.astype(wide)[:, None] * jnp.asarray(frequencies, wide)
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(count: int, intervals: int) -> np.ndarray:
    """10000^(-i / intervals) for i = 0 .. count - 1, in float64."""
    return 10_000.0 ** (-np.arange(count) / intervals)


def downsample(x: jax.Array, taps: Sequence[float]) -> jax.Array:
    """Halves height and width by a separable filter, of the sum 1 after scaling, with zero padding."""
    if _is_box(taps):
        return nn.avg_pool(x, (2, 2), (2, 2))
    pad = (len(taps) - 1) // 2
    return _filtered(x, taps, 1.0, window_strides=(2, 2), padding=[(pad, pad)] * 2)


def upsample(x: jax.Array, taps: Sequence[float]) -> jax.Array:
    """Doubles height and width: zeros in between, then a separable filter of the sum 4; nearest for [1, 1]."""
    if _is_box(taps):
        return x.repeat(2, axis=1).repeat(2, axis=2)
    pad = len(taps) - 1 - (len(taps) - 1) // 2
    return _filtered(x, taps[::-1], 4.0, window_strides=(1, 1), padding=[(pad, pad)] * 2, lhs_dilation=(2, 2))


def downsample_without_padding(x: jax.Array, taps: Sequence[float]) -> jax.Array:
    """As `downsample`, of the positions where the filter lies within x."""
    return _filtered(x, taps, 1.0, window_strides=(2, 2), padding=[(0, 0)] * 2)


def _is_box(taps: Sequence[float]) -> bool:
    return len(taps) == 2 and taps[0] == taps[1]


def _filtered(x: jax.Array, taps: Sequence[float], total: float, **options: Any) -> jax.Array:
    kernel = np.outer(taps, taps) * (total / np.sum(taps) ** 2)
    channels = x.shape[-1]
    each = jnp.broadcast_to(jnp.asarray(kernel, x.dtype)[:, :, None, None], (*kernel.shape, 1, channels))
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, each, dimension_numbers=layout, feature_group_count=channels, **options)
