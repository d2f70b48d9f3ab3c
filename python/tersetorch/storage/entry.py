"""What the header says of one tensor, read strictly.

    s  shape
    d  dtype
    f  form
    n  positions stored (sparse forms)
    k  entries of the codebook, or of each (codebook forms, vectors); codes, from 0 on (integers, affine, scaled)
    w  columns of a block that has a codebook (codebooks; left out where rows have them), or of a segment (vectors);
       weights, consecutive in C order, that share a scale (integers, affine, scaled)
    u  terms that a number is a sum of (vectors; 1 where it is left out)
    h  true: all segments share a codebook (vectors)
    i  the least integer, which is code 0 (integers; 0 where it is left out)
    m  bit pattern of a float32 number that products are multiplied by (integers; by none where it is left out)
    b  bit pattern of every position that is not stored (sparse forms; 0 where it is left out)
    t  true: positions run down the columns
    o  dimensions from outermost to innermost in memory
    g  false: a parameter that does not train
    c  true: the weight of a sparse layer, which is never dense
    v  kernel of a sparse convolution, whose weight is stored as a matrix
    x  streams: [coder, bytes] or [coder, bytes, width]

Forms and their streams (the codebook of sums is float32 where the tensor is narrower):

    raw               values
    codebook          codebook, codes
    sparse            positions, values
    sparse-codebook   positions, codebook, codes
    codebooks         codebook (of every row or block of columns, one after the other), codes
    vectors           codebook [terms, segments or 1, columns of a segment, entries], codes [rows, terms * segments]
    signs             scales (magnitudes, one for each row), signs (1 for a negative number)
    integers          scales (float32, one for each run of w weights), codes; a weight is
                      dtype(float32(float32((i + code) scale) m)), to nearest, ties to even
    affine            scales, offsets (one for each run of w weights), codes; a weight is
                      float32(float32(code scale) + offset)
    scaled            codebook (float32), scales (one for each run of w weights), codes; a weight is
                      dtype(float32(codebook[code] scale)), to nearest, ties to even
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from tersetorch.storage import fields
from tersetorch.storage.errors import refuse
from tersetorch.storage.streams import (
    CODE_CODERS,
    MAX_CONTEXT_BITS,
    MAX_CONTEXT_ENTRIES,
    MAX_ENTRIES,
    MAX_ITEMS_PER_BYTE,
    MAX_NUMBERS,
    POSITION_CODERS,
    SUBBIT_CODERS,
    VALUE_CODERS,
    Grid,
    Stream,
    fits_contexts,
)

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4": torch.float8_e4m3fn,
    "f8e5": torch.float8_e5m2,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Complex tensors are stored as their real view, with a last dimension of 2.
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

FORMS = {
    "raw": ("values",),
    "codebook": ("codebook", "codes"),
    "codebooks": ("codebook", "codes"),
    "vectors": ("codebook", "codes"),
    "sparse": ("positions", "values"),
    "sparse-codebook": ("positions", "codebook", "codes"),
    "signs": ("scales", "signs"),
    "integers": ("scales", "codes"),
    "affine": ("scales", "offsets", "codes"),
    "scaled": ("codebook", "scales", "codes"),
}
FIELDS = "sdfnkwuhimbtogcvx"
# Forms that name how many codes there are.
CODED = ("codebook", "codebooks", "vectors", "sparse-codebook", "integers", "affine", "scaled")
# Forms of runs of weights that have a scale each.
SCALED = ("integers", "affine", "scaled")
MAX_INTEGER = 255
ROLE_CODERS = {
    "values": VALUE_CODERS,
    "codebook": VALUE_CODERS,
    "codes": CODE_CODERS,
    "positions": POSITION_CODERS,
    "scales": VALUE_CODERS,
    "offsets": VALUE_CODERS,
    "signs": CODE_CODERS[:-1],
}
MAX_GAP_WIDTH = 15


@dataclass(frozen=True)
class StreamSpec:
    """One stream of a tensor: what it holds, its coder, the coder's width (0 for none) and its bytes."""

    role: str
    coder: str
    width: int
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """How one tensor is stored; the module's docstring names the fields."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str
    stored: int
    entries: int = 0
    block: int = 0
    least: int = 0
    factor: int = 0
    stages: int = 1
    one_book: bool = False
    base: int = 0
    down_columns: bool = False
    order: tuple[int, ...] | None = None
    trains: bool = True
    compressed: bool = False
    kernel: tuple[int, ...] = ()
    streams: tuple[StreamSpec, ...] = ()

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of the stored numbers."""
        return REAL.get(self.dtype, self.dtype)

    @property
    def numel(self) -> int:
        """Stored numbers of the dense tensor (two for a complex one)."""
        return math.prod(self.shape) * (2 if self.dtype in REAL else 1)

    @property
    def grid(self) -> Grid:
        """The tensor, or the codes of sub-vectors, as coders in context see it: a tensor without columns is one row."""
        if self.form == "vectors":
            return Grid(self.stored, self.stages * self.segments, 1, 1)
        shape = (*self.shape, 2) if self.dtype in REAL else self.shape
        rows = shape[0] if len(shape) > 1 else 1
        kernel = math.prod(self.kernel or shape[2:])
        width = (self.kernel or shape[2:] or (1,))[-1]
        return Grid(self.numel, self.numel // max(1, rows * kernel), kernel, width)

    @property
    def is_sparse(self) -> bool:
        """Whether positions are stored."""
        return self.form.startswith("sparse")

    @property
    def segments(self) -> int:
        """Parts of a row that have a code each, or for each term: a block is one."""
        return -(-(self.numel // self.shape[0]) // self.block) if self.block and self.numel else 1

    @property
    def codebooks(self) -> int:
        """Codebooks that are stored."""
        if self.form == "vectors":
            return self.stages * (1 if self.one_book else self.segments)
        if self.form != "codebooks":
            return int("codebook" in FORMS[self.form])
        return self.segments if self.block else self.shape[0]

    def count(self, role: str) -> int:
        """Items in a stream of this role."""
        if role in ("scales", "offsets") and self.form in SCALED:
            return self.numel // self.block
        width = self.block if self.form == "vectors" else 1
        return {"codebook": self.entries * self.codebooks * width, "scales": self.shape[0] if self.shape else 0}.get(
            role, self.stored
        )

    def dtype_of(self, role: str) -> torch.dtype:
        """The dtype of the numbers in a stream of values of this role."""
        if role != "codes" and self.form in SCALED:
            return torch.float32
        sums = role == "codebook" and self.stages > 1
        return torch.promote_types(self.real_dtype, torch.float32) if sums else self.real_dtype

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the tensors that reading it makes."""
        size = self.real_dtype.itemsize
        if not self.compressed:
            return self.numel * size
        kept = self.stored * (5 if self.form == "sparse-codebook" else 4 + size)
        return 4 * (self.shape[0] + 1) + kept + 4 * self.entries

    @property
    def places_read(self) -> int:
        """Places that a coder of positions looks at one by one, and steps over gaps that take no bits."""
        if not self.is_sparse:
            return 0
        first = self.streams[0]
        if first.coder == "gaps-rans":
            return self.numel // ((1 << (first.width or 1)) - 1)
        return self.numel if first.coder == "contexts" else 0

    def with_streams(self, streams: list[Stream]) -> Entry:
        """This entry with what the header has to know of its streams."""
        specs = tuple(StreamSpec(stream.role, stream.coder, stream.width, len(stream.data)) for stream in streams)
        return replace(self, streams=specs)

    def to_json(self) -> dict[str, Any]:
        """The header's object; fields that have their usual value are left out."""
        data: dict[str, Any] = {"s": list(self.shape), "d": DTYPE_NAMES[self.dtype], "f": self.form}
        if self.is_sparse:
            data["n"] = self.stored
        if self.form in CODED:
            data["k"] = self.entries
        if self.block:
            data["w"] = self.block
        if self.least:
            data["i"] = self.least
        if self.factor:
            data["m"] = self.factor
        if self.stages > 1:
            data["u"] = self.stages
        if self.one_book:
            data["h"] = True
        if self.base:
            data["b"] = self.base
        if self.down_columns:
            data["t"] = True
        if self.order:
            data["o"] = list(self.order)
        if not self.trains:
            data["g"] = False
        if self.compressed:
            data["c"] = True
        if self.kernel:
            data["v"] = list(self.kernel)
        data["x"] = [[spec.coder, spec.nbytes] + [spec.width] * (spec.width > 0) for spec in self.streams]
        return data

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Reads and checks the header's object.

        Raises:
            TerseFileError: a field is unknown, missing or out of range, or the fields contradict each other.
        """
        data = fields.check_keys(data, "a tensor", set(FIELDS))
        sizes = fields.items(data.get("s"), "a shape")
        shape = tuple(fields.integer(size, "a dimension", 0, fields.MAX_SIZE) for size in sizes[:65])
        if len(sizes) > 64 or math.prod(shape) >= fields.MAX_SIZE // 2:
            refuse("have tensors of at most 64 dimensions and fewer than 2**47 numbers", f"shape {list(shape)[:8]}")
        dtype = DTYPES[fields.text(data.get("d"), "a dtype", tuple(DTYPES))]
        form = fields.text(data.get("f"), "a form", tuple(FORMS))
        entry = cls(shape, dtype, form, 0)
        numel = entry.numel
        stored = fields.integer(data.get("n"), "a count", 0, numel) if entry.is_sparse else numel
        entries = fields.integer(data.get("k"), "codebook entries", 0, MAX_ENTRIES) if form in CODED else 0
        entry = replace(
            entry,
            stored=stored,
            entries=entries,
            block=fields.integer(data["w"], "columns of a block", 1, fields.MAX_SIZE) if "w" in data else 0,
            least=fields.integer(data.get("i", 0), "the least integer", -MAX_INTEGER, MAX_INTEGER),
            factor=fields.integer(data.get("m", 0), "a bit pattern", 0, (1 << 32) - 1),
            stages=fields.integer(data.get("u", 1), "terms", 1, MAX_ENTRIES),
            one_book=fields.flag(data.get("h", False), "h"),
            base=fields.integer(data.get("b", 0), "a bit pattern", 0, (1 << 8 * entry.real_dtype.itemsize) - 1),
            down_columns=fields.flag(data.get("t", False), "t"),
            order=_order(data["o"], len(shape)) if "o" in data else None,
            trains=fields.flag(data.get("g", True), "g"),
            compressed=fields.flag(data.get("c", False), "c"),
            kernel=_kernel(data["v"], shape) if "v" in data else (),
        )
        if form == "vectors":
            entry = entry._with_checked_vectors()
        roles = FORMS[form]
        specs = fields.items(data.get("x"), "streams")
        if len(specs) != len(roles):
            refuse(f"have {len(roles)} streams for a tensor stored as {form}", len(specs))
        entry = replace(entry, streams=tuple(map(_stream_spec, roles, specs)))
        entry._check(data)
        return entry

    def _check(self, data: dict[str, Any]) -> None:
        """What the fields owe each other. A count is compared with its stream before anything is allocated for it."""
        vectors = self.form == "vectors"
        if (
            (data.keys() & set("nbt") and not self.is_sparse)
            or ("k" in data and self.form not in CODED)
            or (data.keys() & set("uh") and not vectors)
        ):
            refuse(f"have only the fields of a tensor stored as {self.form}", sorted(data))
        if self.form == "codebooks":
            self._check_codebooks()
        elif self.form in SCALED:
            self._check_runs()
        elif self.block and not vectors:
            refuse("have blocks of columns with codebooks of their own only", self.form)
        if data.keys() & set("im") and self.form != "integers":
            refuse("have a least integer and a factor with integers only", self.form)
        if self.form == "signs" and (len(self.shape) < 2 or not self.dtype.is_floating_point):
            refuse("keep floating-point rows as signs", f"{self.dtype} {list(self.shape)}")
        if self.down_columns and len(self.shape) < 2:
            refuse("run down the columns of tensors with two dimensions or more", len(self.shape))
        layer = self.is_sparse and len(self.shape) == 2 and self.dtype in (torch.float32, torch.bfloat16)
        if self.compressed and (not layer or self.order or self.base):
            refuse("keep a layer's weight as a sparse float32 or bfloat16 matrix", f"{self.form} {list(self.shape)}")
        if self.kernel and not self.compressed:
            refuse("name the kernel of a sparse layer's weight only", list(self.kernel))
        for spec in self.streams:
            if spec.coder == "contexts":
                few = 0 < self.numel <= MAX_CONTEXT_BITS
                if spec.role in ("codes", "signs"):
                    few = fits_contexts(2 if spec.role == "signs" else self.entries, self.stored, self.grid)
                if not few or self.down_columns:
                    refuse("code in context a tensor by rows, of few enough weights", f"{spec.role} of {self.numel}")
            if spec.coder == "raw":
                count = self.count(spec.role)
                if spec.nbytes != count * self.dtype_of(spec.role).itemsize:
                    refuse(f"hold {count} items in a stream of {spec.role}", f"{spec.nbytes} bytes")
            elif spec.coder == "constant":
                if spec.nbytes or self.entries != 1:
                    refuse("have one entry and no bytes for constant codes", f"{self.entries}, {spec.nbytes} bytes")
            elif spec.coder == "all":
                if spec.nbytes or self.stored != self.numel:
                    refuse("store every position and no bytes for them", f"{self.stored}, {spec.nbytes} bytes")
            elif spec.coder == "numbers" and self.count(spec.role) > MAX_NUMBERS:
                refuse(f"hold at most {MAX_NUMBERS} values in a stream of numbers", self.count(spec.role))
            elif spec.role in ("codebook", "scales", "offsets"):
                if self.count(spec.role) > spec.nbytes * MAX_ITEMS_PER_BYTE:
                    refuse(f"hold {self.count(spec.role)} items in a stream of {spec.role}", f"{spec.nbytes} bytes")
            elif self.stored > spec.nbytes * (MAX_ITEMS_PER_BYTE if spec.coder in SUBBIT_CODERS else 8):
                refuse(f"hold {self.stored} items in a stream of {spec.role}", f"{spec.nbytes} bytes")

    def _check_codebooks(self) -> None:
        """Codebooks are those of a matrix's rows or blocks, and hold no more numbers than it."""
        known = self.dtype.is_floating_point or self.dtype is torch.uint8
        if len(self.shape) < 2 or not self.numel or not known:
            refuse("keep a floating-point or uint8 matrix with codebooks", f"{self.dtype} {list(self.shape)[:8]}")
        columns = self.numel // self.shape[0]
        if self.block >= max(2, columns):
            refuse(f"have blocks of fewer than {columns} columns", self.block)
        if not 1 <= self.entries <= MAX_CONTEXT_ENTRIES or self.count("codebook") > self.numel:
            refuse(f"have codebooks of at most {self.numel} numbers, {MAX_CONTEXT_ENTRIES} each", self.entries)

    def _check_runs(self) -> None:
        """Integers are those of a matrix, in whole runs; the factor is a positive number."""
        known = (torch.float32, torch.bfloat16, torch.float16)[: 1 if self.form == "affine" else None]
        if len(self.shape) < 2 or not self.numel or self.dtype not in known:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
            refuse(f"keep a matrix of {names} as {self.form}", f"{self.dtype} {list(self.shape)[:8]}")
        if not self.block or self.numel % self.block:
            refuse("have runs that divide the weights", self.block)
        if self.form == "scaled" and self.entries > min(MAX_CONTEXT_ENTRIES, self.numel):
            refuse(f"have a codebook of at most {min(MAX_CONTEXT_ENTRIES, self.numel)} numbers", self.entries)
        if not 1 <= self.entries <= MAX_INTEGER + 1 - self.least:
            refuse(f"have integers of at most {MAX_INTEGER}", f"{self.entries} from {self.least} on")
        if (self.factor >> 23 in (0, 255) and self.factor) or self.factor >> 31:
            refuse("have a normal, positive number as a factor", f"pattern {self.factor:#x}")

    def _with_checked_vectors(self) -> Entry:
        """The entry with its number of codes; of these and of numbers in codebooks the tensor has at least as many."""
        if len(self.shape) < 2 or not self.numel or not self.dtype.is_floating_point:
            refuse(
                "share sub-vectors among the rows of a floating-point matrix", f"{self.dtype} {list(self.shape)[:8]}"
            )
        columns = self.numel // self.shape[0]
        if not 1 <= self.block <= columns:
            refuse(f"have segments of 1 to {columns} columns", self.block)
        if self.one_book and self.segments == 1:
            refuse("share a codebook among several segments", self.segments)
        stored = self.shape[0] * self.stages * self.segments
        if stored > self.numel:
            refuse(f"have at most {self.numel} codes of sub-vectors", stored)
        if not 1 <= self.entries <= MAX_CONTEXT_ENTRIES or self.count("codebook") > self.numel:
            refuse(f"have codebooks of at most {self.numel} numbers, {MAX_CONTEXT_ENTRIES} entries each", self.entries)
        return replace(self, stored=stored)


def _order(value: Any, dimensions: int) -> tuple[int, ...]:
    order = tuple(fields.integer(item, "a dimension", 0, dimensions - 1) for item in fields.items(value, "o")[:65])
    if sorted(order) != list(range(dimensions)):
        refuse(f"have an order of {dimensions} dimensions", list(order)[:8])
    return order


def _kernel(value: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = fields.items(value, "a kernel")[:3]
    kernel = tuple(fields.integer(size, "a kernel's size", 1, fields.MAX_SIZE) for size in sizes)
    if len(shape) != 2 or not 1 <= len(kernel) <= 2 or math.prod(kernel) >= fields.MAX_SIZE:
        refuse("name one or two sizes of a kernel for a matrix", list(kernel))
    if shape[1] % math.prod(kernel):
        refuse(f"have kernels that divide {shape[1]} columns", list(kernel))
    return kernel


def _stream_spec(role: str, data: Any) -> StreamSpec:
    parts = fields.items(data, "a stream")
    if not 2 <= len(parts) <= 3:
        refuse("have [coder, bytes] or [coder, bytes, width] as a stream", f"{len(parts)} items")
    coder = fields.text(parts[0], f"the coder of {role}", ROLE_CODERS[role])
    if (len(parts) == 3) != coder.startswith("gaps"):
        refuse("give a width to gaps and to nothing else", f"{len(parts)} items for {coder}")
    width = fields.integer(parts[2], "a width", 1, MAX_GAP_WIDTH) if len(parts) == 3 else 0
    return StreamSpec(role, coder, width, fields.integer(parts[1], "bytes", 0, fields.MAX_SIZE))
