"""`evodiff-jax fit`, and the fitted plans that `sample` and `compare` take."""

import contextlib
import csv
import functools
import io
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_compare import RESULTS, result
from tiny_models import write_model

import evodiff_jax as ed
from evodiff_jax import evaluation, fitting, interrupts, pretrained
from evodiff_jax.cli import fit as cli_fit
from evodiff_jax.cli import main, plans
from evodiff_jax.cli import sample as cli_sample
from evodiff_jax.evaluation import _document, _plots, _report, _results, _runs
from evodiff_jax.tables import denoises_to_zero

FEW = ["--noises", "16", "--steps", "20", "--batch", "4", "--teacher-steps", "8"]
EDM = ed.schedules.edm()


class Made(NamedTuple):
    """What the command made: the model's file, the folder of the plans, what was printed, and a plan of 2 calls."""

    model: str
    folder: Path
    printed: str
    plan: str

    @property
    def target(self):
        (path,) = self.folder.glob("target_*.npy")
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    model = write_model(folder / "tiny.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["fit", "--checkpoint", model, "--calls", "2", *FEW, "--out", str(folder / "plans")]) == 0
    return Made(model, folder / "plans", printed.getvalue(), str(folder / "plans" / "tiny-2.safetensors"))


@pytest.fixture
def second(made, folder):
    """A plan of 3 calls that is as good as fitted."""
    start = ed.plan(EDM, ed.grids.log_snr(EDM, 3), ed.solvers.dpm_solver_pp(2))
    fitting.save("tiny-3.safetensors", fitting.load(made.plan)._replace(plan=start))
    return "tiny-3.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, with references of few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs.converged, "__defaults__", (12,))
    return tmp_path


@pytest.fixture
def asked(monkeypatch, made):
    """What fits are asked for; none is made, and the teacher's samples are zeros."""
    calls, fitted = [], fitting.load(made.plan)

    def fit(*arguments, **options):
        calls.append((arguments, options))
        return fitted

    monkeypatch.setattr(fitting, "fit", fit)
    monkeypatch.setattr(fitting, "converge", lambda denoise, x_T, *_, **__: np.zeros(x_T.shape, np.float32))
    return calls


@pytest.fixture
def unsampled(monkeypatch):
    """The plans that `sample` runs; the images are zeros."""
    runs = []

    def run(sampler, plan, params, key, labels, batch):
        runs.append(plan)
        return cli_sample.Run(np.zeros((len(labels), 8, 8, 1), np.float32), 1.0, 1.0)

    monkeypatch.setattr(cli_sample, "run_batches", run)
    return runs


def assert_refused(capsys, folder, arguments, reason):
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"evodiff-jax: error: [^\n]+\n", printed.err)
    assert reason in printed.err
    assert sorted(folder.rglob("*")) == before


# -- fit


def test_plans_are_fitted_and_told_of(made):
    digest = pretrained.load(made.model).digest
    fitted = fitting.load(made.folder / "tiny-2.safetensors", EDM, digest=digest)
    assert int(fitted.plan.calls) == 2
    report, card = fitted.report, fitted.card
    assert report.fitted.median < report.start.median
    assert (report.samples, report.steps, report.teacher_calls) == ((8, 4, 4), 20, 0)
    assert (card["model"], card["solver"], card["grid"]) == ("tiny", "dpm_solver_pp-2", "karras")
    assert (card["guidance"], card["seed"], card["teacher_calls"]) == (1.0, 0, 8)
    assert card["model_licence"] == "Apache-2.0"
    assert (
        f"2 calls  median error {report.start.median:.3g} -> {report.fitted.median:.3g}, RMS "
        f"{report.start.rms:.3g} -> {report.fitted.rms:.3g}, of 4 samples with no part in the fit\n"
    ) in made.printed
    for pattern in (
        r"model    tiny, [\d,]+ parameters, float32\n",
        r"start    dpm_solver_pp-2 on the karras grid\n",
        rf"samples  16 of 8 model calls, seed 0, {made.target}\n",
        rf"spent    128 model calls for samples, \d+ in fits and {2 * 4 * 20} with gradients\n",
        r"time     \d+\.\d s\n",
        r"output   .*tiny-2\.safetensors\n",
    ):
        assert re.search(pattern, made.printed)


