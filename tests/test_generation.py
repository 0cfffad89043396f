"""Generation: which sample is which, what a place holds, and that runs go on from what is intact. In one process."""

import errno
import functools
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import generation_models as models
import jax
import numpy as np
import pytest
from PIL import Image

import evodiff_jax as ed
from evodiff_jax import cli, generation, interrupts
from evodiff_jax.cli import images as cli_images
from evodiff_jax.generation import _engine, _lock, _place

PLAN = ed.plan(models.SCHEDULE, ed.grids.log_snr(models.SCHEDULE, 2), ed.solvers.ddim())
SOURCE = models.tiny()
NUM, BATCH, CHUNK = 22, 4, 8  # the last chunk and its last batch are not full


compiled = _engine.Sampler


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Programs of the same arguments are compiled once for all tests."""

    def sampler(source, plan, *arguments):
        if source is not SOURCE or plan is not PLAN:
            return compiled(source, plan, *arguments)
        return _cached(*arguments)

    monkeypatch.setattr(_engine, "Sampler", sampler)


@functools.cache
def _cached(*arguments):
    return compiled(SOURCE, PLAN, *arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Every test that asks for it runs in an empty folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def generate(place, num=NUM, **options):
    return generation.generate(SOURCE, PLAN, str(place), num, **{"batch": BATCH, "chunk": CHUNK, **options})


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete run, not to be changed."""
    place = tmp_path_factory.mktemp("run") / "images"
    generation.generate(SOURCE, PLAN, str(place), NUM, batch=BATCH, chunk=CHUNK)
    return place


@pytest.fixture
def place(complete, tmp_path):
    """A copy of the complete run."""
    for path, value in contents(complete).items():
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / path).write_bytes(value)
    return tmp_path / "images"


def shard(place, number):
    return place / "images" / "c" / str(number) / "0" / "0" / "0"


def marker(place, number):
    return place / "chunks" / f"{number:08d}.json"


# ---- which sample is which


def test_sample_k_is_a_function_of_the_seed_and_k(complete):
    """The library's program for the numbers alone, in another order, gives the same bytes."""
    indices = np.array([17, 3, 21, 3])
    run = jax.jit(generation.images_from_key(SOURCE, "diffusers"))
    expected, finite = run(SOURCE.params, jax.random.key(0), indices.astype(np.uint32), None, PLAN)
    assert finite.all()
    np.testing.assert_array_equal(generation.open(complete)[indices], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 11, "chunk": 11},
        pytest.param({"batch": 1, "chunk": 22}, marks=pytest.mark.slow),
        pytest.param({"batch": 64, "chunk": None}, marks=pytest.mark.slow),
    ],
)
def test_batches_and_chunks_change_no_more_than_round_off(complete, tmp_path, options):
    generate(tmp_path / "other", **options)
    here, there = (generation.open(path)[:].astype(int) for path in (complete, tmp_path / "other"))
    assert np.abs(here - there).max() <= 1
    assert np.mean(here != there) < 0.01


def test_fewer_samples_are_the_first_of_more(complete, tmp_path):
    generate(tmp_path / "few", 13)
    np.testing.assert_array_equal(generation.open(tmp_path / "few")[:], generation.open(complete)[:13])


@pytest.mark.slow
def test_another_seed_gives_other_samples(complete, tmp_path):
    generate(tmp_path / "other", seed=1)
    assert np.mean(generation.open(tmp_path / "other")[:] == generation.open(complete)[:]) < 0.1


def test_classes_in_turn():
    source = SOURCE._replace(conditions=generation.classes_in_turn(models.CLASSES))
    place = "memory://in_turn/"
    generation.generate(source, PLAN, place, 40, batch=20)
    levels = generation.open(place)[:].mean((1, 2, 3)).reshape(-1, models.CLASSES).mean(0) / 127.5 - 1
    np.testing.assert_allclose(levels, 0.3 * (np.arange(models.CLASSES) - 2), atol=0.05)


# ---- what a place holds


