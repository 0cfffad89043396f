"""What is sampled, and the one program from a random key and numbers of samples to their images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.generation._images import to_uint8
from evodiff_jax.sampling import sample
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Plan
from evodiff_jax.types import Denoiser

_CLASS_KEY = 2  # beside the two keys of `program_from_key`


class Source(NamedTuple):
    """What is sampled.

    Attributes:
      make_denoiser: make_denoiser(params, condition) -> denoise(x, t), for a batch; the condition is that of
        `conditions`, else classes (B,), or None where there are none.
      params: the parameters.
      schedule: the noise schedule.
      image_shape: (H, W, C) of a sample, with one or three channels where it is an image.
      num_classes: 0 for samples without labels.
      label: the class of all samples; None for classes drawn uniformly at random.
      settings: what determines the samples besides, as JSON, so that runs of others are not mixed with them.
      decode: decode(params, x) -> the images of samples that are latents; None where samples are images.
      conditions: conditions(indices) -> the condition of the samples with these numbers, a tree of arrays (B, ...), in
        the place of classes. It runs on the host and depends on the numbers alone.
    """

    make_denoiser: Callable[[Any, Any], Denoiser]
    params: Any
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    num_classes: int = 0
    label: int | None = None
    settings: Mapping[str, Any] = {}
    decode: Callable[[Any, jax.Array], jax.Array] | None = None
    conditions: Callable[[np.ndarray], Any] | None = None


def classes_in_turn(num_classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Conditions for `Source`: sample k is of class k modulo the number of classes."""
    return lambda indices: (np.asarray(indices) % num_classes).astype(np.int32)


def program(make_denoiser: Callable[[Any, Any], Denoiser]) -> Callable[..., Any]:
    """The pure function (params, x_T, condition, key, plan) -> samples that every command runs, to be jitted.

    Jitted it is compiled once for all plans of one shape: see `sampling.sample`.

    Args:
      make_denoiser: make_denoiser(params, condition) -> denoise(x, t) for the batch of that condition.
    """

    def run(params: Any, x_T: Any, condition: Any, key: Any, laid_out: Plan) -> Any:
        return sample(make_denoiser(params, condition), x_T, laid_out, key=key)

    return run


def program_from_key(
    make_denoiser: Callable[[Any, Any], Denoiser], schedule: NoiseSchedule, shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """As `program`, the function (params, key, indices, condition, plan) -> samples (B, *shape) float32.

    All randomness of sample i comes from (key, i), so that a sample does not depend on the batch it is made in.
    """
    run = program(make_denoiser)

    def run_from_key(params: Any, key: jax.Array, indices: jax.Array, condition: Any, laid_out: Plan) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(indices)
        x_T = schedule.noise(keys[:, 0], (len(indices), *shape))
        return run(params, x_T, condition, keys[:, 1], laid_out)

    return run_from_key


def images_from_key(source: Source, uint8: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The pure function (params, key, indices, condition, plan) -> bytes (B, H, W, C), whether each is finite.

    A sample that is not finite is an image of zeros before its conversion.

    Args:
      source: what is sampled.
      uint8: how samples become bytes, see `to_uint8`.
    """
    run = program_from_key(source.make_denoiser, source.schedule, source.image_shape)

    def draw(key: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, index), _CLASS_KEY)
        return jax.random.randint(key, (), 0, source.num_classes, jnp.int32)

    def images(
        params: Any, key: jax.Array, indices: jax.Array, condition: Any, laid_out: Plan
    ) -> tuple[jax.Array, jax.Array]:
        if source.conditions is None and source.num_classes:
            if source.label is None:
                condition = jax.vmap(functools.partial(draw, key))(indices)
            else:
                condition = jnp.full(len(indices), source.label, jnp.int32)
        x = run(params, key, indices, condition, laid_out)
        x = x if source.decode is None else source.decode(params, x)
        finite = jnp.isfinite(x).all(tuple(range(1, x.ndim)))
        return to_uint8(jnp.where(finite[:, None, None, None], x, 0), uint8), finite

    return images