def test_the_samples_aimed_at_are_made_once(made, asked, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "converge", lambda *_, **__: pytest.fail("made again"))
    run = ["fit", "--checkpoint", made.model, *FEW, "--out", str(made.folder)]
    before = {path: path.read_bytes() for path in made.folder.iterdir()}
    assert main([*run, "--calls", "4", "6"]) == 0
    assert [int(arguments[2].calls) for arguments, _ in asked] == [4, 6]
    for _, options in asked:
        np.testing.assert_array_equal(options["target"], np.load(made.target))
        assert options["target"].shape == (16, 8, 8, 1)
        np.testing.assert_array_equal(options["condition"], np.arange(16) % 10)
    assert not np.array_equal(*(jax.random.key_data(options["key"]) for _, options in asked))
    assert "spent    0 model calls for samples" in capsys.readouterr().out
    for calls in (4, 6):
        (made.folder / f"tiny-{calls}.safetensors").unlink()
    assert {path: path.read_bytes() for path in made.folder.iterdir()} == before


@pytest.mark.slow
def test_what_the_samples_depend_on_is_in_their_name(made, asked, folder):
    run = ["fit", "--checkpoint", made.model, *FEW, "--calls", "2", "--out", "out"]
    changes = ([], ["--seed", "1"], ["--guidance", "2"], ["--class", "3"], ["--dtype", "bfloat16"], ["--noises", "20"])
    for change in (*changes, ["--teacher-steps", "9"], ["--denoise-to-zero", "--calls", "3"]):
        assert main([*run, *change]) == 0
    for change in (["--solver", "ipndm-3"], ["--grid", "karras"], ["--steps", "5"], ["--radius", "0.1"]):
        assert main([*run, *change]) == 0
    assert len(list((folder / "out").glob("target_*.npy"))) == len(changes) + 2
    plans = sorted(path.name for path in (folder / "out").glob("*.safetensors"))
    assert plans == ["tiny-2.safetensors", "tiny-3.safetensors", "tiny-g2-2.safetensors"]
    (_, of_class), (arguments, to_zero), (_, radius) = asked[3], asked[7], asked[-1]
    assert set(of_class["condition"]) == {3}
    assert (int(arguments[2].calls), int(to_zero["teacher"].calls)) == (3, 9)
    for plan in (arguments[2], to_zero["teacher"]):
        assert plan.table.transition[-1] == 0
        assert plan.table.time[-1] == plan.end
    assert radius["radius"] == 0.1
    assert fitting.load("out/tiny-g2-2.safetensors").card["guidance"] == 2


def test_guidance_is_in_the_name_of_the_file(made):
    class Args(NamedTuple):
        checkpoint: str
        guidance: float = 1.0
        classifier_scale: float = 1.0

    class Guided(NamedTuple):
        model: object
        classifier: object = None

    model = pretrained.load(made.model)
    assert cli_fit._stem(Args("fashion_mnist"), Guided(model)) == "tiny"
    assert cli_fit._stem(Args(made.model, 1.5), Guided(model)) == "tiny-g1.5"
    assert cli_fit._stem(Args("a.b/m.1.pkl"), Guided(model._replace(name="m.1.pkl"), model)) == "m.1-c1"


def test_damaged_samples_are_not_fitted_to(made, asked, folder, capsys):
    run = ["fit", "--checkpoint", made.model, *FEW, "--calls", "2", "--out", "out"]
    assert main(run) == 0
    capsys.readouterr()
    (target,) = (folder / "out").glob("target_*.npy")
    for content in (b"", b"no array", target.read_bytes()[:-8]):
        target.write_bytes(content)
        assert_refused(capsys, folder, run, f"{target.name} is damaged")
    np.save(target, np.zeros((3, 8, 8, 1)))
    assert_refused(capsys, folder, run, "its shape is (3, 8, 8, 1), not (16, 8, 8, 1)")


