"""Files that samples are judged against: statistics, features, or images."""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evodiff_jax.evaluation._statistics import Statistics, include, no_statistics
from evodiff_jax.evaluation.metrics import check_statistics

DAMAGES = (ValueError, TypeError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What is raised by reading an NPZ file that is damaged or something else."""

_ROWS = 4096  # of stored features at a time
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Reference(NamedTuple):
    """A file that samples are judged against.

    Attributes:
      path: where it is.
      digest: SHA-256 of the file in hexadecimal.
      mean: (D,) the mean of its features, None where they are to be computed from its images.
      covariance: (D, D) likewise.
      source: which of its arrays are used.
    """

    path: Path
    digest: str
    mean: np.ndarray | None
    covariance: np.ndarray | None
    source: str


def read_reference(path: Path, from_images: bool = False) -> Reference:
    """Reads a file of statistics, or checks the images in one.

    Such files are NPZ, with one of

    - `mu` (D,) and `sigma` (D, D), statistics, as pytorch-fid and EDM write them;
    - `pool_3` (N, D), features, as the statistics of score_sde are;
    - `arr_0` (N, H, W, 3), images of bytes. The reference batches of guided-diffusion have `mu` and `sigma` too.

    Args:
      path: the file.
      from_images: take the images also where there are statistics.

    Returns:
      The statistics, or none where they are to be computed from the images, see `stored_rows`.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file; the message names it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, an NPZ file of statistics is needed")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        mean, covariance, source = _statistics_in(path, from_images)
    except DAMAGES as error:
        needed = "mu and sigma, as EDM and pytorch-fid write them, features pool_3, or images arr_0"
        raise ValueError(f"{path} is no file of statistics: {error}; an NPZ file is needed with {needed}") from error
    return Reference(path, digest, mean, covariance, source)


def _statistics_in(path: Path, from_images: bool) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if {"mu", "sigma"} <= names and not from_images:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return *check_statistics(arrays["mu"], arrays["sigma"]), "mu and sigma"
    if "pool_3" in names and not from_images:
        found: Statistics | None = None
        for features in stored_rows(path, "pool_3", _ROWS):
            found = include(found or no_statistics(features.shape[1]), features)
        assert found is not None
        return found.mean, found.covariance, "pool_3"
    if "arr_0" in names:
        next(stored_rows(path, "arr_0", 1))  # of the right kind
        return None, None, "arr_0"
    raise ValueError(f"it has {', '.join(sorted(names)) or 'nothing'}" + ", but no images arr_0" * from_images)


def stored_rows(path: Path, name: str, batch: int, start: int = 0) -> Iterator[np.ndarray]:
    """The images "arr_0" or the features "pool_3" of an NPZ file, up to `batch` rows at a time, from row `start` on.

    Raises:
      ValueError: the array is not of that kind, or another of DAMAGES.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} has the unknown version {version} of the NPY format")
        shape, fortran_order, dtype = _HEADERS[version](file)
        if name == "arr_0":
            kind, fits = "images (N, H, W, 3) of uint8", dtype == np.uint8 and len(shape) == 4 and shape[3] == 3
        else:
            kind, fits = "features (N, D) of floating-point numbers", dtype.kind == "f" and len(shape) == 2
        if not fits or fortran_order or min(shape) < 1 or shape[0] < 2:
            raise ValueError(f"{name} must be two or more {kind}, it is {shape} of {dtype}")
        size = math.prod(shape[1:]) * dtype.itemsize
        there = archive.getinfo(f"{name}.npy").file_size - file.tell()
        if there != shape[0] * size:
            raise ValueError(f"{name} is {shape} of {dtype} and needs {shape[0] * size} bytes, {there} are there")
        for first in range(0, start, batch):
            file.read(size * min(batch, start - first))
        for first in range(start, shape[0], batch):
            rows = min(batch, shape[0] - first)
            yield np.frombuffer(file.read(size * rows), dtype).reshape(rows, *shape[1:])
