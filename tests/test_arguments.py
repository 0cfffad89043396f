"""Every public function checks its numbers and options: the kinds of mistakes, over all arguments there are."""

import inspect
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evodiff_jax as ed

pytestmark = pytest.mark.fast

EDM = ed.schedules.edm()
DISCRETE = ed.schedules.discrete(ed.schedules.scaled_linear_betas())
X = jnp.ones((2, 3))


def denoise(x, t):
    return x


# What the arguments without a default are in a call that works.
NEEDED = {
    "schedule": EDM,
    "num_steps": 5,
    "log_snr": lambda t: -5 * t,
    "t_min": 0.1,
    "t_max": 1.0,
    "tokens": 512,
    "base_tokens": 256,
    "times": ed.grids.log_snr(EDM, 5),
    "strength": 0.5,
    "denoise": denoise,
    "fn": denoise,
    "prediction": "data",
    "centers": [[0.0, 0.0, 0.0]],
    "std": 1.0,
    "condition": X,
    "null_condition": X,
    "scale": 2.0,
    "solver": ed.solvers.ddim(),
}
FUNCTIONS = {
    **{name: getattr(ed.schedules, name) for name in ("edm", "ve", "vp_linear", "sub_vp", "vp_cosine", "flow")},
    **{name: getattr(ed.schedules, name) for name in ("from_log_snr", "resolution_shift", "sequence_shift")},
    **{name: getattr(ed.schedules, name) for name in ("linear_betas", "scaled_linear_betas", "cosine_betas")},
    **ed.grids.GRIDS,
    **{name: getattr(ed.grids, name) for name in ("leading", "trailing", "last_steps")},
    **{name: getattr(ed.solvers, name) for name in ("dpm_solver", "dpm_solver_pp", "sde_dpm_solver_pp", "ddim")},
    **{name: getattr(ed.solvers, name) for name in ("heun", "dpm_2", "unipc", "deis", "ipndm", "ipndm_v", "sa_solver")},
    **{name: getattr(ed.solvers, name) for name in ("evodiff", "variance_optimal")},
    **{name: getattr(ed.denoisers, name) for name in ("clip", "dynamic_threshold", "gaussian_mixture")},
    **{name: getattr(ed.denoisers, name) for name in ("from_prediction", "classifier_free_guidance")},
    "plan": ed.plan,
}


def kinds(annotation):
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


ARGUMENTS = [
    (name, parameter.name, set(kinds(parameter.annotation)) & {int, float, bool})
    for name, function in FUNCTIONS.items()
    for parameter in inspect.signature(function, eval_str=True).parameters.values()
    if set(kinds(parameter.annotation)) & {int, float, bool}
]


def of_type(value):
    return type(value).__name__


def call(name, **arguments):
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    needed = {key: NEEDED[key] for key, p in parameters.items() if p.default is p.empty}
    if name in ("leading", "trailing"):
        needed["schedule"] = DISCRETE
    return function(**{**needed, **arguments})


def test_there_are_arguments_of_every_kind():
    assert len(ARGUMENTS) > 90
    assert {kind for _, _, some in ARGUMENTS for kind in some} == {int, float, bool}


@pytest.mark.parametrize("bad", ["0.5", b"1", [0.5, 0.25], {"a": 1}, object(), (), jnp.ones(3)], ids=of_type)
def test_what_is_no_number_and_no_boolean_is_named(bad):
    for name, argument, _ in ARGUMENTS:
        with pytest.raises((TypeError, ValueError)) as caught:
            call(name, **{argument: bad})
        assert argument in str(caught.value) or repr(bad) in str(caught.value), (name, argument, str(caught.value))


def test_traced_numbers_are_named():
    for name, argument, _ in ARGUMENTS:
        with pytest.raises(TypeError, match=f"{name} needs a concrete {argument}, got the traced"):
            jax.jit(lambda value, name=name, argument=argument: call(name, **{argument: value}))(1)


