"""Where and in which precision to compute: NumPy in float64 on the host, JAX in float32 at least in a program."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")


def namespace(*values: Any) -> ModuleType:
    """jax.numpy when any value is a JAX array (traced or not), else numpy."""
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def on_host(fn: Callable[[Any], Any], values: ArrayLike | list[float]) -> np.ndarray:
    """Evaluates `fn`, written in NumPy or jax.numpy, in float64 outside any trace in progress."""
    with jax.ensure_compile_time_eval(), enable_x64():
        return np.asarray(fn(np.asarray(values, np.float64)), np.float64)


def enable_x64() -> Any:
    """A context in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # JAX before 0.8  # pyright: ignore[reportAttributeAccessIssue]

    return enable_x64(True)


def at_least_float32(dtype: Any) -> Any:
    """float64 for float64, else float32; `jnp.promote_types` would refuse bfloat16 under strict promotion."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widened(t: Any) -> Any:
    """`t` as floating-point numbers of at least float32 on a device, and as float64 NumPy ones on the host.

    Integer, bfloat16 and float16 times would otherwise make every constant beside them as coarse as they are.
    """
    return t.astype(at_least_float32(t.dtype)) if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def factory(make: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Caches a factory by its arguments, so that the same arguments give the same object and jit does not recompile.

    Concrete arrays without axes are taken as the numbers that they hold. The decorated function raises TypeError for an
    argument that is traced, that can't be hashed, or that is text where its default is a number.
    """
    cached = functools.lru_cache(maxsize=None, typed=True)(make)
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            default = signature.parameters[name].default
            bound.arguments[name] = _constant(make.__name__, name, value, default)
        return cached(*bound.args, **bound.kwargs)

    return made


def _constant(maker: str, name: str, value: Any, default: Any) -> Any:
    if isinstance(value, Tracer):
        raise TypeError(
            f"{maker} needs a concrete {name}, got the traced {value}: call {maker} outside jax.jit and the like, or "
            "make the parameter a static argument"
        )
    if isinstance(value, np.ndarray | np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    if isinstance(value, str) and isinstance(default, int | float):
        raise TypeError(f"{maker} needs a number for {name}, got {value!r}")
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{maker} needs a single number or name for {name}, got {value!r}") from error
    return value
