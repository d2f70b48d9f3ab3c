import os
import tracemalloc
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch.formats import SparseCodebookWeight
from tersetorch.storage import DeepCompressionLayer, read_deep_compression, write_deep_compression

SHAPES = {"conv1": (3, 2, 3, 3), "fire/conv": (5, 3, 1, 1), "fc": (4, 11), "last": (2, 40)}
ROOT = Path(os.environ.get("TERSETORCH_DATA") or "/nonexistent")
PUBLISHED = ROOT / "models" / "squeezenet-deep-compression.net"


def bits_of(shape):
    return 8 if len(shape) == 4 else 4


def pack(values, bits):
    if bits == 8:
        return bytes(values)
    values = [*values, 0] if len(values) % 2 else list(values)
    return bytes(low | high << 4 for low, high in zip(values[::2], values[1::2], strict=True))


def encode(weights, codebooks, biases, shapes=SHAPES):
    """Writes a file as the paper says: gaps of 4 bits, a filler of code 0 where a gap is too long."""
    heads, bodies = [], []
    for name, shape in shapes.items():
        entries, last = [], -1
        for position in np.flatnonzero(weights[name]):
            while position - last > 16:
                last += 16
                entries.append((15, 0))
            entries.append((position - last - 1, int(weights[name][position])))
            last = position
        bits = bits_of(shape)
        gaps, codes = [gap for gap, _ in entries], [code for _, code in entries]
        heads.append(len(entries))
        numbers = np.concatenate([codebooks[name], biases[name]]).astype("<f4").tobytes()
        bodies.append(numbers + pack(codes, bits) + pack(gaps, 4))
    return np.array(heads, "<u4").tobytes() + b"".join(bodies)


