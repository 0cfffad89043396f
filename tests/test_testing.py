"""The test kit: what its checks find in wrong solvers, rules, schedules and denoisers, and what its models are."""

import functools
import importlib
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import evodiff_jax as ed
from evodiff_jax.tables import Choice, Rule, Solver, Table
from evodiff_jax.testing import (
    Fit,
    as_network,
    bimodal,
    check_denoiser,
    check_noise,
    check_rule,
    check_schedule,
    check_solver,
    gaussian,
    strategies,
)

# -- solvers with one fault each, made of DPM-Solver++(2M) as data or noise predictions, or of DDIM with noise


def table_2m(schedule, times, second=1.0, xp=np):
    """The coefficient of the difference of outputs is `second` times the right one."""
    alpha, sigma, lambda_ = schedule.levels(times)
    h = lambda_[1:] - lambda_[:-1]
    amplitude = -alpha[1:] * xp.expm1(-h)
    half = second * xp.concatenate([0 * h[:1], h[1:] / h[:-1] / 2])
    predictor = xp.stack([amplitude * (1 + half), -amplitude * half], axis=-1)
    return Table(times[:-1], sigma[1:] / sigma[:-1], predictor, 0 * predictor)


def of_noise(schedule, times, first=1.0):
    """DDIM of noise predictions, of which the coefficient is `first` times the right one."""
    alpha, sigma, _ = schedule.levels(times)
    ratio = alpha[1:] / alpha[:-1]
    step = first * (sigma[1:] - ratio * sigma[:-1])
    return Table(times[:-1], ratio, step[:, None], 0 * step[:, None], (1 / sigma[:-1], -alpha[:-1] / sigma[:-1]))


def with_noise(schedule, times, strength=1.0):
    """Ancestral sampling, with `strength` times the noise that its coefficients are for."""
    table = ed.solvers.ddim(1.0).table(schedule, times)
    return table._replace(noise=strength * table.noise)


def changed(change):
    return lambda schedule, times: change(table_2m(schedule, times))


def unbalanced(schedule, times):
    """The transition is 0.1 % off, and the predictor makes up for it in a state without noise, x = alpha."""
    table, alpha = table_2m(schedule, times), schedule.alpha(times[:-1])
    made_up = table.predictor - 0.001 * (table.transition * alpha)[:, None] * [1, 0]
    return table._replace(transition=1.001 * table.transition, predictor=made_up)


def longer_memory(schedule, times):
    table = table_2m(schedule, times)
    if len(times) < 5:
        return table
    pad = lambda column: np.pad(column, [(0, 0), (0, 1)])
    return table._replace(predictor=pad(table.predictor), corrector=pad(table.corrector))


def other_inside(schedule, times):
    xp = jnp if isinstance(times, jax.Array) else np
    return table_2m(schedule, times, 0.9 if xp is jnp else 1.0, xp)


calls = []


def counting(schedule, times):
    """It depends on how often it has been called."""
    calls.append(None)
    return table_2m(schedule, times, 1 + len(calls) / 100)


