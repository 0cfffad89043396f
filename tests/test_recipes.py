"""Every line and block of code of docs/recipes.md runs, and does what it says.

`test_recipes_live.py` has the blocks that need other libraries.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture
from flax import nnx

import evodiff_jax as ed
from evodiff_jax.testing import as_network

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|]+?) \| `(.+)` \|$", PAGE, re.MULTILINE))

VP, EDM = SCHEDULES["vp_linear"], SCHEDULES["edm"]
FLOW = ed.schedules.flow()
SHIFTED = ed.schedules.flow(3.0)
DISCRETE = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
CUMPROD = np.cumprod(1 - ed.schedules.scaled_linear_betas())
KEY = jax.random.key(0)
SHAPE = (4, 4, 4, 2)
LABEL, NULL = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.zeros(4)
SCALES = jnp.array([0.0, 1.0, 2.0, 3.0])
X = jnp.asarray(np.random.default_rng(5).standard_normal(SHAPE), jnp.float32)


def conditional(x, t, label):
    return jnp.tanh(x) * (1 + label[:, None, None, None]) + t


def guided(scale):
    scale = jnp.reshape(scale, (-1, 1, 1, 1))
    return lambda x, t: conditional(x, t, NULL) + scale * (conditional(x, t, LABEL) - conditional(x, t, NULL))


def names(schedule=VP, network=None):
    """What stands for the reader's own in a row."""
    denoise = mixture(schedule)
    finite = schedule.t_max < 500
    times = ed.grids.log_snr(schedule, 5) if finite else ed.grids.time_uniform(schedule, 5)
    solver = ed.solvers.variance_optimal()
    return {
        "ed": ed,
        "eqx": eqx,
        "jax": jax,
        "jnp": jnp,
        "schedule": schedule,
        "params": 1.0,
        "network": network,
        "denoise": denoise,
        "conditional": conditional,
        "label": LABEL,
        "null_label": NULL,
        "prompt": LABEL,
        "negative_prompt": NULL,
        "scales": SCALES,
        "log_prob": lambda x, t: -jnp.sum(x**2, axis=(1, 2, 3)),
        "alphas_cumprod": CUMPROD,
        "my_hook": lambda x, t: jnp.clip(x, -1, 1),
        "image": jnp.clip(X, -1, 1),
        "known_mask": np.arange(4)[:, None, None] < 2,
        "other_x_T": initial_state(schedule, SHAPE, seed=7),
        "denoise_both": lambda x, t: {"image": denoise(x["image"], t), "audio": jnp.tanh(x["audio"])},
        "audio_T": initial_state(schedule, (4, 9)),
        "sizes": [],
        "key": KEY,
        "x_T": initial_state(schedule, SHAPE),
        "times": times,
        "solver": solver,
        "plan": ed.plan(schedule, times, solver),
    }


def run(have, **context):
    found = names(**context)
    exec(ROWS[have], found)
    return found


# ---- each row's own check


def predicts(prediction, schedule=VP, **how):
    """The row's denoiser is the exact model, for a network that predicts and takes what the row says."""
    to_t = how.get("to_t", lambda t: t)
    sign = how.get("sign", 1)

    def check(have):
        inner = as_network(prediction, mixture(schedule), schedule)

        def network(params, x, t):
            if "time_shape" in how:
                assert t.shape == how["time_shape"]
                t = t[0]
            return params * sign * inner(x, to_t(t))

        denoise = run(have, schedule=schedule, network=network)["denoise"]
        x = schedule.sigma(schedule.t_max) * X
        for fraction in (0.9, 0.5, 0.2):
            t = round(schedule.t_min + fraction * (schedule.t_max - schedule.t_min), 0 if schedule is DISCRETE else 1)
            t = jnp.float32(t)
            np.testing.assert_allclose(denoise(x, t), mixture(schedule)(x, t), rtol=2e-3, atol=2e-3)

    return check


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.shape[-1])(x) + t


