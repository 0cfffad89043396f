"""FID from streaming statistics: distances, files of statistics, conversions to bytes, and the runs of solvers."""

import functools
import io
import itertools
import json
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import evodiff_jax as ed
from evodiff_jax import evaluation
from evodiff_jax.evaluation import Source, _fid, include, no_statistics, read_reference, to_uint8
from evodiff_jax.evaluation._reference import stored_rows
from evodiff_jax.evaluation.metrics import frechet_distance, frechet_distance_of_statistics
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import FORMS

TABLES = json.loads((networks.DATA / "tables" / "tables.json").read_text())
GRID = {"log_snr": GRIDS["log_snr"]}
WIDTH = 12  # of the features here


def statistics_of(features):
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def published(mean_a, cov_a, mean_b, cov_b):
    """The formula as FID implementations have it."""
    overlap = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap


def drawn(count, width, seed, scale=1.0):
    random = np.random.default_rng(seed)
    return scale * random.standard_normal((count, width)) @ random.standard_normal((width, width)) + 0.3 * seed


# Distances


def test_stored_distances():
    stored = TABLES["frechet"]
    a = networks.normal("input:features_a", (500, 24)) + 0.3
    mix = np.eye(24) + 0.2 * networks.normal("input:mix", (24, 24))
    b = (1.4 * networks.normal("input:features_b", (400, 24)) + 0.1) @ mix
    c = networks.normal("input:features_c", (10, 24))  # fewer than features
    assert a.mean(0)[0] == pytest.approx(stored["mean_a0"], abs=1e-14)
    assert np.trace(np.cov(b, rowvar=False)) == pytest.approx(stored["trace_b"], rel=1e-13)
    for other, value in ((b, stored["fid_a_b"]), (a, stored["fid_a_a"]), (c, stored["fid_a_c"])):
        found = frechet_distance_of_statistics(*statistics_of(a), *statistics_of(other))
        assert found == pytest.approx(value, rel=1e-8, abs=1e-8)
        assert frechet_distance(a, other) == pytest.approx(value, rel=1e-7, abs=1e-8)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # SciPy before 1.18
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 24), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_distances_are_the_published_formula_of_singular_covariances_too(count_a, count_b, width, seed):
    a, b = statistics_of(drawn(count_a, width, seed)), statistics_of(drawn(count_b, width, seed + 1, 1.7))
    # SciPy's own round-off is about 1e-8 of the traces where a covariance lacks rank.
    tolerance = (1e-11 if min(count_a, count_b) > width + 5 else 3e-8) * (np.trace(a[1]) + np.trace(b[1]))
    assert frechet_distance_of_statistics(*a, *b) == pytest.approx(published(*a, *b), rel=0, abs=tolerance)


def test_distances_of_covariances_with_common_axes_are_known():
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((40, 40))).Q
    a, b, shift = random.uniform(0.5, 2, 40), random.uniform(0.5, 2, 40), random.standard_normal(40)
    covariance = lambda variances: axes * variances @ axes.T
    found = frechet_distance_of_statistics(shift, covariance(a), np.zeros(40), covariance(b))
    assert found == pytest.approx(shift @ shift + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (np.zeros(3), np.eye(2), r"mean \(D,\) and a covariance \(D, D\), got \(3,\) and \(2, 2\)"),
        (np.zeros((2, 2)), np.eye(2), r"got \(2, 2\)"),
        (np.array([0, np.nan]), np.eye(2), "finite"),
        (np.zeros(2), np.array([[1, 0.1], [0.2, 1]]), r"symmetric, entries differ by 0\.1"),
        (np.zeros(2), -np.eye(2), "variances must not be negative, got -1"),
        (np.zeros(3), np.eye(3), "of as many features, got 3 and 2"),
    ],
)
def test_statistics_that_are_none(mean, cov, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance_of_statistics(mean, cov, np.zeros(2), np.eye(2))


# Streaming


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 6), st.floats(-1e3, 1e3))
@settings(max_examples=60, deadline=None)
def test_streaming_sums_are_mean_and_covariance(sizes, width, offset):
    features = np.random.default_rng(len(sizes)).standard_normal((sum(sizes), width)) + offset
    found = no_statistics(width)
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        found = include(found, part)
    assert found.samples == len(features)
    if len(features) < 2:
        with pytest.raises(ValueError, match=f"needs 2 features, got {len(features)}"):
            _ = found.covariance
        return
    mean, covariance = statistics_of(features)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10, atol=1e-10)


