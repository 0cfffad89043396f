"""Whole sampling loops of public releases, run by this library's solvers on this library's ports of their networks.

Two kinds are no solvers of the library and are written here with its extension interface: Euler's method in the time of
a schedule, as EDM's ablation has it, is a table; guided-diffusion's ancestral sampling with a variance that the network
predicts is a loop around `update`.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import evodiff_jax as ed
from evodiff_jax import pretrained
from evodiff_jax.numerics import enable_x64
from evodiff_jax.tables import Solver, Table

EDM = ed.schedules.edm(0.0, 100.0)  # the noise level for time, down to 0


class Loop:
    """One stored loop: its facts, the network, and the noise that it was run with."""

    def __init__(self, name):
        path = networks.DATA / "samplers" / f"{name}.json"
        self.facts = json.loads(path.read_text())
        self.stored = dict(np.load(path.with_suffix(".npz")))
        self.arguments, inputs = self.facts["arguments"], self.facts["inputs"]
        self.labels = None if inputs["labels"] is None else np.array(inputs["labels"])

    def model(self, key="network", stored=np.float64, **settings):
        folder, name = self.facts[key].removeprefix("networks/").removesuffix(".json").split("/")
        case = networks.Case(folder, name)
        return pretrained.from_state(case.family, case.cls, case.arguments | settings, case.arrays(stored))

    def drawn(self, name, dtype=np.float64):
        return networks.nhwc(networks.normal(f"input:{name}", (2, 3, 16, 16)).astype(np.float32)).astype(dtype)


def run_in_float64(loop, schedule, times, solver, noise_of_row=None):
    """Samples of EDM's loops, whose state is x_0 + sigma noise or that times alpha, and the levels of the calls."""
    with enable_x64():
        model = loop.model()
        edm_denoise = model.denoiser(model.params, loop.labels)
        plan = ed.plan(schedule, times, solver)

        def denoise(x, t):
            alpha, kappa = schedule.alpha(t), schedule.sigma(t) / schedule.alpha(t)
            return edm_denoise(x / alpha, kappa)

        hook = None
        if noise_of_row is not None:
            amounts = jnp.asarray(plan.table.noise)
            plan = dataclasses.replace(plan, table=plan.table._replace(noise=None))
            noise = jnp.stack([loop.drawn(f"noise_{i}") for i in noise_of_row])

            def hook(x, t, index, key):
                row = jnp.where(index < 0, plan.calls, index) - 1  # the one that is over
                return x + jnp.where(row < 0, 0, amounts[row]) * noise[row]

        x_T = float(schedule.sigma(times[0])) * loop.drawn("latents")
        called = schedule.levels(plan.table.time)
        return jax.jit(lambda x_T: ed.sample(denoise, x_T, plan, on_state=hook))(x_T), called.sigma / called.alpha


def check(loop, x, levels):
    np.testing.assert_allclose(levels, loop.stored["sigmas"], rtol=1e-9)
    assert networks.error(x, networks.nhwc(loop.stored["out64"])) < 1e-9


