"""What holds for linear solvers beside what `check_solver` checks: few steps, last steps, ends of schedules, errors."""

from math import factorial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax import quadrature
from evodiff_jax.numerics import on_host

s = ed.solvers

# Every deterministic form, with its order on grids whose steps change smoothly.
SA_ORDERS = ((1, 0), (1, 2), (1, 4), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 0), (3, 4), (4, 0), (4, 2), (4, 4))
FAMILIES = (("dpm_solver", s.dpm_solver), ("dpm_solver_pp", s.dpm_solver_pp))
MULTISTEP = {
    "ddim": (s.ddim(), 1),
    **{f"{name} {o}": (make(o), min(o, 2)) for name, make in FAMILIES for o in (1, 2, 3)},
    **{f"{name} 3 exact": (make(3, exact_curvature=True), 3) for name, make in FAMILIES},
    **{f"{name} {o} heun": (make(o, variant="heun"), 2) for name, make in FAMILIES for o in (2, 3)},
    "dpm_solver_pp 3 full": (s.dpm_solver_pp(3, lower_order_final=False), 2),
    "dpm_solver_pp 3 euler": (s.dpm_solver_pp(3, lower_order_final=False, euler_at_final=True), 2),
    **{
        f"unipc {o} {variant} {outputs}": (s.unipc(o, variant, outputs), o + 1)
        for o in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for outputs in ("data", "epsilon")
    },
    "unipc 3 full": (s.unipc(3, lower_order_final=False), 4),
    **{f"deis {o} {v}": (s.deis(o, v), o + 1) for o in (1, 2, 3) for v in ("rho-AB", "t-AB", "log-rho-AB")},
    "deis 3 lower": (s.deis(3, "t-AB", lower_order_final=True), 4),
    **{f"ipndm {o}": (s.ipndm(o), min(o, 2)) for o in (1, 2, 3, 4)},
    **{f"ipndm_v {o}": (s.ipndm_v(o), min(o, 3)) for o in (1, 2, 3, 4)},
    **{f"sa_solver {p} {c}": (s.sa_solver(p, c, 0.0), min(c, p + 1) if c else p) for p, c in SA_ORDERS},
    "sa_solver 2 2 few_steps": (s.sa_solver(2, 2, 0.0, variant="few_steps"), 2),
}
SINGLESTEP = {
    **{f"{name} {o}S": (make(o, "singlestep"), o) for name, make in FAMILIES for o in (2, 3)},
    **{f"{name} {o}S heun": (make(o, "singlestep", variant="heun"), o) for name, make in FAMILIES for o in (2, 3)},
    "dpm_solver_pp 3S full": (s.dpm_solver_pp(3, "singlestep", lower_order_final=False), 3),
    "ipndm 4 from heun": (s.ipndm(4, start="heun"), 2),
    "ipndm 4 from runge-kutta": (s.ipndm(4, start="runge-kutta"), 2),
    "ipndm 2 from runge-kutta": (s.ipndm(2, True, True, start="runge-kutta"), 2),
    "heun": (s.heun(), 2),
    "heun euler": (s.heun(lower_order_final=True), 2),
    "dpm_2": (s.dpm_2(), 2),
}
ORDERED = MULTISTEP | SINGLESTEP
ALL = {name: solver for name, (solver, _) in ORDERED.items()}
DATA = {
    name: solver for name, solver in ALL.items() if solver.table(SCHEDULES["edm"], np.array([1.0, 0.1])).history is None
}


def run_all(solvers, denoise, x_T, runs):
    """{(solver, run): x}, all in one compiled call; runs are {name: (schedule, times)}."""
    keys = [(name, run) for name in solvers for run in runs]
    plans = [ed.plan(*runs[run], solvers[name]) for name, run in keys]
    x = jax.jit(jax.vmap(lambda plan: ed.sample(denoise, x_T, plan)))(ed.stack(plans))
    return dict(zip(keys, x, strict=True))


