"""Generation of many samples."""

from evodiff_jax.generation._digests import digest_of_arrays, digest_of_params, digest_of_plan
from evodiff_jax.generation._images import UINT8, to_uint8
from evodiff_jax.generation._program import (
    Source,
    classes_in_turn,
    images_from_key,
    program,
    program_from_key,
)

__all__ = [
    "UINT8",
    "Source",
    "classes_in_turn",
    "digest_of_arrays",
    "digest_of_params",
    "digest_of_plan",
    "images_from_key",
    "program",
    "program_from_key",
    "to_uint8",
]
