"""The samples of the schedulers of Hugging Face's diffusers, and the differences that docs/solvers.md lists.

`data/golden_diffusers.npz` holds what diffusers 0.42.1 (Apache-2.0) computed with torch 2.13. How to make it again:

* In a copy of its folder of schedulers every float32 is replaced by float64 (`torch.float32`, `np.float32` and
  `.float()`), and torch's default dtype is float64. Nothing else is changed.
* The data are normal, of standard deviation s = 0.5, about -1 and about 1 in each coordinate. Their exact noise
  prediction, the network, is sigma (x - alpha tanh(alpha x / v)) / v with v = s^2 alpha^2 + sigma^2. It is computed at
  the noise level of the scheduler's call (`sigmas[step_index]`, for DDIM and PNDM `alphas_cumprod[timestep]`), not at
  its timestep, which some schedulers round. EDM's schedulers get the raw network of the same data prediction, flow
  schedulers the noise less the data prediction.
* `x_T`, of shape (2, 3), is the first state where the scheduler's state is alpha x_0 + sigma noise. Where it is divided
  by alpha so is `x_T`; for EDM it is multiplied by the first sigma.
* `noise[i]` stands in for the noise of call i.
* The betas are scaled_linear, 0.00085 to 0.012. The options are the schedulers' own defaults but for `steps_offset` 1,
  `clip_sample` False, `use_..._sigmas` and `timestep_spacing` as the grid is named, and what the solver's name says.
  The last sigma is "sigma_min" on linspace/9 and linspace/27 and "zero" elsewhere. `set_alpha_to_one` is False on
  "leading" and True on "leading to 0". DPMSolverSinglestepScheduler has `lower_order_final` True. "full" is
  `lower_order_final` False, and "euler" `euler_at_final` True beside that. The tau of SASolverScheduler is constant but
  for "interval", its default. "karras before 0" is the state before the last step. IPNDMScheduler has `trained_betas`,
  in truth sigmas, of the timesteps 901, 801, ..., 1, 0 and gets v. "flow" has `shift` or `flow_shift` 3;
  FlowMatchEulerDiscreteScheduler gets `sigmas` from 1 to 0.1 on flow/10 and none on "flow shifted again".

`runs` are the names of the `samples`, solver/grid/steps: `SOLVERS` and `GRIDS` below say what they are here, and the
schedulers are those of like names (`plms` and `pndm` are PNDMScheduler, `sa` is SASolverScheduler, and so on).
`grid/...` is sigma / alpha at the calls of a run, and at its end where the scheduler holds it, for flows sigma.
`timesteps/...` is what DPMSolverMultistepScheduler ("multistep") and EulerDiscreteScheduler give the network.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import betaincinv

import evodiff_jax as ed
from evodiff_jax import quadrature

s, g = ed.solvers, ed.grids
GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden_diffusers.npz"))
SAMPLES = dict(zip(GOLDEN["runs"].tolist(), GOLDEN["samples"], strict=True))
STD = 0.5
# The largest found is 1.5e-14, of 27 steps. The schedulers cancel digits, in 1 - alphas_cumprod and 1 - exp(-2 h), and
# divide by alpha = 0.07 at the first call.
ROUND_OFF = 5e-14

# -- the grids

BETAS = ed.schedules.scaled_linear_betas()
LOWEST, NO_NOISE = (ed.schedules.discrete(BETAS, t_min=t_min) for t_min in (0.0, -1.0))
EDM, FLOW = ed.schedules.edm(0.0, 80.0), ed.schedules.flow(3.0, 0.0, 1.0)
SPACES = {"discrete": LOWEST, "edm": EDM, "flow": FLOW}


def to_0(times):
    """As most schedulers end: with a step from the lowest level to sigma = 0."""
    return NO_NOISE, np.append(times, -1.0)


def beta_of_sigma(count):
    """Sigmas at equal quantiles of a beta distribution over sigma."""
    high, low = np.exp(-LOWEST.levels(np.array([999.0, 0.0])).lambda_)
    return g.from_sigmas(LOWEST, low + (high - low) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, count)))


def flow_of_unipc(count):
    """The first sigma is lowered by 1e-6, and the last one before 0 is the shift of a step above 1 / 1000."""
    sigma = FLOW.sigma(np.linspace(1, 1e-3, count + 1)[:-1])
    sigma[0] -= 1e-6
    return g.from_sigmas(FLOW, np.append(sigma / (1 - sigma), 0.0))


# By their names in the golden data: the schedule and the times. Where N counts the calls and not the steps between the
# levels, the grid has N - 1 steps and one to sigma = 0 after them.
GRIDS = {
    **{f"leading/{n}": (LOWEST, g.leading(LOWEST, n, 1)) for n in (10, 20)},
    "leading to 0/10": (NO_NOISE, g.leading(NO_NOISE, 10, 1)),
    **{f"trailing/{n}": (NO_NOISE, g.trailing(NO_NOISE, n)) for n in (10, 12, 20)},
    **{f"linspace/{n}": (LOWEST, g.time_uniform(LOWEST, n)) for n in (9, 27)},  # of which 999 is a multiple
    "linspace to 0/10": to_0(g.time_uniform(LOWEST, 9)),
    "karras/10": to_0(g.karras(LOWEST, 9)),
    "karras before 0/10": (LOWEST, g.karras(LOWEST, 9)),
    "exponential/10": to_0(g.exponential(LOWEST, 9)),
    # A single-step solver of order k makes k calls in a step, where the scheduler counts each as one.
    **{f"exponential by {k}/7": to_0(g.exponential(LOWEST, 6)[::k]) for k in (1, 2, 3)},
    "beta/10": to_0(beta_of_sigma(10)),
    "beta of time/10": to_0(g.beta(LOWEST, 9)),
    "edm/10": (EDM, np.append(g.karras(ed.schedules.edm(), 9), 0.0)),
    "flow/10": (FLOW, g.time_uniform(FLOW, 10)),
    "flow shifted again/10": (FLOW, np.append(np.linspace(1, FLOW.sigma(1e-3), 10), 0.0)),
    "flow from 0.999/9": (FLOW, g.time_uniform(FLOW, 9, start=0.999)),
    "flow unipc/9": (FLOW, flow_of_unipc(9)),
}

# -- the solvers

FORMS = [(1, "midpoint"), *((order, variant) for order in (2, 3) for variant in ("midpoint", "heun"))]
LAST = {"full": {"lower_order_final": False}, "euler": {"lower_order_final": False, "euler_at_final": True}}
FEW = {"variant": "few_steps"}


def started_between(t):
    """The default tau of the scheduler, 1 for the steps of linspace/9 that start at timesteps from 200 to 800."""
    return 1.0 * ((t + 111 >= 200) & (t + 111 <= 800))


def ended_between(t):
    return 1.0 * ((t >= 200) & (t <= 800))


# By their names in the golden data. The orders of LMS and DEIS are numbers of outputs there.
SOLVERS = {
    **{"ddim": s.ddim(), "ddim eta 0.5": s.ddim(0.5), "ddim eta 1.0": s.ddim(1.0)},
    **{"euler": s.euler(), "euler_ancestral": s.euler_ancestral(), "heun": s.heun(), "dpm_2": s.dpm_2()},
    **{"lms 1": s.ddim(), **{f"lms {o}": s.deis(o - 1) for o in (2, 3, 4)}},
    **{"deis 1": s.ddim(), **{f"deis {o}": s.deis(o - 1, "log-rho-AB", True) for o in (2, 3)}},
    **{f"deis {o} full": s.deis(o - 1, "log-rho-AB") for o in (2, 3)},
    **{"ipndm": s.ipndm(4), "plms": s.ipndm(4, start="heun"), "pndm": s.ipndm(4, start="runge-kutta")},
    **{f"dpm_solver {o} {v}": s.dpm_solver(o, variant=v) for o, v in FORMS},
    **{f"dpm_solver_pp {o} {v}": s.dpm_solver_pp(o, variant=v) for o, v in FORMS},
    **{f"dpm_solver_pp {o} {v} {n}": s.dpm_solver_pp(o, variant=v, **LAST[n]) for o, v in FORMS for n in LAST},
    **{f"dpm_solver_pp {o} {v} singlestep": s.dpm_solver_pp(o, "singlestep", False, variant=v) for o, v in FORMS},
    **{f"sde_dpm_solver_pp {o} {v}": s.sde_dpm_solver_pp(o, variant=v) for o, v in FORMS},
    **{f"unipc {o} {v} {p}": s.unipc(o, v, p) for o in (1, 2, 3) for v in ("bh1", "bh2") for p in ("data", "epsilon")},
    **{f"sa {p} {c} 1.0": s.sa_solver(p, c, **FEW) for p in (1, 2, 3, 4) for c in (1, 2, 3, 4)},
    **{"sa 2 2 0.0": s.sa_solver(tau=0.0, **FEW), "sa 2 2 interval": s.sa_solver(tau=started_between, **FEW)},
}


def with_turned_sign(schedule, times, variant):
    """SDE-DPM-Solver++ of order 3 with -1/2 for 1/2 in the weight of the second difference."""
    table, levels = s.sde_dpm_solver_pp(3, variant=variant).table(schedule, times), schedule.levels(times)
    orders = quadrature.multistep_orders(times, 3, True, False, levels.sigma[-1])
    second = quadrature.weights(quadrature.past_nodes(quadrature.finite(levels.lambda_), 3), [0.0, 0.0, 1.0])
    extra = levels.alpha[1:, None] * quadrature.by_order(orders, [[0.0], [0.0], second], 3)
    return table._replace(predictor=table.predictor - extra)


TURNED = {
    f"sde_dpm_solver_pp 3 {v}": ed.Solver("turned", functools.partial(with_turned_sign, variant=v))
    for v in ("midpoint", "heun")
}
# Runs that ours differs from: the largest difference over the largest value, our solver or grid where it is not that of
# the same name, and the solver that gives theirs where there is one. Against NaN there is no difference.
DIFFER = {
    "ddim/trailing/12": (7.38e-4, None, None),
    "lms 4/karras/10": (5.36e-4, None, None),
    "plms/leading to 0/10": (1.25e-2, None, None),
    "unipc 2 bh1 data/trailing/10": (np.nan, None, None),
    **{
        f"dpm_solver_pp {o} {v}/linspace/27": (amount, None, s.dpm_solver_pp(o, variant=v, **LAST["full"]))
        for (o, v), amount in zip(FORMS[1:], (4.38e-2, 5.69e-2, 6.25e-2, 6.24e-2), strict=True)
    },
    "deis 3/linspace/27": (2.92e-2, None, SOLVERS["deis 3 full"]),
    "dpm_solver_pp 3 midpoint singlestep/exponential by 3/7": (2.40e-2, None, None),
    "sa 2 2 1.0/linspace/9": (5.49e-2, s.sa_solver(), SOLVERS["sa 2 2 1.0"]),
    "sa 2 2 interval/linspace/9": (0.177, s.sa_solver(tau=ended_between, **FEW), SOLVERS["sa 2 2 interval"]),
    "sde_dpm_solver_pp 3 midpoint/linspace/9": (0.112, None, TURNED["sde_dpm_solver_pp 3 midpoint"]),
    "sde_dpm_solver_pp 3 heun/linspace/9": (0.114, None, TURNED["sde_dpm_solver_pp 3 heun"]),
    "sde_dpm_solver_pp 3 midpoint/karras/10": (0.350, None, TURNED["sde_dpm_solver_pp 3 midpoint"]),
    "sde_dpm_solver_pp 3 heun/karras/10": (0.354, None, TURNED["sde_dpm_solver_pp 3 heun"]),
    "euler/beta/10": (0.139, "beta of time/10", s.euler()),
    "euler/flow shifted again/10": (1.19e-2, "flow/10", s.euler()),
}

# -- the comparison


def denoise(schedule, x, t):
    """The exact data prediction."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variance = STD**2 * alpha**2 + sigma**2
    return (STD**2 * alpha * x + sigma**2 * jnp.tanh(alpha * x / variance)) / variance