EDM = ed.schedules.edm()
FAULTY_SOLVERS = {
    "a coefficient 1 % off": (
        Solver("mine", changed(lambda table: table._replace(predictor=1.01 * table.predictor))),
        "'mine' on karras.* of edm.*row 0 takes a model that predicts the constant 1",
    ),
    "the coefficient of a difference 1 % off": (
        Solver("mine", functools.partial(table_2m, second=1.01)),
        r"observed order of 1\.\d+, not 2: errors of samples of bimodal data are .* in 320 calls",
    ),
    "order 1": (ed.solvers.ddim(), r"'ddim' has an observed order of 1.00, not 2"),
    "a transition 0.1 % off": (
        Solver("mine", unbalanced),
        "samples of a model that predicts the constant 0.7 differ by .*check transition against predictor",
    ),
    "the coefficient of a noise prediction 1 % off": (
        Solver("mine", functools.partial(of_noise, first=1.01)),
        r"observed order of -?0\.\d+, not 2",
    ),
    "float32": (
        Solver("mine", changed(lambda table: table._replace(predictor=table.predictor.astype(np.float32)))),
        r"column predictor is NumPy's of float32, whose rounding shows",
    ),
    "JAX arrays": (
        Solver("mine", changed(lambda table: table._replace(predictor=jnp.asarray(table.predictor)))),
        "column predictor is a JAX array of float32",
    ),
    "a number that is not finite": (
        Solver("mine", changed(lambda table: table._replace(transition=np.inf * table.transition))),
        "column .*transition must be finite",
    ),
    "another memory for more steps": (
        Solver("mine", longer_memory),
        r"column predictor has rows of shape \(2,\) on .* and \(3,\) on .*a program of its own",
    ),
    "a call outside the run": (
        Solver("mine", changed(lambda table: table._replace(time=1.5 * table.time)), keeps_constants=False),
        "row 0 calls the model at t = 120, outside the run from 80",
    ),
    "another table inside jit": (Solver("mine", other_inside), "column predictor of JAX's times differs by .* NumPy's"),
    "a table that differs from call to call": (
        Solver("mine", counting),
        "the table differs from call to call: it must depend on the schedule and the times alone",
    ),
    "no noise": (Solver("mine", functools.partial(with_noise, strength=0.0)), "another key gives the same samples"),
    "noise 20 % too strong": (
        Solver("mine", functools.partial(with_noise, strength=1.2)),
        "the standard deviation of samples of normal data is off by .* check the noise column",
    ),
    "noise of half the strength": (Solver("mine", functools.partial(with_noise, strength=0.5)), "standard deviation"),
}


@pytest.mark.parametrize("fault", FAULTY_SOLVERS)
def test_faults_of_solvers_are_named(fault):
    solver, message = FAULTY_SOLVERS[fault]
    order = 1 if solver.table(EDM, ed.grids.log_snr(EDM, 3)).noise is not None else 2
    with pytest.raises(ValueError, match=message):
        check_solver(solver, order=order)


@pytest.mark.fast
def test_a_right_solver_passes_and_what_was_measured_is_told():
    report = check_solver(Solver("mine", table_2m), order=2)
    assert (report.calls, report.remembers, report.stochastic) == (1, 1, False)
    assert (report.traced_times, report.picklable) == (False, True)  # it uses NumPy, and stands at the top of a module
    assert report.order == pytest.approx(2, abs=0.02)
    assert list(report.errors) == [320, 640, 1280]
    assert check_solver(Solver("mine", lambda s, t: table_2m(s, t))).picklable is False
    noisy = check_solver(Solver("mine", with_noise), order=1)
    assert noisy.stochastic
    assert noisy.order == pytest.approx(1, abs=0.1)


def test_a_solver_for_one_schedule_is_checked_on_it_alone():
    def table(schedule, times):
        assert schedule is cosine
        return table_2m(schedule, times)

    cosine = ed.schedules.vp_cosine()
    assert check_solver(Solver("mine", table), order=2, schedule=cosine).order == pytest.approx(2, abs=0.2)
    assert check_solver(ed.solvers.ddim(), schedule=ed.schedules.flow(t_min=0.0)).order is None
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        check_solver(ed.solvers.ddim(), schedule="cosine")


@pytest.mark.slow
def test_a_solver_with_coefficients_for_each_coordinate_is_checked_with_states_of_their_shape():
    def table(schedule, times):
        table = table_2m(schedule, times)
        wide = lambda column: np.stack([column] * 3, axis=-1)
        return table._replace(
            transition=wide(table.transition), predictor=wide(table.predictor), corrector=wide(table.corrector)
        )

    assert check_solver(Solver("mine", table), order=2).order == pytest.approx(2, abs=0.02)


# -- rules with one fault each, made of one that extrapolates less where outputs change fast


def table_of_rule(schedule, times):
    table = table_2m(schedule, times)
    half = -table.predictor[:, 1]
    plain = np.stack([table.predictor[:, 0] - half, 0 * half], axis=-1)
    return table._replace(predictor=plain, data=half)


