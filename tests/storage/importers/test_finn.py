"""read_finn: the packed files of BNN-PYNQ, written here row by row as its documentation says."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from tersetorch.ops import bitplane_conv2d, sign_pack, xnor_matmul, xnor_pack
from tersetorch.storage import FinnShape, read_finn

ROOT = Path(os.environ.get("TERSETORCH_DATA") or "/nonexistent")
PUBLISHED, MNIST = ROOT / "models" / "bnn-pynq" / "lfcW1A1", ROOT / "data" / "mnist"


def signs(*shape):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(sum(shape))) * 2.0 - 1.0


def write(folder, layer, matrix, thresholds, elements, simd, align_columns=1, align_rows=1):
    """One layer of rows of signs; padding as finnthesizer does it."""

    def padded(size, part):
        return -(-size // part) * part

    rows, columns = matrix.shape
    height, width = padded(rows, max(elements, align_rows)), padded(columns, max(simd, align_columns))
    for element in range(elements):
        words, numbers = [], []
        for row in range(element, height, elements):
            for begin in range(0, width, simd):
                word = 0
                for place in range(simd):
                    column = begin + place
                    positive = row >= rows or column >= columns or matrix[row, column] > 0
                    word |= int(positive) << place
                words.append(word)
            numbers.append(int(thresholds[row]) if thresholds is not None and row < rows else 32767)
        (folder / f"{layer}-{element}-weights.bin").write_bytes(struct.pack(f"<{len(words)}Q", *words))
        if thresholds is not None:
            (folder / f"{layer}-{element}-thres.bin").write_bytes(struct.pack(f"<{len(numbers)}q", *numbers))


def test_linear_layers(tmp_path):
    first, last = signs(20, 70), signs(10, 20)
    counts = torch.randint(20, 50, (20,), generator=torch.Generator().manual_seed(1))
    write(tmp_path, 0, first, counts, 4, 32, align_columns=64)
    write(tmp_path, 1, last, None, 16, 8, align_rows=64)
    (one, two) = read_finn(tmp_path, [FinnShape((20, 70), 32), FinnShape((10, 20), 8)])
    assert torch.equal(one.weight, first) and torch.equal(two.weight, last) and two.thresholds is None
    x = signs(50, 70)
    agree = (x[:, None] == first).sum(-1)
    bits = xnor_matmul(x, xnor_pack(sign_pack(one.weight)), in_features=70, out_features=20, thresholds=one.thresholds)
    assert torch.equal(bits, sign_pack((agree > counts).float() * 2 - 1))


def test_convolutions_and_what_is_behind_them(tmp_path):
    first, second, third = signs(6, 3, 3, 3), signs(5, 6, 2, 2), signs(7, 5 * 4)
    fixed = torch.randint(-900, 900, (6,), generator=torch.Generator().manual_seed(1))
    write(tmp_path, 0, first.movedim(1, -1).flatten(1), fixed, 2, 3)
    write(tmp_path, 1, second.movedim(1, -1).flatten(1), torch.arange(5), 1, 8)
    write(tmp_path, 2, third.view(7, 5, 4).transpose(1, 2).flatten(1), torch.arange(7) - 3, 7, 4)
    shapes = [FinnShape((6, 3, 3, 3), 3, fixed=True), FinnShape((5, 6, 2, 2), 8), FinnShape((7, 20), 4, pixels=4)]
    found = read_finn(tmp_path, shapes)
    for layer, weight in zip(found, (first, second, third), strict=True):
        assert torch.equal(layer.weight, weight)
    assert torch.equal(found[1].thresholds, 2 * (torch.arange(5) + 1).int() - 24)
    x = torch.randint(256, (2, 3, 6, 6), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    packed = xnor_pack(sign_pack(first.flatten(1)))
    bits = bitplane_conv2d(x, packed, out_channels=6, kernel_size=3, zero=128, thresholds=found[0].thresholds)
    above = conv2d((x.double() - 128) / 2**7, first.double()) > fixed.view(-1, 1, 1) / 2**8
    assert torch.equal(bits, sign_pack(above.movedim(1, -1).float() * 2 - 1))


def test_refuses(tmp_path):
    shape = [FinnShape((20, 70), 32)]

    def fresh():
        for path in tmp_path.iterdir():
            path.unlink()
        write(tmp_path, 0, signs(20, 70), torch.arange(20), 4, 32)

    def words(path, change):
        content = np.fromfile(tmp_path / path, "<i8")
        change(content)
        content.tofile(tmp_path / path)

    def set_last(value):
        return lambda content: content.__setitem__(-1, value)

    for damage, message in (
        (lambda: (tmp_path / "0-2-weights.bin").unlink(), "hold 0-2-weights.bin"),
        (lambda: (tmp_path / "0-2-thres.bin").unlink(), "hold 0-2-thres.bin"),
        (lambda: (tmp_path / "1-0-weights.bin").write_bytes(b""), "have 1 layers"),
        (lambda: (tmp_path / "0-1-weights.bin").write_bytes(b"12345678"), "as many 8-byte words"),
        (lambda: words("0-1-weights.bin", set_last(1 << 40)), "32 bits in each word"),
        (lambda: words("0-1-weights.bin", set_last(0)), "pad layer 0"),
        (lambda: words("0-1-thres.bin", set_last(40000)), "thresholds of 16 bits"),
        (
            lambda: words("0-0-thres.bin", lambda _: None) or [p.unlink() for p in tmp_path.iterdir()],
            "weights.bin, got",
        ),
    ):
        fresh()
        damage()
        with pytest.raises(ValueError, match=message):
            read_finn(tmp_path, shape)
    fresh()
    for given, message in (
        (FinnShape((20, 71, 3), 32), "shapes"),
        (FinnShape((20, 70), 65), "simd from 1 to 64"),
        (FinnShape((20, 70), 64), "20 rows of 70 weights in layer 0"),
        (FinnShape((200, 70), 32), "200 rows of 70 weights"),
        (FinnShape((20, 70), 32, pixels=3), "pixels must divide"),
        (FinnShape((20, 70), 32, fixed=True), "no padded columns"),
    ):
        with pytest.raises(ValueError, match=message):
            read_finn(tmp_path, [given])
    with pytest.raises(TypeError, match="layers must hold FinnShape"):
        read_finn(tmp_path, [(20, 70)])
    with pytest.raises(FileNotFoundError, match="folder must be a folder"):
        read_finn(tmp_path / "none", shape)


def test_refuses_files_that_are_missing_or_too_many(tmp_path):
    shapes = [FinnShape((6, 70), 32), FinnShape((5, 6), 8), FinnShape((4, 5), 8)]

    def fresh():
        for index, (rows, columns) in enumerate(((6, 70), (5, 6), (4, 5))):
            write(tmp_path, index, signs(rows, columns), torch.arange(rows), 2, shapes[index].simd)

    for layer in (0, 1):
        fresh()
        for path in tmp_path.glob(f"{layer}-*-thres.bin"):
            path.unlink()
        with pytest.raises(ValueError, match=f"hold {layer}-0-thres.bin.* got none"):
            read_finn(tmp_path, shapes)
    fresh()
    for path in tmp_path.glob("2-*-thres.bin"):
        path.unlink()
    assert [layer.thresholds is None for layer in read_finn(tmp_path, shapes)] == [False, False, True]
    (tmp_path / "classes.txt").write_text("0")
    (tmp_path / "4-0-weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"have 3 layers, as many as layers describes, got 4-0-weights\.bin"):
        read_finn(tmp_path, shapes)


def test_refuses_shapes_that_are_none(tmp_path):
    write(tmp_path, 0, signs(20, 70), torch.arange(20), 4, 32)
    write(tmp_path, 1, signs(10, 20), None, 2, 4)
    first, last = FinnShape((20, 70), 32), FinnShape((10, 20), 4)
    for given, message in (
        (None, "layers must be a sequence of FinnShape, got NoneType"),
        (first, "layers must be a sequence of FinnShape, got FinnShape"),
        ([FinnShape(("a", 3), 64), last], r"ints in shape, simd and pixels, got FinnShape\(shape=\('a', 3\)"),
        ([FinnShape(None, 64), last], "ints in shape"),
        ([FinnShape((20, 70), 32.0), last], "ints in shape.*simd=32.0"),
        ([FinnShape((20, 70), 32, pixels=1.0), last], "ints in shape.*pixels=1.0"),
    ):
        with pytest.raises(TypeError, match=message):
            read_finn(tmp_path, given)
    with pytest.raises(ValueError, match="fixed=True in the first layer only, got it in layer 1"):
        read_finn(tmp_path, [first, FinnShape((10, 20), 4, fixed=True)])


@pytest.mark.skipif(
    not (PUBLISHED.is_dir() and MNIST.is_dir()), reason="wants TERSETORCH_DATA with models/bnn-pynq/lfcW1A1, data/mnist"
)
def test_the_published_network_of_mnist():
    """98.40 % of the test images, as its authors publish; the class is the highest bit that is set."""
    simd = (64, 32, 64, 8)
    sizes = ((1024, 784), (1024, 1024), (1024, 1024), (10, 1024))
    layers = read_finn(PUBLISHED, [FinnShape(shape, n) for shape, n in zip(sizes, simd, strict=True)])
    (images,) = MNIST.glob("t10k-images*")
    (labels,) = MNIST.glob("t10k-labels*")
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 784)
    bits = sign_pack(torch.from_numpy(pixels >= 128).float() * 2 - 1)
    for layer in layers:
        out, columns = layer.weight.shape
        packed = xnor_pack(sign_pack(layer.weight))
        bits = xnor_matmul(bits, packed, in_features=columns, out_features=out, thresholds=layer.thresholds)
    found = bits[:, 0].double().clamp_min(1).log2().floor().numpy()
    assert (found == np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)).mean() >= 0.984