def test_what_streaming_refuses():
    with pytest.raises(ValueError, match=r"features must be \(N, 3\), got \(4, 2\)"):
        include(no_statistics(3), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="finite"):
        include(no_statistics(1), [[1.0], [np.inf]])


# Bytes


@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.float32])
def test_conversions_to_bytes_are_those_of_the_originals(kind):
    stored = TABLES["uint8"]
    x = jnp.asarray(stored["x"]) if kind is jnp.float32 else np.asarray(stored["x"], kind)
    protocols = {
        "edm": ("edm_generate_py", "DiT_save_image", "DiT_sample_ddp"),
        "guided_diffusion": ("guided_diffusion_sample", "seed_tfgan"),
        "diffusers": ("diffusers_pil",),
    }
    assert sorted(itertools.chain(*protocols.values())) == sorted(set(stored) - {"x"})
    for protocol, originals in protocols.items():
        found = to_uint8(x, protocol)
        assert found.dtype == np.uint8
        assert isinstance(found, jax.Array) == isinstance(x, jax.Array)
        for original in originals:
            np.testing.assert_array_equal(found, stored[original], err_msg=original)


def test_an_unknown_conversion():
    with pytest.raises(ValueError, match="must be one of edm, guided_diffusion, diffusers, got 'jpeg'"):
        to_uint8(np.zeros(3), "jpeg")


# Files of statistics


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def statistics(width=WIDTH, seed=0):
    mean, covariance = statistics_of(drawn(100, width, seed))
    return {"mu": mean, "sigma": covariance}


def test_stored_statistics_are_used_as_they_are(tmp_path):
    stored = statistics()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    for arrays in (stored, {**stored, "arr_0": images, "mu_s": np.zeros(3)}):
        found = read_reference(write(tmp_path / "a.npz", **arrays))
        np.testing.assert_array_equal(found.mean, stored["mu"])
        np.testing.assert_array_equal(found.covariance, stored["sigma"])
        assert found.source == "mu and sigma"
    assert found.digest == evaluation._fid.hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    assert read_reference(tmp_path / "a.npz", from_images=True)[2:] == (None, None, "arr_0")


def test_stored_features_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation._reference, "_ROWS", 30)
    features = drawn(100, WIDTH, 1).astype(np.float32)
    found = read_reference(write(tmp_path / "a.npz", pool_3=features, logits=np.zeros(2)))
    mean, covariance = statistics_of(features.astype(np.float64))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("start", [0, 4, 5, 7])