def terms(data, x, output):
    return (jnp.square(output(0) - output(1)), jnp.square(output(0)))


def choose(data, sums, memory):
    change, size = sums
    some = size > 1e-15
    share = jnp.where(some, change / jnp.where(some, size, 1), 0)
    predictor = data / (1 + share) * jnp.array([1, -1], change.dtype)
    return Choice(predictor, jnp.zeros_like(predictor)), memory + share


def init(data):
    return jnp.zeros(())


def zero_over_zero(data, sums, memory):
    predictor = data / (1 + sums[0] / sums[1]) * jnp.array([1, -1], data.dtype)
    return Choice(predictor, jnp.zeros_like(predictor)), memory


def root_of_zero(data, sums, memory):
    predictor = data / (1 + jnp.sqrt(sums[0])) * jnp.array([1, -1], data.dtype)
    return Choice(predictor, jnp.zeros_like(predictor)), memory


def fourth_power(data, sums, memory):
    predictor = data / (1 + sums[0] ** 2 * 0) * jnp.array([1, -1], data.dtype)
    return Choice(predictor, jnp.zeros_like(predictor)), memory


def narrow_choice(data, sums, memory):
    choice, memory = choose(data, sums, memory)
    return choice._replace(predictor=choice.predictor.astype(jnp.float32)), memory


def narrow_memory(data, sums, memory):
    choice, memory = choose(data, sums, memory)
    return choice, memory.astype(jnp.float32)


def growing_memory(data, sums, memory):
    return choose(data, sums, memory)[0], jnp.stack([memory, sums[0]])


def one_coefficient(data, sums, memory):
    return Choice(jnp.zeros(1, data.dtype), jnp.zeros(1, data.dtype)), memory


def no_choice(data, sums, memory):
    return jnp.zeros(2), memory


def unequal(data, sums, memory):
    return Choice(data * jnp.array([1, -0.5], data.dtype), jnp.zeros(2, data.dtype)), memory


def over_the_batch(data, x, output):
    return (jnp.square(output(0) - output(1)) * jnp.mean(jnp.square(output(0))), jnp.square(output(0)))


def summed(data, x, output):
    return tuple(jnp.sum(term, axis=(1, 2, 3)) for term in terms(data, x, output))


def narrow_terms(data, x, output):
    return tuple(term.astype(jnp.float32) for term in terms(data, x, output))


def of_rule(terms=terms, choose=choose, init=init, **options):
    return Solver("mine", table_of_rule, Rule(terms, choose, init, **options))


FAULTY_RULES = {
    "none": (ed.solvers.ddim(), "'ddim' has no rule: check_solver alone is for it"),
    "a lambda": (
        of_rule(choose=lambda data, sums, memory: choose(data, sums, memory)),
        "choose is .*no function at the",
    ),
    "sums of its own": (of_rule(summed), r"term 0 must be like x, float64 \(3, 4, 4, 2\), it is float64 \(3,\)"),
    "terms in float32": (
        of_rule(narrow_terms),
        "term 0 must be like x, float64 .*, it is float32 .*lower the precision",
    ),
    "a choice in float32": (
        of_rule(choose=narrow_choice),
        r"predictor coefficients must be float64 \(2,\).*float32 \(2,\)",
    ),
    "one coefficient": (
        of_rule(choose=one_coefficient),
        r"must be float64 \(2,\), one for each output.*float64 \(1,\)",
    ),
    "no choice": (of_rule(choose=no_choice), r"choose must return \(Choice, memory\)"),
    "a memory in float32": (
        of_rule(choose=narrow_memory),
        r"memory .* like that of init, .*float64 \(\).*float32 \(\)",
    ),
    "a growing memory": (
        of_rule(choose=growing_memory),
        r"memory .* like that of init, .*float64 \(\).*float64 \(2,\)",
    ),
    "a sum over the batch": (of_rule(over_the_batch), "a sample changes by .* must not reduce over the batch axis"),
    "0 / 0": (of_rule(choose=zero_over_zero), "samples in float32 are not finite for a model whose outputs are all 0:"),
    "the slope of a root at 0": (
        of_rule(choose=root_of_zero),
        "gradients in float32 are not finite for a model whose outp",
    ),
    "the square of a sum": (of_rule(choose=fourth_power), "not finite for a model .*1e15: .*bound it before squaring"),
    "coefficients that do not add up to 0": (
        of_rule(choose=unequal),
        "samples of a constant model differ by .* add up to 0",
    ),
}


