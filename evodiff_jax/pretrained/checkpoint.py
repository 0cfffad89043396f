"""One safetensors file for a model or a training state: named arrays, and JSON in the file's own metadata.

Reading runs no code from the file. Writing goes through a temporary file in the same folder, so that a reader, or a
run that is killed, never meets half a file.

    metadata   {"format": "evodiff_jax/1", "kind": ..., "config": JSON, "card": JSON}
    arrays     {"down_1/kernel": ..., "label/embedding": ...}       tree paths joined by "/"
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from evodiff_jax.files import write_atomically

FORMAT = "evodiff_jax/1"


class Checkpoint(NamedTuple):
    """What one file holds.

    Attributes:
      config: settings that rebuild the owner of the arrays.
      arrays: the arrays by tree path, as stored.
      card: what is known about them: data, steps, date.
    """

    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    card: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    kind: str,
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    half: bool = False,
) -> None:
    """Writes a tree of arrays with its configuration, atomically.

    Args:
      path: the file to write; its folder must exist.
      tree: pytree of arrays.
      kind: what the file holds; `load` asks for the same.
      config: JSON-serialisable settings that rebuild the owner of the arrays.
      card: JSON-serialisable facts about them.
      half: store float32 arrays as float16; `restore` widens them again.

    Raises:
      ValueError: `half` is asked for and a value does not fit in float16.
      OSError: the file cannot be written.
    """
    path = Path(path)
    arrays = {}
    for name, leaf in _named_leaves(tree).items():
        array = np.asarray(leaf, order="C")  # safetensors writes the buffer as it lies in memory
        if half and array.dtype == np.float32:
            if np.max(np.abs(array), initial=0.0) > np.finfo(np.float16).max:
                raise ValueError(f"{name} has values beyond float16; save with half=False")
            array = array.astype(np.float16)
        arrays[name] = array
    metadata = {"format": FORMAT, "kind": kind, "config": json.dumps(config), "card": json.dumps(card)}
    write_atomically(path, lambda file: file.write(safetensors.numpy.save(arrays, metadata)))


def load(path: str | os.PathLike[str], *, kind: str) -> Checkpoint:
    """Reads a file that `save` wrote.

    Args:
      path: the file.
      kind: what it must hold.

    Returns:
      Its configuration, arrays and card.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, was not written by `save`, or holds another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again or train anew") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that evodiff_jax wrote")
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} holds a {metadata.get('kind')}, expected a {kind}; pass another file")
    try:
        config, card = json.loads(metadata["config"]), json.loads(metadata["card"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has damaged settings ({error}); copy it again or train anew") from error
    if not (isinstance(config, dict) and isinstance(card, dict)):
        raise ValueError(f"{path} has damaged settings (no mappings); copy it again or train anew")
    return Checkpoint(config, arrays, card)


def restore(template: Any, checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Any:
    """Puts a checkpoint's arrays into a tree, in the template's dtypes.

    Args:
      template: pytree of arrays or `jax.ShapeDtypeStruct` with the names and shapes that are expected.
      checkpoint: what `load` returned.
      path: the file it came from, for messages.

    Returns:
      A tree like `template`, of NumPy arrays.

    Raises:
      ValueError: an array is missing, left over, of another shape, or of integers where it must not be.
    """
    expected = _named_leaves(template)
    if missing := sorted(set(expected) - set(checkpoint.arrays)):
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} missing); it does not fit its settings")
    if extra := sorted(set(checkpoint.arrays) - set(expected)):
        raise ValueError(f"{path} has the unknown {extra[0]} ({len(extra)} in all); it does not fit its settings")
    for name, leaf in expected.items():
        stored = checkpoint.arrays[name].dtype
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.issubdtype(stored, jnp.floating):
            raise ValueError(f"{path}: {name} has numbers of type {stored}, floating-point ones are needed")
        if checkpoint.arrays[name].shape != leaf.shape:
            raise ValueError(
                f"{path}: {name} has shape {checkpoint.arrays[name].shape}, its settings need {leaf.shape}"
            )
    leaves = [checkpoint.arrays[name].astype(leaf.dtype) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
