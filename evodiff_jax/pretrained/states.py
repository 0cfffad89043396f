"""From the arrays of an original state dict to the parameters of a Flax module.

Modules are named so that the path of a parameter becomes its original name by a family's few substitutions, given as
(pattern, replacement), and by the last part: "kernel", "scale" and "embedding" are all "weight" in PyTorch. A kernel
has its axes (spatial..., in, out) there in the order (out, in, spatial...); nothing else changes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from evodiff_jax.schedules import NoiseSchedule

_NAMED = 3  # of the names that do not fit, in a message
_WEIGHT = (r"(^|\.)(kernel|scale|embedding)$", r"\1weight")


class Origin(NamedTuple):
    """Where a family of networks comes from.

    Attributes:
      source: the project that released it.
      licence: of its code and weights.
    """

    source: str
    licence: str

    @property
    def non_commercial(self) -> bool:
        """Whether the weights may not be used for commercial ends."""
        return "non-commercial" in self.licence


class Network(NamedTuple):
    """A Flax module, and what is known of it before it has parameters.

    Attributes:
      module: called with the inputs of the original by name.
      inputs: the shapes and dtypes of these for a batch of one, of `floats` and `integers`.
      image_shape: (H, W, C) of a sample.
      num_classes: 0 for an unconditional network.
      origin: source and licence.
      renamed: from a parameter's path, joined by ".", to its original name.
      aliases: from other names that original files use to that name.
      unused: patterns of original names that the module does without.
      stored: the type that kernels and tables are kept in, None for float32, or float64 where the file's are.
      schedule: the noise schedule; None for a network that is no diffusion model, or not by itself.
      prediction: what the network predicts, as for `denoisers.from_prediction`, or "class" or "features".
      predict: predict(module, params, x, t, label) -> the prediction for x (B, H, W, C), t (B,) and label (B,) or None.
      null_class: the label of no class, None where the network has none.
      guided_channels: how many of the channels guidance acts on, None for all.
      limit: the magnitude that data predictions are clipped to, None for no clipping.
      percentile: of dynamic thresholding in place of that; None for none.
      uint8: the conversion of samples to bytes that the release uses, see `evaluation.to_uint8`.
    """

    module: nn.Module
    inputs: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    origin: Origin
    renamed: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    stored: Any = None
    schedule: NoiseSchedule | None = None
    prediction: str = ""
    predict: Callable[[nn.Module, Any, jax.Array, jax.Array, Any], Any] | None = None
    null_class: int | None = None
    guided_channels: int | None = None
    limit: float | None = None
    percentile: float | None = None
    uint8: str = "diffusers"


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an input of real numbers."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an input of integers."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def check_arguments(cls: Any, arguments: Mapping[str, Any], of: str) -> Any:
    """The class with the given attributes set and checked, as a function of the others.

    Numbers, texts and lists of numbers are accepted where the default value, or the annotation, is of that kind.

    Raises:
      ValueError: an argument is unknown, missing, or of another kind; the message names it.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in ("parent", "name", "dtype")}
    if unknown := sorted(set(arguments) - set(fields)):
        raise ValueError(f"{of} has no setting {_some(unknown)}; known: {', '.join(fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in arguments]
    if missing:
        raise ValueError(f"{of} needs {_some(missing)}")
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    checked = {}
    for name, value in arguments.items():
        annotation = str(fields[name].type)
        value = tuple(value) if isinstance(value, list | tuple) else value
        if annotation.startswith("tuple"):
            inner = kinds[annotation.split("[")[1].split(",")[0]]
            fits = isinstance(value, tuple) and all(isinstance(v, inner) and v >= 0 for v in value)
            fits = fits and (value or name.endswith("_resolutions"))  # of those where attention is there may be none
        else:
            fits = isinstance(value, kinds[annotation]) and (annotation == "bool") == isinstance(value, bool)
            fits = fits and not (annotation == "int" and not -1 <= value <= 2**20)  # pyright: ignore[reportOperatorIssue]
        if not fits:
            raise ValueError(f"{of} needs a setting {name} of the kind {annotation}, got {value!r}")
        checked[name] = value

    def made(**others: Any) -> Any:
        return cls(**checked, **others)

    return made


def apply(module: nn.Module, params: Any, *, method: str = "__call__", **inputs: Any) -> Any:
    """Evaluates a method of a module with the inputs of the original by name; those that are None are left out.

    With a float64 parameter, floating-point inputs are widened too.
    """
    wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))

    def widened(value: Any) -> jax.Array:
        value = jnp.asarray(value)
        return value.astype(jnp.float64) if wide and jnp.issubdtype(value.dtype, jnp.floating) else value

    given = {name: jax.tree.map(widened, value) for name, value in inputs.items() if value is not None}
    return module.apply({"params": params}, **given, method=method)


