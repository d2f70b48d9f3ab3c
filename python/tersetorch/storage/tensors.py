"""Any dense tensor as its smallest form, to the bit, and back.

Values are bit patterns here: a zero is a pattern of zeros, so that NaN payloads survive. -0.0 is a value like any
other, but in a weight that only enters sums, where it is the trace of a product with a mask: there it becomes 0.0,
which is equal and gives equal sums, or the positions would cost more than the values that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersetorch.formats.vector_codes import VectorCodes
from tersetorch.storage import affine, codebooks, integers, scaled, streams, vectors
from tersetorch.storage.entry import DTYPE_NAMES, REAL, SCALED, Entry
from tersetorch.storage.errors import refuse
from tersetorch.storage.streams import Array, Coding, Context, Stream

# What a stream costs beside its bytes: its checksum, and about this much of the header.
STREAM_BYTES = 12
# Values looked at first: a tensor that nobody shared is recognised without sorting all of it.
SAMPLE = 2 * streams.MAX_ENTRIES
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PATTERNS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Table = tuple[Array, Array]
"""Distinct bit patterns, rising, and how often each occurs."""


@dataclass(frozen=True)
class _Choice:
    nbytes: int
    build: Callable[[], tuple[Entry, list[Stream]]]


def encode_tensor(
    name: str,
    tensor: Tensor,
    trains: bool,
    summed: bool = False,
    sums: VectorCodes | None = None,
    in_context: bool = True,
) -> tuple[Entry, list[Stream]]:
    """The smallest form of a plain tensor of any dtype and shape.

    Args:
        name: of the tensor, for errors.
        tensor: to be stored.
        trains: whether it is no parameter that does not train.
        summed: its owners only add up products with it, so that -0.0 becomes 0.0 if it is a parameter of two dimensions
            or more.
        sums: codes and codebooks whose sums, rounded to its dtype, tensor is to the bit, where somebody knows them.
        in_context: coders with contexts are tried, too.

    Raises:
        ValueError: tensor is no plain strided tensor with data, or has a dtype that the format does not know.
    """
    check_plain(name, tensor)
    dtype = tensor.dtype
    order = _memory_order(tensor)
    real = torch.view_as_real(tensor.detach().resolve_conj()) if dtype in REAL else tensor.detach()
    bits = patterns(real.resolve_neg())
    if summed and isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1 and dtype.is_floating_point:
        bits = np.where(bits == bits.dtype.type(1 << (8 * bits.itemsize - 1)), bits.dtype.type(0), bits)
    shape = tuple(tensor.shape)
    common = _common_pattern(bits)
    plain = Entry(shape, dtype, "raw", bits.size, base=common, order=order, trains=trains)

    kept = bits != common
    values = bits[kept]
    table = count_patterns(values)
    rest = bits.size - values.size
    choices = [_dense_choice(replace(plain, base=0), bits, _with_pattern(table, common, rest), in_context)]
    is_matrix = len(shape) > 1 and (dtype.is_floating_point or dtype is torch.uint8) and bits.size > 0
    of_signs = is_matrix and dtype.is_floating_point and _is_of_signs(bits.reshape(shape[0], -1))
    if of_signs:
        choices.append(_sign_choice(replace(plain, form="signs", base=0), bits, in_context))
    if rest:
        choices += [
            _sparse_choice(plain, bits, kept, table, down_columns, in_context)
            for down_columns in (False, True)[: 1 + (len(shape) > 1 and dtype not in REAL)]
        ]
    if is_matrix:
        least = min(choice.nbytes for choice in choices)
        found = codebooks.candidates(bits.reshape(shape[0], -1), least, dtype.is_floating_point)
        with_tables = replace(plain, form="codebooks", base=0)
        choices += [_codebooks_choice(with_tables, *candidate, in_context) for candidate in found]
    if is_matrix and dtype in integers.DTYPES and not of_signs:
        distinct = None if table is None else table[0] if not rest else np.append(table[0], bits.dtype.type(common))
        choices += _quantized_choices(plain, bits.reshape(shape[0], -1), distinct, in_context)
    if is_matrix and dtype.is_floating_point:
        of_sums = None if sums is None else vectors.entry_of(plain, sums)
        if of_sums is not None and sums is not None and sums.codebooks.dtype == of_sums.dtype_of("codebook"):
            choices.append(_vectors_choice(of_sums, patterns(sums.codebooks), sums, in_context))
        least = min(choice.nbytes for choice in choices)
        for entry, parts in vectors.candidates(plain, bits, least):
            books = parts.codebooks.numpy().view(bits.dtype).reshape(-1)
            choices.append(_vectors_choice(entry, books, parts, in_context))
    entry, encoded = min(choices, key=lambda choice: choice.nbytes).build()
    return entry.with_streams(encoded), encoded


def decode_tensor(entry: Entry, data: list[bytes]) -> Tensor:
    """The tensor of an entry, from its streams.

    Raises:
        TerseFileError: a stream does not decode to what the entry says.
    """
    pattern: np.dtype[Any] = np.dtype(_PATTERNS[entry.real_dtype.itemsize])
    if entry.form == "signs":
        return _from_bits(entry, _sign_bits(entry, data, pattern))
    if entry.form == "codebooks":
        return _from_bits(entry, _codebooks_bits(entry, data, pattern))
    if entry.form in SCALED:
        return _from_bits(entry, _runs_bits(entry, data))
    if entry.form == "vectors":
        return _from_bits(entry, patterns(vectors.numbers(entry, vector_codes(entry, data)).to(entry.dtype)))
    positions = positions_of(entry, data) if entry.is_sparse else None
    values = values_of(entry, data, pattern, positions)
    if positions is None:
        flat = from_patterns(values, entry.real_dtype)
    else:
        flat = torch.empty(entry.numel, dtype=entry.real_dtype)
        _scatter(entry, values, positions, patterns(flat))
    if entry.dtype is torch.bool and entry.numel and int(patterns(flat).max()) > 1:
        refuse("hold 0 or 1 for bool", int(patterns(flat).max()))
    return _shaped(entry, flat)


def _scatter(entry: Entry, values: Array, positions: NDArray[np.int64], out: Array) -> None:
    """Fills out with the bit patterns of a sparse form, in C order."""
    if not entry.down_columns or not entry.numel:
        out.fill(entry.base)
        out[positions] = values
        return
    columns = np.full(entry.numel, entry.base, out.dtype)
    columns[positions] = values
    out.reshape(entry.shape[0], -1)[:] = columns.reshape(-1, entry.shape[0]).T


def _from_bits(entry: Entry, bits: Array) -> Tensor:
    """The tensor of an entry from its bit patterns, in C order."""
    return _shaped(entry, from_patterns(bits, entry.real_dtype))


def _shaped(entry: Entry, flat: Tensor) -> Tensor:
    """The tensor of an entry from its real numbers, in C order."""
    shape = entry.shape
    result = torch.view_as_complex(flat.reshape(*shape, 2)) if entry.dtype in REAL else flat.reshape(shape)
    if entry.order:
        laid_out = _laid_out(shape, entry.order, entry.dtype, "cpu")
        laid_out.copy_(result)
        return laid_out
    return result


def positions_of(entry: Entry, data: list[bytes]) -> NDArray[np.int64]:
    """The stored positions of a sparse form, in the order of its values."""
    spec = entry.streams[0]
    return streams.decode_positions(data[0], spec.coder, spec.width, entry.stored, entry.numel, entry.grid)


def codebook_and_codes(
    entry: Entry, data: list[bytes], dtype: np.dtype[Any], positions: NDArray[np.int64] | None = None
) -> tuple[Array, Array]:
    """Codebook and codes of a codebook form, of a sparse one with its positions."""
    at = [spec.role for spec in entry.streams].index("codebook")
    codebook_spec, code_spec = entry.streams[at : at + 2]
    codebook = streams.decode_values(data[at], codebook_spec.coder, dtype, entry.entries)
    context = context_of(entry, codebook, positions) if code_spec.coder == "contexts" else None
    return codebook, streams.decode_codes(data[at + 1], code_spec.coder, entry.entries, entry.stored, context)


def values_of(
    entry: Entry, data: list[bytes], dtype: np.dtype[Any], positions: NDArray[np.int64] | None = None
) -> Array:
    """The stored values of any form, in their order; of a sparse one with its positions."""
    if entry.form.endswith("codebook"):
        codebook, codes = codebook_and_codes(entry, data, dtype, positions)
        return codebook[codes] if len(codes) else codebook[:0]
    return streams.decode_values(data[entry.is_sparse], entry.streams[entry.is_sparse].coder, dtype, entry.stored)


def context_of(entry: Entry, codebook: Array, positions: NDArray[np.int64] | None) -> Context:
    """What coders in context know of codes; codebook holds bit patterns."""
    sign = codebook.dtype.type(1 << (8 * codebook.itemsize - 1))
    keys = codebook
    if entry.real_dtype.is_floating_point:  # sign and magnitude
        keys = np.where(codebook & sign, ~codebook, codebook | sign)
    elif entry.real_dtype.is_signed:
        keys = codebook ^ sign
    zero = sign if entry.real_dtype.is_floating_point or entry.real_dtype.is_signed else sign & ~sign
    return Context(entry.grid, positions, np.argsort(keys, kind="stable"), int(np.count_nonzero(keys < zero)))


def patterns(tensor: Tensor) -> Array:
    """The bit patterns of a real tensor, unsigned, flattened in C order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    size = flat.element_size()
    array: Array = flat.view(_INTEGERS[size]).numpy().view(_PATTERNS[size])
    return array


