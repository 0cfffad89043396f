"""The README and the other documents say what is true of the code."""

import importlib
import re
from pathlib import Path

import pytest
from test_architecture import LAYERS
from test_pages import FIGURES, PAGES

import evodiff_jax as ed

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOLVERS = (ROOT / "docs" / "solvers.md").read_text()
FORM_ROWS = [
    [cell.strip() for cell in row.strip("|").split("|")]
    for row in re.search(r"^\| Form \|.*\n\| ---.*\n((?:\|.*\n)+)", SOLVERS, re.MULTILINE)[1].splitlines()
]
RENAMED = (ROOT / "CHANGELOG.md").read_text().split("| --- | --- |\n")[1].split("\n\n")[0].splitlines()


def makers():
    """The functions of `ed.solvers` that return a solver."""
    return {n: getattr(ed.solvers, n) for n in ed.solvers.__all__ if callable(getattr(ed.solvers, n)) and n.islower()}


def resolved(name):
    """What a dotted name of the documents stands for."""
    module, *rest = name.replace("ed.", "evodiff_jax.", 1).split(".") if name.startswith("ed.") else name.split(".")
    found = importlib.import_module(module)
    for depth, part in enumerate(rest):
        if not hasattr(found, part):
            importlib.import_module(".".join([module, *rest[: depth + 1]]))
        found = getattr(found, part)
    return found


def test_the_example_runs_and_is_compiled_once():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["x"].shape == (16, 32, 32, 3)
    assert names["sample"]._cache_size() == 1
    denoise = ed.denoisers.from_prediction(lambda x, t: names["network"](0.5, x, t), names["schedule"], "epsilon")
    plan = ed.plan(names["schedule"], ed.grids.log_snr(names["schedule"], 20), ed.solvers.unipc(2))
    difference = names["x"] - ed.sample(denoise, names["x_T"], plan)
    assert abs(difference).max() < 1e-3


def test_the_readme_is_short_and_its_commands_stand_on_lines_of_their_own():
    lines = README.splitlines()
    assert len(lines) <= 150
    for command in ("evodiff-jax sample", "pytest"):
        assert f"    pip install uv && uv run {command}" in lines


@pytest.mark.parametrize("page", [*PAGES, *FIGURES])
def test_every_name_of_the_library_in_a_document_exists(page):
    text = (ROOT / page).read_text()
    if page == "CHANGELOG.md":
        text = "\n".join(row.split("|")[2] for row in RENAMED)
    for name in set(re.findall(r"\b(?:ed|evodiff_jax)(?:\.[A-Za-z_]\w*)+", text)):
        resolved(name)
    for path in set(re.findall(r"`((?:evodiff_jax|tests|benchmarks|docs|colab)/[\w./]+)`", text)):
        assert (ROOT / path).exists(), path


def test_the_table_of_forms_is_the_registry():
    assert [row[0] for row in FORM_ROWS] == list(ed.solvers.FORMS)
    for name, code, calls, order, corrects, stochastic, paper in FORM_ROWS:
        form = ed.solvers.FORMS[name]
        solver = eval(code.strip("`"), makers())
        assert solver == form.make(), name
        assert int(calls) == form.calls, name
        assert order == ("-" if form.order is None else str(form.order)), name
        assert (corrects, stochastic) == tuple("yes" if flag else "no" for flag in (form.corrects, form.stochastic))
        cited = set(re.findall(r"\d{4}\.\d{5}", ed.citation(solver)))
        assert cited, f"{name} has no paper in citations.py"
        assert set(re.findall(r"\d{4}\.\d{5}", paper)) == cited, name


def test_every_solver_is_in_the_documents():
    for name in makers():
        assert f"`{name}(" in SOLVERS, name


def test_the_layers_of_the_architecture_are_those_that_are_checked():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", page, re.MULTILINE)
    assert [int(level) for level, _ in rows] == list(range(len(rows)))
    assert [re.findall(r"`(\w+)`", modules) for _, modules in rows] == LAYERS[:-1]  # without __main__


def test_every_solver_that_the_readme_recommends_exists():
    table = README.split("## Which solver?")[1].split("\n## ")[0]
    codes = set(re.findall(r"`(\w+\([^`]*\))`", table))
    assert len(codes) >= 6
    for code in codes:
        assert isinstance(eval(code, makers()), ed.Solver)


def test_the_version_is_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (.*)$", changes, re.MULTILINE)[1] == ed.__version__
    assert f"\nversion: {ed.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_citation_file_names_the_authors_of_the_paper():
    cff = (ROOT / "CITATION.cff").read_text()
    paper = ed.citation(ed.solvers.evodiff()).split("\n\n")[0]
    title = re.search(r"title = \{(.*)\},", paper)[1].replace("{", "").replace("}", "")
    assert f'title: "{title}"' in cff
    authors = re.search(r"author = \{(.*)\},", paper)[1].split(" and ")
    listed = zip(*(re.findall(rf"{part}-names: (.*)", cff) for part in ("family", "given")), strict=True)
    assert [f"{family}, {given}" for family, given in listed] == authors
    assert re.search(r"eprint = \{(.*)\}", paper)[1] in cff


def test_the_changelog_has_a_successor_for_every_public_name_of_the_first_version_that_is_gone():
    gone = ("sample_plan", "plans", "stepping", "evodiff_reference", "SOLVERS", "models", "comparison", "training")
    for name in gone:
        assert not hasattr(ed, name)
        assert any(re.search(rf"\b{name}\b", row.split("|")[1]) for row in RENAMED), name
