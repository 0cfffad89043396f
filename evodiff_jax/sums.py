"""Sums over each sample, or over each of its channels, of several arrays in one pass over what they are made of."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_PARTS = 8  # XLA's CPU code for a sum of so many long rows is unrolled and vectorised; 32 rows take 4 times as long


def sums_over_samples(terms: Sequence[jax.Array], channel_axis: int | None = None) -> tuple[jax.Array, ...]:
    """The sum of each array (B, ...) over all axes but the first and, where there is one, the channels.

    Arrays that are computed from the same inputs are summed in one pass over these.

    Args:
      terms: arrays of one shape (B, ...) and dtype.
      channel_axis: the axis that is kept beside the first, or None. States of fewer than three axes have no channels.

    Returns:
      A (B,) or (B, C) array for each term.

    Raises:
      ValueError: when `channel_axis` is not an axis of the shape, or is the batch axis.
    """
    axes = reduced_axes(terms[0].shape, channel_axis)
    if not axes:
        return tuple(terms)
    # The axis that splits best into parts. The parts are added first, elementwise, then the rest is summed.
    parts, axis = max((_parts(terms[0].shape[axis]), -axis) for axis in axes)
    if parts == 1:
        return tuple(jnp.sum(term, axes) for term in terms)
    added = jax.lax.optimization_barrier(_added([_split(term, -axis, parts) for term in terms], -axis))
    return tuple(jnp.sum(term, axes) for term in added)  # without the barrier XLA makes one slow sum of the two


def reduced_axes(shape: tuple[int, ...], channel_axis: int | None) -> tuple[int, ...]:
    """The axes of a state that a sum over each sample, or each channel, runs over.

    Raises:
      ValueError: when `channel_axis` is not an axis of the shape, or is the batch axis.
    """
    ndim = len(shape)
    if channel_axis is None or ndim < 3:
        return tuple(range(1, ndim))
    if not -ndim < channel_axis < ndim or channel_axis % ndim == 0:
        raise ValueError(f"channel_axis={channel_axis} is not an axis after the first of a state of shape {shape}")
    return tuple(axis for axis in range(1, ndim) if axis != channel_axis % ndim)


def _parts(size: int) -> int:
    return max(n for n in range(1, _PARTS + 1) if size % n == 0)


def _split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


def _added(terms: Sequence[jax.Array], axis: int) -> tuple[jax.Array, ...]:
    """The sums of several arrays over one axis, as one reduction of all of them."""

    @jax.custom_jvp
    def add(terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        zeros = (np.zeros((), terms[0].dtype),) * len(terms)
        return jax.lax.reduce(terms, zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (axis,))

    @add.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple:
        # A sum is linear. JAX has no transpose of a reduction of several arrays, so tangents are summed one by one.
        return add(*primals), tuple(jnp.sum(tangent, axis) for tangent in tangents[0])

    return add(tuple(terms))
