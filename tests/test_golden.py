"""The outputs of the released codes: EVODiff's, and those of the linear solvers."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import GOLDEN, RUNS, SCHEDULES, mixture

import evodiff_jax as ed

pytestmark = pytest.mark.fast

# Where the outputs scarcely change from step to step, zeta and eta are ratios of the squares of tiny differences, and
# outputs computed in float32 do not determine them to 1e-4: see the test of what such outputs alone do.
ILL_CONDITIONED = {"edm/log_snr/25", "vp_linear/time_uniform/25"}
LINEAR = dict(np.load(Path(__file__).parent / "data" / "golden_linear.npz"))
MAX_CALLS = 1 + max(int(run.rsplit("/", 1)[1]) for run in RUNS)


@functools.cache
def evodiff(name, in_float32=False):
    """A sampler of one schedule, compiled once for all of its runs."""

    def denoise(x, t):
        narrow = jnp.float32 if in_float32 else x.dtype
        return mixture(SCHEDULES[name])(x.astype(narrow), t.astype(narrow)).astype(x.dtype)

    return jax.jit(lambda x_T, plan: ed.sample_with_trace(denoise, x_T, plan))


def run_of(run, dtype, in_float32=False):
    """The result with denoise-to-zero, the one without, and zeta and eta of the corrected steps."""
    name, _, steps = run.split("/")
    schedule, steps = SCHEDULES[name], int(steps)
    solver = ed.solvers.evodiff(last_step="released")
    plan = ed.plan(schedule, GOLDEN[f"grid/{run}"], solver, denoise_to_zero=True, max_calls=MAX_CALLS)
    x_T = jnp.asarray(GOLDEN["x_T"] * (80 if name == "edm" else 1), dtype)
    x, trace = evodiff(name, in_float32)(x_T, plan)
    return x, trace.states[steps], {key: trace.rule[key][2:steps] for key in ("zeta", "eta")}


def relative(actual, expected):
    return np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))


def assert_coefficients(coefficients, run, rtol):
    steps = int(run.rsplit("/", 1)[1])
    for name, actual in coefficients.items():
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
    denoised, x, coefficients = run_of(run, jnp.float64)
    assert relative(denoised, GOLDEN[f"{run}/denoise/x"]) < 1e-10
    assert relative(x, GOLDEN[f"{run}/plain/x"]) < 1e-10
    assert_coefficients(coefficients, run, 1e-10)


@pytest.mark.parametrize("run", RUNS)
def test_float32(run):
    denoised, x, coefficients = run_of(run, jnp.float32)
    assert denoised.dtype == jnp.float32
    assert relative(denoised, GOLDEN[f"{run}/denoise/x"]) < 1e-4
    assert relative(x, GOLDEN[f"{run}/plain/x"]) < 1e-4
    if run not in ILL_CONDITIONED:
        assert_coefficients(coefficients, run, 1e-4)


@pytest.mark.parametrize("run", sorted(ILL_CONDITIONED))
def test_float32_coefficients_are_as_good_as_float32_outputs(run, x64):
    """In float64 arithmetic on outputs computed in float32 the coefficients are off just as much."""
    _, _, coefficients = run_of(run, jnp.float64, in_float32=True)
    assert max(relative(values, GOLDEN[f"{run}/{name}"]) for name, values in coefficients.items()) > 1e-5


def test_only_the_last_step_differs_by_default(x64):
    """Of the release the default keeps all but the last step, which is a plain one."""
    run = "edm/karras/8"
    schedule, x_T = SCHEDULES["edm"], jnp.asarray(GOLDEN["x_T"] * 80)
    times = GOLDEN[f"grid/{run}"]
    _, trace = evodiff("edm")(x_T, ed.plan(schedule, times, ed.solvers.evodiff(), max_calls=MAX_CALLS))
    _, released = evodiff("edm")(
        x_T, ed.plan(schedule, times, ed.solvers.evodiff(last_step="released"), max_calls=MAX_CALLS)
    )
    np.testing.assert_array_equal(trace.states[:8], released.states[:8])
    plan = ed.plan(schedule, times, ed.solvers.evodiff())
    now = ed.init(x_T, plan)
    for _ in range(7):
        now = ed.update(now, mixture(schedule)(now.x, now.t), plan)
    m = mixture(schedule)(now.x, now.t)
    expected = m + times[8] / times[7] * (trace.states[7] - m)
    np.testing.assert_allclose(trace.states[8], expected, rtol=1e-10)


@pytest.mark.parametrize("run", RUNS)
def test_grids(run):
    name, grid, steps = run.split("/")
    times = getattr(ed.grids, grid)(SCHEDULES[name], int(steps))
    np.testing.assert_allclose(times, GOLDEN[f"grid/{run}"], rtol=1e-13)


def linear_plan(key):
    """The plan of a golden key, with its release's quirks."""
    schedule, grid, steps, name, order = key.split("/")
    steps, order = int(steps), int(order)
    if name.startswith("dpm_solver"):
        # For VP models the release lowers the order at the end only in runs of fewer than 10 steps.
        solver = getattr(ed.solvers, name)(order, lower_order_final=schedule == "edm" or steps < 10)
    elif name.startswith("unipc"):
        solver = ed.solvers.unipc(order, variant=name.removeprefix("unipc_"))
    else:
        make = {"deis_rhoab": ed.solvers.deis, "heun": lambda _: ed.solvers.heun()}
        solver = make.get(name, getattr(ed.solvers, name, None))(order)
    return ed.plan(SCHEDULES[schedule], GOLDEN[f"grid/{schedule}/{grid}/{steps}"], solver)


def linear_errors(schedule, keys, dtype):
    """Relative errors of the runs, in one compiled call: their plans are stacked."""
    x_T = jnp.asarray(GOLDEN["x_T"] * (80 if schedule == "edm" else 1), dtype)
    run = jax.jit(jax.vmap(lambda plan: ed.sample(mixture(SCHEDULES[schedule]), x_T, plan)))
    results = run(ed.stack([linear_plan(key) for key in keys]))
    return {key: relative(x, LINEAR[key]) for key, x in zip(keys, results, strict=True)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_linear_golden_to_1e_10(schedule, x64):
    errors = linear_errors(schedule, [key for key in LINEAR if key.startswith(schedule)], jnp.float64)
    assert not {key: error for key, error in errors.items() if not error < 1e-10}


def test_linear_goldens_in_float32():
    errors = linear_errors("edm", [key for key in LINEAR if key.startswith("edm/karras/8/")], jnp.float32)
    assert not {key: error for key, error in errors.items() if not error < 1e-4}


def test_there_are_linear_goldens_of_every_family():
    assert len(LINEAR) == 532
    names = {key.split("/")[3] for key in LINEAR}
    assert names == {
        *("dpm_solver", "dpm_solver_pp", "unipc_bh1", "unipc_bh2", "ipndm", "ipndm_v", "deis_rhoab", "heun")
    }
