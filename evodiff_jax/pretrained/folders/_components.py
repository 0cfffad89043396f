"""Which networks a folder in the layout of diffusers holds, and in which files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_INDEX, _CONFIG = "model_index.json", "config.json"
# As written by diffusers and by transformers; of several the first is taken, half precision last.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (
    *(".safetensors", ".safetensors.index.json", ".bin"),
    *(".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16.safetensors.index.json", ".fp16.bin"),
)
_SHARDED_BIN = (".bin.index.json", ".bin.index.fp16.json")


class Component(NamedTuple):
    """One part of a folder.

    Attributes:
      name: what the folder's index calls it, such as "unet".
      path: the folder of its files.
      cls: the class that wrote it.
      config: the content of its configuration file, empty where it has none.
    """

    name: str
    path: Path
    cls: str
    config: dict[str, Any]


def is_folder_of(path: Path) -> str:
    """Tells "components" (a pipeline), "network" (one component), or "" for a folder that is neither."""
    if (path / _INDEX).is_file():
        return "components"
    return "network" if (path / _CONFIG).is_file() else ""


def components(path: Path) -> dict[str, Component]:
    """The components of a folder by name; those that the index has as null are left out.

    A folder of one component is found under the name "". In old folders the files of all are in one place.

    Raises:
      ValueError: the folder is none of diffusers', or a file in it is missing or damaged.
    """
    kind = is_folder_of(path)
    if not kind:
        inside = ", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{path} is no folder in diffusers' layout: it has neither {_INDEX} nor {_CONFIG}; it holds {inside}"
        )
    if kind == "network":
        config = _read(path / _CONFIG)
        return {"": Component("", path, _class_of(config, path), config)}
    found = {}
    for name, entry in _read(path / _INDEX).items():
        named = isinstance(entry, list) and len(entry) == 2
        if name.startswith("_") or not named or not isinstance(entry[1], str):
            continue
        place = path / name if (path / name).is_dir() else path
        config = {}
        for file in ("scheduler_config.json", _CONFIG) if name == "scheduler" else (_CONFIG,):
            if (place / file).is_file():
                config = _read(place / file)
                break
        found[name] = Component(name, place, str(config.get("_class_name") or entry[1]), config)
    return found


def weights(component: Component) -> Path:
    """The file of a component's weights; of several the one in full precision, safetensors first.

    Raises:
      ValueError: there is none, or only a kind that is not read; the message says what is there.
    """
    files = {child.name for child in component.path.iterdir()}
    for ending in _ENDINGS:
        for stem in _STEMS:
            if stem + ending in files:
                return component.path / (stem + ending)
    if sharded := _first(files, _SHARDED_BIN):
        raise ValueError(
            f"{component.path} has its weights as .bin files in parts ({sharded}), which are not read: get the "
            "safetensors files of the model"
        )
    raise ValueError(
        f"{component.path} has no file of weights: {_STEMS[0]}.safetensors, model.safetensors or one in parts with its "
        f"index; it holds {', '.join(sorted(files)[:5]) or 'nothing'}"
    )


def index_of(path: Path) -> dict[str, Any]:
    """The content of a folder's model_index.json."""
    return _read(path / _INDEX)


def _first(files: set[str], endings: Sequence[str]) -> str:
    return next((name for name in sorted(files) if name.endswith(tuple(endings))), "")


def _class_of(config: dict[str, Any], path: Path) -> str:
    architectures = config.get("architectures")
    named = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{path / _CONFIG} names no class, as _class_name or architectures")
    return named


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found
