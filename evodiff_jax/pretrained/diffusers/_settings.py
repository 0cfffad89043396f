"""From a folder's `config.json` to checked attributes of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evodiff_jax.pretrained.states import check_arguments

_TRAINING = ("dropout", "num_train_timesteps")  # of no effect on a trained network's outputs
_LARGEST_SIDE = 2**14  # of an image


def given(arguments: Mapping[str, Any], ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that are set: without notes ("_class_name"), nulls, and those that only training has."""
    dropped = (*_TRAINING, *ignored)
    return {k: v for k, v in arguments.items() if not k.startswith("_") and v is not None and k not in dropped}


def only(settings: dict[str, Any], cls: str, supported: Mapping[str, Sequence[Any]]) -> None:
    """Takes out settings that have one meaning here.

    Args:
      settings: as from `given`; the settings are removed.
      cls: the class, for messages.
      supported: name to the values that are the same as leaving it out.

    Raises:
      ValueError: a setting has another value.
    """
    for name, values in supported.items():
        value = settings.pop(name, None)
        if value is not None and value not in values:
            instead = f"{name}={values[0]!r}" if values else f"no {name}"
            raise ValueError(f"{cls} is supported with {instead}, got {value!r}")


def one_of(value: Any, cls: str, name: str, values: Sequence[str]) -> None:
    """Checks a text.

    Raises:
      ValueError: it is none of the values.
    """
    if value not in values:
        raise ValueError(f"{cls} has the unsupported {name} {value!r}; supported: {', '.join(v for v in values if v)}")


def block_types(settings: dict[str, Any], cls: str, name: str, known: Sequence[str], default: Any) -> tuple[str, ...]:
    """Takes out the types of the levels' blocks.

    Raises:
      ValueError: a type is not among the known ones, or the setting is no list.
    """
    types = settings.pop(name, default)
    if not isinstance(types, list | tuple) or not types:
        raise ValueError(f"{cls} needs a setting {name} that lists the types of its blocks, got {types!r}")
    for kind in types:
        one_of(kind, cls, f"block of {name},", known)
    return tuple(types)


def per_level(settings: dict[str, Any], name: str, default: int, levels: int) -> None:
    """Makes a list of a setting that may be one number for all levels."""
    value = settings.get(name, default)
    settings[name] = value if isinstance(value, list | tuple) else (value,) * levels


def sides(settings: dict[str, Any], cls: str, default: int, factor: int) -> None:
    """Makes `sample_size` height and width.

    Raises:
      ValueError: it is neither a number nor two, or no multiple of the factor.
    """
    size = settings.get("sample_size", default)
    size = tuple(size) if isinstance(size, list | tuple) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in size)
    if len(size) != 2 or not whole or not all(0 < side <= _LARGEST_SIDE and side % factor == 0 for side in size):
        got = settings.get("sample_size", default)
        raise ValueError(f"{cls} needs a sample_size of one or two multiples of {factor}, got {got!r}")
    settings["sample_size"] = size


def built(cls: type, settings: Mapping[str, Any], dtype: Any, **types: tuple[str, ...]) -> Any:
    """The module with checked attributes.

    Args:
      cls: of the module, with an attribute `block_out_channels`.
      settings: name to value.
      dtype: of the computation.
      **types: attributes that are lists of names.

    Returns:
      The module.

    Raises:
      ValueError: a setting is unknown, of another kind or range, or lists differ in length.
    """
    of = cls.__name__
    module = check_arguments(cls, settings, of)(dtype=dtype, **types)
    levels = len(module.block_out_channels)
    lists = {**types, **{k: settings[k] for k in _PER_LEVEL if isinstance(settings.get(k), list | tuple)}}
    for name, value in lists.items():
        if len(value) != levels:
            raise ValueError(f"{of} has {levels} levels in block_out_channels, but {len(value)} in {name}")
    for name in settings:
        value = getattr(module, name)
        numbers = value if isinstance(value, tuple) else (value,)
        positive = all(isinstance(v, str | bool) or (math.isfinite(v) and v > 0) for v in numbers)
        if not positive and not (name in _MAY_BE_ZERO and min(numbers) >= 0):
            raise ValueError(f"{of} needs a positive setting {name}, got {value!r}")
    groups = module.norm_num_groups
    if uneven := [width for width in module.block_out_channels if width % groups]:
        raise ValueError(f"{of} needs block_out_channels of multiples of norm_num_groups, {groups}, got {uneven[0]}")
    return module


def check_unet(module: Any, cls: str) -> None:
    """Checks what U-Nets have in common.

    Raises:
      ValueError: a value is impossible or unsupported.
    """
    one_of(module.resnet_time_scale_shift, cls, "resnet_time_scale_shift", ("default", "scale_shift"))
    if module.downsample_padding not in (0, 1):
        raise ValueError(f"{cls} is supported with downsample_padding 0 or 1, got {module.downsample_padding}")
    half, odd = divmod(module.block_out_channels[0], 2)
    if odd or module.freq_shift >= half:
        needed = "first block_out_channels even and above twice freq_shift"
        raise ValueError(f"{cls} needs the {needed}, got {2 * half + odd} and {module.freq_shift}")


_PER_LEVEL = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")
_MAY_BE_ZERO = ("freq_shift", "downsample_padding", "shift_factor", "attention_head_dim")
