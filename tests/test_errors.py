"""Bad input: every error is raised while tracing, before anything is compiled, and says what was wrong with what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES

import evodiff_jax as ed

pytestmark = pytest.mark.fast

EDM, VP = SCHEDULES["edm"], SCHEDULES["vp_linear"]
ZERO_SNR = ed.schedules.flow(t_max=1.0)
TIMES = ed.grids.log_snr(EDM, 4)
KEY = jax.random.key(0)
X = np.ones((3, 4, 4, 2), np.float32)
LABEL = np.arange(3)
d, e, g, s = ed.denoisers, ed.editing, ed.grids, ed.solvers


def good(x, t):
    return 0.5 * x


def conditional(x, t, c):
    return x + c[:, None, None, None]


UNIPC = s.unipc()


def sample(denoise=good, x_T=X, times=TIMES, schedule=EDM, solver=UNIPC, **options):
    return lambda: ed.sample(denoise, x_T, ed.plan(schedule, times, solver), **options)


def predicted(fn, prediction="epsilon", schedule=VP, **options):
    return lambda: d.from_prediction(fn, schedule, prediction, **options)(X, 0.5)


def guided(condition=LABEL, null=LABEL, scale=2.0, fn=conditional, **options):
    return lambda: d.classifier_free_guidance(fn, condition, null, scale, **options)(X, 0.5)


def inpainted(known=X, mask=X > 0, schedule=EDM, key=KEY):
    def run():
        denoise, on_state = e.inpaint(good, known, mask, schedule, key=key)
        return denoise(on_state(X, 0.5, 0, None), 0.5)

    return run


T, V = TypeError, ValueError

# what is called: (the call, the error, what its message says: the argument, what it got, what it accepts)
BAD = {
    # the initial state
    "integer x_T": (sample(x_T=np.ones((3, 4), int)), T, "x_T must be floating-point, got int"),
    "complex x_T": (sample(x_T=np.ones((3, 4), complex)), T, "x_T must be floating-point, got complex"),
    "scalar x_T": (sample(x_T=np.float32(1.0)), V, "x_T must have a batch axis in front, got a scalar"),
    "no x_T": (sample(x_T=None), T, "x_T must be an array or a pytree of arrays, got None"),
    "text for x_T": (sample(x_T="noise"), T, "x_T must be an array or a pytree of arrays, got a leaf 'noise'"),
    "leaves of different batches": (sample(x_T=[X, X[:2]]), V, r"same batch axis in front, got sizes \[2, 3\]"),
    # times, schedule, solver
    "increasing times": (sample(times=TIMES[::-1]), V, r"times must be strictly decreasing.*times\[0\] = 0.002"),
    "a time twice": (sample(times=[2.0, 1.0, 1.0]), V, r"strictly decreasing.*times\[1\] = 1.0 and times\[2\] = 1.0"),
    "times above": (
        sample(times=[100.0, 1.0]),
        V,
        "times must lie within the schedule's 0.002 to 80.0, got 1.0 to 100",
    ),
    "times below": (sample(times=[1.0, 0.0]), V, "times must lie within the schedule's 0.002 to 80.0, got 0.0 to 1.0"),
    "NaN times": (sample(times=[1.0, np.nan]), V, "times must be finite"),
    "one time": (sample(times=[1.0]), V, r"times must be N \+ 1 >= 2 times in one dimension, .*got shape \(1,\)"),
    "times in a matrix": (sample(times=[[2.0, 1.0]]), V, r"in one dimension, .*got shape \(1, 2\)"),
    "a number of steps for times": (sample(times=10), V, r"times must be N \+ 1 >= 2 times.*got shape \(\)"),
    "no schedule": (sample(schedule=None), T, "schedule must be a NoiseSchedule, for example schedules.edm.*got None"),
    "an uncalled schedule": (sample(schedule=ed.schedules.edm), T, "schedule must be a NoiseSchedule"),
    "an uncalled solver": (
        sample(solver=s.evodiff),
        T,
        r"solver must be a Solver.*solvers.dpm_solver_pp\(2\) returns, got",
    ),
    "a name for a solver": (sample(solver="ddim"), T, "solver must be a Solver.*got 'ddim'"),
    "no key": (sample(solver=s.ddim(1.0)), V, r"stochastic: pass key, for example jax.random.key\(0\)"),
    "no key for the SDE": (sample(solver=s.sde_dpm_solver_pp()), V, "stochastic: pass key"),
    "noise prediction without signal": (
        sample(times=g.time_uniform(ZERO_SNR, 4), schedule=ZERO_SNR, solver=s.dpm_solver()),
        V,
        r"alpha is 0 at times\[0\].*use a data-prediction one",
    ),
    "a schedule for a plan": (lambda: ed.sample(good, X, EDM), T, "plan must be a Plan, from evodiff_jax.plan"),
    "times for a plan": (lambda: ed.sample(good, X, TIMES), T, "plan must be a Plan, from evodiff_jax.plan"),
    "text for remat": (sample(remat="yes"), T, "remat must be True or False, got 'yes'"),
    "text for a channel axis": (lambda: s.evodiff("c"), T, "channel_axis must be an integer or None, got 'c'"),
    "text for a sigma": (lambda: ed.schedules.edm("0.1"), T, "edm needs a number for sigma_min, got '0.1'"),
    "a list for x_T": (sample(x_T=[[1.0, 2.0]]), T, "x_T must be an array or a pytree of arrays, got a leaf 1.0"),
    "joint inner products of channels": (
        lambda: s.evodiff(channel_axis=-1, per_leaf=False),
        V,
        "per_leaf=False sums over the whole sample and takes channel_axis=None, got channel_axis=-1",
    ),
    "an axis there is not": (sample(solver=s.evodiff(7)), V, r"channel_axis=7 is not an axis .* \(3, 4, 4, 2\)"),
    # networks
    "no denoiser": (sample(denoise=None), T, r"denoise must be a function denoise\(x, t\) -> x_0, got None"),
    "an array for a hook": (sample(on_state=X), T, r"on_state must be a function on_state\(x, t, index, key\) -> x"),
    "parameters for a network": (predicted({"w": 1}), T, r"fn must be a function fn\(x, time\), got {'w': 1}"),
    "denoise returns nothing": (sample(lambda x, t: None), T, r"denoise\(x, t\) must return .*returned NoneType"),
    "denoise returns another shape": (
        sample(lambda x, t: x[:2]),
        V,
        r"the shape of x, \(3, 4, 4, 2\), it returned \(2",
    ),
    "denoise returns one channel": (sample(lambda x, t: x[..., :1]), V, r"\(3, 4, 4, 2\), it returned \(3, 4, 4, 1\)"),
    "denoise returns integers": (sample(lambda x, t: x.astype(int)), T, "floating-point.*it returned an array of int"),
    "denoise returns a pair": (sample(lambda x, t: (x, x)), T, "of structure .*it returned tuple"),
    "the network returns nothing": (predicted(lambda x, t: None), T, "the network.*must return .*returned NoneType"),
    "the network returns another shape": (predicted(lambda x, t: x[..., :1]), V, r"it returned \(3, 4, 4, 1\)"),
    "the network learns sigma too": (
        predicted(lambda x, t: jnp.concatenate([x, x], -1)),
        V,
        r"returned \(3, 4, 4, 4\)",
    ),
    "a hook returns nothing": (
        sample(on_state=lambda *_: None),
        T,
        r"on_state\(x, t, index, key\) must return .*NoneType",
    ),
    "a hook returns another shape": (sample(on_state=lambda x, *_: x[0]), V, r"on_state.*it returned \(4, 4, 2\)"),
    # predictions and times of networks
    "an unknown prediction": (
        predicted(good, "noise"),
        V,
        "unknown prediction 'noise': choose one of 'data', 'epsilon'",
    ),
    "an unknown time": (predicted(good, time="timestep"), V, "unknown time 'timestep': choose one of 't', 'sigma'"),
    "a number for time": (predicted(good, time=1000), T, "time must be one of 't', .* or a function of t, got 1000"),
    "an index without timesteps": (
        predicted(good, time="index"),
        V,
        "time='index' needs a schedule of discrete timest",
    ),
    "noise without signal": (
        predicted(good, schedule=ZERO_SNR),
        V,
        "alpha is 0 at t_max = 1, where prediction 'epsilon'",
    ),
    "no data deviation": (predicted(good, "edm", sigma_data=0.0), V, "sigma_data must be positive, got 0.0"),
    "no schedule for a prediction": (predicted(good, schedule="edm"), T, "schedule must be a NoiseSchedule.*got 'edm'"),
    "centers without a deviation": (
        lambda: d.gaussian_mixture(EDM, np.ones((2, 3)), 0.0),
        V,
        r"needs centers \(K, ...\) and std > 0, got \(2, 3\) and 0.0",
    ),
    "samples of another shape than the centers": (
        lambda: d.gaussian_mixture(EDM, np.ones((2, 3)), 0.1)(X, 0.5),
        V,
        r"x must be \(B, ...\) of the centers' shape \(3,\), got \(3, 4, 4, 2\)",
    ),
    # guidance
    "guidance without a condition": (guided(condition=None), T, r"condition must be an array \(B, ...\).*got None"),
    "guidance without a null condition": (guided(null=None), T, r"null_condition must be an array.*got None"),
    "conditions of two kinds": (
        guided(null=np.ones(3)),
        V,
        "condition and null_condition must have the same structure",
    ),
    "too few conditions": (guided(LABEL[:2], LABEL[:2]), V, "condition must have the batch axis of x, 3, .*got 2"),
    "one condition for all": (guided(np.int32(1), np.int32(0)), V, "condition must have a batch axis .*got a scalar"),
    "text for a scale": (guided(scale="7.5"), T, r"scale must be a number, or an array \(B,\).*got '7.5'"),
    "an infinite scale": (guided(scale=np.inf), V, "scale must be finite, got inf"),
    "too many scales": (
        guided(scale=np.ones(4)),
        V,
        r"scale must be a number or one for each of the 3 samples, got \(4,",
    ),
    "rescaling above 1": (guided(rescale=7.0), V, "rescale must be from 0 to 1, got 7.0"),
    "an interval without schedule": (
        guided(interval=(0.1, 1.0)),
        T,
        "interval needs schedule, a NoiseSchedule, to know",
    ),
    "an interval backwards": (
        guided(interval=(2, 1), schedule=EDM),
        V,
        r"interval must be \(low, high\).*got \(2, 1\)",
    ),
    "a guided network that forgets": (
        guided(fn=lambda x, t, c: None),
        T,
        r"fn\(x, t, condition\) must return.*NoneType",
    ),
    "a classifier of the batch": (
        lambda: d.classifier_guidance(good, lambda x, t: jnp.sum(x), EDM, 1.0)(X, 0.5),
        V,
        r"log_prob\(x, t\) must return shape \(3,\), it returned \(\)",
    ),
    # corrections and editing
    "a quantile": (lambda: d.dynamic_threshold(good, 0.995), V, "percentile must be in per cent.*got 0.995"),
    "no limit": (lambda: d.dynamic_threshold(good, limit=0.0), V, "limit must be positive, got 0.0"),
    "a range backwards": (lambda: d.clip(good, 1.0, -1.0), V, "clip needs low < high, got 1.0 and -1.0"),
    "an integer mask": (inpainted(mask=np.ones((4, 4, 1), int)), T, "mask must be an array of booleans.*got int"),
    "no mask": (inpainted(mask=None), T, "mask must be an array of booleans, True where known, got None"),
    "a mask without channels": (
        inpainted(mask=np.ones((3, 4, 4), bool)),
        V,
        r"mask must broadcast to the state.*\(3, 4, 4\)",
    ),
    "a known region of another size": (
        inpainted(known=X[:, :3]),
        V,
        r"known must broadcast to the state.*\(3, 3, 4, 2\)",
    ),
    "an integer known region": (inpainted(known=X.astype(int)), T, "known must be floating-point, got int"),
    "no key to inpaint": (inpainted(key=None), T, "key must be a JAX random key.*got None"),
    "noise of a time outside": (
        lambda: EDM.add_noise(X, 90.0, KEY),
        V,
        "t must be within the schedule's 0.002 to 80",
    ),
    "noise of too few times": (
        lambda: EDM.add_noise(X, np.ones(2), KEY),
        V,
        r"t must be a number or one for each of the 3",
    ),
    "stochastic inversion": (
        lambda: e.invert(good, X, EDM, TIMES, s.ddim(1.0)),
        V,
        "invert needs a deterministic solver, got ddim",
    ),
    "inversion from sigma 0": (
        lambda: e.invert(good, X, ed.schedules.edm(0.0), [1.0, 0.0], s.unipc()),
        V,
        r"invert needs sigma > 0 at times\[-1\] = 0",
    ),
    "slerp of two shapes": (
        lambda: e.slerp(X, X[:2], 0.5),
        V,
        r"x_a and x_b must have the same shapes.*\(2, 4, 4, 2\)",
    ),
    "slerp with many weights": (
        lambda: e.slerp(X, X, np.ones(4)),
        V,
        r"weight must be a number or one for each of the 3",
    ),
    "slerp of an array and a pair": (lambda: e.slerp(X, (X, X), 0.5), T, "x_a and x_b must have the same structure"),
    # schedules and grids
    "a strength of 0": (lambda: g.last_steps(TIMES, 0.0), V, "strength must be above 0 and at most 1, got 0.0"),
    "no steps": (lambda: g.log_snr(EDM, 0), V, "num_steps must be an integer of at least 1, got 0"),
    "a start outside": (lambda: g.karras(EDM, 5, start=90.0), V, "a grid needs end < start within .*got start=90.0"),
    "timesteps of a continuous schedule": (lambda: g.leading(VP, 5), V, "needs a schedule of discrete timesteps"),
    "more steps than timesteps": (
        lambda: g.trailing(ed.schedules.discrete(ed.schedules.linear_betas(10)), 11),
        V,
        "num_steps <= 10, got 11",
    ),
    "betas and alphas": (
        lambda: ed.schedules.discrete([0.1, 0.2], alphas_cumprod=[0.9, 0.8]),
        V,
        "either betas or alphas_cumprod",
    ),
    "betas above 1": (
        lambda: ed.schedules.discrete([0.1, 1.2]),
        V,
        "betas must be above 0 and at most 1, got 0.1 to 1.2",
    ),
    "betas for alphas": (
        lambda: ed.schedules.discrete(alphas_cumprod=1 - ed.schedules.scaled_linear_betas()),
        V,
        "must fall to near 0.*got 0.988 at the last level",
    ),
    "the roots of alphas": (
        lambda: ed.schedules.discrete(alphas_cumprod=np.sqrt(np.cumprod(1 - ed.schedules.scaled_linear_betas()))),
        V,
        "must fall to near 0",
    ),
    "betas exchanged": (lambda: ed.schedules.vp_linear(20.0, 0.1), V, "needs 0 <= beta_min <= beta_max"),
    "alphas that grow": (lambda: ed.schedules.discrete(alphas_cumprod=[0.8, 0.9]), V, "must decrease strictly"),
    "a schedule whose noise falls": (
        lambda: ed.schedules.from_log_snr(lambda t: 5 * t, 0.0, 1.0),
        V,
        r"alpha\(t\) / sigma\(t\) must decrease",
    ),
    "a shift of 0": (lambda: ed.schedules.flow(0.0), V, "flow needs shift > 0"),
    "times the other way round": (lambda: dataclasses.replace(VP, t_max=0.0), V, "finite t_min < t_max"),
    "sigmas that grow": (lambda: g.from_sigmas(EDM, [1.0, 2.0]), V, "sigmas must be .*strictly decreasing"),
    "sigmas outside": (lambda: g.from_sigmas(EDM, [90.0, 2.0]), V, "sigmas must lie within .*got 2.0 to 90.0"),
    "no NNX module": (lambda: d.split_nnx(good), T, "split_nnx needs a flax.nnx.Module, got"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error_before_compilation(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(call)


def test_good_input_is_none_of_these():
    """The helpers above are sound: with their defaults nothing is raised."""
    for call in (sample(), predicted(good), guided(), inpainted()):
        jax.eval_shape(call)
