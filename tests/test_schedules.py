"""Noise schedules: what `check_schedule` checks, closed forms, dtypes, noise, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st

import evodiff_jax as ed
from evodiff_jax.testing import check_schedule

pytestmark = pytest.mark.fast

CUSTOM = ed.NoiseSchedule(lambda t: jnp.cos(t), lambda t: jnp.sin(t), t_min=0.01, t_max=1.5)
STABLE_DIFFUSION = ed.schedules.scaled_linear_betas()
CUMPROD = np.cumprod(1 - STABLE_DIFFUSION)
ALL = {
    **SCHEDULES,
    "custom": CUSTOM,
    "ve": ed.schedules.ve(),
    "vp_cosine": ed.schedules.vp_cosine(),
    "vp_cosine to alpha 0": ed.schedules.vp_cosine(t_min=0.0, t_max=1.0),
    "sub_vp": ed.schedules.sub_vp(),
    "flow": ed.schedules.flow(),
    "flow shifted": ed.schedules.flow(3.0, t_min=0.0, t_max=1.0),
    "flow for a resolution": ed.schedules.flow(ed.schedules.resolution_shift(128 * 128, 64 * 64)),
    "flow for a sequence": ed.schedules.flow(ed.schedules.sequence_shift(1024)),
    "discrete linear": ed.schedules.discrete(ed.schedules.linear_betas()),
    "discrete scaled linear": ed.schedules.discrete(STABLE_DIFFUSION),
    "discrete cosine": ed.schedules.discrete(ed.schedules.cosine_betas()),
    "discrete to sigma 0": ed.schedules.discrete(alphas_cumprod=CUMPROD, t_min=-1),
    "discrete zero terminal": ed.schedules.discrete(alphas_cumprod=ed.schedules.zero_terminal_snr(CUMPROD), t_min=-1),
    "from a log-SNR": ed.schedules.from_log_snr(lambda t: 10 - 20 * t, 0.0, 1.0),
}
schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


def inner(schedule, count):
    """Times of a finite log-SNR."""
    return np.linspace(schedule.t_min, schedule.t_max, count + 2)[1:-1]


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_passes_to_round_off(name):
    """The values in both precisions, the inverse, gradients, shapes; the sharper bounds are the package's own."""
    report = check_schedule(ALL[name])
    assert report.inverse_error < 1e-13
    assert report.inverse_error_float32 < 1e-6
    assert report.level_error_float32 < 2e-5
    assert report.picklable == (name not in ("custom", "from a log-SNR"))


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith(("vp", "discrete", "from", "custom"))])
def test_variance_preserving_schedules_preserve_it(name):
    alpha, sigma, _ = ALL[name].levels(inner(ALL[name], 999))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-13)


def test_ve_is_geometric():
    t = np.linspace(0, 1, 11)
    alpha, sigma, _ = ed.schedules.ve(0.02, 100.0).levels(t)
    np.testing.assert_array_equal(alpha, 1)
    np.testing.assert_allclose(sigma, 0.02 * (100 / 0.02) ** t, rtol=1e-14)


def test_sub_vp_has_the_square_of_the_noise_of_vp():
    t = np.linspace(1e-3, 1, 11)
    vp, sub = SCHEDULES["vp_linear"].levels(t), ed.schedules.sub_vp().levels(t)
    np.testing.assert_allclose(sub.alpha, vp.alpha, rtol=1e-14)
    np.testing.assert_allclose(sub.sigma, vp.sigma**2, rtol=1e-13)


def test_the_cosine_schedule_is_the_published_one():
    t = np.linspace(1e-3, 0.99, 11)
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    f_0 = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(ed.schedules.vp_cosine().alpha(t) ** 2, f / f_0, rtol=1e-13)


def test_flow_is_a_straight_line_whose_time_is_shifted():
    t = np.linspace(0, 1, 11)
    straight = ed.schedules.flow(t_min=0.0, t_max=1.0)
    np.testing.assert_allclose(straight.sigma(t), t, rtol=1e-15)
    np.testing.assert_allclose(straight.alpha(t), 1 - t, rtol=1e-15)
    shifted = ed.schedules.flow(3.0, t_min=0.0, t_max=1.0)
    np.testing.assert_allclose(shifted.sigma(t), 3 * t / (1 + 2 * t), rtol=1e-14)
    np.testing.assert_allclose(shifted.alpha(t) + shifted.sigma(t), 1, rtol=1e-14)


