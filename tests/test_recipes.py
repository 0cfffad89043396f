"""Every line of the README's table "I have ... so I write ..." runs, and does what it says."""

import re
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture, written_as
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import evodiff_jax as ed

README = Path(__file__).parents[1] / "README.md"
SECTION = README.read_text().split("## I have")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| ([^*|]+?) \| `(.+)` \|$", SECTION, re.MULTILINE))

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
    """What is yours in the table."""
    denoise = mixture(schedule)
    x_T = initial_state(schedule, SHAPE)
    finite = schedule.t_max < 500
    return {
        "ed": ed,
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
        "loss": lambda x: jnp.sum(x**2),
        "sharding_of_the_batch": NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")),
        "sizes": [],
        "key": KEY,
        "x_T": x_T,
        "times": ed.grids.log_snr(schedule, 5) if finite else ed.grids.time_uniform(schedule, 5),
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
        inner = written_as(prediction, mixture(schedule), schedule)

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
    weight: jax.Array

    def __call__(self, x, t):
        return x @ self.weight + t


def library(module):
    def check(have):
        found = names()
        found["module"] = module
        exec(ROWS[have], found)

        def sample(params, x_T):
            return ed.sample(
                lambda x, t: found["network"](params, x, t),
                x_T,
                ed.plan(VP, found["times"], ed.solvers.variance_optimal()),
            )

        jitted = (eqx.filter_jit if have == "Equinox" else jax.jit)(sample)
        assert np.isfinite(jitted(found["params"], found["x_T"])).all()
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
        x_T = initial_state(schedule, SHAPE)
        assert np.isfinite(
            ed.sample(mixture(schedule), x_T, ed.plan(schedule, found["times"], ed.solvers.variance_optimal()))
        ).all()

    return check


def samples(expected, schedule=VP):
    """The row's x is that of `expected`, a function of the names."""

    def check(have):
        found = run(have, schedule=schedule)
        before = names(schedule)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found["x"], expected(before))

    return check


def plain(n, x_T=None, **options):
    return ed.sample(
        n["denoise"],
        n["x_T"] if x_T is None else x_T,
        ed.plan(n["schedule"], n["times"], ed.solvers.variance_optimal()),
        **options,
    )


def inpaints(have):
    found = run(have)
    level = VP.sigma(VP.t_min)
    np.testing.assert_allclose(found["x"][:, :2], found["image"][:, :2], atol=5 * level)
    assert np.abs(found["x"] - found["image"])[:, 2:].max() > 0.1


def inverts(have):
    """On many steps, so that the way back is the way up."""
    found = names(EDM)
    found["times"] = ed.grids.log_snr(EDM, 100, start=10.0, end=0.1)
    found["image"] = ed.sample(
        found["denoise"], found["x_T"] / 8, ed.plan(EDM, found["times"], ed.solvers.variance_optimal())
    )
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


def differentiates(have):
    found = run(have)
    n = names()
    expected = jax.grad(lambda x: n["loss"](plain(n, x)))(n["x_T"])
    np.testing.assert_allclose(found["gradient"], expected, rtol=1e-3, atol=1e-4)


def donates(have):
    found = run(have)
    assert found["x_T"].is_deleted()
    np.testing.assert_allclose(found["x"], plain(names()), rtol=1e-3, atol=1e-4)


def counts(have):
    found = run(have)
    jax.effects_barrier()
    assert found["sizes"] == [4] * 5


