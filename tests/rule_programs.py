"""Programs of the adaptive rules, each compiled once: the plan, the model's number and its parameter are arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from exact_models import SCHEDULES, mixture

import evodiff_jax as ed

EDM = SCHEDULES["edm"]
FLOW = ed.schedules.flow(t_min=0.0, t_max=1.0)  # alpha = 0 at the start, sigma = 0 at the end
SHAPE = (3, 4, 4, 2)
MAX_CALLS = 26

MODELS = {
    "constant": lambda value, x, t: jnp.full_like(x, 1.0) * value,
    "normal": lambda value, x, t: value**2 / (value**2 + t**2) * x,  # of that deviation, on EDM's schedule
    "tanh": lambda value, x, t: value * jnp.tanh(x / (1 + t)),
    "smooth": lambda value, x, t: jnp.tanh(x) / (1 + t**2),
    "clock": lambda value, x, t: jnp.full_like(x, 0.5) / (1 + t),  # known without the state
}
OF_IMAGES = {
    "mixture": lambda value, x, t: mixture(EDM)(x, t),
    "mixture on flow": lambda value, x, t: mixture(FLOW)(x, t),
}


def _models(shape):
    return MODELS | OF_IMAGES if shape[1:] == SHAPE[1:] else MODELS


def _denoiser(number, value, shape):
    models = [functools.partial(model, value) for model in _models(shape).values()]

    def denoise(x, t):
        cast = [lambda x, t, model=model: model(x, t).astype(x.dtype) for model in models]
        return jax.lax.switch(number, cast, x, t)

    return denoise


@jax.jit
def _run(number, value, x_T, plan):
    return ed.sample_with_trace(_denoiser(number, value, x_T.shape), x_T, plan)


def _number(name, shape):
    return list(_models(shape)).index(name)


def of_any_schedule(plan):
    """The plan without the levels of its schedule, which are static: a program for each schedule else."""
    return dataclasses.replace(plan, levels=())


def run(name, x_T, plan, value=0.3):
    """The sample and the trace of a model by its name."""
    return _run(_number(name, x_T.shape), value, x_T, of_any_schedule(plan))


def plan_of(steps, solver, grid=ed.grids.log_snr, schedule=EDM, max_calls=MAX_CALLS, **options):
    """A plan of as many rows as those of all other numbers of steps."""
    return ed.plan(schedule, grid(schedule, steps), solver, max_calls=max_calls, **options)


def median_error(x, exact):
    """Of samples, whose few between two modes may end in another one than the exact trajectory."""
    return float(jnp.median(jnp.sqrt(jnp.mean((x - exact) ** 2, axis=range(1, x.ndim)))))
