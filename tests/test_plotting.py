"""Figures: what is drawn, that lines can be told apart in grey, that notebooks show them once, and what is refused."""

import io
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from PIL import Image
from test_notebook import kernel  # noqa: F401

import evodiff_jax as ed
from evodiff_jax import plotting
from evodiff_jax.diagnostics import Density, Diagnosis, Run, Trajectory
from evodiff_jax.plotting import style

EDM = ed.schedules.edm()
WHOLE = ed.NoiseSchedule(lambda t: 1 - t, lambda t: t, 0.0, 1.0)  # from alpha = 0 to sigma = 0
MAGENTA = (255, 0, 255)


def rendered(figure):
    """The figure's pixels, and that it is one without pyplot."""
    assert isinstance(figure, Figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def drawn(figure):
    """The pixels of its one picture."""
    (panel,) = figure.axes
    (picture,) = panel.images
    return np.asarray(picture.get_array())


def words(figure):
    return [text.get_text() for text in figure.texts]


def constant(values, side=4, channels=1):
    return np.broadcast_to(np.reshape(values, (-1, 1, 1, 1)), (len(values), side, side, channels)).astype(np.float32)


# ---- images


def test_a_grid_is_one_picture_whose_pixels_are_the_images():
    figure = plotting.images(constant(np.linspace(-1.5, 1.5, 64)), title="grey")
    pixels = drawn(figure)
    assert pixels.shape == (7 * 5 + 1, 10 * 5 + 1, 3)
    values = pixels[1::5, 1::5].reshape(-1, 3)[:64]
    expected = np.rint(127.5 * (np.clip(np.linspace(-1.5, 1.5, 64), -1, 1) + 1))
    np.testing.assert_array_equal(values, np.repeat(expected[:, None], 3, 1))
    assert (pixels[6 * 5 :, 4 * 5 + 1 :] == 255).all()  # the last row is not full
    assert words(figure) == ["grey"]
    shown = rendered(figure)
    # The first image is black and a whole number of the figure's pixels wide, each column alike.
    black = (shown == 0).all(2)
    side = 4 * (960 // 51)
    assert black.sum(1).max() >= side
    assert (np.diff(np.flatnonzero(black[black.sum(1).argmax()])[:side]) == 1).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, np.float64])
def test_images_of_any_floating_point_dtype(dtype):
    namespace = np if dtype == np.float64 else jnp
    pixels = drawn(plotting.images(namespace.asarray(constant([0.5, -1.0], channels=3), dtype)))
    assert (pixels[1:5, 1:5] == 191).all()
    assert (pixels[1:5, 6:10] == 0).all()


def test_pixels_that_are_not_finite_look_like_no_image():
    images = constant([0.0, 0.0], side=8, channels=3).copy()
    images[0, 2, 3, 1] = np.nan
    images[0, 2, 4] = np.inf
    images[1] = np.nan
    pixels = drawn(plotting.images(images))
    assert {tuple(pixels[3, 4]), tuple(pixels[3, 5])} == {MAGENTA, (0, 0, 0)}
    assert (pixels[1:3, 1:9] == 128).all()
    colours, counts = np.unique(pixels[1:9, 10:18].reshape(-1, 3), axis=0, return_counts=True)
    assert colours.tolist() == [[0, 0, 0], list(MAGENTA)]
    assert counts.tolist() == [32, 32]


def test_rows_have_names_on_the_left_and_are_aligned():
    rows = {"ddim": constant([-1, -1, -1]), "a solver with a long name": constant([0, 0, 0])}
    figure = plotting.images(rows, columns=2, title="rows")
    pixels = drawn(figure)
    assert pixels.shape == (2 * 5 + 2 * 5 + 2 + 1, 2 * 5 + 1, 3)  # two rows each, and a gap between the two
    assert (pixels[1:5, 1:5] == 0).all()
    assert (pixels[13:17, 1:5] == 128).all()
    assert words(figure) == ["ddim", "", "a solver with a long name", "", "rows"]
    left = figure.axes[0].get_window_extent().x0
    for name in figure.texts[:4]:
        assert name.get_window_extent().x0 >= 0
        assert name.get_window_extent().x1 <= left
    centre = lambda text: text.get_window_extent().get_points()[:, 1].mean()
    top = figure.axes[0].get_window_extent().y1
    zoom = figure.axes[0].get_window_extent().height / len(pixels)
    assert abs(centre(figure.texts[0]) - (top - 3 * zoom)) < 3
    assert abs(centre(figure.texts[2]) - (top - 15 * zoom)) < 3


