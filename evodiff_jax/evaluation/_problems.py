"""Models to compare solvers on: exact ones, and image models with what judges their samples."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from evodiff_jax.denoisers import gaussian_mixture
from evodiff_jax.evaluation._runs import Problem, converged
from evodiff_jax.evaluation._store import check_store
from evodiff_jax.evaluation.data import load_fashion_mnist
from evodiff_jax.generation import digest_of_params
from evodiff_jax.schedules import NoiseSchedule, edm

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Model, Pipeline

_EXACT_DRAWS = 10_000
_IN_FEATURES = 200  # images at a time
_BLOCKS = 8  # along a side

MIXTURES = ("mixture-2d", "mixture-64d")
"""The exact models that `mixture` makes."""


def mixture(name: str, samples: int, folder: Path, seed: int = 0, batch: int = 250) -> Problem:
    """One of MIXTURES, judged by its coordinates."""
    return exact(name, *modes_of(name), samples, folder, seed, batch)


def modes_of(name: str) -> tuple[np.ndarray, float]:
    """The centers (K, D) of one of MIXTURES, drawn at random once and for all, and their standard deviation."""
    random = np.random.default_rng(0)
    if name == "mixture-2d":
        return random.uniform(-1, 1, (12, 2)), 0.05
    return random.normal(0, 0.6, (32, 64)), 0.1


def exact(
    name: str, centers: np.ndarray, std: float, samples: int, folder: Path, seed: int = 0, batch: int = 250
) -> Problem:
    """A mixture of equally likely Gaussians, judged by its coordinates.

    Args:
      name: what it is called.
      centers: (K, D) the means.
      std: their common standard deviation.
      samples: how many to make.
      folder: where they are stored.
      seed: of the noise.
      batch: how many samples at a time.

    Returns:
      The problem.

    Raises:
      ValueError: the folder holds runs of this name with other settings.
    """
    check_store(folder / name, {"samples": samples, "seed": seed})
    schedule = edm()
    denoise = gaussian_mixture(schedule, centers, std)
    noise = schedule.t_max * np.random.default_rng(seed).standard_normal((samples, *centers.shape[1:]), np.float32)
    random = np.random.default_rng(2)
    draws = random.choice(centers, _EXACT_DRAWS) + std * random.standard_normal((_EXACT_DRAWS, *centers.shape[1:]))
    return Problem(
        name=name,
        denoise=lambda _, x, t, __: denoise(x, t),
        params=None,
        schedule=schedule,
        noise=noise,
        condition=None,
        features=lambda x: x,
        data=draws,
        batch=batch,
        judged_by=f"the {centers.shape[1]} coordinates, against {_EXACT_DRAWS:,} draws of the exact distribution",
    )


def image_model(
    name: str,
    model: "Model",
    samples: int,
    folder: Path,
    seed: int = 0,
    guidance: float = 1.0,
    batch: int = 100,
    data: str | os.PathLike[str] | None = None,
    decode: Callable[[Any], jax.Array] | None = None,
) -> Problem:
    """An image model, with the classes in turn where it has some.

    Images of the packaged classifier's shape are judged by its features against the test set of Fashion-MNIST; others
    by their pixels against converged samples of other noise.

    Args:
      name: what it is called.
      model: the model.
      samples: how many to make.
      folder: where they are stored.
      seed: of the noise.
      guidance: scale of classifier-free guidance.
      batch: how many samples at a time.
      data: folder of the IDX files of Fashion-MNIST, see `load_fashion_mnist`.
      decode: from samples that are latents to images, for pictures of them; None for a model of pixels.

    Returns:
      The problem.

    Raises:
      ValueError: the folder holds runs of this name with other settings.
      FileNotFoundError: Fashion-MNIST is needed and not there.
    """
    from evodiff_jax.pretrained import load_classifier

    classifier = load_classifier("fashion_mnist")
    fits = model.image_shape == classifier.config.image_shape
    test = load_fashion_mnist("test", data).images if fits else None
    weights = digest_of_params(model.params)[:16]
    check_store(folder / name, {"samples": samples, "seed": seed, "weights": weights, "guidance": guidance})

    schedule = model.schedule
    of_images = jax.jit(lambda params, x: classifier.predict(params, x).features)

    def denoise(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return model.denoiser(params, labels if model.num_classes else None, guidance)(x, t)

    def features(x: np.ndarray) -> np.ndarray:
        return in_parts(lambda part: of_images(classifier.params, part), x)

    count = samples if fits else 3 * samples
    shape = (count, *model.image_shape)
    problem = Problem(
        name=name,
        denoise=denoise,
        params=model.params,
        schedule=schedule,
        noise=_noise(schedule, shape, seed),
        condition=np.arange(count, dtype=np.int32) % max(model.num_classes, 1),
        features=features if fits else lambda x: x.reshape(len(x), -1),
        data=np.empty(0),
        batch=batch,
        images=(lambda x: x) if decode is None else _one_by_one(decode),
    )
    if test is None:
        settings = {"seed": seed, "weights": weights, "guidance": guidance}
        judged_by = "the pixels" if decode is None else "the latents"
        return judged_by_itself(problem, samples, folder, judged_by, settings)
    width = classifier.config.features
    judged_by = f"{width} features of the packaged classifier, against the {len(test):,} test images of Fashion-MNIST"
    return problem._replace(data=features(test), judged_by=judged_by)


def text_model(
    name: str,
    pipeline: "Pipeline",
    prompts: Sequence[str],
    samples: int,
    folder: Path,
    seed: int = 0,
    guidance: float = 1.0,
    batch: int = 8,
) -> Problem:
    """A model of the latents of pictures of texts, with the prompts in turn, judged by the latents.

    Args:
      name: what it is called.
      pipeline: the model, its text encoders and autoencoder.
      prompts: the texts.
      samples: how many to make.
      folder: where they are stored.
      seed: of the noise.
      guidance: scale of classifier-free guidance, away from no prompt.
      batch: how many samples at a time.

    Returns:
      The problem.

    Raises:
      ValueError: the folder holds runs of this name with other settings.
    """
    settings = {"seed": seed, "weights": pipeline.digest[:16], "guidance": guidance, "prompts": list(prompts)}
    check_store(folder / name, {"samples": samples, **settings})
    count = 3 * samples

    def denoise(params: Any, x: jax.Array, t: jax.Array, which: jax.Array) -> jax.Array:
        text = jax.tree.map(lambda of_all: of_all[which], params[1])
        return pipeline.denoiser(params[0], text, guidance)(x, t)

    problem = Problem(
        name=name,
        denoise=denoise,
        params=(pipeline.params, pipeline.text(pipeline.params, prompts)),
        schedule=pipeline.schedule,
        noise=_noise(pipeline.schedule, (count, *pipeline.latent_shape(pipeline.size)), seed),
        condition=np.arange(count, dtype=np.int32) % len(prompts),
        features=_means,
        data=np.empty(0),
        batch=batch,
        images=_one_by_one(lambda x: pipeline.decode(pipeline.params, x)),
    )
    return judged_by_itself(problem, samples, folder, "the latents' means over blocks", settings)


def _means(x: np.ndarray) -> np.ndarray:
    """Means over blocks (N, D), of which there are at most 8 x 8: a covariance of all latents would be too large."""
    count, height, width, channels = x.shape
    rows, columns = (math.gcd(side, _BLOCKS) for side in (height, width))
    return x.reshape(count, rows, height // rows, columns, width // columns, channels).mean((2, 4)).reshape(count, -1)


def _one_by_one(decode: Callable[[Any], jax.Array]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a batch of one image on the device, for some."""
    compiled = jax.jit(decode)
    return lambda x: np.concatenate([np.asarray(compiled(one[None])) for one in x])


