"""torchao's quantised tensors, from their parts alone: of a live model, or of a safetensors file and its metadata.

A file that torchao's prototype.safetensors wrote holds `layer._weight_qdata`, `layer._weight_scale`, ... and, as JSON
in the metadata, `tensor_names` (all of them) and for each name its `_type`, its attributes (`_data`) and the parts it
has (`_tensor_data_names`).

Blocks of block_size share a scale; scales lie in the order of the blocks, and

    weight = dtype((dtype(qdata) - dtype(zero_point)) scale)     Int8Tensor, IntxUnpackedToInt8Tensor
    weight = dtype(codebook[codes] scales)                       CodebookQuantizedTensor
    weight = dtype(codebook[block, codes])                       CodebookQuantizedTensor of codebook_coreml
    weight = float32((code - 8) scale + zero)                    Int4OpaqueTensor, rounded once, whatever its dtype
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from tersetorch.storage.importers.quantized_weight import FLOATS, MAX_ENTRIES, QuantizedWeight
from tersetorch.storage.importers.refusal import refuse

NAMES = "tensor_names"
# Bytes of JSON that one tensor may have; torchao writes a few hundred.
FIELDS_CAP = 1 << 16
LEAST = {f"int{bits}": -(1 << bits - 1) for bits in range(1, 9)}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
PRE_SCALE = "act_pre_scale"
ADVICE = "quantise weights only"


def is_torchao(value: object) -> bool:
    """Whether value is one of torchao's tensors, known here or not."""
    return isinstance(value, Tensor) and type(value).__module__.split(".")[0] == "torchao"


def read_tensor(name: str, tensor: Tensor) -> QuantizedWeight:
    """The codes and tables of a live tensor of torchao's.

    Raises:
        ValueError: it is of a kind that is not read, or its parts do not fit each other.
    """
    kind = type(tensor).__name__
    if kind == "CodebookQuantizedTensor" and "coreml" in type(tensor).__module__:
        kind = "coreml"
    if kind not in READERS:
        _refuse_kind(name, kind)
    return READERS[kind](name, _Parts(name, lambda part: getattr(tensor, part, None)))


def read_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor | QuantizedWeight]:
    """Every tensor of a safetensors file of torchao's.

    Raises:
        ValueError: the metadata is damaged, names a kind that is not read, or does not fit the tensors.
    """
    names = _json(NAMES, metadata)
    if not isinstance(names, list) or len(names) != len({repr(name) for name in names}):
        refuse(f"name each tensor once in the metadata's {NAMES!r}", "something else")
    found: dict[str, Tensor | QuantizedWeight] = {}
    used = set()
    for name in names:
        fields = _json(name, metadata) if isinstance(name, str) else None
        fields = fields if isinstance(fields, dict) else {}
        kind = fields.get("_type")
        if kind == "Tensor":
            if name not in tensors:
                refuse(f"hold the tensor {name!r}", "none")
            found[name] = tensors[name]
            used.add(name)
            continue
        if not isinstance(kind, str) or kind not in FILE_KINDS:
            _refuse_kind(name, kind)
        attributes, present = fields.get("_data"), fields.get("_tensor_data_names")
        if not isinstance(attributes, dict) or not isinstance(present, list):
            refuse(f"hold _data and _tensor_data_names of {name!r} in the metadata", "others")
        owner, _, own = name.rpartition(".")
        parts = {part: f"{owner}._{own}_{part}" for part in present if isinstance(part, str)}
        for part in parts.values():
            if part not in tensors:
                refuse(f"hold the tensor {part!r}", "none")
        used |= set(parts.values())
        given = attributes | {part: tensors[key] for part, key in parts.items()}
        found[name] = READERS[kind](name, _Parts(name, given.get))
    left = sorted(set(tensors) - used)
    if left:
        refuse("name each tensor in its metadata", f"none for {left[0]!r}")
    return found


def _json(name: str, metadata: Mapping[str, str]) -> Any:
    text = metadata.get(name, "")
    cap = FIELDS_CAP if name != NAMES else len(text)
    try:
        if len(text) > cap:
            raise ValueError
        return json.loads(text)
    except (ValueError, RecursionError):
        refuse(f"hold JSON of {name!r} in the metadata", f"{text!r:.60}")


def _refuse_kind(name: object, kind: object) -> NoReturn:
    refuse(
        "hold only Int8Tensor, IntxUnpackedToInt8Tensor, CodebookQuantizedTensor or, live, Int4OpaqueTensor of torchao",
        f"{kind} as {name!r}",
        "others are packed for a GPU, or are no codes; quantise with the config of one of these",
    )