def test_shifts_for_resolutions_and_sequences():
    """A shift s lowers the signal-to-noise ratio of every time by s^2, as a larger image has more of it."""
    assert ed.schedules.resolution_shift(4 * 256, 256) == 2.0
    assert ed.schedules.sequence_shift(256) == pytest.approx(np.exp(0.5))
    assert ed.schedules.sequence_shift(4096) == pytest.approx(np.exp(1.15))
    t = np.linspace(0.1, 0.9, 9)
    shift = ed.schedules.sequence_shift(1000)
    moved = ed.schedules.flow(shift).lambda_(t) - ed.schedules.flow().lambda_(t)
    np.testing.assert_allclose(moved, -np.log(shift), rtol=1e-12)


def test_betas_are_the_published_ones():
    linear, scaled, cosine = (
        ed.schedules.linear_betas(),
        ed.schedules.scaled_linear_betas(),
        ed.schedules.cosine_betas(),
    )
    np.testing.assert_allclose(linear, 1e-4 + np.arange(1000) / 999 * (0.02 - 1e-4), rtol=1e-12)
    root = np.sqrt([0.00085, 0.012])
    np.testing.assert_allclose(scaled, (root[0] + np.arange(1000) / 999 * (root[1] - root[0])) ** 2, rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:-1], (1 - f[1:] / f[:-1])[:-1], rtol=1e-10)
    assert cosine[-1] == 0.999


@pytest.mark.parametrize("betas", [ed.schedules.linear_betas(), STABLE_DIFFUSION, ed.schedules.cosine_betas(50)])
def test_discrete_schedules_go_through_their_levels(betas):
    cumprod = np.cumprod(1 - betas)
    for schedule in (ed.schedules.discrete(betas), ed.schedules.discrete(alphas_cumprod=cumprod)):
        index = np.arange(betas.size)
        assert (schedule.num_timesteps, schedule.t_min, schedule.t_max) == (betas.size, 0, betas.size - 1)
        np.testing.assert_allclose(schedule.alpha(index) ** 2, cumprod, rtol=1e-10)
        np.testing.assert_allclose(schedule.sigma(index) ** 2, 1 - cumprod, rtol=1e-10)
    to_zero = ed.schedules.discrete(betas, t_min=-1)
    assert (to_zero.sigma(-1.0), to_zero.alpha(-1.0)) == (0, 1)


def test_zero_terminal_snr_is_the_published_algorithm():
    root = np.sqrt(CUMPROD)
    published = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled = ed.schedules.zero_terminal_snr(CUMPROD)
    np.testing.assert_allclose(rescaled, published, rtol=1e-12)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(CUMPROD[0], rel=1e-12)
    schedule = ALL["discrete zero terminal"]
    assert (schedule.alpha(999.0), schedule.sigma(999.0)) == (0, 1)
    with_a_last_beta_of_1 = ed.schedules.discrete([0.1, 0.2, 1.0])
    assert with_a_last_beta_of_1.alpha(2.0) == 0


def test_a_schedule_from_its_log_snr():
    vp = SCHEDULES["vp_linear"]
    same = ed.schedules.from_log_snr(lambda t: 2 * vp.lambda_(t), vp.t_min, vp.t_max)
    t = np.linspace(vp.t_min, vp.t_max, 21)
    for ours, theirs in zip(same.levels(t), vp.levels(t), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@given(st.floats(0.0, 10.0), st.floats(0.001, 30.0), st.floats(1e-5, 1.0))
def test_vp_linear_solves_its_equation(beta_min, extra, t):
    schedule = ed.schedules.vp_linear(beta_min, beta_min + extra, t_min=1e-6)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-14)
    integral = beta_min * t + extra * t**2 / 2
    assert -2 * np.log(alpha) == pytest.approx(integral, rel=1e-9, abs=1e-15)


def test_vp_linear_with_constant_beta():
    schedule = ed.schedules.vp_linear(2.0, 2.0, t_min=1e-3, t_max=3.0)
    assert float(schedule.alpha(1.5)) == pytest.approx(np.exp(-1.5))
    assert float(schedule.time(schedule.lambda_(1.5))) == pytest.approx(1.5, rel=1e-14)