def from_patterns(bits: Array, dtype: torch.dtype) -> Tensor:
    """A new tensor, in memory of torch's own (aligned as kernels like it), with these bit patterns."""
    tensor = torch.empty(bits.size, dtype=dtype)
    tensor.view(_INTEGERS[dtype.itemsize]).numpy().view(bits.dtype)[:] = bits
    return tensor


def count_patterns(bits: Array) -> Table | None:
    """Distinct patterns and their counts; None for more than a codebook holds."""
    if bits.itemsize <= 2:
        counts = np.bincount(bits, minlength=1)
        distinct = np.flatnonzero(counts)
        return distinct.astype(bits.dtype), counts[distinct]
    if bits.size > SAMPLE and len(np.unique(bits[:SAMPLE])) > streams.MAX_ENTRIES:
        return None
    distinct, counts = np.unique(bits, return_counts=True)
    return (distinct, counts) if len(distinct) <= streams.MAX_ENTRIES else None


@dataclass(frozen=True)
class ValueCoding:
    """How values are written: the coder of the values or of the codebook, and that of the codes if there are any."""

    values: Coding
    codes: Coding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the streams, with what each of them costs beside."""
        return self.values.nbytes + STREAM_BYTES + (self.codes.nbytes + STREAM_BYTES if self.codes else 0)


def value_coding(
    values: Array, table: Table | None, entry: Entry | None = None, positions: NDArray[np.int64] | None = None
) -> ValueCoding:
    """The smallest form of values, a codebook or none; with an entry, codes are tried in their context, too."""
    plain = ValueCoding(streams.best_value_coding(values))
    if table is None:
        return plain
    distinct, counts = table
    context = None if entry is None else context_of(entry, distinct, positions)
    codes = streams.best_code_coding(counts, lambda: np.searchsorted(distinct, values), context)
    return min(ValueCoding(streams.best_value_coding(distinct), codes), plain, key=lambda coding: coding.nbytes)


def value_streams(values: Array, table: Table | None, coding: ValueCoding) -> tuple[int, list[Stream]]:
    """Entries of the codebook (0 for none), and the streams of values."""
    if coding.codes is None or table is None:
        return 0, [streams.value_stream("values", values, coding.values)]
    distinct = table[0]
    codes = np.searchsorted(distinct, values)
    return len(distinct), [
        streams.value_stream("codebook", distinct, coding.values),
        streams.encode_codes(codes, len(distinct), coding.codes),
    ]


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuses what has no bytes to store."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_quantized:
        kind = type(tensor).__name__ if tensor.layout == torch.strided else str(tensor.layout)
        raise ValueError(f"save: {name} must be a plain dense tensor, got {kind}; convert it first")
    if tensor.is_meta:
        raise ValueError(f"save: {name} must hold values, got a tensor on device meta; load or initialise it first")
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"save: {name} must have one of the dtypes {known}, got {tensor.dtype}; cast it first")


def _dense_choice(plain: Entry, bits: Array, table: Table | None, in_context: bool) -> _Choice:
    coding = value_coding(bits, table, plain if in_context else None)
    form = "raw" if coding.codes is None else "codebook"

    def build() -> tuple[Entry, list[Stream]]:
        entries, encoded = value_streams(bits, table, coding)
        return replace(plain, form=form, entries=entries), encoded

    return _Choice(coding.nbytes, build)


def _sparse_choice(
    plain: Entry, bits: Array, kept: NDArray[np.bool_], table: Table | None, down_columns: bool, in_context: bool
) -> _Choice:
    """Storing the patterns marked in kept, by rows or by columns."""
    if down_columns:
        bits, kept = (array.reshape(plain.shape[0], -1).T.ravel() for array in (bits, kept))
    positions = np.flatnonzero(kept)
    neighbours = plain if in_context and not down_columns else None
    position_coding = streams.best_position_coding(positions, bits.size, neighbours.grid if neighbours else None)
    coding = value_coding(bits[positions], table, neighbours, positions)
    nbytes = coding.nbytes + position_coding.nbytes + STREAM_BYTES * (2 if plain.base else 1)
    form = "sparse" if coding.codes is None else "sparse-codebook"

    def build() -> tuple[Entry, list[Stream]]:
        entries, encoded = value_streams(bits[positions], table, coding)
        encoded = [streams.encode_positions("positions", positions, bits.size, position_coding), *encoded]
        entry = replace(plain, form=form, stored=positions.size, entries=entries, down_columns=down_columns)
        return entry, encoded

    return _Choice(nbytes, build)


def _is_of_signs(rows: Array) -> bool:
    """Whether each row [rows, columns] of bit patterns of floats has one magnitude."""
    magnitudes = rows & _sign_bit(rows.dtype) - rows.dtype.type(1)
    return bool((magnitudes[0] == magnitudes[0, 0]).all() and (magnitudes == magnitudes[:, :1]).all())


def _sign_choice(plain: Entry, bits: Array, in_context: bool) -> _Choice:
    """Storing each row's magnitude and everyone's sign."""
    sign = _sign_bit(bits.dtype)
    scales = bits.reshape(plain.shape[0], -1)[:, 0] & sign - sign.dtype.type(1)
    codes = (bits & sign != 0).astype(np.uint8)
    value_coding = streams.best_value_coding(scales)
    counts = np.bincount(codes, minlength=2)
    context = _sign_context(plain, bits.dtype) if in_context else None
    code_coding = streams.best_code_coding(counts, lambda: codes, context)

    def build() -> tuple[Entry, list[Stream]]:
        encoded = streams.encode_codes(codes, 2, code_coding)
        return plain, [streams.value_stream("scales", scales, value_coding), replace(encoded, role="signs")]

    return _Choice(value_coding.nbytes + code_coding.nbytes + 2 * STREAM_BYTES, build)


def _sign_bits(entry: Entry, data: list[bytes], pattern: np.dtype[Any]) -> Array:
    """The bit patterns of a tensor that is stored as signs."""
    scale_spec, sign_spec = entry.streams
    scales = streams.decode_values(data[0], scale_spec.coder, pattern, entry.shape[0])
    if scales.size and int(scales.max()) >= int(_sign_bit(pattern)):
        refuse("hold magnitudes of rows that are not negative", int(scales.max()))
    codes = streams.decode_codes(data[1], sign_spec.coder, 2, entry.stored, _sign_context(entry, pattern))
    rows = codes.reshape(entry.shape[0], -1).astype(pattern)
    rows <<= pattern.type(8 * pattern.itemsize - 1)
    rows |= scales[:, None]
    return rows.reshape(-1)


def vector_codes(entry: Entry, data: list[bytes]) -> VectorCodes:
    """Codes and codebooks of a tensor that is stored as sub-vectors."""
    tables, codes = _tables_and_codes(entry, data, lambda tables: vectors.context(entry))
    return vectors.codes_of(entry, from_patterns(tables, entry.dtype_of("codebook")), codes)


def _vectors_choice(entry: Entry, books: Array, found: VectorCodes, in_context: bool) -> _Choice:
    """Storing sub-vectors, and a code for each term and segment of a row."""
    codes = found.codes.cpu().contiguous().numpy().reshape(-1)
    return _tables_choice(entry, books, codes, vectors.context(entry) if in_context else None)


def _codebooks_choice(plain: Entry, block: int, tables: Array, codes: Array, in_context: bool) -> _Choice:
    """Storing a table for each row or block of columns, and everyone's code."""
    entry = replace(plain, block=block, entries=tables.shape[1])
    return _tables_choice(entry, tables.reshape(-1), codes, codebooks.context(entry, tables) if in_context else None)