def edm_steps(loop):
    return np.append(ed.grids.karras(loop.model(stored=np.float32).schedule, loop.arguments["num_steps"] - 1), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_heun_18", "vp_heun_edm_steps_12"])
def test_edm_heun(name):
    loop = Loop(name)
    check(loop, *run_in_float64(loop, EDM, edm_steps(loop), ed.solvers.heun()))


@pytest.mark.slow
def test_edm_heun_on_the_noise_levels_of_iddpm():
    loop = Loop("iddpm_heun_8")
    u = networks.Case("edm", "iddpm_adm_cond").stored["const:u"].astype(np.float64)
    rounded = [u[np.argmin(np.abs(u - sigma))] for sigma in edm_steps(loop)]
    check(loop, *run_in_float64(loop, EDM, np.array(rounded), ed.solvers.heun()))


def test_edm_heun_with_churn():
    loop = Loop("edm_stochastic_10")
    a = loop.arguments
    solver = ed.solvers.heun(s_churn=a["S_churn"], s_tmin=a["S_min"], s_tmax=a["S_max"], s_noise=a["S_noise"])
    # The noise with which a step starts is added at the end of the step before, in its second row.
    noise_of_row = [min(row // 2 + 1, a["num_steps"] - 1) for row in range(2 * a["num_steps"] - 1)]
    check(loop, *run_in_float64(loop, EDM, edm_steps(loop), solver, noise_of_row))


@pytest.mark.slow
def test_the_ablation_with_heun_on_the_noise_levels_of_iddpm():
    loop = Loop("ablation_iddpm_heun_8")
    times = np.append(loop.stored["sigmas"][::2], 0.0)  # two calls a step, at its start and its end
    check(loop, *run_in_float64(loop, EDM, times, ed.solvers.heun()))


def euler_in_time(kappa_derivative, log_alpha_derivative):
    """Euler's method for dx/dt = (kappa'/kappa + alpha'/alpha) x - alpha kappa'/kappa m, with kappa = sigma / alpha."""

    def table(schedule, times):
        alpha, sigma, _ = schedule.levels(times[:-1])
        rate, step = kappa_derivative(times[:-1], sigma / alpha) * alpha / sigma, np.diff(times)
        return Table(
            time=times[:-1],
            transition=1 + step * (rate + log_alpha_derivative(times[:-1])),
            predictor=(-step * rate * alpha)[:, None],
            corrector=np.zeros((len(step), 1)),
        )

    return Solver("euler_in_time", table, keeps_constants=False)


@pytest.mark.slow
def test_the_ablation_with_euler_in_the_time_of_vp():
    loop = Loop("ablation_vp_euler_16")
    schedule = ed.schedules.vp_linear(0.1, 20.0, t_min=0.0)
    beta = lambda t: 0.1 + 19.9 * t
    solver = euler_in_time(lambda t, kappa: beta(t) / 2 * (kappa + 1 / kappa), lambda t: -beta(t) / 2)
    check(loop, *run_in_float64(loop, schedule, np.append(np.linspace(1.0, 1e-3, 16), 0.0), solver))


@pytest.mark.slow
def test_the_ablation_with_euler_in_the_time_of_ve():
    loop = Loop("ablation_ve_euler_16")
    schedule = ed.NoiseSchedule(lambda t: 0 * t + 1, lambda t: t**0.5, t_min=0.0, t_max=100.0**2)
    solver = euler_in_time(lambda t, kappa: 0.5 / kappa, lambda t: 0 * t)
    times = 100.0**2 * (0.02 / 100.0) ** (2 * np.arange(16) / 15)
    check(loop, *run_in_float64(loop, schedule, np.append(times, 0.0), solver))


# guided-diffusion


def guided_diffusion(loop):
    """Model, denoiser with clipped predictions, schedule down to no noise, and the gradient of the classifier."""
    model = loop.model(stored=np.float32, noise_schedule=loop.arguments["noise_schedule"])
    denoise = ed.denoisers.clip(model.denoiser(model.params, loop.labels))
    log_prob = None
    if loop.facts["classifier"] is not None:
        guide = loop.model("classifier", np.float32, noise_schedule=loop.arguments["noise_schedule"])
        log_prob = guide.log_prob(guide.params, loop.labels)
    return model, denoise, dataclasses.replace(model.schedule, t_min=-1.0), log_prob


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adm_ddim10", "adm_ddim10_guided"])
def test_ddim(name):
    loop = Loop(name)
    _, denoise, schedule, log_prob = guided_diffusion(loop)
    if log_prob is not None:
        scale = loop.arguments["classifier_scale"]
        denoise = ed.denoisers.classifier_guidance(denoise, log_prob, schedule, scale)
    times = ed.grids.leading(schedule, 10, start=900.0)
    np.testing.assert_array_equal(times[:-1], loop.stored["timesteps"])
    plan = ed.plan(schedule, times, ed.solvers.ddim())
    x = jax.jit(functools.partial(ed.sample, denoise))(loop.drawn("latents", np.float32), plan)
    np.testing.assert_allclose(x, networks.nhwc(loop.stored["out32"]), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adm_ancestral_8", "adm_ancestral_8_guided"])
def test_ancestral_sampling_with_a_predicted_variance(name):
    loop = Loop(name)
    model, _, schedule, log_prob = guided_diffusion(loop)
    times = np.append(loop.stored["timesteps"], -1.0)
    plan = ed.plan(schedule, times, ed.solvers.ddim(1.0))  # whose mean is that of the posterior of DDPM
    plan = dataclasses.replace(plan, table=plan.table._replace(noise=None))
    signal = np.square(schedule.levels(times).alpha)
    beta = 1 - signal[:-1] / signal[1:]
    posterior = beta * (1 - signal[1:]) / (1 - signal[:-1])
    posterior[-1] = posterior[-2]  # whose own is 0, with the logarithm of which nothing can be mixed

    @jax.jit
    def step(state, i, noise):
        time = jnp.full(2, state.t)
        output = model.apply(model.params, x=state.x, timesteps=time, y=loop.labels)
        eps, mix = output[..., :3], (output[..., 3:] + 1) / 2
        alpha, sigma = schedule.alpha(state.t), schedule.sigma(state.t)
        variance = jnp.exp(mix * jnp.log(jnp.float32(beta))[i] + (1 - mix) * jnp.log(jnp.float32(posterior))[i])
        after = ed.update(state, jnp.clip((state.x - sigma * eps) / alpha, -1, 1), plan)
        x = after.x
        if log_prob is not None:
            gradient = jax.grad(lambda x: log_prob(x, state.t).sum())(state.x)
            x = x + variance * loop.arguments["classifier_scale"] * gradient
        return dataclasses.replace(after, x=x + jnp.where(i == 7, 0, jnp.sqrt(variance)) * noise)

    state = ed.init(loop.drawn("latents", np.float32), plan)
    for i in range(8):
        state = step(state, i, loop.drawn(f"noise_{i}", np.float32))
    np.testing.assert_allclose(state.x, networks.nhwc(loop.stored["out32"]), atol=2e-4)