class _Parts:
    """The tensors and attributes of one quantised tensor, checked as they are asked for."""

    def __init__(self, name: str, get: Callable[[str], object]):
        self.name = name
        self.get = get

    def tensor(self, part: str, dtypes: Sequence[torch.dtype]) -> Tensor:
        value = self.get(part)
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            refuse(f"hold {part} of {self.name!r} in {' or '.join(map(str, dtypes))}", got)
        return value.detach().as_subclass(Tensor).cpu()

    def dtype(self, part: str) -> str:
        """The name of a dtype: live ones are torch's, those of a file JSON."""
        value = self.get(part)
        if isinstance(value, dict) and value.get("_type") == "torch.dtype":
            value = value.get("_data")
        return str(value).removeprefix("torch.")

    def output(self) -> torch.dtype:
        name = self.dtype("dtype")
        if name not in DTYPES:
            refuse(f"hold {self.name!r} in one of {tuple(DTYPES)}", f"{name:.40}")
        return DTYPES[name]

    def block(self, shape: Sequence[int]) -> list[int]:
        """Sizes of a block, each of which divides its dimension."""
        value = self.get("block_size")
        sizes = list(value) if isinstance(value, list | tuple) else []
        if len(sizes) != len(shape) or not all(type(size) is int for size in sizes):
            refuse(f"hold a block_size of {len(shape)} numbers for {self.name!r}", f"{value!r:.60}")
        sizes = [whole if size == -1 else size for size, whole in zip(sizes, shape, strict=True)]
        if not all(size > 0 and whole % size == 0 for size, whole in zip(sizes, shape, strict=True)):
            refuse(f"hold a block_size of {self.name!r} that divides {list(shape)}", f"{sizes}")
        return sizes


