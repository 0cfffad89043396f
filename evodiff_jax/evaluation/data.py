"""Fashion-MNIST from its standard IDX files.

60,000 training and 10,000 test images of clothes, 28 x 28 pixels, ten classes (Xiao et al. 2017, arXiv 1708.07747).
The files are read where they are, compressed or not; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""The names of labels 0 .. 9."""

DATA_VARIABLE = "EVODIFF_JAX_DATA"
"""Environment variable that names the folder of the IDX files."""

_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_SPLITS = {"train": "train", "test": "t10k"}


class Dataset(NamedTuple):
    """Labelled images on the host.

    Attributes:
      images: float32 (N, 28, 28, 1) in [-1, 1].
      labels: int32 (N,) in 0 .. 9.
    """

    images: np.ndarray
    labels: np.ndarray


def load_fashion_mnist(split: str = "train", folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads one split of Fashion-MNIST.

    Args:
      split: "train" or "test".
      folder: where the IDX files are. Without it, the folder named by the environment variable
        EVODIFF_JAX_DATA if set, otherwise the one of the Debian package dataset-fashion-mnist.

    Returns:
      The images and their labels.

    Raises:
      FileNotFoundError: a file is missing; the message says which, where it was looked for, how to get it.
      ValueError: `split` is unknown, or a file is not what its name says.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    where = Path(folder or os.environ.get(DATA_VARIABLE) or _SYSTEM_FOLDER)
    images_path = _find(where, f"{_SPLITS[split]}-images-idx3-ubyte")
    labels_path = _find(where, f"{_SPLITS[split]}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path} should hold 28 x 28 images, its header says {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{images_path} holds {images.shape[0]} images but {labels_path} holds labels of shape {labels.shape}"
        )
    if labels.size and labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{labels_path} holds label {labels.max()}, expected 0 .. {len(CLASS_NAMES) - 1}")
    return Dataset(images.astype(np.float32)[..., None] / 127.5 - 1.0, labels.astype(np.int32))


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzip-compressed or not.

    The format: two zero bytes, a type code (8 for unsigned bytes), the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values.

    Args:
      path: the file; it counts as compressed if it starts as gzip files do.

    Returns:
      uint8 array of the shape that the header states.

    Raises:
      ValueError: the file is not IDX, holds another type, or is shorter or longer than its header says.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}); copy or download it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[3] == 0:
        raise ValueError(f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}")
    if content[2] != 8:
        raise ValueError(f"{path} holds IDX type {content[2]:#04x}, expected 0x08 (unsigned bytes)")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path} is truncated inside its header; copy or download it again")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + int(np.prod(shape, dtype=np.uint64))
    if len(content) != expected:
        raise ValueError(
            f"{path} holds {len(content)} bytes, its header {shape} needs {expected}; copy or download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    """Returns the path of `name` or `name.gz` in `folder`, whichever exists."""
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{name}[.gz] is not in {folder}: install the Debian package dataset-fashion-mnist, or get the four files "
        f"from https://github.com/zalandoresearch/fashion-mnist, put them in a folder DIR and pass --data DIR "
        f"(or set {DATA_VARIABLE}=DIR)"
    )
