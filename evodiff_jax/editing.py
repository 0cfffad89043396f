"""Editing with a sampler: noise for image-to-image, deterministic inversion from data to noise, interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from evodiff_jax import kernel, plans
from evodiff_jax.denoisers import Denoiser
from evodiff_jax.numerics import at_least_float32, on_host
from evodiff_jax.sampling import run
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.states import State, check_state, per_sample, widest
from evodiff_jax.tables import Solver


def add_noise(x_0: State, t: ArrayLike, schedule: NoiseSchedule, key: jax.Array) -> State:
    """Data with the noise of time t, alpha(t) x_0 + sigma(t) eps: where image-to-image sampling starts.

    Args:
      x_0: the data, (B, ...) or a pytree of such.
      t: the time, a scalar; `times[0]` of the run that follows.
      schedule: the noise schedule.
      key: a JAX random key.

    Returns:
      The noisy data, of the structure, shapes and dtypes of x_0.

    Raises:
      TypeError: when x_0 is not floating-point, the schedule is something else, or key is None.
      ValueError: when x_0 has no batch axis, or t is not a scalar within the schedule.

    Example:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> times = ed.grids.last_steps(ed.grids.log_snr(schedule, 20), strength=0.5)  # 10 steps
      >>> x = add_noise(jax.numpy.ones((4, 8)), times[0], schedule, jax.random.key(0))
      >>> x = ed.sample(lambda x, t: x / (1 + t**2), x, times, schedule)
    """
    x_0 = check_state(x_0, "x_0")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, for example schedules.edm(), got {schedule!r}")
    if np.ndim(t) != 0:
        raise ValueError(f"t must be a scalar, got shape {np.shape(t)}")
    if not isinstance(t, Tracer) and not schedule.t_min <= float(np.asarray(t)) <= schedule.t_max * (1 + 1e-6):
        raise ValueError(f"t must be within the schedule's {schedule.t_min:g} to {schedule.t_max:g}, got {t}")
    if key is None:
        raise TypeError("key must be a JAX random key, for example jax.random.key(0), got None")
    leaves, structure = jax.tree.flatten(x_0)
    t = jnp.asarray(t, widest(leaves))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def noisy(x: jax.Array, key: jax.Array) -> jax.Array:
        wide = at_least_float32(x.dtype)
        noise = jax.random.normal(key, x.shape, wide)
        return (alpha.astype(wide) * x.astype(wide) + sigma.astype(wide) * noise).astype(x.dtype)

    keys = [key] if len(leaves) == 1 else jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [noisy(x, k) for x, k in zip(leaves, keys, strict=True)])


def invert(
    denoise: Denoiser, x_0: State, times: ArrayLike, schedule: NoiseSchedule, solver: Solver | None = None
) -> State:
    """Runs the probability-flow ODE from data to noise: the x_T from which `sample` comes back to x_0.

    The same solver on the same times, taken upwards. Coming back is exact only as steps get small; what is left at 50
    calls is printed by `benchmarks/inversion.py` and stands in the README. `evodiff_reference` is no use here: its last
    step scales the state.

    Args:
      denoise: as for `sample`.
      x_0: the data at times[-1], (B, ...) or a pytree of such.
      times: (N + 1,) the strictly decreasing times of the run that is to come back.
      schedule: the model's noise schedule.
      solver: a deterministic one of `evodiff_jax.solvers`, by default evodiff().

    Returns:
      The state at times[0], of the structure, shapes and dtypes of x_0.

    Raises:
      TypeError: as `sample`.
      ValueError: as `sample`, or when the solver is stochastic or sigma is 0 at times[-1].

    References:
      Song, Meng, Ermon, arXiv 2010.02502, section 4.3; Dhariwal & Nichol, arXiv 2105.05233, appendix F.
    """
    x_0 = check_state(x_0, "x_0")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, for example schedules.edm(), got {schedule!r}")
    solver = plans.check_solver(solver)
    upwards = plans.check_times(times, schedule)[::-1]
    if isinstance(upwards, np.ndarray) and on_host(schedule.sigma, upwards[0]) == 0:
        raise ValueError(
            f"sigma is 0 at times[-1] = {upwards[0]:g}, where noise cannot be told from data: end the times before, "
            "for example with a grid's end"
        )
    plan = plans.from_times(schedule, upwards, solver)
    if plan.table.noise is not None:
        raise ValueError(f"invert needs a deterministic solver, got {solver.name}, which adds noise")
    return run(denoise, x_0, kernel.for_state(plan, x_0, None), None, None, remat=False)


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