class Nnx(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def __call__(self, x, t):
        return self.dense(x) + t


class Equinox(eqx.Module):
    """A module that holds functions, which `jax.jit` refuses as an argument."""

    mlp: eqx.nn.MLP

    def __call__(self, x, t):
        return self.mlp(jnp.append(x, t).ravel()).reshape(x.shape)


def library(module):
    def check(have):
        found = names()
        found["module"] = module
        exec(ROWS[have], found)

        @jax.jit
        def sample(params, x_T):
            return ed.sample(lambda x, t: found["network"](params, x, t), x_T, found["plan"])

        assert np.isfinite(sample(found["params"], found["x_T"])).all()
        assert len(jax.tree.leaves(found["params"])) > 0

    return check


def denoises(expected):
    def check(have):
        denoise = run(have)["denoise"]
        for t in (0.2, 0.9):
            t = jnp.float32(t)
            np.testing.assert_allclose(denoise(X, t), expected(X, t), rtol=1e-4, atol=1e-4)

    return check


def in_interval(x, t):
    kappa = VP.sigma(t) / VP.alpha(t)
    return jnp.where((kappa > 0.2) & (kappa <= 5.0), guided(4.0)(x, t), conditional(x, t, LABEL))


def rescaled(x, t):
    plain, std = guided(4.0)(x, t), lambda a: jnp.std(a, axis=(1, 2, 3), keepdims=True)
    return 0.7 * plain * std(conditional(x, t, LABEL)) / std(plain) + 0.3 * plain


def by_classifier(x, t):
    return mixture(VP)(x, t) - VP.sigma(t) ** 2 / VP.alpha(t) * 2 * x


def by_percentile(x, t):
    m = mixture(VP)(x, t)
    s = jnp.maximum(jnp.percentile(jnp.abs(m), 99.5, axis=(1, 2, 3), keepdims=True), 1)
    return jnp.clip(m, -s, s) / s


def is_schedule(t, alpha, sigma):
    def check(have):
        schedule = run(have)["schedule"]
        np.testing.assert_allclose([schedule.alpha(t), schedule.sigma(t)], [alpha, sigma], rtol=1e-6, atol=1e-9)

    return check


def is_times(schedule, expected):
    def check(have):
        found = run(have, schedule=schedule)
        np.testing.assert_allclose(found["times"], expected, rtol=1e-9)
        plan = ed.plan(schedule, found["times"], found["solver"])
        assert np.isfinite(ed.sample(mixture(schedule), initial_state(schedule, SHAPE), plan)).all()

    return check


def samples(expected, schedule=VP):
    """The row's x is that of `expected`, a function of the names."""

    def check(have):
        found = run(have, schedule=schedule)
        before = names(schedule)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found["x"], expected(before))

    return check


def plain(n, x_T=None, **options):
    return ed.sample(n["denoise"], n["x_T"] if x_T is None else x_T, n["plan"], **options)


def of_last_steps(n):
    x_T = VP.add_noise(n["image"], n["times"][2], KEY)
    return ed.sample(n["denoise"], x_T, ed.plan(VP, n["times"][2:], n["solver"]))


def inpaints(have):
    found = run(have)
    np.testing.assert_array_equal(found["x"][:, :2], found["image"][:, :2])
    assert np.abs(found["x"] - found["image"])[:, 2:].max() > 0.1


def inverts(have):
    """On many steps, so that the way back is the way up."""
    found = names(EDM)
    found["times"] = ed.grids.log_snr(EDM, 100, start=10.0, end=0.1)
    found["image"] = ed.sample(found["denoise"], found["x_T"] / 8, ed.plan(EDM, found["times"], found["solver"]))
    exec(ROWS[have], found)
    back = ed.sample(found["denoise"], found["x_T"], ed.plan(EDM, found["times"], ed.solvers.heun()))
    np.testing.assert_allclose(back, found["image"], atol=0.02)


