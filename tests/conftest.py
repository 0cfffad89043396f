"""Fixtures for all tests."""

import os
import subprocess
import sys

import jax
import pytest

from evodiff_jax.numerics import enable_x64

# Compilation is most of the suite's time, so programs are compiled without optimizations; CI's run on the lowest
# versions sets the variable to 0 and has them compiled as users do.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


# Without these emitters XLA compiles for CPUs in less than half the time, into programs that are as exact.
_QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"


def pytest_configure():
    """Sets XLA's flag for all processes of the run, if the installed XLA knows it: an unknown one ends the process."""
    if "PYTEST_XDIST_WORKER" in os.environ or os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "0":
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK_TO_COMPILE}".strip()
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    if (
        subprocess.run(command, capture_output=True, check=False, env={**os.environ, "XLA_FLAGS": flags}).returncode
        == 0
    ):
        os.environ["XLA_FLAGS"] = flags


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
