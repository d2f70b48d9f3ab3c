"""tt.load, and what it shares with tt.inspect."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from tersetorch.conversion.swap import deep_copy
from tersetorch.methods.finalize import finalize
from tersetorch.methods.parametrization import is_live
from tersetorch.storage import fields
from tersetorch.storage.arguments import naming, path_of
from tersetorch.storage.container import START_CAP, check_start, split, unpack, version_of
from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import Budget, reading, refuse
from tersetorch.storage.rebuild import Builder, Tensors, adopt

# What a file may ask for without being asked about: this much, or this many times its own size.
FREE_BYTES = 64 << 20
FREE_RATIO = 4096


@dataclass(frozen=True)
class Contents:
    """A file's parts, every checksum verified.

    Attributes:
        version: of the format.
        file_bytes: size of the file.
        container_bytes: the safetensors head with its length.
        header_bytes: the header tensor, deflated, with its checksum.
        root: the model's node.
        entries: the tensors.
        data: the streams of each tensor.
        provenance: what save was given.
    """

    version: int
    file_bytes: int
    container_bytes: int
    header_bytes: int
    root: Any
    entries: list[Entry]
    data: list[list[bytes]]
    provenance: dict[str, Any] | None


def load(
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Reads what save wrote: the same tensors to the bit, on the CPU, with the same ties and training flags.

    Args:
        path: the file.
        model: an instance of the saved model's class with dense layers, as its constructor makes it. It is copied, the
            file's sparse layers are put into the copy, and the copy is returned; model itself never changes. Without
            it, zoo networks and trees of torch.nn modules and our layers are built from the file alone.
        max_bytes: the most bytes that the tensors may take; None allows 64 MiB or 4096 times the file's size, whichever
            is more. Packed codes may take as much again, and so may modules with layouts (64 MiB at least). What asks
            for more is refused before it is allocated. At the peak come the file's bytes and, while a tensor is being
            decoded, twice its bytes and 8 for each number, or 48 for each weight that a sparse layer stores.
        progress: a bar of the tensors' bytes is added to it.

    Raises:
        TypeError: an argument has another type than named here.
        TerseFileError: the file is truncated, damaged, larger than max_bytes once decoded, of another version, not a
            terse file, or holds modules that need model=. Nothing is left behind.
        ValueError: path is no name of a file, or model's modules, or its tensors' names, shapes or dtypes, are not
            those of the file.
        OSError: the file cannot be read; FileNotFoundError where there is none.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be an nn.Module, got {type(model).__name__}; pass an instance, not a class")
    if max_bytes is not None and (not isinstance(max_bytes, int) or isinstance(max_bytes, bool)):
        raise TypeError(f"load: max_bytes must be an integer, got {type(max_bytes).__name__}; pass a number of bytes")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"load: max_bytes must be at least 1, got {max_bytes}; pass None for the usual limit")
    with reading("load", path_of("load", path)):
        contents = read("load", path)
        limit = max(FREE_BYTES, FREE_RATIO * contents.file_bytes) if max_bytes is None else max_bytes
        Budget(limit).take(sum(max(entry.decoded_bytes, entry.places_read) for entry in contents.entries))
        budgets = Budget(limit), Budget(max(limit, FREE_BYTES))
        tensors = Tensors(contents.entries, contents.data, *budgets, progress)
        if model is None:
            loaded = Builder(tensors, limit).build(contents.root)
        else:
            loaded = adopt(contents.root, _dense(model), tensors)
        tensors.check_all_used()
    return loaded


def read(where: str, path: str | PathLike[str]) -> Contents:
    """Reads and verifies the file; decodes nothing. Call it inside `reading`.

    Raises:
        TypeError: path is neither a string nor a path.
        ValueError: path is no name of a file.
        TerseFileError: the file is damaged, of another version, or no terse file.
        OSError: the file cannot be read; FileNotFoundError where there is none.
    """
    raw = _whole(where, path_of(where, path))
    header, data, container_bytes, header_bytes = unpack(raw)
    fields.check_keys(header, "the header", {"m", "t", "p"})
    entries = [Entry.from_json(item) for item in fields.items(header.get("t"), "the tensors")]
    provenance = header.get("p")
    if provenance is not None and not isinstance(provenance, dict):
        refuse("have an object as provenance", type(provenance).__name__)
    streams = iter(split(data, [spec.nbytes for entry in entries for spec in entry.streams]))
    grouped = [[next(streams) for _ in entry.streams] for entry in entries]
    sizes = len(raw), container_bytes, header_bytes
    return Contents(version_of(raw), *sizes, header.get("m"), entries, grouped, provenance)


def _whole(where: str, path: Path) -> bytes:
    """The bytes of a regular file whose start and size are those of a .terse file."""
    with naming(where, path, "name a file that can be read", "check the name"):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            refuse("be a terse file", "a folder" if stat.S_ISDIR(mode) else "a device or pipe", "pass the file's name")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            check_start(file.read(START_CAP), size)
            file.seek(0)
            return file.read(size)


def _dense(model: nn.Module) -> nn.Module:
    """The instance that the file's tensors go into: model, or a finalized copy of one that is being compressed."""
    return finalize(deep_copy(model, verb="load")) if is_live(model) else model
