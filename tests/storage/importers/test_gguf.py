import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch.storage import QuantizedWeight, read_quantized

# Kind, weights and bytes of a block, and where its half-precision numbers lie.
KINDS = {
    "Q4_0": (2, 32, 18, [0]),
    "Q4_1": (3, 32, 20, [0, 2]),
    "Q5_0": (6, 32, 22, [0]),
    "Q5_1": (7, 32, 24, [0, 2]),
    "Q8_0": (8, 32, 34, [0]),
    "Q4_K": (12, 256, 144, [0, 2]),
    "Q6_K": (14, 256, 210, [208]),
    "IQ4_NL": (20, 32, 18, [0]),
}
TABLE = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
F = np.float32


def half(block, at):
    return F(struct.unpack_from("<e", block, at)[0])


def weight_of(kind, block, j):
    """Weight j of a block, as the kinds' table says."""
    if kind in ("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1"):
        body = block[-16:]
        q = body[j] & 15 if j < 16 else body[j - 16] >> 4
        if kind in ("Q5_0", "Q5_1"):
            q |= (int.from_bytes(block[-20:-16], "little") >> j & 1) << 4
        d = half(block, 0)
        if kind in ("Q4_1", "Q5_1"):
            return d * F(q) + half(block, 2)
        return d * F(TABLE[q] if kind == "IQ4_NL" else q - (8 if kind == "Q4_0" else 16))
    if kind == "Q8_0":
        return half(block, 0) * F(struct.unpack_from("b", block, 2 + j)[0])
    if kind == "Q4_K":
        run, packed = j // 32, block[4:16]
        if run < 4:
            s, t = packed[run] & 63, packed[run + 4] & 63
        else:
            s = packed[run + 4] & 15 | packed[run - 4] >> 6 << 4
            t = packed[run + 4] >> 4 | packed[run] >> 6 << 4
        byte = block[16 + run // 2 * 32 + j % 32]
        q = byte >> 4 if run % 2 else byte & 15
        return half(block, 0) * F(s) * F(q) - half(block, 2) * F(t)
    part, rest = divmod(j, 128)
    quarter, place = divmod(rest, 32)
    byte = block[part * 64 + quarter % 2 * 32 + place]
    q = (byte & 15 if quarter < 2 else byte >> 4) | (block[128 + part * 32 + place] >> 2 * quarter & 3) << 4
    return half(block, 208) * F(struct.unpack_from("b", block, 192 + j // 16)[0]) * F(q - 32)


def blocks_of(kind, count, seed=0):
    _, _, size, halves = KINDS[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in halves:
        raw[:, at : at + 2] = rng.standard_normal((count, 1)).astype("<f2").view(np.uint8)
    return raw


def text(value):
    return struct.pack("<Q", len(value)) + value


def file_of(tensors, alignment=32, entries=(), head=b"GGUF", version=3):
    """tensors: name, kind, shape, bytes."""
    values = [text(b"general.alignment") + struct.pack("<II", 4, alignment), *entries]
    data, infos = b"", b""
    for name, kind, shape, raw in tensors:
        data += bytes(-len(data) % alignment)
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        infos += struct.pack("<IQ", kind, len(data))
        data += raw
    start = head + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join(values) + infos
    return start + bytes(-len(start) % alignment) + data


ENTRIES = (
    text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b""),
    text(b"scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
    text(b"name") + struct.pack("<I", 8) + text(b"x"),
    text(b"flag") + struct.pack("<IB", 7, 1),
)


@pytest.fixture
def file(tmp_path):
    def write(raw):
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        return path

    return write


@pytest.mark.parametrize("alignment", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(file, kind, alignment):
    number, weights, _, _ = KINDS[kind]
    raw = blocks_of(kind, 6)
    plain = np.arange(5, dtype="<f4")
    tensors = [(b"first", 0, (5,), plain.tobytes()), (b"w", number, (3, 2 * weights), raw.tobytes())]
    found = read_quantized(file(file_of(tensors, alignment, ENTRIES)))
    assert found["first"].tolist() == plain.tolist()
    expected = [weight_of(kind, block.tobytes(), j) for block in raw for j in range(weights)]
    weight = found["w"]
    if kind not in ("Q8_0", "Q6_K"):
        assert isinstance(weight, QuantizedWeight) and weight.run == 32
        weight.validate()
        weight = weight.to_dense()
    assert weight.shape == (3, 2 * weights) and weight.dtype == torch.float32
    np.testing.assert_array_equal(weight.numpy().ravel(), np.array(expected, F), strict=True)


def test_numbers_as_they_are(file):
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    tensors = [
        (b"h", 1, (2, 3), values.half().numpy().tobytes()),
        (b"b", 30, (2, 3), values.bfloat16().view(torch.int16).numpy().tobytes()),
        (b"e", 0, (0, 3), b""),
    ]
    found = read_quantized(file(file_of(tensors)))
    assert torch.equal(found["h"], values.half()) and torch.equal(found["b"], values.bfloat16())
    assert found["e"].shape == (0, 3)


GOOD = [(b"w", 2, (2, 32), blocks_of("Q4_0", 2).tobytes())]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "begin with GGUF, got an empty file"),
        (b"GG", "hold the values that its head announces, got 2 bytes"),
        (file_of(GOOD, head=b"GGML"), r"begin with GGUF and a version of \(2, 3\), got b'GGML' and 3"),
        (file_of(GOOD, version=1), "begin with GGUF and a version of .* and 1"),
        (file_of(GOOD)[:-1], "hold 36 bytes of 'w', got 35"),
        (file_of(GOOD)[:60], "hold the values that its head announces, got 60 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "hold the values that its head announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "hold the values that its head announces"),
        (file_of(GOOD, entries=[text(b"k") + struct.pack("<I", 13)]), "hold values of known types, got type 13"),
        (
            file_of(GOOD, entries=[text(b"k") + struct.pack("<IIQ", 9, 9, 1)]),
            "hold arrays of numbers or strings, got type 9",
        ),
        (file_of(GOOD, entries=[text(b"k") + struct.pack("<IIQ", 9, 8, 2**62)]), "hold the values that its head"),
        (file_of(GOOD, entries=[text(b"k") + struct.pack("<IIQ", 9, 12, 2**62)]), "hold the values that its head"),
        (file_of(GOOD + GOOD), "name each tensor once, of at most 4 dimensions, got 'w'"),
        (file_of([(b"w", 2, (1, 1, 1, 1, 32), b"")]), "name each tensor once, of at most 4 dimensions"),
        (file_of([(b"w", 2, (2, 16), bytes(18))]), "hold 'w' in rows of whole blocks of 32"),
        (file_of([(b"w", 2, (2**40, 2**40), b"")]), "hold .* bytes of 'w', got 0"),
        (file_of([(b"w", 13, (1, 256), bytes(176))]), "hold F32, F16, BF16, Q4_0, .*got kind 13 as 'w'; quantise it"),
        (file_of([(b"w", 2, (1, 32), b"\x00\x7e" + bytes(16))]), "hold finite scales of 'w', got NaN"),
        (file_of([(b"w", 8, (1, 32), b"\x00\x7c" + bytes(32))]), "hold finite scales of 'w', got NaN"),
    ],
)
def test_files_that_do_not_fit_are_refused(file, raw, sentence):
    with pytest.raises(ValueError, match=f"read_quantized: source must {sentence}"):
        read_quantized(file(raw))


@settings(max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 300),
)
def test_damage_is_refused_or_read(tmp_path_factory, flips, cut):
    raw = bytearray(file_of([*GOOD, (b"k", 12, (1, 256), blocks_of("Q4_K", 1).tobytes())], entries=ENTRIES))
    for place, value in flips:
        raw[int(place * len(raw))] = value
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(raw[: len(raw) - cut])
    try:
        for weight in read_quantized(path).values():
            assert not isinstance(weight, QuantizedWeight) or weight.to_dense().isfinite().all()
    except ValueError as error:
        assert str(error).startswith("read_quantized: source must ")


def test_the_library_agrees(file):
    gguf = pytest.importorskip("gguf")
    for kind, (number, weights, _, _) in KINDS.items():
        raw = blocks_of(kind, 4)
        expected = gguf.dequantize(raw.reshape(2, -1), gguf.GGMLQuantizationType(number))
        weight = read_quantized(file(file_of([(b"w", number, (2, 2 * weights), raw.tobytes())])))["w"]
        dense = weight.to_dense() if isinstance(weight, QuantizedWeight) else weight
        np.testing.assert_array_equal(dense.numpy(), expected, strict=True)


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    """Each would be a tensor of its own, so that a file of n bytes could take n * n."""
    block = bytes(18 * 400)
    many = [(b"w%d" % number, 2, (32 * 400,), block if number == 0 else b"") for number in range(50)]
    data = bytearray(file_of(many))
    path = tmp_path / "m.gguf"
    for number in range(1, 50):  # all at offset 0
        at = data.index(b"w%d" % number + struct.pack("<I", 1)) + len(b"w%d" % number) + 4 + 8 + 4
        data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="hold tensors that share no bytes"):
        read_quantized(path)
