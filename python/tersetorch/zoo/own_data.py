"""A data set of the user's own, from one file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tersetorch.storage.archives import check_npz
from tersetorch.storage.arguments import check_regular
from tersetorch.zoo.checks import check_seed
from tersetorch.zoo.data import HELD_OUT, Dataset

SUFFIXES = (".npz", ".safetensors")
NAMES = ("images", "labels", "test_images", "test_labels")


def read_dataset(path: str | os.PathLike[str], *, seed: int = 0) -> Dataset:
    """Reads examples and their labels; every twelfth example, drawn by seed, is held out for validation.

    Args:
        path: a .npz or .safetensors file with images [N, ...], anything that the network takes: floating-point, uint8,
            which is scaled to [0, 1], or int32 or int64, numbers of words as an nn.Embedding takes them; and labels
            [N], whole numbers from 0; test_images and test_labels likewise, or neither, for no test examples.
        seed: draws the held-out examples.

    Raises:
        ValueError: the file is none of these or no regular file, or an array is missing, left over or has another shape
            or type.
        TypeError: seed is no int.
        FileNotFoundError: there is no such file.
    """
    check_seed("read_dataset", seed)
    path = Path(path)
    arrays = _arrays(path)
    images, labels = _pair(path, arrays, "images", "labels")
    if len(images) < HELD_OUT:
        raise ValueError(
            f"read_dataset: images in {path} must be at least {HELD_OUT}, so that one is held out, got {len(images)}; "
            "store more"
        )
    if "test_images" in arrays or "test_labels" in arrays:
        test_images, test_labels = _pair(path, arrays, "test_images", "test_labels")
    else:
        test_images, test_labels = images[:0], labels[:0]
    if left := sorted(set(arrays) - set(NAMES)):
        raise ValueError(f"read_dataset: {path} must hold {', '.join(NAMES)} alone, got {', '.join(left)}; rename them")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    return Dataset(
        name=path.stem,
        source=str(path),
        classes=int(torch.cat([labels, test_labels]).max()) + 1,
        train_images=images[kept],
        train_labels=labels[kept],
        validation_images=images[held_out],
        validation_labels=labels[held_out],
        test_images=test_images,
        test_labels=test_labels,
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"read_dataset: path must end in {' or '.join(SUFFIXES)}, got {path}; write such a file")
    check_regular("read_dataset", "path", path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"read_dataset: path must exist, got {path}; pass a file that does") from None
    except Exception as error:  # whatever readers make of a damaged file
        raise ValueError(
            f"read_dataset: {path} must hold arrays of numbers, got another file ({error}); write it with numpy.savez "
            "or safetensors"
        ) from error


def _pair(path: Path, arrays: dict[str, Tensor], images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    if images_name not in arrays or labels_name not in arrays:
        raise ValueError(
            f"read_dataset: {path} must hold {images_name} and {labels_name}, got "
            f"{', '.join(sorted(arrays)) or 'nothing'}; name the arrays so"
        )
    images, labels = arrays[images_name], arrays[labels_name]
    whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if labels.ndim != 1 or not whole or images.ndim < 2 or len(images) != len(labels) or not images.numel():
        raise ValueError(
            f"read_dataset: {images_name} in {path} must be [N, ...] and {labels_name} whole numbers [N], got "
            f"{tuple(images.shape)} and {tuple(labels.shape)} of {labels.dtype}; store a label for each example"
        )
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif images.dtype in (torch.int32, torch.int64):
        images = images.long()
    elif images.is_floating_point():
        images = images.float()
    else:
        raise ValueError(
            f"read_dataset: {images_name} in {path} must be floating-point, uint8, int32 or int64, got {images.dtype}; "
            "convert them"
        )
    if images.is_floating_point() and not bool(images.isfinite().all()):
        raise ValueError(
            f"read_dataset: {images_name} in {path} must be finite, got NaN or infinity; leave such examples out"
        )
    if int(labels.min()) < 0:
        raise ValueError(
            f"read_dataset: {labels_name} in {path} must be at least 0, got {int(labels.min())}; number classes from 0"
        )
    return images, labels.long()
