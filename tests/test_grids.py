"""Time grids: ends, spacing, errors."""

import numpy as np
import pytest
from exact_models import SCHEDULES

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS

grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@grids
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_grid_runs_exactly_from_t_max_to_t_min(grid, schedule, steps):
    times = grid(schedule, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == np.float64
    assert (times[0], times[-1]) == (schedule.t_max, schedule.t_min)
    assert np.all(np.diff(times) < 0)


def test_spacings():
    edm, vp = SCHEDULES["edm"], SCHEDULES["vp_linear"]
    np.testing.assert_allclose(np.diff(edm.lambda_(ed.grids.log_snr(edm, 9))), np.log(80 / 0.002) / 9, rtol=1e-12)
    i = np.arange(10)
    published = (80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(ed.grids.karras(edm, 9), published, rtol=1e-13)
    np.testing.assert_allclose(np.diff(ed.grids.time_uniform(vp, 9)), -0.999 / 9)
    np.testing.assert_allclose(np.diff(np.sqrt(ed.grids.time_quadratic(vp, 9))), (np.sqrt(1e-3) - 1) / 9)


def test_karras_tends_to_log_snr_as_rho_grows():
    edm = SCHEDULES["edm"]
    np.testing.assert_allclose(ed.grids.karras(edm, 9, rho=1e6), ed.grids.log_snr(edm, 9), rtol=1e-4)


@grids
@pytest.mark.parametrize("steps", [0, -3, 2.0, "5", True, None])
def test_bad_step_counts(grid, steps):
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1"):
        grid(SCHEDULES["edm"], steps)


@pytest.mark.parametrize("grid", [ed.grids.log_snr, ed.grids.karras])
def test_grids_in_the_log_snr_need_it_finite(grid):
    with pytest.raises(ValueError, match="finite log-SNR"):
        grid(ed.schedules.edm(0.0, 80.0), 5)


def test_karras_needs_a_positive_rho():
    with pytest.raises(ValueError, match="rho > 0"):
        ed.grids.karras(SCHEDULES["edm"], 5, rho=0.0)
