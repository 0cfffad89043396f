"""Distances between sets against closed forms, and intervals that cover."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evodiff_jax.evaluation.metrics import (
    bootstrap,
    bootstrap_ratio,
    frechet_distance,
    kernel_distance,
    trajectory_errors,
)

RANDOM = np.random.default_rng(0)


def features(count, width, seed=0, scale=1.0, shift=0.0):
    random = np.random.default_rng(seed)
    return shift + scale * random.standard_normal((count, width)) @ random.standard_normal((width, width))


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_the_frechet_distance_is_the_published_formula(count_a, count_b, width, seed):
    a, b = features(count_a, width, seed), features(count_b, width, seed + 1, 2.0, 0.5)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(covariance_a)  # not scipy's sqrtm, which warns of singular matrices
    root_a = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ covariance_b @ root_a), 0)).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    expected = shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_frechet_distance_of_a_set_from_itself_moved_is_the_move():
    a = features(50, 6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 2.0) == pytest.approx(6 * 4, rel=1e-10)
    assert frechet_distance(a[:4], a[4:7]) == pytest.approx(frechet_distance(a[4:7], a[:4]), rel=1e-10)


def test_the_kernel_distance_is_the_double_sum_without_the_diagonal():
    a, b = features(7, 3), features(9, 3, 1)
    kernel = lambda x, y: (x @ y.T / 3 + 1) ** 3
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    expected = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b)[0] == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_is_unbiased_and_its_error_is_its_spread():
    draws = [
        kernel_distance(*(np.random.default_rng(2 * i + j).normal(0.4 * j, 1, (60, 4)) for j in (0, 1)))
        for i in range(300)
    ]
    values, errors = np.array(draws).T
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    same = [
        kernel_distance(*(np.random.default_rng(2 * i + j).normal(size=(60, 4)) for j in (0, 1)))[0] for i in range(300)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(300)
    assert min(same) < 0


def test_many_rows_are_summed_in_parts():
    a, b = features(1500, 3), features(1100, 3, 1)
    whole = ((a @ b.T / 3 + 1) ** 3).mean()
    within = [
        (((x @ x.T / 3 + 1) ** 3).sum() - ((np.square(x).sum(1) / 3 + 1) ** 3).sum()) / len(x) / (len(x) - 1)
        for x in (a, b)
    ]
    assert kernel_distance(a, b)[0] == pytest.approx(sum(within) - 2 * whole, rel=1e-9)


def test_trajectory_errors_are_per_sample_and_infinite_for_samples_that_blew_up():
    reference = RANDOM.standard_normal((4, 5, 5, 2))
    x = reference + np.array([0.0, 0.1, -2.0, np.nan])[:, None, None, None]
    np.testing.assert_allclose(trajectory_errors(x, reference), [0, 0.1, 2.0, np.inf], atol=1e-12)


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        sample = np.random.default_rng(seed).exponential(size=100)
        found = bootstrap(lambda rows, sample=sample: float(sample[rows].mean()), 100, level=0.9, seed=seed)
        assert found.value == sample.mean()
        covered += found.low <= 1.0 <= found.high
    assert 0.82 < covered / 200 < 0.96


def test_bootstrap_of_a_ratio_takes_the_same_rows_of_both():
    """Two solvers whose errors differ by a factor: the ratio is certain, however much the errors spread."""
    errors = RANDOM.exponential(size=50)
    for centered in (False, True):
        found = bootstrap_ratio(
            lambda rows: 2 * np.median(errors[rows]), lambda rows: np.median(errors[rows]), 50, centered=centered
        )
        np.testing.assert_allclose(found, 2.0)


@pytest.mark.slow
def test_a_centered_interval_of_a_distance_holds_it():
    random = np.random.default_rng(0)
    a, b = random.normal(0.1, 1, (100, 20)), random.normal(size=(1000, 20))
    plain, centered = (
        bootstrap(lambda rows: frechet_distance(a[rows], b), 100, resamples=50, centered=c) for c in (False, True)
    )
    assert plain.value == centered.value < plain.low
    assert centered.low < centered.value < centered.high
    assert centered.high - centered.low == pytest.approx(plain.high - plain.low)


def test_a_ratio_over_what_may_be_nothing_has_no_upper_end():
    noise = RANDOM.normal(0, 1, 100)
    found = bootstrap_ratio(lambda rows: 1.0, lambda rows: 0.05 + noise[rows].mean() - noise.mean(), 100)
    assert found.value == pytest.approx(20)
    assert 0 < found.low < found.value < found.high == np.inf
    assert tuple(bootstrap_ratio(lambda rows: 0.0, lambda rows: 0.0, 5)) == (1, 1, 1)


def test_infinite_draws_are_infinite_ends():
    errors = np.where(np.arange(50) < 4, np.inf, 1.0)
    found = bootstrap(lambda rows: float(np.quantile(errors[rows], 0.9, method="higher")), 50)
    assert tuple(found) == (1, 1, np.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(np.ones(3), np.ones(3)), r"must be \(N, D\) and \(M, D\).*got \(3,\)"),
        (lambda: frechet_distance(np.ones((3, 2)), np.ones((3, 4))), r"got \(3, 2\) and \(3, 4\)"),
        (lambda: kernel_distance(np.ones((1, 2)), np.ones((3, 2))), "N, M >= 2"),
        (lambda: kernel_distance(np.full((3, 2), np.nan), np.ones((3, 2))), "features must be finite"),
        (lambda: trajectory_errors(np.ones((3, 2)), np.ones((3, 4))), r"same shape .* got \(3, 2\) and \(3, 4\)"),
        (lambda: bootstrap(np.median, 0), "bootstrap needs samples"),
        (lambda: bootstrap(np.median, 5, level=1.0), "0 < level < 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