def of_pytrees(solver):
    def expected(n):
        parts = {"image": n["x_T"], "audio": n["audio_T"]}
        return jax.jit(lambda parts: ed.sample(n["denoise_both"], parts, ed.plan(VP, n["times"], solver)))(parts)

    return samples(expected)


def in_bfloat16(have):
    assert run(have)["x"].dtype == jnp.bfloat16


def donates(have):
    found = run(have)
    assert found["x_T"].is_deleted()
    np.testing.assert_allclose(found["x"], plain(names()), rtol=1e-3, atol=1e-4)


def counts(have):
    found = run(have)
    jax.effects_barrier()
    assert found["sizes"] == [4] * 5


# ---- the rows, in the order of the page

CHECKS = {
    "the data x_0": predicts("data"),
    "the noise eps": predicts("epsilon"),
    "v = alpha eps - sigma x_0": predicts("v"),
    "the flow velocity eps - x_0, t = 1 at the noise": predicts("velocity", FLOW),
    "the flow velocity x_0 - eps, t = 1 at the data": predicts("velocity", FLOW, to_t=lambda t: 1 - t, sign=-1),
    "the score": predicts("score"),
    "EDM's raw F(x, c_noise)": predicts("edm"),
    "sigma": predicts("data", SHIFTED, to_t=lambda sigma: sigma / (3 - 2 * sigma)),
    "the nearest index 0 ... 999, with `schedules.discrete`": predicts(
        "epsilon", DISCRETE, to_t=lambda i: jnp.asarray(i, jnp.float32)
    ),
    "1000 t": predicts("epsilon", to_t=lambda t: t / 1000),
    "one number a sample, (B,)": predicts("epsilon", time_shape=(4,)),
    "Flax linen": library(Linen()),
    "Flax NNX": library(Nnx()),
    "Equinox, any module": library(Equinox(eqx.nn.MLP(33, 32, 8, 1, key=KEY))),
    "a class label": denoises(lambda x, t: conditional(x, t, LABEL)),
    "classifier-free guidance": denoises(guided(4.0)),
    "a negative prompt": denoises(guided(4.0)),
    "a scale for each sample": denoises(guided(SCALES)),
    "guidance at the noise levels .2 to 5 only": denoises(in_interval),
    "less contrast from guidance": denoises(rescaled),
    "two evaluations of B samples, not one of 2 B": denoises(guided(4.0)),
    "a classifier of noisy images": denoises(by_classifier),
    "that of Stable Diffusion 1, 2, XL": is_schedule(500.0, np.sqrt(CUMPROD[500]), np.sqrt(1 - CUMPROD[500])),
    "given as alphas_cumprod": is_schedule(500.0, np.sqrt(CUMPROD[500]), np.sqrt(1 - CUMPROD[500])),
    "one with zero terminal SNR": is_schedule(999.0, 0.0, 1.0),
    "that of Stable Diffusion 3": is_schedule(0.5, 0.25, 0.75),
    "that of Flux": is_schedule(0.5, 1 / (1 + np.exp(1.15)), 1 / (1 + np.exp(-1.15))),
    "that of EDM": is_schedule(2.0, 1.0, 2.0),
    "that of score SDEs": is_schedule(0.5, 1.0, np.sqrt(0.01 * 50)),
    "your own log(alpha / sigma)": is_schedule(0.5, np.sqrt(0.5), np.sqrt(0.5)),
    "your own alpha and sigma": is_schedule(0.5, np.cos(0.5), np.sin(0.5)),
    "your own, decreasing": is_times(VP, [1.0, 0.7, 0.4, 0.2, 0.05, 0.001]),
    "given as noise levels sigma / alpha": is_times(EDM, [80.0, 20.0, 5.0, 1.0, 0.2, 0.02]),
    "DDIM's for discrete models": is_times(DISCRETE, [*np.arange(951, 0, -50), 0]),
    "those for zero terminal SNR": is_times(DISCRETE, [*np.arange(999, 0, -50), 0]),
    "for a part of the schedule": is_times(VP, ed.grids.log_snr(VP, 10, start=0.6, end=0.01)),
    "keep the data prediction in -1 ... 1": denoises(lambda x, t: jnp.clip(mixture(VP)(x, t), -1, 1)),
    "dynamic thresholding": denoises(by_percentile),
    "any function of x_0 and t": samples(lambda n: ed.sample(ed.denoisers.clip(n["denoise"]), n["x_T"], n["plan"])),
    "any function of x_t and t, a callback": samples(
        lambda n: plain(n, on_state=lambda x, t, index, key: jnp.clip(x, -1, 1))
    ),
    "end with the data prediction, for one more model call": samples(
        lambda n: n["denoise"](plain(n), jnp.float32(n["times"][-1]))
    ),
    "count the model calls": counts,
    "image-to-image, the last 60 % of the steps": samples(of_last_steps),
    "inpainting: keep the image where `known_mask` is True": inpaints,
    "inversion: the noise that an image comes from": inverts,
    "interpolation between two samples": samples(
        lambda n: plain(n, ed.editing.slerp(n["other_x_T"], n["x_T"], 0.5)),
    ),
    "a pytree": of_pytrees(ed.solvers.variance_optimal()),
    "a pytree with one choice of coefficients for all parts": of_pytrees(
        ed.solvers.evodiff(channel_axis=None, per_leaf=False)
    ),
    "in bfloat16": in_bfloat16,
    "overwritten by the result, to save memory": donates,
}


