"""DPM-Solver-v3 and the statistics it is built on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.statistics import Statistics, estimate, load, save

EDM = ed.schedules.edm(0.01, 40.0)
VP = SCHEDULES["vp_linear"]
SHAPE = (2, 3)


def uniform(schedule, l, s, b, levels=50, shape=SHAPE):  # noqa: E741
    """The same statistics at every level and coordinate."""
    start, end = schedule.levels(np.array([schedule.t_max, schedule.t_min])).lambda_
    return Statistics(np.linspace(start, end, levels), *(np.full((levels, *shape), v) for v in (l, s, b)))


def gaussian(schedule, mean, deviation):
    """The posterior mean of independent normal coordinates."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        return (mean + gain * (x - alpha * mean)).astype(x.dtype)

    return denoise


MEAN = np.array([[0.5, -1.0, 0.0], [2.0, 0.3, 1.0]])
DEVIATION = np.array([[0.5, 1.0, 0.1], [0.3, 2.0, 1.0]])


@pytest.fixture(scope="module")
def of_gaussian():
    x_0 = MEAN + DEVIATION * jax.random.normal(jax.random.key(0), (256, *SHAPE))
    return {
        name: estimate(
            gaussian(schedule, MEAN, DEVIATION), x_0, schedule, key=jax.random.key(1), num_levels=100, batch_size=64
        )
        for name, schedule in (("edm", EDM), ("vp", VP))
    }


@pytest.mark.parametrize("name", ["edm", "vp"])
def test_the_statistics_of_a_gaussian_are_the_exact_ones(of_gaussian, name):
    """m = mean + (1 - l) (u - mean) with l = kappa^2 / (c^2 + kappa^2): f = -l mean, so s = 0 and b = -mean l'."""
    statistics = of_gaussian[name]
    kappa2 = np.exp(-2 * statistics.lambda_)[:, None, None]
    l = kappa2 / (DEVIATION**2 + kappa2)  # noqa: E741
    np.testing.assert_allclose(statistics.l, l, atol=2e-5)
    slope = -2 * kappa2 * DEVIATION**2 / (DEVIATION**2 + kappa2) ** 2
    np.testing.assert_allclose(statistics.b[1:-1], (-MEAN * slope)[1:-1], atol=0.02)
    np.testing.assert_array_equal(statistics.s, 0)


@pytest.mark.parametrize(("name", "schedule"), [("edm", EDM), ("vp", VP)])
def test_a_gaussian_is_solved_in_one_step(of_gaussian, name, schedule):
    """Nothing is left over of f: the error is the statistics' interpolation."""
    x_T = initial_state(schedule, (5, *SHAPE))
    (alpha_0, alpha_1), (sigma_0, sigma_1), _ = schedule.levels(np.array([schedule.t_max, schedule.t_min]))
    shrink = np.sqrt(((alpha_1 * DEVIATION) ** 2 + sigma_1**2) / ((alpha_0 * DEVIATION) ** 2 + sigma_0**2))
    exact = alpha_1 * MEAN + shrink * (x_T - alpha_0 * MEAN)

    def error(solver, steps):
        times = ed.grids.log_snr(schedule, steps)
        x = ed.sample(gaussian(schedule, MEAN, DEVIATION), x_T, ed.plan(schedule, times, solver))
        return np.abs(x - exact).max()

    v3 = ed.solvers.dpm_solver_v3(of_gaussian[name], 1, corrector=False)
    assert error(v3, 1) < 0.02
    assert error(ed.solvers.dpm_solver_v3(of_gaussian[name]), 4) < 0.02
    assert error(ed.solvers.ddim(), 4) > 0.1


