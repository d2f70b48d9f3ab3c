import gzip
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tersetorch.zoo import data
from tersetorch.zoo.data import load, read_idx

ROOT = Path(os.environ.get("TERSETORCH_DATA") or "/nonexistent")


def idx(array, magic=None):
    array = np.asarray(array, np.uint8)
    head = magic if magic is not None else bytes([0, 0, 8, array.ndim])
    return head + b"".join(struct.pack(">I", size) for size in array.shape) + array.tobytes()


def write_set(folder, train=24, test=6, compress=True, size=4, mark=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(mark)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, size, size))
        images[:, 0, 0] = mark
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            name = f"{part}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


@pytest.fixture(autouse=True)
def no_installed_data(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "debian")
    monkeypatch.delenv("TERSETORCH_DATA", raising=False)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("shape", [(5,), (0,), (3, 4, 5), (2, 3, 1, 2)])
def test_idx_round_trip(tmp_path, shape, compress):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / ("a.gz" if compress else "a")
    path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must open with 00 00 08 .* got nothing"),
        (b"\x1f\x8b\x08\x01", "must open with 00 00 08"),
        (idx([1, 2], b"\0\0\x0d\x01"), "must open with 00 00 08 .* got 00 00 0d 01"),
        (idx([1, 2], b"\0\0\x08\x00"), "1 to 4 dimensions"),
        (b"\0\0\x08\x02\0\0", "must hold 2 dimensions, got fewer"),
        (idx([1, 2])[:-1], r"must hold 2 values for shape \(2,\), got 1"),
        (idx([1, 2]) + b"\0", r"must hold 2 values for shape \(2,\), got more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "must declare at most"),
    ],
)
@pytest.mark.parametrize("compress", [True, False])
def test_idx_refuses_other_files(tmp_path, content, sentence, compress):
    path = tmp_path / ("bad.gz" if compress else "bad")
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(ValueError, match=sentence):
        read_idx(path)


def test_idx_refuses_every_truncated_gzip(tmp_path):
    whole = gzip.compress(idx(np.arange(200) % 7))
    path = tmp_path / "cut.gz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"read_idx: .*cut\.gz must"):
            read_idx(path)


def test_idx_inflates_no_more_than_declared(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx([1, 2]) + bytes(50_000_000)))
    with pytest.raises(ValueError, match="got more"):
        read_idx(path)


def test_validation_is_a_twelfth_chosen_by_seed(tmp_path):
    root = write_set(tmp_path / "mnist")
    sets = [load("mnist", root, seed=seed) for seed in (0, 0, 1)]
    assert [len(part) for part in (sets[0].train_images, sets[0].validation_images, sets[0].test_images)] == [22, 2, 6]
    assert torch.equal(sets[0].validation_images, sets[1].validation_images)
    assert not torch.equal(sets[0].validation_images, sets[2].validation_images)
    everything = torch.cat([sets[2].train_images, sets[2].validation_images])
    original = torch.from_numpy(read_idx(root / "train-images-idx3-ubyte.gz").astype(np.float32) / 255)
    assert {image.numpy().tobytes() for image in everything} == {image.numpy().tobytes() for image in original}
    assert torch.equal(sets[0].test_images, sets[2].test_images)


def test_images_are_pixels_over_255_and_keep_their_labels(tmp_path):
    root = write_set(tmp_path / "mnist", compress=False)
    loaded = load("mnist", root)
    raw = torch.from_numpy(read_idx(root / "train-images-idx3-ubyte").astype(np.float32)) / 255
    assert loaded.train_images.dtype == torch.float32 and loaded.train_labels.dtype == torch.int64
    assert loaded.train_images.shape == (22, 1, 4, 4) and loaded.in_features == 16
    for image, label in zip(loaded.train_images, loaded.train_labels, strict=True):
        [original] = [index for index, other in enumerate(raw) if torch.equal(image[0], other)]
        assert label == original % 10


