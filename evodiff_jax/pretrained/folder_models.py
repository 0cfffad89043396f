"""From a folder in the layout of diffusers to the models in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evodiff_jax.pretrained.folders import Component, Scheduler, components, read_scheduler, weights
from evodiff_jax.pretrained.model import Model, digest_of, from_state
from evodiff_jax.pretrained.reading import read

FAMILY_OF = {
    "UNet2DModel": "unet2d",
    "UNet2DConditionModel": "unet2d_condition",
    "AutoencoderKL": "autoencoder_kl",
    "CLIPTextModel": "clip_text",
    "CLIPTextModelWithProjection": "clip_text",
    "DiTTransformer2DModel": "dit",
}
"""The families of the classes that folders may hold."""

_UNUSED = ("scheduler", "safety_checker", "feature_extractor", "watermarker")

_SAMPLED = ("unet", "transformer")
_OLD_DIT = "Transformer2DModel"  # what DiTTransformer2DModel was called, among other networks


def load_folder(path: Path, *, dtype: str = "float32", config: Mapping[str, Any] | None = None) -> Model:
    """Loads the one network of a folder: of a component's, or of a pipeline's that has but a network and a scheduler.

    Args:
      path: the folder.
      dtype: what the network computes in, see `from_state`.
      config: settings in place of those of its config.json.

    Returns:
      The model, with the schedule of the folder's scheduler where there is one.

    Raises:
      ValueError: the folder is none of diffusers', has several networks, or one that is not supported.
    """
    found = components(path)
    if "" in found:
        return load_component(found[""], path.name, dtype, config)
    networks = networks_of(found)
    if list(networks) != ["unet"]:
        raise ValueError(
            f"{path} holds several networks ({', '.join(networks)}): load it with pretrained.load_pipeline, or one of "
            "its folders"
        )
    model = load_component(found["unet"], path.name, dtype, config)
    return scheduled(model, scheduler_of(path, found))


def networks_of(found: Mapping[str, Component]) -> dict[str, Component]:
    """The components that are networks to load, by name."""
    used = lambda name: name not in _UNUSED and not name.startswith("tokenizer")
    return {name: component for name, component in found.items() if used(name)}


def load_component(
    component: Component, name: str, dtype: str = "float32", config: Mapping[str, Any] | None = None
) -> Model:
    """Loads the network of one component, called `name`.

    Raises:
      ValueError: its class is not supported, its weights are missing or do not fit.
    """
    cls = class_of(component)
    path = weights(component)
    try:
        arrays = read(path).arrays
        settings = {**component.config, **(config or {})}
        return from_state(FAMILY_OF[cls], cls, settings, arrays, dtype=dtype, name=name, digest=digest_of(path))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def class_of(component: Component) -> str:
    """The class of a component under its present name.

    Raises:
      ValueError: it is not supported.
    """
    cls = component.cls
    if cls == _OLD_DIT and component.config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"
    if cls not in FAMILY_OF:
        raise ValueError(
            f"{component.path} holds a {cls} as {component.name or 'its network'}, which is not supported; supported: "
            f"{', '.join(FAMILY_OF)}"
        )
    return cls


def scheduler_of(path: Path, found: Mapping[str, Component]) -> Scheduler:
    """What the scheduler of a folder says.

    Raises:
      ValueError: there is none, or it is not supported.
    """
    if "scheduler" not in found or not found["scheduler"].config:
        raise ValueError(f"{path} has no scheduler/scheduler_config.json, which tells the noise schedule")
    try:
        return read_scheduler(found["scheduler"].config)
    except ValueError as error:
        raise ValueError(f"{found['scheduler'].path}: {error}") from error


def scheduled(model: Model, scheduler: Scheduler) -> Model:
    """The model with the schedule, prediction and limits of a scheduler."""
    network = model.network._replace(
        schedule=scheduler.schedule,
        prediction=scheduler.prediction,
        limit=scheduler.limit,
        percentile=scheduler.percentile,
    )
    return model._replace(network=network, metadata={**model.metadata, "ignored": scheduler.ignored})


def sampled_component(path: Path, found: Mapping[str, Component]) -> Component:
    """The component that a pipeline samples with.

    Raises:
      ValueError: there is none.
    """
    for name in _SAMPLED:
        if name in found:
            return found[name]
    raise ValueError(f"{path} has neither a {' nor a '.join(_SAMPLED)}; its index names {', '.join(found)}")
