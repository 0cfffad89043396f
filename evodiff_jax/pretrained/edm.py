"""EDM's released checkpoints: a network inside one of four preconditionings (arXiv 2206.00364, Table 1).

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

with x = x_0 + sigma eps. Written from a description of the released classes, not from their code; the licence of code
and weights is CC BY-NC-SA 4.0, for non-commercial use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.preconditioning import Coefficients, coefficients
from evodiff_jax.pretrained.edm_networks import DhariwalUNet, SongUNet
from evodiff_jax.pretrained.states import Network, Origin, apply, check_arguments, floats, integers
from evodiff_jax.schedules import edm

ORIGIN = Origin("NVlabs/edm", "CC BY-NC-SA 4.0, for non-commercial use")
RENAMED = ((r"\b(enc|dec)_", r"\1."),)
UNUSED = (r"(.*\.)?map_augment\.weight", r".*\.resample_filter")

_NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
_SIGMA_RANGE = (0.002, 80.0)  # of EDM's sampler, within which a narrower one of the network counts


class _Kind(NamedTuple):
    """The arguments of a preconditioning's class, with its defaults."""

    network: str
    sigma_min: float
    sigma_max: float
    constants: dict[str, float]


_KINDS = {
    "EDMPrecond": _Kind("DhariwalUNet", 0.0, math.inf, {"sigma_data": 0.5}),
    "VPPrecond": _Kind("SongUNet", 0.0, 0.0, {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": _Kind("SongUNet", 0.02, 100.0, {}),
    "iDDPMPrecond": _Kind("DhariwalUNet", 0.0, 0.0, {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}


class Preconditioned(nn.Module):
    """A network F, `model`, with the preconditioning of the class `kind`.

    Called with x (B, H, W, C), sigma (B,), and labels (B,) of integers, or None for no class.
    """

    kind: str
    constants: dict[str, float]
    model: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, sigma: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Predicts the data, in float32 at least."""
        wide = jnp.promote_types(at_least_float32(x.dtype), at_least_float32(jnp.result_type(sigma)))
        x, sigma = x.astype(wide), jnp.broadcast_to(jnp.asarray(sigma, wide), x.shape[:1])
        table = None
        if self.kind == "iDDPMPrecond":
            table = self.param("u", lambda _: jnp.asarray(_iddpm_levels(self.constants), jnp.float32))
        c = _coefficients(self.kind, self.constants, sigma, table)
        each = lambda values: values.reshape(-1, 1, 1, 1)
        output = self.model(each(c.c_in) * x, c.c_noise, labels)
        return each(c.c_skip) * x + each(c.c_out) * output[..., : x.shape[-1]].astype(wide)


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of a released class with the arguments of its constructor.

    Args:
      cls: one of the preconditionings, or a network by itself.
      arguments: as the constructor takes them; those of the network among them.
      dtype: of the computation, or None for that of the inputs.

    Returns:
      The module and what is known of it.

    Raises:
      ValueError: the class or an argument is unknown, or a value is impossible.
    """
    if cls in _NETWORKS:
        module = _network(cls, arguments, cls, dtype)
        shape = (module.img_resolution, module.img_resolution, module.in_channels)
        inputs = {"x": floats(1, *shape), "noise_labels": floats(1), "labels": integers(1)}
        return Network(module, inputs, shape, module.label_dim, ORIGIN, RENAMED, unused=UNUSED)
    if cls not in _KINDS:
        known = ", ".join([*_KINDS, *_NETWORKS])
        raise ValueError(f"unknown class {cls!r} of family 'edm'; known: {known}")
    kind, given = _KINDS[cls], dict(arguments)
    for name in ("img_resolution", "img_channels"):
        if name not in given:
            raise ValueError(f"{cls} needs {name}")
    resolution, channels = given.pop("img_resolution"), given.pop("img_channels")
    given.pop("use_fp16", None)
    constants = {name: given.pop(name, default) for name, default in kind.constants.items()}
    for constant, value in constants.items():
        if not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{cls} needs a positive number for {constant}, got {value!r}")
    lowest, highest = given.pop("sigma_min", kind.sigma_min), given.pop("sigma_max", kind.sigma_max)
    name = given.pop("model_type", kind.network)
    if name not in _NETWORKS:
        raise ValueError(f"unknown model_type {name!r}; known: {', '.join(_NETWORKS)}")
    doubled = 2 if cls == "iDDPMPrecond" else 1  # its second half is the variance, which is not used
    inner = {"img_resolution": resolution, "in_channels": channels, "out_channels": doubled * channels}
    network = _network(name, {**given, **inner}, cls, dtype)
    if cls == "VPPrecond":
        lowest, highest = (float(_vp_sigma(constants, t)) for t in (constants["epsilon_t"], 1.0))
    if cls == "iDDPMPrecond":
        levels = _iddpm_levels(constants)
        lowest, highest = levels[-2], levels[0]
    schedule = edm(max(_SIGMA_RANGE[0], float(lowest)), min(_SIGMA_RANGE[1], float(highest)))
    shape = (resolution, resolution, channels)
    return Network(
        module=Preconditioned(cls, constants, network),
        inputs={"x": floats(1, *shape), "sigma": floats(1), "labels": integers(1)},
        image_shape=shape,
        num_classes=network.label_dim,
        origin=ORIGIN,
        renamed=RENAMED,
        unused=UNUSED,
        schedule=schedule,
        prediction="data",
        predict=lambda module, params, x, t, label: apply(module, params, x=x, sigma=t, labels=label),
        null_class=network.label_dim if network.label_dim else None,
        uint8="edm",
    )


def _network(name: str, arguments: Mapping[str, Any], of: str, dtype: Any) -> Any:
    module = check_arguments(_NETWORKS[name], arguments, of)(dtype=dtype)
    for field, known in (
        ("embedding_type", ("positional", "fourier")),
        ("encoder_type", ("standard", "skip", "residual")),
        ("decoder_type", ("standard", "skip")),
    ):
        if getattr(module, field, known[0]) not in known:
            raise ValueError(f"{of} has the unknown {field} {getattr(module, field)!r}; known: {', '.join(known)}")
    return module


def _coefficients(kind: str, constants: dict[str, float], sigma: jax.Array, table: jax.Array | None) -> Coefficients:
    one = jnp.ones_like(sigma)
    if kind == "EDMPrecond":
        return coefficients(sigma, constants["sigma_data"])
    if kind == "VEPrecond":
        return Coefficients(one, sigma, one, jnp.log(0.5 * sigma))
    unit = 1 / jnp.sqrt(1 + sigma**2)
    if kind == "VPPrecond":
        b, d = constants["beta_min"], constants["beta_d"]
        log = jnp.log1p(sigma**2)
        t = 2 * log / (jnp.sqrt(b**2 + 2 * d * log) + b)  # the root of d t^2 / 2 + b t = log, without cancellation
        return Coefficients(one, -sigma, unit, (constants["M"] - 1) * t)
    assert table is not None
    nearest = jnp.argmin(jnp.abs(sigma[:, None] - table.astype(sigma.dtype)), axis=1)
    return Coefficients(one, -sigma, unit, constants["M"] - 1 - nearest.astype(sigma.dtype))


def _vp_sigma(constants: dict[str, float], t: float) -> float:
    return math.sqrt(math.expm1(0.5 * constants["beta_d"] * t**2 + constants["beta_min"] * t))


def _iddpm_levels(constants: dict[str, float]) -> np.ndarray:
    """The M + 1 noise levels of iDDPM's cosine schedule, from the highest to 0."""
    count = int(constants["M"])
    signal = np.sin(0.5 * np.pi * np.arange(count + 1) / count / (constants["C_2"] + 1)) ** 2
    levels = np.zeros(count + 1)
    for j in range(count, 0, -1):
        ratio = max(signal[j - 1] / signal[j], constants["C_1"])
        levels[j - 1] = math.sqrt((levels[j] ** 2 + 1) / ratio - 1)
    return levels