def test_large_images_are_made_smaller_and_many_stay_within_what_can_be_drawn():
    assert rendered(plotting.images(constant([0.0] * 12, side=256))).shape[1] < 1000
    assert max(rendered(plotting.images(constant([0.0] * 700, side=32), columns=1)).shape) < 20_500


# ---- films


def made_run(schedule, shape, times=6, dtype=np.float32):
    grid = np.linspace(schedule.t_max, schedule.t_min, times)
    random = np.random.default_rng(0)
    states = random.standard_normal((times, *shape)).astype(np.float32)
    return Trajectory(
        jnp.asarray(grid, jnp.float32),
        jnp.asarray(states, dtype),
        jnp.asarray(np.clip(states[:-1], -0.5, 0.5), dtype),
        jnp.zeros((times - 1, shape[0]), bool),
    )


@pytest.mark.parametrize("schedule", [EDM, WHOLE])
def test_a_film_has_scaled_states_above_data_predictions(schedule):
    run = made_run(schedule, (3, 8, 8, 1))
    figure = plotting.film(run, schedule, samples=2, title="a run")
    pixels = drawn(figure)
    assert pixels.shape == (4 * 8 + 1 + 1 + 3 + 1 + 1, 6 * 9 + 1, 3)
    alpha, sigma = (np.asarray(f(run.times)) for f in (schedule.alpha, schedule.sigma))
    scaled = np.asarray(run.states) / np.hypot(alpha, sigma).reshape(-1, 1, 1, 1, 1)
    as_bytes = lambda image: np.rint(127.5 * (np.clip(image[..., 0], -1, 1) + 1))
    for sample, top in enumerate((1, 21)):
        for column in range(6):
            left = 1 + 9 * column
            found = pixels[top : top + 8, left : left + 8, 0].astype(int)
            assert np.abs(found - as_bytes(scaled[column, sample])).max() <= 1
            below = pixels[top + 9 : top + 17, left : left + 8, 0].astype(int)
            if column < 5:
                assert np.abs(below - as_bytes(np.asarray(run.outputs[column, sample]))).max() <= 1
            else:
                assert (below == 255).all()
    labels = ["sample 0: state", "data prediction", "sample 1: state", "data prediction"]
    heads = ["80", "64", "48", "32", "16", "0.002"] if schedule is EDM else ["∞", "4", "1.5", "0.67", "0.25", "0"]
    assert words(figure) == [*labels, *heads, "sigma / alpha", "a run"]
    assert len(rendered(figure)) > 100


def test_a_film_of_a_run_in_bfloat16_with_many_calls_and_numbers_that_are_not_finite():
    made = made_run(EDM, (2, 4, 4, 3), times=40, dtype=jnp.bfloat16)
    run = Run(made.times, made.states.at[-1, 1].set(jnp.nan), made.outputs, *[jnp.zeros(0)] * 2, (), made.broken)
    figure = plotting.film(run, EDM)
    pixels = drawn(figure)
    assert pixels.shape[1] == 16 * 5 + 1  # of 40 times
    heads = words(figure)[4:-1]
    assert (heads[0], heads[-1]) == ("80", "0.002")
    assert (pixels[13:17, -5:-1] == MAGENTA).all(2).sum() == 8  # the last state of the second sample


def test_states_of_two_coordinates_are_points_on_the_same_axes():
    run = made_run(WHOLE, (30, 2))
    figure = plotting.film(run._replace(states=run.states.at[2, :3].set(jnp.nan)), WHOLE, title="points")
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert len(panels) == 6 + 5
    scale = np.hypot(1 - run.times, run.times)
    for column, panel in enumerate(panels):
        (points,) = panel.collections
        places = np.asarray(points.get_offsets())
        expected = run.states[column] / scale[column] if column < 6 else run.outputs[column - 6]
        known = slice(3 * (column == 2), None)
        np.testing.assert_allclose(places[known], expected[known], rtol=1e-5)
        assert panel.get_xlim() == panel.get_ylim() == panels[0].get_xlim()
        assert panel.get_box_aspect() == 1
    low, high = panels[0].get_xlim()
    assert low == -high
    assert high > np.abs(run.states / scale[:, None, None]).max()
    assert [panel.get_title() for panel in panels[:3]] == ["sigma / alpha = ∞", "4", "1.5"]
    assert [text.get_text() for text in panels[2].texts] == ["3 not finite"]
    assert len(rendered(figure)) > 100


