"""`evodiff-jax compare`, the store of its runs, and what its report says."""

import csv
import importlib.util
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import write_model

from evodiff_jax import evaluation, plan, pretrained, solvers
from evodiff_jax.cli import main
from evodiff_jax.evaluation import Ratio, Result, _document, _plots, _report, _results, _runs, _store
from evodiff_jax.evaluation.metrics import Estimate

RUN = [
    "compare",
    "--solvers",
    "variance_optimal",
    "ddim",
    "unipc-2",
    "--grids",
    "log_snr",
    "--calls",
    "6",
    "4",
    "--samples",
    "20",
]
EXACT = [*RUN, "--exact", "mixture-2d", "--out", "out"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, with references of few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs.converged, "__defaults__", (30,))
    return tmp_path


@pytest.fixture
def sampled(monkeypatch):
    """The solvers that are compiled."""
    names, make_sampler = [], _results.make_sampler

    def counting(problem, solver, max_calls):
        names.append(max_calls)
        return make_sampler(problem, solver, max_calls)

    monkeypatch.setattr(_results, "make_sampler", counting)
    monkeypatch.setattr(_runs, "make_sampler", counting)
    return names


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# The command


def test_a_comparison_and_what_it_writes(folder, capsys, sampled):
    assert main(EXACT) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "judged   by the 2 coordinates, against 10,000 draws" in printed.out
    assert "runs     6 of 20 samples, seed 0" in printed.out
    assert sampled == [30, 6, 6, 6]  # the reference, and each solver once
    rows = rows_of(folder / "out" / "results.csv")
    assert [(row["solver"], row["calls"]) for row in rows] == [
        (solver, calls) for solver in ("variance_optimal", "ddim", "unipc-2") for calls in ("4", "6")
    ]
    for row in rows:
        for figure in ("frechet", "kernel", "median", "worst_tenth", "rms"):
            assert float(row[f"{figure}_low"]) <= float(row[figure]) <= float(row[f"{figure}_high"])
    text = (folder / "out" / "report.md").read_text()
    errors = {(row["solver"], row["calls"]): float(row["median"]) for row in rows}
    peer = min(("ddim", "unipc-2"), key=lambda solver: errors[solver, "4"])
    ratio = errors["variance_optimal", "4"] / errors[peer, "4"]
    (line,) = re.findall(r"### Median trajectory error, ratio.*\n\n.*\n.*\n\| mixture-2d \| (.*?) \|", text)
    assert re.fullmatch(rf"\*?\*?{re.escape(f'{ratio:.3g}')}\*?\*? \(.*\) `{peer}`", line)
    assert "best grid" not in text  # there is but one
    assert "FID" in text
    assert text.count("FID") == 1  # where it says that there is none
    assert "![mixture-2d](mixture-2d.png)" in text
    with Image.open(folder / "out" / "mixture-2d.png") as picture:
        assert picture.size[0] > 1000

    # Once more it makes nothing; with a run gone, that one alone.
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    sampled.clear()
    assert main(EXACT) == 0
    assert sampled == []
    assert {path: path.read_bytes() for path in before} == before
    (lost,) = (folder / "out" / "mixture-2d").glob("ddim_log_snr_4_*.npy")
    lost.unlink()
    assert main(EXACT) == 0
    assert sampled == [6]
    assert lost.read_bytes() == before[lost]
    assert (folder / "out" / "results.csv").read_bytes() == before[folder / "out" / "results.csv"]

    # Another configuration is another folder.
    capsys.readouterr()
    sampled.clear()
    for change, reason in (
        (["--seed", "1"], "seed 0 there, 1 here"),
        (["--samples", "21"], "samples 20 there, 21 here"),
    ):
        assert main([*EXACT, *change]) == 2
        assert reason in capsys.readouterr().err
    assert sampled == []


