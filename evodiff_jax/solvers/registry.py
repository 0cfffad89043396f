"""The forms of the solvers that people use, by name, with what is known of each.

The command line, comparisons, the documentation's table and the general tests run over this registry: a new solver is
its own file and a line here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from evodiff_jax.solvers._adams import deis, ipndm, ipndm_v
from evodiff_jax.solvers._ddim import ddim, euler_ancestral
from evodiff_jax.solvers._dpm_solver import dpm_solver, dpm_solver_pp, sde_dpm_solver_pp
from evodiff_jax.solvers._edm import dpm_2, heun
from evodiff_jax.solvers._evodiff import evodiff
from evodiff_jax.solvers._sa_solver import sa_solver
from evodiff_jax.solvers._unipc import unipc
from evodiff_jax.solvers._variance_optimal import variance_optimal
from evodiff_jax.tables import Solver


class Form(NamedTuple):
    """A solver with its options.

    Attributes:
      make: make() -> the solver.
      order: its order of convergence on grids whose steps change smoothly; None for a stochastic solver.
      calls: model calls a step; a last step to sigma = 0 takes 1.
      stochastic: whether it adds noise, and so needs a key.
      corrects: whether it corrects a step once the model has been called at its end, without a call more.
    """

    make: Callable[[], Solver]
    order: int | None
    calls: int = 1
    stochastic: bool = False
    corrects: bool = False


def _ordered(make: Callable[[int], Solver], order: int) -> Callable[[], Solver]:
    return functools.partial(make, order)


FORMS: dict[str, Form] = {
    "variance_optimal": Form(variance_optimal, 2, corrects=True),
    "evodiff": Form(evodiff, 1, corrects=True),
    "ddim": Form(ddim, 1),
    "heun": Form(heun, 2, calls=2),
    "dpm_2": Form(dpm_2, 2, calls=2),
    "dpm_solver-2": Form(_ordered(dpm_solver, 2), 2),
    "dpm_solver-3": Form(_ordered(dpm_solver, 3), 2),
    "dpm_solver_pp-2": Form(_ordered(dpm_solver_pp, 2), 2),
    "dpm_solver_pp-3": Form(_ordered(dpm_solver_pp, 3), 2),
    "unipc-2": Form(_ordered(unipc, 2), 3, corrects=True),
    "unipc-3": Form(_ordered(unipc, 3), 4, corrects=True),
    "deis-2": Form(_ordered(deis, 2), 3),
    "deis-3": Form(_ordered(deis, 3), 4),
    "ipndm-2": Form(_ordered(ipndm, 2), 2),
    "ipndm-3": Form(_ordered(ipndm, 3), 2),
    "ipndm-4": Form(_ordered(ipndm, 4), 2),
    "ipndm_v-2": Form(_ordered(ipndm_v, 2), 2),
    "ipndm_v-4": Form(_ordered(ipndm_v, 4), 3),
    "euler_ancestral": Form(euler_ancestral, None, stochastic=True),
    "sde_dpm_solver_pp-2": Form(_ordered(sde_dpm_solver_pp, 2), None, stochastic=True),
    "sa_solver": Form(sa_solver, None, stochastic=True, corrects=True),
}
"""The forms of solvers that people use, by name: what the command line offers and the general tests run over."""
