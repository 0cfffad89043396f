"""Noise for image-to-image, inpainting, inversion, interpolation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, SOLVERS, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.editing import inpaint, invert, slerp
from evodiff_jax.sampling import plan_from_times
from evodiff_jax.tables import pad

EDM, VP = SCHEDULES["edm"], SCHEDULES["vp_linear"]
DISCRETE = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
KEY = jax.random.key(0)
SHAPE = (3, 4, 4, 2)
identity = lambda x, t: x


# ---- image-to-image


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_noise_of_a_time_has_its_level(schedule):
    x_0 = jnp.linspace(-1, 1, 40_000).reshape(200, 200)
    for t in (schedule.t_min, 0.5 * schedule.t_max, schedule.t_max):
        x = schedule.add_noise(x_0, t, KEY)
        noise = (x - schedule.alpha(t) * x_0) / schedule.sigma(t)
        assert float(jnp.std(noise)) == pytest.approx(1, abs=0.02)
        assert float(jnp.mean(noise * x_0)) == pytest.approx(0, abs=0.02)
        np.testing.assert_array_equal(x, schedule.add_noise(x_0, t, KEY))
        assert schedule.add_noise(x_0.astype(jnp.bfloat16), t, KEY).dtype == jnp.bfloat16


def test_the_leaves_of_a_state_get_noise_of_their_own():
    x = EDM.add_noise({"a": jnp.zeros((4, 9)), "b": jnp.zeros((4, 9))}, 1.0, KEY)
    assert np.abs(x["a"] - x["b"]).max() > 0.1


def test_image_to_image_keeps_more_of_the_image_the_smaller_the_strength(x64):
    image = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, SHAPE))
    whole = ed.grids.log_snr(VP, 20)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        times = ed.grids.last_steps(whole, strength)
        assert times.size == round(strength * 20) + 1
        x = ed.sample(mixture(VP), VP.add_noise(image, times[0], KEY), ed.plan(VP, times, ed.solvers.unipc(2)))
        distances.append(float(jnp.sqrt(jnp.mean((x - image) ** 2))))
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_can_start_and_end_anywhere(name, x64):
    """From a state on the exact path of the ODE at one time to that at another."""
    times = ed.grids.log_snr(EDM, 60, start=5.0, end=0.3)
    spread = np.sqrt(1 + times[[0, -1]] ** 2)  # of unit normal data
    x_T = initial_state(EDM, SHAPE, jnp.float64)
    x = ed.sample(lambda x, t: x / (1 + t**2), spread[0] * x_T, ed.plan(EDM, times, SOLVERS[name]()))
    np.testing.assert_allclose(x, spread[1] * x_T, rtol=0.08 if name == "ddim" else 0.02)


# ---- inpainting

KNOWN = np.random.default_rng(3).uniform(-1, 1, SHAPE)
MASK = np.zeros((4, 4, 1), bool)
MASK[:, :2] = True
STOCHASTIC = {"sde": ed.solvers.sde_dpm_solver_pp(2), "sa": ed.solvers.sa_solver(), "churn": ed.solvers.heun(5.0)}


EDITED = {"vp_linear": VP, "edm": EDM, "flow": ed.schedules.flow(), "discrete": DISCRETE}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *((name, "vp_linear") for name in ("variance_optimal", "unipc-2", "heun", "sde", "churn")),
        *(("unipc-2", schedule) for schedule in ("edm", "flow", "discrete")),
    ],
)
def test_the_known_region_has_the_noise_of_the_level_in_every_call_and_is_exact_in_the_result(name, schedule, x64):
    solver, schedule = STOCHASTIC[name] if name in STOCHASTIC else SOLVERS[name](), EDITED[schedule]
    seen = []

    def model(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), np.asarray(t))), x, t, ordered=True)
        return mixture(schedule)(x, t)

    x_T = initial_state(schedule, SHAPE, jnp.float64)
    times = ed.grids.log_snr(schedule, 5)
    denoise, on_state = inpaint(model, jnp.asarray(KNOWN), MASK, schedule, key=KEY)
    run = jax.jit(lambda plan: ed.sample(denoise, x_T, plan, key=KEY, on_state=on_state))
    x, denoised = (
        np.asarray(run(ed.plan(schedule, times, solver, denoise_to_zero=zero, max_calls=11))) for zero in (False, True)
    )
    jax.effects_barrier()
    left = np.broadcast_to(MASK, SHAPE)
    noise = np.asarray(EDM.add_noise(jnp.zeros(SHAPE), 1.0, KEY))
    assert len(seen) > 10
    for state, t in seen:  # callbacks are in float32
        level = (schedule.alpha(t) * KNOWN + schedule.sigma(t) * noise)[left]
        np.testing.assert_allclose(state[left], level, rtol=1e-5, atol=1e-5)
    for result in (x, denoised):
        np.testing.assert_array_equal(result[left], KNOWN[left])
        assert np.isfinite(result).all()
        assert np.abs(result - KNOWN)[~left].min() > 0


def test_known_data_of_samples_with_keys_of_their_own_do_not_depend_on_the_batch():
    keys, x, known = jax.random.split(KEY, 3), jnp.zeros(SHAPE), jnp.asarray(KNOWN, jnp.float32)

    def hooked(order):
        order = np.array(order)
        return inpaint(identity, known[order], MASK, EDM, key=keys[order]).on_state(x[order], jnp.float32(2.0), 0, None)

    whole = hooked([0, 1, 2])
    np.testing.assert_array_equal(hooked([2, 0]), whole[np.array([2, 0])])
    noise = (whole - known)[:, :, :2]
    assert np.abs(np.diff(noise, axis=0)).min() > 0


def test_the_rest_is_drawn_to_fit_the_known_region():
    """Of two equal coordinates one is known; the other one is nearly (85 %) always the same, at any number of steps."""
    centers = np.array([[-1.0, -1.0], [1.0, 1.0]])
    sign = jnp.where(jnp.arange(400) % 2, 1.0, -1.0)
    known = jnp.stack([sign, jnp.full(400, jnp.nan)], axis=1)
    denoise, on_state = inpaint(mixture(EDM, centers, 0.05), known, np.array([True, False]), EDM, key=KEY)
    x_T = initial_state(EDM, (400, 2))
    x = ed.sample(
        denoise, x_T, ed.plan(EDM, ed.grids.log_snr(EDM, 20), ed.solvers.variance_optimal()), on_state=on_state
    )
    assert np.isfinite(x).all()
    assert np.mean(np.sign(x[:, 1]) == sign) > 0.8


@pytest.mark.fast
def test_masks_and_known_regions_broadcast():
    x = jnp.zeros(SHAPE)
    for mask in (MASK, np.broadcast_to(MASK, (1, 4, 4, 1)), jnp.broadcast_to(MASK, SHAPE), MASK[:, :, 0, None]):
        denoise, on_state = inpaint(identity, jnp.asarray(KNOWN), mask, EDM, key=KEY)
        np.testing.assert_allclose(denoise(x, 1.0), np.where(MASK, KNOWN, 0), rtol=1e-6)
        for index in (0, -1):
            state = np.asarray(on_state(x, jnp.float32(1.0), index, None))
            np.testing.assert_array_equal(state[~np.broadcast_to(MASK, SHAPE)], 0)
    one = inpaint(identity, jnp.asarray(KNOWN[:1]), MASK, EDM, key=KEY)
    np.testing.assert_allclose(one.denoise(x, 1.0)[2], np.where(MASK, KNOWN[0], 0), rtol=1e-6)
    assert (
        np.abs(np.diff(one.on_state(x, jnp.float32(1.0), 0, None), axis=0)[:, :, 0]).min() > 0
    )  # noise for each sample


# ---- inversion


RULES = [name for name in SOLVERS if SOLVERS[name]().rule is not None]
NARROW = ed.schedules.edm(0.1, 10.0)


@pytest.mark.parametrize(
    "names", [*([name] for name in RULES), sorted(set(SOLVERS) - set(RULES))], ids=[*RULES, "others"]
)
def test_inversion_finds_the_noise_and_comes_back_as_steps_get_small(names, x64):
    """`invert` is the run of the plan of the times upwards, which is done here for several solvers side by side."""
    x_T, denoise = initial_state(NARROW, SHAPE, jnp.float64), mixture(NARROW)
    run = jax.jit(jax.vmap(lambda x, plan: ed.sample(denoise, x, plan)))
    fine = ed.plan(NARROW, ed.grids.log_snr(NARROW, 2000), ed.solvers.dpm_solver_pp(2))
    x_0 = run(x_T[None], ed.stack([fine]))[0]

    def plans(times):
        made = [plan_from_times(NARROW, times, SOLVERS[name]()) for name in names]
        return ed.stack([dataclasses.replace(plan, table=pad(plan.table, 480)) for plan in made])

    errors = []
    for steps in (60, 240):
        times = ed.grids.log_snr(NARROW, steps)
        noise = run(jnp.stack([x_0] * len(names)), plans(times[::-1]))
        back = run(noise, plans(times))
        errors.append([jnp.sqrt(jnp.mean(d**2, axis=(1, 2, 3, 4))) for d in ((noise - x_T) / 10, back - x_0)])
    for i, name in enumerate(names):
        few, many = ([float(error[i]) for error in both] for both in errors)
        first_order = ed.solvers.FORMS[name].order == 1
        assert max(many) < (0.02 if first_order else 1e-3), name
        assert all(new < old / (3 if first_order else 8) for old, new in zip(few, many, strict=True)), name


@pytest.mark.fast
@pytest.mark.parametrize("name", ["unipc-2", "variance_optimal"])
def test_inversion_is_the_run_upwards(name, x64):
    x_0, times = initial_state(NARROW, SHAPE, jnp.float64) / 10, ed.grids.log_snr(NARROW, 8)
    upwards = plan_from_times(NARROW, times[::-1], SOLVERS[name]())
    expected = ed.sample(mixture(NARROW), x_0, upwards)
    np.testing.assert_allclose(invert(mixture(NARROW), x_0, NARROW, times, SOLVERS[name]()), expected, rtol=1e-12)
    np.testing.assert_array_equal(upwards.table.time, times[:0:-1])
    assert upwards.end == times[0]


# ---- interpolation


@pytest.mark.fast
def test_slerp_walks_the_great_circle():
    a, b = jnp.array([[3.0, 0.0], [0.0, 2.0]]), jnp.array([[0.0, 3.0], [-2.0, 0.0]])
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-6)
    for weight in (0.25, 0.5):
        angle = weight * np.pi / 2
        expected = np.cos(angle) * np.asarray(a) + np.sin(angle) * np.asarray(b)
        np.testing.assert_allclose(slerp(a, b, weight), expected, atol=1e-6)
    turned = lambda angle: jnp.array([[3 * np.cos(angle), 3 * np.sin(angle)]])
    for angle in (0.4, 2.5):  # and not a right one
        np.testing.assert_allclose(slerp(turned(0), turned(angle), 0.3), turned(0.3 * angle), atol=1e-6)
    # Of two lengths, and however small they are, the parts of both are those of unit vectors.
    expected = (np.sin(0.28) * turned(0) + np.sin(0.12) * 2 * turned(0.4)) / np.sin(0.4)
    for size in (1.0, 1e-12):
        x = slerp(size * turned(0), 2 * size * turned(0.4), 0.3)
        np.testing.assert_allclose(x, size * expected, rtol=1e-5)
    both = slerp(a, b, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(both, jnp.stack([a[0], b[1]]), atol=1e-6)


def test_interpolated_noise_is_as_large_as_noise():
    a, b = (80 * jax.random.normal(jax.random.key(i), (4, 32, 32, 3)) for i in range(2))
    for weight in (0.1, 0.5, 0.8):
        assert float(jnp.std(slerp(a, b, weight))) == pytest.approx(80, rel=0.03)
        assert slerp(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), weight).dtype == jnp.bfloat16


@pytest.mark.parametrize("other", [lambda a: a, lambda a: -a, lambda a: a * (1 + 1e-7), lambda a: 2 * a], ids=range(4))
def test_slerp_and_its_gradients_are_finite_for_parallel_samples(other):
    a = jax.random.normal(KEY, (2, 5))
    value, gradients = jax.value_and_grad(lambda a, b: jnp.sum(slerp(a, b, 0.3) ** 2), argnums=(0, 1))(a, other(a))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
    if other(1) > 0:
        np.testing.assert_allclose(slerp(a, other(a), 0.3), 0.7 * a + 0.3 * other(a), rtol=1e-4)