SLOW_FAULTS = ("the slope of a root at 0", "the square of a sum", "coefficients that do not add up to 0")


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_FAULTS else name for name in FAULTY_RULES]
)
def test_faults_of_rules_are_named(fault):
    solver, message = FAULTY_RULES[fault]
    with pytest.raises(ValueError, match=message):
        check_rule(solver)


def test_a_right_rule_passes():
    report = check_rule(of_rule())
    assert report[:2] == (2, 1)
    assert report.constant_error < 1e-6


@pytest.mark.slow
def test_faults_of_the_runs_of_rules_are_found_by_check_solver():
    assert check_solver(of_rule(), order=2).order == pytest.approx(2, abs=0.2)
    with pytest.raises(
        ValueError, match=r"changes by .* when the others of its batch are replaced: something is summed"
    ):
        check_solver(of_rule(over_the_batch))


# -- schedules with one fault each, which `NoiseSchedule` does not see on its grid of 65 times


def wavy(t):
    return t + 0.004 * np.sin(2 * np.pi * 64 * (t - 0.01) / 0.99) if not isinstance(t, jax.Array) else t


def rooted(t):
    return (1 - jnp.exp(-2 * t)) ** 0.5


def kappa(lambda_):
    return jnp.exp(-lambda_)


def noise_of(sigma, alpha=lambda t: 1 + 0 * t, t_min=0.01, **options):
    return ed.NoiseSchedule(alpha, sigma, t_min=t_min, t_max=1.0, **options)


@jax.custom_jvp
def twice_as_steep(t):
    return t


twice_as_steep.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

