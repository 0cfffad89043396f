"""Editing with a sampler: inpainting, inversion from data to noise, interpolation of noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from evodiff_jax.numerics import at_least_float32, on_host
from evodiff_jax.sampling import check_times, expect_solver, plan_from_times, sample
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule, expect_schedule, made_of, some_levels
from evodiff_jax.tables import Solver
from evodiff_jax.types import (
    Denoiser,
    Hook,
    State,
    as_state,
    batch_size,
    broadcasts,
    check_function,
    check_keys,
    check_state,
    per_sample,
    widest,
)


class Inpainting(NamedTuple):
    """What `inpaint` returns, to be given to `sample`.

    Attributes:
      denoise: the data prediction, which is the known data in the known region.
      on_state: the hook on the state, which puts the known data there with the noise of the current level, and without
        noise in the result.
    """

    denoise: Denoiser
    on_state: Hook


def inpaint(denoise: Denoiser, known: State, mask: Any, schedule: NoiseSchedule, *, key: jax.Array) -> Inpainting:
    """Keeps a known region and lets the network fill in the rest, with every solver.

    Before every model call the state in the known region is set to the known data with the noise of the current
    level, alpha(t) known + sigma(t) eps with one eps for the run, and the data prediction there to the known data. The
    result has the known data exactly. The rest comes out near its distribution given the known region, not exactly in
    it, however many steps are taken.

    Args:
      denoise: denoise(x, t) -> x_0.
      known: the known data, of the state's structure and shapes, or one sample with a batch axis of 1; values outside
        the mask are not used.
      mask: booleans, True where known, that broadcast against each leaf of the state: (H, W, 1) or (B, H, W, 1) for
        images (B, H, W, C); for a pytree one array for all leaves, or a pytree like it.
      schedule: the noise schedule.
      key: a random key for eps, or one for each sample (B,), with which sample k depends on key k alone.

    Returns:
      The denoiser and the hook for `sample(..., on_state=...)`.

    Raises:
      TypeError: when the mask is not boolean, known is not floating-point, the schedule is something else, or key
        is no random key; when called, when the structures of known, mask and state differ.
      ValueError: when known has no batch axis; when called, when known or the mask does not broadcast to the state.

    References:
      Lugmayr et al. 2022 (RePaint), arXiv 2201.09865, Eq. 8, without its resampling.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> times, key = ed.grids.log_snr(schedule, 10), jax.random.key(0)
      >>> x_T = schedule.noise(key, (4, 8))
      >>> known, mask = jax.numpy.ones((4, 8)), jax.numpy.arange(8) < 3
      >>> denoise, on_state = inpaint(lambda x, t: x / (1 + t**2), known, mask, schedule, key=key)
      >>> x = ed.sample(denoise, x_T, ed.plan(schedule, times, ed.solvers.unipc(2)), on_state=on_state)
      >>> x[0, :3].tolist()
      [1.0, 1.0, 1.0]
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    known = check_state(known, "known")
    expect_schedule(schedule)
    check_same_schedule(denoise, some_levels(schedule), "the schedule given for inpainting")
    check_keys(key, np.shape(key)[0] if np.ndim(key) else 1)
    for leaf in jax.tree.leaves(mask) or [mask]:
        if not isinstance(leaf, np.ndarray | jax.Array | bool) or jnp.result_type(leaf) != jnp.bool_:
            got = getattr(leaf, "dtype", leaf)
            raise TypeError(f"mask must be an array of booleans, True where known, got {got}: for example mask > 0.5")

    one_mask = jax.tree_util.treedef_is_leaf(jax.tree.structure(mask))

    def masks(x: State) -> Any:
        return jax.tree.map(lambda _: mask, x) if one_mask else mask

    def put(values: State, x: State) -> State:
        """The values where known, x elsewhere."""
        return jax.tree.map(jnp.where, masks(x), values, x)

    def like(x: State) -> State:
        """The known data in the shapes and dtypes of x."""
        for name, value in (("known", known), ("mask", masks(x))):
            if jax.tree.structure(value) != jax.tree.structure(x):
                raise TypeError(
                    f"{name} must have the structure of the state, {jax.tree.structure(x)}, "
                    f"got {jax.tree.structure(value)}"
                )
            for leaf, of_state in zip(jax.tree.leaves(value), jax.tree.leaves(x), strict=True):
                if not broadcasts(np.shape(leaf), of_state.shape):
                    raise ValueError(
                        f"{name} must broadcast to the state, of shape {of_state.shape}, got shape {np.shape(leaf)}"
                    )
        return jax.tree.map(lambda k, of_x: jnp.broadcast_to(k, of_x.shape).astype(of_x.dtype), known, x)

    def inpainted(x: State, t: Any, *conditions: Any) -> State:
        return put(like(x), as_state(denoise(x, t, *conditions), x, "denoise(x, t)"))

    def on_state(x: State, t: Any, index: Any, _: Any) -> State:
        values = like(x)
        wide = jnp.asarray(t, widest(jax.tree.leaves(x)))
        noisy = schedule.add_noise(values, wide, check_keys(key, batch_size(x)))
        return put(jax.tree.map(lambda a, b: jnp.where(index < 0, a, b), values, noisy), x)

    return Inpainting(made_of(inpainted, denoise), on_state)


