"""Solvers: functions that return a `Solver` for `plan`, one family a module; `FORMS` lists those that people use."""

from evodiff_jax.solvers._adams import deis, ipndm, ipndm_v
from evodiff_jax.solvers._ddim import ddim, euler, euler_ancestral
from evodiff_jax.solvers._dpm_solver import dpm_solver, dpm_solver_pp, sde_dpm_solver_pp
from evodiff_jax.solvers._dpm_solver_v3 import dpm_solver_v3
from evodiff_jax.solvers._edm import dpm_2, heun
from evodiff_jax.solvers._evodiff import evodiff
from evodiff_jax.solvers._sa_solver import sa_solver
from evodiff_jax.solvers._unipc import unipc
from evodiff_jax.solvers._variance_optimal import variance_optimal
from evodiff_jax.solvers.registry import FORMS, Form
from evodiff_jax.tables import Solver

__all__ = [
    "FORMS",
    "Form",
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
    "heun",
    "ipndm",
    "ipndm_v",
    "sa_solver",
    "sde_dpm_solver_pp",
    "unipc",
    "variance_optimal",
]
