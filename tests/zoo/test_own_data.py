import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tersetorch as tt


def arrays(count=36):
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.randn(count, 3, 4, generator=generator),
        "labels": torch.randint(0, 5, (count,), generator=generator),
    }


def test_both_kinds_of_file_give_the_same(tmp_path):
    save_file(arrays(), tmp_path / "own.safetensors")
    np.savez(tmp_path / "own.npz", **{name: tensor.numpy() for name, tensor in arrays().items()})
    first, second = (tt.zoo.read_dataset(tmp_path / f"own.{kind}", seed=1) for kind in ("safetensors", "npz"))
    for part in ("train", "validation", "test"):
        assert getattr(first, f"{part}_images").equal(getattr(second, f"{part}_images"))
        assert getattr(first, f"{part}_labels").equal(getattr(second, f"{part}_labels"))
    assert len(first.train_labels) == 33 and len(first.validation_labels) == 3 and len(first.test_labels) == 0
    together = torch.cat([first.train_images, first.validation_images]).flatten(1)
    assert together[together[:, 0].argsort()].equal(
        arrays()["images"].flatten(1)[arrays()["images"].flatten(1)[:, 0].argsort()]
    )
    assert (first.name, first.classes) == ("own", int(arrays()["labels"].max()) + 1)
    other = tt.zoo.read_dataset(tmp_path / "own.npz", seed=2)
    assert not other.validation_images.equal(first.validation_images)


def test_bytes_are_scaled(tmp_path):
    pixels = torch.arange(24, dtype=torch.uint8).reshape(12, 2)
    labels = torch.zeros(12, dtype=torch.int32)
    save_file(
        {"images": pixels, "labels": labels, "test_images": pixels[:1] + 230, "test_labels": labels[:1] + 3},
        tmp_path / "x.safetensors",
    )
    data = tt.zoo.read_dataset(tmp_path / "x.safetensors")
    assert data.test_images.tolist() == [[pytest.approx(230 / 255), pytest.approx(231 / 255)]] and data.classes == 4
    assert data.train_labels.dtype == torch.int64


@pytest.mark.parametrize(
    "change,sentence",
    [
        (lambda a: a.pop("labels"), "must hold images and labels, got images"),
        (lambda a: a.update(labels=a["labels"][1:].clone()), "must be .N, .... and labels whole numbers"),
        (lambda a: a.update(labels=a["labels"].float()), "whole numbers .N., got .* of torch.float32"),
        (lambda a: a.update(labels=a["labels"] - 1), "labels in .* must be at least 0, got -1"),
        (lambda a: a.update(images=a["images"].to(torch.int16)), "must be floating-point, .* got torch.int16"),
        (lambda a: a.update(weights=torch.ones(1)), "alone, got weights"),
        (lambda a: a.update(images=a["images"][:3].clone(), labels=a["labels"][:3].clone()), "must be at least 12"),
        (lambda a: a.update(test_images=a["images"].clone()), "must hold test_images and test_labels"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, sentence):
    held = arrays()
    change(held)
    save_file(held, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"read_dataset: .*{sentence}"):
        tt.zoo.read_dataset(tmp_path / "bad.safetensors")


def test_numbers_of_words_stay_whole(tmp_path):
    held = arrays()
    held["images"] = held["images"].int()
    save_file(held, tmp_path / "words.safetensors")
    data = tt.zoo.read_dataset(tmp_path / "words.safetensors")
    assert data.train_images.dtype == torch.int64 and len(data.train_images) + len(data.validation_images) == len(
        held["images"]
    )


def test_other_files_are_refused(tmp_path):
    for name in ("x.npz", "x.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="must hold arrays of numbers, got another file"):
            tt.zoo.read_dataset(tmp_path / name)
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], dtype=object), labels=np.zeros(1))
    with pytest.raises(ValueError, match="must hold arrays of numbers"):
        tt.zoo.read_dataset(tmp_path / "pickled.npz")
    with pytest.raises(ValueError, match="path must end in"):
        tt.zoo.read_dataset(tmp_path / "x.csv")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="path must name a regular file"):
        tt.zoo.read_dataset(tmp_path / "pipe.npz")
    with pytest.raises(FileNotFoundError, match="path must exist"):
        tt.zoo.read_dataset(tmp_path / "none.npz")


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(shape, data=b"", dtype="<f4", version=(1, 0)):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "members,sentence",
    [
        ({"images": npy((1 << 40, 2)), "labels": npy((1 << 40,), dtype="<i8")}, "bytes for float32"),
        ({"images": npy((1 << 62, 1 << 62))}, "bytes for float32"),
        ({"images": npy((-1, 2))}, "bytes for float32"),
        ({"images": npy((2,), bytes(80 << 20))}, "where 67108864 are the most"),
        ({"images": npy((2,), version=(9, 9))}, "another file"),
        ({"images": npy((2,), pickle.dumps(print), dtype="|O")}, "Object arrays cannot be loaded"),
        ({"images": b""}, "another file"),
        ({"images": b"\x93NUMPY\1\0\xff\xff{"}, "another file"),
    ],
)
def test_arrays_take_no_more_than_the_file_has(tmp_path, members, sentence):
    path = npz(tmp_path / "own.npz", **members)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=f"must hold arrays of numbers, got .*{sentence}"):
        tt.zoo.read_dataset(path)


def test_a_compressed_file_is_read(tmp_path):
    np.savez_compressed(tmp_path / "own.npz", images=np.zeros((5000, 16), np.float32), labels=np.zeros(5000, np.int64))
    assert len(tt.zoo.read_dataset(tmp_path / "own.npz").train_labels) > 4000