def test_a_place_holds_its_configuration_and_every_chunk_once(complete):
    manifest = json.loads((complete / "manifest.json").read_text())
    expected = {"num": NUM, "image": [4, 4, 3], "chunk": CHUNK, "seed": 0, "calls": 2, "model": "tiny"}
    assert {name: manifest[name] for name in expected} == expected
    assert len(manifest["weights"]) == 64
    assert manifest["jax"] == jax.__version__
    assert sorted(path.name for path in complete.iterdir()) == ["chunks", "complete.json", "images", "manifest.json"]
    assert [json.loads(marker(complete, n).read_text())["images"] for n in range(3)] == [8, 8, 6]
    found = generation.verify(complete)
    assert (found.intact, found.damaged, found.missing, found.not_finite) == (3, (), (), 0)


@pytest.mark.parametrize(
    "index", [0, -1, np.int64(5), slice(3, 9), slice(None, None, 7), slice(-3, None), [4, 1, 21], np.s_[2:5, 1, ::2, 0]]
)
def test_images_are_indexed_like_an_array(complete, index):
    images = generation.open(complete)
    assert (images.shape, len(images), images.dtype) == ((NUM, 4, 4, 3), NUM, np.uint8)
    found = images[index]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, np.asarray(images)[index])


@pytest.mark.parametrize("index", [NUM, -NUM - 1])
def test_images_beyond_the_last(complete, index):
    with pytest.raises(IndexError):
        generation.open(complete)[index]


def test_exports(complete, folder):
    images = generation.open(complete)[:]
    generation.export(complete, "all.npz")
    with np.load("all.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)
    assert cli.main(["export", str(complete), "--out", "pictures"]) == 0
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    assert names == [f"{n:06d}.png" for n in range(NUM)]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "pictures" / names[-1])), images[-1])
    generation.export(complete, f"file://{folder}/copy")
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/copy/images/"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result()[...], images)


def test_verify_and_grid(complete, folder, capsys):
    assert cli.main(["verify", str(complete)]) == 0
    assert re.search(r"images   22 of 4 x 4 x 3, 3 chunks intact\ndigest   [0-9a-f]{64}\n", capsys.readouterr().out)
    assert cli.main(["grid", str(complete), "--select", "3,0:4:2,-1", "--out", "some.png"]) == 0
    pixels = np.asarray(Image.open(folder / "some.png"))
    np.testing.assert_array_equal(pixels[2:10:2, 2:10:2], generation.open(complete)[3])
    assert cli_images.selected("3,0:4:2,-1", NUM) == [3, 0, 2, 21]


# ---- what goes on


def test_the_same_call_goes_on_from_what_is_complete(place):
    before, digest = contents(place), generation.verify(place).digest
    marker(place, 1).unlink()
    (place / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"not complete, 2 of 3 chunks are there"):
        generation.open(place)
    assert generation.open(place, partial=True)[0].shape == (4, 4, 3)
    calls = []
    made = generate(place, on_batch=lambda *given: calls.append(given))
    assert (made.kept, made.made, made.damaged) == (2, 8, ())
    assert [call for call in calls if call[0]] == [(8, 0), (6, 0), (4, 192), (4, 192)]
    assert contents(place) == before
    assert generation.verify(place).digest == digest


@pytest.mark.parametrize("harm", ["flipped", "truncated", "emptied", "gone", "marker", "array"])
def test_damaged_chunks_are_found_and_made_anew(place, harm, capsys):
    before = contents(place)
    for number in (0, 2):
        path = shard(place, number)
        value = bytearray(path.read_bytes())
        value[30] ^= 1
        if harm == "gone":
            path.unlink()
        elif harm == "marker":
            marker(place, number).write_text("{")
        elif harm == "array":
            (place / "images" / "zarr.json").write_text("{")
        else:
            path.write_bytes({"flipped": value, "truncated": value[:-9], "emptied": b""}[harm])
    if harm == "array":
        assert cli.main(["verify", str(place)]) == 2
        assert generate(place).kept == 3
    else:
        assert generation.verify(place).damaged == (0, 2)
        assert cli.main(["verify", str(place)]) == 2
        assert "of 3 chunks 2 damaged (0, 2): start the command" in capsys.readouterr().err
        if harm in ("flipped", "truncated"):
            with pytest.raises(ValueError, match="cannot read these images"):
                generation.open(place)[:8]
        made = generate(place)
        assert (made.kept, made.damaged, made.made) == (1, (0, 2), 14)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"num": 23}, "num 22 there, 23 here"),
        ({"chunk": 4}, "chunk 8 there, 4 here"),
        ({"uint8": "edm"}, "uint8 diffusers there, edm here"),
    ],
)
def test_another_configuration_is_refused(place, options, differing):
    before = contents(place)
    with pytest.raises(ValueError, match=rf"holds a run of another configuration \({differing}\)"):
        generate(place, **options)
    assert contents(place) == before


