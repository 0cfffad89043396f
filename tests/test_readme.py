"""The README does what it says."""

import re
from pathlib import Path

import pytest

import evodiff_jax

README = Path(__file__).parents[1] / "README.md"


def test_the_library_examples_run():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(code, names)
    assert names["x"].shape == names["state"].x.shape == (16, 32, 32, 3)
    assert names["side_by_side"].shape == (3, 16, 32, 32, 3)
    assert names["sample_any"]._cache_size() == 1


def test_every_solver_is_in_the_readme():
    listed = README.read_text().split("## Solvers")[1].split("\n## ")[0]
    for name in set(evodiff_jax.solvers.__all__) - {"SOLVERS", "Solver"}:
        assert f"`{name}(" in listed


def test_every_name_of_the_public_surface_exists():
    surface = README.read_text().split("## Public surface")[1].split("\n## ")[0]
    for room, names in re.findall(r"`ed\.(schedules|grids|denoisers|solvers)(\.[^|]*)\|", surface):
        for name in re.findall(r"\.([a-z_]+)", names.split("(")[0]):
            assert hasattr(getattr(evodiff_jax, room), name), f"ed.{room}.{name}"
    for name in re.findall(r"`ed\.([A-Za-z_]+)\(", surface):
        assert hasattr(evodiff_jax, name), name


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]*)\)", README.read_text()))
def test_local_links_exist(link):
    assert link.startswith("https://") or (README.parent / link).exists()