def test_stored_images_come_in_batches_from_any_one_on(tmp_path, save, start):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
    save(tmp_path / "a.npz", arr_0=images)
    batches = list(stored_rows(tmp_path / "a.npz", "arr_0", 2, start))
    assert [len(batch) for batch in batches] == {0: [2, 2, 2, 1], 4: [2, 1], 5: [2], 7: []}[start]
    np.testing.assert_array_equal(np.concatenate([images[:start], *batches]), images)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def lengthened(path, name="arr_0"):
    """A file whose array has a header of more rows than are there."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 4, 4, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + bytes(48))


IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a folder, an NPZ file of statistics is needed"),
        (lambda path: None, "there is no file"),
        (lambda path: path.write_text("<html>"), "is no file of statistics: File is not a zip file; an NPZ file is"),
        (lambda path: path.write_bytes(b""), "is no file of statistics"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\0"), "is no file of statistics"),
        (lambda path: write(path), "it has nothing"),
        (lambda path: write(path, mu=np.zeros(3), x=np.zeros(2)), "it has mu, x"),
        (lambda path: write(path, mu=np.zeros(3), sigma=np.eye(4)), r"got \(3,\) and \(4, 4\)"),
        (lambda path: write(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), "finite"),
        (lambda path: write(path, mu=np.array(["a"]), sigma=np.eye(1)), "is no file of statistics"),
        (lambda path: write(path, mu=np.zeros(2), sigma=np.array([[Harmful()] * 2] * 2)), "allow_pickle=False"),
        (lambda path: write(path, arr_0=IMAGES.astype(float)), r"uint8, it is \(3, 4, 4, 3\) of float64"),
        (lambda path: write(path, arr_0=IMAGES[..., 0]), r"it is \(3, 4, 4\) of uint8"),
        (lambda path: write(path, arr_0=IMAGES[:1]), r"two or more images"),
        (lambda path: write(path, arr_0=np.asfortranarray(np.ones((3, 4, 4, 3), np.uint8))), "it is"),
        (lambda path: write(path, arr_0=np.array([Harmful(), 1])), r"it is \(2,\) of object"),
        (lambda path: write(path, pool_3=np.array([[Harmful()], [1]])), r"it is \(2, 1\) of object"),
        (lambda path: write(path, pool_3=np.full((4, 2), np.inf)), "finite"),
        (lambda path: cut(write(path, **statistics())), "is no file of statistics"),
        (lambda path: lengthened(path, "arr_0"), "needs 432 bytes, 48 are there"),
        (lambda path: lengthened(path, "pool_3"), "two or more features"),
    ],
)
def test_files_that_are_no_statistics(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.npz"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        read_reference(path)
    assert str(path) in str(raised.value)
    assert not Path("harm").exists()


def test_images_that_turn_out_damaged(run, tmp_path):
    path = write(tmp_path / "images.npz", arr_0=np.ones((13, 40, 40, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[content.index(bytes([1] * 100)) + 50_000] = 7  # its checksum is known at its end only
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.npz is damaged: Bad CRC-32 for file 'arr_0\.npy'"):
        run(("ddim",), (5,), reference=read_reference(path), batch=5, of=lambda images: features(images)[:, :WIDTH])


def test_images_are_asked_for_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="it has mu, sigma, but no images arr_0"):
        read_reference(write(tmp_path / "a.npz", **statistics()), from_images=True)


# Runs


def denoiser(params, labels):
    """The exact one of normal data whose mean depends on the class."""
    mean = jnp.asarray([-0.6, 0.0, 0.5])[labels][:, None, None, None]
    return lambda x, t: (params * x + t**2 * mean) / (params + t**2)


SCHEDULE = ed.schedules.edm()
SOURCE = Source(denoiser, jnp.float32(0.09), SCHEDULE, (2, 2, 3), 3, settings={"weights": "w"})


def features(images):
    return np.asarray(images).reshape(len(images), -1) / 10.0


@pytest.fixture
def reference(tmp_path):
    return read_reference(write(tmp_path / "reference.npz", **statistics()))


@pytest.fixture
def run(tmp_path, reference):
    """evaluate(...) with what a test does not say, as a list."""

    def evaluate(solvers=("unipc-3", "evodiff"), calls=(5, 6), num=64, source=SOURCE, of=features, **options):
        options = {"batch": 16, "features_name": "pixels", "uint8": "edm", "folder": tmp_path / "runs", **options}
        folder, against = options.pop("folder"), options.pop("reference", reference)
        made = {name: FORMS[name].make for name in solvers}
        return list(evaluation.evaluate(source, of, against, GRID, calls, made, num, folder, **options))

    return evaluate


def recorded():
    """Features that remember the images, and these."""
    images = []

    def of(batch):
        images.append(np.asarray(batch))
        return features(batch)

    return of, images


def samples_of(solver, calls, num, seed=0, protocol="edm"):
    """The images of a run by the library's functions for one batch of them all."""
    key = jax.random.key(seed)
    keys = [jax.random.fold_in(key, k) for k in range(num)]
    labels = jnp.array([jax.random.randint(jax.random.fold_in(k, 2), (), 0, 3) for k in keys])
    noise = jnp.stack([jax.random.split(k) for k in keys])
    times = evaluation.times_of(SCHEDULE, GRIDS["log_snr"], FORMS[solver].make(), calls)
    laid_out = ed.plan(SCHEDULE, times, FORMS[solver].make())
    x_T = SCHEDULE.noise(noise[:, 0], (num, 2, 2, 3))
    x = jax.jit(lambda x_T: ed.sample(denoiser(0.09, labels), x_T, laid_out, key=noise[:, 1]))(x_T)
    return np.asarray(to_uint8(x, protocol)), np.asarray(labels)