def test_first_predictions_that_are_far_off_are_counted_and_do_not_set_the_axes():
    run = made_run(WHOLE, (30, 2))
    figure = plotting.film(run._replace(outputs=run.outputs.at[0, :4].set(1000.0)), WHOLE)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert panels[0].get_xlim()[1] < 100
    assert [text.get_text() for text in panels[6].texts] == ["4 outside"]


# ---- solvers against model calls

VALUES = {
    "b": {10: (1.0, 0.5, 2.0), 5: (2.0, 1.5, 2.5)},
    "a": {5: (3.0, 3.1, 4.0), 8: np.float32(0.5), 10: jnp.asarray(0.25)},
}


def test_lines_against_model_calls():
    figure = plotting.against_calls(VALUES, metric="RMS error (units of the data)", title="a title")
    (panel,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines if line.get_label()[0] != "_"}
    assert lines == {"b": [[5, 2], [10, 1]], "a": [[5, 3], [8, 0.5], [10, 0.25]]}
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    assert panel.get_ylabel() == "RMS error (units of the data)"
    assert panel.get_xlabel() == "model calls a sample"
    assert panel.get_xticks().tolist() == [5, 8, 10]
    assert not panel.get_xticks(minor=True).size
    assert [text.get_text() for text in panel.get_xticklabels()] == ["5", "8", "10"]
    # Intervals from low to high, also where the value lies outside.
    bars = [np.asarray(part) for bar in panel.collections for part in bar.get_segments()]
    np.testing.assert_allclose(sorted(bar[:, 1].tolist() for bar in bars), [[0.5, 2], [1.5, 2.5], [3.1, 4]])
    rendered(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["b", "a"]
    assert legend.get_window_extent().x0 >= panel.get_window_extent().x1


def test_intervals_down_to_0_do_not_stretch_a_logarithmic_axis():
    (panel,) = plotting.against_calls(
        {"a": {5: (2.0, 0.0, 3.0), 6: (1.0, -1.0, 1.1), 8: (1.0, 1e-9, 2)}}, metric="m"
    ).axes
    assert panel.get_yscale() == "log"
    assert panel.get_ylim()[0] == pytest.approx(1 / 3)
    ticks = [label.get_text() for label in panel.get_yticklabels()]
    assert {"0.5", "1", "2"} <= set(ticks)


def test_values_of_0_and_below_are_on_a_linear_axis_and_what_is_not_finite_is_a_gap():
    (panel,) = plotting.against_calls({"a": {5: 0.3, 6: np.inf, 7: -0.1}}, metric="distance").axes
    assert panel.get_yscale() == "linear"
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), [0.3, np.nan, -0.1])


def test_labels_of_many_numbers_of_calls_do_not_overlap():
    figure = plotting.against_calls({"a": dict.fromkeys(range(1, 101), 1.0)}, metric="error")
    rendered(figure)
    extents = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(extents) > 5
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(extents))


def test_eighteen_solvers_can_be_told_apart_in_grey():
    styles = [style.line_style(index) for index in range(18)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 18
    # Relative luminance of sRGB, 0 for black.
    channels = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in style.COLOURS])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(np.maximum(linear @ [0.2126, 0.7152, 0.0722], 0.008856)) - 16
    neighbours = np.abs(np.diff(np.append(lightness, lightness[0])))
    assert (neighbours > 10).all(), lightness
    assert (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)).min() > 2  # contrast to white
    figure = plotting.against_calls({str(i): {5: i + 1.0, 9: i + 2.0} for i in range(18)}, metric="error")
    lines = figure.axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 18
    rendered(figure)
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= 0


# ---- diagnoses


