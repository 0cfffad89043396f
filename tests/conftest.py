"""Fixtures for all tests."""

import jax
import pytest

from evodiff_jax.numerics import enable_x64


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
