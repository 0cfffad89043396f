"""The fitted plans that come with the package, each a file in the folder `plans`."""

import os
from importlib import resources
from pathlib import Path

from evodiff_jax.files import packaged_or_path

_SUFFIX = ".safetensors"


def available() -> tuple[str, ...]:
    """Returns the names of the packaged plans: the model's name, its guidance where there is some, and the calls."""
    names = [entry.name.removesuffix(_SUFFIX) for entry in _plans().iterdir() if entry.name.endswith(_SUFFIX)]
    return tuple(sorted(names, key=lambda name: (name.rpartition("-")[0], len(name), name)))


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the file of a packaged name, or the given path.

    Raises:
      ValueError: it is neither a packaged name nor, by its looks, a path.
    """
    return packaged_or_path("plan", name_or_path, {name: _plans() / f"{name}{_SUFFIX}" for name in available()})


def _plans() -> Path:
    # The plans are plain files wherever the package is installed by pip; nothing is unpacked.
    return Path(str(resources.files("evodiff_jax.fitting") / "plans"))