def test_figures_are_those_of_all_samples_at_once(run, reference):
    results = run(("unipc-3", "sde_dpm_solver_pp-2"), seed=3, num=50)
    assert [(r.solver, r.calls, r.samples) for r in results] == [
        (solver, calls, 50) for solver in ("unipc-3", "sde_dpm_solver_pp-2") for calls in (5, 6)
    ]
    for r in results:
        images, labels = samples_of(r.solver, r.calls, 50, seed=3)
        assert set(labels) == {0, 1, 2}
        expected = published(*statistics_of(features(images)), reference.mean, reference.covariance)
        assert r.value == pytest.approx(expected, rel=1e-6)  # a sample in hundreds may be a grey level off
    assert len({r.value for r in results}) == 4


def test_sample_k_depends_on_the_seed_and_k_alone(run, tmp_path):
    found = {}
    for name, options in {
        "all": {"num": 64},
        "few": {"num": 21},
        "other batch": {"num": 64, "batch": 23},
        "other seed": {"num": 64, "seed": 1},
        "other uint8": {"num": 64, "uint8": "guided_diffusion"},
    }.items():
        of, images = recorded()
        run(("sde_dpm_solver_pp-2",), (5,), of=of, folder=tmp_path / name, **options)
        assert {len(batch) for batch in images} == {options.get("batch", 16)}
        found[name] = np.concatenate(images)[: options["num"]]
    np.testing.assert_array_equal(found["few"], found["all"][:21])
    np.testing.assert_array_equal(found["other batch"], found["all"])
    assert (found["other seed"] != found["all"]).mean() > 0.9
    shift = found["all"].astype(int) - found["other uint8"]
    assert set(shift.ravel()) == {0, 1}


@pytest.mark.slow
def test_another_batch_size_has_the_same_statistics(run, tmp_path):
    run(folder=tmp_path / "a", batch=16)
    run(folder=tmp_path / "b", batch=7)
    for path in sorted((tmp_path / "a").glob("*.npz")):
        with np.load(path) as a, np.load(tmp_path / "b" / path.name) as b:
            assert set(a) == {"mu", "sigma", "samples", "blown_up"}
            for key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-10, atol=1e-10)


def test_a_run_that_is_stopped_goes_on_and_finished_ones_are_not_repeated(run, tmp_path, monkeypatch):
    expected = run(folder=tmp_path / "undisturbed")
    monkeypatch.setattr(_fid, "SAVE_SECONDS", 0.0)
    batches = []

    def stopping(name, count):
        batches.append((name, count))
        if len(batches) in (3, 7, 8):
            raise KeyboardInterrupt

    results = None
    for _ in range(4):
        try:
            results = run(on_batch=stopping)
        except KeyboardInterrupt:
            continue
    assert results == expected
    made = [(name, count) for name, count in batches if count == 16 and name == "unipc-3, 5 calls, log_snr"]
    assert len(made) == 5  # 4 batches, and one again that was not stored
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").iterdir())

    def never(images):
        raise AssertionError("nothing is to be made")

    totals = []
    assert run(of=never, on_batch=lambda _, count: totals.append(count)) == expected
    assert totals == [64] * 4
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").iterdir()) == before
    assert [r.calls for r in run(("unipc-3",), (5, 6, 7))] == [5, 6, 7]  # more of them are added


def test_an_unfinished_run_is_stored_every_half_minute_only(run, monkeypatch):
    saved, clock = [], itertools.count(0, 8)
    monkeypatch.setattr(_fid, "_save", lambda path, arrays: saved.append(arrays["samples"]))
    monkeypatch.setattr(_fid, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    run(("ddim",), (5,), num=160)
    assert saved == [64, 128, 160]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 65}, "samples 64 there, 65 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"uint8": "diffusers"}, "uint8 edm there, diffusers here"),
        ({"features_name": "other"}, "features pixels there, other here"),
        ({"source": SOURCE._replace(label=1)}, "class None there, 1 here"),
        ({"source": SOURCE._replace(settings={"weights": "v"})}, "weights w there, v here"),
    ],
)
def test_runs_of_other_settings_are_not_mixed(run, tmp_path, options, message):
    evaluation.check_store(tmp_path / "runs", settings_of(run, tmp_path))
    with pytest.raises(ValueError, match=message):
        run(**options)


