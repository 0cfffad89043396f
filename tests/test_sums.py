"""Sums over samples: equal to direct ones whatever the shape, in one pass, and with gradients of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evodiff_jax.sums import reduced_axes, sums_over_samples

pytestmark = pytest.mark.fast

SHAPES = [(3,), (3, 5), (3, 7, 4), (3, 4, 6, 2), (2, 3, 5, 4, 3), (2, 17, 3), (2, 1, 32, 32), (2, 16, 8, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channel_axis", [None, -1, 1])
def test_sums_are_numpys(shape, channel_axis, x64):
    rng = np.random.default_rng(0)
    terms = [rng.normal(size=shape) for _ in range(3)]
    axes = reduced_axes(shape, channel_axis)
    for term, total in zip(terms, sums_over_samples(list(map(jnp.asarray, terms)), channel_axis), strict=True):
        np.testing.assert_allclose(total, np.sum(term, axis=axes), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_sums_of_any_shape(shape, count, seed):
    terms = np.random.default_rng(seed).integers(-9, 9, (count, *shape)).astype(np.float32)
    for term, total in zip(terms, sums_over_samples(list(map(jnp.asarray, terms))), strict=True):
        np.testing.assert_array_equal(total, term.reshape(shape[0], -1).sum(1) if len(shape) > 1 else term)


@pytest.mark.slow
def test_derivatives_forward_and_backward_and_of_batches(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 6, 3)))

    def fn(x):
        square, product = sums_over_samples((x**2, jnp.sin(x)), -1)
        return jnp.sum(square * product)

    def plain(x):
        return jnp.sum(jnp.sum(x**2, (1, 2)) * jnp.sum(jnp.sin(x), (1, 2)))

    np.testing.assert_allclose(jax.grad(fn)(x), jax.grad(plain)(x), rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(fn, (x,), (x,))[1], jax.jvp(plain, (x,), (x,))[1], rtol=1e-12)
    several = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(jax.grad(fn))(several)[1], jax.grad(plain)(2 * x), rtol=1e-12)
    np.testing.assert_allclose(jax.hessian(lambda a: fn(a * x))(1.0), jax.hessian(lambda a: plain(a * x))(1.0))


@pytest.mark.parametrize(
    ("shape", "channel_axis", "axes"),
    [
        ((2, 8, 8, 3), -1, (1, 2)),
        ((2, 3, 8, 8), 1, (2, 3)),
        ((2, 8, 8, 3), None, (1, 2, 3)),
        ((2, 4, 8, 8, 3), -1, (1, 2, 3)),
        ((2, 5), -1, (1,)),
        ((2,), -1, ()),
    ],
)
def test_reduced_axes(shape, channel_axis, axes):
    assert reduced_axes(shape, channel_axis) == axes


@pytest.mark.parametrize("channel_axis", [0, 4, -4, -5])
def test_the_batch_is_not_a_channel_axis(channel_axis):
    with pytest.raises(ValueError, match="channel_axis"):
        reduced_axes((2, 8, 8, 3), channel_axis)
