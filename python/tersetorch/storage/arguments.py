"""What save, load and inspect check and copy in the same way."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path


def path_of(where: str, path: str | PathLike[str]) -> Path:
    """The path that the caller gave.

    Raises:
        TypeError: path is neither a string nor a path.
        ValueError: path is empty, or no name that a file can have.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{where}: path must be a string or a path, got {type(path).__name__}; pass the file's name")
    if path == "":
        raise ValueError(f"{where}: path must name a file, got ''; pass the file's name")
    target = Path(path)
    try:
        encodable = b"\0" not in os.fsencode(target)
    except UnicodeEncodeError:
        encodable = False
    if not encodable:
        raise ValueError(f"{where}: path must be a name that a file can have, got {str(path)!r}; pass another")
    return target


def target_of(where: str, path: str | PathLike[str]) -> Path:
    """The file to write that the caller gave; a link stays, and what it names is replaced.

    Raises:
        TypeError: path is neither a string nor a path.
        ValueError: path is empty or no name that a file can have, or it names a folder, a device or a pipe.
        OSError: path cannot be looked at; FileNotFoundError where its folder does not exist.
    """
    target = Path(os.path.realpath(path_of(where, path)))
    mode = 0
    with naming(where, target, "name a file that can be written", "choose another"):
        folder = target.parent.is_dir()
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = target.stat().st_mode
    if not folder:
        raise FileNotFoundError(f"{where}: path must lie in a folder that exists, got {target}; create {target.parent}")
    if stat.S_ISDIR(mode):
        raise ValueError(f"{where}: path must name a file, got the folder {target}; add a name, such as model.terse")
    if mode and not stat.S_ISREG(mode):
        raise ValueError(f"{where}: path must name a regular file, got the device or pipe {target}; choose another")
    return target


def check_regular(where: str, name: str, path: Path, most: int | None = None) -> None:
    """Refuses what nobody should open to read: a pipe waits for its writer, a device may never end.

    A path that names nothing passes: who opens it says so.

    Args:
        where: the function or verb, for the error.
        name: its argument, for the error.
        path: a link counts as what it names.
        most: bytes that the file may have.

    Raises:
        ValueError: path names a folder, a device or a pipe, or a file of more bytes.
    """
    try:
        found = path.stat()
    except OSError:
        return
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "device or pipe"
        raise ValueError(f"{where}: {name} must name a regular file, got the {kind} {path}; copy it to a file")
    if most is not None and found.st_size > most:
        raise ValueError(
            f"{where}: {name} must name a file of at most {most:,} bytes, got {found.st_size:,} in {path}; name the "
            "right one"
        )


def write_whole(where: str, target: Path, data: bytes) -> None:
    """Puts data at target whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    with naming(where, target, "name a file that can be written", "choose another, or make room"):
        try:
            with open(beside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def naming(where: str, path: Path, rule: str, fix: str) -> Iterator[None]:
    """Says of every OSError raised inside, which keeps its class, what path must be."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{where}: path must {rule}, got {str(path)!r} ({reason}); {fix}") from error
