"""Solvers: functions that return a `Solver` for `sample`, one family a module."""

from collections.abc import Callable

from evodiff_jax.solvers._adams import deis, ipndm, ipndm_v
from evodiff_jax.solvers._ddim import ddim, euler, euler_ancestral
from evodiff_jax.solvers._dpm_solver import dpm_solver, dpm_solver_pp, sde_dpm_solver_pp
from evodiff_jax.solvers._dpm_solver_v3 import dpm_solver_v3
from evodiff_jax.solvers._edm import dpm_2, heun
from evodiff_jax.solvers._evodiff import evodiff
from evodiff_jax.solvers._evodiff_reference import evodiff_reference
from evodiff_jax.solvers._sa_solver import sa_solver
from evodiff_jax.solvers._unipc import unipc
from evodiff_jax.tables import Solver

# Every deterministic solver by name, in its default form: what the command line offers and the general tests run over.
SOLVERS: dict[str, Callable[[], Solver]] = {
    "evodiff": evodiff,
    "evodiff_reference": evodiff_reference,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
    "ipndm_v": ipndm_v,
    "heun": heun,
    "dpm_2": dpm_2,
}

__all__ = [
    "SOLVERS",
    "Solver",
    "ddim",
    "deis",
    "dpm_2",
    "dpm_solver",
    "dpm_solver_pp",
    "dpm_solver_v3",
    "euler",
    "euler_ancestral",
    "evodiff",
    "evodiff_reference",
    "heun",
    "ipndm",
    "ipndm_v",
    "sa_solver",
    "sde_dpm_solver_pp",
    "unipc",
]
