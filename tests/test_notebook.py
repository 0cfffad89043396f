"""The notebooks: what can be told without running them, and what they print and draw when they run (slow)."""

import ast
import base64
import inspect
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nbclient
import nbformat
import pytest
from PIL import Image
from test_readme import resolved

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))
REPOSITORY = "https://github.com/evodiff-jax/evodiff_jax"
COLAB = "https://colab.research.google.com"
SECONDS = 300  # for each notebook, on two cores

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class Shown(NamedTuple):
    """What a notebook has printed and drawn.

    Attributes:
      printed: its standard output.
      pictures: all pictures, in their order.
    """

    printed: str
    pictures: list[Image.Image]

    def lines(self, start: str) -> list[str]:
        """The printed lines that begin with `start`."""
        return [line for line in self.printed.splitlines() if line.startswith(start)]

    def numbers(self, start: str) -> list[list[float]]:
        """The numbers on each of these lines, without those of `start`."""
        return [[float(word) for word in _NUMBER.findall(line[len(start) :])] for line in self.lines(start)]


_NUMBER = re.compile(r"(?<![\w.])[-+]?\d*\.?\d+(?:e[-+]?\d+)?(?!\w)")


def check_quickstart(shown: Shown) -> None:
    assert len(shown.pictures) == 5
    before, after = shown.printed.split("the reference took 80 calls")
    assert before.count("compiling") == 2  # variance_optimal, whatever the number of steps, and heun
    assert after.count("compiling") == 5  # four other solvers and the fitted plan
    assert [calls for calls, _ in shown.numbers("NFE")] == [5, 10, 20]
    distances = [distance for _, distance in shown.numbers("NFE")]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] < 0.2
    for name in ("ddim", "dpm_solver_pp(2)", "unipc(2)", "evodiff", "variance_optimal"):
        (numbers,) = shown.numbers(name)
        assert numbers[::2] == [5, 8, 12, 20]
        assert numbers[-1] < 0.5 * numbers[1]
    (free,), (fitted,) = shown.numbers("5 calls, variance_optimal"), shown.numbers("5 calls, fitted plan")
    assert fitted[0] < 0.6 * free[0]


def check_editing(shown: Shown) -> None:
    assert len(shown.pictures) == 8
    by_strength = shown.numbers("strength")
    assert [calls for _, calls, _, _ in by_strength] == [18, 22, 26, 30, 40]
    changes = [change for *_, change in by_strength]
    assert changes == sorted(changes)
    kept = shown.numbers("20 calls") + shown.numbers("100 calls, new noise")
    assert kept == [[0.0]] * 4
    (rough, _), (fine, size) = shown.numbers("10 steps")[0], shown.numbers("40 steps")[0]
    assert fine < 0.1 * rough
    assert size == pytest.approx(1, abs=0.03)
    ((arc, line),) = shown.numbers("size halfway")
    assert arc == pytest.approx(1, abs=0.05)
    assert line == pytest.approx(0.5**0.5, abs=0.05)


def check_fitted_plan(shown: Shown) -> None:
    assert len(shown.pictures) == 4
    ((before, after),) = shown.numbers("median distance")
    assert after < 0.3 * before
    assert "the same samples: True" in shown.printed
    (refusal,) = shown.lines("refused")
    assert "fitted to another model" in refusal
    # Lines "NAME CALLS calls: median distance MEDIAN (LOW .. HIGH)": 4 calls of the mixture, 4 to 6 of the network.
    fitted = shown.numbers("fitted ")
    assert [calls for calls, *_ in fitted] == [4, 4, 5, 6]
    for name in ("dpm_solver_pp(2)", "unipc(2)", "ipndm(3)", "variance_optimal"):
        for (_, _, _, high), (_, _, low, _) in zip(fitted, shown.numbers(name), strict=True):
            assert high < low


