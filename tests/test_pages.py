"""The code of every page runs, links and anchors lead somewhere, and the site has the whole API.

A page's blocks run in order, in one namespace and an empty folder. They hold what they assert themselves.
"""

import importlib
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FIGURES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/*.md"))
API = {page: re.findall(r"^::: (\S+)$", (ROOT / page).read_text(), re.MULTILINE) for page in PAGES}

# Pages whose blocks another file runs, because they need what it makes or because it looks at their results.
ELSEWHERE = {
    "README.md": "test_readme.py",  # compiled once
    "docs/checkpoints.md": "test_loading.py",  # files of weights
    "docs/diagnostics.md": "test_diagnostics.py",  # the estimate's error
    "docs/fid.md": "test_evaluate.py",  # a file of statistics
    "docs/generation.md": "test_generation.py",  # a place of images
    "docs/pipelines.md": "test_pipelines.py",  # folders of weights
    "docs/plotting.md": "test_plotting.py",  # the figures
    "docs/recipes.md": "test_recipes.py",  # each section's result; test_recipes_live.py has those of torch and Keras
}
SLOW = {f"docs/{name}.md" for name in ("choosing", "faq", "fitting", "index", "own_model", "testing")}


def blocks(page):
    """(line, code) of each block of Python, indented ones too."""
    text = (ROOT / page).read_text()
    for match in re.finditer(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        code = re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE)
        yield text[: match.start(2)].count("\n"), code


WITH_CODE = [page for page in PAGES if next(blocks(page), None)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in WITH_CODE if page not in ELSEWHERE],
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, ROOT / page, "exec"), names)


def test_pages_that_are_run_elsewhere_are_named_there():
    for page, test in ELSEWHERE.items():
        assert page in WITH_CODE, f"{page} has no code: take it out of ELSEWHERE"
        text = (ROOT / "tests" / test).read_text()
        assert page.split("/")[-1] in text, f"{test} does not read {page}"
    assert set(WITH_CODE) >= SLOW


# ---- links


def anchors(text):
    """GitHub's, of which those of the site are the same (slugify in mkdocs.yml)."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


@pytest.mark.fast
@pytest.mark.parametrize("page", [*PAGES, *FIGURES])
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"^( *)```.*?^\1```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]*)\)", re.sub(r"`[^`\n]*`", "", text)):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path) if path else ROOT / page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


# ---- the API


def public(module):
    """The names of a module that its users may use: those of `__all__`, else its own without an underscore."""
    listed = getattr(module, "__all__", None)
    own = lambda value: getattr(value, "__module__", None) == module.__name__
    names = listed or [name for name, value in vars(module).items() if not name.startswith("_") and own(value)]
    return [name for name in names if not isinstance(getattr(module, name), types.ModuleType)]


@pytest.mark.fast
def test_every_public_module_has_a_page_and_names_the_site_can_show():
    modules = [name for page in API for name in API[page]]
    assert len(modules) == len(set(modules))
    package = importlib.import_module("evodiff_jax")
    submodules = {n for n in package.__all__ if isinstance(getattr(package, n), types.ModuleType)}
    wanted = submodules | {"sampling", "citations", "types", "fitting", "generation", "evaluation", "pretrained"}
    assert {f"evodiff_jax.{name}" for name in wanted} == set(modules)
    names_of = {module: public(importlib.import_module(module)) for module in modules}
    shown = {id(getattr(sys.modules[module], name)) for module, names in names_of.items() for name in names}
    for name in public(package):
        assert id(getattr(package, name)) in shown, name


@pytest.mark.fast
def test_sections_of_docstrings_have_the_names_of_the_google_style():
    """`Example:` would be shown as text, its code as quotations."""
    for path in (ROOT / "evodiff_jax").rglob("*.py"):
        for heading in re.findall(r"^ +([A-Z]\w+):\n +\S", path.read_text(), re.MULTILINE):
            assert heading not in ("Example", "Return", "Raise", "Arguments", "Parameters", "Reference"), path


@pytest.mark.slow
def test_the_site_is_built_without_warnings_shows_every_public_name_and_asks_nothing_of_other_hosts(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the dependency group docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    inventory = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.split()[0] for line in inventory.splitlines()}
    for name in [name for page in API for name in API[page]]:
        missing = [n for n in public(importlib.import_module(name)) if f"{name}.{n}" not in shown]
        assert not missing, f"{name}: no docstring, or not found: {missing}"
    loads = r"<(?:script|img|link rel=\"(?:stylesheet|icon|preconnect)\")\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\"> ]*"
    for page in tmp_path.rglob("*.html"):
        assert not re.search(loads, page.read_text()), page
    assert not any("url(http" in path.read_text() for path in tmp_path.rglob("*.css"))