CHECKS = {
    "the data x_0": predicts("data"),
    "the noise": predicts("epsilon"),
    "v = alpha eps - sigma x_0": predicts("v"),
    "flow velocity eps - x_0, t = 1 at the noise": predicts("velocity", FLOW),
    "flow velocity x_0 - eps, t = 1 at the data": predicts("velocity", FLOW, to_t=lambda t: 1 - t, sign=-1),
    "the score": predicts("score"),
    "EDM's raw F(x, c_noise)": predicts("edm"),
    "sigma for its time": predicts("data", SHIFTED, to_t=lambda sigma: sigma / (3 - 2 * sigma)),
    "the nearest index 0 ... 999": predicts("epsilon", DISCRETE, to_t=lambda i: jnp.asarray(i, jnp.float32)),
    "1000 t": predicts("epsilon", to_t=lambda t: t / 1000),
    "a time for each sample, (B,)": predicts("epsilon", time_shape=(4,)),
    "Flax linen": library(Linen()),
    "Flax NNX": library(Nnx()),
    "Equinox": library(Equinox(jnp.eye(2))),
    "a class label": denoises(lambda x, t: conditional(x, t, LABEL)),
    "classifier-free guidance": denoises(guided(4.0)),
    "a negative prompt": denoises(guided(4.0)),
    "a scale for each sample": denoises(guided(SCALES)),
    "guidance at some noise levels only": denoises(in_interval),
    "guidance that washes out": denoises(rescaled),
    "memory for one batch only": denoises(guided(4.0)),
    "a classifier of noisy images": denoises(by_classifier),
    "of Stable Diffusion 1, 2, XL": is_schedule(500.0, np.sqrt(CUMPROD[500]), np.sqrt(1 - CUMPROD[500])),
    "as alphas_cumprod": is_schedule(500.0, np.sqrt(CUMPROD[500]), np.sqrt(1 - CUMPROD[500])),
    "with zero terminal SNR": is_schedule(999.0, 0.0, 1.0),
    "of Stable Diffusion 3": is_schedule(0.5, 0.25, 0.75),
    "of Flux": is_schedule(0.5, 1 / (1 + np.exp(1.15)), 1 / (1 + np.exp(-1.15))),
    "of EDM": is_schedule(2.0, 1.0, 2.0),
    "of score SDEs": is_schedule(0.5, 1.0, np.sqrt(0.01 * 50)),
    "of my own, as a log-SNR": is_schedule(0.5, np.sqrt(0.5), np.sqrt(0.5)),
    "of my own, as alpha and sigma": is_schedule(0.5, np.cos(0.5), np.sin(0.5)),
    "of my own": is_times(VP, [1.0, 0.7, 0.4, 0.2, 0.05, 0.001]),
    "as noise levels sigma / alpha": is_times(EDM, [80.0, 20.0, 5.0, 1.0, 0.2, 0.02]),
    "of DDIM for discrete models": is_times(DISCRETE, [*np.arange(951, 0, -50), 0]),
    "for zero terminal SNR": is_times(DISCRETE, [*np.arange(999, 0, -50), 0]),
    "for a part of the schedule": is_times(VP, ed.grids.log_snr(VP, 10, start=0.6, end=0.01)),
    "images that leave -1 ... 1": denoises(lambda x, t: jnp.clip(mixture(VP)(x, t), -1, 1)),
    "images that saturate": denoises(by_percentile),
    "a function of x_0 and t": samples(
        lambda n: ed.sample(
            ed.denoisers.clip(n["denoise"]), n["x_T"], ed.plan(VP, n["times"], ed.solvers.variance_optimal())
        ),
    ),
    "a function of x_t and t": samples(lambda n: plain(n, on_state=n["my_hook"])),
    "to change, 60 % of the steps": samples(
        lambda n: ed.sample(
            n["denoise"],
            VP.add_noise(n["image"], n["times"][2], KEY),
            ed.plan(VP, n["times"][2:], ed.solvers.variance_optimal()),
        )
    ),
    "with a part to fill in": inpaints,
    "whose noise I want": inverts,
    "and another, and what is between": samples(
        lambda n: plain(n, ed.editing.slerp(n["other_x_T"], n["x_T"], 0.5)),
    ),
    "that is a pytree": of_pytrees(ed.solvers.evodiff()),
    "whose parts EVODiff weighs together": of_pytrees(ed.solvers.evodiff(channel_axis=None, per_leaf=False)),
    "in bfloat16": in_bfloat16,
    "with gradients in little memory": differentiates,
    "in the memory of x_T": donates,
    "on many devices": samples(plain),
    "and count network evaluations": counts,
}


def test_every_line_has_its_check():
    lines = [line for line in SECTION.splitlines() if line.startswith("|") and "**" not in line][2:]
    assert len(lines) == len(ROWS)
    assert list(CHECKS) == list(ROWS)


@pytest.mark.parametrize("have", ROWS)
def test_a_line_of_the_table(have):
    CHECKS[have](have)