def ours(schedule, cases):
    """The results of (grid, solver), in one compiled program. A hook adds the noise of the golden data."""
    plans = [ed.plan(*GRIDS[grid], solver, max_calls=30) for grid, solver in cases]
    amounts = [np.zeros(30) if plan.table.noise is None else plan.table.noise for plan in plans]
    plans = [dataclasses.replace(plan, table=plan.table._replace(noise=None)) for plan in plans]
    x_T = [GOLDEN["x_T"] * (GRIDS[grid][1][0] if schedule is EDM else 1) for grid, _ in cases]
    noise = jnp.pad(GOLDEN["noise"], [(0, 30 - len(GOLDEN["noise"])), (0, 0), (0, 0)])

    def run(plan, amount, x_T):
        def add_noise(x, t, index, key):
            row = jnp.where(index < 0, plan.calls, index) - 1  # the one that is over
            return x + jnp.where(row < 0, 0, amount[row]) * noise[row]

        return ed.sample(functools.partial(denoise, schedule), x_T, plan, on_state=add_noise)

    return jax.jit(jax.vmap(run))(ed.stack(plans), np.array(amounts), np.array(x_T))


def relative(x, key):
    return np.max(np.abs(x - SAMPLES[key])) / np.max(np.abs(SAMPLES[key]))


