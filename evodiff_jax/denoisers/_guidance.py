"""Guidance: data predictions moved towards a condition, without a classifier and with one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.denoisers._prediction import check_signal
from evodiff_jax.numerics import checked_arguments, concrete_array, is_integer
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule, expect_schedule, made_of, some_levels
from evodiff_jax.types import Denoiser, State, batch_size, check_function, check_like, per_sample, widest


@checked_arguments
def classifier_free_guidance(
    fn: Denoiser,
    condition: Any,
    null_condition: Any,
    scale: Any,
    *,
    batched: bool = True,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    schedule: NoiseSchedule | None = None,
    channels: int | None = None,
) -> Denoiser:
    """Guides a conditional denoiser away from its unconditional prediction (Ho & Salimans 2022, arXiv 2207.12598).

    x_0 = null + scale (conditional - null): 1 is no guidance, 0 unconditional. A model call (NFE) is then two network
    evaluations a sample, and one for a scale that is the Python or NumPy number 0 or 1, or outside the interval;
    `counted` counts both.

    Args:
      fn: fn(x, t, condition) -> x_0, for a batch x (B, ...) and conditions with the same leading axis; for networks
        that predict something else `from_prediction(network, ...)`.
      condition: the conditions, a pytree of arrays (B, ...).
      null_condition: what stands for no condition, or the negative conditions to be guided away from, of the same
        structure, shapes and dtypes.
      scale: the guidance scale, a number, or (B,), one for each sample.
      batched: evaluate fn once on a batch of 2 B, in which each sample's two evaluations are neighbours, so that a
        batch sharded over devices stays where it is; if not, twice on B, in half the memory.
      rescale: from 0 to 1, how far each sample's standard deviation is brought back to that of its conditional
        prediction (Lin et al., arXiv 2305.08891, section 3.4, there and here of the predictions that are guided).
      interval: the noise levels (low, high] of sigma / alpha in which to guide (Kynkäänniemi et al., arXiv
        2404.07724); outside them the conditional prediction is used. The network then stands twice in the program.
      schedule: the schedule, for `interval`.
      channels: how many entries of the last axis to guide, the others being conditional, as the release of DiT guides
        three of four (Peebles & Xie, arXiv 2212.09748); None for all.

    Returns:
      denoise(x, t), of the structure, shapes and dtypes of x.

    Raises:
      TypeError: when a condition is missing, or the scale is not a number or array of numbers.
      ValueError: when the two conditions differ in structure, shapes or dtypes, the scale is not finite, rescale is
        not from 0 to 1, the interval is not 0 <= low < high or comes without a schedule, or channels is below 1; when
        called, when the conditions or scales are not as many as the samples.
    """
    check_function("fn", fn, "fn(x, t, condition) -> x_0")
    _check_conditions(condition, null_condition)
    _check_scale(scale)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be from 0 to 1, got {rescale}")
    if channels is not None and not (is_integer(channels) and channels >= 1):
        raise ValueError(f"channels must be an integer of at least 1, got {channels!r}")
    if schedule is not None:
        expect_schedule(schedule)
    _check_interval(interval, schedule)
    both = None
    if batched:
        both = jax.tree.map(lambda c, n: _interleaved(jnp.asarray(c), jnp.asarray(n)), condition, null_condition)

    def conditional(x: State, t: Any) -> State:
        return _checked(fn(x, t, condition), x)

    def null(x: State, t: Any) -> State:
        return _checked(fn(x, t, null_condition), x)

    def pair(x: State, t: Any) -> tuple[State, State]:
        if not batched:
            return conditional(x, t), null(x, t)
        twice = jax.tree.map(lambda leaf: _interleaved(leaf, leaf), x)
        outputs = _checked(fn(twice, t, both), twice)
        apart = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), outputs)
        return jax.tree.map(lambda leaf: leaf[:, 0], apart), jax.tree.map(lambda leaf: leaf[:, 1], apart)

    def guided(x: State, t: Any) -> State:
        wide = widest(jax.tree.leaves(x))
        scales = per_sample(scale, x, "scale", wide)

        def combine(towards: jax.Array, away: jax.Array, scale: jax.Array, like: jax.Array) -> jax.Array:
            towards, away = towards.astype(wide), away.astype(wide)
            result = away + scale * (towards - away)
            if rescale:
                result = result * (1 - rescale + rescale * _std_ratio(towards, result))
            if channels is not None:
                result = jnp.concatenate([result[..., :channels], towards[..., channels:]], axis=-1)
            return result.astype(like.dtype)

        return jax.tree.map(combine, *pair(x, t), scales, x)

    checked = lambda denoise: made_of(_for_batches_of(condition, denoise), fn)
    known = isinstance(scale, int | float | np.number)
    if known and scale == 1:
        return checked(conditional)
    inside = null if known and scale == 0 and not rescale and channels is None else guided
    if interval is None or schedule is None:
        return checked(inside)
    check_same_schedule(fn, some_levels(schedule), "the schedule given for the interval")
    low, high = interval
    level = lambda t: schedule.sigma(t) / schedule.alpha(t)

    def within(x: State, t: Any) -> State:
        kappa = level(jnp.asarray(t, widest(jax.tree.leaves(x))))
        cast = lambda fn: lambda x: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), fn(x, t), x)
        return jax.lax.cond((kappa > low) & (kappa <= high), cast(inside), cast(conditional), x)

    return checked(within)


def classifier_guidance(
    denoise: Denoiser, log_prob: Callable[[State, jax.Array], jax.Array], schedule: NoiseSchedule, scale: Any
) -> Denoiser:
    """Guides a denoiser by the gradient of a classifier of noisy states (Dhariwal & Nichol 2021, arXiv 2105.05233).

    x_0 + scale sigma^2 / alpha grad_x log p(y | x_t), which is algorithm 2 there in terms of the data.

    Args:
      denoise: denoise(x, t) -> x_0.
      log_prob: log_prob(x, t) -> (B,), the log-probability of what is wanted given the noisy state.
      schedule: the schedule.
      scale: the guidance scale, a number, or (B,), one for each sample.

    Returns:
      denoise(x, t), of the structure, shapes and dtypes of x.

    Raises:
      TypeError: when the schedule is something else, or the scale is not a number or array of numbers.
      ValueError: when alpha is 0 at t_max, or the scale is not finite; when called, when log_prob returns another
        shape, or the scales are not as many as the samples.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    check_function("log_prob", log_prob, "log_prob(x, t) -> (B,)")
    expect_schedule(schedule)
    check_same_schedule(denoise, some_levels(schedule), "the schedule given for the classifier")
    check_signal(schedule, "a gradient")
    _check_scale(scale)

    def guided(x: State, t: Any, *conditions: Any) -> State:
        wide = widest(jax.tree.leaves(x))
        t = jnp.asarray(t, wide)
        scales = per_sample(scale, x, "scale", wide)

        def total(x: State) -> jax.Array:
            found = log_prob(x, t)
            if jnp.shape(found) != (batch_size(x),):
                raise ValueError(f"log_prob(x, t) must return shape ({batch_size(x)},), it returned {jnp.shape(found)}")
            return jnp.sum(found.astype(wide))

        strength = schedule.sigma(t) ** 2 / schedule.alpha(t)
        shifted = lambda m, g, s: (m.astype(wide) + s * strength * g.astype(wide)).astype(g.dtype)
        m = check_like(denoise(x, t, *conditions), x, "denoise(x, t)")
        return jax.tree.map(shifted, m, jax.grad(total)(x), scales)

    return made_of(guided, denoise)