@pytest.mark.fast
def test_a_constant_model_gives_its_constant_on_every_grid_and_at_every_number_of_steps(x64):
    schedule = ed.schedules.edm(0.0, 80.0)
    runs = {f"time_uniform {n}": (schedule, ed.grids.time_uniform(schedule, n)) for n in (1, 2, 3, 4, 5, 9)}
    for n in (1, 2, 3, 7):
        ends = np.append(ed.grids.karras(SCHEDULES["edm"], n), 0.0)
        runs[f"karras {n}"] = schedule, ends
    x_T = initial_state(schedule, (2, 3), jnp.float64)
    constant = np.array([0.3, -2.0, 5.0])
    for key, x in run_all(ALL, lambda x, t: jnp.broadcast_to(constant, x.shape), x_T, runs).items():
        np.testing.assert_allclose(x, np.broadcast_to(constant, x.shape), rtol=1e-9, err_msg=str(key))


def test_sigma_ending_at_0_lands_on_the_last_data_prediction_in_float32():
    schedule = ed.schedules.edm(0.0, 80.0)
    runs = {n: (schedule, np.append(ed.grids.log_snr(SCHEDULES["edm"], n), 0.0)) for n in (1, 2, 3, 6)}
    x_T = initial_state(schedule, (3, 4, 4, 2))
    for key, x in run_all(ALL, mixture(schedule), x_T, runs).items():
        assert np.isfinite(x).all(), key
        if key[0].startswith(("ddim", "dpm_solver_pp")):  # others overshoot in two or three steps from 80
            assert np.max(np.abs(x)) < 4, key


@pytest.mark.parametrize("order", [2, 3])
def test_with_fewer_steps_than_its_order_a_solver_lowers_it(order, x64):
    schedule = SCHEDULES["vp_linear"]
    pairs = []
    for steps in range(1, order):
        times = ed.grids.log_snr(schedule, steps)
        for family in (s.dpm_solver, s.dpm_solver_pp, s.unipc, s.ipndm, s.ipndm_v, s.deis):
            if family is s.deis and steps == order - 1 == 1:
                continue  # its degree 0 is ddim
            lower = s.ddim() if family is s.deis and steps == 1 else family(max(steps - (family is s.deis), 1))
            pairs.append([ed.plan(schedule, times, which) for which in (family(order), lower)])
    x_T, denoise = initial_state(schedule, (3, 4, 4, 2), jnp.float64), mixture(schedule)
    run = jax.jit(jax.vmap(lambda plan: ed.sample(denoise, x_T, plan)))
    x = run(ed.stack([plan for pair in pairs for plan in pair]))
    chex.assert_trees_all_close(x[::2], x[1::2], rtol=1e-10)


@pytest.mark.fast
@pytest.mark.parametrize("name", list(MULTISTEP))
def test_multistep_solvers_call_the_model_once_a_step(name):
    for steps in (1, 2, 5, 8):
        times = ed.grids.log_snr(SCHEDULES["vp_linear"], steps)
        np.testing.assert_array_equal(MULTISTEP[name][0].table(SCHEDULES["vp_linear"], times).time, times[:-1])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("solver", "calls"),
    [
        (s.dpm_solver(2, "singlestep"), {1: 1, 2: 3, 5: 9}),
        (s.dpm_solver(3, "singlestep"), {1: 1, 2: 3, 3: 6, 5: 12}),
        (s.dpm_solver_pp(3, "singlestep", lower_order_final=False), {1: 3, 5: 15}),
        (s.dpm_solver_pp(3, "singlestep", lower_order_final=False, euler_at_final=True), {1: 1, 5: 13}),
        (s.ipndm(4, start="heun"), {1: 2, 2: 3, 5: 6}),
        (s.ipndm(4, start="heun", euler_at_final=True), {1: 1, 2: 3, 5: 6}),
        (s.ipndm(4, start="runge-kutta"), {1: 4, 2: 8, 3: 12, 5: 14}),
        (s.ipndm(4, start="runge-kutta", lower_order_final=True), {3: 3, 4: 7, 5: 11, 6: 15}),
        (s.ipndm(2, start="runge-kutta"), {1: 4, 2: 5, 5: 8}),
        (s.heun(), {1: 2, 5: 10}),
        (s.heun(lower_order_final=True), {1: 1, 5: 9}),
        (s.dpm_2(), {1: 2, 5: 10}),
    ],
)
def test_the_calls_of_single_step_solvers(solver, calls):
    for steps, expected in calls.items():
        plan = ed.plan(SCHEDULES["edm"], ed.grids.karras(SCHEDULES["edm"], steps), solver)
        assert int(plan.calls) == expected
        assert (np.diff(plan.table.time) <= 0).all()


