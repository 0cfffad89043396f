"""Many samples on many devices and hosts, written as they are made, by runs that can be stopped at any time.

`generate` makes them, `open` reads them back, `verify` and `export` do what they say. The engines are JAX's own
(`jax.distributed`, `jax.sharding`) and TensorStore, which `evodiff-jax[generate]` installs.
"""

from evodiff_jax.generation._digests import digest_of_arrays, digest_of_params, digest_of_plan
from evodiff_jax.generation._engine import Made, check, generate
from evodiff_jax.generation._hosts import HEARTBEAT_SECONDS, Hosts, join
from evodiff_jax.generation._images import UINT8, to_uint8
from evodiff_jax.generation._program import (
    Source,
    classes_in_turn,
    images_from_key,
    program,
    program_from_key,
)
from evodiff_jax.generation._reading import Images, Verified, export, open, verify

__all__ = [
    "HEARTBEAT_SECONDS",
    "UINT8",
    "Hosts",
    "Images",
    "Made",
    "Source",
    "Verified",
    "check",
    "classes_in_turn",
    "digest_of_arrays",
    "digest_of_params",
    "digest_of_plan",
    "export",
    "generate",
    "images_from_key",
    "join",
    "open",
    "program",
    "program_from_key",
    "to_uint8",
    "verify",
]
