"""Means and covariances of features that come in batches."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Statistics(NamedTuple):
    """What is left of N features (N, D), in float64 on the host.

    Attributes:
      samples: N.
      mean: (D,) their mean.
      scatter: (D, D) the sum over them of (x - mean) (x - mean)^T.
    """

    samples: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, the scatter over N - 1.

        Raises:
          ValueError: there are fewer than two features.
        """
        if self.samples < 2:
            raise ValueError(f"a covariance needs 2 features, got {self.samples}")
        return self.scatter / (self.samples - 1)


def no_statistics(width: int) -> Statistics:
    """The statistics of no features of so many numbers."""
    return Statistics(0, np.zeros(width), np.zeros((width, width)))


def include(statistics: Statistics, features: ArrayLike) -> Statistics:
    """The statistics of some features and of a batch more.

    No sum of squares is formed about another point than a mean, so that nothing cancels.

    Args:
      statistics: from `no_statistics` or the last `include`.
      features: (N, D), N may be 0.

    Raises:
      ValueError: the features are not (N, D), or not finite.

    References:
      Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance: analysis and recommendations".

    Examples:
      >>> statistics = no_statistics(2)
      >>> for batch in ([[0.0, 1.0], [2.0, 1.0]], [[4.0, 4.0]]):
      ...     statistics = include(statistics, batch)
      >>> statistics.mean.tolist(), statistics.covariance.tolist()
      ([2.0, 2.0], [[4.0, 3.0], [3.0, 3.0]])
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or x.shape[1:] != statistics.mean.shape:
        raise ValueError(f"features must be (N, {len(statistics.mean)}), got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features must be finite")
    if not len(x):
        return statistics
    mean = x.mean(0)
    centered, shift, samples = x - mean, mean - statistics.mean, statistics.samples + len(x)
    between = statistics.samples * len(x) / samples * np.outer(shift, shift)
    scatter = statistics.scatter + centered.T @ centered + between
    return Statistics(samples, statistics.mean + shift * (len(x) / samples), scatter)
