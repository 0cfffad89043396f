"""The exact reproduction against the outputs of the released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import GOLDEN, RUNS, SCHEDULES, mixture

import evodiff_jax as ed

# Where the outputs scarcely change from step to step, zeta and eta are ratios of the squares of tiny differences, and
# outputs rounded to float32 do not determine them to 1e-4: see the test of what rounding the outputs alone does.
ILL_CONDITIONED = {"edm/log_snr/25", "vp_linear/time_uniform/25"}


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
