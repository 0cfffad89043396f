"""Observed orders of convergence, against the probability-flow ODE solved by an adaptive eighth-order method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import mixture
from scipy.integrate import solve_ivp

import evodiff_jax as ed

s = ed.solvers

CENTERS, STD = np.array([[1.0, 0.3], [-0.7, 0.8], [0.2, -1.1]]), 0.8
# At both ends the data prediction hardly changes with the noise level, so that the first steps, which have few outputs,
# and the last ones, whose order is lowered, don't hide a solver's order.
SCHEDULE = ed.schedules.edm(1e-3, 1e3)
STEPS = (160, 320, 640, 1280)

# The forms that the registry has not, with their orders on grids whose steps change smoothly; FORMS says its own.
VARIANTS = {
    "dpm_solver(1)": (s.dpm_solver(1), 1),
    "dpm_solver(3, exact_curvature=True)": (s.dpm_solver(3, exact_curvature=True), 3),
    "dpm_solver(2, 'singlestep')": (s.dpm_solver(2, "singlestep"), 2),
    "dpm_solver(3, 'singlestep')": (s.dpm_solver(3, "singlestep"), 3),
    "dpm_solver_pp(1)": (s.dpm_solver_pp(1), 1),
    "dpm_solver_pp(3, exact_curvature=True)": (s.dpm_solver_pp(3, exact_curvature=True), 3),
    "dpm_solver_pp(2, 'singlestep')": (s.dpm_solver_pp(2, "singlestep"), 2),
    "dpm_solver_pp(3, 'singlestep')": (s.dpm_solver_pp(3, "singlestep"), 3),
    "dpm_solver_pp(2, variant='heun')": (s.dpm_solver_pp(2, variant="heun"), 2),
    **{
        f"{make.__name__}({order}, 'singlestep', variant='heun')": (make(order, "singlestep", variant="heun"), order)
        for make in (s.dpm_solver, s.dpm_solver_pp)
        for order in (2, 3)
    },
    **{
        f"unipc({order}, {variant!r}, {prediction!r})": (s.unipc(order, variant, prediction), order + 1)
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for prediction in ("data", "epsilon")
        if s.unipc(order, variant, prediction) not in (s.unipc(2), s.unipc(3))
    },
    "deis(1)": (s.deis(1), 2),
    **{f"deis({order}, {v!r})": (s.deis(order, v), order + 1) for order in (1, 2, 3) for v in ("t-AB", "log-rho-AB")},
    "ipndm(1)": (s.ipndm(1), 1),
    **{f"ipndm_v({order})": (s.ipndm_v(order), order) for order in (1, 3)},
    "sa_solver(2, 2, tau=0, variant='few_steps')": (s.sa_solver(2, 2, 0.0, variant="few_steps"), 2),
    "sa_solver(2, 0, tau=0)": (s.sa_solver(2, 0, 0.0), 2),
    "sa_solver(3, 0, tau=0)": (s.sa_solver(3, 0, 0.0), 3),
    "sa_solver(1, 2, tau=0)": (s.sa_solver(1, 2, 0.0), 2),
    "sa_solver(2, 3, tau=0)": (s.sa_solver(2, 3, 0.0), 3),
    "sa_solver(3, 4, tau=0)": (s.sa_solver(3, 4, 0.0), 4),
}
DETERMINISTIC = {name: (form.make(), form.order) for name, form in s.FORMS.items() if not form.stochastic}
NOMINAL = {name: entry for name, entry in (DETERMINISTIC | VARIANTS).items() if entry[0].rule is None}
RULED = {name: entry for name, entry in DETERMINISTIC.items() if entry[0].rule is not None}


def initial_state(schedule):
    return jnp.asarray(schedule.sigma(schedule.t_max) * np.random.default_rng(0).normal(size=(16, 2)))


def exact(schedule, x_T):
    """The solution of d(x / alpha) / dlog(kappa) = x / alpha - m, kappa = sigma / alpha, by SciPy's DOP853."""
    denoise = jax.jit(mixture(schedule, CENTERS, STD))
    (alpha_0, alpha_1), _, (lambda_0, lambda_1) = schedule.levels(np.array([schedule.t_max, schedule.t_min]))

    def derivative(log_kappa, u):
        u, t = u.reshape(x_T.shape), schedule.time(np.float64(-log_kappa))
        return np.asarray(u - denoise(schedule.alpha(t) * u, t)).ravel()

    start = np.asarray(x_T).ravel() / alpha_0
    solution = solve_ivp(derivative, (-lambda_0, -lambda_1), start, method="DOP853", rtol=1e-12, atol=1e-13)
    return alpha_1 * solution.y[:, -1].reshape(x_T.shape)


