"""Zip archives that others made (.pt, .pt2, .npz): what their parts may take, before anything is read."""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Deflated parts may be this large, or this many times the file.
FREE_BYTES = 64 << 20
RATIO = 64
_ZIP = b"PK\x03\x04"
# What torch lets a pickle call, and makes much of little: bytearray(n), encode(encode(x, "hex"), "hex"), Tensor(lists
# of the same lists). torch.save rebuilds tensors from their bytes by other names.
_GROWING = re.compile(r"(?s:.*)(bytearray|encode|Tensor)")
_NPY_HEADERS: dict[tuple[int, int], Callable[..., tuple[Any, Any, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def what_is_wrong(archive: zipfile.ZipFile, file_bytes: int, *, deflated: bool = False) -> str | None:
    """What archive came with that an honest one has not, in words; None where nothing is wrong.

    Parts that are stored as they are take no more than the file does, however they overlap; deflated ones, where they
    are allowed, FREE_BYTES or RATIO times the file.
    """
    parts = archive.infolist()
    if len({part.filename.casefold() for part in parts}) != len(parts):
        return "a name that comes twice"
    if any(not 0 <= part.header_offset < file_bytes for part in parts):  # zipfile would seek there
        return "a part that lies outside the file"
    total = sum(part.file_size for part in parts)
    if deflated:
        most = max(FREE_BYTES, RATIO * file_bytes)
        return None if total <= most else f"{total} bytes in parts of {file_bytes}, where {most} are the most"
    if any(part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size for part in parts):
        return "deflated files, which torch does not write"
    return None if total <= file_bytes else "files that share their bytes"


def check_stored(path: Path) -> None:
    """Refuses what torch.load(path, weights_only=True) would take far more memory for than path has bytes.

    That is a file whose parts take more than itself, one that makes objects as large as a number says, and one that is
    no zip archive, as torch wrote before 1.6: there a number says how large a tensor is, too.

    Raises:
        ValueError: it is such a file, or a damaged one.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(len(_ZIP))
    if start != _ZIP or not zipfile.is_zipfile(path):  # torch looks at the start, zipfile at the end
        raise ValueError(
            "must be a whole zip archive, as torch.save writes since 1.6, got another; load an older file once and "
            "save it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = what_is_wrong(archive, path.stat().st_size) or _growing(archive)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"must be a whole archive, got a damaged one ({error})") from error
    if wrong is not None:
        raise ValueError(f"must be an archive that torch.save wrote of tensors, numbers and text, got one with {wrong}")


def _growing(archive: zipfile.ZipFile) -> str | None:
    """An object of archive's pickle that may be larger than the pickle, in words."""
    for part in archive.infolist():
        if part.filename.casefold().endswith("data.pkl"):
            try:
                for code, name, _ in pickletools.genops(archive.read(part)):
                    if code.name == "GLOBAL" and _GROWING.fullmatch(str(name)):
                        return f"{str(name).replace(' ', '.')} in it"
            except ValueError as error:
                return f"a pickle that cannot be read ({error})"
    return None


def check_npz(path: Path) -> None:
    """Refuses a .npz file whose arrays are larger than their bytes, or inflate to more than they may.

    Raises:
        ValueError: it is such a file. What zipfile and numpy raise of damaged ones passes.
        OSError: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        wrong = what_is_wrong(archive, path.stat().st_size, deflated=True)
        if wrong is not None:
            raise ValueError(wrong)
        for part in archive.infolist():
            with archive.open(part) as file:
                read = _NPY_HEADERS.get(np.lib.format.read_magic(file))
                if read is None:
                    raise ValueError(f"{part.filename} is of another version")
                shape, _, dtype = read(file)
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > part.file_size:
                raise ValueError(f"{part.filename} has {part.file_size} bytes for {dtype} {list(shape)}")