@pytest.mark.parametrize("schedule", [EDM, VP], ids=["edm", "vp"])
@pytest.mark.parametrize(
    ("l", "s", "peer", "order"),
    [
        (1.0, 0.0, ed.solvers.ddim(), 1),
        (0.0, -1.0, ed.solvers.ddim(), 1),
        (1.0, 0.0, ed.solvers.dpm_solver_pp(3, exact_curvature=True, lower_order_final=False), 3),
        (0.0, -1.0, ed.solvers.dpm_solver(3, exact_curvature=True, lower_order_final=False), 3),
    ],
)
def test_special_statistics_give_the_solvers_they_generalise(schedule, l, s, peer, order, x64):  # noqa: E741
    """l = 1, s = b = 0 is the data prediction's exponential integrator; l = 0, s = -1 the noise prediction's."""
    x_T = initial_state(schedule, (3, 4, 4, 2), jnp.float64)
    times = ed.grids.karras(schedule, 6)
    if order == 3:  # their second order has another weight: compare from the third step on
        solver = ed.solvers.dpm_solver_v3(uniform(schedule, l, s, 0.0, shape=(4, 4, 2)), 3, False, False)
        v3, expected = (which.table(schedule, times) for which in (solver, peer))
        np.testing.assert_allclose(v3.transition[2:, 0, 0, 0], _transition(schedule, times, l)[2:], rtol=1e-10)
        lambda_ = schedule.levels(times).lambda_
        scale = -1.0 if l else np.exp(lambda_)  # f = -m, or kappa eps
        for i in range(2, 6):
            for age in range(3):
                factor = -1.0 if l else np.exp(-lambda_[i - age])
                weight = v3.predictor[i, age, 0, 0, 0] * factor
                assert weight == pytest.approx(expected.predictor[i, age], rel=1e-8), (i, age, scale)
        return
    solver = ed.solvers.dpm_solver_v3(uniform(schedule, l, s, 0.0, shape=(4, 4, 2)), order, corrector=False)
    x, expected = (ed.sample(mixture(schedule), x_T, ed.plan(schedule, times, which)) for which in (solver, peer))
    chex.assert_trees_all_close(x, expected, rtol=1e-9, atol=1e-9)


def _transition(schedule, times, l):  # noqa: E741
    alpha, sigma, _ = schedule.levels(times)
    return sigma[1:] / sigma[:-1] if l else alpha[1:] / alpha[:-1]


CENTERS = np.array([[1.0, 0.3], [-0.7, 0.8], [0.2, -1.1]])


@pytest.fixture(scope="module")
def of_mixture():
    schedule = ed.schedules.edm(1e-3, 1e3)
    rng = np.random.default_rng(0)
    x_0 = (CENTERS[rng.integers(3, size=4096)] + 0.8 * rng.normal(size=(4096, 2))).astype(np.float32)
    return schedule, estimate(mixture(schedule, CENTERS, 0.8), x_0, schedule, key=jax.random.key(0), num_levels=200)


def solutions(schedule, solvers, steps):
    x_T = initial_state(schedule, (16, 2), jnp.float64)
    denoise = mixture(schedule, CENTERS, 0.8)
    run = jax.jit(lambda plan: ed.sample(denoise, x_T, plan))
    exact = ed.sample(
        denoise, x_T, ed.plan(schedule, ed.grids.log_snr(schedule, 3000), ed.solvers.dpm_solver_pp(3, "singlestep"))
    )
    return [
        [
            np.sqrt(
                np.mean((run(ed.plan(schedule, ed.grids.log_snr(schedule, n), s, max_calls=max(steps))) - exact) ** 2)
            )
            for n in steps
        ]
        for s in solvers
    ]


def test_orders(of_mixture, x64, capsys):
    """With smooth statistics of any values the order is the nominal one, one more with the corrector.

    They make nothing vary at the ends of the run, where orders are lower: see test_convergence.
    """
    schedule, steps = of_mixture[0], (160, 320, 640)
    lambda_ = of_mixture[1].lambda_
    ramp = (np.tanh(lambda_) + 1)[:, None] * np.ones(2) / 2
    smooth = Statistics(lambda_, 1 - 0.6 * ramp, -1.2 * ramp * (1 - ramp), 0.2 * ramp * (1 - ramp))
    forms = [(order, corrector) for order in (1, 2, 3) for corrector in (False, True)]
    errors = solutions(schedule, [ed.solvers.dpm_solver_v3(smooth, o, c) for o, c in forms], steps)
    observed = np.log2(np.array(errors)[:, -2] / np.array(errors)[:, -1])
    with capsys.disabled():
        print("\ndpm_solver_v3: nominal order, observed order")
        for (order, corrector), found in zip(forms, observed, strict=True):
            print(f"  order={order}, corrector={corrector!s:5}  {order + corrector}  {found:.2f}")
    np.testing.assert_allclose(observed, [o + c for o, c in forms], atol=0.25)


def test_estimated_statistics_help_at_few_calls(of_mixture, x64):
    schedule, statistics = of_mixture
    assert 0.5 < np.abs(statistics.s).max() <= 2
    solvers = [ed.solvers.dpm_solver_v3(statistics, 2), ed.solvers.ddim()]
    v3, ddim = solutions(schedule, solvers, (6, 8, 10))
    assert np.isfinite(v3).all()
    assert (np.array(v3) < np.array(ddim)).all()