@pytest.mark.parametrize("end", [0.0, 0.002])
def test_a_last_step_to_sigma_0_costs_heun_one_call_less(end):
    schedule = ed.schedules.edm(end)
    times = ed.grids.time_quadratic(schedule, 5)
    for solver in (s.heun(), s.dpm_2()):
        assert ed.plan(schedule, times, solver).calls == (9 if end == 0 else 10)


@pytest.mark.fast
def test_the_options_for_the_last_steps_mean_the_same_everywhere():
    """lower_order_final: step i of N has order at most N + 1 - i; euler_at_final: the last step is DDIM's."""
    schedule = SCHEDULES["vp_linear"]
    times = ed.grids.karras(schedule, 8)
    ddim = s.ddim().table(schedule, times)

    def used(table):
        return [int(np.flatnonzero(np.append(1.0, row[1:])).max()) + 1 for row in table.predictor]

    for family, highest in ((s.dpm_solver, 3), (s.dpm_solver_pp, 3), (s.unipc, 3), (s.ipndm, 4), (s.ipndm_v, 4)):
        full = family(highest, lower_order_final=False).table(schedule, times)
        assert used(full) == [min(highest, i + 1) for i in range(8)]
        lowered = family(highest, lower_order_final=True).table(schedule, times)
        assert used(lowered) == [min(highest, i + 1, 8 - i) for i in range(8)]
        euler = family(highest, lower_order_final=False, euler_at_final=True).table(schedule, times)
        assert used(euler) == [*(min(highest, i + 1) for i in range(7)), 1]
        if euler.history is None:
            np.testing.assert_allclose(euler.predictor[-1, 0], ddim.predictor[-1, 0])
            np.testing.assert_allclose(euler.transition[-1], ddim.transition[-1])


# One of each family and method, of its highest order: what traced tables are made of.
HIGHEST = {
    name: ALL[name]
    for name in (
        *("ddim", "dpm_solver 3", "dpm_solver 3 exact", "dpm_solver_pp 3 euler", "unipc 3 bh1 data"),
        *("unipc 3 bh2 epsilon", "deis 3 rho-AB", "deis 3 lower", "ipndm 4", "ipndm_v 4", "sa_solver 4 4"),
        *("sa_solver 2 0", "dpm_solver 3S", "dpm_solver_pp 2S", "dpm_solver_pp 3S full", "heun euler", "dpm_2"),
        *("dpm_solver_pp 3 heun", "dpm_solver_pp 3S heun", "deis 3 log-rho-AB", "sa_solver 2 2 few_steps"),
        "ipndm 4 from runge-kutta",
    )
}


@pytest.mark.slow
def test_tables_of_traced_times_that_end_at_sigma_0_have_finite_gradients():
    schedule = ed.schedules.edm(0.0, 80.0)
    times = jnp.asarray(ed.grids.time_quadratic(schedule, 6), jnp.float32)
    solvers = [ALL[name] for name in ("dpm_solver_pp 3", "unipc 3 bh2 data", "deis 3 lower", "heun")]

    def totals(times):
        tables = [ed.plan(schedule, times, solver).table for solver in solvers]
        return jnp.stack([sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(table)) for table in tables])

    gradients = jax.jit(jax.jacrev(totals))(times)[:, :-1]
    assert np.isfinite(gradients).all()
    assert (gradients != 0).all()


def test_samples_of_traced_times_that_end_at_sigma_0_have_finite_gradients():
    schedule, solver = ed.schedules.edm(0.0, 80.0), s.heun()
    x_T, times = initial_state(schedule, (3, 4)), ed.grids.time_quadratic(schedule, 6)

    def run(times):
        x = ed.sample(lambda x, t: jnp.tanh(x), x_T, ed.plan(schedule, times, solver))
        return jnp.sum(x), x

    gradient, x = jax.jit(jax.grad(run, has_aux=True))(jnp.asarray(times, jnp.float32))
    chex.assert_trees_all_close(x, run(times)[1], rtol=1e-3)
    assert np.isfinite(gradient[:-1]).all()