def invert(denoise: Denoiser, x_0: State, schedule: NoiseSchedule, times: ArrayLike, solver: Solver) -> State:
    """Runs the probability-flow ODE from data to noise: the x_T from which `sample` comes back to x_0.

    The same solver on the same times, taken upwards. Coming back is exact only as steps get small;
    `benchmarks/inversion.py` prints what is left at 50 calls; `ddim` and `evodiff`, of order 1, leave the most.

    Args:
      denoise: as for `sample`.
      x_0: the data at times[-1], (B, ...) or a pytree of such.
      schedule: the model's noise schedule.
      times: (N + 1,) the strictly decreasing times of the run that is to come back.
      solver: a deterministic one of `evodiff_jax.solvers`.

    Returns:
      The state at times[0], of the structure, shapes and dtypes of x_0.

    Raises:
      TypeError: as `sample` and `plan`.
      ValueError: as `sample` and `plan`, or when the solver is stochastic, sigma is 0 at times[-1] or alpha is 0 at
        times[0].

    References:
      Song, Meng, Ermon, arXiv 2010.02502, section 4.3; Dhariwal & Nichol, arXiv 2105.05233, appendix F.
    """
    expect_schedule(schedule)
    x_0 = check_state(x_0, "x_0")
    expect_solver(solver)
    downwards = check_times(times, schedule)
    if plan_from_times(schedule, downwards, solver).table.noise is not None:
        raise ValueError(f"invert needs a deterministic solver, got {solver.name}, which adds noise")
    upwards = downwards[::-1]
    if isinstance(upwards, np.ndarray) and not np.isfinite(on_host(schedule.lambda_, upwards[[0, -1]])).all():
        raise ValueError(
            f"invert needs sigma > 0 at times[-1] = {upwards[0]:g} and alpha > 0 at times[0] = {upwards[-1]:g}, where "
            "data and noise are told apart: choose times within, for example with a grid's start and end"
        )
    return sample(denoise, x_0, plan_from_times(schedule, upwards, solver))


def slerp(x_a: State, x_b: State, weight: ArrayLike) -> State:
    """Spherical interpolation of two batches of noise, sample by sample: what lies between stays as large as noise is.

    Args:
      x_a: noise, (B, ...) or a pytree of such, whose leaves are interpolated one by one.
      x_b: noise of the same structure, shapes and dtypes.
      weight: 0 for x_a to 1 for x_b, a number, or (B,), one for each sample.

    Returns:
      The interpolated noise; the straight line between samples that point the same way.

    Raises:
      TypeError: when x_a or x_b is not floating-point, or their structures differ.
      ValueError: when their shapes or dtypes differ, or weight is of another shape.

    References:
      Shoemake 1985, "Animating rotation with quaternion curves".
    """
    x_a, x_b = check_state(x_a, "x_a"), check_state(x_b, "x_b")
    if jax.tree.structure(x_a) != jax.tree.structure(x_b):
        raise TypeError(
            f"x_a and x_b must have the same structure, got {jax.tree.structure(x_a)} and {jax.tree.structure(x_b)}"
        )
    weights = per_sample(weight, x_a, "weight", widest(jax.tree.leaves(x_a)))

    def interpolate(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"x_a and x_b must have the same shapes and dtypes, got {a.shape} {a.dtype} and {b.shape} {b.dtype}"
            )
        wide = at_least_float32(a.dtype)
        wide_a, wide_b, weight = a.astype(wide), b.astype(wide), weight.astype(wide)
        axes = tuple(range(1, a.ndim))
        norms = [jnp.maximum(_norm(x, axes), jnp.finfo(wide).tiny) for x in (wide_a, wide_b)]
        unit_a, unit_b = wide_a / norms[0], wide_b / norms[1]
        # The angle from both chords, which is exact where the cosine says little.
        angle = 2 * jnp.arctan2(_norm(unit_a - unit_b, axes), _norm(unit_a + unit_b, axes))
        apart = jnp.sin(angle) > 1e-6
        safe = jnp.where(apart, angle, 1.0)
        from_a = jnp.where(apart, jnp.sin((1 - weight) * safe) / jnp.sin(safe), 1 - weight)
        from_b = jnp.where(apart, jnp.sin(weight * safe) / jnp.sin(safe), weight)
        return (from_a * wide_a + from_b * wide_b).astype(a.dtype)

    return jax.tree.map(interpolate, x_a, x_b, weights)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The norm of each sample, with gradient 0 where it is 0."""
    square = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