def settings_of(run, tmp_path):
    """The settings that a run without options writes, without the run."""
    with pytest.raises(KeyboardInterrupt):
        run(("ddim",), (5,), of=interrupting, folder=tmp_path / "other")
    written = json.loads((tmp_path / "other" / "settings.json").read_text())
    return {name: value for name, value in written.items() if name != "version"}


def interrupting(images):
    raise KeyboardInterrupt


def test_the_same_runs_are_judged_by_another_reference(run, tmp_path):
    first = run(("ddim",), (5,))[0]
    other = read_reference(write(tmp_path / "other.npz", **statistics(seed=5)))
    second = run(("ddim",), (5,), of=interrupting, reference=other)[0]
    assert second._replace(value=0) == first._replace(value=0)
    assert second.value != first.value
    own = read_reference(next((tmp_path / "runs").glob("ddim*.npz")))  # a run is a file of statistics itself
    assert run(("ddim",), (5,), reference=own)[0].value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", [3, 5, 64])
def test_a_reference_of_images(run, tmp_path, batch):
    images = np.random.default_rng(0).integers(0, 256, (13, 2, 2, 3), np.uint8)
    against = read_reference(write(tmp_path / "images.npz", arr_0=images))
    counted = []
    result = run(("ddim",), (5,), reference=against, batch=batch, on_batch=lambda *a: counted.append(a))[0]
    assert sum(count for name, count in counted if name == "reference") == 13
    with np.load(next((tmp_path / "runs").glob("ddim*"))) as run_of:
        expected = published(run_of["mu"], run_of["sigma"], *statistics_of(features(images)))
    assert result.value == pytest.approx(expected, rel=1e-7)


def test_a_reference_of_other_features(run, tmp_path):
    other = read_reference(write(tmp_path / "other.npz", **statistics(5)))
    with pytest.raises(ValueError, match=r"other\.npz is of 5 features, here are 12: pass another reference"):
        run(("ddim",), (5,), reference=other)


def test_samples_that_are_not_finite_are_counted_and_nothing_is_nan(run, tmp_path):
    def exploding(params, labels):
        inner = denoiser(params, labels)
        return lambda x, t: inner(x, t) * jnp.where(labels == 1, jnp.inf, 1.0)[:, None, None, None]

    result = run(("ddim",), (5,), source=SOURCE._replace(make_denoiser=exploding))[0]
    _, labels = samples_of("ddim", 5, 64)
    assert (result.value, result.blown_up, result.samples) == (np.inf, np.sum(labels == 1), 64)
    with np.load(next((tmp_path / "runs").glob("ddim*"))) as run_of:
        assert int(run_of["samples"]) == 64 - result.blown_up
        assert np.isfinite(run_of["sigma"]).all()
    assert evaluation.fid_table([result]) == [["model calls", "5"], ["ddim", "not finite"]]
    everyone = SOURCE._replace(make_denoiser=lambda params, labels: lambda x, t: jnp.full_like(x, jnp.nan))
    assert run(("ddim",), (5,), source=everyone, folder=tmp_path / "all")[0].blown_up == 64