FAULTY_SCHEDULES = {
    "a lambda that rises": (
        lambda: noise_of(wavy),
        r"lambda = log\(alpha / sigma\) must decrease with t, it goes from",
    ),
    "a hole": (
        lambda: noise_of(lambda t: jnp.where(abs(t - 0.302) < 0.001, jnp.nan, t), time=kappa),
        "sigma must be finite .*t = 0.30",
    ),
    "an alpha below 0": (
        lambda: noise_of(lambda t: t, lambda t: jnp.where(abs(t - 0.302) < 0.001, -1.0, 1.0), time=kappa),
        "alpha must be finite and not negative, it is -1.0 at t = 0.30",
    ),
    "an inverse 1e-6 off": (
        lambda: noise_of(lambda t: t, time=lambda lambda_: kappa(lambda_) + 1e-6),
        r"time\(lambda_\(t\)\) differs from t by 1.01e-06 of t_max - t_min",
    ),
    "an inverse that is right on the grid of 65 times": (
        lambda: noise_of(lambda t: t, time=lambda x: kappa(x) + 1e-3 * jnp.sin(64 * np.pi * (kappa(x) - 0.01) / 0.99)),
        "differs from t by 0.001",
    ),
    "1 - alpha^2 in float32": (
        lambda: noise_of(rooted, lambda t: jnp.exp(-t), t_min=1e-5),
        "lambda = .* in float32 differs from float64 by .*expm1",
    ),
    "an overflow in float32": (
        lambda: noise_of(lambda t: 1e-40 * jnp.exp(92.2 * t + 1), lambda t: jnp.exp(-t)),
        "in float32",
    ),
    "a number of float64": (
        lambda: noise_of(lambda t: t * np.float64(2)),
        "sigma of times in float32 must be float32, it is float64",
    ),
    "functions of NumPy": (lambda: noise_of(lambda t: np.sqrt(np.asarray(t))), "must take traced times: use jax.numpy"),
    "a flat shape": (
        lambda: noise_of(lambda t: jnp.ravel(t)),
        r"sigma must have the shape of its argument, \(\), .*\(1,\)",
    ),
    "a constant shape inside jit": (
        lambda: noise_of(lambda t: jnp.broadcast_to(t, (3,)) if isinstance(t, jax.core.Tracer) and t.ndim == 0 else t),
        "sigma of a traced time must have the shape",
    ),
    "a wrong gradient": (
        lambda: noise_of(lambda t: twice_as_steep(t) if isinstance(t, jax.Array) else t),
        "the gradient of lambda in t differs by 1 of its size",
    ),
    "an inverse without a gradient": (
        lambda: noise_of(lambda t: t, time=lambda lambda_: jax.lax.stop_gradient(kappa(lambda_))),
        "the gradient of time in lambda differs by 1 of its size",
    ),
    "a gradient that is not finite": (
        lambda: noise_of(lambda t: jnp.sqrt(t**2 + jnp.where(t > 0.5, jnp.sqrt(0 * t), 0)), time=kappa),
        "the gradient of sigma must be finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTY_SCHEDULES)
def test_faults_of_schedules_are_named(fault):
    make, message = FAULTY_SCHEDULES[fault]
    with pytest.raises(ValueError, match=message):
        check_schedule(make())


def test_a_schedule_that_can_not_be_pickled_is_said_to():
    assert check_schedule(noise_of(lambda t: t)).picklable is False
    assert check_schedule(EDM).picklable is True
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        check_schedule("edm")


# -- models without error


@pytest.mark.fast
@pytest.mark.parametrize(
    "schedule", [EDM, ed.schedules.sub_vp(), ed.schedules.flow(2.0)], ids=["edm", "sub_vp", "flow"]
)
def test_exact_models_and_their_solutions(schedule, x64):
    """The data predictions against `gaussian_mixture`, the solutions against an adaptive eighth-order method."""
    mean, std = np.array([1.0]), 0.3
    x = schedule.sigma(schedule.t_max) * np.linspace(-2.1, 2.2, 7)[:, None]
    for model, centers in (gaussian(schedule, mean, std), [mean]), (bimodal(schedule, 1.0, std), [mean, -mean]):
        expected = ed.denoisers.gaussian_mixture(schedule, centers, std)
        denoise = jax.jit(model.denoise)
        for t in np.linspace(schedule.t_min, schedule.t_max, 5):
            np.testing.assert_allclose(denoise(x, t), expected(x, t), rtol=1e-9, atol=1e-9)

        def derivative(log_kappa, u, denoise=denoise):
            t = schedule.time(np.float64(-log_kappa))
            return u - np.asarray(denoise(schedule.alpha(t) * u[:, None], t))[:, 0]

        end = schedule.t_min + 0.05 * (schedule.t_max - schedule.t_min)
        alpha, _, lambda_ = schedule.levels([schedule.t_max, end])
        u = solve_ivp(derivative, -lambda_, x[:, 0] / alpha[0], method="DOP853", rtol=1e-10, atol=1e-11).y[:, -1]
        np.testing.assert_allclose(model.solve(x, schedule.t_max, end)[:, 0], alpha[1] * u, rtol=1e-7, atol=1e-8)
        back = model.solve(model.solve(x, schedule.t_max, end), end, schedule.t_max)
        np.testing.assert_allclose(back, x, rtol=1e-9)


def test_bad_models():
    with pytest.raises(ValueError, match=r"standard deviations of at least 0, got \[ 1. -1.\]"):
        gaussian(EDM, 0.0, [1.0, -1.0])
    with pytest.raises(ValueError, match="bimodal needs std > 0, got 0"):
        bimodal(EDM, std=0)
    with pytest.raises(ValueError, match="unknown prediction 'noise': choose one of 'data', 'epsilon'"):
        as_network("noise", lambda x, t: x, EDM)
    with pytest.raises(ValueError, match="moments needs a plan without a rule"):
        ed.testing.moments(ed.plan(EDM, [80.0, 1.0], ed.solvers.evodiff()), EDM, [0.0], [1.0])


# -- strategies


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_strategies_draw_is_valid(data):
    schedule = data.draw(strategies.schedules(whole=data.draw(st.booleans())))
    times = data.draw(strategies.times(schedule, min_steps=2, max_steps=9, part=data.draw(st.booleans())))
    assert 3 <= len(times) <= 10
    plan = ed.plan(schedule, times, ed.solvers.ddim())  # which checks the times
    np.testing.assert_array_equal(plan.table.time, times[:-1])
    state = data.draw(strategies.states(scale=2.0))
    leaves = jax.tree.leaves(state)
    assert len({len(leaf) for leaf in leaves}) == 1
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) and abs(leaf).max() <= 8 for leaf in leaves)
    solver = data.draw(strategies.solvers(stochastic=data.draw(st.sampled_from([None, False, True]))))
    assert isinstance(solver, Solver)