def _codebooks_bits(entry: Entry, data: list[bytes], pattern: np.dtype[Any]) -> Array:
    """The bit patterns of a tensor that is stored with many tables."""
    tables, codes = _tables_and_codes(
        entry, data, lambda tables: codebooks.context(entry, tables.reshape(-1, entry.entries))
    )
    return codebooks.numbers(entry, tables.reshape(-1, entry.entries), codes)


def _tables_choice(entry: Entry, tables: Array, codes: Array, context: Context | None) -> _Choice:
    value_coding = streams.best_value_coding(tables)
    counts = np.bincount(codes, minlength=entry.entries)
    code_coding = streams.best_code_coding(counts, lambda: codes, context)

    def build() -> tuple[Entry, list[Stream]]:
        return entry, [
            streams.value_stream("codebook", tables, value_coding),
            streams.encode_codes(codes, entry.entries, code_coding),
        ]

    return _Choice(value_coding.nbytes + code_coding.nbytes + 2 * STREAM_BYTES, build)


def _tables_and_codes(entry: Entry, data: list[bytes], context_of: Callable[[Array], Context]) -> tuple[Array, Array]:
    table_spec, code_spec = entry.streams
    pattern: np.dtype[Any] = np.dtype(_PATTERNS[entry.dtype_of("codebook").itemsize])
    tables = streams.decode_values(data[0], table_spec.coder, pattern, entry.count("codebook"))
    return tables, streams.decode_codes(data[1], code_spec.coder, entry.entries, entry.stored, context_of(tables))


