"""What a state, a denoiser, a hook and a random key are, and checks of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32, concrete_array

State = Any
"""An array (B, ...), or a pytree of arrays with one leading batch axis."""

Denoiser = Callable[..., Any]
"""denoise(x, t, *conditions) -> x_0, the data prediction, of the structure, shapes and dtypes of x; t a scalar."""

Hook = Callable[[Any, jax.Array, jax.Array, Any], Any]
"""on_state(x, t, index, key) -> x, see `sample`."""


def check_state(x: Any, name: str) -> State:
    """The state with arrays for leaves.

    Raises:
      TypeError: when a leaf is not floating-point, or there is none.
      ValueError: when a leaf has no batch axis, or their batch axes differ.
    """
    leaves, structure = jax.tree.flatten(x)
    if not leaves:
        raise TypeError(f"{name} must be an array or a pytree of arrays, got {x!r}")
    for leaf in leaves:
        if not hasattr(leaf, "dtype"):
            advice = ": convert it with jnp.asarray" if isinstance(leaf, int | float) else ""
            raise TypeError(f"{name} must be an array or a pytree of arrays, got a leaf {leaf!r}{advice}")
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name} must be floating-point, got {dtype}: convert it, for example with astype(float)")
        if np.ndim(leaf) < 1:
            raise ValueError(f"{name} must have a batch axis in front, got a scalar")
    sizes = sorted({np.shape(leaf)[0] for leaf in leaves})
    if len(sizes) > 1:
        raise ValueError(f"all leaves of {name} must have the same batch axis in front, got sizes {sizes}")
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])


def check_function(name: str, value: Any, call: str) -> None:
    """Raises TypeError for what can't be called; `call` shows how it is."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {call}, got {value!r}")


def check_like(value: Any, x: State, call: str) -> State:
    """What the function described by `call` returned for the state `x`, if it is floating-point arrays of its shapes.

    Raises:
      TypeError: when it has another structure, or is not of floating-point arrays.
      ValueError: when it has other shapes.
    """
    leaves, structure = jax.tree.flatten(value)
    expected, expected_structure = jax.tree.flatten(x)
    described = "array like x" if jax.tree_util.treedef_is_leaf(expected_structure) else "array for each leaf of x"
    if structure != expected_structure:
        raise TypeError(
            f"{call} must return a floating-point {described}, of structure {expected_structure}, it returned "
            f"{type(value).__name__}, of structure {structure}"
        )
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            got = f"an array of {leaf.dtype}" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise TypeError(f"{call} must return a floating-point {described}, it returned {got}")
    shapes = [leaf.shape for leaf in leaves]
    if shapes != [leaf.shape for leaf in expected]:
        wanted, got = (_unwrapped([leaf.shape for leaf in side]) for side in (expected, leaves))
        raise ValueError(f"{call} must return the shape of x, {wanted}, it returned {got}")
    return value


def as_state(value: Any, x: State, call: str) -> State:
    """As `check_like`, in the dtypes of `x`."""
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), check_like(value, x, call), x)


def zeros_like(x: State) -> State:
    """Zeros that derive from x, so that they have its sharding and, in shard_map, its varying mesh axes."""
    return jax.tree.map(lambda leaf: jnp.where(leaf == leaf, 0, 0).astype(leaf.dtype), x)


def batch_size(x: State) -> int:
    """The number of samples in a state."""
    return jax.tree.leaves(x)[0].shape[0]


def per_sample(values: Any, x: State, name: str, dtype: Any) -> State:
    """A number, or one for every sample (B,), as a pytree like `x` of arrays that broadcast against its leaves.

    Raises:
      TypeError: when it is no number or array of numbers.
      ValueError: when it is of another shape.
    """
    values = jnp.asarray(values if isinstance(values, jax.Array) else concrete_array(name, values), dtype)
    if values.shape not in ((), (batch_size(x),)):
        raise ValueError(f"{name} must be a number or one for each of the {batch_size(x)} samples, got {values.shape}")
    return jax.tree.map(lambda leaf: values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim)), x)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another shape, leaving that as it is."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def check_keys(key: Any, batch: int) -> Any:
    """The random key as a typed one: () for a key of the whole batch, (batch,) for one key a sample.

    Raises:
      TypeError: when it is no JAX random key.
      ValueError: when there is neither one key nor one a sample.
    """
    advice = "pass a JAX random key, for example jax.random.key(0), or one a sample, jax.random.split(key, B)"
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(f"key must be a JAX random key, got {key!r}: {advice}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        width = jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape  # of the default implementation
        if key.dtype != jnp.uint32 or key.shape[-1:] != width:
            raise TypeError(f"key must be a JAX random key, got an array of {key.dtype} {key.shape}: {advice}")
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key, or one for each of the {batch} samples, got {key.shape} keys: {advice}")
    return key


def fold_in(keys: jax.Array, number: Any) -> jax.Array:
    """The key, or each of the keys, folded with a number."""
    fold = lambda key: jax.random.fold_in(key, number)
    return jax.vmap(fold)(keys) if keys.ndim else fold(keys)


def normal_like(keys: jax.Array, x: State) -> State:
    """Standard normal noise of the structure and shapes of `x`, in float32 at least.

    With one key a sample, sample k depends on key k alone. The noise of a single array is that of the key itself.
    """
    leaves, structure = jax.tree.flatten(x)
    noise = []
    for i, leaf in enumerate(leaves):
        of_leaf = keys if len(leaves) == 1 else fold_in(keys, i)
        dtype = at_least_float32(leaf.dtype)
        if keys.ndim:
            noise.append(jax.vmap(lambda k, s=leaf.shape[1:], d=dtype: jax.random.normal(k, s, d))(of_leaf))
        else:
            noise.append(jax.random.normal(of_leaf, leaf.shape, dtype))
    return jax.tree.unflatten(structure, noise)


def widest(leaves: Sequence[jax.Array]) -> Any:
    """The dtype of the scalars of a run: float64 where a leaf is, else float32."""
    dtypes = [at_least_float32(leaf.dtype) for leaf in leaves]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _unwrapped(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