@pytest.mark.parametrize(
    ("times", "solvers"),
    [
        ([80.0, 0.0], HIGHEST),
        pytest.param([80.0, 5.0, 0.5, 0.0], ALL, marks=pytest.mark.slow),
    ],
    ids=["one step", "three steps of all forms"],
)
def test_traced_times_that_end_at_sigma_0_give_the_samples_of_concrete_ones(times, solvers, x64):
    """Rows that only traced times keep, for calls at sigma = 0, change nothing. The plans are made in one program."""
    schedule, x_T = ed.schedules.edm(0.0, 80.0), initial_state(ed.schedules.edm(), (2, 3), jnp.float64)
    make = lambda times: {name: ed.plan(schedule, times, solver, max_calls=12) for name, solver in solvers.items()}
    traced, concrete = jax.jit(make)(np.array(times)), make(times)
    for name in solvers:
        x, expected = run_wide(x_T, traced[name]), run_wide(x_T, concrete[name])
        np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9, err_msg=name)


@jax.jit
def run_wide(x_T, plan):
    """Of unit normal data. Compiled once for all plans of one memory."""
    return ed.sample(lambda x, t: x / (1 + t**2), x_T, plan)


@pytest.mark.parametrize("solver", [s.ddim(), s.heun(), s.dpm_2()], ids=lambda solver: solver.name)
def test_one_step_to_sigma_0_is_the_model_at_its_start(solver):
    """Also where times are traced, for which a second call is made in vain."""
    schedule = ed.schedules.edm(0.0)
    run = lambda times: run_wide(jnp.full((1, 1), 80.0), ed.plan(schedule, times, solver, max_calls=2))
    for x in (run([80.0, 0.0]), jax.jit(run)(jnp.array([80.0, 0.0]))):
        np.testing.assert_allclose(x, 80 / (1 + 80**2), rtol=1e-3)  # 0.0125