@pytest.mark.slow
def test_a_checkpoint_of_other_images_is_judged_by_its_pixels(folder, capsys, sampled):
    path = write_model(folder / "tiny.safetensors")
    run = ["compare", "--checkpoint", path, "--solvers", "variance_optimal", "ddim", "--calls", "3", "10"]
    run += ["--samples", "12"]
    assert main([*run, "--grids", "karras", "--out", "out", "--guidance", "2"]) == 0
    assert "judged   by the pixels, against 24 converged samples from other noise" in capsys.readouterr().out
    text = (folder / "out" / "report.md").read_text()
    for calls in (3, 10):
        name = f"tiny_karras_{calls}_calls.png"
        assert f"({name})" in text
        with Image.open(folder / "out" / name) as picture:
            # 9 pixels ten times as large; ten columns of the same noise with names, and a row for what is converged
            assert picture.width > 10 * 90 + 10 + 2 * 8
            assert picture.height == 3 * 90 + 10 + 2 * 8
    (stored,) = (folder / "out" / "tiny").glob("ddim_karras_3_*.npy")
    assert np.load(stored).shape == (12, 8, 8, 1)
    sampled.clear()
    assert main([*run, "--grids", "karras", "--out", "out"]) == 2
    assert "guidance 2.0 there, 1.0 here" in capsys.readouterr().err
    write_model(folder / "tiny.safetensors", fill=0.01)
    assert main([*run, "--grids", "karras", "--out", "out", "--guidance", "2"]) == 2
    assert "weights" in capsys.readouterr().err
    assert sampled == []