def test_another_plan_and_other_weights_are_refused(place):
    other = ed.plan(models.SCHEDULE, ed.grids.log_snr(models.SCHEDULE, 2), ed.solvers.heun())
    for source, plan, differing in (
        (SOURCE, other, r"plan \w+ there, \w+ here; calls 2 there, 4 here"),
        (SOURCE._replace(params=np.float32(0.9)), PLAN, "weights"),
    ):
        with pytest.raises(ValueError, match=differing):
            generation.generate(source, plan, str(place), NUM, batch=BATCH, chunk=CHUNK)


def test_an_interrupt_leaves_complete_chunks_and_no_lock(complete, tmp_path):
    place, seen = tmp_path / "images", []

    def on_batch(count, nbytes):
        seen.append(count)
        if sum(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(place, on_batch=on_batch)
    assert generation.verify(place).missing == (1, 2)
    assert not (place / "lock.json").exists()
    assert generate(place).kept == 1
    assert contents(place) == contents(complete)


def test_a_full_disk_is_one_error_and_the_run_goes_on(complete, tmp_path, monkeypatch):
    place = tmp_path / "images"
    write = _place.Place.write_images

    def full(self, array, number, first, images):
        if number == 1:
            raise self.in_words(ValueError("RESOURCE_EXHAUSTED: failed [os_error_code='28']"), "cannot write to it")
        write(self, array, number, first, images)

    monkeypatch.setattr(_place.Place, "write_images", full)
    with pytest.raises(OSError, match="No space left on device") as told:
        generate(place)
    assert told.value.errno == errno.ENOSPC
    assert told.value.filename == str(place)
    monkeypatch.undo()
    assert generation.verify(place).missing == (1, 2)
    assert generate(place).kept == 1
    assert contents(place) == contents(complete)


def test_samples_that_are_not_finite_are_counted_and_a_batch_of_them_ends_the_run():
    def make_denoiser(params, labels):
        return lambda x, t: x * jax.numpy.where(labels == 3, jax.numpy.nan, params)[:, None, None, None]

    source = SOURCE._replace(make_denoiser=make_denoiser, conditions=generation.classes_in_turn(models.CLASSES))
    made = generation.generate(source, PLAN, "memory://some_nan/", 10, batch=5)
    assert made.not_finite == generation.verify("memory://some_nan/").not_finite == 2
    assert (generation.open("memory://some_nan/")[3] == 128).all()
    with pytest.raises(ValueError, match="samples 0 to 4 are not finite"):
        generation.generate(source._replace(params=np.float32(np.nan)), PLAN, "memory://all_nan/", 10, batch=5)


# ---- one run at a time


def holder(**changes):
    return {**_lock._this_process(), "token": "", "since": time.time(), "refreshed": time.time(), **changes}


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),
        ({"pid": os.getppid(), "started": "1"}, True),  # the number of a process that was started at another time
        ({"boot": "before"}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "refreshed": time.time() - 3600}, True),
    ],
)
def test_locks_of_living_processes_are_kept_and_of_others_taken_over(place, changes, stale):
    (place / "lock.json").write_text(json.dumps(holder(**changes)))
    if stale:
        assert generate(place).kept == 3
        assert not (place / "lock.json").exists()
    else:
        host = changes.get("host", socket.gethostname())
        with pytest.raises(ValueError, match=f"is being written to by process {os.getpid()} on {host} since"):
            generate(place)


def test_a_second_run_is_refused_while_the_first_one_works(tmp_path):
    told = []

    def on_batch(count, nbytes):
        with pytest.raises(ValueError, match="is being written to by process"):
            generate(tmp_path / "images", 8)
        told.append(count)

    generate(tmp_path / "images", 8, on_batch=on_batch)
    assert told == [4, 4]


def test_a_run_whose_lock_was_taken_over_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(_lock, "REFRESH_SECONDS", 0.01)

    def on_batch(count, nbytes):
        (tmp_path / "images" / "lock.json").write_text(json.dumps(holder(token="another")))
        time.sleep(0.2)

    with pytest.raises(ValueError, match="another process took this run over"):
        generate(tmp_path / "images", on_batch=on_batch)
    assert "another" in (tmp_path / "images" / "lock.json").read_text()


