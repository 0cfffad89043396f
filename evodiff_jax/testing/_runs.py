"""Programs for runs of checks, each compiled once for all solvers without a rule: plans and models are arguments."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.sampling import sample, sample_with_trace
from evodiff_jax.tables import Plan, Table, stack

SHAPE = (3, 4, 4, 2)  # of states: three images of two channels
_MEMORY = 6  # outputs that plans without a rule are made to remember, so that they have one program


class Model(NamedTuple):
    """The numbers of a model with the data prediction size tanh(x / (1 + t)) + constant.

    Attributes:
      size: see above.
      constant: see above.
      second: what the data prediction of the last channel is multiplied with.
    """

    size: float = 1.0
    constant: float = 0.1
    second: float = 1.0


def denoiser(model: Any) -> Any:
    """The data prediction of a `Model`, for states of any structure."""

    def of_leaf(x: jax.Array, t: Any) -> jax.Array:
        last = jnp.arange(x.shape[-1]) == x.shape[-1] - 1
        wide = x.astype(jnp.result_type(t))
        size, constant, second = (jnp.asarray(number, wide.dtype) for number in model)
        return (jnp.where(last, second, 1) * (size * jnp.tanh(wide / (1 + t)) + constant)).astype(x.dtype)

    return lambda x, t: jax.tree.map(lambda leaf: of_leaf(leaf, t), x)


@jax.jit
def run(model: Model, x_T: Any, plan: Plan, key: jax.Array) -> Any:
    """The samples."""
    return sample(denoiser(model), x_T, plan, key=key)


@jax.jit
def run_with_trace(model: Model, x_T: Any, plan: Plan, key: jax.Array) -> Any:
    """The samples and the trace."""
    return sample_with_trace(denoiser(model), x_T, plan, key=key)


@jax.jit
def run_and_gradients(model: Model, x_T: Any, plan: Plan, key: jax.Array) -> Any:
    """The samples, and the gradients of their sum in the model's size and constant and in x_T."""

    def total(model: Model, x_T: Any) -> Any:
        x = sample(denoiser(model), x_T, plan, key=key)
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(x)), x

    gradients, x = jax.grad(total, argnums=(0, 1), has_aux=True)(model, x_T)
    return x, gradients


def shared(plan: Plan, noise: bool = True) -> Plan:
    """The plan without its schedule's static data and, without a rule, with all columns: one program for all.

    A column of noise is left out where it is not asked for and not there: drawing numbers takes time.
    """
    if plan.rule is None and np.ndim(plan.table.predictor) == 2 and plan.table.offset is None:
        zero, wide = np.zeros(1), np.zeros((1, _MEMORY))
        full = Table(zero, zero, wide, wide, (zero, zero), zero if noise else None)
        plan = jax.tree.map(lambda leaf: leaf[0], stack([plan, Plan(full, np.int32(1), np.zeros(()))]))
    return dataclasses.replace(plan, levels=())


def keys(count: int = SHAPE[0], seed: int = 0) -> jax.Array:
    """One random key a sample."""
    return jax.random.split(jax.random.key(seed), count)


def noise(shape: tuple[int, ...], scale: float, dtype: Any, seed: int = 0) -> jax.Array:
    """Normal noise of the deviation `scale`, the same on every version of JAX."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)