def test_every_row_has_its_check():
    assert list(CHECKS) == list(ROWS)
    tables = re.findall(r"^\| [^|]+ \| Code \|\n\| --- \| --- \|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert sum(table.count("\n") for table in tables) == len(ROWS)  # no row that the pattern of ROWS overlooks


@pytest.mark.parametrize("have", ROWS)
def test_a_row(have):
    CHECKS[have](have)


# ---- the blocks of the page, one after the other, each section with its check


def blocks(page):
    """(heading, code) of each section that has code."""
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if code:
            yield section.split("\n")[0], "\n".join(code)


def of_the_reader():
    """The names in the blocks that stand for the reader's own."""
    return {
        "network": lambda params, x, t: 2 * params * VP.sigma(t) * x,  # exact for standard normal data
        "params": jnp.float32(0.5),
        "denoise": mixture(VP),
        "loss": lambda x: jnp.mean(x**2),
        "data": np.random.default_rng(6).standard_normal((32, 4, 4, 2)).astype(np.float32),
        "betas": ed.schedules.scaled_linear_betas(),
        "discrete": DISCRETE,
    }


def run_blocks(after, headings=None):
    """Runs the blocks of the page, or of some sections, and after each section `after(heading, names)`."""
    found = of_the_reader()
    for heading, code in blocks(PAGE.split("\n## Networks of other libraries\n")[0]):
        if headings is not None and heading not in headings:
            continue
        if heading in ("Gradients", "Many devices"):
            # Gradients of a rule take long to compile; `test_rules` and `test_transformations` have them.
            found["plan"] = ed.plan(VP, found["times"], ed.solvers.unipc(2))
        exec(compile(code, heading, "exec"), found)
        after(heading, found)
    return found


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


def of_network(n, plan, **options):
    denoise = ed.denoisers.from_prediction(lambda x, t: n["network"](n["params"], x, t), VP, "epsilon")
    return ed.sample(denoise, n["x_T"], plan, **options)


def check_start(n):
    assert int(n["plan"].calls) == 10
    assert np.std(n["x_T"]) == pytest.approx(1, abs=0.1)


def check_steps(n):
    assert n["run"]._cache_size() == 1
    close(n["x"], of_network(n, ed.plan(VP, ed.grids.karras(VP, 20), ed.solvers.unipc(2))))


def check_stack(n):
    assert n["side_by_side"].shape == (3, 16, 4, 4, 2)
    close(n["side_by_side"][2], of_network(n, ed.plan(VP, ed.grids.log_snr(VP, 10), ed.solvers.unipc(2))))


def check_keys(n):
    close(n["again"], n["x"][2:3])
    assert np.abs(n["x"][2] - n["x"][3]).max() > 0.1


def check_loop(n):
    close(n["x"], ed.sample(n["denoise"], n["x_T"], n["plan"]), atol=1e-4)


def check_trace(n):
    trace, rows = n["trace"], len(n["times"]) - 1
    np.testing.assert_allclose(trace.times, n["times"], rtol=1e-6)
    assert trace.states.shape == (rows + 1, 16, 4, 4, 2)
    np.testing.assert_array_equal(trace.states[-1], n["x"])
    assert trace.rule["zeta"].shape == (rows, 16, 2)


def check_gradients(n):
    direction, step = jax.random.normal(KEY, n["x_T"].shape), 1e-3  # a sample must not change its cluster
    run = jax.jit(lambda x_T: n["loss"](ed.sample(n["denoise"], x_T, n["plan"])))
    up, down = (float(run(n["x_T"] + sign * step * direction)) for sign in (1, -1))
    assert float(jnp.vdot(n["gradient"], direction)) == pytest.approx((up - down) / (2 * step), rel=0.02)
    times, step = np.asarray(n["times"]), 2e-3
    moved = [jnp.asarray(times + sign * step * (np.arange(times.size) == 3), jnp.float32) for sign in (-1, 1)]
    assert n["slope"].shape == times.shape
    difference = float(n["error"](moved[1]) - n["error"](moved[0])) / (2 * step)
    assert float(n["slope"][3]) == pytest.approx(difference, rel=0.2, abs=1e-3)


def check_devices(n):
    assert n["x"].sharding.is_equivalent_to(n["split"], 5)
    assert len(n["x"].addressable_shards) == jax.device_count()
    close(n["x"], of_network(n, n["plan"]))
    close(n["y"], of_network(n, ed.plan(VP, n["times"], ed.solvers.sa_solver()), key=n["run_keys"]))


def check_export(n):
    assert isinstance(n["content"], bytes | bytearray)
    close(n["x"], of_network(n, ed.plan(VP, ed.grids.karras(VP, 12), ed.solvers.unipc(2))))


def check_refused(n):
    for mistake, call in n["refused"].items():
        try:
            call()
        except ValueError:
            continue
        pytest.fail(f"{mistake}: accepted")


def check_reading(n):
    assert n["fit"].error == pytest.approx(1, abs=0.1)
    assert "use denoisers.from_prediction(fn, schedule, 'epsilon')" in n["advice"]


BLOCKS = {
    "Recipes": check_start,
    "Other steps, grids and solvers without compiling again": check_steps,
    "Several solvers in one program": check_stack,
    "Random keys, one a sample": check_keys,
    "A loop of your own": check_loop,
    "The states on the way": check_trace,
    "Gradients": check_gradients,
    "Many devices": check_devices,
    "Export": check_export,
    "Is the network read as it was trained?": check_reading,
    "Silent traps": check_refused,
}


@pytest.mark.slow
def test_the_blocks_of_the_recipes():
    seen = []

    def check(heading, found):
        seen.append(heading)
        BLOCKS[heading](found)

    run_blocks(check)
    assert seen == list(BLOCKS)


@pytest.mark.slow
def test_the_recipe_for_many_devices_on_four():
    """In a process of its own, whose CPU JAX takes for four devices."""
    code = """
        import test_recipes

        def check(heading, found):
            if heading == "Many devices":
                assert len(found["x"].addressable_shards) == 4
                assert found["x"].addressable_shards[0].data.shape == (4, 4, 4, 2)
                test_recipes.check_devices(found)
                print("checked")
                raise SystemExit

        needed = ["Recipes", "Other steps, grids and solvers without compiling again", "Random keys, one a sample"]
        test_recipes.run_blocks(check, [*needed, "Many devices"])
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert result.stdout == "checked\n", result.stderr[-3000:]