def _quantized_choices(plain: Entry, matrix: Array, distinct: Array | None, in_context: bool) -> list[_Choice]:
    """Storing what a quantised weight was made of, if it was one; distinct holds its patterns if they are few."""
    of_integers = integers.find(matrix, plain.dtype, distinct)
    if of_integers is not None:
        least = int(of_integers.integers.min())
        codes = (of_integers.integers - least).astype(np.uint16)
        entries = int(codes.max()) + 1
        entry = replace(plain, form="integers", base=0, block=of_integers.run, entries=entries)
        entry = replace(entry, least=least, factor=of_integers.factor)
        return [_runs_choice(entry, {"scales": of_integers.scales}, codes, integers.context(entry), in_context)]
    of_table = scaled.find(matrix, plain.dtype)
    if of_table is not None:
        entry = replace(plain, form="scaled", base=0, block=of_table.run, entries=len(of_table.table))
        values = {"codebook": of_table.table, "scales": of_table.scales}
        return [_runs_choice(entry, values, of_table.codes, scaled.context(entry, of_table.table), in_context)]
    sums = affine.find(matrix) if plain.dtype is torch.float32 else None
    if sums is None:
        return []
    entry = replace(plain, form="affine", base=0, block=sums.run, entries=int(sums.codes.max()) + 1)
    values = {"scales": sums.scales, "offsets": sums.offsets}
    return [_runs_choice(entry, values, sums.codes, affine.context(entry), in_context)]


