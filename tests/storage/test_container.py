import io
import json
import struct
import zlib

import numpy as np
import pytest
import safetensors.numpy
import torch

from tersetorch.storage import TerseFileError, container

HEADER = {"m": {}, "t": []}
STREAMS = [b"", b"one", b"\0\1\2\3"]


def repack(text, data=b"", head=None):
    """A file around this header text and these data, right in everything else."""
    deflated = zlib.compress(text, 9)[2:-4]
    packed = struct.pack("<I", zlib.crc32(deflated)) + deflated
    return (head or container._head)(len(data), len(packed)) + data + packed


def test_pack_and_unpack_are_inverse():
    raw = container.pack(HEADER, STREAMS)
    header, data, container_bytes, header_bytes = container.unpack(raw)
    assert header == HEADER
    assert container.split(data, [0, 3, 4]) == STREAMS
    assert container_bytes + header_bytes + len(data) == len(raw)
    assert raw == container.pack(HEADER, STREAMS)


def test_the_file_is_what_the_safetensors_library_writes(tmp_path):
    raw = container.pack(HEADER, STREAMS)
    tensors = safetensors.numpy.load(raw)
    assert set(tensors) == {"data", "header"}
    assert all(tensor.dtype == np.uint8 for tensor in tensors.values())
    assert safetensors.numpy.save(tensors, {"terse": "2"}) == raw


def test_every_truncation_is_refused():
    raw = container.pack(HEADER, STREAMS)
    for end in range(len(raw)):
        with pytest.raises(TerseFileError):
            container.unpack(raw[:end])


def test_a_file_that_holds_less_than_its_size_is_refused():
    with pytest.raises(TerseFileError, match="be a terse file, got 3 bytes"):
        container.check_start(b"one", 4096)


def test_another_version_is_named():
    raw = container.pack(HEADER, STREAMS).replace(b'"terse":"2"', b'"terse":"3"')
    with pytest.raises(TerseFileError, match="have format version 1 or 2, got version 3; read it with the tersetorch"):
        container.unpack(raw)


def test_other_safetensors_files_are_refused():
    raw = safetensors.numpy.save({"weight": np.zeros(3, np.float32)})
    with pytest.raises(TerseFileError, match="must be a terse file, got another file"):
        container.unpack(raw)
    with pytest.raises(TerseFileError, match="be a terse file"):
        container.unpack(b"")


def test_an_archive_of_torch_is_named():
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(TerseFileError, match=r"must be a terse file, got an archive as torch\.save and torch\.export"):
        container.unpack(file.getvalue())


@pytest.mark.parametrize("length", [0, 1, 1025, 1 << 40, (1 << 64) - 1])
def test_the_leading_length_is_checked_before_anything_is_parsed(length):
    raw = struct.pack("<Q", length) + container.pack(HEADER, STREAMS)[8:]
    with pytest.raises(TerseFileError, match="length of a head of at most 1024 bytes"):
        container.unpack(raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head | {"more": head["data"]},
        lambda head: dict(reversed(head.items())),
        lambda head: head | {"__metadata__": {"terse": "2", "note": "x"}},
        lambda head: head | {"data": head["data"] | {"dtype": "I8"}},
        lambda head: head | {"data": head["data"] | {"data_offsets": [1, 1 + head["data"]["shape"][0]]}},
        lambda head: head | {"header": head["header"] | {"data_offsets": [0, head["header"]["shape"][0]]}},
    ],
)
def test_a_head_with_other_keys_gaps_or_overlaps_is_refused(change):
    def head(data_length, header_length):
        text = container._head(data_length, header_length)[8:]
        changed = json.dumps(change(json.loads(text)), separators=(",", ":")).encode()
        changed += b" " * (-len(changed) % 8)
        return struct.pack("<Q", len(changed)) + changed

    with pytest.raises(TerseFileError, match="have the head that its two tensors call for"):
        container.unpack(repack(b"{}", b"12345678", head))


def test_repeated_keys_are_refused():
    raw = container.pack(HEADER, STREAMS)
    doubled = raw[8 : 8 + raw[0] + 256 * raw[1]].rstrip().replace(b'"data":', b'"data":{},"data":')
    with pytest.raises(TerseFileError, match="JSON without repeated keys in the head"):
        container.unpack(struct.pack("<Q", len(doubled)) + doubled + bytes(200))
    with pytest.raises(TerseFileError, match="JSON without repeated keys in the header"):
        container.unpack(repack(b'{"m":1,"m":1}'))


@pytest.mark.parametrize(
    "text,match",
    [
        (b"[1]", "have an object as its header, got list"),
        (b"{", "hold JSON"),
        (b"\xff", "hold JSON"),
        (b"[" * 100_000, "hold JSON"),
        (b'{"m":' + b"9" * 5000 + b"}", "hold JSON"),
        (b" " * (container.HEADER_CAP + 1), "inflate to a header of at most"),
    ],
)
def test_damaged_headers_are_refused(text, match):
    with pytest.raises(TerseFileError, match=match):
        container.unpack(repack(text))


def test_bytes_after_the_deflated_header_are_refused():
    deflated = zlib.compress(b"{}", 9)[2:-4] + b"\0"
    packed = struct.pack("<I", zlib.crc32(deflated)) + deflated
    with pytest.raises(TerseFileError, match="one whole deflated header"):
        container.unpack(container._head(0, len(packed)) + packed)


def test_streams_must_fill_the_data_and_match_their_checksums():
    data = container.unpack(container.pack(HEADER, STREAMS))[1]
    with pytest.raises(TerseFileError, match="exactly the streams of its header, got 19 bytes for 18"):
        container.split(data, [0, 3, 3])
    with pytest.raises(TerseFileError, match="match the checksum of stream 0"):
        container.split(data, [1, 2, 4])


def test_a_header_that_no_reader_accepts_is_not_written():
    with pytest.raises(ValueError, match="description must fit"):
        container.pack({"m": "x" * container.HEADER_CAP}, [])
