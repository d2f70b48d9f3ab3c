"""The outer shape of a .terse file: a safetensors file of two byte tensors, checked to the last bit.

    8 bytes    length of the head, little endian
    head       JSON: metadata {"terse": version} and the places of two uint8 tensors, data before header
    data       every stream in the header's order, each followed by its CRC-32
    header     CRC-32 of the rest, then raw-deflated JSON

The head is a function of the version and of the two lengths. Reading rebuilds it and compares: a head with other keys,
another spelling, gaps, overlaps or bytes after the end is refused without being interpreted. CRC-32 finds every single
flipped bit in the rest.

What a reader allocates before it decodes a tensor follows from the file's size: the bytes twice, and the header's
objects, up to OBJECT_BYTES for each byte of JSON, of which there may be header_cap of the file's size. A header that
deflates better than that is written without deflating it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from tersetorch.storage.errors import refuse

# Files of version 1 lack coders of version 2 and are read as well.
VERSION = 2
VERSIONS = ("1", "2")
HEAD_CAP = 1024
START_CAP = 8 + HEAD_CAP
HEADER_CAP = 16 << 20
# JSON that a file may inflate its header to: so much, and so many times its own bytes. Those of save reach 10 times.
FREE_HEADER = 256 << 10
HEADER_RATIO = 16
# Most bytes of Python objects for a byte of JSON, what is made of them included.
OBJECT_BYTES = 64
CHECKSUM_BYTES = 4
_ALIGNMENT = 8


def pack(header: dict[str, Any], streams: Sequence[bytes]) -> bytes:
    """The bytes of a file; the same arguments give the same bytes.

    Raises:
        ValueError: the header is larger than a reader accepts.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > HEADER_CAP:
        raise ValueError(
            f"save: the model's description must fit {HEADER_CAP} bytes, got {len(text)}; save its parts apart"
        )
    data = b"".join(part for stream in streams for part in (stream, _checksum(stream)))
    raw = _around(data, _deflated(text, 9))
    return raw if len(text) <= header_cap(len(raw)) else _around(data, _deflated(text, 0))


def header_cap(file_bytes: int) -> int:
    """The most bytes of JSON that a file of this size may hold."""
    return min(HEADER_CAP, FREE_HEADER + HEADER_RATIO * file_bytes)


def unpack(raw: bytes) -> tuple[dict[str, Any], memoryview, int, int]:
    """The header, the data, and the bytes that the container and the header take.

    Raises:
        TerseFileError: raw is no whole .terse file of these versions.
    """
    start, data_length, header_length = check_start(raw[:START_CAP], len(raw))
    view = memoryview(raw)
    data = view[start : start + data_length]
    packed = view[start + data_length :]
    deflated = _checked(packed[CHECKSUM_BYTES:], bytes(packed[:CHECKSUM_BYTES]), "the header")
    return _inflate(deflated, header_cap(len(raw))), data, start, header_length


def check_start(raw: bytes, file_bytes: int) -> tuple[int, int, int]:
    """Lengths of head, data and header of a file of file_bytes that begins with raw, its first START_CAP bytes.

    Raises:
        TerseFileError: no whole .terse file of these versions begins so and has this size.
    """
    if min(len(raw), file_bytes) < 8:  # a file of /sys has fewer than it says
        refuse("be a terse file", f"{min(len(raw), file_bytes)} bytes")
    if raw.startswith(b"PK\x03\x04"):
        refuse("be a terse file", "an archive as torch.save and torch.export.save write it")
    (head_length,) = struct.unpack_from("<Q", raw)
    if not 2 <= head_length <= min(HEAD_CAP, file_bytes - 8):
        refuse(f"begin with the length of a head of at most {HEAD_CAP} bytes", f"{head_length} in {file_bytes} bytes")
    head = _parse(raw[8 : 8 + head_length], "the head")
    version, data_length, header_length = _places(head)
    if version not in VERSIONS:
        rule = f"have format version {' or '.join(VERSIONS)}"
        refuse(rule, f"version {version[:20]}", "read it with the tersetorch it came from")
    expected = _head(data_length, header_length, version)
    start = len(expected)
    if raw[:start] != expected or file_bytes != start + data_length + header_length:
        refuse("have the head that its two tensors call for, and end with them", f"{file_bytes} other bytes")
    return start, data_length, header_length


def split(data: memoryview, lengths: Sequence[int]) -> list[bytes]:
    """The streams of these lengths, their checksums verified.

    Raises:
        TerseFileError: the lengths do not fill data exactly, or a stream is damaged.
    """
    needed = sum(lengths) + CHECKSUM_BYTES * len(lengths)
    if needed != len(data):
        refuse("hold exactly the streams of its header", f"{len(data)} bytes for {needed}")
    streams = []
    start = 0
    for number, length in enumerate(lengths):
        end = start + length
        streams.append(_checked(data[start:end], bytes(data[end : end + CHECKSUM_BYTES]), f"stream {number}"))
        start = end + CHECKSUM_BYTES
    return streams


def version_of(raw: bytes) -> int:
    """The format version in the head of a file that check_start accepted."""
    (head_length,) = struct.unpack_from("<Q", raw)
    return int(_places(_parse(raw[8 : 8 + head_length], "the head"))[0])


def _around(data: bytes, deflated: bytes) -> bytes:
    packed = _checksum(deflated) + deflated
    return _head(len(data), len(packed)) + data + packed


def _deflated(text: bytes, level: int) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15, 9)
    return compressor.compress(text) + compressor.flush()


def _head(data_length: int, header_length: int, version: str = str(VERSION)) -> bytes:
    """What the safetensors library writes for these two tensors."""
    places = {
        "__metadata__": {"terse": version},
        "data": {"dtype": "U8", "shape": [data_length], "data_offsets": [0, data_length]},
        "header": {
            "dtype": "U8",
            "shape": [header_length],
            "data_offsets": [data_length, data_length + header_length],
        },
    }
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _places(head: Any) -> tuple[str, int, int]:
    """Version and lengths of data and header that a head claims."""
    try:
        version = head["__metadata__"]["terse"]
        (data_length,), (header_length,) = (head[name]["shape"] for name in ("data", "header"))
    except (KeyError, TypeError, ValueError):
        version = data_length = header_length = None
    lengths = (data_length, header_length)
    if not isinstance(version, str) or not all(type(length) is int and 0 <= length < 1 << 48 for length in lengths):
        refuse("be a terse file", "another file, or a damaged head", "pass a file that tt.save wrote")
    return version, data_length, header_length


def _checksum(data: bytes | memoryview) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def _checked(data: memoryview, checksum: bytes, name: str) -> bytes:
    if _checksum(data) != checksum:
        refuse(f"match the checksum of {name}", "other bytes")
    return bytes(data)


def _inflate(deflated: bytes, cap: int) -> dict[str, Any]:
    inflater = zlib.decompressobj(-15)
    try:
        text = inflater.decompress(deflated, cap + 1)
    except zlib.error as error:
        refuse("hold a deflated header", str(error))
    if len(text) > cap:
        refuse(f"inflate to a header of at most {cap} bytes", "a longer one")
    if not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        refuse("hold one whole deflated header", "a part, or more")
    header = _parse(text, "the header")
    if not isinstance(header, dict):
        refuse("have an object as its header", type(header).__name__)
    return header


def _parse(text: bytes, name: str) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        refuse(f"hold JSON without repeated keys in {name}", f"{type(error).__name__}: {str(error)[:80]}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a repeated key")
    return found
