"""Solvers: functions that return a `Solver` for `sample`, one family a module."""

from collections.abc import Callable

from evodiff_jax.solvers._evodiff import evodiff, evodiff_reference
from evodiff_jax.solvers._multistep import ddim
from evodiff_jax.tables import Solver

# Every deterministic solver by name, in its default form: what the command line offers and the general tests run over.
SOLVERS: dict[str, Callable[[], Solver]] = {
    "evodiff": evodiff,
    "evodiff_reference": evodiff_reference,
    "ddim": ddim,
}

__all__ = ["SOLVERS", "Solver", "ddim", "evodiff", "evodiff_reference"]