def test_edm_is_alpha_one_sigma_t():
    schedule = ed.schedules.edm(0.01, 50.0)
    assert (schedule.t_min, schedule.t_max) == (0.01, 50.0)
    assert (schedule.alpha(3.0), schedule.sigma(3.0)) == (1.0, 3.0)
    assert schedule.lambda_(3.0) == -np.log(3.0)


def test_equal_schedules_are_one_object_so_that_nothing_recompiles():
    assert ed.schedules.edm() is ed.schedules.edm()
    assert hash(ed.schedules.vp_linear()) == hash(ed.schedules.vp_linear())


def test_tables_of_jax_functions_are_float64_even_inside_jit():
    seen = []

    def f(x):
        seen.append(CUSTOM.levels(np.array([0.5, 0.1])))
        return x

    jax.jit(f)(1.0)
    assert isinstance(seen[0].alpha, np.ndarray)
    np.testing.assert_allclose(seen[0].alpha, np.cos([0.5, 0.1]), rtol=1e-15)


def test_a_schedule_without_inverse_finds_it_by_bisection_also_when_traced():
    lambda_ = jnp.asarray([2.0, 0.0, -2.0])
    np.testing.assert_allclose(jax.jit(CUSTOM.time)(lambda_), np.arctan(np.exp(-np.asarray(lambda_))), rtol=1e-5)


# -- dtypes


@pytest.mark.parametrize("name", ["discrete linear", "discrete zero terminal", "edm", "vp_linear", "flow", "custom"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_times_of_narrow_dtypes_are_computed_with_in_float32(name, dtype):
    """Timesteps in integers and times in half precision, concrete and as arguments of a program."""
    schedule = ALL[name]
    times = np.unique(inner(schedule, 7).astype(dtype).astype(np.float64))
    times = times[times > schedule.t_min].astype(dtype)
    exact = schedule.levels(times.astype(np.float64))

    def levels(t):
        return schedule.alpha(t), schedule.sigma(t), schedule.lambda_(t)

    on_device = jnp.asarray(times)
    for found in (levels(times), levels(on_device), jax.jit(levels)(times), schedule.levels(on_device)):
        for level, expected in zip(found, exact, strict=True):
            assert level.dtype in (np.float32, np.float64)
            np.testing.assert_allclose(level, expected, rtol=2e-5, atol=2e-5)
    lambda_ = np.asarray([2.0, 0.5, -2.0], jnp.bfloat16)
    expected = schedule.time(lambda_.astype(np.float64))
    for time in (schedule.time(lambda_), schedule.time(jnp.asarray(lambda_)), jax.jit(schedule.time)(lambda_)):
        assert time.dtype in (np.float32, np.float64)
        np.testing.assert_allclose(time, expected, rtol=1e-4, atol=1e-5)


# -- noise


@schedules
def test_pure_noise_has_the_deviation_of_the_first_time(schedule):
    x = schedule.noise(jax.random.key(0), (100, 400))
    assert x.dtype == jnp.float32
    assert float(jnp.std(x)) == pytest.approx(float(schedule.sigma(schedule.t_max)), rel=0.02)
    x = schedule.noise(jax.random.key(0), {"a": (3, 4), "b": ((3, 2, 2),)}, jnp.bfloat16)
    chex.assert_shape([x["a"], x["b"][0]], [(3, 4), (3, 2, 2)])
    chex.assert_type([x["a"], x["b"][0]], jnp.bfloat16)
    assert np.isfinite(x["a"].astype(jnp.float32)).all()


@pytest.mark.slow
def test_noise_of_one_key_a_sample_depends_on_it_alone():
    schedule, keys = SCHEDULES["vp_linear"], jax.random.split(jax.random.key(0), 4)
    x_0, order = jnp.linspace(-1, 1, 4 * 6).reshape(4, 6), np.array([2, 0, 3])
    makers = {
        "noise": lambda rows: schedule.noise(keys[rows], (len(rows), 6)),
        "add_noise": lambda rows: schedule.add_noise(x_0[rows], 0.4, keys[rows]),
        "of a pytree": lambda rows: schedule.add_noise({"a": x_0[rows], "b": x_0[rows]}, 0.4, keys[rows])["b"],
    }
    for name, make in makers.items():
        whole = make(np.arange(4))
        np.testing.assert_array_equal(make(order), whole[order], err_msg=name)
        assert np.abs(np.diff(whole, axis=0)).min() > 0
    one = schedule.noise(keys[0], (4, 6))
    np.testing.assert_array_equal(one, schedule.noise(keys[0], (4, 6)))
    assert np.abs(one - makers["noise"](np.arange(4))).max() > 0.1


def test_noise_of_a_traced_time(strict_promotion):
    schedule, key, x_0 = SCHEDULES["vp_linear"], jax.random.key(0), jnp.ones((2, 3))
    traced = jax.jit(lambda t: schedule.add_noise(x_0, t, key))
    for t in (0.5, np.float16(0.5), jnp.bfloat16(0.5)):
        chex.assert_trees_all_close(traced(t), schedule.add_noise(x_0, t, key), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [(4, "shape must be a tuple of integers"), ("4", "shape must be"), ((2.0, 3), "got"), (None, "shape must be")],
)
def test_bad_shapes_of_noise(shape, message):
    with pytest.raises(TypeError, match=message):
        SCHEDULES["edm"].noise(jax.random.key(0), shape)


# -- parameters


def test_arrays_without_axes_are_parameters():
    assert ed.schedules.flow(jnp.float32(3.0)) is ed.schedules.flow(3.0)
    assert ed.schedules.edm(0.002, np.array(80.0)) is ed.schedules.edm()
    assert ed.schedules.vp_linear(beta_max=np.float64(20.0)) is ed.schedules.vp_linear()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: ed.schedules.flow(s), "flow needs a concrete shift, got the traced .*call flow outside jax.jit"),
        (lambda s: ed.schedules.edm(sigma_max=s), "edm needs a concrete sigma_max"),
        (lambda s: ed.schedules.vp_linear(s), "vp_linear needs a concrete beta_min"),
        (lambda s: ed.schedules.edm(0.0, [80.0]), r"edm needs a number for sigma_max, got \[80.0\]"),
        (lambda s: ed.schedules.edm(0.0, np.array([80.0])), "edm needs a number for sigma_max"),
    ],
)
def test_traced_parameters_and_several_are_errors_that_name_them(make, message):
    with pytest.raises(TypeError, match=message):
        jax.jit(make)(jnp.float32(3.0))