def decode(raw, shapes=SHAPES):
    """Reads a file in the plainest way, an entry at a time; raises on whatever does not fit."""
    taken = 0

    def take(size):
        nonlocal taken
        taken += size
        if taken > len(raw):
            raise ValueError("short")
        return raw[taken - size : taken]

    def numbers(count):
        values = np.frombuffer(take(4 * count), "<f4")
        if not np.isfinite(values).all():
            raise ValueError("not finite")
        return values

    counts = np.frombuffer(take(4 * len(shapes)), "<u4").tolist()
    result = {}
    for (name, shape), entries in zip(shapes.items(), counts, strict=True):
        bits = bits_of(shape)
        codebook, bias = numbers(2**bits), numbers(shape[0])
        codes, gaps = take((entries * bits + 7) // 8), take((entries + 1) // 2)
        weight = np.zeros(prod(shape), np.float32)
        position = -1
        if codebook[0] != 0:
            raise ValueError("zero first")
        for k in range(entries):
            position += 1 + (gaps[k // 2] >> 4 * (k % 2) & 15)
            if position >= weight.size:
                raise ValueError("outside")
            weight[position] = codebook[codes[k] if bits == 8 else codes[k // 2] >> 4 * (k % 2) & 15]
        result[name] = weight.reshape(shape), bias
    if taken != len(raw):
        raise ValueError("long")
    return result


def sample(seed=0, density=0.3, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    codebooks = {name: rng.standard_normal(2 ** bits_of(shape)).astype("f4") for name, shape in shapes.items()}
    for codebook in codebooks.values():
        codebook[0] = 0
    biases = {name: rng.standard_normal(shape[0]).astype("f4") for name, shape in shapes.items()}
    weights = {
        name: rng.integers(1, 2 ** bits_of(shape), prod(shape)) * (rng.random(prod(shape)) < density)
        for name, shape in shapes.items()
    }
    return weights, codebooks, biases


@pytest.fixture
def file(tmp_path):
    def write(raw):
        path = tmp_path / "m.net"
        path.write_bytes(raw)
        return path

    return write


def assert_exact(found, expected):
    assert list(found) == list(expected)
    for name, (weight, bias) in expected.items():
        np.testing.assert_array_equal(found[name].to_dense().numpy(), weight, strict=True)
        np.testing.assert_array_equal(found[name].bias.numpy(), bias, strict=True)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_reads_what_was_written(file, density):
    weights, codebooks, biases = sample(density=density)
    found = read_deep_compression(file(encode(weights, codebooks, biases)), SHAPES)
    assert list(found) == list(SHAPES)
    for name, shape in SHAPES.items():
        layer = found[name]
        assert isinstance(layer, DeepCompressionLayer) and layer.shape == shape
        np.testing.assert_array_equal(layer.to_dense().numpy(), codebooks[name][weights[name]].reshape(shape))
        np.testing.assert_array_equal(layer.codebook.numpy(), codebooks[name])
        np.testing.assert_array_equal(layer.bias.numpy(), biases[name])
        assert layer.positions.tolist() == np.flatnonzero(weights[name]).tolist()
        assert layer.codes.tolist() == weights[name][weights[name] != 0].tolist()
        assert layer.density == np.count_nonzero(weights[name]) / prod(shape)
        assert layer.entries >= layer.positions.numel()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_gives_the_files_own_codes_as_a_format(file, density):
    weights, codebooks, biases = sample(1, density)
    for name, layer in read_deep_compression(file(encode(weights, codebooks, biases)), SHAPES).items():
        sparse = layer.to_sparse_codebook()
        sparse.validate()
        assert sparse.shape == (SHAPES[name][0], prod(SHAPES[name][1:]))
        assert torch.equal(sparse.to_dense(), layer.to_dense().flatten(1))
        assert torch.equal(sparse.codebook[0], layer.codebook) and torch.equal(sparse.codes, layer.codes)


def test_figure_2_of_the_paper(file):
    # Gaps 2, 4 and a long one, as the figure has them; with 4 bits a filler is needed from a gap of 17 on.
    weight = np.zeros(40, int)
    weight[[1, 4, 24]] = [3, 9, 5]
    codebook = np.arange(16, dtype="f4")
    shapes = {"ip1": (1, 40)}
    raw = encode({"ip1": weight}, {"ip1": codebook}, {"ip1": np.zeros(1)}, shapes)
    head = 4 + 64 + 4
    assert raw[:4] == b"\4\0\0\0"
    assert raw[head:] == bytes([0x93, 0x50]) + bytes([0x21, 0x3F])
    layer = read_deep_compression(file(raw), shapes)["ip1"]
    assert layer.positions.tolist() == [1, 4, 24] and layer.codes.tolist() == [3, 9, 5] and layer.entries == 4
    assert torch.equal(layer.to_dense()[0], torch.from_numpy(weight).float())


def test_half_a_byte_left_over_is_passed_over(file):
    shapes = {"fc": (1, 4)}
    raw = bytearray(encode({"fc": np.array([0, 7, 0, 0])}, {"fc": np.arange(16)}, {"fc": np.ones(1)}, shapes))
    raw[-1] |= 0xF0
    raw[-2] |= 0xF0
    assert read_deep_compression(file(raw), shapes)["fc"].to_dense().tolist() == [[0, 7, 0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_every_truncation_and_every_added_byte_is_refused(file, seed):
    raw = encode(*sample(seed))
    for size in [*range(0, len(raw), 7), len(raw) - 1]:
        with pytest.raises(ValueError, match=r"read_deep_compression: .*m\.net must .*, got .*; pass the shapes"):
            read_deep_compression(file(raw[:size]), SHAPES)
    for added in (b"\0", b"\xff", raw):
        with pytest.raises(ValueError, match=r"must have .* bytes"):
            read_deep_compression(file(raw + added), SHAPES)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 5),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=8),
    cut=st.integers(0, 3),
)
def test_damage_is_refused_with_a_sentence_or_read_as_the_plain_reader_does(tmp_path_factory, seed, flips, cut):
    raw = bytearray(encode(*sample(seed)))
    for place, bit in flips:
        raw[int(place * len(raw))] ^= 1 << bit
    raw = bytes(raw[: len(raw) - cut])
    path = tmp_path_factory.mktemp("net") / "m.net"
    path.write_bytes(raw)
    try:
        expected = decode(raw)
    except ValueError:
        with pytest.raises(ValueError, match=r"read_deep_compression: .* must .*, got .*; pass"):
            read_deep_compression(path, SHAPES)
    else:
        assert_exact(read_deep_compression(path, SHAPES), expected)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=600))
def test_noise_is_refused(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("net") / "m.net"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"read_deep_compression: .* must "):
        read_deep_compression(path, SHAPES)


def broken(change):
    weights, codebooks, biases = sample()
    change(weights, codebooks, biases)
    return encode(weights, codebooks, biases)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "must begin with 4 counts of 4 bytes, got 0 bytes"),
        (b"\0" * 15, "must begin with 4 counts of 4 bytes, got 15 bytes"),
        (b"\xff" * 16, r"must hold at most 54 entries for conv1 of shape \[3, 2, 3, 3\], got 4294967295"),
        (b"\0" * 16, "must have .* bytes, as its counts and the layers' shapes add up to, got 16"),
        (broken(lambda w, c, b: c["fc"].put(0, 0.5)), "must have 0 first in the codebook of fc, got 0.5"),
        (broken(lambda w, c, b: c["last"].put(9, np.nan)), "finite numbers in the .* of last, got NaN"),
        (broken(lambda w, c, b: b["conv1"].put(2, np.inf)), "finite numbers in the codebook and biases of conv1"),
    ],
)
def test_says_what_is_wrong(file, raw, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_deep_compression(file(raw), SHAPES)


def test_positions_outside_the_layer_are_refused(file):
    shapes = {"fc": (1, 16)}
    raw = bytearray(encode({"fc": np.eye(1, 16, 15, dtype=int)[0]}, {"fc": np.arange(16)}, {"fc": [0]}, shapes))
    assert read_deep_compression(file(raw), shapes)["fc"].positions.tolist() == [15]
    raw[0], extra = 2, bytes([0x11, 0x0F])
    with pytest.raises(ValueError, match="must keep the positions of fc below 16, got 16"):
        read_deep_compression(file(bytes(raw[:-2]) + extra), shapes)


def test_a_count_allocates_nothing(file):
    shapes = {"fc": (4096, 4096)}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"must have .* bytes"):
            read_deep_compression(file(np.array([4096 * 4096], "<u4").tobytes() + b"\0" * 100), shapes)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("path", "shapes", "error", "sentence"),
    [
        (3, SHAPES, TypeError, "path must be a string or a path, got int"),
        ("", SHAPES, ValueError, "path must name a file, got ''"),
        ("m.net", {}, ValueError, "shapes must name a layer, got none"),
        ("m.net", [(1, 2)], TypeError, "shapes must be a mapping of names to shapes, got list"),
        ("m.net", {1: (1, 2)}, TypeError, r"shapes must map strings to whole numbers, got 1: \(1, 2\)"),
        ("m.net", {"a": (1, 2.0)}, TypeError, r"must map strings to whole numbers, got 'a': \(1, 2.0\)"),
        ("m.net", {"a": "12"}, TypeError, "must map strings to whole numbers, got 'a': '12'"),
        ("m.net", {"a": 4}, TypeError, "must map strings to whole numbers, got 'a': 4"),
        ("m.net", {"a": (1, 2, 3)}, ValueError, r"shapes must be \[out, in\] or .* got \[1, 2, 3\] for a"),
        ("m.net", {"a": (1, 0)}, ValueError, r"shapes must be .* got \[1, 0\] for a"),
        ("m.net", {"a": (1 << 16, 1 << 16)}, ValueError, r"fewer than 2\*\*31 weights, got"),
        ("nowhere.net", SHAPES, FileNotFoundError, r"path must name a file that can be read, got 'nowhere\.net'"),
    ],
)
def test_bad_arguments_are_refused(path, shapes, error, sentence):
    with pytest.raises(error, match=sentence):
        read_deep_compression(path, shapes)


