"""The .net files in which the authors of Deep Compression published their networks.

Little endian, without magic number, names, shapes or checksum; the shapes come from the caller.

    u32 [layers]             entries of each layer
    then, for each layer:
    f32 [2**b]               codebook; b is 8 for a convolution, 4 for a linear layer
    f32 [biases]
    u8 [ceil(entries b / 8)] codes; with b = 4 two a byte, the first in the low half
    u8 [ceil(entries / 2)]   gaps: zeros skipped before each entry, 4 bits, the first in the low half

The positions run once through the whole weight in C order. An entry of code 0 is a filler, there because a gap was too
long for 4 bits; where no entry is, the weight is 0 as well, so codebook[0] must be 0. The authors' rule puts a filler
16 places after the entry before as long as the next is further off, and none behind the last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from tersetorch.formats import SparseCodebookWeight
from tersetorch.storage.arguments import check_regular, naming, path_of, target_of, write_whole

COUNT_BYTES = 4
FLOAT_BYTES = 4
# Most weights that one layer may have: VGG-16's largest has 103 million.
LARGEST_LAYER = 2**31 - 1
# Places that an entry's 4 bits can lie behind the one before.
REACH = 16

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class DeepCompressionLayer:
    """One layer of a file: weight.flatten()[positions] = codebook[codes], 0 elsewhere.

    Attributes:
        shape: of the weight, [out, in / groups, height, width] or [out, in].
        positions: int64 [n], rising, into the weight in C order; fillers are left out.
        codes: uint8 [n], each in [1, 2**b).
        codebook: float32 [2**b], in the file's order, which is not sorted; codebook[0] = 0.
        bias: float32 [out].
        entries: how many the file stores, fillers included.
    """

    shape: tuple[int, ...]
    positions: Tensor
    codes: Tensor
    codebook: Tensor
    bias: Tensor
    entries: int

    @classmethod
    def from_sparse_codebook(
        cls, weight: SparseCodebookWeight, bias: Tensor, shape: Sequence[int] | None = None
    ) -> DeepCompressionLayer:
        """The layer of a weight in our format; its codebook keeps its order and is filled up with zeros.

        Args:
            weight: [rows, columns], with at most 256 entries for a convolution, 16 for a linear layer.
            bias: float32 [rows].
            shape: of the layer's weight, of weight.shape's rows and columns; weight.shape where left out.

        Raises:
            TypeError: weight or bias is of another type or dtype.
            ValueError: weight is damaged, its codebook is too large, or shape or bias does not fit it.
        """
        owner = "DeepCompressionLayer"
        if not isinstance(weight, SparseCodebookWeight):
            raise TypeError(
                f"{owner}: weight must be a SparseCodebookWeight, got {type(weight).__name__}; use from_dense"
            )
        weight.validate()
        shape = tuple(weight.shape if shape is None else shape)
        if len(shape) not in (2, 4) or (shape[0], prod(shape[1:])) != tuple(weight.shape):
            raise ValueError(
                f"{owner}: shape must be [out, in] or [out, in, height, width] of {list(weight.shape)} rows, columns, "
                f"got {list(shape)}; pass the shape of the layer's weight"
            )
        most = 1 << _bits(shape)
        entries = weight.codebook.shape[1]
        if entries > most:
            raise ValueError(
                f"{owner}: weight must have at most {most} codebook entries for shape {list(shape)}, got {entries}; "
                "share it with fewer bits"
            )
        codebook = torch.zeros(most)
        codebook[:entries] = weight.codebook[0].detach()
        positions = weight.rows.long() * weight.columns + weight.cols.long()
        layer = cls(shape, positions, weight.codes, codebook, bias, 0)
        layer = replace(layer, entries=layer._gaps()[0].size)
        layer.validate()
        return layer

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor) -> DeepCompressionLayer:
        """The layer of a weight, float32 [out, in] or [out, in, height, width], with few distinct values.

        Raises:
            TypeError: weight is no float32 or bfloat16 tensor, or bias no float32 one.
            ValueError: weight is of another shape or has too many distinct values other than 0: more than 255 for a
                convolution, 15 for a linear layer; or bias does not fit it.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"DeepCompressionLayer: weight must be a tensor, got {type(weight).__name__}; pass one")
        if weight.dim() not in (2, 4):
            raise ValueError(
                f"DeepCompressionLayer: weight must be [out, in] or [out, in, height, width], got shape "
                f"{list(weight.shape)}; pass the layer's weight"
            )
        found = SparseCodebookWeight.from_dense(weight.detach().flatten(1))
        return cls.from_sparse_codebook(found, bias, tuple(weight.shape))

    def validate(self) -> None:
        """Checks that a file can hold the layer.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: a shape or a number does not fit the others.
        """
        if len(self.shape) not in (2, 4) or min(self.shape) < 1 or prod(self.shape) > LARGEST_LAYER:
            self._refuse("shape must be [out, in] or [out, in, height, width] of fewer than 2**31 weights", self.shape)
        for name, dtype, dims in (
            ("positions", torch.int64, (self.positions.numel(),)),
            ("codes", torch.uint8, (self.positions.numel(),)),
            ("codebook", torch.float32, (1 << _bits(self.shape),)),
            ("bias", torch.float32, (self.shape[0],)),
        ):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"DeepCompressionLayer: {name} must be {dtype}, got {got}; convert it")
            if tuple(tensor.shape) != dims:
                self._refuse(f"{name} must be {list(dims)}", list(tensor.shape))
        for name in ("codebook", "bias"):
            if not bool(getattr(self, name).isfinite().all()):
                self._refuse(f"{name} must hold finite numbers", "NaN or infinity")
        if self.codebook[0] != 0:
            self._refuse("codebook must begin with 0", self.codebook[0].item())
        if self.positions.numel():
            if bool((self.positions.diff() <= 0).any()) or self.positions[0] < 0:
                self._refuse("positions must rise from 0 or more", "some that do not")
            if self.positions[-1] >= prod(self.shape):
                self._refuse(f"positions must lie below {prod(self.shape)}", int(self.positions[-1]))
            if self.codes.min() < 1 or int(self.codes.max()) >= self.codebook.numel():
                self._refuse(
                    f"codes must lie in [1, {self.codebook.numel()})",
                    f"values from {int(self.codes.min())} to {int(self.codes.max())}",
                )

    def _refuse(self, rule: str, came: object) -> NoReturn:
        raise ValueError(f"DeepCompressionLayer: {rule}, got {came}; build it with from_dense")

    def _gaps(self) -> tuple[Bytes, Bytes]:
        """Gap and code of every entry, fillers included."""
        steps = np.diff(self.positions.numpy(), prepend=-1)  # 1 to the next weight
        fillers = (steps - 1) // REACH
        ends = np.cumsum(fillers + 1) - 1
        gaps = np.full(int(fillers.sum()) + steps.size, REACH - 1, np.uint8)
        gaps[ends] = (steps - 1) % REACH
        codes = np.zeros_like(gaps)
        codes[ends] = self.codes.numpy()
        return gaps, codes

    @property
    def density(self) -> float:
        """The part of the weight that the file holds a code for."""
        return self.positions.numel() / prod(self.shape)

    def to_dense(self) -> Tensor:
        """The weight, float32 of the layer's shape."""
        dense = torch.zeros(prod(self.shape))
        dense[self.positions] = self.codebook[self.codes.int()]
        return dense.reshape(self.shape)

    def to_sparse_codebook(self) -> SparseCodebookWeight:
        """The weight as [out, everything else], with the file's own codes and codebook."""
        rows, columns = self.shape[0], prod(self.shape[1:])
        row_offsets = torch.searchsorted(self.positions, torch.arange(rows + 1) * columns).int()
        return SparseCodebookWeight(
            row_offsets, (self.positions % columns).int(), self.codes, self.codebook[None], columns
        )


