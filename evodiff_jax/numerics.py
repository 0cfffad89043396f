"""Where and in which precision to compute: NumPy in float64 on the host, JAX in float32 at least in a program."""

import functools
import inspect
import types
import typing
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


def concrete_array(name: str, value: Any) -> np.ndarray:
    """The value of an argument as a float64 NumPy array.

    Raises:
      TypeError: when it is traced, or holds anything but numbers.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} must be concrete numbers, got the traced {value}: compute it outside jax.jit")
    try:
        if np.asarray(value).dtype.kind not in "US":  # text, even of digits
            return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be an array of numbers, got {value!r}")


def is_integer(value: Any) -> bool:
    """Whether a value is a Python or NumPy integer; booleans are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def at_least_float32(dtype: Any) -> Any:
    """float64 for float64, else float32; `jnp.promote_types` would refuse bfloat16 under strict promotion."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widened(t: Any) -> Any:
    """`t` as floating-point numbers of at least float32 on a device, and as float64 NumPy ones on the host.

    Integer, bfloat16 and float16 times would otherwise make every constant beside them as coarse as they are.
    """
    return t.astype(at_least_float32(t.dtype)) if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def checked_arguments(fn: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Checks the arguments of `fn` that are annotated as numbers or booleans.

    Concrete arrays without axes are taken for the numbers that they hold. The decorated function raises TypeError, with
    the argument's name and value, for a traced argument, and for one that is no number or no boolean. Which integers,
    and whether it is one, `fn` itself checks: it knows the range.
    """
    signature = inspect.signature(fn, eval_str=True)
    allowed = {name: _kinds(parameter.annotation) for name, parameter in signature.parameters.items()}
    allowed = {name: kinds for name, kinds in allowed.items() if {int, float, bool} & set(kinds)}

    @functools.wraps(fn)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in allowed:
                bound.arguments[name] = _checked(fn.__name__, name, value, allowed[name])
        return fn(*bound.args, **bound.kwargs)

    return called


def factory(make: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Caches a factory by its arguments, so that the same arguments give the same object and jit does not recompile.

    Its numbers and booleans are checked as by `checked_arguments`. The decorated function raises TypeError for an
    argument that can't be hashed.
    """
    cached = functools.lru_cache(maxsize=None, typed=True)(make)
    signature = inspect.signature(make)

    @checked_arguments
    @functools.wraps(make)
    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            try:
                hash(value)
            except TypeError as error:
                raise TypeError(f"{make.__name__} needs a single value for {name}, got {value!r}") from error
        return cached(*bound.args, **bound.kwargs)

    return made


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, callables as `Callable`."""
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return tuple(typing.get_origin(kind) or kind for kind in allowed)


def _checked(called: str, name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value of an argument that may be a number or a boolean, or be of one of the other kinds."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{called} needs a concrete {name}, got the traced {value}: call {called} outside jax.jit and the like, or "
            "make the parameter a static argument"
        )
    if isinstance(value, np.ndarray | np.generic | jax.Array) and value.ndim == 0:
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if int in kinds or (float in kinds and is_number) or any(isinstance(value, k) for k in kinds if k is not float):
        return value
    raise TypeError(f"{called} needs {'a number' if float in kinds else 'True or False'} for {name}, got {value!r}")