@pytest.mark.parametrize("layout", ["data/mnist", "mnist", "data/MNIST/raw", "MNIST/raw", "."])
def test_layouts_of_mnist(tmp_path, layout):
    write_set(tmp_path / "root" / layout)
    assert load("auto", tmp_path / "root").name == "mnist"


@pytest.mark.parametrize("layout", ["data/fashion-mnist", "fashion-mnist", "data/FashionMNIST/raw", "FashionMNIST/raw"])
def test_layouts_of_fashion(tmp_path, layout):
    write_set(tmp_path / "root" / layout)
    assert load("auto", tmp_path / "root").name == "fashion-mnist"


def test_a_folder_named_fashion_holds_fashion(tmp_path):
    write_set(tmp_path / "fashion-mnist")
    assert load("auto", tmp_path / "fashion-mnist").name == "fashion-mnist"


def test_auto_takes_the_first_there_is(tmp_path, monkeypatch):
    assert load().name == "digits"
    write_set(tmp_path / "debian")
    assert (load().name, load().source) == ("fashion-mnist", str(tmp_path / "debian"))
    root = tmp_path / "root"
    write_set(root / "fashion-mnist")
    monkeypatch.setenv("TERSETORCH_DATA", str(root))
    assert load().source == str(root / "fashion-mnist")
    write_set(root / "data" / "mnist")
    assert (load().name, load().source) == ("mnist", str(root / "data" / "mnist"))
    assert load("fashion-mnist").source == str(root / "fashion-mnist")
    assert load("digits").name == "digits"


def test_digits_are_scaled_and_split():
    digits = load("digits")
    assert [len(part) for part in (digits.train_labels, digits.validation_labels, digits.test_labels)] == [
        1319,
        119,
        359,
    ]
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    assert torch.equal(digits.test_images, load("digits", seed=1).test_images)


def test_missing_data_is_said_with_the_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: mnist must be in one of no folder"):
        load("mnist")
    with pytest.raises(FileNotFoundError, match=r"load: mnist or fashion-mnist must be in one of .*data/mnist"):
        load("auto", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fashion-mnist must be in one of .*debian.* set TERSETORCH_DATA"):
        load("fashion-mnist")


def test_missing_scikit_learn_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"digits must come from scikit-learn.*tersetorch\[demo\]"):
        load("digits")


def test_half_a_set_is_refused(tmp_path):
    root = write_set(tmp_path / "mnist")
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold t10k-labels-idx1-ubyte or .*\.gz, got neither"):
        load("mnist", root)


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("train-labels-idx1", np.zeros(23), r"must hold images \[N, height, width\] and labels \[N\] of train"),
        ("train-images-idx3", np.zeros((24, 16)), "must hold images"),
        ("train-labels-idx1", np.full(24, 10), "labels of train in .* must be below 10, got 10"),
        ("t10k-images-idx3", np.zeros((6, 5, 4)), r"must have one size, got \(4, 4\) and \(5, 4\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, array, sentence):
    root = write_set(tmp_path / "mnist", compress=False)
    (root / f"{name}-ubyte").write_bytes(idx(array))
    with pytest.raises(ValueError, match=sentence):
        load("mnist", root)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"name": "cifar"}, ValueError, "name must be one of auto, mnist, fashion-mnist, digits, got 'cifar'"),
        ({"root": "/nowhere/at/all"}, ValueError, "root must be a folder, got '/nowhere/at/all'"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, ValueError, r"seed must be below 2\*\*63, got 9223372036854775808"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        load(**arguments)


def test_real_mnist():
    if not (ROOT / "data/mnist").is_dir():
        pytest.skip("wants TERSETORCH_DATA with data/mnist")
    loaded = load("mnist", ROOT)
    assert (len(loaded.train_images), len(loaded.validation_images), len(loaded.test_images)) == (55_000, 5_000, 10_000)
    mean = loaded.train_images.mean()
    assert abs(mean - 0.1307) < 0.001