def test_numbers_are_no_booleans_and_booleans_no_numbers():
    for name, argument, some in ARGUMENTS:
        wrong = 1 if some == {bool} else True
        with pytest.raises((TypeError, ValueError)) as caught:
            call(name, **{argument: wrong})
        assert argument in str(caught.value) or repr(wrong) in str(caught.value), (name, argument, str(caught.value))


def test_arrays_without_axes_are_the_numbers_that_they_hold():
    for convert in (np.float32, np.array, jnp.float32):
        assert ed.schedules.flow(convert(3.0)) is ed.schedules.flow(3.0)
        assert ed.solvers.ddim(convert(0.5)) is ed.solvers.ddim(0.5)
        np.testing.assert_array_equal(ed.grids.karras(EDM, 5, rho=convert(7.0)), ed.grids.karras(EDM, 5))
    for convert in (np.int64, np.array, jnp.int32):
        assert ed.solvers.unipc(convert(2)) is ed.solvers.unipc(2)
        np.testing.assert_array_equal(ed.grids.log_snr(EDM, convert(5)), ed.grids.log_snr(EDM, 5))
        times = ed.grids.log_snr(EDM, 5)
        assert ed.plan(EDM, times, ed.solvers.ddim(), max_calls=convert(8)).table.time.shape == (8,)


@pytest.mark.parametrize("name", [*ed.grids.GRIDS, "leading", "trailing"])
def test_fractions_are_no_numbers_of_steps(name):
    for number in (2.5, 0, -1, np.float32(4.0)):
        with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got"):
            call(name, num_steps=number)