def original_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The names and shapes, in the original layout, of the arrays that a module needs."""
    return {name: _original_shape(path, leaf.shape) for path, name, leaf in _expected(network)[0]}


def restore(network: Network, arrays: Mapping[str, Any], of: str) -> Any:
    """Puts arrays by their original names into the module's tree of parameters, once `check` has passed them.

    Args:
      network: the module.
      arrays: original name to array in the original layout, of any floating-point type.
      of: the class, for messages.

    Returns:
      The parameters, float32, or float64 where an array is and JAX has it enabled; kernels and tables of the
      network's `stored` where it has such.

    Raises:
      ValueError: as `check`.
    """
    expected, structure = _expected(network)
    arrays = _by_known_names(network, arrays, of)
    _check(expected, network.unused, arrays, of)
    leaves = [_converted(path, arrays[name], network.stored) for path, name, _ in expected]
    return jax.tree.unflatten(structure, leaves)


def check(network: Network, arrays: Mapping[str, Any], of: str) -> None:
    """Checks that arrays are those of a module.

    Raises:
      ValueError: an array is missing, left over, of another shape, or not floating-point.
    """
    _check(_expected(network)[0], network.unused, _by_known_names(network, arrays, of), of)


def _by_known_names(network: Network, arrays: Mapping[str, Any], of: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        known = name
        for pattern, replacement in network.aliases:
            known = re.sub(pattern, replacement, known)
        if known in found:
            raise ValueError(f"{of} has the array {known} twice, once under another name")
        found[known] = array
    return found


def _check(expected: Sequence[tuple[str, str, Any]], unused: Sequence[str], arrays: Mapping[str, Any], of: str) -> None:
    names = {name for _, name, _ in expected}
    ignored = re.compile("|".join(unused) or "(?!)")
    if missing := [name for _, name, _ in expected if name not in arrays]:
        raise ValueError(f"{of} needs the arrays {_some(missing)}, which are missing: the configuration does not fit")
    if extra := [name for name in arrays if name not in names and not ignored.fullmatch(name)]:
        raise ValueError(f"{of} has no use for the arrays {_some(extra)}: the configuration does not fit")
    for path, name, leaf in expected:
        shape, needed = tuple(arrays[name].shape), _original_shape(path, leaf.shape)
        if shape != needed:
            raise ValueError(f"{name} has shape {shape}, {of} with this configuration needs {needed}")
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise ValueError(f"{name} has numbers of type {arrays[name].dtype}, floating-point ones are needed")


def _expected(network: Network) -> tuple[list[tuple[str, str, Any]], Any]:
    """Path, original name and shape of every parameter, in the order of the tree, and the tree's structure."""
    initialised = lambda inputs: network.module.init(jax.random.key(0), **inputs)
    try:
        template = jax.eval_shape(initialised, network.inputs)["params"]
    except (ValueError, TypeError, ZeroDivisionError, FlaxError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"no {type(network.module).__name__} can have these settings: {reason}") from error
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    found = []
    for path, leaf in leaves:
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        name = text
        for pattern, replacement in (*network.renamed, _WEIGHT):
            name = re.sub(pattern, replacement, name)
        found.append((text, name, leaf))
    return found, structure


def _original_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if path.endswith("kernel") else tuple(shape)


def _converted(path: str, array: Any, stored: Any) -> jax.Array:
    dtype = jnp.float64 if array.dtype == np.float64 and jax.config.read("jax_enable_x64") else jnp.float32
    if stored is not None and path.endswith(("kernel", "embedding")):
        dtype = stored
    if path.endswith("kernel"):
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return jnp.asarray(array, dtype)


def _some(names: Iterable[str]) -> str:
    """The first of the names, and how many there are."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