def read_deep_compression(
    path: str | PathLike[str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, DeepCompressionLayer]:
    """Reads every layer of a .net file, exactly; nothing of a file that does not fit is returned.

    The file's size must be what its counts and shapes add up to, and no count is believed before it is compared with
    its layer and the file's size: a damaged file takes no more memory than one of these shapes can.

    Args:
        path: the file.
        shapes: shape of each layer's weight by name, in the order of the network's description: four dimensions for a
            convolution (8-bit codes), two for a linear layer (4-bit codes). There are as many biases as rows.

    Raises:
        TypeError: path is no path, or shapes no mapping of names to whole numbers.
        ValueError: shapes is empty or holds a shape of another kind; or the file is truncated, longer than it must
            be, or says what its layers cannot hold: too many entries, a position outside its layer, a codebook whose
            first value is not 0, a value that is not finite.
        OSError: the file cannot be read.

    Source:
        Han, Mao, Dally, Deep Compression (2015), section 2 and figure 2; the layout is that of decode.py, published
        beside the files (github.com/songhan/SqueezeNet-Deep-Compression). Where an odd number of entries leaves half
        a byte over, decode.py fails with today's numpy; here the half is passed over.
    """
    file = path_of("read_deep_compression", path)
    check_regular("read_deep_compression", "path", file)
    layers = _check_shapes(shapes)
    largest = COUNT_BYTES * len(layers) + sum(_layer_bytes(shape, prod(shape)) for shape in layers.values())
    with (
        naming("read_deep_compression", file, "name a file that can be read", "pass a .net file"),
        file.open("rb") as f,
    ):
        size = os.fstat(f.fileno()).st_size
        if size > largest:
            _refuse(file, f"have at most {largest} bytes for layers of these shapes", f"{size}")
        raw = np.frombuffer(f.read(size + 1), np.uint8)
    head = COUNT_BYTES * len(layers)
    if raw.size < head:
        _refuse(file, f"begin with {len(layers)} counts of 4 bytes", f"{raw.size} bytes")
    counts = dict(zip(layers, raw[:head].view("<u4").tolist(), strict=True))
    for name, shape in layers.items():
        if counts[name] > prod(shape):
            _refuse(file, f"hold at most {prod(shape)} entries for {name} of shape {list(shape)}", f"{counts[name]}")
    needed = head + sum(_layer_bytes(shape, counts[name]) for name, shape in layers.items())
    if raw.size != needed:
        _refuse(file, f"have {needed} bytes, as its counts and the layers' shapes add up to", f"{raw.size}")
    found = {}
    start = head
    for name, shape in layers.items():
        end = start + _layer_bytes(shape, counts[name])
        found[name] = _read_layer(file, name, shape, counts[name], raw[start:end])
        start = end
    return found


def write_deep_compression(path: str | PathLike[str], layers: Mapping[str, DeepCompressionLayer]) -> None:
    """Writes layers as a .net file, which read_deep_compression reads back to the same weights, codes and biases.

    Fillers are set by the authors' rule, so that their published files come out as they are, byte for byte. The file
    is written beside path under another name and moved into place whole.

    Args:
        path: the file; its folder must exist.
        layers: in the order of the network's description; the file keeps no names. DeepCompressionLayer.from_dense and
            from_sparse_codebook make them of weights with few values.

    Raises:
        TypeError: path is no path, or layers no mapping of names to DeepCompressionLayer.
        ValueError: layers is empty, or one of them does not fit the file: a codebook of more than 256 values for a
            convolution or 16 for a linear layer, positions that do not rise, numbers that are not finite.
        OSError: the file cannot be written.

    Source:
        Han, Mao, Dally, Deep Compression (2015), section 2 and figure 2, as read_deep_compression says.
    """
    where = "write_deep_compression"
    target = target_of(where, path)
    if not isinstance(layers, Mapping) or not all(
        isinstance(name, str) and isinstance(layer, DeepCompressionLayer) for name, layer in layers.items()
    ):
        raise TypeError(
            f"{where}: layers must map names to DeepCompressionLayer, got {layers!r:.80}; build them with from_dense"
        )
    if not layers:
        raise ValueError(f"{where}: layers must name a layer, got none; pass {{name: DeepCompressionLayer}}")
    counts, bodies = [], []
    for name, layer in layers.items():
        try:
            layer.validate()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: layers[{name!r}] must fit the file, got {error}") from error
        gaps, codes = layer._gaps()
        counts.append(gaps.size)
        packed = codes if _bits(layer.shape) == 8 else _pairs(codes)
        numbers = np.concatenate([layer.codebook.numpy(), layer.bias.detach().numpy()])
        bodies.append(numbers.astype("<f4").tobytes() + packed.tobytes() + _pairs(gaps).tobytes())
    write_whole(where, target, np.array(counts, "<u4").tobytes() + b"".join(bodies))


def _check_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    if not isinstance(shapes, Mapping):
        raise TypeError(
            f"read_deep_compression: shapes must be a mapping of names to shapes, got {type(shapes).__name__}; "
            "pass {name: weight.shape} in the file's order"
        )
    if not shapes:
        raise ValueError("read_deep_compression: shapes must name a layer, got none; pass {name: weight.shape}")
    checked = {}
    for name, shape in shapes.items():
        if not isinstance(name, str) or not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
            raise TypeError(
                f"read_deep_compression: shapes must map strings to whole numbers, got {name!r}: {shape!r}; "
                "pass {name: weight.shape}"
            )
        if len(shape) not in (2, 4) or min(shape) < 1 or prod(shape) > LARGEST_LAYER:
            raise ValueError(
                f"read_deep_compression: shapes must be [out, in] or [out, in, height, width] of fewer than 2**31 "
                f"weights, got {list(shape)} for {name}; pass the shape of the layer's weight"
            )
        checked[name] = tuple(shape)
    return checked


def _bits(shape: tuple[int, ...]) -> int:
    return 8 if len(shape) == 4 else 4


def _layer_bytes(shape: tuple[int, ...], entries: int) -> int:
    bits = _bits(shape)
    return FLOAT_BYTES * ((1 << bits) + shape[0]) + -(-entries * bits // 8) + -(-entries // 2)


def _read_layer(file: Path, name: str, shape: tuple[int, ...], entries: int, raw: Bytes) -> DeepCompressionLayer:
    """The layer in raw, whose size is right."""
    bits = _bits(shape)
    ends = np.cumsum([FLOAT_BYTES * 2**bits, FLOAT_BYTES * shape[0], -(-entries * bits // 8)])
    first, second, coded, gaps = np.split(raw, ends)
    codebook, bias = first.view("<f4"), second.view("<f4")
    codes = coded if bits == 8 else _halves(coded, entries)
    if not (np.isfinite(codebook).all() and np.isfinite(bias).all()):
        _refuse(file, f"hold finite numbers in the codebook and biases of {name}", "NaN or infinity")
    if codebook[0] != 0:
        _refuse(file, f"have 0 first in the codebook of {name}", f"{codebook[0]}")
    positions = np.cumsum(_halves(gaps, entries).astype(np.int64) + 1) - 1
    if entries and positions[-1] >= prod(shape):
        _refuse(file, f"keep the positions of {name} below {prod(shape)}", f"{positions[-1]}")
    kept = codes != 0
    return DeepCompressionLayer(
        shape,
        torch.from_numpy(positions[kept]),
        torch.from_numpy(codes[kept]),
        torch.from_numpy(codebook.astype(np.float32)),
        torch.from_numpy(bias.astype(np.float32)),
        entries,
    )


def _halves(packed: Bytes, count: int) -> Bytes:
    """The first count halves of bytes, low half first."""
    return np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count]


def _pairs(halves: Bytes) -> Bytes:
    """Two halves a byte, the first low; 0 where one is left over."""
    even = np.append(halves, np.zeros(halves.size % 2, np.uint8))
    return np.bitwise_or(even[::2], np.left_shift(even[1::2], 4)).astype(np.uint8)


def _refuse(file: Path, rule: str, came: str) -> None:
    raise ValueError(
        f"read_deep_compression: {file} must {rule}, got {came}; pass the shapes of its network, or download it again"
    )
