"""Every solver passes `check_solver` with its order of convergence, which is printed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_solvers import ORDERED, STOCHASTIC

import evodiff_jax as ed
from evodiff_jax.testing import bimodal, check_rule, check_solver

s = ed.solvers

# The registry's solvers, and all others.
FORMS = {name: (form.make(), form.order) for name, form in s.FORMS.items() if not form.stochastic}
OTHERS = {name: entry for name, entry in ORDERED.items() if entry not in FORMS.values()}
RULED = {name: entry for name, entry in FORMS.items() if entry[0].rule is not None}
SOLVERS = {name: entry for name, entry in (FORMS | OTHERS | STOCHASTIC).items() if name not in RULED}


def show(capsys, name, nominal, report):
    with capsys.disabled():
        errors = " ".join(f"{error:.1e}" for error in report.errors.values())
        print(f"  {name:32s} order {nominal}, observed {report.order:.2f}, errors {errors}")


SLOW = [*RULED, *OTHERS, *(name for name in STOCHASTIC if name not in ("ddim 1", "sde_dpm_solver_pp 2", "sa_solver"))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in (SOLVERS | RULED)]
)
def test_every_solver_passes_with_its_order(name, capsys):
    solver, order = (SOLVERS | RULED)[name]
    report = check_solver(solver, order=order)
    show(capsys, name, order, report)
    assert report.stochastic == (name in STOCHASTIC)
    assert report.traced_times
    assert report.picklable == (name != "sa_solver of tau of t")  # of a lambda


EQUAL_STEPS = {
    **{f"{f.__name__} {order}": (f(order), order) for f in (s.ipndm, s.ipndm_v) for order in (1, 2, 3, 4)},
    **{f"ipndm {o} from {start}": (s.ipndm(o, start=start), o) for start in ("heun", "runge-kutta") for o in (2, 3, 4)},
}
IN_TIME = {f"deis {order} t-AB": (s.deis(order, "t-AB"), order + 1) for order in (1, 2, 3)}


@pytest.mark.parametrize(
    ("solvers", "schedule", "grid", "steps"),
    [
        (OTHERS, ed.schedules.edm(1e-3, 1e3), ed.grids.log_snr, (480, 960)),
        (EQUAL_STEPS, ed.schedules.edm(1e-3, 40.0), ed.grids.time_uniform, (1600, 3200)),
        (IN_TIME, ed.schedules.vp_linear(t_min=1e-4), ed.grids.log_snr, (160, 320)),
    ],
    ids=["all other forms", "ipndm on equal steps", "deis where time is not kappa"],
)
def test_orders_of_many_solvers_at_once(solvers, schedule, grid, steps, x64):
    """All runs in one compiled call."""
    model = bimodal(schedule, 1.0, 0.8)
    x_T = jnp.asarray(schedule.sigma(schedule.t_max) * np.random.default_rng(0).normal(size=(8, 8)))
    plans = [ed.plan(schedule, grid(schedule, n), solver) for solver, _ in solvers.values() for n in steps]
    x = jax.jit(jax.vmap(lambda plan: ed.sample(model.denoise, x_T, plan)))(ed.stack(plans))
    exact = model.solve(x_T, schedule.t_max, schedule.t_min)
    errors = np.sqrt(np.mean((x - exact) ** 2, axis=(1, 2))).reshape(-1, 2)
    observed = np.log2(errors[:, 0] / errors[:, 1])
    np.testing.assert_allclose(observed, [order for _, order in solvers.values()], atol=0.25)


@pytest.mark.slow
def test_the_released_last_step_of_evodiff_keeps_it_from_converging():
    """It shrinks the sample by 1 - sqrt(sigma_t sigma_0), here by a tenth, whatever the number of steps."""
    schedule, released = ed.schedules.edm(0.1, 1e3), s.evodiff(last_step="released")
    assert check_solver(s.evodiff(), order=1, schedule=schedule)
    assert check_solver(released, order=0, schedule=schedule).errors[1280] > 0.02
    assert check_rule(released)
