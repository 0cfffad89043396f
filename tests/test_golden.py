"""The outputs of the released codes: EVODiff's, and those of the linear solvers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import GOLDEN, RUNS, SCHEDULES, mixture

import evodiff_jax as ed

# Where the outputs scarcely change from step to step, zeta and eta are ratios of the squares of tiny differences, and
# outputs rounded to float32 do not determine them to 1e-4: see the test of what rounding the outputs alone does.
ILL_CONDITIONED = {"edm/log_snr/25", "vp_linear/time_uniform/25"}


LINEAR = dict(np.load(Path(__file__).parent / "data" / "golden_linear.npz"))


def run_of(run, dtype):
    name = run.split("/")[0]
    schedule = SCHEDULES[name]
    x_T = jnp.asarray(GOLDEN["x_T"] * (80 if name == "edm" else 1), dtype)
    solver = ed.solvers.evodiff_reference()
    times = GOLDEN[f"grid/{run}"]
    return jax.jit(lambda x: ed.sample_with_trace(mixture(schedule), x, times, schedule, solver, denoise_to_zero=True))(
        x_T
    )


def relative(actual, expected):
    return np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))


def assert_coefficients(trace, run, rtol):
    steps = int(run.rsplit("/", 1)[1])
    for name, actual in (("zeta", trace.zeta), ("eta", trace.eta)):
        assert actual.shape == (steps - 2, *GOLDEN["x_T"].shape[::3])
        if steps > 2:
            np.testing.assert_allclose(actual, GOLDEN[f"{run}/{name}"], rtol=rtol)


def test_there_are_goldens_for_both_schedules_and_all_grids():
    edm, vp_linear = ("log_snr", "karras"), ("log_snr", "karras", "time_uniform")
    grids = {f"edm/{grid}" for grid in edm} | {f"vp_linear/{grid}" for grid in vp_linear}
    assert {run.rsplit("/", 1)[0] for run in RUNS} == grids
    assert len(RUNS) == 35


@pytest.mark.parametrize("run", RUNS)
def test_float64(run, x64):
    denoised, trace = run_of(run, jnp.float64)
    assert relative(denoised, GOLDEN[f"{run}/denoise/x"]) < 1e-10
    assert relative(trace.states[-1], GOLDEN[f"{run}/plain/x"]) < 1e-10
    assert_coefficients(trace, run, 1e-10)


@pytest.mark.parametrize("run", RUNS)
def test_float32(run):
    denoised, trace = run_of(run, jnp.float32)
    assert denoised.dtype == jnp.float32
    assert relative(denoised, GOLDEN[f"{run}/denoise/x"]) < 1e-4
    assert relative(trace.states[-1], GOLDEN[f"{run}/plain/x"]) < 1e-4
    if run not in ILL_CONDITIONED:
        assert_coefficients(trace, run, 1e-4)


@pytest.mark.parametrize("run", sorted(ILL_CONDITIONED))
def test_float32_coefficients_are_as_good_as_float32_outputs(run, x64):
    """In float64 arithmetic on outputs rounded to float32 the coefficients are off just as much."""
    schedule = SCHEDULES[run.split("/")[0]]
    exact = mixture(schedule)

    def rounded(x, t):
        return exact(x, t).astype(jnp.float32).astype(jnp.float64)

    x_T = jnp.asarray(GOLDEN["x_T"] * schedule.sigma(schedule.t_max))
    times = GOLDEN[f"grid/{run}"]
    _, trace = jax.jit(lambda x: ed.sample_with_trace(rounded, x, times, schedule, ed.solvers.evodiff_reference()))(x_T)
    worst = max(relative(trace.coefficients[name], GOLDEN[f"{run}/{name}"]) for name in ("zeta", "eta"))
    assert worst > 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_grids(run):
    name, grid, steps = run.split("/")
    times = getattr(ed.grids, grid)(SCHEDULES[name], int(steps))
    np.testing.assert_allclose(times, GOLDEN[f"grid/{run}"], rtol=1e-13)


def linear_solver(name, order, schedule, steps):
    """The solver of a golden key, with its release's quirks."""
    if name.startswith("dpm_solver"):
        # For VP models the release lowers the order at the end only in runs of fewer than 10 steps.
        return getattr(ed.solvers, name)(order, lower_order_final=schedule == "edm" or steps < 10)
    if name.startswith("unipc"):
        return ed.solvers.unipc(order, variant=name.removeprefix("unipc_"))
    return {"deis_rhoab": ed.solvers.deis, "heun": lambda _: ed.solvers.heun()}.get(
        name, getattr(ed.solvers, name, None)
    )(order)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_linear_golden_to_1e_10(schedule, x64):
    """All runs of a schedule in one compiled call: their tables are stacked."""
    keys = [key for key in LINEAR if key.startswith(schedule)]
    plans = []
    for key in keys:
        _, grid, steps, name, order = key.split("/")
        solver = linear_solver(name, int(order), schedule, int(steps))
        plans.append(ed.plan(SCHEDULES[schedule], GOLDEN[f"grid/{schedule}/{grid}/{steps}"], solver))
    x_T = jnp.asarray(GOLDEN["x_T"] * (80 if schedule == "edm" else 1))
    run = jax.jit(jax.vmap(lambda plan: ed.sample_plan(mixture(SCHEDULES[schedule]), x_T, plan)))
    errors = {key: relative(x, LINEAR[key]) for key, x in zip(keys, run(ed.plans.stack(plans)), strict=True)}
    assert not {key: error for key, error in errors.items() if not error < 1e-10}


def test_there_are_linear_goldens_of_every_family():
    assert len(LINEAR) == 532
    names = {key.split("/")[3] for key in LINEAR}
    assert names == {
        *("dpm_solver", "dpm_solver_pp", "unipc_bh1", "unipc_bh2", "ipndm", "ipndm_v", "deis_rhoab", "heun")
    }


@pytest.mark.parametrize("key", [key for key in LINEAR if key.startswith("edm/karras/8/") and key[-1] in "24"])
def test_linear_goldens_by_sample_in_float32(key):
    _, _, steps, name, order = key.split("/")
    x_T = jnp.asarray(GOLDEN["x_T"] * 80, jnp.float32)
    solver = linear_solver(name, int(order), "edm", int(steps))
    times = GOLDEN["grid/edm/karras/8"]
    x = jax.jit(lambda x: ed.sample(mixture(SCHEDULES["edm"]), x, times, SCHEDULES["edm"], solver))(x_T)
    assert relative(x, LINEAR[key]) < 1e-4
