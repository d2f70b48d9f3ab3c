"""The packed weights and thresholds of BNN-PYNQ, for FINN's accelerators of binary networks.

A folder holds, for layer l and each of its processing elements p, `l-p-weights.bin` and, where the layer has
thresholds, `l-p-thres.bin`: little endian, without magic number, shapes or checksum.

    u64 [rows / PE][columns / SIMD]   weights: word g of row j * PE + p has columns g * SIMD to (g + 1) * SIMD - 1, the
                                      first in the lowest bit, a set bit for +1; bits from SIMD on are 0
    i64 [rows / PE]                   thresholds of rows j * PE + p

Rows and columns are padded: columns to a multiple of SIMD, and of 64 in the first layer of a network without
convolutions; rows to a multiple of PE, in the last layer of 64. Padding has weights +1 and no effect: its inputs are
the bit 0, and its rows' thresholds the largest 16-bit number. The columns of a convolution are [kernel row][kernel
column][channel]; those of the linear layer behind a flattened image are [position][channel].

A row is +1 where its sum is above the threshold. After signs, the sum is the number of columns in which x and the
weight agree, (n + dot) / 2 for n columns; so dot >= 2 (threshold + 1) - n. A first layer on 8-bit inputs x = q / 2^7
sums these up as they are, and has thresholds in steps of 2^-8; so sum w q >= floor(threshold / 2) + 1.

Source: github.com/Xilinx/BNN-PYNQ, bnn/src/training/finnthesizer.py for the layout, bnn/src/library/hls/activations.hpp
for the comparison; Umuroglu et al., FINN (2017), section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WHERE = "read_finn"
ALIGNED = 64  # what the outermost layers are padded to
LARGEST_THRESHOLD = 2**15 - 1
INPUT_FRACTION, THRESHOLD_FRACTION = 7, 8
# Bits of a first layer's thresholds.
FIXED_BITS = 24
MAX_SIMD = 64


@dataclass(frozen=True)
class FinnShape:
    """What the files do not say of a layer.

    Attributes:
        shape: of the weight, [out, in] or [out, in, kernel height, kernel width].
        simd: columns of a word, L<l>_SIMD in the network's config.h.
        pixels: positions of the image whose flattened channels are the columns of a linear layer; 1 for no image.
        fixed: whether the inputs are 8-bit fixed point numbers q / 2^7 instead of signs; those of a first layer may be.
    """

    shape: tuple[int, ...]
    simd: int
    pixels: int = 1
    fixed: bool = False


@dataclass(frozen=True)
class FinnLayer:
    """One layer: y is +1 where the product of weight and input is at least the threshold, else -1.

    Attributes:
        weight: float32 +1 and -1, of the shape asked for; its columns in PyTorch's order.
        thresholds: int32 [out], or None where the layer is the last and gives its sums. Those of a layer on fixed point
            numbers q / 2^7 are thresholds on the sums of w q.
    """

    weight: Tensor
    thresholds: Tensor | None


def read_finn(folder: str | Path, layers: Sequence[FinnShape]) -> list[FinnLayer]:
    """The layers whose packed weights and thresholds a folder of BNN-PYNQ's holds, in their order.

    ops.xnor_matmul, ops.xnor_conv2d and, after fixed point numbers q with zero = 128 for uint8 q + 128,
    ops.bitplane_conv2d take these thresholds.

    Args:
        folder: bnn/params/<data>/<network>, or what finnthesizer wrote.
        layers: the shapes, one for each layer that the folder has.

    Raises:
        TypeError: layers is no sequence of FinnShape, or one of these has something else than ints.
        ValueError: a file is missing, too many or of another size, or holds what is not exactly such a layer: weights
            or activations of 2 bits, padding of another form, thresholds of more bits. Nothing is guessed.
        OSError: a file cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{WHERE}: folder must be a folder, got {root}; pass one that exists")
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"{WHERE}: layers must be a sequence of FinnShape, got {type(layers).__name__}; pass one for each layer"
        )
    numbered = ((path.name, path.name.partition("-")[0]) for path in root.glob("*-*.bin"))
    extra = sorted(name for name, layer in numbered if layer.isdecimal() and int(layer) >= len(layers))
    if extra:
        _refuse(f"have {len(layers)} layers, as many as layers describes", extra[0], "describe every layer")
    return [_layer(root, index, given, index == 0, index == len(layers) - 1) for index, given in enumerate(layers)]