def _noise(schedule: NoiseSchedule, shape: tuple[int, ...], seed: int) -> np.ndarray:
    deviation = np.float32(schedule.sigma(schedule.t_max))
    return deviation * np.random.default_rng(seed).standard_normal(shape, np.float32)


def judged_by_itself(problem: Problem, samples: int, folder: Path, judged_by: str, settings: dict) -> Problem:
    """A problem of the first samples, with converged samples from all other noise for data.

    Args:
      problem: what to sample from, with more noise than `samples`.
      samples: how many to make.
      folder: where they are stored.
      judged_by: the features, in words.
      settings: as for `check_store`, without the number of samples.

    Returns:
      The problem.

    Raises:
      ValueError: the folder holds data of other settings, or the converged samples are not finite.
    """
    others = len(problem.noise) - samples
    noise, condition = jax.tree.map(lambda leaf: leaf[samples:], (problem.noise, problem.condition))
    other = problem._replace(name=f"{problem.name}-data", noise=noise, condition=condition)
    check_store(folder / other.name, {"samples": others, **settings})
    noise, condition = jax.tree.map(lambda leaf: leaf[:samples], (problem.noise, problem.condition))
    return problem._replace(
        noise=noise,
        condition=condition,
        data=problem.features(converged(other, folder)),
        judged_by=f"{judged_by}, against {others:,} converged samples from other noise",
    )


def in_parts(function: Any, x: np.ndarray) -> np.ndarray:
    """A function of a batch of images on the device, applied to as many as there are."""
    parts = np.split(x, range(_IN_FEATURES, len(x), _IN_FEATURES))
    return np.concatenate([np.asarray(function(part)) for part in parts])
