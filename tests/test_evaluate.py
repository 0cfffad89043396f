"""`evodiff-jax evaluate`: its table, what it writes, how it goes on, and what it refuses before compiling anything."""

import csv
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import networks
import numpy as np
import pytest
import writers
from tiny_models import write_model

from evodiff_jax import cli, evaluation, fitting, grids, plan, pretrained, solvers
from evodiff_jax.cli import main
from evodiff_jax.evaluation import _fid
from evodiff_jax.solvers import FORMS

DOCUMENT = (Path(__file__).parent.parent / "docs" / "fid.md").read_text()
EDM = "vp_ddpmpp_uncond"
WIDTH = 20  # of the features in place of Inception's


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny checkpoint of EDM, one of ours with classes, Inception of random weights, and statistics."""
    folder = tmp_path_factory.mktemp("files")
    case = networks.Case("edm", EDM)
    writers.write_edm_pickle(folder / "edm.pkl", case.cls, case.arguments, case.arrays())
    write_model(folder / "classes.safetensors")
    inception = networks.Case("inception", "inception_32")
    writers.write_torch_zip(folder / "inception.pth", inception.arrays())
    mean, variances = np.random.default_rng(0).uniform(0.5, 2, (2, 2048))
    np.savez(folder / "inception.npz", mu=mean, sigma=np.diag(variances))
    for name, width in (("stats", WIDTH), ("narrow", WIDTH - 1)):
        features = np.random.default_rng(0).standard_normal((50, width))
        statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
        np.savez(folder / f"{name}.npz", **statistics)
        if name == "stats":
            images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
            np.savez(folder / "batch.npz", arr_0=images, **statistics)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fast(monkeypatch):
    """Features that are quick to compute, of the first pixels, in place of Inception's; files are read once."""

    def features(model):
        if model.network.prediction != "features":
            raise ValueError("no Inception")
        return lambda images: images.reshape(len(images), -1)[:, :WIDTH] / 10.0

    monkeypatch.setattr(evaluation, "inception_features", features)
    monkeypatch.setattr(pretrained.inception, "FEATURES", WIDTH)
    monkeypatch.setattr(pretrained, "load", _load)


@functools.cache
def _load_once(path, dtype):
    return pretrained.loading.load(path, dtype=dtype)


def _load(path, *, dtype="float32", config=None, entry=None):
    return _load_once(str(path), dtype)