def _interleaved(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def _std_ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """std(a) / std(b) over each sample, 1 where either is 0, with gradients that are finite there too."""
    axes = tuple(range(1, a.ndim))
    of_a, of_b = (jnp.var(array, axis=axes, keepdims=True) for array in (a, b))
    positive = (of_a > 0) & (of_b > 0)
    return jnp.sqrt(jnp.where(positive, of_a, 1) / jnp.where(positive, of_b, 1))


def _for_batches_of(condition: Any, denoise: Denoiser) -> Denoiser:
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(condition)}

    def checked(x: State, t: Any) -> State:
        if sizes - {batch_size(x)}:
            raise ValueError(
                f"condition must have the batch axis of x, {batch_size(x)}, in front of every leaf, got "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
        return denoise(x, t)

    return checked


def _checked(output: Any, x: State) -> State:
    return check_like(output, x, "fn(x, t, condition)")


def _check_conditions(condition: Any, null_condition: Any) -> None:
    for name, value in (("condition", condition), ("null_condition", null_condition)):
        if not jax.tree.leaves(value):
            raise TypeError(f"{name} must be an array (B, ...) or a pytree of such, got {value!r}")
    described = [jax.tree.map(lambda c: (jnp.shape(c), jnp.result_type(c)), c) for c in (condition, null_condition)]
    if described[0] != described[1]:
        raise ValueError(
            f"condition and null_condition must have the same structure, shapes and dtypes, got {described[0]} "
            f"and {described[1]}"
        )
    if any(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(condition)):
        raise ValueError("condition must have a batch axis in front of every leaf, got a scalar")


def _check_scale(scale: Any) -> None:
    numbers = isinstance(scale, int | float | np.number | np.ndarray | jax.Array) and not isinstance(scale, bool)
    if not numbers or not jnp.issubdtype(jnp.result_type(scale), jnp.number) or np.ndim(scale) > 1:
        raise TypeError(f"scale must be a number, or an array (B,) of numbers, got {scale!r}")
    if not isinstance(scale, jax.Array) and not np.isfinite(scale).all():
        raise ValueError(f"scale must be finite, got {scale!r}")


def _check_interval(interval: Any, schedule: Any) -> None:
    if interval is None:
        return
    if schedule is None:
        raise TypeError("interval needs schedule, a NoiseSchedule, to know the noise level at t")
    low_high = concrete_array("interval", interval)
    if low_high.shape != (2,) or not 0 <= low_high[0] < low_high[1]:
        raise ValueError(f"interval must be (low, high) with 0 <= low < high, in sigma / alpha, got {interval!r}")
