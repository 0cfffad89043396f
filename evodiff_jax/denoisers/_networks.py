"""Networks as functions of their parameters, and a count of their evaluations."""

from collections.abc import Callable
from typing import Any

import jax

from evodiff_jax.schedules import made_of
from evodiff_jax.types import Denoiser, State, batch_size, check_function


def split_nnx(module: Any) -> tuple[Callable[..., Any], Any]:
    """Splits a Flax NNX module into a pure function and its parameters, which can be an argument of a jitted one.

    What a call changes in the module, such as random streams or running means, is dropped; put the module in
    evaluation mode first, `module.eval()`.

    Args:
      module: a `flax.nnx.Module`.

    Returns:
      fn(state, *args) = module(*args), and the state, a pytree with all of the module's arrays.

    Raises:
      TypeError: when it is no NNX module.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> fn, params = split_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> jax.jit(fn)(params, jnp.ones((4, 2))).shape
      (4, 3)
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(f"split_nnx needs a flax.nnx.Module, got {module!r}")
    definition, state = nnx.split(module)

    def remade(state: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf, state)

    def fn(state: Any, *args: Any) -> Any:
        # A module may only be changed in the trace in which its variables were made: here, in the loop over steps.
        return nnx.merge(definition, remade(state))(*args)

    return fn, remade(state)


def counted(fn: Denoiser, on_call: Callable[[int], Any]) -> Denoiser:
    """The same function, which tells the host of every evaluation when the program runs.

    Around `denoise` it counts model calls (NFE), around the network within guidance network evaluations, which can be
    twice as many. For tests and benchmarks: it keeps JAX from reordering the calls.

    Args:
      fn: fn(x, t, ...) of a batch x.
      on_call: on_call(B), called on the host with the size of the batch at each evaluation.

    Returns:
      fn with the count. Wait with `jax.effects_barrier()` before you read it.

    Raises:
      TypeError: when fn or on_call is no function.

    Examples:
      >>> import jax.numpy as jnp
      >>> sizes = []
      >>> y = jax.jit(counted(lambda x, t: x, sizes.append))(jnp.zeros((4, 8)), 0.5)
      >>> jax.effects_barrier()
      >>> sizes
      [4]
    """
    check_function("fn", fn, "fn(x, t, ...)")
    check_function("on_call", on_call, "on_call(B)")

    def counting(x: State, *args: Any) -> Any:
        size = batch_size(x)
        jax.debug.callback(lambda: on_call(size))
        return fn(x, *args)

    return made_of(counting, fn)