def _layer(root: Path, index: int, given: FinnShape, first: bool, last: bool) -> FinnLayer:
    if not isinstance(given, FinnShape):
        raise TypeError(f"{WHERE}: layers must hold FinnShape, got {type(given).__name__}; pass one for each layer")
    numbers = (*given.shape, given.simd, given.pixels) if isinstance(given.shape, Sequence) else (None,)
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
        raise TypeError(
            f"{WHERE}: layers must have ints in shape, simd and pixels, got {given}; pass those of the network"
        )
    if given.fixed and not first:
        raise ValueError(
            f"{WHERE}: layers must have fixed=True in the first layer only, got it in layer {index}; leave it out there"
        )
    if len(given.shape) not in (2, 4) or min(given.shape) < 1 or not 1 <= given.simd <= MAX_SIMD:
        raise ValueError(
            f"{WHERE}: layers must have shapes [out, in] or [out, in, kh, kw] and simd from 1 to {MAX_SIMD}, got "
            f"{given}; pass those of the network"
        )
    rows, columns = given.shape[0], prod(given.shape[1:])
    if given.pixels < 1 or columns % given.pixels or (given.pixels > 1 and len(given.shape) == 4):
        raise ValueError(
            f"{WHERE}: pixels must divide the {columns} columns of a linear layer, got {given}; pass those of the image"
        )
    elements = len(list(root.glob(f"{index}-*-weights.bin")))
    if not elements:
        _refuse(f"hold {index}-0-weights.bin", "none", "pass the folder with the files of every layer")
    words = _words(root, index, "weights", elements, "<u8")
    widths = {_padded(columns, given.simd), _padded(columns, max(given.simd, ALIGNED)) if first else 0} - {0}
    heights = {_padded(rows, elements), _padded(rows, max(elements, ALIGNED)) if last else 0} - {0}
    fits = [(height, width) for height in heights for width in widths if _holds(words, height, width, given.simd)]
    if len(fits) != 1:
        _refuse(
            f"hold {rows} rows of {columns} weights in layer {index}, padded for {elements} elements and SIMD "
            f"{given.simd}",
            f"{words.size} words",
            "pass the shape and the SIMD of the network's config.h",
        )
    height, width = fits[0]
    if given.fixed and width != columns:
        _refuse(f"have no padded columns in layer {index}, on fixed point numbers", f"{width - columns}")
    bits = _bits(words, index, given, elements, height)
    if not bits[:, columns:].all() or not bits[rows:].all():
        _refuse(f"pad layer {index} with the weight +1", "others; they may be of more than 1 bit")
    weight = torch.from_numpy(bits[:rows, :columns] * 2.0 - 1.0).float()
    thresholds = None
    # Only sums of the last layer go anywhere.
    if not last or list(root.glob(f"{index}-*-thres.bin")):
        thresholds = _thresholds(root, index, given, elements, height)
    return FinnLayer(_in_order(weight, given), thresholds)


def _padded(size: int, part: int) -> int:
    return -(-size // part) * part


def _holds(words: NDArray[Any], height: int, width: int, simd: int) -> bool:
    return bool(words.size * simd == height * width)


def _words(root: Path, index: int, kind: str, elements: int, dtype: str) -> NDArray[Any]:
    """[elements, words]: every element's file."""
    files = []
    for element in range(elements):
        path = root / f"{index}-{element}-{kind}.bin"
        if not path.is_file():
            _refuse(f"hold {path.name}, since it holds {elements} elements of layer {index}", "none")
        files.append(path.read_bytes())
    others = [path.name for path in root.glob(f"{index}-*-{kind}.bin")]
    if len(others) != elements:
        _refuse(f"hold {elements} files of {kind} of layer {index}", f"{len(others)}")
    sizes = {len(content) for content in files}
    if len(sizes) != 1 or sizes.pop() % 8:
        _refuse(f"hold as many 8-byte words in all files of {kind} of layer {index}", "others")
    return np.stack([np.frombuffer(content, dtype) for content in files])


def _bits(words: NDArray[Any], index: int, given: FinnShape, elements: int, height: int) -> NDArray[Any]:
    """uint8 [height, width]: the padded matrix."""
    if given.simd < MAX_SIMD and bool((words >> np.uint64(given.simd)).any()):
        _refuse(f"hold {given.simd} bits in each word of layer {index}", "more; its weights may be of more than 1 bit")
    rows = words.reshape(elements, height // elements, -1).transpose(1, 0, 2).reshape(height, -1)
    octets = np.ascontiguousarray(rows).astype("<u8").view(np.uint8).reshape(height, -1, 8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., : given.simd]
    return bits.reshape(height, -1)


def _thresholds(root: Path, index: int, given: FinnShape, elements: int, height: int) -> Tensor:
    found = _words(root, index, "thres", elements, "<i8")
    if found.size != height:
        _refuse(f"hold a threshold for each row of layer {index}", f"{found.size} for {height}: more than 1 bit each")
    numbers = found.T.reshape(-1)
    rows, columns = given.shape[0], prod(given.shape[1:])
    bits = FIXED_BITS if given.fixed else 16
    if numbers.min() < -(1 << bits - 1) or numbers.max() >= 1 << bits - 1:
        _refuse(f"hold thresholds of {bits} bits in layer {index}", f"{numbers.min()} to {numbers.max()}")
    if not (numbers[rows:] == LARGEST_THRESHOLD).all():
        _refuse(f"pad the thresholds of layer {index} with {LARGEST_THRESHOLD}", "others")
    numbers = numbers[:rows]
    # Fixed: sum w q / 2^7 > t / 2^8.
    fixed = (numbers >> (THRESHOLD_FRACTION - INPUT_FRACTION)) + 1
    least = fixed if given.fixed else 2 * (numbers + 1) - columns
    return torch.from_numpy(least.astype(np.int32))


def _in_order(weight: Tensor, given: FinnShape) -> Tensor:
    if len(given.shape) == 4:
        out, channels, height, width = given.shape
        return weight.view(out, height, width, channels).permute(0, 3, 1, 2).contiguous()
    rows, columns = given.shape
    return weight.view(rows, given.pixels, columns // given.pixels).transpose(1, 2).reshape(rows, columns)


def _refuse(rule: str, came: str, fix: str = "write the files again with finnthesizer") -> NoReturn:
    raise ValueError(f"{WHERE}: folder must {rule}, got {came}; {fix}")