def check_public_checkpoint(shown: Shown) -> None:
    assert len(shown.pictures) == 3
    assert "uses a stand-in with random weights" in shown.printed
    assert shown.lines("refused") == ["refused:  nothing"]
    assert shown.lines("problem") == ["problem:  none"]
    for name in ("dpm_solver_pp(2)", "unipc(2)", "evodiff", "variance_optimal"):
        ((five, first, ten, second, twenty, third),) = shown.numbers(name)
        assert (five, ten, twenty) == (5, 10, 20)
        assert first > second > third
    assert shown.lines("50,000 images in 10 calls")


def check_own_network(shown: Shown) -> None:
    assert len(shown.pictures) == 7
    for name in ("linen, noise prediction: loss", "NNX, v prediction: loss"):
        ((first, last),) = shown.numbers(name)
        assert last < 0.3 * first
    for name in ("read as data prediction, error", "NNX, v prediction: error"):
        assert shown.numbers(name)[0][0] < 0.3
    assert "predicts 'epsilon': give from_prediction that" in " ".join(shown.printed.split())
    # Lines "NAME: error ERROR, of the kind that was asked for SHARE%"
    ((new, _),), ((noise, _),), ((clipped, kind),), ((v, same),) = map(
        shown.numbers, ("new pictures", "linen, noise  ", "the same, clipped", "NNX, v  ")
    )
    assert new < v < clipped < noise
    assert clipped < 0.35
    assert min(kind, same) >= 90
    by_scale = {scale: values for scale, *values in shown.numbers("scale")}  # share in %, error, largest value
    assert by_scale[0.0][0] < 60 < 95 <= by_scale[1.0][0]
    assert by_scale[8.0][1] > 1.5 * by_scale[1.0][1]
    for name in ("ddim", "dpm_solver_pp(2)", "unipc(2)", "evodiff", "variance_optimal"):
        (numbers,) = shown.numbers(name)
        assert numbers[::2] == [5, 10, 20]
        assert numbers[-1] < 0.5 * numbers[1]


def check_many_devices(shown: Shown) -> None:
    assert len(shown.pictures) == 4
    assert len(shown.lines("cpu:")) == 8
    differences = shown.numbers("largest difference from one device")
    assert len(differences) == 2  # by jit and by shard_map
    assert max(differences) < [1e-4]
    assert shown.numbers("one key") == [[4, 32, 32]]
    ((half,),) = shown.numbers("result float32, difference from float32")
    assert 0 < half < 0.05
    assert [used for used, _ in shown.numbers("devices:")] == [1, 2, 4, 8]
    ((made,),) = shown.numbers("interrupted when")
    ((kept, others, whole),) = shown.numbers("chunks kept:")
    assert made < whole == 200
    assert kept > 0
    assert 40 * kept + others == whole
    assert shown.lines("equal")


def check_inside_the_solver(shown: Shown) -> None:
    assert len(shown.pictures) == 4
    for name in ("ddim            largest", "dpm_solver_pp   largest", "unipc           largest"):
        assert shown.numbers(name)[0][0] < 1e-4
    chosen = shown.numbers("step to sigma")
    assert len(chosen) == 8
    for _, zeta, zeta_low, zeta_high, eta, eta_low, eta_high in chosen:
        assert 0.37 < zeta_low <= zeta <= zeta_high < 0.83
        assert 0.25 <= eta_low <= eta <= eta_high < 0.45
    (ddim,), (optimal,) = shown.numbers("ddim              error")[0], shown.numbers("variance_optimal  error")[0]
    assert optimal < 0.5 * ddim
    assert "ValueError: the table of solver 'wrong': row 0" in shown.printed
    assert "remembers 1 output, order 2.0" in shown.printed
    assert shown.numbers("largest difference from dpm_solver_pp")[0][0] < 1e-5
    assert shown.numbers("sums over each sample: 2;")[0][0] < 1e-4
    kept = shown.numbers("from sigma")
    assert len(kept) == 10
    assert kept[0][1:] == [1, 1, 1]
    assert min(mean for _, mean, *_ in kept) < 0.7
    for name in ("line ", "careful ", "dpm_solver_pp(2)", "unipc(2)", "evodiff", "variance_optimal"):
        numbers = shown.numbers(name)[-1]
        assert numbers[::2] == [5, 7, 10, 15, 20]
        assert numbers[-1] < 0.5 * numbers[1]