def _affine(name: str, parts: _Parts) -> QuantizedWeight:
    integers = parts.tensor("qdata", [torch.int8])
    target = "int8" if parts.get("target_dtype") is None else parts.dtype("target_dtype")
    if target not in LEAST:
        refuse(f"hold int1 to int8 in {name!r}", f"{target:.40}")
    if parts.get(PRE_SCALE) is not None:
        refuse(f"scale no activations before {name!r}", PRE_SCALE, "fold it into the layer before")
    least, dtype = LEAST[target], parts.output()
    if integers.numel() and (int(integers.min()) < least or int(integers.max()) > -least - 1):
        refuse(f"hold {target} in {name!r}", f"values from {int(integers.min())} to {int(integers.max())}")
    block = parts.block(integers.shape)
    grid = [whole // size for whole, size in zip(integers.shape, block, strict=True)]
    scale = parts.tensor("scale", FLOATS)
    values = torch.arange(least, -least).to(dtype)[None]
    if parts.get("zero_point") is not None:
        zero = parts.tensor("zero_point", [torch.int8, torch.int32, torch.int64, *FLOATS])
        if zero.numel() != prod(grid):
            refuse(f"hold {prod(grid)} zero points of {name!r}, one a block", zero.numel())
        values = values - zero.to(dtype).reshape(-1, 1)
    if scale.numel() != prod(grid):
        refuse(f"hold {prod(grid)} scales of {name!r}, one a block", scale.numel())
    codebook = (values * scale.reshape(-1, 1)).to(dtype).float()
    codes = (integers.short() - least).to(torch.uint8)
    return _weight(name, codes, codebook, grid, block, dtype)


def _codebook(name: str, parts: _Parts) -> QuantizedWeight:
    coded: object = parts.get("codes")
    if type(coded).__name__ == "UintxTensor":
        coded = coded.get_plain()  # type: ignore[attr-defined]  # torchao's own unpacking, of a live tensor
    table = parts.tensor("codebook", FLOATS)
    scales = parts.tensor("scales", FLOATS)
    if not isinstance(coded, Tensor) or coded.dim() != 2:
        refuse(f"hold a code for each weight of {name!r}", type(coded).__name__)
    if table.dim() != 3 or tuple(table.shape[1:]) != (1, 1) or not 1 <= table.shape[0] <= MAX_ENTRIES:
        refuse(f"hold at most {MAX_ENTRIES} single numbers in the codebook of {name!r}", f"shape {list(table.shape)}")
    rows, columns = coded.shape
    blocks = scales.shape[-2] if scales.dim() == 3 else 0
    if tuple(scales.shape) != (rows, blocks, 1) or not blocks or columns % blocks:
        refuse(f"hold scales [{rows}, blocks, 1] of {name!r}", f"shape {list(scales.shape)}")
    dtype = parts.output()
    # torchao multiplies in place, in the codebook's dtype.
    codebook = (table.reshape(1, -1) * scales.reshape(-1, 1)).to(table.dtype).to(dtype).float()
    return _weight(name, _codes(name, coded, table.shape[0]), codebook, [rows, blocks], [1, columns // blocks], dtype)


def _coreml(name: str, parts: _Parts) -> QuantizedWeight:
    coded = parts.tensor("codes", [torch.uint8, torch.int32, torch.int64])
    table = parts.tensor("codebook", FLOATS)
    block = parts.block(coded.shape)
    grid = [whole // size for whole, size in zip(coded.shape, block, strict=True)]
    if table.dim() != coded.dim() + 2 or list(table.shape[:-2]) != grid or table.shape[-1] != 1:
        refuse(f"hold {[*grid, 'entries', 1]} single numbers in the codebook of {name!r}", f"shape {list(table.shape)}")
    entries, dtype = table.shape[-2], parts.output()
    if not 1 <= entries <= MAX_ENTRIES:
        refuse(f"hold at most {MAX_ENTRIES} numbers in each table of {name!r}", entries)
    return _weight(name, _codes(name, coded, entries), table.reshape(-1, entries).to(dtype).float(), grid, block, dtype)


def _opaque(name: str, parts: _Parts) -> QuantizedWeight:
    """4-bit codes in the order that torch's kernel of this machine wants them in, which is found by packing places."""
    if parts.get("act_mapping_type") is not None or parts.get(PRE_SCALE) is not None:
        refuse(f"leave activations as they are before {name!r}", "a tensor that quantises or scales them", ADVICE)
    shape = parts.get("shape")
    assert isinstance(shape, torch.Size)
    block = parts.block(shape)
    packed = parts.tensor("qdata", [torch.uint8])
    if len(shape) != 2 or block[0] != 1 or packed.numel() * 2 != prod(shape):
        refuse(f"hold half a byte for each weight of {name!r}, in groups along a row", f"{packed.numel()} bytes")
    rows, columns = shape
    grid = [rows, columns // block[1]]
    scales = parts.tensor("scale_and_zero", FLOATS)
    if tuple(scales.shape) != (grid[1], rows, 2):
        refuse(f"hold {[grid[1], rows, 2]} scales and zeros of {name!r}", f"shape {list(scales.shape)}")
    codes = torch.empty(rows * columns, dtype=torch.uint8)
    codes[_places(name, rows, columns)] = _halves(packed)
    scale, zero = scales.transpose(0, 1).reshape(-1, 2, 1).double().unbind(1)
    codebook = ((torch.arange(16) - 8) * scale + zero).float()
    return _weight(name, codes.reshape(rows, columns), codebook, grid, block, torch.float32)


def _places(name: str, rows: int, columns: int) -> Tensor:
    """The weight that each half byte of a packed tensor belongs to, a hexadecimal digit at a time."""
    weights = torch.arange(rows * columns).reshape(rows, columns)
    places = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 4):
        try:
            digits = torch.ops.aten._convert_weight_to_int4pack_for_cpu((weights >> shift & 15).int(), 1)
        except RuntimeError as error:
            refuse(f"hold {name!r} in a shape that torch can pack", f"{[rows, columns]} ({error})")
        places |= _halves(digits).long() << shift
    seen = torch.zeros(rows * columns, dtype=torch.bool)
    seen[places] = True
    if not bool(seen.all()):
        refuse(f"hold {name!r} as torch packs it", "a packing that keeps other places")
    return places


def _halves(packed: Tensor) -> Tensor:
    """The halves of bytes, low half first."""
    return torch.stack([packed.flatten() & 15, packed.flatten() >> 4], 1).flatten()


def _codes(name: str, coded: Tensor, entries: int) -> Tensor:
    coded = coded.detach().as_subclass(Tensor).cpu()
    if coded.is_floating_point() or (coded.numel() and (int(coded.min()) < 0 or int(coded.max()) >= entries)):
        refuse(f"hold codes of {name!r} below {entries}", "others")
    return coded.to(torch.uint8)


def _weight(
    name: str, codes: Tensor, codebook: Tensor, grid: list[int], block: list[int], dtype: torch.dtype
) -> QuantizedWeight:
    """The weight whose blocks of this size have the rows of codebook as tables, in the order of the grid."""
    if not bool(codebook.isfinite().all()):
        refuse(f"hold finite scales of {name!r}", "NaN or infinity")
    tables = codebook.reshape(*grid, codebook.shape[-1])
    # The dimension from which on blocks are whole; what comes before it is spread to one table for each place.
    whole = len(grid)
    while whole and grid[whole - 1] == 1:
        whole -= 1
    run = prod(codes.shape[whole:]) * (block[whole - 1] if whole else 1)
    if any(size > 1 for size in grid[: whole - 1]):
        for dimension in range(whole - 1):
            tables = tables.repeat_interleave(block[dimension], dimension)
    return QuantizedWeight(codes.contiguous(), tables.reshape(-1, codebook.shape[-1]).contiguous(), max(1, run), dtype)


READERS: dict[str, Callable[[str, _Parts], QuantizedWeight]] = {
    "Int8Tensor": _affine,
    "IntxUnpackedToInt8Tensor": _affine,
    "CodebookQuantizedTensor": _codebook,
    "coreml": _coreml,
    "Int4OpaqueTensor": _opaque,
}
FILE_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
