"""Inner products from norms and distances: equal to direct ones, and free of cancellation."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evodiff_jax import gram as grams

SHAPES = [(3,), (3, 5), (3, 7, 4), (3, 4, 6, 2), (2, 3, 5, 4, 3), (2, 17, 3)]


def pushed(outputs, axes, slots):
    """The Gram after pushing outputs (oldest first) into a ring, as the kernel does."""
    first = outputs[0]
    kept = tuple(n for axis, n in enumerate(first.shape) if axis not in axes)
    gram = grams.initial(kept, slots - 1, first.dtype, noise=True)
    ring = jnp.zeros((slots, *first.shape), first.dtype)
    for i, output in enumerate(outputs):
        ring, ages = ring.at[i % slots].set(output), (i - jnp.arange(slots)) % slots
        gram = grams.push(gram, grams.measure(output, ring, ages, state_at(i, first), axes, first.dtype), ages)
    return gram


def state_at(i, like):
    """Some x / alpha at call i."""
    return jnp.asarray(np.random.default_rng(i).normal(size=like.shape), like.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channel_axis", [None, -1, 1])
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_norms_and_distances_are_of_the_newest_outputs(shape, channel_axis, slots, x64):
    axes = grams.reduced_axes(shape, channel_axis)
    rng = np.random.default_rng(0)
    outputs = [jnp.asarray(rng.normal(size=shape)) for _ in range(5)]
    gram = pushed(outputs, axes, slots)
    newest = outputs[::-1][:slots]
    for i in range(slots):
        np.testing.assert_allclose(gram.norms[i], np.sum(np.square(newest[i]), axis=axes), rtol=1e-14)
        for j in range(i + 1, slots):
            expected = np.sum(np.square(newest[i] - newest[j]), axis=axes)
            np.testing.assert_allclose(gram.distance(i, j), expected, rtol=1e-14)
            np.testing.assert_allclose(gram.distance(j, i), expected, rtol=1e-14)
    noise = np.sum((state_at(4, outputs[0]) - newest[0]) * (newest[0] - newest[1]), axis=axes)
    np.testing.assert_allclose(gram.noise, noise, rtol=1e-13)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_inner_products_of_any_combinations(seed):
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(3, 6))
    u, v = rng.normal(size=(2, 3))
    norms = tuple(np.sum(outputs**2, axis=1))
    distances = tuple(tuple(np.sum((outputs[i] - outputs[j]) ** 2) for j in range(i + 1, 3)) for i in range(2))
    inner = grams.Gram(norms, distances).inner(u, v, u.sum(), v.sum())
    assert inner == pytest.approx((u @ outputs) @ (v @ outputs), rel=1e-11, abs=1e-11)


def test_differences_of_nearly_equal_outputs_survive_float32():
    rng = np.random.default_rng(0)
    base, d1, d2 = (rng.normal(size=(1, 4096)).astype(np.float32) * s for s in (1, 1e-4, 1e-4))
    outputs = [base, base + d1, base + d1 + d2]
    gram = pushed([jnp.asarray(o) for o in outputs], (1,), 3)
    new, old = (outputs[i + 1].astype(np.float64) - outputs[i] for i in (1, 0))
    exact = np.sum(new * old) / np.sum(new**2)
    measured = gram.inner((1, -1, 0), (0, 1, -1), 0, 0) / gram.distance(0, 1)
    np.testing.assert_allclose(measured[0], exact, atol=1e-5)
    from_products = np.sum((outputs[2] - 0 * base) * (outputs[1] - 0 * base), dtype=np.float32)
    assert abs(from_products) > 1e3  # what a Gram of plain products would have to cancel down to about 1e-6


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
    assert grams.reduced_axes(shape, channel_axis) == axes


@pytest.mark.parametrize("channel_axis", [0, 4, -4, -5])
def test_the_batch_is_not_a_channel_axis(channel_axis):
    with pytest.raises(ValueError, match="channel_axis"):
        grams.reduced_axes((2, 8, 8, 3), channel_axis)
