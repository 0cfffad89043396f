"""A user's own model: a function that `--model package.module:factory` names."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evodiff_jax.generation import Source


def load_source(option: str, text: str) -> Source:
    """Imports a factory, from the current folder too, and calls it.

    Args:
      option: the command's option that names it.
      text: "package.module:factory"; factory() -> `generation.Source`, or a model of `pretrained`.

    Raises:
      ValueError: there is no such module or function, or it is not called so or returns something else.
    """
    from evodiff_jax import evaluation
    from evodiff_jax.generation import Source

    said = f"argument {option}:"
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{said} must be package.module:factory, got {text!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does, and the command by itself does not
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{said} cannot import {module!r} (in {sys.path[0] or 'this folder'!r} too): {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{said} {module} has no {name!r}")
        found = getattr(found, part)
    if not callable(found) or not _takes(found):
        what = inspect.signature(found) if callable(found) else type(found).__name__
        raise ValueError(f"{said} {text} must be a function without arguments that returns a Source, it is {what}")
    source: Any = found()
    if hasattr(source, "network"):
        source = evaluation.source_of(source)
    if not isinstance(source, Source):
        raise ValueError(f"{said} {text}() must return a generation.Source, it returned {type(source).__name__}")
    if not callable(source.make_denoiser) or not _takes(source.make_denoiser, None, None):
        raise ValueError(f"{said} the source's make_denoiser must be make_denoiser(params, condition) -> denoise(x, t)")
    if len(source.image_shape) != 3:
        raise ValueError(f"{said} the source's image_shape must be (H, W, C), got {source.image_shape}")
    return source._replace(settings={"model": text, **source.settings})


def _takes(function: Any, *arguments: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