def errors(solvers, schedule, grid, steps):
    """(solvers, steps) root mean square errors; all runs in one compiled call, so of solvers without a rule."""
    x_T = initial_state(schedule)
    denoise = mixture(schedule, CENTERS, STD)
    plans = [ed.plan(schedule, grid(schedule, n), solver) for solver in solvers for n in steps]
    x = jax.jit(jax.vmap(lambda plan: ed.sample(denoise, x_T, plan)))(ed.stack(plans))
    error = np.sqrt(np.mean((x - exact(schedule, x_T)) ** 2, axis=(1, 2)))
    return error.reshape(len(solvers), len(steps))


def show(capsys, title, rows):
    with capsys.disabled():
        print(f"\n{title}: nominal order, observed orders, errors")
        for name, nominal, error in rows:
            observed = " ".join(f"{order:.2f}" for order in np.log2(error[:-1] / error[1:]))
            print(f"  {name:40s} {nominal}  {observed}  {' '.join(f'{e:.1e}' for e in error)}")


def test_every_deterministic_solver_has_its_nominal_order(x64, capsys):
    found = errors([solver for solver, _ in NOMINAL.values()], SCHEDULE, ed.grids.log_snr, STEPS)
    rows = [(name, order, error) for (name, (_, order)), error in zip(NOMINAL.items(), found, strict=True)]
    show(capsys, f"log-SNR grid, {STEPS} steps", rows)
    for name, order, error in rows:
        assert np.log2(error[-2] / error[-1]) == pytest.approx(order, abs=0.25), name


def test_ipndm_has_its_order_on_equal_steps(x64, capsys):
    schedule, steps = ed.schedules.edm(1e-3, 40.0), (800, 1600, 3200)
    nominal = {f"{f.__name__}({order})": (f(order), order) for f in (s.ipndm, s.ipndm_v) for order in (1, 2, 3, 4)}
    for start in ("heun", "runge-kutta"):
        nominal |= {f"ipndm({order}, start={start!r})": (s.ipndm(order, start=start), order) for order in (2, 3, 4)}
    found = errors([solver for solver, _ in nominal.values()], schedule, ed.grids.time_uniform, steps)
    rows = [(name, order, error) for (name, (_, order)), error in zip(nominal.items(), found, strict=True)]
    show(capsys, f"equal steps, {steps} steps", rows)
    for name, order, error in rows:
        assert np.log2(error[-2] / error[-1]) == pytest.approx(order, abs=0.25), name


def test_deis_in_time_has_its_order_where_time_is_not_kappa(x64, capsys):
    schedule, steps = ed.schedules.vp_linear(t_min=1e-4), (80, 160, 320)
    found = errors([s.deis(order, "t-AB") for order in (1, 2, 3)], schedule, ed.grids.log_snr, steps)
    rows = [(f"deis({order}, 't-AB')", order + 1, error) for order, error in zip((1, 2, 3), found, strict=True)]
    show(capsys, f"vp_linear, log-SNR grid, {steps} steps", rows)
    for name, order, error in rows:
        assert np.log2(error[-2] / error[-1]) == pytest.approx(order, abs=0.25), name


def ruled_errors(solver, steps, schedule=SCHEDULE):
    """Root mean square errors on the log-SNR grid, in one program for all numbers of steps."""
    x_T, denoise = initial_state(schedule), mixture(schedule, CENTERS, STD)
    run = jax.jit(lambda plan: ed.sample(denoise, x_T, plan))
    runs = [run(ed.plan(schedule, ed.grids.log_snr(schedule, n), solver, max_calls=max(steps))) for n in steps]
    return np.sqrt([np.mean((x - exact(schedule, x_T)) ** 2) for x in runs])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "variance_optimal" else ()) for name in RULED]
)
def test_rules_have_their_nominal_order(name, x64, capsys):
    """Errors of adaptive coefficients fall unevenly: the slope of a line through several, and over many steps."""
    solver, order = RULED[name]
    steps = (320, 640, 1280, 2560, 5120)
    error = ruled_errors(solver, steps)
    show(capsys, f"log-SNR grid, {steps} steps", [(name, order, error)])
    slope = -np.polyfit(np.log(steps), np.log(error), 1)[0]
    assert slope == pytest.approx(order, abs=0.25)


def test_the_released_last_step_of_evodiff_keeps_it_from_converging(x64):
    """It shrinks the sample by 1 - sqrt(sigma_t sigma_0), here by a tenth, whatever the number of steps."""
    schedule, steps = ed.schedules.edm(0.1, 1e3), (160, 640)
    released, plain = (ruled_errors(s.evodiff(last_step=last), steps, schedule) for last in ("released", "ddim"))
    assert released[1] > 0.8 * released[0]
    assert plain[1] < min(plain[0] / 2, released[1] / 10)
