"""Models for tests of generation, also as factories of `--model` in processes of their own."""

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax.generation import Source

SCHEDULE = ed.schedules.edm()
SHAPE = (4, 4, 3)
CLASSES = 5


def make_denoiser(params, labels):
    """Samples near a gray level of their class."""
    levels = 0 if labels is None else 0.3 * (labels[:, None, None, None] - 2)
    return lambda x, t: levels + params * (x - levels) / (1 + t**2)


def tiny():
    """A model of classes that compiles in a moment."""
    return Source(make_denoiser, np.float32(1.0), SCHEDULE, SHAPE, CLASSES, settings={"model": "tiny"})


def busy():
    """A network of sums over channels, of which a batch of 8 takes a tenth of a second or so on a CPU."""
    weights = np.random.default_rng(0).standard_normal((2, 768, 768)).astype(np.float32) / 28

    def network(params, x):
        h = x.reshape(len(x), -1)
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ params[0]) @ params[1], None), h, None, 10)
        return h.reshape(x.shape)

    def denoiser(params, labels):
        return lambda x, t: jnp.tanh(network(params, x / jnp.sqrt(1 + t**2))) + x / (1 + t**2)

    return Source(denoiser, weights, SCHEDULE, (16, 16, 3), settings={"model": "busy"})


def pixels():
    """Images of one byte, to have many."""
    return Source(lambda params, _: lambda x, t: x / (1 + t**2), np.float32(1), SCHEDULE, (1, 1, 1))


def with_argument(width):
    """No factory: it needs an argument."""


def of_nothing():
    """No factory: it returns nothing."""


def of_one_argument():
    """No source: its make_denoiser takes the parameters alone."""
    return tiny()._replace(make_denoiser=lambda params: None)