def made_diagnosis(**changed):
    times = np.array([80.0, 10.0, 1.0, 0.1])
    values = {name: np.full((3, 4), 0.5) + np.arange(4) / 10 for name in ed.diagnostics.QUANTITIES}
    density = {order: Density(jnp.linspace(-4, 2, 7), jnp.full(7, 1 / 6)) for order in (1, 2)}
    return Diagnosis(times, -np.log(times), values | {"zeta": np.full((3, 4), np.nan)} | changed, density)


def test_diagnoses_have_a_panel_for_every_quantity_that_is_known():
    found = {"ddim": made_diagnosis(), "evodiff": made_diagnosis(zeta=np.full((3, 4), 0.3))}
    figure = plotting.diagnoses(found, "title")
    panels = {panel.get_title(): panel for panel in figure.axes if panel.get_visible()}
    assert len(panels) == len(ed.diagnostics.QUANTITIES) + 2
    np.testing.assert_allclose(panels["zeta"].lines[0].get_ydata(), 0.3)
    np.testing.assert_allclose(panels["zeta"].lines[0].get_xdata(), -2 * np.log([80, 10, 1]))
    after = panels["error of the state after the step"]
    assert len(after.lines) == 2
    np.testing.assert_allclose(after.lines[0].get_xdata(), -2 * np.log([10, 1, 0.1]))
    np.testing.assert_allclose(after.lines[0].get_ydata(), 0.65)
    assert len(panels["curvature of the converged trajectory"].lines) == 1
    for panel in panels.values():
        assert panel.get_xlabel().startswith("log-SNR")
        assert panel.get_ylabel() or panel.get_title() == "zeta"
    density = panels["where calls help"].lines
    for line in density:
        np.testing.assert_allclose(line.get_xdata(), np.linspace(-8, 4, 7), atol=1e-6)  # log-SNR, 2 lambda
        np.testing.assert_allclose(line.get_ydata(), 1 / 12, rtol=1e-6)
    assert [line.get_linestyle() for line in density] == ["-", "--"]
    orders = [f"calls, method of order {order}" for order in (1, 2)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ddim", "evodiff", *orders]


def test_the_legend_of_diagnoses_is_below_their_panels():
    values = made_diagnosis().values
    few = made_diagnosis()._replace(values={name: values[name] for name in ("state_error", "entropy")})
    figure = plotting.diagnoses({"ddim": few, "evodiff": few})
    rendered(figure)
    bottom = min(panel.get_window_extent().y0 for panel in figure.axes if panel.get_visible())
    assert figure.legends[0].get_window_extent().y0 >= 0
    assert figure.legends[0].get_window_extent().y1 <= bottom


# ---- what is refused


def test_bad_input_is_refused_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr(Figure, "__init__", lambda *_, **__: pytest.fail("a figure was made"))
    good, run = constant([0.0, 1.0]), made_run(EDM, (2, 4, 4, 1))
    pytree = run._replace(states={"image": run.states}, outputs={"image": run.outputs})
    p = plotting
    for error, match, call in (
        (TypeError, "must be floating-point numbers, images in -1 .. 1", lambda: p.images(good.astype(np.uint8))),
        (TypeError, "images must be concrete", lambda: jax.jit(p.images)(good)),
        (TypeError, "images", lambda: p.images("text")),
        (TypeError, "images must be an array", lambda: p.images([[1.0], [1.0, 2.0]])),
        (ValueError, r"\(N, H, W, C\), got shape \(4, 4, 1\)", lambda: p.images(good[0])),
        (ValueError, r"1 or 3 channels, .* \(2, 4, 4, 2\)", lambda: p.images(constant([0.0, 1.0], channels=2))),
        (ValueError, "must hold an image at least", lambda: p.images(good[:0])),
        (ValueError, "no finite number", lambda: p.images(np.full_like(good, np.nan))),
        (ValueError, "empty dictionary", lambda: p.images({})),
        (ValueError, r"no finite number, in shape \(2, 4", lambda: p.images({"b": np.full_like(good, np.nan)})),
        (ValueError, r"images\['b'\] must be images", lambda: p.images({"a": good, "b": good[0]})),
        (ValueError, r"one shape, .* a \(2, 4, 4, 1\), b \(1, 4", lambda: p.images({"a": good, "b": good[:1]})),
        (ValueError, "columns must be an integer", lambda: p.images(good, columns=0)),
        (TypeError, "title must be text", lambda: p.images(good, title=3)),
        (TypeError, "run must be a Run or a Trajectory", lambda: p.film(good, EDM)),
        (TypeError, "schedule must be a NoiseSchedule", lambda: p.film(run, None)),
        (TypeError, r"pass one leaf, such as run\._replace", lambda: p.film(pytree, EDM)),
        (ValueError, r"or \(R \+ 1, B, 2\), got \(6, 2, 4, 4\)", lambda: p.film(made_run(EDM, (2, 4, 4)), EDM)),
        (ValueError, "C = 1 or 3", lambda: p.film(made_run(EDM, (2, 4, 4, 2)), EDM)),
        (ValueError, "need as many times", lambda: p.film(run._replace(times=run.times[1:]), EDM)),
        (ValueError, "no state is finite", lambda: p.film(run._replace(states=run.states * jnp.nan), EDM)),
        (ValueError, "no state is finite", lambda: p.film(made_run(EDM, (0, 2)), EDM)),
        (ValueError, "samples must be", lambda: p.film(run, EDM, samples=0)),
        (TypeError, "must be dictionaries", lambda: p.against_calls([1.0], metric="m")),
        (TypeError, "must be dictionaries", lambda: p.against_calls({"a": [1.0]}, metric="m")),
        (ValueError, "must have a solver", lambda: p.against_calls({}, metric="m")),
        (ValueError, "each a number of calls", lambda: p.against_calls({"a": {}}, metric="m")),
        (TypeError, "calls must be an integer", lambda: p.against_calls({"a": {5.5: 1.0}}, metric="m")),
        (ValueError, "must be at least 1", lambda: p.against_calls({"a": {0: 1.0}}, metric="m")),
        (TypeError, "array of numbers", lambda: p.against_calls({"a": {5: "x"}}, metric="m")),
        (ValueError, r"\(value, low, high\), got shape", lambda: p.against_calls({"a": {5: (1.0, 2.0)}}, metric="m")),
        (ValueError, "got 2, 3, 1", lambda: p.against_calls({"a": {5: (2.0, 3.0, 1.0)}}, metric="m")),
        (ValueError, "no value is finite", lambda: p.against_calls({"a": {5: np.nan}}, metric="m")),
        (TypeError, "metric must be text", lambda: p.against_calls(VALUES, metric="")),
        (TypeError, "from diagnose", lambda: p.diagnoses([made_diagnosis()])),
        (TypeError, "from diagnose", lambda: p.diagnoses({"a": 3})),
        (ValueError, "a diagnosis at least", lambda: p.diagnoses({})),
        (ValueError, "no quantity", lambda: p.diagnoses({"a": made_diagnosis()._replace(values={}, density={})})),
    ):
        with pytest.raises(error, match=match):
            call()


# ---- notebooks


def test_ipython_shows_a_figure():
    data, _ = DisplayFormatter().format(plotting.images(constant([0.0])))
    assert set(data) == {"image/png", "text/plain"}
    assert data["image/png"][:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", ["", "import matplotlib.pyplot", "%matplotlib inline", "import matplotlib.pyplot\n%matplotlib inline"]
)
def test_a_notebook_shows_a_figure_once(before, kernel, tmp_path):  # noqa: F811
    first = (
        "import sys\nimport numpy as np\nfrom evodiff_jax import plotting\n"
        "def draw():\n    return plotting.images(np.zeros((1, 4, 4, 1)))"
    )
    loaded = f"assert ('matplotlib.pyplot' in sys.modules) == {bool(before)}"
    cells = [first, before, "draw()", "figure = draw()", "figure", loaded, "import matplotlib.pyplot\ndraw()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": tmp_path}}
    ).execute()
    pictures = [[output for output in cell.outputs if "image/png" in output.get("data", {})] for cell in notebook.cells]
    assert [len(shown) for shown in pictures[2:]] == [1, 0, 1, 0, 1]
    assert all(len(cell.outputs) <= 1 for cell in notebook.cells)


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "plotting.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/plotting.md", "exec"), names)
    pictures = re.findall(r"\(images/(.*?)\)", page)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(pictures)
    for name in pictures:
        kept = Path(__file__).parents[1] / "docs" / "images" / name
        assert kept.stat().st_size <= 40_000
        with Image.open(kept) as ours, Image.open(name) as made:
            assert ours.size == made.size