def _runs_choice(entry: Entry, values: dict[str, Array], codes: Array, context: Context, in_context: bool) -> _Choice:
    """Storing values by their roles, and everyone's code."""
    value_codings = [streams.best_value_coding(each) for each in values.values()]
    counts = np.bincount(codes, minlength=entry.entries)
    code_coding = streams.best_code_coding(counts, lambda: codes, context if in_context else None)

    def build() -> tuple[Entry, list[Stream]]:
        parts = zip(values.items(), value_codings, strict=True)
        encoded = [streams.value_stream(role, each, coding) for (role, each), coding in parts]
        return entry, [*encoded, streams.encode_codes(codes, entry.entries, code_coding)]

    codings = [*value_codings, code_coding]
    return _Choice(sum(coding.nbytes for coding in codings) + STREAM_BYTES * len(codings), build)


def _runs_bits(entry: Entry, data: list[bytes]) -> Array:
    """The bit patterns of a tensor that is stored with a scale for each run."""
    *value_specs, code_spec = entry.streams
    values = [
        streams.decode_values(stream, spec.coder, np.dtype(np.uint32), entry.count(spec.role))
        for stream, spec in zip(data, value_specs, strict=False)
    ]
    form = {"integers": integers, "affine": affine, "scaled": scaled}[entry.form]
    context = scaled.context(entry, values[0]) if form is scaled else form.context(entry)
    codes = streams.decode_codes(data[-1], code_spec.coder, entry.entries, entry.stored, context)
    bits: Array = form.numbers(entry, *values, codes)
    return bits