def test_one_class_unconditional_and_grey_images(run, tmp_path):
    of, images = recorded()
    run(("ddim",), (5,), source=SOURCE._replace(label=2), of=of)
    assert 180 < np.concatenate(images).mean() < 205  # 127.5 * 0.5 + 128
    of, images = recorded()
    grey = Source(lambda params, labels: lambda x, t: x * 0, None, SCHEDULE, (2, 2, 1))
    run(("ddim",), (5,), source=grey, of=of, folder=tmp_path / "grey")
    assert images[0].shape == (16, 2, 2, 3)
    assert set(np.concatenate(images).ravel()) <= {127, 128}  # the noise that is left has a deviation of 0.002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 1}, "a covariance needs 2 samples at least, got 1"),
        ({"uint8": "png"}, "uint8 conversion must be one of"),
    ],
)
def test_what_evaluate_refuses(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("of", [lambda images: np.zeros(len(images)), lambda images: np.zeros((3, 12))])
def test_features_of_another_shape(run, of):
    with pytest.raises(ValueError, match=r"features of 16 images must be \(16, D\), got shape"):
        run(("ddim",), (5,), of=of)


def test_a_damaged_run_is_named(run, tmp_path):
    run(("ddim",), (5,))
    path = next((tmp_path / "runs").glob("ddim*"))
    for content in (b"half", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is damaged .*: delete it"):
            run(("ddim",), (5,))


def test_a_full_disk_names_the_file(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_fid.np, "savez", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*ddim_log_snr_5_.*\.npz'"):
        run(("ddim",), (5,))


def test_solvers_of_fixed_coefficients_run_in_one_program_and_their_samples_do_not_change():
    planned = evaluation.runs(SCHEDULE, GRID, (5, 8), {name: form.make for name, form in FORMS.items()})
    plans = [ed.plan(SCHEDULE, r.times, FORMS[r.solver].make()) for r in planned]
    shaped = _fid._in_few_shapes(plans)
    shapes = {}
    for r, laid_out in zip(planned, shaped, strict=True):
        described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(laid_out)]
        shapes.setdefault(str((jax.tree.structure(laid_out), described)), set()).add(r.solver)
    fixed = {name for name, form in FORMS.items() if not form.stochastic} - {"variance_optimal", "evodiff"}
    random = {name for name, form in FORMS.items() if form.stochastic}
    assert sorted(shapes.values(), key=len) == [{"variance_optimal"}, {"evodiff"}, random, fixed]
    labels, x_T = jnp.zeros(4, int), SCHEDULE.noise(jax.random.key(0), (4, 2, 2, 3))
    run = jax.jit(functools.partial(ed.sample, denoiser(0.09, labels), key=jax.random.key(1)))
    for before, after in list(zip(plans, shaped, strict=True))[::5]:
        np.testing.assert_allclose(run(x_T, after), run(x_T, before), rtol=1e-5, atol=1e-6)


def test_the_call_to_the_end_counts_among_the_calls():
    solvers = {name: FORMS[name].make for name in ("unipc-2", "heun")}
    planned = evaluation.runs(SCHEDULE, GRID, (5, 6), solvers, denoise_to_zero=True)
    steps = {(r.solver, r.calls): len(r.times) - 1 for r in planned}
    assert steps == {("unipc-2", 5): 4, ("unipc-2", 6): 5, ("heun", 5): 2}
    assert evaluation.skipped(planned, ["log_snr"], (6, 5), solvers) == [("heun", "log_snr", 6)]


def test_the_tables(tmp_path):
    results = [
        _fid.Fid("ddim", "log_snr", 5, 12.3456, 100, 0, "d"),
        _fid.Fid("ddim", "log_snr", 10, -1e-9, 100, 0, "e"),
        _fid.Fid("heun", "log_snr", 10, np.inf, 100, 2, "f"),
    ]
    table = evaluation.fid_table(results)
    assert table == [["model calls", "5", "10"], ["ddim", "12.346", "0.000"], ["heun", "", "not finite"]]
    assert evaluation.aligned(table).split("\n") == [
        "model calls       5          10",
        "ddim         12.346       0.000",
        "heun                 not finite",
    ]
    several = [*results, _fid.Fid("ddim", "karras", 5, 1.0, 100, 0, "d")]
    assert [row[0] for row in evaluation.fid_table(several)[1:]] == ["ddim, log_snr", "heun, log_snr", "ddim, karras"]
    written = evaluation.write_fid_report(tmp_path / "new", results, ["model m"], ["remark"])
    markdown, text = (path.read_text() for path in written)
    assert "- model m\n\n| model calls | 5 | 10 |\n| --- | ---: | ---: |\n| ddim | 12.346 | 0.000 |" in markdown
    assert markdown.endswith("| heun |  | not finite |\n\nremark\n")
    assert text.split("\n")[:2] == ["solver,grid,calls,fid,samples,blown_up,digest", "ddim,log_snr,5,12.3456,100,0,d"]
    assert "heun,log_snr,10,inf,100,2,f" in text