def test_what_strategies_draw_shrinks_to_something_simple():
    find = functools.partial(hypothesis.find, settings=settings(max_examples=300, deadline=None))
    assert find(strategies.schedules(), lambda schedule: True) is EDM
    assert find(strategies.schedules(), lambda schedule: schedule.num_timesteps is not None).num_timesteps == 1000
    uneven = find(strategies.times(EDM, max_steps=30), lambda times: len(times) >= 4)
    assert len(uneven) == 4
    x = find(strategies.states(), lambda x: isinstance(x, dict))
    np.testing.assert_array_equal(jax.tree.leaves(x)[0], 0)
    assert find(strategies.solvers(), lambda solver: True) is ed.solvers.ddim()
    assert find(strategies.solvers(), lambda solver: solver.rule is not None).rule is not None
    assert find(strategies.solvers(stochastic=True), lambda solver: True).name == "ddim"  # ancestral sampling


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(strategies.schedules(whole=True))
def test_every_schedule_of_the_package_passes_with_any_parameters(schedule):
    assert check_schedule(schedule).picklable


def test_without_hypothesis_strategies_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "evodiff_jax.testing.strategies")
    with pytest.raises(ModuleNotFoundError, match=r"hypothesis is not installed.*evodiff-jax\[testing\]"):
        importlib.import_module("evodiff_jax.testing.strategies")


# -- denoisers and noise


KEY = jax.random.key(0)
CENTERS, STD = np.array([[1.0] * 64, [-1.0] * 64]), 0.5
SCHEDULES = {
    "discrete": ed.schedules.discrete(ed.schedules.scaled_linear_betas()),
    "vp_linear": ed.schedules.vp_linear(),
    "edm": EDM,
    "flow": ed.schedules.flow(3.0),
}
DATA = np.random.default_rng(0).normal(CENTERS[np.arange(16) % 2], STD).astype(np.float32)


def network(schedule, prediction="data"):
    """The exact network of the data that predicts one thing or another."""
    return as_network(prediction, ed.denoisers.gaussian_mixture(schedule, CENTERS, STD), schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_data_prediction_passes(name):
    fit = check_denoiser(network(SCHEDULES[name]), SCHEDULES[name], DATA, KEY)
    assert isinstance(fit, Fit)
    assert (fit.prediction, fit.time) == ("data", "t")
    assert fit.error < 0.6  # there are two clusters: a linear prediction is worse


@pytest.mark.parametrize(
    "prediction", ["epsilon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v", "velocity", "score"))]
)
@pytest.mark.parametrize("name", ["discrete", "edm"])
def test_a_network_as_it_is_gets_its_arguments_named(name, prediction):
    schedule = SCHEDULES[name]
    with pytest.raises(ValueError, match=rf"use denoisers.from_prediction\(fn, schedule, '{prediction}'\)"):
        check_denoiser(network(schedule, prediction), schedule, DATA, KEY)