# ---- the command line

FACTORY = ("generate", "--model", "generation_models:tiny")
SMALL = (*FACTORY, "--num", "8", "--batch", "4")


def assert_refused(capsys, folder, arguments, reason):
    before = contents(folder)
    assert cli.main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"evodiff-jax: error: [^\n]+\n", printed.err)
    assert reason in printed.err
    assert contents(folder) == before
    assert not (folder / "evodiff_images").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*FACTORY, "--num", "0"], "must be an integer in 1 .. 4294967296, got '0'"),
        ([*FACTORY, "--num", "many"], "got 'many'"),
        ([*FACTORY, "--num", "8", "--chunk", "9"], "--chunk: must be at most the 8 images, got 9"),
        (
            [*FACTORY, "--num", "8", "--batch", "4", "--chunk", "6"],
            "a chunk of 6 is no multiple of the batch of 4; 8 is",
        ),
        ([*FACTORY, "--batch", "0"], "got '0'"),
        ([*FACTORY, "--solver", "euler2"], "sde_dpm_solver_pp-2"),
        ([*FACTORY, "--plan", "missing.safetensors"], "argument --plan"),
        ([*FACTORY, "--plan", "missing.safetensors", "--steps", "3"], "--steps: not with --plan"),
        ([*FACTORY, "--class", "3"], "--class: not with --model"),
        ([*FACTORY, "--checkpoint", "x"], "--checkpoint: not with --model"),
        ([*FACTORY, "--guidance", "2"], "--guidance: not with --model"),
        (["generate", "--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["generate", "--checkpoint", "cifar"], "fashion_mnist"),
        (["generate", "--prompt", "a cat"], "has no text encoder"),
        (["generate", "--size", "64"], "--size: not without --prompt"),
        (["generate", "--prompt", "a cat", "--class", "3"], "--class: not with --prompt"),
        (["generate", "--class", "3", "--random-classes"], "--random-classes: not with --class"),
        (["generate", "--model", "generation_models"], "must be package.module:factory, got 'generation_models'"),
        (["generate", "--model", "no_such_module:f"], "cannot import 'no_such_module'"),
        (["generate", "--model", "generation_models:f"], "generation_models has no 'f'"),
        (["generate", "--model", "generation_models:SHAPE"], "must be a function without arguments"),
        (
            ["generate", "--model", "generation_models:with_argument"],
            "without arguments that returns a Source, it is (w",
        ),
        (
            ["generate", "--model", "generation_models:of_nothing"],
            "must return a generation.Source, it returned NoneType",
        ),
        (
            ["generate", "--model", "generation_models:of_one_argument"],
            "make_denoiser must be make_denoiser(params, cond",
        ),
        ([*SMALL, "--out", "nowhere/images"], "there is no folder"),
        ([*SMALL, "--out", "file"], "is a file, a folder is needed"),
        ([*SMALL, "--out", "foreign"], "holds something else, such as 'notes.txt'"),
        ([*SMALL, "--out", "x" * 300], "File name too long"),
        ([*SMALL, "--out", "/proc/images"], "/proc/images"),
        ([*SMALL, "--out", "floppy://disk/images"], "TensorStore cannot open 'floppy://disk/images'"),
        ([*SMALL, "--coordinator", "localhost:1"], "--num-hosts: is needed too"),
        ([*SMALL, "--coordinator", "localhost:1", "--num-hosts", "2", "--host", "2"], "--host: must be in 0 .. 1 of 2"),
        ([*SMALL, "--num-hosts", "2", "--distributed"], "--num-hosts: not with --distributed"),
        (["verify", "nowhere"], "holds no run of generate"),
        (["grid", "foreign"], "holds no run of generate"),
        (["grid", "foreign", "--out", "grid.jpg"], "must end in .png"),
        (["export", "foreign", "--out", "all.npz"], "holds no run of generate"),
        (["export", "foreign", "--out", "foreign"], "is not empty"),
        (["export", "foreign", "--out", "nowhere/all.npz"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, folder, arguments, reason):
    (folder / "file").write_text("")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.txt").write_text("mine")
    assert_refused(capsys, folder, arguments, reason)


@pytest.mark.parametrize("text", ["", "a", "22", "0:0", "1:2:3:4", "0:9:0"])
def test_bad_selections(text):
    with pytest.raises(ValueError, match="argument --select"):
        cli_images.selected(text, NUM)


def test_a_batch_that_devices_cannot_share_names_the_nearest(monkeypatch, capsys, folder):
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert_refused(capsys, folder, [*FACTORY, "--batch", "30"], "30 cannot be divided among 8 devices; 32 can")
    with pytest.raises(ValueError, match="a batch of 4 cannot be divided among 8 devices; 8 can"):
        generate(folder / "images")


def test_generate_and_again(folder, capsys):
    command = [*SMALL, "--solver", "ddim", "--steps", "2", "--chunk", "4"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "images   8 in batches of 4, seed 0; 8 made now\n" in printed
    assert "NFE      2 model calls a sample\n" in printed
    before = contents(folder)
    assert cli.main(command) == 0
    assert "before   2 chunks complete, 0 damaged" in capsys.readouterr().out
    assert contents(folder) == before
    assert_other = [*command, "--seed", "1"]
    assert cli.main(assert_other) == 2
    assert "(seed 0 there, 1 here)" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_wait_and_become_exit_codes(number, code, monkeypatch, capsys):
    def run(args):
        with interrupts.postponed() as check:
            check()
            os.kill(os.getpid(), number)
            check()

    monkeypatch.setattr(cli, "run_verify", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["verify", "x"]) == code
    assert capsys.readouterr().err == f"evodiff-jax: {'interrupted' if code == 130 else 'terminated'}\n"
    assert signal.getsignal(signal.SIGTERM) == before


# ---- the page


def test_the_page(place, folder, capsys):
    """Its blocks run as they stand, and the guarantees name what there is."""
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text()
    (folder / "images").symlink_to(place)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/generation.md", "exec"), names)
    assert names["images"].shape == (NUM, 4, 4, 3)
    assert re.fullmatch(r"100 [0-9a-f]{64}\n", capsys.readouterr().out)
    levels = generation.open("gray")[:].reshape(10, 10, -1).std((0, 2))
    assert levels.max() > 30  # classes at random, as those of the page are
    assert str(generation.HEARTBEAT_SECONDS) in page
    assert f"{_lock.STALE_SECONDS / 60:.0f} minutes" in page


@pytest.mark.slow
def test_pictures_of_prompts_in_turn(folder, capsys):
    import pipelines

    pipelines.write_sd1(folder / "model")
    command = [
        "generate",
        "--checkpoint",
        "model",
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--guidance",
        "3",
        "--num",
        "4",
    ]
    command += ["--batch", "2", "--steps", "2", "--solver", "ddim", "--seed", "5", "--dtype", "float32"]
    assert cli.main(command) == 0
    assert "2 prompts in turn, guidance 3" in capsys.readouterr().out
    images = generation.open("evodiff_images")
    assert images.manifest["guidance"] == 3
    assert len({image.tobytes() for image in images[:]}) == 4
    before = contents(folder)
    assert cli.main([*command[:6], "a bird", *command[7:]]) == 2
    assert re.search(r"\(prompts \w+ there, \w+ here\)", capsys.readouterr().err)
    assert contents(folder) == before


@pytest.mark.slow
def test_random_classes_are_those_of_evaluate_and_in_turn_is_the_default(folder):
    from evodiff_jax import evaluation, pretrained

    model = pretrained.load("fashion_mnist")
    command = ["generate", "--num", "4", "--batch", "4", "--steps", "2", "--solver", "ddim", "--guidance", "1"]
    assert cli.main([*command, "--random-classes", "--out", "random"]) == 0
    assert cli.main([*command, "--out", "in_turn"]) == 0
    plan = ed.plan(model.schedule, ed.grids.log_snr(model.schedule, 2), ed.solvers.ddim())
    run = jax.jit(evaluation._fid._sampler(evaluation.source_of(model), model.network.uint8))
    images, _ = run(model.params, jax.random.key(0), np.arange(4, dtype=np.uint32), None, plan)
    difference = np.abs(generation.open("random")[:].astype(int) - np.asarray(images)[..., :1])
    assert difference.max() <= 1
    assert np.mean(generation.open("in_turn")[:] != generation.open("random")[:]) > 0.1
