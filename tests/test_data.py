import gzip

import chex
import numpy as np
import pytest

from evodiff_jax.evaluation.data import CLASS_NAMES, load_fashion_mnist, read_idx

pytestmark = pytest.mark.fast


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    header = bytes([0, 0, kind, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()


def write_split(folder, images, labels, stem="train", compress=True):
    for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
        content = idx_bytes(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_images_and_labels_come_back(tmp_path, images, compress, split, stem):
    labels = np.array([0, 9, 3, 3, 7])
    images[0, 0, :2] = (0, 255)
    write_split(tmp_path, images, labels, stem, compress)
    data = load_fashion_mnist(split, tmp_path)
    chex.assert_shape(data.images, (5, 28, 28, 1))
    assert data.images.dtype == np.float32
    assert data.labels.dtype == np.int32
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_array_equal(data.images[0, 0, :2, 0], [-1.0, 1.0])
    np.testing.assert_allclose((data.images[..., 0] + 1) * 127.5, images, atol=1e-4)


def test_folder_from_the_environment(tmp_path, images, monkeypatch):
    write_split(tmp_path, images, np.zeros(5))
    monkeypatch.setenv("EVODIFF_JAX_DATA", str(tmp_path))
    assert len(load_fashion_mnist().labels) == 5


def test_argument_wins_over_the_environment(tmp_path, images, monkeypatch):
    write_split(tmp_path, images, np.zeros(5))
    monkeypatch.setenv("EVODIFF_JAX_DATA", "/nowhere")
    assert len(load_fashion_mnist(folder=tmp_path).labels) == 5


def test_missing_file_says_which_where_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_fashion_mnist("train", tmp_path)
    message = str(error.value)
    for part in ("train-images-idx3-ubyte", str(tmp_path), "dataset-fashion-mnist", "--data"):
        assert part in message
    assert "\n" not in message


def test_unknown_split():
    with pytest.raises(ValueError, match="train, test"):
        load_fashion_mnist("valid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "needs"),
        (lambda b: b + b"\0", "needs"),
        (lambda b: b[:9], "truncated"),
        (lambda b: b[:3], "not an IDX"),
        (lambda b: b"", "not an IDX"),
        (lambda b: b"\1" + b[1:], "not an IDX"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "0x0d"),
        (lambda b: gzip.compress(b)[:-30], "damaged gzip"),
        (lambda b: gzip.compress(b)[:20] + bytes(40), "damaged gzip"),
    ],
)
def test_bad_files_are_refused(tmp_path, images, change, message):
    path = tmp_path / "file"
    path.write_bytes(change(idx_bytes(images)))
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_header_that_claims_a_huge_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(ValueError, match="needs"):
        read_idx(path)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [((5, 28, 28), np.zeros(4), "labels of shape"), ((5, 28, 27), np.zeros(5), "28 x 28"), ((1, 28, 28), [10], "10")],
)
def test_files_that_do_not_fit_together(tmp_path, shape, labels, message):
    write_split(tmp_path, np.zeros(shape), np.asarray(labels))
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist("train", tmp_path)


def test_ten_distinct_class_names():
    assert len(set(CLASS_NAMES)) == 10
