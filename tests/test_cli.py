import contextlib
import errno
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tiny_models import CONFIG, write_model

import evodiff_jax as ed
from evodiff_jax import cli, files, pretrained
from evodiff_jax.cli import main, output
from evodiff_jax.cli import sample as cli_sample
from evodiff_jax.pretrained.unet import UNetConfig

PACKAGED = pretrained.packaged._weights() / "fashion_mnist.safetensors"
SIZE = 2 * 8 + 2  # side of a cell in the picture of these images


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file with a tiny model of random weights that compiles in a moment."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors", CONFIG)


class Sampled(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray
    printed: str


@functools.cache  # a run compiles, which is what takes the time here
def sample(model, *arguments):
    """What a run of three steps made, five images unless told."""
    command = ["sample", "--checkpoint", model, "--num", "5", "--steps", "3", "--out", "p.png", "--npz", "a.npz"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*command, *map(str, arguments)]) == 0
    with np.load("a.npz") as arrays, Image.open("p.png") as picture:
        return Sampled(arrays["images"], arrays["labels"], np.asarray(picture), printed.getvalue())


def assert_refused(capsys, folder, arguments, reason):
    before = sorted(folder.iterdir())
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"evodiff-jax: error: [^\n]+\n", printed.err)
    assert reason in printed.err
    assert sorted(folder.iterdir()) == before


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "{sample,generate,"),
        ("paint", "'paint'"),
        ("--steps 3", "{sample,generate,"),
        ("info now", "now"),
        ("sample --solver euler2", "sde_dpm_solver_pp-2"),
        ("sample --grid cosine", "time_quadratic"),
        ("sample --steps 0", "1 .. 1000, got '0'"),
        ("sample --steps abc", "1 .. 1000, got 'abc'"),
        ("sample --steps 2.5", "got '2.5'"),
        ("sample --steps 1001", "got '1001'"),
        ("sample --steps", "expected one argument"),
        ("sample --step 3", "--step"),
        ("sample --num 0", "1 .. 50000, got '0'"),
        ("sample --num 999999999999999999999", "1 .. 50000"),
        ("sample --batch -1", "1 .. 50000, got '-1'"),
        ("sample --seed -1", "0 .. 4294967295, got '-1'"),
        ("sample --seed 4294967296", "0 .. 4294967295"),
        ("sample --guidance -1", "0 .. 100, got '-1'"),
        ("sample --guidance nan", "0 .. 100, got 'nan'"),
        ("sample --guidance inf", "0 .. 100, got 'inf'"),
        ("sample --guidance much", "0 .. 100, got 'much'"),
        ("sample --dtype float16", "bfloat16"),
        ("sample --class 17", "0 .. 9 or one of T-shirt/top"),
        ("sample --class -1", "0 .. 9"),
        ("sample --class hat", "Ankle boot, got 'hat'"),
        ("sample --class ²", "0 .. 9"),
        ("sample --out picture.jpg", ".png"),
        ("sample --out nowhere/picture.png", "no folder 'nowhere'"),
        (f"sample --out {'x' * 250}.png", "cannot write"),
        ("sample --npz samples.png", ".npz"),
        ("sample --out same.png --npz same.png", ".npz"),
        ("sample --npz nowhere/arrays.npz", "no folder 'nowhere'"),
        ("sample --checkpoint missing.safetensors", "missing.safetensors"),
        ("sample --checkpoint cifar", "fashion_mnist"),
    ],
)
def test_bad_arguments_are_one_line(capsys, folder, arguments, reason):
    assert_refused(capsys, folder, arguments.split(), reason)


def test_a_folder_is_no_output(capsys, folder):
    (folder / "taken.png").mkdir()
    assert_refused(capsys, folder, ["sample", "--out", "taken.png"], "is a folder")


def test_bad_output_is_found_before_loading(capsys, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "load", lambda path: pytest.fail("loaded"))
    assert_refused(capsys, folder, ["sample", "--out", "nowhere/x.png"], "nowhere")
    assert_refused(capsys, folder, ["sample", "--npz", "nowhere/x.npz"], "nowhere")