@pytest.mark.slow
def test_an_interruption_keeps_the_best_plan(made, folder, capsys, monkeypatch):
    fit = fitting.fit

    def interrupted(*arguments, progress, **options):
        def on_validation(step, value):
            if step == 4:
                signal.raise_signal(signal.SIGINT)
            progress(step, value)

        return fit(*arguments, progress=on_validation, **options)

    monkeypatch.setattr(fitting, "fit", interrupted)
    (folder / "out").mkdir()
    os.link(made.target, folder / "out" / made.target.name)
    handler = signal.getsignal(signal.SIGINT)
    run = ["fit", "--checkpoint", made.model, *FEW, "--calls", "2", "3", "--out", "out"]
    assert main(run) == interrupts.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is handler
    printed = capsys.readouterr()
    assert printed.err == interrupts.MESSAGE
    assert "of 4 samples with no part in the fit, interrupted after 4 steps\n" in printed.out
    assert "output   out/tiny-2.safetensors\n" in printed.out
    report = fitting.load("out/tiny-2.safetensors").report
    assert (report.interrupted, report.steps) == (True, 4)
    assert report.validation_fitted.mean < report.validation_start.mean
    assert sorted(path.name for path in (folder / "out").iterdir()) == [made.target.name, "tiny-2.safetensors"]


def test_an_interruption_that_a_callback_of_a_library_loses_ends_the_fit_a_little_later(made, monkeypatch, asked):
    def fit(*_, progress, **__):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        progress(4, 0.1)
        pytest.fail("went on")

    monkeypatch.setattr(fitting, "fit", fit)
    assert main(["fit", "--checkpoint", made.model, *FEW, "--out", "out"]) == interrupts.INTERRUPTED


def test_an_interruption_before_there_is_a_better_plan_writes_none(made, folder, capsys, monkeypatch, asked):
    fitted = fitting.load(made.plan)
    still = fitted._replace(report=fitted.report._replace(interrupted=True, best_step=0))
    monkeypatch.setattr(fitting, "fit", lambda *_, **__: still)
    assert main(["fit", "--checkpoint", made.model, *FEW, "--out", "out"]) == interrupts.INTERRUPTED
    assert "output   none: no better plan than the start was found yet\n" in capsys.readouterr().out
    assert not list((folder / "out").glob("*.safetensors"))


def test_a_second_interruption_leaves(monkeypatch):
    left = []
    monkeypatch.setattr(interrupts, "_leave", lambda *_: left.append(True))
    with interrupts.raised() as check:
        check()
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                check()
        assert left == [True]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--calls 0", "1 .. 100, got '0'"),
        ("--calls 101", "1 .. 100, got '101'"),
        ("--calls five", "got 'five'"),
        ("--calls", "expected at least one argument"),
        ("--calls 5 30 --teacher-steps 20", "--teacher-steps: must be at least the 30 calls, got 20"),
        ("--calls 5 --solver dpm_2", "dpm_2 has no run of 5 calls"),
        ("--calls 1 --denoise-to-zero", "dpm_solver_pp-2 has no run of 1 calls"),
        ("--solver euler2", "sde_dpm_solver_pp-2"),
        ("--solver heun", "heun can't be a start: the times of the plan's calls must decrease strictly"),
        ("--solver evodiff", "of whose table a fit knows nothing"),
        ("--solver sa_solver", "sa_solver can't be a start: the plan is of a stochastic solver"),
        ("--grid cosine", "time_quadratic"),
        ("--noises 7", "8 .. 1000000, got '7'"),
        ("--steps 0", "got '0'"),
        ("--batch 0", "1 .. 50000"),
        ("--radius 1", "from 0 to below 1, got '1'"),
        ("--radius wide", "got 'wide'"),
        ("--class 17", "0 .. 9"),
        ("--guidance nan", "0 .. 100"),
        ("--checkpoint missing.safetensors", "missing.safetensors"),
        ("--out taken", "is a file"),
        ("--out nowhere/out", "no folder 'nowhere'"),
        ("--classifier-config {}", "not without --classifier"),
    ],
)
def test_bad_arguments_of_fit(made, folder, capsys, monkeypatch, arguments, reason):
    (folder / "taken").write_bytes(b"")
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    given = arguments.split()
    model = [] if "--checkpoint" in given else ["--checkpoint", made.model]
    assert_refused(capsys, folder, ["fit", *model, *given], reason)


def test_an_unusable_model(folder, capsys):
    path = write_model(folder / "broken.safetensors", fill=np.nan)
    assert_refused(capsys, folder, ["fit", "--checkpoint", path, *FEW], "16 of the teacher's 16 samples are not finite")


# -- info


