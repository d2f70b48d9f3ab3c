"""tt.inspect: where every byte of a file went."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from rich.console import Console
from rich.table import Table

from tersetorch.storage import fields, streams
from tersetorch.storage.container import CHECKSUM_BYTES
from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import reading, refuse
from tersetorch.storage.packed_kinds import is_of_codes, is_of_signs, is_of_steps
from tersetorch.storage.reader import read
from tersetorch.storage.rebuild import check_node

PARTS = (
    "values",
    "positions",
    "codes",
    "codebooks",
    "code tables",
    "signs",
    "scales",
    "thresholds",
    "biases",
    "other tensors",
    "checksums",
    "header",
    "container",
)
_ROLE_PARTS = {
    "values": "values",
    "codebook": "codebooks",
    "codes": "codes",
    "positions": "positions",
    "signs": "signs",
    "scales": "scales",
    "offsets": "scales",
}
# Tensors of layers of signs, all of whose bytes count as one part.
_NAME_PARTS = {"signs": "signs", "scale": "scales", "thresholds": "thresholds", "flips": "thresholds"}
# The same of layers of codes, whatever they are coded with.
_CODE_PARTS = {"plain_codes": "codes", "codes": "codes", "codebook": "codebooks", "codebooks": "codebooks"}

# Columns of the whole table of tensors.
WIDE = 150


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file.

    Attributes:
        name: its first name in the model, such as "fc1.weight".
        shape: of the dense tensor.
        dtype: such as "float32".
        form: raw, codebook, codebooks, vectors, sparse, sparse-codebook, signs, integers, affine or scaled.
        coders: of its streams.
        stored: numbers that are stored, each by its value or code.
        entries: of the codebook or of each, or integers from the least to the greatest; 0 for none.
        dense_bytes: as float32 (as it is, for an integer tensor); of a layer's codes or signs, those of the weight that
            they stand for, and 0 of its codebook.
        parts: bytes by part, some of PARTS.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    coders: tuple[str, ...]
    stored: int
    entries: int
    dense_bytes: int
    parts: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's streams, checksums and all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Inspection:
    """Every byte of a file: the tensors' parts, the header and the container add up to file_bytes.

    Attributes:
        path: the file.
        version: of the format.
        file_bytes: size of the file.
        header_bytes: the deflated description of modules and streams.
        container_bytes: the safetensors head.
        tensors: in the file's order.
        provenance: what save was given.
    """

    path: str
    version: int
    file_bytes: int
    header_bytes: int
    container_bytes: int
    tensors: tuple[StoredTensor, ...]
    provenance: dict[str, Any] | None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, all of PARTS; their sum is file_bytes."""
        total = Counter({"header": self.header_bytes, "container": self.container_bytes})
        for tensor in self.tensors:
            total.update(tensor.parts)
        return {part: total[part] for part in PARTS}

    @property
    def parameters(self) -> int:
        """Numbers in the dense tensors."""
        return sum(_size(tensor.shape) for tensor in self.tensors)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tensors dense, floating-point ones as float32."""
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def ratio(self) -> float:
        """dense_bytes / file_bytes."""
        return self.dense_bytes / self.file_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        tensors = [
            asdict(tensor) | {"shape": list(tensor.shape), "coders": list(tensor.coders), "bytes": tensor.nbytes}
            for tensor in self.tensors
        ]
        totals = {
            "parts": self.parts,
            "parameters": self.parameters,
            "dense_bytes": self.dense_bytes,
            "ratio": self.ratio,
        }
        return asdict(self) | {"tensors": tensors} | totals

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDE) -> str:
        """Tables of tensors and of parts; below 150 columns without what each tensor is made of.

        Args:
            width: in characters, at least 1.
        """
        wide = width >= WIDE
        console = Console(
            file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False, highlight=False
        )
        console.print(self._tensor_table(wide))
        console.print(self._part_table())
        console.print(
            f"{self.file_bytes} bytes for {self.parameters} numbers, {self.dense_bytes} bytes as plain float32: "
            f"{self.ratio:.2f} times smaller"
        )
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _tensor_table(self, wide: bool) -> Table:
        table = Table(title=self.path)
        used = [part for part in PARTS if wide and any(tensor.parts.get(part) for tensor in self.tensors)]
        for heading in ("tensor", "shape", "stored as", "kept"):
            table.add_column(heading, overflow="ellipsis" if wide else "fold")
        for heading in (*used, "bytes", "of dense"):
            table.add_column(heading, justify="right")
        for tensor in self.tensors:
            size = _size(tensor.shape)
            table.add_row(
                tensor.name,
                "x".join(map(str, tensor.shape)) or "()",
                ", ".join((tensor.form, *dict.fromkeys(coder for coder in tensor.coders if coder != "raw"))),
                f"{tensor.stored / size:.1%}" if size else "",
                *(str(tensor.parts.get(part, "")) for part in used),
                str(tensor.nbytes),
                f"{tensor.nbytes / tensor.dense_bytes:.1%}" if tensor.dense_bytes else "",
            )
        return table

    def _part_table(self) -> Table:
        table = Table()
        table.add_column("part")
        table.add_column("bytes", justify="right")
        table.add_column("share", justify="right")
        for part, nbytes in self.parts.items():
            if nbytes:
                table.add_row(part, str(nbytes), f"{nbytes / self.file_bytes:.1%}")
        table.add_section()
        table.add_row("file", str(self.file_bytes), "100.0%")
        return table


def inspect(path: str | PathLike[str]) -> Inspection:
    """Says where every byte of a .terse file went, without building the model.

    Raises:
        TypeError: path is neither a string nor a path.
        TerseFileError: the file is truncated, damaged, of another version, or no terse file.
        ValueError: path is no name of a file.
        OSError: the file cannot be read; FileNotFoundError where there is none.
    """
    with reading("inspect", path):
        contents = read("inspect", path)
        names: dict[int, tuple[str, dict[str, Any]]] = {}
        for number, name, node in _names(contents.root, ""):
            names.setdefault(number, (name, node))
        if set(names) != set(range(len(contents.entries))):
            refuse("use every tensor it stores", f"{len(names)} of {len(contents.entries)}")
        tensors = tuple(
            _stored(*names[number], entry, data)
            for number, (entry, data) in enumerate(zip(contents.entries, contents.data, strict=True))
        )
    return Inspection(
        str(path),
        contents.version,
        contents.file_bytes,
        contents.header_bytes,
        contents.container_bytes,
        tensors,
        contents.provenance,
    )


def _names(node: Any, path: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, name and module's node of every use of a tensor, in the model's order."""
    if node is None or type(node) is int:
        return
    check_node(node)
    for name, number in node.get("t", {}).items():
        if type(number) is not int:
            refuse("number its tensors", repr(number)[:40])
        yield number, fields.joined(path, name), node
    for name, child in node.get("m", {}).items():
        yield from _names(child, fields.joined(path, name))