def test_runs_from_few_steps_up_to_sigma_0_and_with_denoising():
    schedule = ed.schedules.edm(0.0, 40.0)
    statistics = uniform(EDM, 0.9, -0.1, 0.01)
    x_T = initial_state(schedule, (4, *SHAPE))
    solver = ed.solvers.dpm_solver_v3(statistics)
    denoise = gaussian(schedule, MEAN, DEVIATION)
    for steps in (1, 2, 3, 6):
        times = np.append(ed.grids.log_snr(EDM, steps), 0.0)
        assert np.isfinite(ed.sample(denoise, x_T, ed.plan(schedule, times, solver))).all()
    times = ed.grids.log_snr(EDM, 4)
    x, trace = jax.jit(lambda x: ed.sample_with_trace(denoise, x, ed.plan(EDM, times, solver, denoise_to_zero=True)))(
        x_T
    )
    chex.assert_trees_all_close(x, denoise(trace.states[-2], times[-1]), rtol=1e-4, atol=1e-5)


def test_the_corrected_states_of_the_trace_include_the_constant(x64):
    """At the exact statistics of a Gaussian every state lies on the exact path."""
    start, end = EDM.levels(np.array([EDM.t_max, EDM.t_min])).lambda_
    lambda_ = np.linspace(start, end, 4000)
    kappa2 = np.exp(-2 * lambda_)[:, None, None]
    l = kappa2 / (DEVIATION**2 + kappa2)  # noqa: E741
    slope = -2 * kappa2 * DEVIATION**2 / (DEVIATION**2 + kappa2) ** 2
    exact = Statistics(lambda_, l, np.zeros_like(l), -MEAN * slope)
    times = ed.grids.log_snr(EDM, 5)
    x_T = initial_state(EDM, (2, *SHAPE), jnp.float64)
    solver = ed.solvers.dpm_solver_v3(exact)
    _, trace = ed.sample_with_trace(gaussian(EDM, MEAN, DEVIATION), x_T, ed.plan(EDM, times, solver))
    for t, x in zip(times, trace.states, strict=True):
        shrink = np.sqrt((DEVIATION**2 + t**2) / (DEVIATION**2 + EDM.t_max**2))
        np.testing.assert_allclose(x, MEAN + shrink * (x_T - MEAN), rtol=1e-4, atol=1e-4)


def test_files_round_trip_and_know_their_schedule(tmp_path, of_gaussian):
    path = tmp_path / "statistics.safetensors"
    save(path, of_gaussian["edm"], EDM)
    chex.assert_trees_all_equal(load(path, EDM), of_gaussian["edm"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for other in (ed.schedules.edm(0.02, 40.0), VP):
        with pytest.raises(ValueError, match="belong to another schedule"):
            load(path, other)
    for content in (b"", b"nonsense" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a file of model statistics"):
            load(path, EDM)
    from safetensors.numpy import save_file

    save_file({"lambda_": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a file of model statistics"):
        load(path, EDM)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing", EDM)


X_0 = np.ones((4, 3), np.float32)
GOOD = uniform(EDM, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ed.solvers.dpm_solver_v3(GOOD, 4), ValueError, "order of 1 to 3, got 4"),
        (lambda: ed.solvers.dpm_solver_v3(None), TypeError, "statistics must be Statistics"),
        (lambda: ed.solvers.dpm_solver_v3(GOOD._replace(s=GOOD.s[:, 0])), ValueError, "of one shape"),
        (lambda: ed.solvers.dpm_solver_v3(GOOD._replace(lambda_=-GOOD.lambda_)), ValueError, "must increase"),
        (
            lambda: ed.plan(SCHEDULES["edm"], [80.0, 1.0], ed.solvers.dpm_solver_v3(GOOD)),
            ValueError,
            "the statistics cover lambda from",
        ),
        (
            lambda: jax.jit(lambda t: ed.plan(EDM, t, ed.solvers.dpm_solver_v3(GOOD)).table)(jnp.array([40.0, 1.0])),
            ValueError,
            "must be concrete",
        ),
        (
            lambda: ed.sample(lambda x, t: x, X_0, ed.plan(EDM, [40.0, 1.0], ed.solvers.dpm_solver_v3(GOOD))),
            ValueError,
            "for samples of shape \\(2, 3\\)",
        ),
        (lambda: estimate(lambda x, t: x, X_0.astype(int), EDM, key=jax.random.key(0)), TypeError, "floating-point"),
        (lambda: estimate(lambda x, t: x, X_0[:1], EDM, key=jax.random.key(0)), ValueError, "two samples"),
        (lambda: estimate(lambda x, t: x, X_0, EDM, key=jax.random.key(0), batch_size=3), ValueError, "must divide"),
        (lambda: estimate(lambda x, t: x, X_0, EDM, key=jax.random.key(0), num_levels=1), ValueError, "two levels"),
        (lambda: estimate(lambda x, t: x, X_0, ed.schedules.edm(0.0), key=jax.random.key(0)), ValueError, "finite"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