WHOLE_FLOW = ed.schedules.flow(t_min=0.0, t_max=1.0)
# Each with the order at which the variance of its samples converges.
STOCHASTIC = {
    "ddim 1": (s.ddim(1.0), 1),
    "ddim 0.5": (s.ddim(0.5), 1),
    **{f"sde_dpm_solver_pp {o}": (s.sde_dpm_solver_pp(o), min(o, 2)) for o in (1, 2, 3)},
    "sde_dpm_solver_pp 2 of tau": (s.sde_dpm_solver_pp(2, 0.5), 2),
    "sde_dpm_solver_pp 2 heun": (s.sde_dpm_solver_pp(2, variant="heun"), 2),
    "sa_solver": (s.sa_solver(), 3),
    "sa_solver few_steps": (s.sa_solver(variant="few_steps"), 2),
    "sa_solver 3 4 of tau": (s.sa_solver(3, 4, 0.8), 2),  # as its first and last steps are
    "sa_solver of tau of t": (s.sa_solver(2, 2, lambda t: 0.0 + (t > 0.1)), 2.5),  # tau jumps within a step
    "heun churned": (s.heun(s_churn=10.0), 2),
    "heun churned in a range": (s.heun(s_churn=40.0, s_tmin=0.05, s_tmax=10.0), 2),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", [*DATA, *STOCHASTIC])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_tables_from_alpha_0_to_sigma_0_are_finite_and_made_without_warnings(name, steps):
    """NumPy's warnings are errors in these tests."""
    solver, _ = (ORDERED | STOCHASTIC)[name]
    for schedule in (ed.schedules.edm(0.0), WHOLE_FLOW):
        if solver.name == "heun" and schedule is WHOLE_FLOW:
            continue  # it works with noise predictions
        table = ed.plan(schedule, ed.grids.time_uniform(schedule, steps), solver).table
        chex.assert_tree_all_finite(table)
        assert solver.name == "heun" or table.transition[-1] == 0  # the last data prediction is all that is left


@pytest.mark.fast
def test_zero_terminal_snr_is_for_data_prediction_solvers():
    """alpha = 0 at t_max: the data prediction solvers start there, the noise prediction solvers say that they can't."""
    schedule = ed.NoiseSchedule(lambda t: 1.0 - t, lambda t: t, t_min=0.01, t_max=1.0)
    times = ed.grids.time_uniform(schedule, 6)
    x_T = initial_state(schedule, (3, 4))
    plans = [ed.plan(schedule, times, solver) for solver in DATA.values()]
    x = jax.jit(jax.vmap(lambda plan: ed.sample(lambda x, t: jnp.tanh(x), x_T, plan)))(ed.stack(plans))
    assert np.isfinite(x).all()
    for name in set(ALL) - set(DATA):
        with pytest.raises(ValueError, match="alpha is 0 at times\\[0\\]"):
            ed.plan(schedule, times, ALL[name])


# -- what holds of the registry's forms, whatever they are


@pytest.mark.parametrize("name", s.FORMS)
def test_traced_times_mix_no_dtypes_and_no_ranks(name, strict_promotion):
    """Tracing tells; nothing is compiled."""
    schedule, key = SCHEDULES["vp_linear"], jax.random.key(0)

    def run(x_T, times):
        plan = ed.plan(schedule, times, s.FORMS[name].make(), max_calls=9, denoise_to_zero=True)
        return ed.sample(lambda x, t: x * t.astype(x.dtype), x_T, plan, key=key)

    for dtype in (jnp.float32, jnp.bfloat16):
        x_T = jax.ShapeDtypeStruct((2, 4, 4, 3), dtype)
        with jax.numpy_rank_promotion("raise"):
            x = jax.eval_shape(run, x_T, jax.ShapeDtypeStruct((5,), jnp.float32))
        assert (x.shape, x.dtype) == (x_T.shape, dtype)


def test_arrays_without_axes_are_options():
    assert s.ddim(jnp.float32(0.5)) is s.ddim(0.5)
    assert s.unipc(np.int64(3)) is s.unipc(3)
    assert s.dpm_solver_pp(np.array(2), "singlestep", np.bool_(False)) is s.dpm_solver_pp(2, "singlestep", False)
    assert s.evodiff(np.array(-1)) is s.evodiff()
    assert s.sa_solver(tau=np.float32(0.5)) is s.sa_solver(tau=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: s.ddim(v), "ddim needs a concrete eta, got the traced .*call ddim outside jax.jit"),
        (lambda v: s.heun(s_churn=v), "heun needs a concrete s_churn"),
        (lambda v: s.sde_dpm_solver_pp(2, v), "sde_dpm_solver_pp needs a concrete tau"),
        (lambda v: s.sa_solver(2, 2, v), "sa_solver needs a concrete tau"),
        (lambda v: s.unipc(v), "unipc needs a concrete order"),
        (lambda v: s.evodiff(v), "evodiff needs a concrete channel_axis"),
        (lambda v: s.ddim([0.5]), r"ddim needs a number for eta, got \[0.5\]"),
    ],
)
def test_traced_options_and_what_is_no_number_are_errors_that_name_them(make, message):
    with pytest.raises(TypeError, match=message):
        jax.jit(make)(1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_method_under_two_names_has_one_table(name):
    """Exact weights in lambda: of the noise prediction DEIS's in log kappa, of the data prediction SA-Solver's."""
    schedule = SCHEDULES[name]
    times = ed.grids.karras(schedule, 6)
    for one, other in (
        (s.dpm_solver(2, lower_order_final=False, variant="heun"), s.deis(1, "log-rho-AB")),
        (s.dpm_solver(3, "multistep", False, False, True, "heun"), s.deis(2, "log-rho-AB")),
        (s.dpm_solver_pp(3, exact_curvature=True, variant="heun"), s.sa_solver(3, 0, 0.0)),
        (s.sde_dpm_solver_pp(2, 0.7, variant="heun"), s.sa_solver(2, 0, 0.7)),
        (s.ipndm(1, start="heun"), s.ipndm(1)),
    ):
        chex.assert_trees_all_close(one.table(schedule, times), other.table(schedule, times), rtol=1e-10, atol=1e-14)


def test_euler_is_ddim_under_another_name():
    assert s.euler() is s.ddim()
    assert s.euler_ancestral() is s.ddim(1.0)


@pytest.mark.fast
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_phi_functions(k, x64):
    """Against their integrals, on both sides of the switch to the series."""
    z = np.concatenate([-np.logspace(-12, 1.5, 60), [0.0], np.logspace(-12, 1.5, 60), [-1.0, 1.0]])
    points, gauss = np.polynomial.legendre.leggauss(60)
    theta = (points + 1) / 2
    integral = np.sum(gauss / 2 * np.exp(z[:, None] * (1 - theta)) * theta ** (k - 1), axis=1)
    np.testing.assert_allclose(quadrature.phi(k, z), integral / factorial(k - 1), rtol=1e-11)
    np.testing.assert_allclose(quadrature.phi(k, jnp.asarray(z)), quadrature.phi(k, z), rtol=1e-11)
    gradient = jax.vmap(jax.grad(lambda z: quadrature.phi(k, z)))(jnp.asarray(z))
    assert np.isfinite(gradient).all()


@pytest.mark.fast
def test_weights_integrate_polynomials_exactly():
    rng = np.random.default_rng(0)
    nodes = [0.0, *-np.cumsum(rng.uniform(0.3, 2, 3))]
    moments = quadrature.exponential_moments(np.float64(-1.3), 4)
    w = quadrature.weights(nodes, moments)
    for power, moment in enumerate(moments):
        assert sum(a * node**power for a, node in zip(w, nodes, strict=True)) == pytest.approx(float(moment))
    assert on_host(lambda z: z, w).sum() == pytest.approx(1)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.dpm_solver(4), "dpm_solver needs an order of 1 to 3, got 4"),
        (lambda: s.dpm_solver_pp(0), "dpm_solver_pp needs an order of 1 to 3, got 0"),
        (lambda: s.dpm_solver_pp(2.0), "order of 1 to 3, got 2.0"),
        (lambda: s.dpm_solver_pp(True), "order of 1 to 3, got True"),
        (lambda: s.dpm_solver_pp(2, method="single"), "method to be one of 'multistep', 'singlestep', got 'single'"),
        (lambda: s.dpm_solver(2, variant="taylor"), "variant to be one of 'midpoint', 'heun', got 'taylor'"),
        (lambda: s.ipndm_v("4"), "order of 1 to 4, got '4'"),
        (lambda: s.sde_dpm_solver_pp(4), "order of 1 to 3, got 4"),
        (lambda: s.sde_dpm_solver_pp(2, variant="Heun"), "variant to be one of 'midpoint', 'heun', got 'Heun'"),
        (lambda: s.sde_dpm_solver_pp(2, -1.0), "tau >= 0, got -1.0"),
        (lambda: s.unipc(4), "order of 1 to 3, got 4"),
        (lambda: s.unipc(2, "bh3"), "variant to be one of 'bh1', 'bh2', got 'bh3'"),
        (lambda: s.unipc(2, prediction="noise"), "prediction to be one of 'data', 'epsilon', got 'noise'"),
        (lambda: s.deis(4), "order of 1 to 3, got 4"),
        (lambda: s.deis(2, "AB"), "variant to be one of 'rho-AB', 't-AB', 'log-rho-AB', got 'AB'"),
        (lambda: s.ipndm(5), "order of 1 to 4, got 5"),
        (lambda: s.ipndm(4, start="rk"), "start to be one of 'adams-bashforth', 'runge-kutta', 'heun', got 'rk'"),
        (lambda: s.sa_solver(variant="few"), "variant to be one of 'more_steps', 'few_steps', got 'few'"),
        (lambda: s.heun(s_churn=-1.0), "s_churn=-1.0"),
        (lambda: s.heun(s_tmin=2.0, s_tmax=1.0), "s_tmin <= s_tmax"),
        (lambda: s.sa_solver(5), "predictor needs an order of 1 to 4"),
        (lambda: s.sa_solver(2, 5), "corrector needs an order of 1 to 4"),
        (lambda: s.sa_solver(tau=-0.5), "tau >= 0 or a function of time, got -0.5"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