# What others found in the published file: stored entries and fillers of each layer.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
ENTRIES = (
    *(13902, 1528, 1020, 3073, 2038, 1023, 3081, 4085, 4071, 12288, 8160, 4067, 12343),
    *(12161, 4602, 27558, 9205, 9132, 27564, 24388, 8190, 44919, 16371, 16303, 45038, 105973),
)
FILLERS = (0, 0, 0, 34, 0, 0, 42, 0, 0, 132, 0, 0, 196, 0, 0, 233, 0, 3, 228, 0, 3, 775, 1, 0, 865, 3650)


def published_shapes():
    shapes = {"conv1": (96, 3, 7, 7)}
    inputs = 96
    for number, (squeeze, expand) in enumerate(FIRES, 2):
        shapes[f"fire{number}/conv1x1_1"] = (squeeze, inputs, 1, 1)
        shapes[f"fire{number}/conv1x1_2"] = (expand, squeeze, 1, 1)
        shapes[f"fire{number}/conv3x3_2"] = (expand, squeeze, 3, 3)
        inputs = 2 * expand
    return shapes | {"conv_final": (1000, 512, 1, 1)}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="wants TERSETORCH_DATA with models/squeezenet-deep-compression.net")
def test_the_published_file():
    shapes = published_shapes()
    found = read_deep_compression(PUBLISHED, shapes)
    assert tuple(layer.entries for layer in found.values()) == ENTRIES
    assert tuple(layer.entries - layer.positions.numel() for layer in found.values()) == FILLERS
    assert found["conv1"].positions[-1] == 14_111 and found["conv_final"].positions[-1] == 511_995
    kept = sum(int(layer.to_dense().count_nonzero()) for layer in found.values())
    assert (kept, sum(prod(shape) for shape in shapes.values())) == (415_921, 1_244_448)
    assert_exact(found, decode(PUBLISHED.read_bytes(), shapes))
    for layer in found.values():
        sparse = layer.to_sparse_codebook()
        sparse.validate()
        assert torch.equal(sparse.to_dense(), layer.to_dense().flatten(1))


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="wants TERSETORCH_DATA with models/squeezenet-deep-compression.net")
def test_the_published_file_with_the_shapes_of_another_network_is_refused():
    shapes = published_shapes() | {"conv_final": (1001, 512, 1, 1)}
    with pytest.raises(ValueError, match=r"must have 675767 bytes, .* got 675763; pass the shapes of its network"):
        read_deep_compression(PUBLISHED, shapes)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="wants TERSETORCH_DATA with models/squeezenet-deep-compression.net")
