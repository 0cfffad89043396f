"""The rooms of the house: imports go one way, the core is light, docstring examples run."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import evodiff_jax

ROOT = Path(evodiff_jax.__file__).parent

# A module may import those of its own line and the lines above it, never one below.
LAYERS = [
    ["types", "numerics", "files", "interrupts", "extras", "preconditioning"],
    ["tables", "schedules", "sums"],
    ["kernel", "quadrature", "denoisers", "grids", "statistics"],
    ["solvers", "citations"],
    ["sampling", "editing", "testing", "diagnostics"],
    ["plotting"],
    ["pretrained", "fitting"],
    ["generation"],
    ["evaluation"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


def imported_rooms(module):
    path = ROOT.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "evodiff_jax" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "evodiff_jax"])
def test_imports_go_one_way(module):
    room = module.split(".")[1]
    assert room in LEVEL, f"{room} has no place in the architecture: add it to LAYERS and to docs/architecture.md"
    for other in imported_rooms(module):
        if other in LEVEL:  # else a name of the package itself, such as __version__
            assert LEVEL[other] <= LEVEL[room], f"{module} imports {other}, which stands above it"


def test_importing_the_library_loads_the_core_and_runs_nothing_on_a_device():
    code = (
        "import sys, evodiff_jax; "
        "print([m for m in ('flax', 'optax', 'orbax', 'PIL', 'tqdm', 'safetensors', 'chex', 'hypothesis', "
        "'matplotlib', 'evodiff_jax.pretrained', 'evodiff_jax.cli') if m in sys.modules]); "
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["[]", "False", ""]


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_docstring_examples(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_the_public_names_are_there_and_documented():
    for name in evodiff_jax.__all__:
        assert getattr(evodiff_jax, name).__doc__
    for name in evodiff_jax.solvers.__all__:
        assert name == "FORMS" or getattr(evodiff_jax.solvers, name).__doc__
