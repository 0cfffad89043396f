"""Inner products of the latest model outputs, per sample (and channel), kept without cancellation.

Adjacent outputs differ little, so products of their differences are not recovered from products of the outputs in
float32. The squared norms N_i = |m_i|^2 and the squared distances D_ij = |m_i - m_j|^2 determine every inner product
of linear combinations of the outputs, each distance is a sum of squares of differences that are never stored, and a
new output costs one norm and one distance per remembered output.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_ROW = 32  # pixels in a row of partial sums


class Gram(NamedTuple):
    """Squared norms and distances of the outputs m_0 (the newest), m_1, ..., m_K.

    Attributes:
      norms: (N_0, ..., N_K).
      distances: distances[i][j - i - 1] = D_ij for i < j.
      noise: <x / alpha - m_0, m_0 - m_1>, x the state that the model was called with: the noise in it along the newest
        difference. None where no rule asks for it.
    """

    norms: tuple[Any, ...]
    distances: tuple[tuple[Any, ...], ...]
    noise: Any = None

    def distance(self, i: int, j: int) -> Any:
        """The squared distance D_ij of outputs i and j."""
        return 0.0 if i == j else self.distances[min(i, j)][abs(i - j) - 1]

    def inner(self, u: Sequence[Any], v: Sequence[Any], sum_u: Any, sum_v: Any) -> Any:
        """The inner product of sum_i u_i m_i and sum_j v_j m_j.

        By polarization <u, v> = (sum_v sum_i u_i N_i + sum_u sum_j v_j N_j - sum_ij u_i v_j D_ij) / 2, with
        sum_u = sum_i u_i: the norms, large beside the distances, enter only as far as a combination is not a
        difference. The sums are arguments because the caller knows them without cancellation.
        """
        of_norms = sum(sum_v * a * n + sum_u * b * n for a, b, n in zip(u, v, self.norms, strict=True))
        indices = range(len(u))
        of_distances = sum(u[i] * v[j] * self.distance(i, j) for i in indices for j in indices if i != j)
        return (of_norms - of_distances) / 2


def initial(shape: tuple[int, ...], memory: int, dtype: Any, noise: bool) -> Gram:
    """The Gram of 1 + `memory` outputs that are all zero, with or without the `noise` of one."""
    zero = jnp.zeros(shape, dtype)
    distances = tuple((zero,) * (memory - i) for i in range(memory))
    return Gram((zero,) * (memory + 1), distances, zero if noise else None)


class Measured(NamedTuple):
    """What a new output adds to a Gram.

    Attributes:
      norm: its squared norm.
      distances: (K + 1, ...), its squared distances from all outputs in the order of their slots, one of them zero.
      noise: the Gram's new `noise`, or None.
    """

    norm: jax.Array
    distances: jax.Array
    noise: jax.Array | None


def measure(
    newest: jax.Array, outputs: jax.Array, ages: jax.Array, x: jax.Array | None, axes: tuple[int, ...], dtype: Any
) -> Measured:
    """The sums that a new output needs.

    Args:
      newest: (B, ...), the new output.
      outputs: (K + 1, B, ...), the outputs, the new one among them, in slots.
      ages: (K + 1,), the ages of the outputs, 0 for the newest: slot s is (i - s) mod (K + 1) rows old after i rows.
      x: (B, ...), x / alpha, or None where its noise is not needed.
      axes: the axes of `newest` that inner products run over.
      dtype: the dtype to compute in.
    """
    newest = newest.astype(dtype)
    # All distances in one reduction: picking slots out first would copy them.
    distances = _sums(jnp.square(newest[None] - outputs.astype(dtype)), axes)
    noise = None
    if x is not None:
        # The permutation `ages` is its own inverse.
        before = jax.lax.dynamic_index_in_dim(outputs, ages[1], keepdims=False).astype(dtype)
        noise = _sums(((x.astype(dtype) - newest) * (newest - before))[None], axes)[0]
    return Measured(_sums(jnp.square(newest)[None], axes)[0], distances, noise)


def push(gram: Gram, new: Measured, ages: jax.Array) -> Gram:
    """The Gram after a new output has replaced the oldest one; `ages` as for `measure`."""
    by_age = new.distances[ages]
    kept = tuple(row[:-1] for row in gram.distances[:-1])
    return Gram((new.norm, *gram.norms[:-1]), (tuple(by_age[1:]), *kept), new.noise)


def _sums(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums over `axes` of each array (B, ...) stacked in `x`."""
    if not axes or axes != tuple(range(1, x.ndim - 2)):
        return jnp.sum(x, axis=[axis + 1 for axis in axes])
    # A few channels last: XLA's CPU code for a reduction that keeps them is scalar. Reducing to rows wide enough for
    # vectors first is several times faster; the barrier keeps XLA from merging the two sums again.
    count, batch, *spatial, channels = x.shape
    size = math.prod(spatial)
    width = next(w for w in range(min(size, _ROW), 0, -1) if size % w == 0)
    rows = jnp.sum(x.reshape(count, batch, size // width, width * channels), axis=2)
    return jnp.sum(jax.lax.optimization_barrier(rows).reshape(count, batch, width, channels), axis=2)


def reduced_axes(shape: tuple[int, ...], channel_axis: int | None) -> tuple[int, ...]:
    """The axes of a batch that an inner product runs over: all but the first and, in image layouts, the channels.

    Vectors (B, D) and anything smaller have no channel axis: their inner products are per sample.

    Raises:
      ValueError: when `channel_axis` is not an axis of the shape, or is the batch axis.
    """
    ndim = len(shape)
    if channel_axis is None or ndim < 3:
        return tuple(range(1, ndim))
    if not -ndim < channel_axis < ndim or channel_axis % ndim == 0:
        raise ValueError(f"channel_axis={channel_axis} is not an axis after the first of a state of shape {shape}")
    return tuple(axis for axis in range(1, ndim) if axis != channel_axis % ndim)
