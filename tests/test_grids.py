"""Time grids: ends, spacing, errors."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from exact_models import SCHEDULES

import evodiff_jax as ed
from evodiff_jax.grids import GRIDS

pytestmark = pytest.mark.fast

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


DISCRETE = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
TO_ZERO = ed.schedules.discrete(ed.schedules.scaled_linear_betas(), t_min=-1)


def test_spacings_of_k_diffusion():
    edm, i = SCHEDULES["edm"], np.arange(10)
    ramp = 1 - i / 9
    np.testing.assert_allclose(ed.grids.exponential(edm, 9), 0.002 * (80 / 0.002) ** ramp, rtol=1e-12)
    published = np.exp(ramp**2 * (np.log(80) - np.log(0.002)) + np.log(0.002))
    np.testing.assert_allclose(ed.grids.polyexponential(edm, 9, rho=2.0), published, rtol=1e-12)


def test_the_beta_grid_has_the_quantiles_of_its_distribution():
    flow = ed.schedules.flow(t_min=0.0, t_max=1.0)
    quantiles = scipy.stats.beta.ppf(1 - np.arange(10) / 9, 0.6, 0.6)
    np.testing.assert_allclose(ed.grids.beta(flow, 9), quantiles, rtol=1e-9)
    quantiles = scipy.stats.beta.ppf(1 - np.arange(10) / 9, 0.6, 1.4)  # of two parameters that are not the same
    np.testing.assert_allclose(ed.grids.beta(flow, 9, 0.6, 1.4), quantiles, rtol=1e-9)
    np.testing.assert_allclose(ed.grids.beta(flow, 9, 1.0, 1.0), ed.grids.time_uniform(flow, 9), atol=1e-12)


def test_sgm_uniform_leaves_the_lowest_level_out_before_sigma_0():
    published = np.append(np.linspace(999, 0, 11)[:-1], -1)
    np.testing.assert_allclose(ed.grids.sgm_uniform(TO_ZERO, 10), published)
    vp = SCHEDULES["vp_linear"]
    np.testing.assert_array_equal(ed.grids.sgm_uniform(vp, 10), ed.grids.time_uniform(vp, 10))


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 80, 333])
def test_leading_and_trailing_timesteps_are_the_published_ones(steps):
    ratio = 1000 // steps
    leading = (np.arange(steps) * ratio)[::-1]
    np.testing.assert_array_equal(ed.grids.leading(TO_ZERO, steps, start=999), [*leading, -1])
    np.testing.assert_array_equal(ed.grids.leading(DISCRETE, steps, offset=1, start=999), [*(leading + 1), 0])
    trailing = np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
    np.testing.assert_array_equal(ed.grids.trailing(TO_ZERO, steps), [*trailing, -1])
    assert ed.grids.trailing(DISCRETE, 10)[0] == 999


def test_trailing_timesteps_are_rounded_exactly():
    """Halves to the even neighbour; in floating point 1000 - 49 * 12.5 and the like may fall on either side."""
    assert ed.grids.trailing(DISCRETE, 80)[49] == 387
    for steps in (16, 48, 80, 96, 160, 480, 600, 800, 999):
        exact = [round(Fraction(1000 * (steps - i), steps)) - 1 for i in range(steps)]
        np.testing.assert_array_equal(ed.grids.trailing(TO_ZERO, steps), [*exact, -1])


@pytest.mark.parametrize(("steps", "first", "alpha"), [(600, 599, "0.4"), (1, 0, "1"), (7, 852, "0.15")])
def test_leading_timesteps_that_begin_far_from_pure_noise_need_a_start(steps, first, alpha):
    message = f"noise of t_max = 999, but the first of {steps} leading timesteps is {first}, where alpha is {alpha}:"
    with pytest.raises(ValueError, match=message):
        ed.grids.leading(TO_ZERO, steps)
    assert ed.grids.leading(TO_ZERO, steps, start=999)[0] == first


def test_leading_and_trailing_run_over_a_part():
    np.testing.assert_array_equal(ed.grids.trailing(DISCRETE, 10, start=450), [399, 299, 199, 99, 0])
    np.testing.assert_array_equal(ed.grids.leading(DISCRETE, 10, 1, start=450, end=50), [401, 301, 201, 101, 50])
    # Ends that are timesteps themselves, each of which stands in the grid once.
    np.testing.assert_array_equal(ed.grids.trailing(DISCRETE, 10, start=399, end=199), [399, 299, 199])
    np.testing.assert_array_equal(ed.grids.leading(DISCRETE, 10, 1, start=401, end=201), [401, 301, 201])


def test_leading_without_an_end_below_index_0_is_an_error():
    with pytest.raises(ValueError, match="choose another offset, or make the schedule with t_min=-1"):
        ed.grids.leading(DISCRETE, 10)


@grids
@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), ed.schedules.flow(3.0), DISCRETE], ids=range(4))
def test_grids_run_over_any_part_of_a_schedule(grid, schedule):
    start, end = (schedule.t_min + f * (schedule.t_max - schedule.t_min) for f in (0.8, 0.1))
    times = grid(schedule, 6, start=start, end=end)
    assert (times[0], times[-1], times.size) == (start, end, 7)
    assert np.all(np.diff(times) < 0)


def test_your_own_noise_levels():
    vp = SCHEDULES["vp_linear"]
    times = ed.grids.from_sigmas(vp, [100.0, 3.0, 0.1])
    np.testing.assert_allclose(np.exp(-vp.lambda_(times)), [100, 3, 0.1], rtol=1e-12)
    edm = ed.schedules.edm(0.0)
    np.testing.assert_allclose(ed.grids.from_sigmas(edm, [80.0, 2.0, 0.0]), [80, 2, 0], rtol=1e-14)


@pytest.mark.parametrize(
    ("num_steps", "strength", "steps"),
    [
        *((10, 1.0, 10), (10, 0.75, 8), (10, 0.5, 5), (10, 0.3, 3), (10, 0.01, 1)),
        *((5, 0.5, 3), (7, 0.5, 4), (10, 0.25, 3), (10, 0.45, 5), (10, 0.449, 4)),  # halves up
        *((50, 0.57, 29), (50, 0.29, 15), (1, 0.5, 1)),  # 0.57 * 50 is 28.499999999999996
    ],
)
def test_strength_is_the_fraction_of_the_steps_that_are_run_rounded_halves_up(num_steps, strength, steps):
    times = ed.grids.log_snr(SCHEDULES["edm"], num_steps)
    part = ed.grids.last_steps(times, strength)
    assert part.size == steps + 1
    np.testing.assert_array_equal(part, times[-steps - 1 :])


def test_karras_tends_to_log_snr_as_rho_grows():
    edm = SCHEDULES["edm"]
    np.testing.assert_allclose(ed.grids.karras(edm, 9, rho=1e6), ed.grids.log_snr(edm, 9), rtol=1e-4)


@grids
@pytest.mark.parametrize("steps", [0, -3, 2.0, "5", True, None])
def test_bad_step_counts(grid, steps):
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1"):
        grid(SCHEDULES["edm"], steps)


EVERY_GRID = {**GRIDS, "leading": ed.grids.leading, "trailing": ed.grids.trailing, "from_sigmas": ed.grids.from_sigmas}


@pytest.mark.parametrize("grid", EVERY_GRID.values(), ids=EVERY_GRID)
@pytest.mark.parametrize(("schedule", "second"), [(10, SCHEDULES["edm"]), (ed.schedules.edm, 10), (None, 10)])
def test_what_is_no_schedule_is_named(grid, schedule, second):
    """Arguments exchanged, or a schedule that was not called."""
    with pytest.raises(TypeError, match=r"schedule must be a NoiseSchedule, for example schedules.edm\(\), got"):
        grid(schedule, second)


@pytest.mark.parametrize("grid", [ed.grids.log_snr, ed.grids.karras])
def test_grids_in_the_log_snr_need_it_finite(grid):
    with pytest.raises(ValueError, match="finite log-SNR"):
        grid(ed.schedules.edm(0.0, 80.0), 5)


def test_karras_needs_a_positive_rho():
    with pytest.raises(ValueError, match="rho > 0"):
        ed.grids.karras(SCHEDULES["edm"], 5, rho=0.0)