def test_the_published_file_comes_out_byte_for_byte(tmp_path):
    layers = read_deep_compression(PUBLISHED, published_shapes())
    write_deep_compression(tmp_path / "as_read.net", layers)
    assert (tmp_path / "as_read.net").read_bytes() == PUBLISHED.read_bytes()
    through_our_format = {
        name: DeepCompressionLayer.from_sparse_codebook(layer.to_sparse_codebook(), layer.bias, layer.shape)
        for name, layer in layers.items()
    }
    write_deep_compression(tmp_path / "through_ours.net", through_our_format)
    assert (tmp_path / "through_ours.net").read_bytes() == PUBLISHED.read_bytes()


# AlexNet's kinds of layers, small: 8-bit codes for convolutions (grouped ones too), 4-bit codes for linear layers.
ALEXNET = {"conv1": (6, 3, 11, 11), "conv2": (8, 3, 5, 5), "fc6": (37, 151), "fc7": (64, 37), "fc8": (10, 64)}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.08, 0.35, 1.0])
def test_writes_what_the_plainest_encoder_does(file, tmp_path, density):
    weights, codebooks, biases = sample(3, density, ALEXNET)
    raw = encode(weights, codebooks, biases, ALEXNET)
    found = read_deep_compression(file(raw), ALEXNET)
    write_deep_compression(tmp_path / "again.net", found)
    assert (tmp_path / "again.net").read_bytes() == raw
    assert [layer.entries for layer in found.values()] == np.frombuffer(raw[:20], "<u4").tolist()


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_dense_weights_go_in_and_come_back(tmp_path, density):
    weights, codebooks, biases = sample(4, density)
    layers = {
        name: DeepCompressionLayer.from_dense(
            torch.from_numpy(codebooks[name][weights[name]].reshape(shape)), torch.from_numpy(biases[name])
        )
        for name, shape in SHAPES.items()
    }
    write_deep_compression(tmp_path / "m.net", layers)
    expected = {n: (codebooks[n][weights[n]].reshape(shape), biases[n]) for n, shape in SHAPES.items()}
    found = read_deep_compression(tmp_path / "m.net", SHAPES)
    assert_exact(found, expected)
    assert_exact(layers, expected)
    assert [layer.entries for layer in layers.values()] == [layer.entries for layer in found.values()]


@pytest.mark.parametrize("gap", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49])
def test_gaps_around_the_fillers(file, tmp_path, gap):
    weight = np.zeros(120, int)
    weight[[gap - 1, 2 * gap - 1]] = [3, 15]
    raw = encode({"fc": weight}, {"fc": np.arange(16)}, {"fc": [1]}, {"fc": (1, 120)})
    write_deep_compression(tmp_path / "again.net", read_deep_compression(file(raw), {"fc": (1, 120)}))
    assert (tmp_path / "again.net").read_bytes() == raw


