"""The README does what it says."""

import re
from pathlib import Path

import pytest

import evodiff_jax

README = Path(__file__).parents[1] / "README.md"


def test_the_library_example_runs():
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["x"].shape == (16, 32, 32, 3)


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
