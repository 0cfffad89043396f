"""The released files of DiT and SiT: what a configuration makes of a module, and which one a file is of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from evodiff_jax.pretrained.dit import transformer2d
from evodiff_jax.pretrained.dit.network import DiT, SiT
from evodiff_jax.pretrained.states import Network, Origin, apply, check_arguments, floats, integers
from evodiff_jax.schedules import discrete, flow, linear_betas, vp_cosine

ORIGIN = Origin("facebookresearch/DiT", "CC BY-NC 4.0, for non-commercial use")
ORIGIN_OF_SIT = Origin("willisma/SiT", "MIT")
RENAMED = ((r"(x_embedder|t_embedder|y_embedder|blocks|attn|mlp|adaLN_modulation|final_layer)_", r"\1."),)

_OF_DIFFUSERS = "DiTTransformer2DModel"
_CLASSES = {"DiT": DiT, "SiT": SiT}
_PATHS = ("Linear", "GVP")
_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by hidden size, of the sizes XL, L, B and S
_GUIDED = 3  # the first channels of the latents, the only ones that both releases guide


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of a released class with the arguments of its constructor.

    Args:
      cls: "DiT" or "SiT", or "DiTTransformer2DModel" for diffusers' form of DiT.
      arguments: of the constructor. Beside those of "SiT" may stand "path", "Linear" by default or "GVP", the path from
        noise to data along which the network predicts the velocity.
      dtype: of the computation and of the kernels, or None for that of inputs and parameters.

    Returns:
      The module and what is known of it. In the schedule of SiT time runs from data at 0 to noise at 1.

    Raises:
      ValueError: the class or an argument is unknown, or a value is impossible.
    """
    if cls == _OF_DIFFUSERS:
        return transformer2d.build(cls, arguments, dtype)
    if cls not in _CLASSES:
        known = ", ".join((*_CLASSES, _OF_DIFFUSERS))
        raise ValueError(f"unknown class {cls!r} of family 'dit'; known: {known}")
    given = dict(arguments)
    path = given.pop("path", _PATHS[0]) if cls == "SiT" else ""
    if path not in ("", *_PATHS):
        raise ValueError(f"{cls} has the unsupported path {path!r}; supported: {', '.join(_PATHS)}")
    module = check_arguments(_CLASSES[cls], given, cls)(dtype=dtype)
    _check(module, cls)
    shape = (module.input_size, module.input_size, module.in_channels)
    found = Network(
        module=module,
        inputs={"x": floats(1, *shape), "timesteps": floats(1), "y": integers(1)},
        image_shape=shape,
        num_classes=module.num_classes,
        origin=ORIGIN if cls == "DiT" else ORIGIN_OF_SIT,
        renamed=RENAMED,
        stored=dtype,
        null_class=module.num_classes if module.class_dropout_prob > 0 else None,
        guided_channels=_GUIDED,
    )
    if cls == "DiT":
        return found._replace(schedule=discrete(linear_betas()), prediction="epsilon", predict=_epsilon)
    if path == "Linear":
        return found._replace(schedule=flow(), prediction="velocity", predict=_velocity)
    return found._replace(schedule=vp_cosine(s=0.0, t_max=0.999), prediction="v", predict=_v)


def _epsilon(module: Any, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The noise, without the variance that most networks predict beside it."""
    return apply(module, params, x=x, timesteps=t, y=label)[..., : x.shape[-1]]


def _velocity(module: Any, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The velocity from data to noise, eps - x_0; the network's time and velocity run the other way."""
    return -apply(module, params, x=x, timesteps=1 - t, y=label)


def _v(module: Any, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The prediction "v": with alpha = cos(pi t / 2) and sigma = sin(pi t / 2) the velocity is pi / 2 of it."""
    return 2 / math.pi * _velocity(module, params, x, t, label)


def _check(module: DiT, cls: str) -> None:
    positive = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    for name in (*positive, "mlp_ratio"):
        if not 0 < getattr(module, name) < math.inf:
            raise ValueError(f"{cls} needs a positive {name}, got {getattr(module, name)}")
    if module.hidden_size % module.num_heads:
        raise ValueError(f"{cls} can't split hidden_size {module.hidden_size} by num_heads {module.num_heads}")
    if module.input_size % module.patch_size:
        raise ValueError(f"{cls} can't cut input_size {module.input_size} into patches of {module.patch_size}")
    if not 0 <= module.class_dropout_prob <= 1:
        raise ValueError(f"{cls} needs a class_dropout_prob from 0 to 1, got {module.class_dropout_prob}")


def recognise(path: Path, arrays: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class and arguments of a file of DiT or SiT, whose arrays have the same names.

    Args:
      path: of the file, whose name has "DiT" or "SiT" in it, unless the class is given.
      arrays: name to anything with a shape.
      given: arguments in place of those that the shapes tell, and "cls".

    Returns:
      The class, and its arguments. The last class is taken for "no class" unless a class_dropout_prob of 0 or
      num_classes says otherwise.

    Raises:
      ValueError: the class or the number of heads can't be told, or the shapes are of no such network.
    """
    given = dict(given)
    cls = given.pop("cls", None) or _class_of(path)

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = tuple(arrays[name].shape) if name in arrays else ()
        if len(found) != axes or 0 in found:
            got = f"has the shape {found}" if name in arrays else "is missing"
            raise ValueError(f"{path} holds no {cls}: its array {name} {got}")
        return found

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    inner = shape("blocks.0.mlp.fc1.weight", 2)[0]
    out = shape("final_layer.linear.weight", 2)[0] / patch**2
    rows = shape("y_embedder.embedding_table.weight", 2)[0]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{path} holds no {cls}: its {tokens} positions are no square")
    if out not in (channels, 2 * channels):
        raise ValueError(f"{path} holds no {cls}: of {channels} channels it makes {out:g}, neither as many nor twice")
    if "num_heads" not in given and width not in _HEADS:
        raise ValueError(
            f"{path} holds a {cls} of hidden size {width}, whose number of heads the arrays don't tell: give config "
            "with num_heads"
        )
    if given.get("num_classes") == rows:
        given.setdefault("class_dropout_prob", 0.0)
    found = {
        "input_size": patch * math.isqrt(tokens),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len({name.split(".")[1] for name in arrays if name.startswith("blocks.")}),
        "num_heads": _HEADS.get(width),
        "mlp_ratio": inner / width,
        "num_classes": rows - (given.get("class_dropout_prob") != 0),
        "learn_sigma": out != channels,
    }
    return cls, {**found, **given}


def _class_of(path: Path) -> str:
    named = [cls for cls in _CLASSES if cls.lower() in path.stem.lower()]
    if len(named) != 1:
        raise ValueError(
            f"{path} holds a DiT or SiT, which have the same arrays: give config with the class as 'cls', DiT or SiT, "
            "or rename the file so that its name has it"
        )
    return named[0]