def layer(**changes):
    weight = torch.tensor([[0, 1.0, 0, 2.0], [3.0, 0, 0, 0]])
    return replace(DeepCompressionLayer.from_dense(weight, torch.zeros(2)), **changes)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"shape": (2, 4, 1)}, ValueError, r"shape must be \[out, in\] or .* got \(2, 4, 1\)"),
        ({"shape": (2, 4, 1, 1)}, ValueError, r"codebook must be \[256\], got \[16\]"),
        ({"shape": (2, 2)}, ValueError, "positions must lie below 4, got 4"),
        ({"shape": (1 << 16, 1 << 16)}, ValueError, r"fewer than 2\*\*31 weights"),
        ({"positions": torch.tensor([1, 3, 3])}, ValueError, "positions must rise from 0 or more"),
        ({"positions": torch.tensor([-1, 3, 4])}, ValueError, "positions must rise from 0 or more"),
        ({"positions": torch.tensor([1, 3, 4]).int()}, TypeError, "positions must be torch.int64, got torch.int32"),
        ({"codes": torch.tensor([1, 2], dtype=torch.uint8)}, ValueError, r"codes must be \[3\], got \[2\]"),
        ({"codes": torch.tensor([1, 2, 0], dtype=torch.uint8)}, ValueError, r"codes must lie in \[1, 16\), .* from 0"),
        ({"codes": torch.tensor([1, 2, 16], dtype=torch.uint8)}, ValueError, r"codes must lie in \[1, 16\), .* to 16"),
        ({"codebook": torch.zeros(17)}, ValueError, r"codebook must be \[16\], got \[17\]"),
        ({"codebook": torch.ones(16)}, ValueError, "codebook must begin with 0, got 1.0"),
        ({"codebook": torch.tensor([0.0] + 15 * [np.nan])}, ValueError, "codebook must hold finite numbers, got NaN"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[2\], got \[3\]"),
        ({"bias": None}, TypeError, "bias must be torch.float32, got NoneType"),
    ],
)
def test_layers_that_no_file_can_hold_are_refused(tmp_path, changes, error, sentence):
    with pytest.raises(error, match=r"write_deep_compression: layers\['fc'\] must fit the file, .*" + sentence):
        write_deep_compression(tmp_path / "m.net", {"fc": layer(**changes)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "error", "sentence"),
    [
        ({}, ValueError, "layers must name a layer, got none"),
        ([layer()], TypeError, "layers must map names to DeepCompressionLayer"),
        ({"fc": torch.ones(2)}, TypeError, "layers must map names to DeepCompressionLayer"),
        ({3: layer()}, TypeError, "layers must map names to DeepCompressionLayer"),
    ],
)
def test_what_is_no_layer_is_refused(tmp_path, layers, error, sentence):
    with pytest.raises(error, match=sentence):
        write_deep_compression(tmp_path / "m.net", layers)


def test_places_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="write_deep_compression: path must lie in a folder that exists"):
        write_deep_compression(tmp_path / "no" / "m.net", {"fc": layer()})
    with pytest.raises(ValueError, match="write_deep_compression: path must name a file, got the folder"):
        write_deep_compression(tmp_path, {"fc": layer()})


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: DeepCompressionLayer.from_dense([1], torch.zeros(1)), TypeError, "weight must be a tensor, got list"),
        (lambda: DeepCompressionLayer.from_dense(torch.ones(3), torch.zeros(3)), ValueError, r"weight must be \[out"),
        (
            lambda: DeepCompressionLayer.from_dense(torch.arange(17.0)[None], torch.zeros(1)),
            ValueError,
            r"at most 16 codebook entries for shape \[1, 17\], got 17; share it",
        ),
        (
            lambda: DeepCompressionLayer.from_dense(torch.arange(257.0).reshape(1, 257, 1, 1), torch.zeros(1)),
            ValueError,
            "at most 255 distinct non-zero values",
        ),
        (
            lambda: DeepCompressionLayer.from_sparse_codebook(
                SparseCodebookWeight.from_dense(torch.ones(2, 6)), torch.zeros(2), (2, 5)
            ),
            ValueError,
            r"shape must be .* of \[2, 6\] rows, columns, got \[2, 5\]",
        ),
        (
            lambda: DeepCompressionLayer.from_sparse_codebook(torch.ones(2, 6), torch.zeros(2)),
            TypeError,
            "weight must be a SparseCodebookWeight, got Tensor",
        ),
    ],
)
def test_weights_that_no_layer_can_hold_are_refused(build, error, sentence):
    with pytest.raises(error, match=f"DeepCompressionLayer: .*{sentence}|{sentence}"):
        build()