def test_info_tells_what_a_plan_is(made, folder, capsys):
    assert main(["info", made.plan]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    fitted = fitting.load(made.plan)
    report = fitted.report
    times = ", ".join(f"{t:.4g}" for t in fitted.plan.table.time)
    assert lines.pop("time").endswith(" s")
    assert lines.pop("test") == (
        f"median error {report.start.median:.3g} -> {report.fitted.median:.3g}, RMS {report.start.rms:.3g} -> "
        f"{report.fitted.rms:.3g}, of 4 samples with no part in the fit"
    )
    assert re.fullmatch(r"median error \S+ -> \S+, RMS \S+ -> \S+, of 4 samples", lines.pop("choice"))
    assert lines == {
        "file": f"{made.plan}, fitted plan",
        "calls": "2 model calls a sample",
        "start": "dpm_solver_pp-2 on the karras grid",
        "model": f"tiny, SHA-256 {pretrained.load(made.model).digest}",
        "times": f"the model is told {times}; to 0.002",
        "schedule": "(t, alpha, sigma) is (8.002, 1, 8.002), (40, 1, 40), (80, 1, 80)",
        "guidance": "1",
        "teacher": "8 model calls",
        "loss": "mean",
        "seed": "0",
        "versions": f"evodiff_jax {ed.__version__}, jax {jax.__version__}",
        "fit": f"20 steps on 8 samples, the best after {report.best_step}",
        "spent": f"{report.forward_calls:,} in the fit and {report.gradient_calls:,} with gradients",
    }
    told = report._replace(interrupted=True, teacher_calls=1234)
    card = {"radius": 0.01, "guidance": 2.0, "classifier": "x", "classifier_scale": 3.0}
    fitting.save("bare.safetensors", fitted._replace(report=told, card=card))
    assert main(["info", "bare.safetensors"]) == 0
    out = capsys.readouterr().out
    for text in ("unknown, noise within 0.01 of its size", "guidance 2, of a classifier 3", ", interrupted\n"):
        assert text in out
    for text in ("start    an unknown solver", "1,234 model calls for the teacher's samples", "seed     unknown"):
        assert text in out
    assert_refused(capsys, folder, ["info", made.plan, "--entry", "ema"], "argument --entry: not with")
    half = Path(made.plan).read_bytes()[:-8]
    (folder / "half.safetensors").write_bytes(half)
    assert_refused(capsys, folder, ["info", "half.safetensors"], "half.safetensors is no fitted plan, or a damaged one")
    assert main(["info", "fashion_mnist-5"]) == 0
    assert "model    fashion_mnist, SHA-256 " in capsys.readouterr().out


# -- sample


def test_samples_with_a_plan(made, capsys):
    run = ["sample", "--checkpoint", made.model, "--num", "3", "--plan", made.plan, "--npz", "a.npz"]
    assert main(run) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"solver   fitted from dpm_solver_pp-2 on the karras grid, {made.plan}\n" in printed.out
    assert "NFE      2 model calls a sample\n" in printed.out
    model = pretrained.load(made.model)
    keys = jnp.stack([jax.random.split(jax.random.fold_in(jax.random.key(0), i)) for i in range(3)])
    denoise = model.denoiser(model.params, jnp.arange(3))
    plan = fitting.load(made.plan).plan
    expected = jax.jit(lambda x_T: ed.sample(denoise, x_T, plan))(EDM.noise(keys[:, 0], (3, 8, 8, 1)))
    with np.load("a.npz") as arrays:
        np.testing.assert_allclose(arrays["images"], expected, rtol=1e-4, atol=1e-4)


def test_other_guidance_than_the_plans_is_told(made, unsampled, capsys):
    run = ["sample", "--checkpoint", made.model, "--num", "2", "--plan", made.plan]
    assert main([*run, "--guidance", "2"]) == 0
    warning = f"evodiff-jax: warning: the plan {made.plan} was fitted with guidance 1, not 2\n"
    assert capsys.readouterr().err == warning
    fitted = fitting.load(made.plan)
    assert len(unsampled) == 1
    np.testing.assert_array_equal(unsampled[0].table.predictor, fitted.plan.table.predictor)
    for then, now, words in (
        ({}, {"classifier": "x", "classifier_scale": 2.0}, "classifier guidance 0, not 2"),
        ({"classifier": "x", "classifier_scale": 2.0}, {"classifier": "x", "classifier_scale": 2.0}, ""),
        ({"classifier": "x", "classifier_scale": 2.0}, {"classifier": "y", "classifier_scale": 2.0}, "another"),
    ):
        plans.warn_of_guidance("p", fitted._replace(card={"guidance": 1.0, **then}), {"guidance": 1.0, **now})
        assert words in capsys.readouterr().err
    plans.warn_of_guidance("p", fitted._replace(card={}), {"guidance": 2.0})  # nothing is known of that plan
    assert capsys.readouterr().err == ""
    assert plans.origin(fitted._replace(card={})) == "fitted from an unknown solver"


def test_a_plan_comes_with_its_last_call(made, unsampled, folder, capsys):
    run = ["sample", "--checkpoint", made.model, "--num", "2", "--denoise-to-zero", "--plan"]
    assert_refused(capsys, folder, [*run, made.plan], "argument --denoise-to-zero: not with --plan")
    fitted = fitting.load(made.plan)
    assert not denoises_to_zero(fitted.plan)
    ending = ed.plan(EDM, ed.grids.log_snr(EDM, 2), ed.solvers.ddim(), denoise_to_zero=True, max_calls=5)
    assert denoises_to_zero(ending)
    fitting.save("zero.safetensors", fitted._replace(plan=ending))
    assert main([*run, "zero.safetensors"]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--plan {plan} --steps 10", "argument --steps: not with --plan"),
        ("--plan {plan} --solver unipc-2", "argument --solver: not with --plan"),
        ("--plan {plan} --grid log_snr", "argument --grid: not with --plan"),
        ("--plan fashion_mnist-5", "was fitted to another model: its digest is"),
        ("--plan {model}", "argument --plan: {model} is no fitted plan"),
        ("--plan half.safetensors", "argument --plan: half.safetensors is no fitted plan, or a damaged one"),
        ("--plan missing.safetensors", "argument --plan: No such file or directory: missing.safetensors"),
        ("--plan cifar-5", "no packaged plan 'cifar-5'; there are: fashion_mnist-4, fashion_mnist-5, fashion_mnist-6"),
        ("--plan .", "is a folder"),
        ("--plan", "expected one argument"),
    ],
)
def test_bad_plans_of_sample(made, folder, capsys, monkeypatch, arguments, reason):
    with open(made.plan, "rb") as file:
        (folder / "half.safetensors").write_bytes(file.read()[:-100])
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    given = arguments.format(plan=made.plan, model=made.model).split()
    assert_refused(capsys, folder, ["sample", "--checkpoint", made.model, *given], reason.format(model=made.model))


