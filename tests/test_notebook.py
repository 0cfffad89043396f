import ast
import base64
import io
import json
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from PIL import Image
from test_readme import resolved

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))


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


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_is_python_and_names_what_the_library_has(path):
    """What can be told without running it."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith(("!", "%")))
    ast.parse(code)
    names = set(re.findall(r"\b(?:ed|evodiff_jax)(?:\.[A-Za-z_]\w*)+", code))
    assert len(names) > 5
    for name in names:
        resolved(name)


@pytest.mark.slow
def test_quickstart_runs(kernel, tmp_path):
    path = next(path for path in NOTEBOOKS if path.stem == "quickstart")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    warned = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    assert warned == ""

    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    sizes = []
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            low, high = picture.getextrema()
            assert high - low > 200
            sizes.append(picture.size)
    assert sizes == [(560, 224), (560, 168), (560, 168), (560, 616), (288, 288)]

    distances = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("NFE")]
    assert len(distances) == 3
    assert distances == sorted(distances, reverse=True)
    assert printed.count("to sigma") == 8
    words = next(line for line in printed.splitlines() if line.startswith("radius")).replace(",", "").split()
    assert float(words[1]) == pytest.approx(1, abs=0.05)
    assert float(words[-1]) < 0.2
