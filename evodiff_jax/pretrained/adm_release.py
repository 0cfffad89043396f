"""The released files of guided-diffusion: their configurations, and what a configuration makes of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from evodiff_jax.pretrained.adm import EncoderUNetModel, UNetModel
from evodiff_jax.pretrained.states import Network, Origin, apply, check_arguments, floats, integers
from evodiff_jax.schedules import cosine_betas, discrete, linear_betas

ORIGIN = Origin("openai/guided-diffusion", "MIT")
RENAMED = ((r"_(\d+)(?=[_.])", r".\1"),)

_POOLS = ("attention", "adaptive", "spatial_v2")
_CLASSES = 1000  # ImageNet's
_MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
_FACTORS = ((0.0001, 0.02), 1000)  # of the linear schedule: first and last beta of so many steps

# The flags of the release's README; those that only say how to sample or train are left out.
_SHARED = {
    "attention_resolutions": "32,16,8",
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "learn_sigma": True,
}
_LARGE = {**_SHARED, "num_channels": 256, "num_res_blocks": 2}
_256 = {**_LARGE, "image_size": 256, "num_head_channels": 64}
_LSUN = {**_256, "dropout": 0.1}  # of training only
_64 = {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64, "dropout": 0.1}
_CLASSIFIER = {
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
    "classifier_width": 128,
    "classifier_depth": 2,
}
RELEASED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **_SHARED,
        **_64,
        "class_cond": True,
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
    },
    "128x128_diffusion": {**_LARGE, "image_size": 128, "num_heads": 4, "class_cond": True},
    "256x256_diffusion": {**_256, "class_cond": True},
    "256x256_diffusion_uncond": _256,
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "512x512_diffusion": {**_LARGE, "image_size": 512, "num_head_channels": 64, "class_cond": True},
    "64x64_classifier": {**_CLASSIFIER, "image_size": 64, "classifier_depth": 4, "noise_schedule": "cosine"},
    "128x128_classifier": {**_CLASSIFIER, "image_size": 128},
    "256x256_classifier": {**_CLASSIFIER, "image_size": 256},
    "512x512_classifier": {**_CLASSIFIER, "image_size": 512},
}
"""The released files, without the ending, and the flags that the release's README gives for each."""


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of a released class with the arguments of its constructor, or with the flags of the release.

    Args:
      cls: "UNetModel" or "EncoderUNetModel".
      arguments: of the constructor, or flags as in the release's README ("num_channels" or "classifier_width" among
        them); beside them "noise_schedule", "linear" by default or "cosine", and "diffusion_steps", 1000 by default.
      dtype: of the computation, or None for that of the inputs.

    Returns:
      The module and what is known of it.

    Raises:
      ValueError: the class or an argument is unknown, or a value is impossible.
    """
    classes = {"UNetModel": UNetModel, "EncoderUNetModel": EncoderUNetModel}
    if cls not in classes:
        raise ValueError(f"unknown class {cls!r} of family 'adm'; known: {', '.join(classes)}")
    given = dict(arguments)
    betas = _betas(given.pop("noise_schedule", "linear"), given.pop("diffusion_steps", 1000))
    if "classifier_width" in given or "num_channels" in given:
        given = _from_flags(cls, given)
    for ignored, only in (("use_checkpoint", None), ("use_fp16", None), ("dims", 2)):
        value = given.pop(ignored, only)
        if only is not None and value != only:
            raise ValueError(f"{cls} is supported with {ignored}={only}, got {value!r}")
    if given.get("num_classes", 0) is None:
        del given["num_classes"]
    module = check_arguments(classes[cls], given, cls)(dtype=dtype)
    _check(module, cls)
    size = module.image_size
    shape = (size, size, module.in_channels)
    inputs = {"x": floats(1, *shape), "timesteps": floats(1)}
    found = Network(module, inputs, shape, 0, ORIGIN, RENAMED, schedule=discrete(betas), uint8="guided_diffusion")
    if isinstance(module, EncoderUNetModel):
        return found._replace(num_classes=module.out_channels, prediction="class")
    if module.num_classes:
        inputs["y"] = integers(1)
    return found._replace(num_classes=module.num_classes, prediction="epsilon", predict=_epsilon)


def _epsilon(module: Any, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The noise, without the variance that some networks predict beside it."""
    return apply(module, params, x=x, timesteps=t, y=label)[..., : x.shape[-1]]


def _from_flags(cls: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments for the flags of the release's scripts."""
    prefix = "classifier_" if cls == "EncoderUNetModel" else ""
    flags = {name.removeprefix(prefix): value for name, value in flags.items()}
    size = flags.pop("image_size", 64)
    resolutions = [int(r) for r in str(flags.pop("attention_resolutions", "16,8")).split(",")]
    multipliers = flags.pop("channel_mult", "") or _MULTIPLIERS.get(size)
    if multipliers is None:
        raise ValueError(f"{cls} of image_size {size} needs channel_mult")
    if isinstance(multipliers, str):
        multipliers = tuple(float(m) for m in multipliers.split(","))
    shared = {
        "image_size": size,
        "in_channels": 3,
        "channel_mult": multipliers,
        "attention_resolutions": [size // r for r in resolutions],
    }
    if cls == "EncoderUNetModel":
        named = {"model_channels": flags.pop("width"), "num_res_blocks": flags.pop("depth", 2)}
        return {"num_head_channels": 64, "out_channels": _CLASSES, **shared, **named, **flags}
    named = {
        "model_channels": flags.pop("num_channels"),
        "out_channels": 6 if flags.pop("learn_sigma", False) else 3,
        "num_classes": _CLASSES if flags.pop("class_cond", False) else None,
        "num_heads": flags.pop("num_heads", 4),
    }
    return {**shared, **named, **flags}


def _betas(kind: Any, steps: Any) -> Any:
    if not isinstance(steps, int) or isinstance(steps, bool) or not 20 < steps <= 100_000:
        raise ValueError(f"diffusion_steps must be an integer above 20, got {steps!r}")
    if kind == "linear":
        (first, last), of = _FACTORS
        return linear_betas(steps, first * of / steps, last * of / steps)
    if kind == "cosine":
        return cosine_betas(steps)
    raise ValueError(f"unknown noise_schedule {kind!r}; known: linear, cosine")


def _check(module: Any, cls: str) -> None:
    if isinstance(module, EncoderUNetModel):
        if module.pool not in _POOLS:
            raise ValueError(f"{cls} has the unsupported pool {module.pool!r}; supported: {', '.join(_POOLS)}")
        if module.pool == "attention" and module.num_head_channels < 1:
            raise ValueError(f"{cls} with pool 'attention' needs num_head_channels")
    last = len(module.channel_mult) - 1
    for level, mult in enumerate(module.channel_mult):
        width = int(mult * module.model_channels)
        if width < 32 or width % 32:
            raise ValueError(f"{cls} needs layers of multiples of 32 channels, channel_mult {mult} makes {width}")
        attends = level == last or 2**level in module.attention_resolutions
        parts = module.num_heads if module.num_head_channels == -1 else module.num_head_channels
        if attends and (parts < 1 or width % parts):
            raise ValueError(f"{cls} can't split {width} channels by num_heads or num_head_channels, {parts}")
    if module.image_size < 1 or module.image_size % 2**last:
        raise ValueError(f"{cls} halves images {last} times, which image_size {module.image_size} does not allow")
