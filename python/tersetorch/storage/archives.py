"""Zip archives that others made (.pt, .pt2, .npz): what their parts may take, before anything is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

# Deflated parts may be this large, or this many times the file.
FREE_BYTES = 64 << 20
RATIO = 64


def what_is_wrong(archive: zipfile.ZipFile, file_bytes: int, *, deflated: bool = False) -> str | None:
    """What archive came with that an honest one has not, in words; None where nothing is wrong.

    Parts that are stored as they are take no more than the file does, however they overlap; deflated ones, where they
    are allowed, FREE_BYTES or RATIO times the file.
    """
    parts = archive.infolist()
    if len({part.filename.casefold() for part in parts}) != len(parts):
        return "a name that comes twice"
    total = sum(part.file_size for part in parts)
    if deflated:
        most = max(FREE_BYTES, RATIO * file_bytes)
        return None if total <= most else f"{total} bytes in parts of {file_bytes}, where {most} are the most"
    if any(part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size for part in parts):
        return "deflated files, which torch does not write"
    return None if total <= file_bytes else "files that share their bytes"


def check_stored(path: Path) -> None:
    """Refuses a zip file whose parts take more than itself; another kind of file passes.

    Raises:
        ValueError: it is such a file, or a damaged one.
        OSError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = what_is_wrong(archive, path.stat().st_size)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"must be a whole archive, got a damaged one ({error})") from error
    if wrong is not None:
        raise ValueError(f"must be an archive that torch.save wrote, got one with {wrong}")