def _stored(name: str, node: dict[str, Any], entry: Entry, data: list[bytes]) -> StoredTensor:
    parts: Counter[str] = Counter({"checksums": CHECKSUM_BYTES * len(data)})
    kind = node.get("k")
    named = _NAME_PARTS if is_of_signs(kind) else _CODE_PARTS if is_of_codes(kind) else {}
    whole = named.get(name.rpartition(".")[2]) or _whole_part(name, entry)
    for spec, stream in zip(entry.streams, data, strict=True):
        alphabet = {"codes": entry.entries, "signs": 2}.get(spec.role, 1 << spec.width)
        table = streams.table_bytes(stream, spec.coder, alphabet)
        parts[whole or "code tables"] += table
        parts[whole or _ROLE_PARTS[spec.role]] += len(stream) - table
    return StoredTensor(
        name,
        entry.shape,
        str(entry.dtype).removeprefix("torch."),
        entry.form,
        tuple(spec.coder for spec in entry.streams),
        entry.stored,
        entry.entries,
        _dense_bytes(name.rpartition(".")[2], node, entry),
        {part: parts[part] for part in PARTS if parts[part]},
    )


def _dense_bytes(name: str, node: dict[str, Any], entry: Entry) -> int:
    kind = node.get("k")
    if is_of_codes(kind) and name in ("codebook", "codebooks"):
        return 0
    if (is_of_codes(kind) and name == "plain_codes") or (is_of_signs(kind) and name == "signs"):
        rows, columns = (node.get("c", {}).get(size) for size in ("out_features", "in_features"))
        return 4 * (rows * columns if type(rows) is int and type(columns) is int else entry.numel)
    if is_of_steps(kind) and name in ("steps", "bias"):
        return 4 * entry.numel
    return entry.numel * (4 if entry.real_dtype.is_floating_point else entry.real_dtype.itemsize)


def _whole_part(name: str, entry: Entry) -> str | None:
    """The part that all of a small tensor counts as; None for a weight, whose streams count apart."""
    if "bias" in name.rpartition(".")[2]:
        return "biases"
    return None if len(entry.shape) > 1 else "other tensors"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size
