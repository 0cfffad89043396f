"""Fitted plans: zero offsets are the solver, constants and the order of times stay, fits are better, files say no."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_models import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import evodiff_jax as ed
from evodiff_jax import fitting
from evodiff_jax.tables import Solver, Table, check_table, pad

EDM = SCHEDULES["edm"]
ALL = {
    **SCHEDULES,
    "flow": ed.schedules.flow(),
    "discrete": ed.schedules.discrete(ed.schedules.scaled_linear_betas()),
    "sigma ends at 0": ed.schedules.edm(0.0, 80.0),
    "alpha starts at 0": ed.schedules.flow(t_min=0.0, t_max=1.0),
    "bisected": ed.NoiseSchedule(lambda t: 1 + 0 * t, lambda t: t * t, t_min=0.01, t_max=5.0),
}
UNFIT = ("evodiff", "heun")
FIT = [name for name, form in ed.solvers.FORMS.items() if not form.stochastic and name not in UNFIT]
OF_NOISE = {"dpm_2", *(name for name in FIT if name.startswith(("dpm_solver-", "deis", "ipndm")))}
DENOISE = ed.denoisers.gaussian_mixture(EDM, np.random.default_rng(0).uniform(-1, 1, (12, 2)), 0.05)
START = ed.plan(EDM, ed.grids.log_snr(EDM, 5), ed.solvers.dpm_solver_pp(2))
NOISE = EDM.noise(jax.random.key(3), (384, 2))
KEY = jax.random.key(0)


def times_of(schedule, steps):
    return np.linspace(1.0, 0.0, steps + 1) ** 1.5 * (schedule.t_max - schedule.t_min) + schedule.t_min


def fit(plan=START, x_T=NOISE, denoise=DENOISE, schedule=EDM, **options):
    options = {"key": KEY, "steps": 40, "batch": 64, "progress": False, **options}
    return fitting.fit(denoise, schedule, plan, x_T, **options)


def assert_close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def random_offsets(start, size, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: size * random.standard_normal(leaf.shape), start.zeros())


# -- offsets


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("name", FIT)
def test_zero_offsets_are_the_solver(name, schedule):
    schedule, of = ALL[schedule], schedule
    if of == "alpha starts at 0" and name in OF_NOISE:
        pytest.skip("noise predictions cannot start there")
    for steps, options in ((1, {}), (5, {}), (4, {"denoise_to_zero": True, "max_calls": 9})):
        plan = ed.plan(schedule, times_of(schedule, steps), ed.solvers.FORMS[name].make(), **options)
        start = fitting.start_of(plan, schedule, outputs=1)
        again = fitting.realise(start, start.zeros(), schedule)
        assert_close(again, plan, 1e-10)
        wider = fitting.start_of(plan, schedule, outputs=5)
        table = fitting.realise(wider, wider.zeros(), schedule).table
        width = plan.table.predictor.shape[1]
        assert table.predictor.shape[1] == 5
        np.testing.assert_allclose(table.predictor[:, :width], plan.table.predictor, rtol=1e-10, atol=1e-10)
        assert not table.predictor[:, width:].any()


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["ddim", "unipc-3", "deis-3", "dpm_solver_pp-2", "dpm_2", "variance_optimal"]),
    st.sampled_from(sorted(ALL)),
    st.integers(1, 7),
    st.booleans(),
    st.floats(0, 20),
    st.integers(0, 1000),
)
def test_constants_stay_exact_and_times_in_order(name, schedule, steps, denoised, size, seed):
    schedule, of = ALL[schedule], schedule
    if of == "alpha starts at 0" and name in OF_NOISE:
        return
    plan = ed.plan(schedule, times_of(schedule, steps), ed.solvers.FORMS[name].make(), denoise_to_zero=denoised)
    start = fitting.start_of(plan, schedule)
    moved = fitting.realise(start, random_offsets(start, size, seed), schedule)
    still = fitting.realise(
        start, random_offsets(start, size, seed)._replace(shifts=0 * start.zeros().shifts), schedule
    )
    assert (np.diff(np.append(still.table.time[: len(start.times) - 1], still.end)) < 0).all()
    assert still.table.time[0] == plan.table.time[0]
    assert moved.end == plan.end
    assert moved.calls == plan.calls
    # Without the row of denoise_to_zero, at the times of the states.
    stepping = jax.tree.map(lambda column: column[: len(start.times) - 1], still.table)
    check_table(Solver("fitted", lambda *_: stepping, moved.rule), stepping, schedule, moved.end)
    told = moved.table.time[: len(start.times) - 1]
    assert_close(stepping._replace(time=told), jax.tree.map(lambda column: column[: len(told)], moved.table), 1e-12)
    assert schedule.t_min - 1e-9 <= told.min() <= told.max() <= schedule.t_max * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param("dpm_solver_pp-2", "vp_linear", marks=pytest.mark.slow),
        pytest.param("ipndm-3", "sigma ends at 0", marks=pytest.mark.slow),
        pytest.param("unipc-2", "bisected", marks=pytest.mark.slow),
        pytest.param("variance_optimal", "sigma ends at 0", marks=pytest.mark.slow),
    ],
)
def test_traced_plans_and_their_gradients(name, schedule, x64):
    schedule = ALL[schedule]
    plan = ed.plan(schedule, times_of(schedule, 2 if name == "variance_optimal" else 4), ed.solvers.FORMS[name].make())
    start = fitting.start_of(plan, schedule)
    offsets = random_offsets(start, 0.1)
    moved = fitting.realise(start, offsets, schedule)
    traced = jax.jit(lambda offsets: fitting.realise(start, offsets, schedule))(jax.tree.map(jnp.asarray, offsets))
    assert_close(traced, moved, 1e-8)
    direction = random_offsets(start, 1.0, 1)
    along = lambda e: jax.tree.map(lambda a, b: a + e * b, offsets, direction)

    def numbers(e, xp):
        table = fitting.realise(start, along(e), schedule).table
        return xp.concatenate([xp.ravel(a) for a in jax.tree.leaves((table.time, table.predictor, table.corrector))])

    found = jax.jacfwd(lambda e: numbers(e, jnp))(jnp.asarray(0.0))
    expected = (numbers(1e-5, np) - numbers(-1e-5, np)) / 2e-5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["sigma ends at 0", "alpha starts at 0"])
def test_gradients_are_finite_where_lambda_is_infinite(schedule):
    schedule = ALL[schedule]
    denoise = ed.denoisers.gaussian_mixture(schedule, [[-1.0, 0.0], [1.0, 0.5]], 0.1)
    plan = ed.plan(schedule, times_of(schedule, 4), ed.solvers.unipc(2))
    start = fitting.start_of(plan, schedule)
    x_T = schedule.noise(KEY, (8, 2))

    def total(offsets):
        return jnp.sum(ed.sample(denoise, x_T, fitting.realise(start, offsets, schedule)) ** 2)

    offsets = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start.zeros())
    gradient = jax.jit(jax.grad(total))(offsets)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in gradient)
    teacher = fitting.default_teacher(schedule, plan)
    finite = np.isfinite(start.lambda_)
    assert teacher.calls == 100 + np.sum(~finite)
    assert (teacher.table.time[0], teacher.end) == (start.times[0], start.times[-1])


# -- fits


@pytest.fixture(scope="module")
def fitted():
    return fit(steps=120, x_T=EDM.noise(jax.random.key(3), (512, 2)))


def test_a_fit_is_better_on_noise_it_has_not_seen(fitted):
    report = fitted.report
    assert report.fitted.median < 0.3 * report.start.median
    assert report.fitted.rms < report.start.rms
    assert report.validation_fitted.mean < report.validation_start.mean
    assert report.samples == (256, 128, 128)
    assert report.teacher_calls == 100 * 512
    assert report.gradient_calls == 5 * 64 * report.steps
    x_T = EDM.noise(jax.random.key(9), (256, 2))
    exact, start, own = (
        np.asarray(ed.sample(DENOISE, x_T, plan))
        for plan in (ed.plan(EDM, ed.grids.log_snr(EDM, 200), ed.solvers.unipc(3)), START, fitted.plan)
    )
    error = lambda x: np.median(np.sqrt(np.mean((x - exact) ** 2, 1)))
    assert error(own) < 0.3 * error(start)


def test_a_fitted_plan_is_a_plan_like_any_other(fitted):
    leaves = jax.tree.leaves(fitted.plan.table)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for leaf in leaves)
    start = fitting.start_of(START, EDM)
    assert_close(fitting.realise(start, fitted.offsets, EDM), fitted.plan, 0)
    run = jax.jit(lambda plan, x_T: ed.sample(DENOISE, x_T, plan))
    padded = dataclasses.replace(fitted.plan, table=pad(fitted.plan.table, 8))
    published = ed.plan(EDM, ed.grids.log_snr(EDM, 8), ed.solvers.unipc(3))
    assert published.table.predictor.shape[1] == padded.table.predictor.shape[1]
    for plan in (published, padded):
        x = run(plan, NOISE[:4])
    assert run._cache_size() == 1
    np.testing.assert_allclose(x, ed.sample(DENOISE, NOISE[:4], fitted.plan), atol=1e-4)


def test_a_fit_can_go_on_from_offsets(fitted):
    again = fit(offsets=fitted.offsets, steps=2, optimizer=optax.sgd(np.nan))
    assert again.report.best_step == 0
    assert_close(again.plan, fitted.plan, 0)
    assert again.report.start.median > again.report.fitted.median
    with pytest.raises(ValueError, match="give fit its start and its offsets"):
        fitting.start_of(fitted.plan, EDM)
    with pytest.raises(ValueError, match=r"offsets.times must be finite and of shape \(5,\), .* got \(4,\)"):
        fit(offsets=fitted.offsets._replace(times=np.zeros(4)))
    with pytest.raises(TypeError, match="offsets must be Offsets"):
        fit(offsets=fitted)


def test_weights_and_samples_of_the_teacher_can_be_given(fitted):
    denoise = lambda params, x, t: DENOISE(x, t) * params["one"]
    teacher = fitting.default_teacher(EDM, START, 50)
    params = {"one": jnp.ones(())}
    target = fitting.converge(denoise, NOISE, teacher, params=params, batch=100)
    np.testing.assert_allclose(target, ed.sample(DENOISE, NOISE, teacher), atol=1e-3)
    result = fit(denoise=denoise, params=params, target=target, teacher=teacher, steps=20)
    assert result.report.teacher_calls == 0
    assert result.card["teacher_calls"] == 50
    assert result.report.validation_fitted.mean < result.report.validation_start.mean
    with pytest.raises(ValueError, match=r"target.* must return the shape of x"):
        fit(target=target[:5])
    with pytest.raises(ValueError, match="1 of the teacher's 384 samples are not finite"):
        fit(target=np.where(np.arange(384)[:, None] == 7, np.nan, target))


@pytest.mark.slow
def test_noise_that_may_move_comes_nearer_to_the_target():
    """The training loss falls below that without, and the noise stays within its radius."""
    from evodiff_jax.fitting import _fit

    noise, gradient = (np.random.default_rng(i).standard_normal((6, 3, 2)).astype(np.float32) for i in (0, 1))
    moved = noise
    for _ in range(20):
        moved = _fit._moved(moved, gradient, noise, 0.1)
    size = lambda x: np.sqrt(np.mean(np.square(x), axis=(1, 2)))
    np.testing.assert_allclose(size(moved - noise), 0.1 * size(noise), rtol=1e-4)
    assert (np.sum((moved - noise) * gradient, axis=(1, 2)) < 0).all()
    result = fit(radius=0.05, steps=40)
    assert result.card["radius"] == 0.05
    assert result.report.validation_fitted.mean < result.report.validation_start.mean


@pytest.mark.slow
def test_the_same_key_gives_the_same_plan_and_remat_too():
    options = {"steps": 10, "x_T": NOISE[:64]}
    first, second = fit(**options), fit(**options)
    assert_close(first.plan, second.plan, 0)
    assert_close(fit(remat=True, **options).plan, first.plan, 1e-4)
    other = fit(key=jax.random.key(1), batch=16, **options)
    assert not np.array_equal(other.plan.table.predictor, first.plan.table.predictor)


@pytest.mark.parametrize("rate", [100.0, np.nan])
def test_never_worse_on_validation_than_the_start(rate):
    result = fit(optimizer=optax.sgd(rate), x_T=NOISE[:64], steps=10)
    assert result.report.validation_fitted.mean <= result.report.validation_start.mean
    if np.isnan(rate):
        assert result.report.best_step == 0
        assert result.report.fitted == result.report.start
        np.testing.assert_allclose(result.plan.table.time, START.table.time, rtol=1e-12)


def test_an_interrupted_fit_keeps_the_best_plan_so_far():
    seen = []

    def interrupt(step, value):
        seen.append((step, value))
        if step >= 10:
            raise KeyboardInterrupt

    result = fit(progress=interrupt)
    assert [step for step, _ in seen] == [2, 4, 6, 8, 10]
    assert result.report.interrupted
    assert result.report.steps == 10
    assert result.report.validation_fitted.mean < result.report.validation_start.mean
    assert seen[-1][1] == pytest.approx(result.report.validation_fitted.mean)


def test_conditions_go_with_their_samples():
    centers = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 2)), jnp.float32)

    def conditional(x, t, condition):
        own = centers[condition["label"]]
        assert x.shape == own.shape
        return own * condition["scale"][:, None] + 0.01 / (0.01 + t**2) * (x - own)

    def guided(x, t, condition):
        return conditional(x, t, condition) * 1.5 - 0.5 * ed.denoisers.gaussian_mixture(EDM, centers, 0.1)(x, t)

    condition = {"label": np.arange(384) % 4, "scale": np.ones(384, np.float32)}
    result = fit(denoise=guided, condition=condition, steps=20)
    assert result.report.fitted.median < result.report.start.median
    with pytest.raises(ValueError, match=r"condition\['label'\] must have one entry for each of the 384"):
        fit(denoise=guided, condition={**condition, "label": np.arange(4)})


@pytest.mark.slow
def test_states_that_are_pytrees_errors_and_losses_of_ones_own():
    both = lambda x, t: {"a": DENOISE(x["a"], t), "b": DENOISE(x["b"], t)}
    x_T = {"a": NOISE[:96], "b": NOISE[96:192]}
    # Not the maximum: where XLA computes it twice with other round-off, its gradient divides by no entries, 0 / 0.
    of_a = lambda x, target: jnp.mean(jnp.abs(x["a"] - target["a"]), axis=1)
    result = fit(denoise=both, x_T=x_T, error=of_a, loss="mean_square", batch=1000)
    assert result.report.samples == (48, 24, 24)
    assert result.report.gradient_calls == 5 * 48 * result.report.steps
    assert result.report.validation_fitted.rms < result.report.validation_start.rms


@pytest.mark.slow
def test_double_precision_stays(x64):
    result = fit(x_T=jnp.asarray(NOISE[:32], jnp.float64), steps=2)
    assert result.plan.table.predictor.dtype == np.float64


# -- files


def test_files_give_back_what_was_saved(fitted, tmp_path):
    path = tmp_path / "plan.safetensors"
    fitting.save(path, fitted, digest="abc", solver="dpm_solver_pp-2")
    again = fitting.load(path, EDM, digest="abc")
    assert_close(again.plan, fitted.plan, 0)
    assert [*map(np.shape, jax.tree.leaves(again.plan))] == [*map(np.shape, jax.tree.leaves(fitted.plan))]
    assert_close(again.offsets, fitted.offsets, 0)
    assert again.report == fitted.report
    assert fitting.is_fitted(path)
    assert again.card == {**fitted.card, "digest": "abc", "solver": "dpm_solver_pp-2"}
    assert np.array_equal(ed.sample(DENOISE, NOISE, again.plan), ed.sample(DENOISE, NOISE, fitted.plan))
    with pytest.raises(ValueError, match=r"is of another schedule: its .* the schedule's are"):
        fitting.load(path, SCHEDULES["vp_linear"])
    with pytest.raises(ValueError, match="fitted to another model: its digest is 'abc', the model's 'xyz'"):
        fitting.load(path, digest="xyz")
    vp = ed.denoisers.gaussian_mixture(SCHEDULES["vp_linear"], [[0.0, 1.0]], 0.1)
    with pytest.raises(ValueError, match="made for another schedule"):
        ed.sample(vp, NOISE, again.plan)
    with pytest.raises(TypeError, match="must be JSON"):
        fitting.save(path, fitted, digest=KEY)
    with pytest.raises(TypeError, match="must be a Fitted"):
        fitting.save(path, fitted.plan)


@pytest.mark.parametrize("name", ["variance_optimal", "ipndm-3"])
def test_files_of_plans_with_a_rule_or_noise_predictions(name, fitted, tmp_path):
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 5), ed.solvers.FORMS[name].make(), max_calls=7)
    start = fitting.start_of(plan, EDM)
    moved = fitted._replace(plan=fitting.realise(start, random_offsets(start, 0.1), EDM))
    fitting.save(tmp_path / "plan", moved)
    again = fitting.load(tmp_path / "plan", EDM)
    assert_close(again.plan, moved.plan, 0)
    assert again.plan.rule == plan.rule


def test_what_is_no_fitted_plan_is_said(fitted, tmp_path):
    path = tmp_path / "plan.safetensors"
    with pytest.raises(FileNotFoundError):
        fitting.load(path)
    for content in (b"", b"no safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no fitted plan"):
            fitting.load(path)
        assert not fitting.is_fitted(path)
    assert not fitting.is_fitted(tmp_path)
    fitting.save(path, fitted)
    arrays = load_file(path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    described = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["evodiff_jax"])

    def refused(message, arrays=arrays, **changes):
        save_file(arrays, path, {"evodiff_jax": json.dumps({**described, **changes})})
        with pytest.raises(ValueError, match=message):
            fitting.load(path)

    refused("is no fitted plan", kind="weights")
    refused("is of version 3 .* reads 2", version=3)
    refused("damaged fitted plan", calls=100)
    refused("damaged fitted plan", report={})
    refused("damaged fitted plan", arrays={k: v for k, v in arrays.items() if k != "table.time"})
    refused("damaged fitted plan", arrays={**arrays, "table.transition": arrays["table.transition"] * np.nan})


# -- what is no input


def stochastic():
    return ed.plan(EDM, ed.grids.log_snr(EDM, 5), ed.solvers.sde_dpm_solver_pp(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": stochastic()}, "the plan is of a stochastic solver"),
        (
            {"plan": ed.plan(EDM, ed.grids.log_snr(EDM, 5), ed.solvers.heun())},
            "times of the plan's calls must decrease",
        ),
        ({"plan": ed.plan(EDM, ed.grids.log_snr(EDM, 5), ed.solvers.evodiff())}, "rule .*_evodiff.* start from"),
        ({"plan": ed.stack([START, START])}, "stack of 2 plans"),
        ({"plan": ed.plan(SCHEDULES["vp_linear"], [1.0, 0.1], ed.solvers.ddim())}, "the plan is of another schedule"),
        ({"outputs": 0}, "outputs must be an integer of at least 1, got 0"),
        (
            {"teacher": ed.plan(EDM, ed.grids.log_snr(EDM, 4), ed.solvers.ddim())},
            "makes 4 calls, fewer than the plan's 5",
        ),
        ({"teacher": stochastic()}, "the teacher is of a stochastic solver"),
        ({"teacher": ed.stack([START, START])}, "the teacher is a stack of 2"),
        (
            {"teacher": ed.plan(EDM, ed.grids.log_snr(EDM, 9, start=40.0), ed.solvers.ddim())},
            "the teacher runs from t = 40 to 0.002, the plan from 80 to 0.002",
        ),
        ({"x_T": NOISE[:7]}, "x_T has 7 samples"),
        ({"validation": 0.6, "test": 0.4}, "leave samples for training"),
        ({"validation": 0.0}, "fractions above 0"),
        ({"loss": "l1"}, "got 'l1'"),
        ({"radius": -0.1}, "radius must be a number from 0 to below 1, .* got -0.1"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch": 1.5}, "batch must be an integer of at least 1, got 1.5"),
        ({"denoise": ed.denoisers.gaussian_mixture(SCHEDULES["vp_linear"], [[0.0, 1.0]], 1.0)}, "another schedule"),
    ],
)
def test_errors_before_compilation(options, message, monkeypatch):
    if "denoise" not in options:
        options = {**options, "denoise": lambda *_: pytest.fail("the model was called")}
    with pytest.raises(ValueError, match=message):
        fit(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": None}, "plan must be a Plan"),
        ({"teacher": "ddim"}, "teacher must be a Plan"),
        ({"optimizer": "adam"}, "optimizer must be an optax"),
        ({"error": 1.0}, "error must be a function"),
        ({"key": 0}, "key must be a JAX random key"),
        ({"denoise": None}, "denoise must be a function"),
    ],
)
def test_wrong_types(options, message):
    with pytest.raises(TypeError, match=message):
        fit(**options)


def test_tables_that_are_no_steps_from_call_to_call():
    def table(schedule, times):
        ones = np.ones(len(times) - 1)
        return Table(times[:-1], ones, 0 * ones[:, None], 0 * ones[:, None])

    plan = ed.plan(EDM, times_of(EDM, 3), Solver("still", table, keeps_constants=False))
    with pytest.raises(ValueError, match="rows are not steps of the data or of the noise prediction"):
        fit(plan=plan)


def test_samples_of_the_teacher_that_are_not_finite_are_counted():
    broken = lambda x, t: jnp.where(jnp.abs(x[:, :1] - NOISE[3, 0]) < 1e-6, jnp.nan, DENOISE(x, t))
    with pytest.raises(ValueError, match=r"1 of the teacher's 384 samples are not finite, those of x_T\[3\]"):
        fit(denoise=broken)