def test_bad_checkpoints(capsys, folder, tiny):
    content = PACKAGED.read_bytes()
    (folder / "half.safetensors").write_bytes(content[: len(content) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, folder / "foreign.safetensors")
    write_model(folder / "two.safetensors", UNetConfig(**{**CONFIG.__dict__, "image_shape": (8, 8, 2)}))
    write_model(folder / "broken.safetensors", CONFIG, fill=np.nan)
    write_model(folder / "integers.safetensors", CONFIG, dtype=np.int32)
    write_model(folder / "huge.safetensors", CONFIG, image_shape=[100_000, 100_000, 1])
    classifier = str(PACKAGED.with_name("fashion_mnist_classifier.safetensors"))
    for path, reason in (
        ("half.safetensors", "download the file again"),
        ("empty.safetensors", "empty file"),
        ("foreign.safetensors", "holds no network that is known here (EDM, guided-diffusion"),
        (classifier, "expected a diffusion model"),
        ("two.safetensors", "2 channels"),
        ("broken.safetensors", "not finite"),
        ("integers.safetensors", "has numbers of type int32, floating-point ones are needed"),
        ("huge.safetensors", "images of 100000 x 100000 have 2,500,000,000 positions at the coarsest level"),
        (str(folder), "is no folder in diffusers' layout"),
    ):
        assert_refused(capsys, folder, ["sample", "--num", "1", "--steps", "1", "--checkpoint", path], reason)


def test_a_failed_write_leaves_what_was_there(folder):
    path = folder / "picture.png"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    assert list(folder.iterdir()) == [path]


def out_of_space(file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_file(folder):
    with pytest.raises(OSError, match=r"No space left on device: '.*samples\.npz'"):
        files.write_atomically(folder / "samples.npz", out_of_space)
    assert list(folder.iterdir()) == []


def test_one_file_that_cannot_be_written_does_not_cost_the_others(folder):
    writes = {folder / "a": lambda file: file.write(b"a"), folder / "b": out_of_space}
    writes[folder / "c"] = lambda file: file.write(b"c")
    with pytest.raises(OSError, match=r"No space left on device: '.*b'"):
        cli_sample.write_all(writes)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(folder, exists):
    target = folder / "target"
    target.mkdir()
    if exists:
        (target / "x.png").write_bytes(b"before")
    link = folder / "x.png"
    link.symlink_to(target / "x.png")
    files.check_writable(link)
    files.write_atomically(link, lambda file: file.write(b"after"))
    assert link.is_symlink()
    assert (target / "x.png").read_bytes() == b"after"
    assert sorted(path.name for path in target.iterdir()) == ["x.png"]


# The process


@pytest.mark.parametrize("seconds", [0.3, 4.0])  # while JAX is imported; while the sampler compiles or runs
def test_ctrl_c_ends_the_process_with_one_line(folder, seconds):
    command = [sys.executable, "-m", "evodiff_jax", "sample", "--num", "50000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (130, b"", b"evodiff-jax: interrupted\n")
    assert list(folder.iterdir()) == []


def test_ctrl_c_while_a_file_is_written_leaves_nothing(folder):
    code = (
        "import pathlib, time; from evodiff_jax import files, interrupts\n"
        "with interrupts.watched():\n"
        "    files.write_atomically(pathlib.Path('x'), lambda file: (print('on', flush=True), time.sleep(100)))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=folder) as process:
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert list(folder.iterdir()) == []


def test_process_fails_quickly_and_without_traceback():
    code = (
        "import sys, evodiff_jax.cli as cli; code = cli.main(['sample', '--steps', '0']);"
        "assert not {'flax', 'optax', 'PIL', 'tqdm'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"evodiff-jax: error: .+\n", done.stderr)


def test_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "evodiff_jax", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        process.stdout.close()
        stderr = process.stderr.read()
    assert (process.returncode, stderr) == (141, b"")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "evodiff-jax: interrupted\n"),
        (ModuleNotFoundError("flax is\nnot there"), 2, "evodiff-jax: error: flax is not there\n"),
    ],
)
def test_interruptions_are_one_line(capsys, monkeypatch, error, code, line):
    def run(_):
        raise error

    monkeypatch.setattr(cli, "run_info", run)
    assert main(["info"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("command", [[], ["sample"], ["compare"], ["fit"], ["info"]])
def test_help(capsys, command):
    assert main([*command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: evodiff-jax", *command]))


def test_version_and_info(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"evodiff-jax {ed.__version__}\n"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for fact in (f"jax {jax.__version__}\n", "device 0: ", "model fashion_mnist: ", "## Licences"):
        assert fact in out


# Sampling


def test_packaged_model(capsys, folder):
    assert main(["sample", "--num", "3", "--steps", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar without a terminal
    for pattern in (
        r"model +fashion_mnist, [\d,]+ parameters, float32",
        r"solver +variance_optimal, 2 steps on the log_snr grid",
        r"NFE +2 model calls a sample\n",
        r"compile +\d+\.\d+ s",
        r"sample +\d+\.\d+ s a batch, \d+\.\d images/s",
        r"output +evodiff_samples\.png",
    ):
        assert re.search(pattern, printed.out)
    assert [path.name for path in folder.iterdir()] == ["evodiff_samples.png"]
    with Image.open("evodiff_samples.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        assert picture.size == (2 * 58 + 2, 2 * 58 + 2)
        assert np.asarray(picture)[2:58, 2:58].std() > 20


def test_arrays_and_picture_agree(tiny):
    run = sample(tiny)
    assert (run.images.shape, run.images.dtype) == ((5, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(run.labels, np.arange(5))
    assert run.pixels.shape == (2 * SIZE + 2, 3 * SIZE + 2)
    fourth = run.pixels[SIZE + 2 : 2 * SIZE : 2, 2:SIZE:2]  # first of the second row
    np.testing.assert_allclose(fourth, (np.clip(run.images[3, ..., 0], -1, 1) + 1) * 127.5, atol=0.501)
    assert (run.pixels[:2] == 255).all()


def test_seed_decides_the_images(tiny):
    images = sample(tiny).images
    np.testing.assert_array_equal(sample(tiny, "--seed", 0).images, images)
    assert np.abs(sample(tiny, "--seed", 2**32 - 1).images - images).max() > 0.1
    assert np.abs(images[0] - images[1]).max() > 0.1


def test_images_do_not_depend_on_the_batch(tiny):
    parts = sample(tiny, "--batch", 2)
    np.testing.assert_allclose(parts.images, sample(tiny).images, atol=1e-4)
    np.testing.assert_array_equal(parts.labels, np.arange(5))


def test_one_compilation_for_all_batches():
    traces = []

    def sampler(params, key, indices, labels, plan):
        traces.append(indices.shape)
        return (params * indices + labels + plan)[:, None, None, None].astype(jnp.float32)

    run = cli_sample.run_batches(sampler, 10, 2, jax.random.key(0), np.arange(5, dtype=np.int32), batch=2)
    np.testing.assert_array_equal(run.images.ravel(), 3 * np.arange(5) + 10)
    assert traces == [(2,)]


def test_class_by_name_and_number(tiny):
    named, numbered = sample(tiny, "--class", "ankle-BOOT"), sample(tiny, "--class", 9)
    np.testing.assert_array_equal(named.labels, [9] * 5)
    np.testing.assert_array_equal(named.images, numbered.images)
    assert np.abs(named.images - sample(tiny).images).max() > 1e-3


def test_guidance(tiny):
    plain, guided, unconditional = sample(tiny), sample(tiny, "--guidance", 2), sample(tiny, "--guidance", 0)
    assert "3 model calls a sample\n" in plain.printed
    assert "3 model calls a sample, 6 network evaluations, guidance 2" in guided.printed
    assert "3 model calls a sample, guidance 0" in unconditional.printed
    assert np.abs(guided.images - plain.images).max() > 1e-3
    assert np.abs(unconditional.images - plain.images).max() > 1e-3


def test_bfloat16_is_close_and_not_the_same(tiny):
    narrow = sample(tiny, "--dtype", "bfloat16").images
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - sample(tiny).images).mean() < 0.1


@pytest.mark.parametrize(
    ("solver", "grid", "denoise_to_zero", "calls"),
    [
        ("ddim", "karras", True, 4),
        ("evodiff", "time_quadratic", False, 3),
        ("heun", "log_snr", True, 7),
        ("sa_solver", "log_snr", False, 3),
    ],
)
def test_options_reach_the_sampler(tiny, solver, grid, denoise_to_zero, calls):
    run = sample(tiny, "--solver", solver, "--grid", grid, *["--denoise-to-zero"] * denoise_to_zero)
    assert f"NFE      {calls} model calls" in run.printed
    model, schedule = pretrained.load(tiny), ed.schedules.edm()
    keys = jnp.stack([jax.random.split(jax.random.fold_in(jax.random.key(0), i)) for i in range(5)])
    times = getattr(ed.grids, grid)(schedule, 3)
    plan = ed.plan(schedule, times, ed.solvers.FORMS[solver].make(), denoise_to_zero=denoise_to_zero)
    denoise = model.denoiser(model.params, jnp.arange(5))
    x_T = schedule.noise(keys[:, 0], (5, 8, 8, 1))
    expected = jax.jit(lambda x_T: ed.sample(denoise, x_T, plan, key=keys[:, 1]))(x_T)
    np.testing.assert_allclose(run.images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral"])
def test_an_image_does_not_depend_on_how_many_are_made(tiny, solver):
    few, many = (sample(tiny, "--solver", solver, "--num", num, "--batch", 4) for num in (2, 7))
    np.testing.assert_allclose(few.images, many.images[:2], atol=1e-5)


@pytest.mark.parametrize(
    ("num", "classes", "rows", "columns"),
    [(64, 10, 10, 7), (1000, 10, 30, 34), (64, 1, 8, 8), (10, 10, 3, 4), (7, 10, 3, 3), (1, 10, 1, 1), (2, 1, 1, 2)],
)
def test_grid_of_images(num, classes, rows, columns):
    picture = output.make_picture(np.zeros((num, 4, 6, 3), np.float32), np.arange(num) % classes)
    assert (picture.mode, picture.size) == ("RGB", (columns * 14 + 2, rows * 10 + 2))


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_every_image_has_a_place_in_a_row_of_its_class(classes):
    for num in range(1, 70):
        labels = np.arange(num) % classes
        rows, columns = output._positions(labels)
        assert len(set(zip(rows, columns, strict=True))) == num
        if num > classes:
            assert all(len(set(labels[rows == row])) == 1 for row in rows)
