"""Image data sets: MNIST and Fashion-MNIST from IDX files, scikit-learn's digits where there are none."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tersetorch.zoo.checks import check_seed

Name = Literal["auto", "mnist", "fashion-mnist", "digits"]

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
# Of every 12 training images one is held out: 5,000 of MNIST's 60,000.
HELD_OUT = 12
IDX_UINT8 = 0x08
# What an IDX file may declare before anything is read: 25 times MNIST's training images.
IDX_LIMIT = 25 * 60_000 * 28 * 28


@dataclass(frozen=True)
class Dataset:
    """Images and labels in three parts: train to learn from, validation to choose by, test to read once.

    Attributes:
        name: "mnist", "fashion-mnist" or "digits".
        source: the folder or package it was read from.
        classes: number of classes.
        train_images: float32 [N, 1, height, width] in [0, 1]; the same for validation_images and test_images.
        train_labels: int64 [N] in [0, classes); the same for validation_labels and test_labels.
    """

    name: str
    source: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def in_features(self) -> int:
        """Values of one image."""
        return prod(self.train_images.shape[1:])


def load(name: Name = "auto", root: str | os.PathLike[str] | None = None, *, seed: int = 0) -> Dataset:
    """Loads a data set; every twelfth training image, drawn by seed, is held out for validation (5,000 of MNIST's).

    Args:
        name: which one; "auto" takes the first there is of MNIST and Fashion-MNIST in root, Fashion-MNIST of Debian's
            package dataset-fashion-mnist, and scikit-learn's digits. Dataset.source says which it was.
        root: folder with the IDX files, plain or gzipped, or with data/mnist, mnist, data/fashion-mnist or
            fashion-mnist in it; the folder that TERSETORCH_DATA names when it is None.
        seed: draws the held-out images. The test images never depend on it: the publishers' own, and every fifth
            of the digits, which come in one piece.

    Raises:
        ValueError: name is unknown, seed is outside [0, 2**63), root is no folder, or a file is not what its name says.
        TypeError: seed is not an int.
        FileNotFoundError: the data set is in none of the places; the message lists them.
        ModuleNotFoundError: digits are asked for and scikit-learn is not installed.
    """
    if name not in get_args(Name):
        raise ValueError(f"load: name must be one of {', '.join(get_args(Name))}, got {name!r}; pass one of these")
    check_seed("load", seed)
    if root is not None and not Path(root).is_dir():
        raise ValueError(f"load: root must be a folder, got {str(root)!r}; pass one that exists, or None")
    folder = root if root is not None else os.environ.get("TERSETORCH_DATA") or None
    if name == "digits":
        return _digits(seed)
    wanted = ["mnist", "fashion-mnist"] if name == "auto" else [name]
    places = [(data, place) for data in wanted for place in _places(data, folder)]
    for data, place in places:
        if _file(place, "train-images-idx3-ubyte") is not None:
            return _idx_dataset(data, place, seed)
    if name == "auto" and root is None:
        return _digits(seed)
    raise FileNotFoundError(
        f"load: {' or '.join(wanted)} must be in one of {', '.join(str(place) for _, place in places) or 'no folder'}, "
        "got no train-images-idx3-ubyte(.gz) there; set TERSETORCH_DATA or root= to the folder that holds the IDX files"
    )


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped when its name ends in .gz.

    Layout: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit number, then the values. The size that the head declares is checked before anything else is read, and no
    more than that is inflated.

    Returns:
        uint8 array of the declared shape.

    Raises:
        ValueError: the file is not IDX, not of bytes, larger than we take, or not as long as its head says.
        FileNotFoundError: there is no such file.

    Source:
        LeCun, Cortes, Burges, The MNIST database of handwritten digits, "File formats".
    """
    path = Path(path)
    opener: Callable[[Path], BinaryIO] = gzip.open if path.suffix == ".gz" else _open  # type: ignore[assignment]
    try:
        with opener(path) as file:
            return _read_idx(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"read_idx: {path} must be a whole gzip file, got one that breaks off or is damaged ({error}); "
            "download it again"
        ) from error


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _read_idx(file: BinaryIO, path: Path) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != IDX_UINT8 or not 1 <= magic[3] <= 4:
        raise ValueError(
            f"read_idx: {path} must open with 00 00 08 and 1 to 4 dimensions, got {magic.hex(' ') or 'nothing'}; "
            "pass an IDX file of unsigned bytes"
        )
    dimensions = file.read(4 * magic[3])
    if len(dimensions) < 4 * magic[3]:
        raise ValueError(f"read_idx: {path} must hold {magic[3]} dimensions, got fewer; download it again")
    shape = tuple(int(size) for size in np.frombuffer(dimensions, ">u4"))
    count = prod(shape)
    if count > IDX_LIMIT:
        raise ValueError(
            f"read_idx: {path} must declare at most {IDX_LIMIT} values, got shape {shape}; pass a smaller data set"
        )
    values = file.read(count)
    if len(values) != count or file.read(1):
        found = f"{len(values)}" if len(values) < count else "more"
        raise ValueError(f"read_idx: {path} must hold {count} values for shape {shape}, got {found}; download it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _places(name: str, folder: str | os.PathLike[str] | None) -> list[Path]:
    places = []
    if folder is not None:
        root = Path(folder)
        raw = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}[name]
        places = [root / "data" / name, root / name, root / "data" / raw, root / raw]
        # Both data sets name their files alike, so only the folder can tell them apart.
        if ("fashion" in root.resolve().name.lower()) == (name == "fashion-mnist"):
            places.append(root)
    return [*places, DEBIAN_FASHION] if name == "fashion-mnist" else places


def _file(place: Path, stem: str) -> Path | None:
    candidates = (place / (stem + suffix) for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _idx_dataset(name: str, place: Path, seed: int) -> Dataset:
    def pair(part: str) -> tuple[Tensor, Tensor]:
        images, labels = (_idx_part(place, f"{part}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.size:
            raise ValueError(
                f"load: {place} must hold images [N, height, width] and labels [N] of {part}, got shapes "
                f"{images.shape} and {labels.shape}; put the files of one data set there"
            )
        if labels.max() >= 10:
            raise ValueError(
                f"load: labels of {part} in {place} must be below 10, got {labels.max()}; "
                "put the files of one data set there"
            )
        return _images(images, 255), torch.from_numpy(labels.astype(np.int64))

    train, test = pair("train"), pair("t10k")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"load: train and test images in {place} must have one size, got {tuple(train[0].shape[2:])} and "
            f"{tuple(test[0].shape[2:])}; put the files of one data set there"
        )
    return _split(name, str(place), train, test, seed)


def _idx_part(place: Path, stem: str) -> np.ndarray:
    path = _file(place, stem)
    if path is None:
        raise FileNotFoundError(
            f"load: {place} must hold {stem} or {stem}.gz, got neither; put all four IDX files there"
        )
    return read_idx(path)


def _digits(seed: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "load: digits must come from scikit-learn, got no such package; "
            "run pip install 'tersetorch[demo]', or set TERSETORCH_DATA to a folder with MNIST"
        ) from error
    digits = load_digits()
    images, labels = _images(digits.images, 16), torch.from_numpy(digits.target.astype(np.int64))
    test = torch.arange(len(images)) % 5 == 4
    return _split("digits", "scikit-learn", (images[~test], labels[~test]), (images[test], labels[test]), seed)


def _images(pixels: np.ndarray, white: float) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).div_(white).unsqueeze(1)


def _split(name: str, source: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> Dataset:
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    held_out = len(order) // HELD_OUT
    (images, labels), kept, validation = train, order[held_out:], order[:held_out]
    return Dataset(name, source, 10, images[kept], labels[kept], images[validation], labels[validation], *test)
