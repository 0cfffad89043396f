"""Where and in which precision to compute: NumPy in float64 on the host, JAX in float32 at least in a program."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


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
