"""Fixtures for all tests."""

import os

import jax
import pytest

from evodiff_jax.numerics import enable_x64

# Compilation is most of the suite's time, so programs are compiled without optimizations; CI's run on the lowest
# versions sets the variable to 0 and has them compiled as users do.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 on the device for one test."""
    with enable_x64():
        yield


@pytest.fixture
def strict_promotion():
    """Mixing dtypes by accident is an error."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def optimized():
    """Programs compiled as users have them, for tests that measure what the compiler made."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
