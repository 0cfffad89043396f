"""Solvers: functions that return a `Solver` for `sample`, one family a module."""

from evodiff_jax.solvers._evodiff import evodiff, evodiff_reference
from evodiff_jax.solvers._multistep import ddim
from evodiff_jax.tables import Solver

__all__ = ["Solver", "ddim", "evodiff", "evodiff_reference"]
