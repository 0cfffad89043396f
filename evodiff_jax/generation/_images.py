"""Samples as bytes: the conversions that published protocols use, half a grey level apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32, namespace

UINT8 = {
    "edm": "clip(127.5 x + 128, 0, 255), truncated",
    "guided_diffusion": "clip(127.5 (x + 1), 0, 255), truncated",
    "diffusers": "clip(127.5 (x + 1), 0, 255), rounded to the nearest, half to even",
}
"""By name, how an image x in -1 .. 1 becomes bytes."""


def to_uint8(x: jax.Array | np.ndarray, protocol: str = "diffusers") -> Any:
    """Converts images to bytes as one of the published protocols does.

    Half a grey level shifts FID in its second digit on CIFAR-10, so a figure needs its protocol.

    Args:
      x: images in -1 .. 1, of any shape; what lies outside is clipped. NaN gives an arbitrary byte.
      protocol: "edm" (EDM, DiT, SiT), "guided_diffusion" (that, and score_sde) or "diffusers", see `UINT8`.

    Returns:
      uint8 of x's shape, NumPy for NumPy.

    Raises:
      ValueError: the protocol is unknown.

    Examples:
      >>> [int(to_uint8(np.zeros(()), protocol)) for protocol in UINT8]
      [128, 127, 128]
    """
    if protocol not in UINT8:
        raise ValueError(f"uint8 conversion must be one of {', '.join(UINT8)}, got {protocol!r}")
    xp = namespace(x)
    x = x.astype(at_least_float32(jnp.result_type(x)))
    if protocol == "edm":
        levels = x * 127.5 + 128
    elif protocol == "guided_diffusion":
        levels = (x + 1) * 127.5
    else:
        levels = xp.round(xp.clip(x / 2 + 0.5, 0, 1) * 255)
    return xp.clip(levels, 0, 255).astype(np.uint8)