def good(t):
    return 1 + 0 * t


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ed.schedules.edm(-1.0, 80.0), "0 <= sigma_min < sigma_max"),
        (lambda: ed.schedules.edm(80.0, 80.0), "0 <= sigma_min < sigma_max"),
        (lambda: ed.schedules.vp_linear(t_min=1.0, t_max=0.5), "t_min < t_max"),
        (lambda: ed.schedules.vp_linear(-0.1), "beta"),
        (lambda: ed.schedules.vp_linear(1.0, -2.0), "beta"),
        (lambda: ed.NoiseSchedule(good, lambda t: t, 1.0, 1.0), "t_min < t_max"),
        (lambda: ed.NoiseSchedule(good, lambda t: t, 0.0, float("inf")), "finite t_min"),
        (lambda: ed.NoiseSchedule(good, lambda t: 1 - t, 0.0, 0.5), "must decrease"),
        (lambda: ed.NoiseSchedule(lambda t: -good(t), lambda t: t, 0.1, 1.0), "positive"),
        (lambda: ed.NoiseSchedule(lambda t: t / 0.0, lambda t: t, 0.1, 1.0), "finite"),
        (lambda: ed.NoiseSchedule(lambda t: 1.0, lambda t: t, 0.1, 1.0), "elementwise"),
        (lambda: ed.NoiseSchedule(good, lambda t: t, 0.1, 1.0, time=lambda lambda_: lambda_), "inverse"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_noise_of_a_time_for_each_sample():
    """As for training: sample k is what it is alone at its time, with its key."""
    schedule = ed.schedules.vp_linear()
    x_0 = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)), jnp.float32)
    times, keys = jnp.array([0.2, 0.5, 0.9]), jax.random.split(jax.random.key(0), 3)
    noisy = jax.jit(schedule.add_noise)(x_0, times, keys)
    for k in range(3):
        alone = schedule.add_noise(x_0[k : k + 1], float(times[k]), keys[k : k + 1])
        np.testing.assert_allclose(noisy[k : k + 1], alone, rtol=1e-5)
    with pytest.raises(ValueError, match=r"t must be within the schedule's 0.001 to 1, got \[0.5, 2.0, 0.1\]"):
        schedule.add_noise(x_0, [0.5, 2.0, 0.1], keys)