def test_betas_in_the_wrong_order_or_of_the_wrong_kind():
    s = ed.schedules
    cumprod = np.cumprod(1 - s.scaled_linear_betas())
    for make, message in (
        (lambda: s.linear_betas(1000, 0.02, 1e-4), "do not decrease and are at most 1, got 0.02 to 0.0001"),
        (lambda: s.scaled_linear_betas(1000, 0.012, 0.00085), "do not decrease"),
        (lambda: s.linear_betas(1000, 0.0, 0.02), "betas above 0"),
        (lambda: s.linear_betas(1000, 1e-4, 2.0), "at most 1"),
        (lambda: s.cosine_betas(1000, max_beta=0.0), "betas above 0"),
        (lambda: s.cosine_betas(1000, s=-1.0), "s of at least 0, got -1"),
        (lambda: s.cosine_betas(0), "positive integer for num_timesteps, got 0"),
        (lambda: s.discrete(cumprod), r"leave no signal .*\(not alphas = 1 - betas, nor alphas_cumprod\)"),
        (lambda: s.discrete(1 - s.scaled_linear_betas()), "leave no signal"),
        (lambda: s.discrete(alphas_cumprod=1 - s.scaled_linear_betas()), "must fall to near 0"),
        (lambda: s.discrete(alphas_cumprod=np.sqrt(cumprod)), "must fall to near 0"),
        (lambda: s.discrete([0.1, 1.0, 0.5]), "leave no signal"),
        (lambda: s.zero_terminal_snr([]), "decreasing alphas_cumprod from 0 to 1, got"),
        (lambda: s.zero_terminal_snr([1.2, 0.5]), "decreasing alphas_cumprod from 0 to 1, got"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="betas must be an array of numbers, got 'linear'"):
        s.discrete("linear")
    with pytest.raises(TypeError, match="betas must be concrete numbers, got the traced"):
        jax.jit(s.discrete)(s.linear_betas())


def test_published_betas_pass():
    s = ed.schedules
    for betas in (
        s.linear_betas(),
        s.scaled_linear_betas(),
        s.cosine_betas(),
        s.cosine_betas(4000),
        s.linear_betas(4000),
    ):
        assert ed.schedules.discrete(betas).num_timesteps == len(betas)


def test_schedules_of_ones_own():
    alpha, sigma = (lambda t: 1 + 0 * t), (lambda t: t)
    for arguments, message in (
        (("x", sigma, 0.1, 2.0), "needs a function of t for alpha, got 'x'"),
        ((alpha, 2.0, 0.1, 2.0), "needs a function of t for sigma, got 2.0"),
        ((alpha, sigma, 0.1, 2.0, "x"), "needs a function of t for time, got 'x'"),
        ((alpha, sigma, "0.1", 2.0), "t_min must be an array of numbers, got '0.1'"),
        ((alpha, sigma, 0.1, object()), "t_max must be an array of numbers"),
        ((alpha, sigma, 0.1, 2.0, None, 2.5), "num_timesteps must be a positive integer or None, got 2.5"),
    ):
        with pytest.raises(TypeError, match=message):
            ed.NoiseSchedule(*arguments)
    with pytest.raises(ValueError, match=r"t_min must be a scalar, got shape \(2,\)"):
        ed.NoiseSchedule(alpha, sigma, [0.1, 0.2], 2.0)
    assert ed.NoiseSchedule(alpha, sigma, jnp.float32(0.5), np.array(2.0)).t_min == 0.5


def test_noise_and_its_times():
    key = jax.random.key(0)
    for shape in ((), "x", (2.0, 3), None, True):
        with pytest.raises(TypeError, match="shape must be a tuple of integers"):
            EDM.noise(key, shape)
    for dtype in (None, int, "x", (), [1.0]):
        with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
            EDM.noise(key, (2, 3), dtype)
    with pytest.raises(TypeError, match="t must be an array of numbers, got '1'"):
        EDM.add_noise(X, "1", key)
    for t in (np.float32(80.0), jnp.float32(0.002), 80, jnp.bfloat16(1.0)):
        assert EDM.add_noise(X, t, key).shape == X.shape
    assert jax.jit(lambda t: EDM.add_noise(X, t, key))(1).shape == X.shape  # a traced integer


def test_functions_are_called_what_they_are():
    d = ed.denoisers
    for make, message in (
        (lambda: d.clip(None), "denoise must be a function denoise"),
        (lambda: d.dynamic_threshold("x"), "denoise must be a function denoise"),
        (lambda: d.counted(None, print), "fn must be a function fn"),
        (lambda: d.counted(denoise, None), "on_call must be a function on_call"),
        (lambda: d.classifier_free_guidance(None, X, X, 2.0), "fn must be a function fn"),
        (lambda: d.classifier_guidance(denoise, None, EDM, 1.0), "log_prob must be a function log_prob"),
        (lambda: d.classifier_free_guidance(denoise, X, X, 2.0, schedule="edm"), "schedule must be a NoiseSchedule"),
        (lambda: ed.editing.inpaint(None, X, X > 0, EDM, key=jax.random.key(0)), "denoise must be a function"),
        (lambda: ed.schedules.from_log_snr(None, 0.1, 1.0), "log_snr must be a function"),
        (lambda: ed.stack(None), "stack needs at least one plan"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_a_state_of_a_run_is_what_init_and_update_return():
    plan = ed.plan(EDM, [1.0, 0.5], ed.solvers.ddim())
    for state in (None, [1.0], 2.0, X):
        with pytest.raises(TypeError, match="state must be a RunState, from init or update, got"):
            ed.update(state, X, plan)
    state = ed.init(X, plan)
    with pytest.raises(ValueError, match=r"the model whose prediction update was given must return the shape of x"):
        ed.update(state, X[:1], plan)


def test_bounds_of_guidance():
    for interval in ("x", (1.0,), (2.0, 1.0), (-1.0, 1.0), 3.0, (0.0, np.nan)):
        with pytest.raises((TypeError, ValueError), match="interval must be"):
            ed.denoisers.classifier_free_guidance(denoise, X, X, 2.0, interval=interval, schedule=EDM)
    ed.denoisers.classifier_free_guidance(
        denoise, X, X, 2.0, interval=(jnp.float32(0.1), np.array(np.inf)), schedule=EDM
    )