def command(files, **options):
    given = {
        "checkpoint": files / "edm.pkl",
        "reference": files / "stats.npz",
        "inception": files / "inception.pth",
        "solvers": "unipc-3,evodiff",
        "calls": "4,5",
        "num": 8,
        "batch": 4,
        "out": "out",
        **options,
    }
    return [
        "evaluate",
        *(text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", *str(value).split())),
    ]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_table_of_fids_by_the_inception_network(files, folder, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "load", _load)
    inception_features, made = evaluation.inception_features, []

    def once(model):
        made.extend([] if made else [inception_features(model)])
        return made[0]

    monkeypatch.setattr(evaluation, "inception_features", once)
    options = {"reference": files / "inception.npz", "solvers": "unipc-3", "calls": 3, "num": 4, "batch": 2}
    assert main([*command(files, **options), "--grid", "karras"]) == 0
    printed = capsys.readouterr()
    # The features of the same samples by the library's functions.
    model, inception = (_load(str(files / name)) for name in ("edm.pkl", "inception.pth"))
    solver = solvers.unipc(3)
    times = evaluation.times_of(model.schedule, grids.karras, solver, 3)
    program = evaluation.program_from_key(lambda params, _: model.denoiser(params), model.schedule, model.image_shape)
    x = jax.jit(program)(model.params, jax.random.key(0), np.arange(4), None, plan(model.schedule, times, solver))
    pool3 = np.concatenate([made[0](part) for part in evaluation.to_uint8(x, "edm").reshape(2, 2, *x.shape[1:])])
    with np.load(next((folder / "out" / "runs").glob("unipc-3_karras_3_*.npz"))) as run:
        assert int(run["samples"]) == 4
        np.testing.assert_allclose(run["mu"], pool3.mean(0), rtol=1e-3, atol=1e-3)
    mean, variances = np.random.default_rng(0).uniform(0.5, 2, (2, 2048))
    centered, shift = (pool3 - pool3.mean(0)) / np.sqrt(3), pool3.mean(0) - mean
    overlap = np.linalg.svd(centered * np.sqrt(variances), compute_uv=False).sum()
    expected = shift @ shift + np.square(centered).sum() + variances.sum() - 2 * overlap
    table = printed.out.split("\n\n")[-1].split("\n")
    assert table[0].split() == ["model", "calls", "3"]
    name, printed_fid = table[1].split()
    assert (name, float(printed_fid)) == ("unipc-3", pytest.approx(expected, rel=1e-4))
    for line in (
        f"model     edm.pkl, SHA-256 {model.digest}, float32",
        "samples   4 of every run, seed 0, unconditional",
        "solvers   on the grid karras; model calls a sample",
        "uint8     edm: clip(127.5 x + 128, 0, 255), truncated",
        f"inception inception.pth, SHA-256 {inception.digest}",
        "reference inception.npz, mu and sigma, SHA-256",
        "output    out/fid.md, out/fid.csv",
        "note      FID of 4 samples; it is biased upwards, the more the fewer there are. With no more samples than",
        "note      inception.pth is not the released pt_inception-2015-12-05-6726825d.pth, whose SHA-256 begins with",
    ):
        assert line in printed.out
    (row,) = csv.DictReader((folder / "out" / "fid.csv").read_text().splitlines())
    assert (row["solver"], row["grid"], row["calls"]) == ("unipc-3", "karras", "3")
    assert float(row["fid"]) == pytest.approx(expected, rel=1e-4)
    assert f"| unipc-3 | {printed_fid} |" in (folder / "out" / "fid.md").read_text()
    assert model.digest in (folder / "out" / "fid.md").read_text()


@pytest.mark.slow
def test_a_command_goes_on_where_it_was_stopped(files, folder, capsys, fast, monkeypatch):
    options = {"checkpoint": files / "classes.safetensors", "num": 20}
    assert main(command(files, out="undisturbed", **options)) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(_fid, "SAVE_SECONDS", 0.0)
    save, saved = _fid._save, []

    def stopping(path, arrays):
        save(path, arrays)
        saved.append(path)
        if len(saved) in (2, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(_fid, "_save", stopping)
    assert [main(command(files, **options)) for _ in range(3)] == [130, 130, 0]
    printed = capsys.readouterr()
    assert printed.out.replace("out/", "undisturbed/") == expected
    assert len(saved) == 4 * (5 + 1)  # no batch is made twice, and at its end a run is stored once more
    for name in ("fid.md", "fid.csv"):
        assert (folder / "out" / name).read_bytes() == (folder / "undisturbed" / name).read_bytes()
    # Another batch size, more numbers of calls, another solver: the runs that are there are used.
    assert main(command(files, **options, batch=7, calls="4,5,6", solvers="unipc-3 heun")) == 0
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert table.split("\n")[1].split()[:3] == expected.split("\n\n")[-1].split("\n")[1].split()
    assert re.search(r"^heun +\S+ +\S+ +\S+$", table, re.MULTILINE) is None


def test_runs_of_other_settings_in_the_folder(files, folder, capsys, fast):
    assert main(command(files, solvers="ddim", calls=2)) == 0
    before = contents(folder)
    for options, message in (
        ({"num": 9}, "samples 8 there, 9 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"uint8": "diffusers"}, "uint8 edm there, diffusers here"),
        ({"dtype": "bfloat16"}, "dtype float32 there, bfloat16 here"),
        ({"checkpoint": files / "classes.safetensors"}, "model edm.pkl there, classes here; weights"),
    ):
        assert main(command(files, solvers="ddim", calls=2, **options)) == 2
        assert message in capsys.readouterr().err
    assert contents(folder) == before


def test_classes_guidance_and_bytes(files, folder, capsys, fast):
    options = {"checkpoint": files / "classes.safetensors", "solvers": "ddim", "calls": 2}
    values = {}
    for name, more in {
        "random": [],
        "one": ["--class", "Trouser"],
        "guided": ["--guidance", "2"],
        "bytes": ["--uint8", "guided_diffusion"],
        "last": ["--denoise-to-zero"],
    }.items():
        assert main([*command(files, out=name, **options), *more]) == 0
        printed = capsys.readouterr().out
        values[name] = printed.split()[-1]
        settings = json.loads((folder / name / "runs" / "settings.json").read_text())
        assert settings["class"] == (1 if name == "one" else None)
        assert settings["guidance"] == (2.0 if name == "guided" else 1.0)
        assert ("10 classes drawn at random" in printed) == (name != "one")
        assert ("the last one at the last noise level" in printed) == (name == "last")
    assert len(set(values.values())) == 5
    assert json.loads((folder / "random" / "runs" / "settings.json").read_text())["uint8"] == "diffusers"


def test_runs_that_a_solver_does_not_have_are_named(files, capsys, fast):
    assert main(command(files, solvers="heun,ddim", calls="3 4")) == 0
    printed = capsys.readouterr().out
    assert "note      heun has no run of exactly 3 model calls on the grid log_snr: left out." in printed
    assert re.search(r"^heun +[\d.]+$", printed, re.MULTILINE)


def test_fitted_plans_stand_beside_solvers(files, folder, capsys, fast):
    fitted = fitting.load("fashion_mnist-5")
    digest = _load(str(files / "classes.safetensors")).digest
    fitting.save(folder / "mine.safetensors", fitted, digest=digest)
    options = {"checkpoint": files / "classes.safetensors", "solvers": "ddim", "calls": 2, "plans": "mine.safetensors"}
    assert main(command(files, **options)) == 0
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.split("\n\n")[-1].splitlines()]
    assert [row[0] for row in table] == ["model", "ddim", "mine"]
    assert table[0][2:] == ["2", "5"]
    assert "plan      `mine`: 5 model calls, fitted from dpm_solver_pp-2 on the karras grid\n" in printed
    rows = list(csv.DictReader((folder / "out" / "fid.csv").read_text().splitlines()))
    assert [(row["solver"], row["grid"], row["calls"]) for row in rows] == [
        ("ddim", "log_snr", "2"),
        ("mine", "fitted", "5"),
    ]
    plan_digest = evaluation.digest_of_plan(fitting.load("mine.safetensors").plan)
    assert rows[1]["digest"] == plan_digest
    # The same plan is the same run, whatever stands beside it, and other guidance than the fit's is told of.
    with np.load(folder / "out" / "runs" / f"mine_fitted_5_{plan_digest}.npz") as run:
        assert int(run["samples"]) == 8
    assert main([*command(files, **options, out="guided"), "--guidance", "0"]) == 0
    assert "warning: the plan mine was fitted with guidance 1, not 0" in capsys.readouterr().err


def test_the_images_of_a_reference_are_used_when_asked_for(files, folder, capsys, fast):
    options = {"reference": files / "batch.npz", "solvers": "ddim", "calls": 2}
    assert main(command(files, **options)) == 0
    stored = capsys.readouterr().out
    assert "reference batch.npz, mu and sigma" in stored
    assert main([*command(files, **options), "--reference-images"]) == 0
    printed = capsys.readouterr().out
    assert "reference batch.npz, images arr_0, their features computed here" in printed
    assert printed.split()[-1] != stored.split()[-1]
    with np.load(next((folder / "out" / "runs").glob("reference_*.npz"))) as made:
        assert int(made["samples"]) == 3


def test_samples_that_are_not_finite(files, folder, capsys, fast):
    write_model(folder / "nan.safetensors", fill=np.nan)
    assert main(command(files, checkpoint=folder / "nan.safetensors", solvers="ddim", calls=2)) == 0
    printed = capsys.readouterr().out
    assert "note      ddim, 2 calls, log_snr: 8 of 8 samples are not finite." in printed
    assert printed.strip().endswith("not finite")
    assert "nan" not in (folder / "out" / "fid.csv").read_text()


def test_too_large_a_batch(files, capsys, fast, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(evaluation, "evaluate", exhausted)
    assert main(command(files)) == 2
    assert "a batch of 4 images does not fit in memory: use a smaller --batch" in capsys.readouterr().err


def test_commands_of_the_documentation():
    commands = re.findall(r"^    (evodiff-jax evaluate (?:.*\\\n)*.*)$", DOCUMENT, re.MULTILINE)
    assert len(commands) == 2
    for text in commands:
        _, *arguments = shlex.split(text.replace("\\\n", ""))
        args = cli._parser().parse_args(arguments)
        assert set(args.solvers[0].split(",")) <= set(FORMS)
        assert args.num == 50_000


def test_the_code_of_the_documentation_runs(files, folder, capsys, fast):
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    for name, file in (
        ("edm-cifar10-32x32-uncond-vp.pkl", "classes.safetensors"),
        ("pt_inception-2015-12-05-6726825d.pth", "inception.pth"),
        ("cifar10-32x32.npz", "stats.npz"),
        ("50_000", "8"),
        ("batch=500", "batch=4"),
    ):
        assert name in block
        block = block.replace(f'"{name}"', f'"{files / file}"').replace(name, file)
    exec(block, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["released", "5"], ["released", "10"]]
    assert all(np.isfinite(float(line[2])) for line in lines)


def refused(capsys, folder, arguments, message):
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"(\S+: weights of [^\n]+\n)?evodiff-jax: error: [^\n]+\n", printed.err)
    assert message in printed.err, printed.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": "unipc"}, "argument --solvers: must be of variance_optimal, evodiff, ddim"),
        ({"solvers": ","}, "argument --solvers: a value is needed"),
        ({"calls": "5,x"}, "argument --calls: must be an integer in 1 .. 1000, got 'x'"),
        ({"calls": "0"}, "must be an integer in 1 .. 1000, got '0'"),
        ({"grid": "linear"}, "argument --grid: must be of log_snr, karras"),
        ({"num": 1}, "argument --num: must be an integer in 2 .. 10000000, got '1'"),
        ({"num": 10_000_001}, "must be an integer in 2 .. 10000000"),
        ({"batch": 0}, "argument --batch"),
        ({"seed": -1}, "argument --seed"),
        ({"uint8": "png"}, "argument --uint8: invalid choice: 'png'"),
        ({"guidance": "much"}, "argument --guidance: must be a number"),
        ({"config": "{"}, "argument --config"),
        ({"out": "a/b"}, "argument --out: there is no folder 'a'"),
        ({"out": "file"}, "argument --out: 'file' is a file, a folder is needed"),
        ({"reference": "none.npz"}, "argument --reference: there is no file none.npz"),
        ({"reference": "."}, "argument --reference: . is a folder"),
        ({"reference": "file"}, "argument --reference: file is no file of statistics"),
        ({"inception": "none.pth"}, "argument --inception: "),
        ({"inception": "."}, "argument --inception: "),
        ({"inception": "file"}, "it must be pytorch-fid's pt_inception-2015-12-05-6726825d.pth"),
        ({"inception": "{files}/edm.pkl"}, "argument --inception: {files}/edm.pkl holds VPPrecond; it must be"),
        ({"inception": "{files}/stats.npz"}, "argument --inception: "),
        ({"reference": "{files}/narrow.npz"}, "narrow.npz is of 19 features, those of Inception are 20"),
        ({"checkpoint": "none.pkl"}, "none.pkl"),
        ({"checkpoint": "."}, "."),
        ({"checkpoint": "file"}, "file"),
        ({"checkpoint": "{files}/inception.pth"}, "inception.pth (InceptionV3) is no diffusion model"),
        ({"guidance": 2}, "edm.pkl is an unconditional model, whose guidance must be 1, got 2.0"),
        ({"class": 1}, "argument --class: not for an unconditional model, got '1'"),
        ({"checkpoint": "{files}/classes.safetensors", "class": 10}, "argument --class: must be in 0 .. 9"),
        ({"plans": "none.safetensors"}, "argument --plans: No such file or directory: none.safetensors"),
        ({"plans": "fashion_mnist-5"}, "fashion_mnist-5.safetensors was fitted to another model"),
        ({"plans": "fashion_mnist-5 fashion_mnist-5"}, "argument --plans: two plans have the name 'fashion_mnist-5'"),
        ({"solvers": "heun", "calls": 3}, "argument --calls: heun have no runs of 3 calls"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(files, folder, capsys, monkeypatch, fast, options, message):
    def compiled(*_, **__):
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(evaluation, "evaluate", compiled)
    (folder / "file").write_text("some text")
    options = {name: str(value).replace("{files}", str(files)) for name, value in options.items()}
    refused(capsys, folder, command(files, **options), message.replace("{files}", str(files)))


def test_what_is_required(files, folder, capsys):
    refused(capsys, folder, ["evaluate"], "the following arguments are required: --reference, --inception")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_not_writable(files, folder, capsys):
    (folder / "closed").mkdir(mode=0o500)
    refused(capsys, folder, command(files, out="closed"), "argument --out: cannot write to 'closed'")


def test_a_folder_of_the_kernel_is_not_writable(files, folder, capsys):
    refused(capsys, folder, command(files, out="/proc/fid"), "argument --out: cannot write to '/proc/fid'")


CODE = """
import sys, time
from evodiff_jax import evaluation
from evodiff_jax.cli import main
from evodiff_jax.pretrained import inception

def features(model):
    def slow(images):
        time.sleep(0.2)
        return images.reshape(len(images), -1)[:, :20] / 10.0
    return slow

evaluation.inception_features = features
inception.FEATURES = 20
evaluation._fid.SAVE_SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_runs_that_go_on(files, folder):
    options = {"checkpoint": files / "classes.safetensors", "solvers": "ddim", "calls": 2, "num": 4000}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *command(files, **options)], stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        time.sleep(0.1)
        if list(folder.glob("out/runs/ddim*.npz")) or process.poll() is not None:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "evodiff-jax: interrupted\n")
    with np.load(next(folder.glob("out/runs/ddim*.npz"))) as run:
        assert 4 <= int(run["samples"]) < 4000
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["runs"]
    assert not list(folder.glob("out/runs/.*"))