def test_an_unusable_model(folder, capsys):
    path = write_model(folder / "broken.safetensors", fill=np.nan)
    assert main(["compare", "--checkpoint", path, "--samples", "10", "--out", "out"]) == 2
    assert re.fullmatch(r"evodiff-jax: error: .*not finite: the model is unusable\n", capsys.readouterr().err)
    assert not list((folder / "out").rglob("*.npy"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--solvers ddim euler2", "unipc-3, deis-2"),
        ("--grids cosine", "time_quadratic"),
        ("--calls 0", "1 .. 1000, got '0'"),
        ("--calls five", "1 .. 1000, got 'five'"),
        ("--calls 5 --solvers heun dpm_2", "have no runs of 5 calls"),
        ("--samples 9", "10 .. 50000, got '9'"),
        ("--batch 0", "1 .. 50000"),
        ("--seed -1", "0 .. 4294967295"),
        ("--guidance nan", "0 .. 100"),
        ("--exact mixture-3d", "mixture-2d, mixture-64d, got 'mixture-3d'"),
        ("--exact mixture-2d --guidance 2", "--guidance: not with --exact"),
        ("--exact mixture-2d --checkpoint x.safetensors", "--checkpoint: not with --exact"),
        ("--exact mixture-2d --data .", "--data: not with --exact"),
        ("--checkpoint missing.safetensors", "missing.safetensors"),
        ("--checkpoint cifar", "fashion_mnist"),
        ("--data nowhere", "t10k-images-idx3-ubyte[.gz] is not in nowhere"),
        ("--out taken", "is a file"),
        ("--out nowhere/out", "no folder 'nowhere'"),
        (f"--out {'x' * 256}", "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(folder, capsys, sampled, monkeypatch, arguments, reason):
    (folder / "taken").write_bytes(b"")
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    assert main(["compare", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"evodiff-jax: error: [^\n]+\n", printed.err)
    assert reason in printed.err
    assert [path.name for path in folder.iterdir()] == ["taken"]


def test_without_matplotlib_it_says_so_before_any_work(folder, capsys, sampled, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(EXACT) == 2
    assert "pip install 'evodiff-jax[plots]'" in capsys.readouterr().err
    assert main([*EXACT, "--solvers", "euler2"]) == 2
    assert "got 'euler2'" in capsys.readouterr().err  # the user's own mistake first
    assert list(folder.iterdir()) == []


def test_samples_of_a_solver_that_has_changed_are_not_read(folder, sampled):
    problem, grids = evaluation.mixture("mixture-2d", 20, folder), {"log_snr": _runs.log_snr}

    def changed():
        ddim = solvers.ddim()

        def table(schedule, times):
            made = ddim.table(schedule, times)
            return made._replace(predictor=made.predictor + 0.01)

        return ddim._replace(table=table, keeps_constants=False)

    before, after, again = (
        next(evaluation.compare(problem, grids, [4], folder, {"ddim": make}, resamples=5))
        for make in (solvers.ddim, changed, solvers.ddim)
    )
    assert before == again
    assert after.rms.value != before.rms.value
    assert sampled == [30, 4, 4]
    rules = [solvers.evodiff(), solvers.evodiff(last_step="released"), solvers.evodiff(channel_axis=1)]
    times = np.array([80.0, 1.0, 0.1])
    digests = [evaluation.digest_of_plan(plan(problem.schedule, times, solver)) for solver in rules]
    assert len(set(digests)) == 3


# The store


def test_a_store_without_settings_is_taken_if_it_fits(folder):
    store = folder / "problem"
    store.mkdir()
    np.save(store / "ddim_log_snr_5.npy", np.zeros((7, 2)))
    with pytest.raises(ValueError, match="holds 7 samples, not 8"):
        evaluation.check_store(store, {"samples": 8})
    evaluation.check_store(store, {"samples": 7, "seed": 1})
    assert json.loads((store / "settings.json").read_text())["seed"] == 1
    evaluation.check_store(store, {"samples": 7, "seed": 1})
    with pytest.raises(ValueError, match="guidance None there"):
        evaluation.check_store(store, {"samples": 7, "seed": 1, "guidance": 2.0})
    (store / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        evaluation.check_store(store, {"samples": 7, "seed": 1})


def test_figures_are_kept_by_the_content_of_the_arrays(folder):
    counted = []

    def get(array, common=1.0):
        def compute():
            counted.append(array)
            return [float(np.sum(array)), np.inf]

        return _store.Figures(folder, np.array(common)).get("sum", [np.array(array)], compute)

    assert get([1, 2]) == get([1, 2]) == [3, np.inf]
    with (folder / "figures.jsonl").open("a") as file:
        file.write('\n["half a li')
    assert get([1, 2]) == [3, np.inf]
    assert counted == [[1, 2]]
    assert get([1, 3]) == [4, np.inf]
    assert get([1, 3]) == [4, np.inf]
    assert get([1, 2], common=2.0) == [3, np.inf]
    assert counted == [[1, 2], [1, 3], [1, 2]]


def test_stored_only_samples_nothing(folder, sampled):
    problem = evaluation.mixture("mixture-2d", 20, folder)
    grids = {"log_snr": _runs.log_snr}
    chosen = {name: evaluation.DETERMINISTIC[name] for name in ("ddim", "unipc-2")}
    made = list(evaluation.compare(problem, grids, [4], folder, {"ddim": chosen["ddim"]}, resamples=5))
    sampled.clear()
    found = list(evaluation.compare(problem, grids, [4, 5], folder, chosen, resamples=5, stored_only=True))
    assert found == made
    assert sampled == []


def test_the_packaged_classifier_judges_images_of_its_shape(folder):
    images = np.random.default_rng(0).integers(0, 255, (12, 28, 28), np.uint8)
    header = bytes([0, 0, 8, 3, 0, 0, 0, 12, 0, 0, 0, 28, 0, 0, 0, 28])
    (folder / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 12, *range(10), 0, 1]))
    problem = evaluation.image_model("m", pretrained.load("fashion_mnist"), 15, folder, guidance=2.0, data=folder)
    assert "features of the packaged classifier, against the 12 test images" in problem.judged_by
    classifier = pretrained.load_classifier("fashion_mnist")
    expected = classifier.predict(classifier.params, images[..., None] / 127.5 - 1.0).features
    np.testing.assert_allclose(problem.data, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(problem.condition, [*range(10), *range(5)])
    assert problem.noise.std() == pytest.approx(80, rel=0.05)


# The report


def result(solver, frechet, median=1.0, grid="a", calls=5, problem="p", blown_up=0):
    width = Estimate(frechet, frechet, frechet), Estimate(0.5, 0.304, 0.696), Estimate(median, median, median)
    return Result(problem, grid, solver, calls, *width, Estimate(2, 2, 2), Estimate(1, 1, 1), 10, blown_up, "0")


RESULTS = [
    result("variance_optimal", 2.0),
    result("ddim", 4.0),
    result("heun", 1.0),
    result("evodiff", 0.5),
    result("variance_optimal", 1.0, grid="b"),
    result("ddim", 3.0, grid="b"),
    result("heun", np.inf, grid="b", blown_up=3),
    result("evodiff", 0.1, grid="b"),
]


def test_every_solver_against_the_best_of_the_others():
    assert _report.standings(RESULTS, "frechet") == {
        "variance_optimal": [4.0, 10.0],
        "ddim": [8.0, 30.0],
        "heun": [2.0, np.inf],
        "evodiff": [0.5, 0.1],
    }
    best = _report.standings(RESULTS, "frechet", best_grid=True)
    assert best == {"variance_optimal": [10.0], "ddim": [30.0], "heun": [10.0], "evodiff": [0.1]}
    assert [(r.solver, r.grid) for r in evaluation.best_grids(RESULTS, "frechet")] == [
        ("variance_optimal", "b"),
        ("ddim", "b"),
        ("heun", "a"),
        ("evodiff", "b"),
    ]
    table = _report._standing_table(RESULTS, False)
    assert "| `heun` | inf | inf | 1 | 1 | 1 | 1 | 2 | 3 of 20 |" in table
    assert "| `variance_optimal` | 10 | 6.32 | 1 | 1 | 1 | 1 | 2 | 0 of 20 |" in table


def test_wins_losses_and_the_mean_of_few_calls():
    def ratio(calls, value, low, high, figure="frechet"):
        return Ratio("p", "a", calls, figure, "heun", "b", Estimate(value, low, high))

    same = [ratio(5, 0.5, 0.4, 0.6), ratio(8, 2.0, 1.5, 3.0), ratio(10, 4.0, 0.9, 5.0), ratio(12, 0.9, 0.8, 1.0)]
    floors = {"p": Estimate(0.25, 0.2, 0.3)}
    results = [*RESULTS, *(result("heun", x, grid="b", calls=calls) for calls, x in ((8, 0.1), (10, 0.2), (12, 1.0)))]
    text = _report.report("T", ["fact"], results, same, [], {"p": "the words"}, floors, {"p": ["results/p.png"]})
    assert "In 2 of these 4 the best peer's Frechet distance is below that of the converged samples" in text
    assert "| Frechet distance | 1 | 1 | 2 | 4 (p, 10 calls, a, against `heun`) | 1 | 1.38 |" in text
    assert "| p | **0.5** (0.4 .. 0.6) `heun` | 2 (1.5 .. 3) `heun` | 4 (0.9 .. 5) `heun` |" in text
    assert "- p: 10 samples, judged by the words; the converged samples have" in text
    assert "a Frechet distance of 0.25 (0.2 .. 0.3)." in text
    assert "![p](results/p.png)" in text
    assert "| `heun` | 0.5 ± 0.1 |" in text  # the kernel distance's standard error
    assert "| `variance_optimal` | 1 b |" in text  # on its best grid
    none = _report.report("T", [], RESULTS, [], [], {"p": "the words"}, floors, {})
    assert "against the best peer" not in none


def test_infinite_figures_are_no_numbers_to_average():
    assert _report.geometric_mean([1.0, np.inf]) == np.inf
    assert _report.geometric_mean([0.0, 2.0]) == 0
    assert _report.geometric_mean([2.0, 8.0]) == pytest.approx(4)


@pytest.mark.slow
def test_ours_and_the_best_peers_stand_out_of_the_plot(folder):
    more = [result(f"s{i}", 3.0 + i, calls=calls) for i in range(5) for calls in (5, 8)]
    assert _plots.best_peers(RESULTS + more, 2) == ["s0", "s1"]  # heun has blown up, ddim is four times the best
    _plots.plot(folder / "p.png", RESULTS + more)
    with Image.open(folder / "p.png") as picture:
        colours = {tuple(colour) for colour in np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)}
    for colour in ((213, 94, 0), (86, 180, 233)):  # evodiff, the best peer
        assert min(sum(abs(np.subtract(colour, other))) for other in colours) < 12
    assert (folder / "p.png").stat().st_size < 150_000


def test_pictures_only_where_samples_are_images(folder):
    problem = evaluation.mixture("mixture-2d", 20, folder)
    grids = {"log_snr": _runs.log_snr}
    made = list(
        evaluation.compare(problem, grids, [4], folder, {"ddim": evaluation.DETERMINISTIC["ddim"]}, resamples=5)
    )
    assert _plots.picture(problem, made, folder, "log_snr", 4) is None
    as_images = problem._replace(images=lambda x: x.reshape(-1, 1, 2, 1))
    assert _plots.picture(as_images, made, folder, "log_snr", 5) is None
    large = problem._replace(images=lambda x: np.tile(x.reshape(-1, 1, 2, 1), (1, 200, 100, 1)))
    panel = _plots.picture(large, made, folder, "log_snr", 4).axes[0]
    assert panel.get_window_extent().width == pytest.approx(10 * (200 + 7) + 7, abs=1)
    pictured = [("mixture-2d", "log_snr", 4), ("other", "log_snr", 4)]
    written = list(_document._draw(as_images, made, folder, folder, pictured))
    assert [path.name for path in written] == ["mixture-2d.png", "mixture-2d_log_snr_4_calls.png"]