# How many runs are to agree and to differ; some do both.
COUNTS = {"discrete": (138, 17), "edm": (9, 0), "flow": (10, 1)}


@pytest.mark.parametrize("space", SPACES)
def test_samples_are_those_of_diffusers_but_for_the_differences_on_purpose(space, x64):
    schedule, same, differ = SPACES[space], {}, {}
    for key in SAMPLES:
        name, grid = key.split("/", 1)
        if schedule is not (LOWEST if GRIDS[grid][0] is NO_NOISE else GRIDS[grid][0]):  # they differ in their end
            continue
        solver = theirs = SOLVERS.get(name)
        if key in DIFFER:
            _, other, theirs = DIFFER[key]
            differ[key] = (other, solver) if isinstance(other, str) else (grid, other or solver)
        elif name in TURNED:
            theirs = TURNED[name]
        if theirs is not None:
            same[key] = grid, theirs
    assert (len(same), len(differ)) == COUNTS[space]
    results = ours(schedule, [*same.values(), *differ.values()])
    errors = {key: relative(x, key) for key, x in zip(same, results, strict=False)}
    assert not {key: error for key, error in errors.items() if not error < ROUND_OFF}
    for key, x in zip(differ, results[len(same) :], strict=True):
        assert np.isfinite(x).all(), key
        assert relative(x, key) == pytest.approx(DIFFER[key][0], rel=0.02, nan_ok=True), key


