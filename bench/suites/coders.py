"""The file's coders of codes: bytes they write and codes they pass a second, beside general ones, on one thread."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersetorch import _native

from ..implementations import LeftOut
from ..options import Options
from ..rates import Rates
from ..timing import interleave

# Seconds for each coder in each direction.
SECONDS, QUICK_SECONDS = 0.4, 0.1
SIZE, QUICK_SIZE = 1 << 20, 1 << 16
SMALL_SIZE = 1 << 14
BITS = (4, 5, 8)
# Shares of codes: of normal numbers in steps of equal width, from -4 to 4 standard deviations, as linear initialisation
# leaves them; of the same from -1 to 1, nearly uniform; of the zeros before each of a tenth of all positions.
KINDS = ("", "near uniform", "gaps")
Codes = NDArray[np.uint16]


@dataclass(frozen=True)
class Group:
    """Codes of one of KINDS."""

    bits: int
    size: int = SIZE
    kind: str = ""

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.size} codes of {self.bits} bits" + (self.kind and f", {self.kind}")

    def codes(self) -> Codes:
        """The same at every call."""
        last = 1 if self.kind == "near uniform" else 4
        steps = np.linspace(-last, last, (1 << self.bits) + 1)
        chances = np.diff([math.erf(step / math.sqrt(2)) for step in steps])
        if self.kind == "gaps":
            chances = 0.9 ** np.arange(1 << self.bits)
        drawn = np.random.default_rng(0).choice(1 << self.bits, self.size, p=chances / chances.sum())
        return drawn.astype(np.uint16)


@dataclass(frozen=True)
class Coder:
    """A coder of codes below entries."""

    name: str
    family: str
    encode: Callable[[Codes, int], bytes]
    decode: Callable[[bytes, int, int], NDArray[Any]]


def _general(name: str, compress: Callable[[bytes], bytes], expand: Callable[[bytes], bytes]) -> Coder:
    return Coder(
        name,
        "coded",
        lambda codes, entries: compress(codes.astype(np.uint8).tobytes()),
        lambda data, entries, count: np.frombuffer(expand(data), np.uint8),
    )


def _matrix(count: int, entries: int) -> tuple[NDArray[np.int64], int, int, int, int, int, int]:
    """Where the codes stand: a matrix of 256 columns, all of which is stored."""
    return np.zeros(0, np.int64), count, 256, 1, 1, entries.bit_length() - 1, entries // 2


CODERS = (
    Coder(
        "tersetorch packed",
        "ours",
        lambda codes, entries: _native.write_bits(codes.astype(np.uint32), entries.bit_length() - 1),
        lambda data, entries, count: _native.read_bits(data, entries.bit_length() - 1, count),
    ),
    Coder("tersetorch huffman", "ours", _native.huffman_encode, _native.huffman_decode),
    Coder("tersetorch rans", "ours", _native.rans_encode, _native.rans_decode),
    Coder(
        "tersetorch contexts",
        "ours",
        lambda codes, entries: _native.contexts_encode_symbols(codes.astype(np.uint8), *_matrix(len(codes), entries)),
        lambda data, entries, count: _native.contexts_decode_symbols(data, count, *_matrix(count, entries)),
    ),
    _general("zlib, level 9", lambda data: zlib.compress(data, 9), zlib.decompress),
    _general("lzma", lzma.compress, lzma.decompress),
)


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for: none with several threads, which no coder uses."""
    size = QUICK_SIZE if options.quick else SIZE
    asked = [Group(bits, size, kind) for kind in KINDS for bits in BITS] + [Group(4, SMALL_SIZE)]
    return [group for group in asked if options.threads == 1 and options.takes_case(group.label)]


class Coders:
    """Measures groups. What was encoded is decoded and compared before anything is timed.

    A record's bytes are those of its stream. Its operations are none; limit_ms is the time that reading stream and
    codes, a byte each, takes.
    """

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        codes, entries = group.codes(), 1 << group.bits
        records, left_out = [], []
        for direction in ("encode", "decode"):
            calls: dict[str, Callable[[], object]] = {}
            streams: dict[str, bytes] = {}
            for coder in CODERS:
                if not self._options.takes(coder.name, coder.family == "ours"):
                    continue
                streams[coder.name] = data = coder.encode(codes, entries)
                if not np.array_equal(coder.decode(data, entries, len(codes)), codes):
                    left_out.append(LeftOut(coder.name, group.label, "it decodes something else", wrong=True))
                    continue
                calls[coder.name] = (
                    partial(coder.encode, codes, entries)
                    if direction == "encode"
                    else partial(coder.decode, data, entries, len(codes))
                )
            seconds = QUICK_SECONDS if self._options.quick else SECONDS
            times = interleave(calls, seconds * len(calls)) if calls else {}
            for coder in CODERS:
                if coder.name in times:
                    records.append(self._record(group, direction, coder, len(streams[coder.name]), times[coder.name]))
        return records, left_out

    def _record(
        self, group: Group, direction: str, coder: Coder, nbytes: int, times: dict[str, float]
    ) -> dict[str, Any]:
        limit_ms, bound = self._rates.limit_ms(0, nbytes + group.size, "float32", _native.cpu_active(), False)
        return {
            "suite": "coders",
            "case": group.label,
            "kind": "codes",
            "shape": [group.size],
            "density": 1.0,
            "pattern": direction,
            "batch": 1,
            "active": 1.0,
            "cache": "warm",
            "threads": 1,
            "isa": _native.cpu_active(),
            "implementation": coder.name,
            "family": coder.family,
            "mode": "int8",
            "weight_bytes": nbytes,
            "bytes": nbytes,
            "ops": 0,
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            **times,
        }
