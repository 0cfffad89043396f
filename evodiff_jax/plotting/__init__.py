"""Figures of images, runs, solvers and diagnoses; needs `evodiff-jax[plots]`.

Every function returns a matplotlib figure, shown by a notebook where it is the last expression of a cell and written by
`figure.savefig(path)`. None uses or changes pyplot.
"""

from evodiff_jax.plotting._calls import against_calls
from evodiff_jax.plotting._diagnoses import diagnoses
from evodiff_jax.plotting._film import film
from evodiff_jax.plotting._images import images

__all__ = ["against_calls", "diagnoses", "film", "images"]