CHECKS: dict[str, Callable[[Shown], None]] = {
    "quickstart": check_quickstart,
    "editing": check_editing,
    "fitted_plan": check_fitted_plan,
    "public_checkpoint": check_public_checkpoint,
    "own_network": check_own_network,
    "many_devices": check_many_devices,
    "inside_the_solver": check_inside_the_solver,
}
"""For each notebook, by its name, what is asserted of a run."""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The kernel "python3" is this interpreter, whatever is installed for the user."""
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("EVODIFF_STAND_IN", "1")  # nothing is downloaded


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    """All of its Python; magics and commands of the shell, which may stand under an `if`, become `pass`."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", "\n\n".join(cells), flags=re.MULTILINE)


def test_each_notebook_has_its_checks():
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@every_notebook
def test_committed_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@every_notebook
def test_begins_with_a_title_a_badge_and_the_installation(path):
    first, second, *others = read(path).cells
    title, paragraph, badge = first.source.split("\n\n")
    assert first.cell_type == "markdown"
    assert re.fullmatch(r"# .+", title)
    assert len(paragraph.split()) > 20
    target = f"{COLAB}/github/evodiff-jax/evodiff_jax/blob/main/colab/{path.name}"
    assert badge == f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target})"
    assert second.cell_type == "code"
    assert second.source == (
        "import importlib.util\n\n"
        'if importlib.util.find_spec("evodiff_jax") is None:\n'
        f'    %pip install -q "evodiff-jax[all] @ git+{REPOSITORY}"'
    )
    assert others[0].cell_type == "markdown"


@every_notebook
def test_every_cell_of_code_has_text_before_it(path):
    """And is short enough to be read at once."""
    cells = read(path).cells
    for before, cell in itertools.pairwise(cells[1:]):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert len(cell.source.splitlines()) <= 40, cell.source


@every_notebook
def test_every_cell_is_python_and_names_what_the_library_has(path):
    """What can be told without running it."""
    code = code_of(read(path))
    ast.parse(code)
    names = set(re.findall(r"\b(?:ed|evodiff_jax)(?:\.[A-Za-z_]\w*)+", code))
    for module, listed in re.findall(r"^from (evodiff_jax[\w.]*) import (.+)$", code, re.MULTILINE):
        for name in listed.split(", "):
            resolved(f"{module}.{name}")
            if inspect.ismodule(resolved(f"{module}.{name}")):
                names |= {f"{module}.{used}" for used in re.findall(rf"\b{name}(?:\.[A-Za-z_]\w*)+", code)}
    assert len(names) > 5
    for name in names:
        resolved(name)


@every_notebook
def test_its_links_lead_to_files_of_the_repository(path):
    root = path.parents[1]
    for cell in read(path).cells:
        for link in re.findall(rf"\({REPOSITORY}/blob/main/([^)#]*)", cell.source):
            assert (root / link).is_file(), link


@pytest.mark.slow
@every_notebook
def test_runs(path, kernel, tmp_path):
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=SECONDS, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    # The licence of weights is told there too, once.
    assert [line for line in _stream(outputs, "stderr").splitlines() if ", licence " not in line] == []
    pictures = [_picture(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        low, high = picture.convert("L").getextrema()
        assert high - low > 200
    CHECKS[path.stem](Shown(_stream(outputs, "stdout"), pictures))


def _stream(outputs, name):
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == name)


def _picture(data):
    return Image.open(io.BytesIO(base64.b64decode(data))).copy()