@pytest.mark.parametrize(
    ("declared", "prediction"), [("data", "epsilon"), ("v", "epsilon"), ("score", "epsilon"), ("epsilon", "v")]
)
def test_a_wrong_prediction_is_found(declared, prediction):
    schedule = SCHEDULES["vp_linear"]
    denoise = ed.denoisers.from_prediction(network(schedule, prediction), schedule, declared)
    with pytest.raises(ValueError, match=f"'{prediction}'"):
        check_denoiser(denoise, schedule, DATA, KEY)
    right = ed.denoisers.from_prediction(network(schedule, prediction), schedule, prediction)
    assert check_denoiser(right, schedule, DATA, KEY).error < 0.6


@pytest.mark.parametrize(
    ("takes", "message"),
    [(lambda t: t * 1000, "time=lambda t: t / 1000"), (lambda t: t / 1000, "time=lambda t: 1000 *")],
)
def test_another_unit_of_time_is_found(takes, message):
    schedule = SCHEDULES["discrete"]
    of_t = network(schedule, "epsilon")
    with pytest.raises(ValueError, match=message):
        check_denoiser(lambda x, t: of_t(x, takes(t)), schedule, DATA, KEY)


def test_edms_network_as_it_is_gets_its_prediction_named():
    schedule = SCHEDULES["edm"]
    raw = as_network("edm", network(schedule), schedule, sigma_data=float(DATA.std()))
    with pytest.raises(ValueError, match="'edm'"):
        check_denoiser(raw, schedule, DATA, KEY)


def test_what_fits_nothing_is_said_to():
    schedule = SCHEDULES["vp_linear"]
    with pytest.raises(ValueError, match="fits no other convention: check the scale of the data"):
        check_denoiser(network(schedule), schedule, 10 * DATA, KEY)


def test_gaussian_data_pass_with_the_error_of_the_best_linear_prediction():
    data = 1 + 0.5 * jax.random.normal(KEY, (50, 64))
    denoise = gaussian(SCHEDULES["edm"], 1.0, 0.5).denoise
    np.testing.assert_allclose(check_denoiser(denoise, SCHEDULES["edm"], data, KEY).error, 1, rtol=0.05)


def test_states_that_are_pytrees_are_checked():
    schedule = SCHEDULES["edm"]
    denoise = network(schedule)
    fit = check_denoiser(lambda x, t: jax.tree.map(lambda a: denoise(a, t), x), schedule, {"a": DATA, "b": -DATA}, KEY)
    assert fit.error < 0.6


def test_bad_input():
    schedule, denoise = SCHEDULES["edm"], network(SCHEDULES["edm"])
    with pytest.raises(TypeError, match="denoise must be a function"):
        check_denoiser(None, schedule, DATA, KEY)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        check_denoiser(denoise, "edm", DATA, KEY)
    with pytest.raises(TypeError, match="data must be floating-point"):
        check_denoiser(denoise, schedule, np.arange(4), KEY)
    with pytest.raises(TypeError, match="key must be a JAX random key"):
        check_denoiser(denoise, schedule, DATA, 0)
    with pytest.raises(ValueError, match="data that vary"):
        check_denoiser(denoise, schedule, np.ones((2, 64), np.float32), KEY)
    with pytest.raises(ValueError, match="needs noise of the order of the data"):
        check_denoiser(denoise, schedule, 1e6 * DATA, KEY)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_of_the_schedule_passes(name):
    for shape in ((1, 2), (4, 8, 8, 3), {"a": (2, 3), "b": (2, 5)}):
        check_noise(SCHEDULES[name], SCHEDULES[name].noise(KEY, shape))


def test_noise_of_another_scale_is_an_error():
    unit = jax.random.normal(KEY, (4, 8, 8, 3))
    with pytest.raises(ValueError, match=r"x_T has a root mean square of .*pure noise of this schedule has 80"):
        check_noise(SCHEDULES["edm"], unit)
    with pytest.raises(ValueError, match=r"schedule.noise\(key, shape\)"):
        check_noise(SCHEDULES["vp_linear"], 80 * unit)