@pytest.mark.parametrize("name", [key.removeprefix("grid/") for key in GOLDEN if key.startswith("grid/")])
def test_grids_are_those_of_diffusers(name):
    schedule, times = GRIDS[name]
    levels, expected = schedule.levels(times), GOLDEN[f"grid/{name}"]
    sigma = levels.sigma if schedule is FLOW else levels.sigma / levels.alpha
    assert len(expected) >= len(times) - 1
    np.testing.assert_allclose(sigma[: len(expected)], expected, rtol=2e-14, atol=0)


def test_the_times_that_networks_get():
    """The scheduler rounds those between timesteps, or interpolates log(sigma / alpha) between them, not the angle."""
    times = g.karras(LOWEST, 9)
    np.testing.assert_array_equal(np.round(times), GOLDEN["timesteps/multistep karras/10"])
    assert np.abs(times - GOLDEN["timesteps/euler karras/10"]).max() == pytest.approx(6.6e-3, rel=0.02)


def test_the_multistep_schedulers_round_linspace_and_have_a_leading_grid_of_their_own():
    np.testing.assert_array_equal(np.round(g.time_uniform(LOWEST, 10))[:-1], GOLDEN["timesteps/multistep linspace/10"])
    assert np.abs(g.time_uniform(LOWEST, 10)[:-1] - GOLDEN["timesteps/multistep linspace/10"]).max() > 0.4
    leading = GOLDEN["timesteps/multistep leading/10"]
    np.testing.assert_array_equal(leading, 1000 // (10 + 1) * np.arange(10, 0, -1) + 1)
    assert leading[-1] == 91
    assert g.leading(LOWEST, 10, 1)[-2] == 1


def test_heun_of_flows_integrates_the_velocity_there_and_the_noise_here():
    """FlowMatchHeunDiscreteScheduler starts at alpha = 0, where the noise says nothing about the data."""
    with pytest.raises(ValueError, match="alpha is 0 at times"):
        ed.plan(*GRIDS["flow/10"], s.heun())