def _sign_context(entry: Entry, pattern: np.dtype[Any]) -> Context:
    return context_of(entry, np.array([0, _sign_bit(pattern)], pattern), None)


def _sign_bit(pattern: np.dtype[Any]) -> Any:
    return pattern.type(1 << (8 * pattern.itemsize - 1))


def _common_pattern(bits: Array) -> int:
    """The pattern that a sparse form leaves out: the one of more than half of the values if there is one, or zero."""
    if not bits.size:
        return 0
    half = bits.size // 2
    middle = np.partition(bits, half)[half]  # a majority is the median
    return int(middle) if np.count_nonzero(bits == middle) > half else 0


def _with_pattern(table: Table | None, pattern: int, count: int) -> Table | None:
    if table is None or not count:
        return table
    distinct, counts = table
    if len(distinct) == streams.MAX_ENTRIES:
        return None
    at = np.searchsorted(distinct, distinct.dtype.type(pattern))
    return np.insert(distinct, at, pattern), np.insert(counts, at, count)


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from outermost to innermost in memory, where that is not their own order and the tensor is dense.

    Kernels choose by strides (channels last, a transposed weight; those of dimensions of size 1 count too), and another
    kernel may round differently.
    """
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
    usual = _laid_out(tensor.shape, tuple(range(tensor.dim())), tensor.dtype, "meta").stride()
    if strides == usual or _laid_out(tensor.shape, order, tensor.dtype, "meta").stride() != strides:
        return None
    return order


def _laid_out(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """An uninitialised dense tensor whose dimensions lie in memory in this order, outermost first."""
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    return torch.empty([shape[dim] for dim in order], dtype=dtype, device=device).permute(inverse)