# -- what is packaged


def test_packaged_plans_belong_to_packaged_models(capsys):
    names = fitting.available()
    assert "fashion_mnist-5" in names
    digest_of = functools.cache(lambda name: pretrained.load(name).digest)
    for name in names:
        fitted = fitting.load(name)
        assert fitted.card["digest"] == digest_of(fitted.card["model"])
        assert name.rpartition("-")[2] == str(int(fitted.plan.calls))
        assert fitted.report.fitted.median < fitted.report.start.median
        assert not fitted.report.interrupted
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in names:
        assert re.search(rf"\nplan {name}: \d+ model calls, median error [\d.e-]+, its start's [\d.e-]+\n", out)


def test_a_packaged_plan_is_taken_by_name(unsampled, capsys, monkeypatch):
    assert main(["sample", "--num", "2", "--plan", "fashion_mnist-5"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"solver   fitted from \S+ on the \S+ grid, fashion_mnist-5\n", out)
    assert "NFE      5 model calls a sample\n" in out
    assert list(plans.read_plans("--plans", ["fashion_mnist-5"])) == ["fashion_mnist-5"]


# -- compare


@pytest.mark.slow
def test_plans_are_rows_of_a_comparison(made, second, folder, capsys, monkeypatch):
    run = ["compare", "--plans", made.plan, second, "--exact", "mixture-2d", "--solvers", "variance_optimal", "ddim"]
    run += ["--grids", "log_snr", "--calls", "2", "--samples", "10", "--out", "out"]
    monkeypatch.setattr(_document, "plot", lambda path, _: path.touch())  # takes longest, and is in the next test
    assert main(run) == 0
    assert "runs     4 of 10 samples, seed 0" in capsys.readouterr().out
    with open("out/results.csv") as file:
        rows = list(csv.DictReader(file))
    own = [(row["solver"], row["calls"]) for row in rows if row["grid"] == "fitted"]
    assert own == [("tiny-2", "2"), ("tiny-3", "3")]
    text = (folder / "out" / "report.md").read_text()
    assert "- plan `tiny-2`: 2 model calls, fitted from dpm_solver_pp-2 on the karras grid\n" in text
    of_plans, others = text.split("## Fitted plans against the best solver")[1].split("## Every solver against")
    (row,) = re.findall(r"^\| mixture-2d \|.*", of_plans, re.MULTILINE)  # no solver makes 3 calls
    errors = {row["solver"]: float(row["median"]) for row in rows if row["calls"] == "2"}
    best = min(("ddim", "variance_optimal"), key=errors.__getitem__)
    assert re.match(r"\| mixture-2d \| `tiny-2` \| 2 \|", row)
    assert f"{errors['tiny-2'] / errors[best]:.3g}" in row.split("|")[5]
    assert f"`{best}`, log_snr" in row.split("|")[5]
    assert "tiny" not in others.split("## mixture-2d")[0]
    assert "tiny" not in text.split("## `variance_optimal` against")[1].split("## Fitted")[0]
    assert "Median trajectory error, fitted plans" in others
    (stored,) = (folder / "out" / "mixture-2d").glob("tiny-2_fitted_2_*.npy")
    assert stored.stem.endswith(evaluation.digest_of_plan(fitting.load(made.plan).plan))
    monkeypatch.setattr(_results, "make_plan_sampler", lambda _: pytest.fail("sampled again"))
    assert main(run) == 0


@pytest.mark.slow
def test_plans_of_a_network_are_compared_in_pictures_too(made, second, folder, capsys):
    run = ["compare", "--plans", made.plan, second, "--checkpoint", made.model, "--solvers", "ddim", "--out", "out"]
    run += ["--grids", "log_snr", "--calls", "3", "--samples", "10", "--guidance", "0"]
    assert main(run) == 0
    warned = [f"evodiff-jax: warning: the plan tiny-{i} was fitted with guidance 1, not 0\n" for i in (2, 3)]
    assert capsys.readouterr().err == "".join(warned)
    with Image.open("out/tiny_log_snr_3_calls.png") as picture:
        assert picture.height == 3 * 90 + 10 + 2 * 8  # ddim, tiny-3, and what is converged
    assert sorted(path.name for path in (folder / "out").glob("*.png")) == ["tiny.png", "tiny_log_snr_3_calls.png"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--plans {plan} copy/tiny-2.safetensors", "two plans have the name 'tiny-2'"),
        ("--plans ddim.safetensors", "the plan 'ddim' has the name of a solver"),
        ("--plans fashion_mnist-5", "argument --plans: "),
        ("--plans {model}", "is no fitted plan"),
        ("--plans missing.safetensors", "missing.safetensors"),
        ("--plans {plan} --solvers heun --calls 5", "heun have no runs of 5 calls"),
        ("--plans vp.safetensors --exact mixture-2d", "is of another schedule"),
    ],
)
def test_bad_plans_of_compare(made, folder, capsys, monkeypatch, arguments, reason):
    (folder / "copy").mkdir()
    fitted, vp = fitting.load(made.plan), ed.schedules.vp_linear()
    for path in ("copy/tiny-2.safetensors", "ddim.safetensors"):
        fitting.save(path, fitted)
    other = ed.plan(vp, ed.grids.log_snr(vp, 3), ed.solvers.ddim())
    fitting.save("vp.safetensors", fitted._replace(plan=other))
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    given = arguments.format(plan=made.plan, model=made.model).split()
    exact = ["--checkpoint", made.model] if "--exact" not in given else []
    assert_refused(capsys, folder, ["compare", *exact, *given], reason)


def test_a_plan_with_a_solvers_name_is_no_run():
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 3), ed.solvers.ddim())
    with pytest.raises(ValueError, match="'ddim' has the name of a solver"):
        evaluation.runs(EDM, {"log_snr": ed.grids.log_snr}, [3], plans={"ddim": plan})
    (run,) = evaluation.runs(EDM, {}, [9], plans={"mine": plan})
    assert (run.solver, run.grid, run.calls) == ("mine", evaluation.FITTED, 3)
    np.testing.assert_array_equal(run.times, ed.grids.log_snr(EDM, 3))


def test_plans_do_not_count_where_solvers_are_compared():
    results = [*RESULTS, result("mine", 0.01, grid="fitted")]
    for best_grid in (False, True):
        assert _report.standings(results, "frechet", best_grid) == _report.standings(RESULTS, "frechet", best_grid)
    assert _plots.best_peers(results, 5) == _plots.best_peers(RESULTS, 5)
    assert _report.grids_of(results) == ["a", "b"]
