"""A folder of one problem: its settings, its samples, and the figures that have been computed from them.

settings.json                           what the runs were made with
{solver}_{grid}_{calls}_{digest}.npy    the samples of a run, with a digest of the solver's table and rule
converged_{steps}_{digest}.npy          the samples that they should be
figures.jsonl                           figures by a digest of the arrays that they were computed from, one a line

All are written as they are made.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evodiff_jax import __version__
from evodiff_jax.files import named_in_errors, write_atomically
from evodiff_jax.generation import digest_of_arrays

_SETTINGS = "settings.json"
_FIGURES = "figures.jsonl"


def check_store(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes sure that the runs in a problem's folder were made with the same settings, and writes these down.

    A folder of runs without settings is taken as it is if its files have as many samples.

    Args:
      folder: the folder of one problem, which need not be there.
      settings: what determines the runs, as JSON; "samples" among them. The package's version is added.

    Raises:
      ValueError: the folder belongs to other settings.
      OSError: it cannot be read or written.
    """
    settings = {"version": __version__, **settings}
    path = folder / _SETTINGS
    advice = "choose another folder or delete this one"
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): {advice}") from error
        differing = [
            f"{name} {found.get(name)} there, {settings.get(name)} here"
            for name in {**found, **settings}
            if found.get(name) != settings.get(name)
        ]
        if differing:
            raise ValueError(f"{folder} holds runs of other settings ({'; '.join(differing)}): {advice}")
        return
    for file in sorted(folder.glob("*.npy")):
        samples = len(np.load(file, mmap_mode="r"))
        if samples != settings["samples"]:
            raise ValueError(f"{file} holds {samples} samples, not {settings['samples']}: {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))


def path_of(folder: Path, solver: str, grid: str, calls: int, digest: str) -> Path:
    """Where the samples of a run are, in the folder of a problem."""
    return folder / f"{solver}_{grid}_{calls}_{digest}.npy"


def stored(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a file, made and written first if it is not there."""
    if path.exists():
        return np.load(path)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.save(file, made))
    return made


class Figures:
    """Figures that are computed once: what has been written to a problem's folder is found again.

    They are kept by the content of the arrays that they were computed from, so samples that are made anew are judged
    anew; only for another definition of a figure or of the features delete the file.
    """

    def __init__(self, folder: Path, *common: np.ndarray) -> None:
        """Reads the folder's file; `common` are arrays that all figures were computed from."""
        self._path = folder / _FIGURES
        self._common = digest_of_arrays(common)
        self._found: dict[str, list[float]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                self._found.update([json.loads(line)])
            except (ValueError, TypeError):
                continue  # written by a run that was killed in the middle

    def get(self, name: str, arrays: Iterable[np.ndarray], compute: Callable[[], Iterable[float]]) -> list[float]:
        """The figures of that name from these arrays."""
        key = f"{name} {self._common} {digest_of_arrays(arrays)}"
        if key not in self._found:
            self._found[key] = [float(value) for value in compute()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with named_in_errors(self._path), self._path.open("a") as file:
                file.write(f"\n{json.dumps([key, self._found[key]])}")  # the line before may be half a line
        return self._found[key]
