"""Distances between sets of samples and between runs from the same noise, with their uncertainty.

Everything here is float64 NumPy on the host. Sets are rows of features, whatever they are: a Frechet distance is an FID
only in the features of FID's own network.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_ROWS = 1024  # of a kernel matrix at a time
_ASYMMETRY = 1e-5  # of a covariance, relative to its largest entry


class Estimate(NamedTuple):
    """A statistic with its uncertainty.

    Attributes:
      value: the statistic of the samples at hand.
      low: the lower end of its interval.
      high: the upper end.
    """

    value: float
    low: float
    high: float


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """The squared Wasserstein-2 distance of two normal distributions with the sets' means and covariances.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), as FID has it. It is biased upwards for small sets, so compare
    distances of sets of the same sizes only.

    Args:
      a: (N, D) features.
      b: (M, D) features.

    Returns:
      The distance, in squared units of the features.

    Raises:
      ValueError: when the sets are not matrices of the same width, have fewer than two rows, or are not finite.

    References:
      Heusel et al. 2017, arXiv 1706.08500, Eq. 6.
    """
    return frechet_distance_to(b)(a)


def frechet_distance_to(b: ArrayLike) -> Callable[[ArrayLike], float]:
    """`frechet_distance` to one set, whose part of the work is done once: for many sets, or a bootstrap.

    Args:
      b: (M, D) features.

    Returns:
      A function from (N, D) features to the distance.

    Raises:
      ValueError: as `frechet_distance`, here or when it is called.
    """
    _, b = _check_sets(b, b)
    mean_b, root_b = b.mean(0), _centered_root(b)

    def distance(a: ArrayLike) -> float:
        checked, _ = _check_sets(a, b)
        shift, root_a = checked.mean(0) - mean_b, _centered_root(checked)
        # tr (C_a C_b)^(1/2) is the nuclear norm of A B^T for C_a = A^T A and C_b = B^T B: no covariance is squared.
        overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
        return float(shift @ shift + np.square(root_a).sum() + np.square(root_b).sum() - 2 * overlap)

    return distance


def frechet_distance_of_statistics(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    """`frechet_distance` from means and covariances, as FID is computed from files of statistics.

    The trace of (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of C_a C_b, by which SciPy's `sqrtm`
    finds it too. With covariances that lack rank both have a round-off error of about 1e-8 of the traces, the square
    root of float64's; `frechet_distance`, from the features themselves, has not.

    Args:
      mean_a: (D,) the mean of one set of features.
      cov_a: (D, D) its covariance.
      mean_b: (D,) the mean of the other.
      cov_b: (D, D) its covariance.

    Returns:
      The distance, in squared units of the features; round-off may make it negative by as much where it is 0.

    Raises:
      ValueError: when shapes differ, a number is not finite, or a covariance is not symmetric or has a negative
        variance.

    References:
      Heusel et al. 2017, arXiv 1706.08500, Eq. 6.

    Examples:
      >>> frechet_distance_of_statistics([0.0, 0.0], np.eye(2), [3.0, 4.0], 4 * np.eye(2))
      27.0
    """
    (mean_a, cov_a), (mean_b, cov_b) = check_statistics(mean_a, cov_a), check_statistics(mean_b, cov_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"statistics must be of as many features, got {len(mean_a)} and {len(mean_b)}")
    shift = mean_a - mean_b
    overlap = np.real(np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex))).sum()
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)


def check_statistics(mean: ArrayLike, cov: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """A mean (D,) and a covariance (D, D) in float64.

    Raises:
      ValueError: they are not of these shapes, not finite, or the covariance is not symmetric up to the round-off of
        float32, or has a negative variance.
    """
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != 2 * mean.shape or not mean.size:
        raise ValueError(f"statistics must be a mean (D,) and a covariance (D, D), got {mean.shape} and {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError("statistics must be finite")
    if abs(cov - cov.T).max() > _ASYMMETRY * abs(cov).max():
        raise ValueError(f"a covariance must be symmetric, entries differ by {abs(cov - cov.T).max():.3g}")
    if cov.diagonal().min() < 0:
        raise ValueError(f"variances must not be negative, got {cov.diagonal().min():.3g}")
    return mean, cov


def kernel_distance(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """The unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, and its standard error.

    The error is the first-order one of the two-sample U-statistic, which is too small where the distributions agree.

    Args:
      a: (N, D) features.
      b: (M, D) features.

    Returns:
      The distance, which may be negative, and its standard error.

    Raises:
      ValueError: as `frechet_distance`.

    References:
      Binkowski et al. 2018, arXiv 1801.01401, section 4.
    """
    return kernel_distance_to(b)(a)


def kernel_distance_to(b: ArrayLike) -> Callable[[ArrayLike], tuple[float, float]]:
    """`kernel_distance` to one set, whose part of the work is done once: for many sets.

    Args:
      b: (M, D) features.

    Returns:
      A function from (N, D) features to the distance and its standard error.

    Raises:
      ValueError: as `frechet_distance`, here or when it is called.
    """
    _, b = _check_sets(b, b)
    within_b = _kernel_sums(b, b, exclude_own=True) / (len(b) - 1)

    def distance(a: ArrayLike) -> tuple[float, float]:
        checked, _ = _check_sets(a, b)
        within_a = _kernel_sums(checked, checked, exclude_own=True) / (len(checked) - 1)
        a_to_b, b_to_a = _kernel_sums(checked, b) / len(b), _kernel_sums(b, checked) / len(checked)
        value = within_a.mean() + within_b.mean() - 2 * a_to_b.mean()
        variance = sum(
            4 * np.var(own - other, ddof=1) / len(own) for own, other in ((within_a, a_to_b), (within_b, b_to_a))
        )
        return float(value), math.sqrt(variance)

    return distance


def trajectory_errors(x: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """The root mean square difference of every sample from the converged one from the same noise.

    Args:
      x: (N, ...) samples.
      reference: (N, ...) what they converge to.

    Returns:
      (N,) errors, in units of the samples; infinite where a sample is not finite.

    Raises:
      ValueError: when the shapes differ.
    """
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    if x.shape != reference.shape or x.ndim < 1:
        raise ValueError(f"x and reference must have the same shape (N, ...), got {x.shape} and {reference.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.sqrt(np.square(x - reference).reshape(len(x), -1).mean(1))
    return np.where(np.isfinite(errors), errors, np.inf)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    centered: bool = False,
) -> Estimate:
    """The statistic of all samples and the percentile interval of its bootstrap distribution.

    Args:
      statistic: a function of the indices of the samples to take.
      count: the number of samples.
      resamples: how many times to draw as many samples with replacement.
      level: the coverage of the interval.
      seed: seed of the draws.
      centered: shift the distribution to have the statistic for its mean. For distances: that of a small set is biased
        upwards and that of a set drawn from it once more, so that the plain interval may lie above the statistic.

    Returns:
      The estimate.

    Raises:
      ValueError: when there are no samples or resamples, or not 0 < level < 1.

    References:
      Efron 1979, "Bootstrap methods: another look at the jackknife".

    Examples:
      >>> errors = np.array([1.0, 2.0, 3.0, 4.0])
      >>> bootstrap(lambda rows: float(np.median(errors[rows])), 4).value
      2.5
    """
    value, drawn = _draws(statistic, count, resamples, level, seed, centered)
    return _interval(value, drawn, level)


def bootstrap_ratio(
    over: Callable[[np.ndarray], float],
    under: Callable[[np.ndarray], float],
    count: int,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    centered: bool = False,
) -> Estimate:
    """The ratio of two statistics that are not negative, such as two solvers' from the same noise, as `bootstrap` does.

    Both are of the same samples in every draw, and each is shifted by itself where `centered`. A draw that is shifted
    below 0 counts as 0: where the lower one is not told from 0 the interval ends at infinity.

    Args:
      over: the upper statistic, a function of the indices of the samples to take.
      under: the lower one.
      count: as for `bootstrap`.
      resamples: as for `bootstrap`.
      level: as for `bootstrap`.
      seed: as for `bootstrap`.
      centered: as for `bootstrap`.

    Returns:
      The estimate.

    Raises:
      ValueError: as `bootstrap`.
    """
    (a, drawn_a), (b, drawn_b) = (_draws(f, count, resamples, level, seed, centered) for f in (over, under))
    drawn = [_ratio(x, y) for x, y in zip(drawn_a, drawn_b, strict=True)]
    return _interval(_ratio(a, b), np.array(drawn), level)


def _draws(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int, level: float, seed: int, centered: bool
) -> tuple[float, np.ndarray]:
    if count < 1 or resamples < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs samples, resamples and 0 < level < 1, got {count}, {resamples} and {level}")
    random = np.random.default_rng(seed)
    value = statistic(np.arange(count))
    drawn = np.array([statistic(random.integers(count, size=count)) for _ in range(resamples)])
    return value, drawn + (value - drawn.mean()) if centered and np.isfinite(drawn).all() else drawn


def _interval(value: float, drawn: np.ndarray, level: float) -> Estimate:
    # Draws themselves, nothing between two of them: they may be infinite.
    low = np.quantile(drawn, (1 - level) / 2, method="lower")
    high = np.quantile(drawn, (1 + level) / 2, method="higher")
    return Estimate(value, float(low), float(high))


def _ratio(over: float, under: float) -> float:
    """Of what is not negative; of two zeros 1, which decides nothing."""
    over, under = max(over, 0.0), max(under, 0.0)
    if over == under:
        return 1.0
    return over / under if under else math.inf


def _check_sets(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"sets of features must be (N, D) and (M, D) with N, M >= 2, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite")
    return a, b


def _centered_root(features: np.ndarray) -> np.ndarray:
    """R with at most D rows and R^T R the covariance."""
    centered = (features - features.mean(0)) / math.sqrt(len(features) - 1)
    return np.linalg.qr(centered).R


def _kernel_sums(a: np.ndarray, b: np.ndarray, exclude_own: bool = False) -> np.ndarray:
    """The sum over the rows of b of the kernel with each row of a."""
    width = a.shape[1]
    sums = [((rows @ b.T / width + 1) ** 3).sum(1) for rows in np.split(a, range(_ROWS, len(a), _ROWS))]
    own = (np.square(a).sum(1) / width + 1) ** 3 if exclude_own else 0.0
    return np.concatenate(sums) - own
