"""Corrections of the data prediction: values kept in their range, known regions kept as they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.denoisers._prediction import Denoiser
from evodiff_jax.numerics import at_least_float32
from evodiff_jax.states import State, check_like, check_state


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clips data predictions to the range of the data, also called static thresholding.

    Args:
      denoise: denoise(x, t) -> x_0.
      low: the smallest value of the data.
      high: the largest.

    Returns:
      denoise(x, t).

    Raises:
      ValueError: unless low < high.
    """
    if not low < high:
        raise ValueError(f"clip needs low < high, got {low} and {high}")

    def clipped(x: State, t: Any, *conditions: Any) -> State:
        return jax.tree.map(lambda m: jnp.clip(m, low, high), _checked(denoise(x, t, *conditions), x))

    return clipped


def dynamic_threshold(denoise: Denoiser, percentile: float = 99.5, limit: float = 1.0) -> Denoiser:
    """Clips each sample's data prediction to a percentile of its magnitudes and scales it back into the data's range.

    s = max(percentile of |x_0|, limit) and x_0 becomes clip(x_0, -s, s) limit / s: predictions within the range stay
    as they are, and strong guidance does not saturate.

    Args:
      denoise: denoise(x, t) -> x_0.
      percentile: above 1 and at most 100, in per cent.
      limit: the largest magnitude of the data.

    Returns:
      denoise(x, t); for a state that is a pytree, every leaf has a threshold of its own.

    Raises:
      ValueError: when percentile is outside, as the quantile 0.995 is, which would cut almost all to nothing, or limit
        is not positive.

    References:
      Saharia et al. 2022 (Imagen), arXiv 2205.11487, section 2.3.
    """
    if not 1 < percentile <= 100:
        raise ValueError(f"percentile must be in per cent, above 1 and at most 100, for example 99.5, got {percentile}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")

    def threshold(m: jax.Array) -> jax.Array:
        wide = m.astype(at_least_float32(m.dtype))
        magnitude = jnp.percentile(jnp.abs(wide), percentile, axis=tuple(range(1, m.ndim)), keepdims=True)
        s = jnp.maximum(magnitude, limit)
        return (jnp.clip(wide, -s, s) * (limit / s)).astype(m.dtype)

    def thresholded(x: State, t: Any, *conditions: Any) -> State:
        return jax.tree.map(threshold, _checked(denoise(x, t, *conditions), x))

    return thresholded


def inpaint(denoise: Denoiser, known: State, mask: Any) -> Denoiser:
    """Keeps a known region: there the data prediction is what is known, elsewhere what the network fills in.

    Solvers carry a constant prediction exactly, so that at every time the state in the known region is
    alpha(t) known + sigma(t) eps, the known data with the noise of the current level, whatever the schedule, grid and
    solver (save `evodiff_reference`, whose last step scales the state). The eps is x_T's, or a stochastic solver's.

    Args:
      denoise: denoise(x, t) -> x_0.
      known: the known data, of x's structure, shapes and dtypes (or one sample with a batch axis of 1); values
        outside the mask are not used.
      mask: booleans, True where known, that broadcast against each leaf of x: (H, W, 1) or (B, H, W, 1) for images
        (B, H, W, C); for a pytree one array for all leaves, or a pytree like x.

    Returns:
      denoise(x, t).

    Raises:
      TypeError: when the mask is not boolean, or known is not floating-point.
      ValueError: when known has no batch axis; when called, when known or the mask does not broadcast to x.
    """
    known = check_state(known, "known")
    for leaf in jax.tree.leaves(mask) or [mask]:
        if not isinstance(leaf, np.ndarray | jax.Array | bool) or jnp.result_type(leaf) != jnp.bool_:
            got = getattr(leaf, "dtype", leaf)
            raise TypeError(f"mask must be an array of booleans, True where known, got {got}: for example mask > 0.5")

    def inpainted(x: State, t: Any, *conditions: Any) -> State:
        structure = jax.tree.structure(x)
        if jax.tree.structure(known) != structure:
            raise TypeError(f"known must have the structure of x, {structure}, got {jax.tree.structure(known)}")
        one_for_all = jax.tree_util.treedef_is_leaf(jax.tree.structure(mask))
        masks = jax.tree.map(lambda _: mask, x) if one_for_all else mask
        if jax.tree.structure(masks) != structure:
            raise TypeError(f"mask must be one array or of the structure of x, {structure}, got {mask!r}")

        def keep(m: jax.Array, known: jax.Array, mask: Any) -> jax.Array:
            for name, array in (("known", known), ("mask", mask)):
                if not _broadcasts(np.shape(array), m.shape):
                    raise ValueError(f"{name} must broadcast to x, of shape {m.shape}, got shape {np.shape(array)}")
            return jnp.where(mask, known.astype(m.dtype), m)

        return jax.tree.map(keep, _checked(denoise(x, t, *conditions), x), known, masks)

    return inpainted


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _checked(output: Any, x: State) -> State:
    return check_like(output, x, "denoise(x, t)")
