"""Colour images with labels: CIFAR-10 as JPEG files, a hundred of ImageNet, and what networks take of them."""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tersetorch.zoo.checks import check_count

Part = Literal["train", "test"]

CIFAR_FILE = "cifar10-jpeg.tar.xz"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)
IMAGENET_FILE = "imagenet-100.npz"
CAFFE_MEAN = (104.0, 117.0, 123.0)
# A CIFAR image of 3,072 values; a file in the archive that claims more than this is none.
JPEG_LIMIT = 1 << 16


def read_cifar10(
    part: Part = "test", per_class: int | None = None, root: str | os.PathLike[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Reads CIFAR-10 from cifar10-jpeg.tar.xz, whose files are train|test/<class>/<number>.jpg.

    The images went through lossy JPEG: a network that was trained on the originals has about 10 points more error on
    them (ResNet-20: 8.3 % becomes 19.0 %). Compare only what was measured on the same images.

    Args:
        part: "train" (50,000 images) or "test" (10,000).
        per_class: the first so many of each class; all of them when it is None.
        root: folder with the archive or with data/ that holds it; the folder that TERSETORCH_DATA names when None.

    Returns:
        images uint8 [N, 3, 32, 32], red first, and labels int64 [N] in the classes' alphabetical order, which is the
        data set's own, sorted by label and number.

    Raises:
        ValueError: part or per_class is none of these, or the archive holds something else.
        TypeError: per_class is not an int.
        FileNotFoundError: the archive is in none of the places.
        ModuleNotFoundError: Pillow, which decodes JPEG, is not installed.

    Source:
        Krizhevsky, Learning multiple layers of features from tiny images (2009).
    """
    if part not in get_args(Part):
        raise ValueError(f"read_cifar10: part must be 'train' or 'test', got {part!r}; pass one of these")
    if per_class is not None:
        check_count("read_cifar10", "per_class", per_class)
    path = _find("read_cifar10", CIFAR_FILE, root)
    found: dict[tuple[int, int], np.ndarray] = {}
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                label, number = _place(path, member, part)
                if member.isfile() and label >= 0 and (per_class is None or number < per_class):
                    file = archive.extractfile(member)
                    found[label, number] = _decode(path, member.name, file.read() if file is not None else b"")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(
            f"read_cifar10: {path} must be a whole tar.xz archive, got one that is damaged ({error}); download it again"
        ) from error
    if not found:
        raise ValueError(f"read_cifar10: {path} must hold {part}/<class>/<number>.jpg, got none; download it again")
    order = sorted(found)
    images = torch.from_numpy(np.stack([found[key] for key in order])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for label, _ in order])


def read_imagenet100(root: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Reads a hundred ImageNet images, one of every tenth class, from imagenet-100.npz.

    Args:
        root: folder with the file or with data/ that holds it; the folder that TERSETORCH_DATA names when None.

    Returns:
        images uint8 [N, 3, height, width], red first, and labels int64 [N] in [0, 1000), the order of ImageNet's
        synsets.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: the file is in none of the places.
    """
    path = _find("read_imagenet100", IMAGENET_FILE, root)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"read_imagenet100: {path} must be an npz file of images and labels, got another or a damaged one "
            f"({error}); download it again"
        ) from error
    shaped = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not shaped or labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"read_imagenet100: {path} must hold images uint8 [N, height, width, 3] and labels int64 [N], got "
            f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}; download it again"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def caffe_input(images: Tensor) -> Tensor:
    """What networks trained with Caffe take: blue first, from 0 to 255, less (104, 117, 123).

    Args:
        images: uint8 [N, 3, height, width], red first.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError, ValueError: images is no such tensor.
    """
    _check_pixels("caffe_input", images)
    return images.flip(1).float() - torch.tensor(CAFFE_MEAN, device=images.device)[:, None, None]


def cifar_input(images: Tensor) -> Tensor:
    """What published CIFAR ResNets take: (x / 255 - mean) / std by channel, with ImageNet's mean and deviation.

    Args:
        images: uint8 [N, 3, height, width], red first.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError, ValueError: images is no such tensor.
    """
    _check_pixels("cifar_input", images)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))
    return (images.float() / 255 - mean) / std


def _check_pixels(where: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{where}: images must be a uint8 tensor, got {got}; pass pixels from 0 to 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{where}: images must be [N, 3, height, width], got shape {tuple(images.shape)}; permute the axes"
        )


def _find(where: str, name: str, root: str | os.PathLike[str] | None) -> Path:
    folder = root if root is not None else os.environ.get("TERSETORCH_DATA") or None
    places = [] if folder is None else [Path(folder) / "data" / name, Path(folder) / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{where}: {name} must be in one of {', '.join(map(str, places)) or 'no folder'}, got none there; "
            "set TERSETORCH_DATA or root= to the folder that holds it"
        )
    return path


def _place(path: Path, member: tarfile.TarInfo, part: str) -> tuple[int, int]:
    """Label and number of a file of the part, (-1, -1) of anything else."""
    pieces = member.name.removeprefix("./").split("/")
    if len(pieces) != 3 or pieces[0] != part:
        return -1, -1
    stem = pieces[2].removesuffix(".jpg")
    if pieces[1] not in CIFAR_CLASSES or not re.fullmatch("[0-9]{1,9}", stem) or member.size > JPEG_LIMIT:
        raise ValueError(
            f"read_cifar10: {path} must hold {part}/<class>/<number>.jpg, got {member.name[:80]} of {member.size} "
            "bytes; download it again"
        )
    return CIFAR_CLASSES.index(pieces[1]), int(stem)


def _decode(path: Path, name: str, data: bytes) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError(
            "read_cifar10: JPEG files must be decoded by Pillow, got no such package; run pip install pillow"
        ) from error
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.size == (32, 32):
                return np.asarray(image.convert("RGB"))
            got = f"{image.size[0]} x {image.size[1]}"
    except OSError as error:
        got = f"a damaged file ({error})"
    raise ValueError(f"read_cifar10: {name} in {path} must be a JPEG image of 32 x 32, got {got}; download it again")
