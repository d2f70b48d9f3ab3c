"""The layers that the benches run: sizes of published networks, and the sparse weights they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

DENSITIES = (0.03, 0.09, 0.2, 0.35)
ENTRIES = 31  # distinct values of a weight: 5 bits with the zero, as Deep Compression shares linear layers
TRAINED_VARIATION = 0.3

Pattern = Literal["random", "trained"]


@dataclass(frozen=True)
class Linear:
    """A linear layer, y = x @ W.T."""

    name: str
    out_features: int
    in_features: int

    kind = "linear"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out_features, self.in_features)

    def multiplies(self, batch: int, density: float) -> float:
        """Multiply-adds with the non-zero weights."""
        return batch * density * self.out_features * self.in_features

    def numbers_out(self, batch: int) -> int:
        """Of a result."""
        return batch * self.out_features

    def samples(self, batch: int) -> Tensor:
        """What goes in, float32 [batch, in]."""
        return torch.randn(batch, self.in_features, generator=torch.Generator().manual_seed(1))

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """The result in float64."""
        return x.double() @ weight.double().T


@dataclass(frozen=True)
class Conv:
    """A two-dimensional convolution of square images with padding kernel // 2."""

    name: str
    out_channels: int
    in_channels: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1
    padded: bool = True

    kind = "conv"

    @property
    def padding(self) -> int:
        """Rows and columns of zeros around an image."""
        return self.kernel // 2 if self.padded else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)

    @property
    def out_size(self) -> int:
        """Rows and columns of a result."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def multiplies(self, batch: int, density: float) -> float:
        """Multiply-adds with the non-zero weights, those with padding included."""
        weights = self.out_channels * self.in_channels // self.groups * self.kernel**2
        return batch * density * weights * self.out_size**2

    def numbers_out(self, batch: int) -> int:
        """Of a result."""
        return batch * self.out_channels * self.out_size**2

    def samples(self, batch: int) -> Tensor:
        """What goes in, float32 [batch, channels, size, size], contiguous."""
        shape = (batch, self.in_channels, self.size, self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """The result in float64."""
        return functional.conv2d(
            x.double(), weight.double(), stride=self.stride, padding=self.padding, groups=self.groups
        )


@dataclass(frozen=True)
class Flat(Conv):
    """Stages of flattened convolutions as large as their input, in the place of a dense one of this kernel.

    A weight is float32 [stages, channels, channels + 2 * kernel + 3]: for each map its lateral, vertical and horizontal
    filter and its three biases; or, of four dimensions, that of the dense convolution.
    """

    stages: int = 2

    kind = "flat"

    def multiplies(self, batch: int, density: float) -> float:
        """Multiply-adds of all stages."""
        return batch * density * self.stages * self.numbers_out(1) * (self.in_channels + 2 * self.kernel)

    def parts(self, weight: Tensor) -> list[list[Tensor]]:
        """For each stage lateral, vertical and horizontal filters and the biases after each."""
        widths = [self.in_channels, self.kernel, self.kernel, 1, 1, 1]
        return [[part.squeeze(1) for part in stage.split(widths, 1)] for stage in weight]

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """The result in float64, of one convolution after the other."""
        if weight.dim() == 4:
            return super().reference(x, weight)
        y = x.double()
        for lateral, vertical, horizontal, *biases in self.parts(weight.double()):
            y = functional.conv2d(y, lateral[:, :, None, None], biases[0])
            ends, channels = self.padding, self.in_channels
            y = functional.conv2d(y, vertical[:, None, :, None], biases[1], padding=(ends, 0), groups=channels)
            y = functional.conv2d(y, horizontal[:, None, None], biases[2], padding=(0, ends), groups=channels)
        return y


Case = Linear | Conv

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Linear("alexnet fc6", 4096, 9216),
        Linear("alexnet fc7", 4096, 4096),
        Linear("alexnet fc8", 1000, 4096),
        Linear("vgg16 fc6", 4096, 25088),
        Linear("resnet50 1x1 as linear", 512, 2048),
        Linear("transformer ffn up", 3072, 768),
        Linear("transformer ffn down", 768, 3072),
        Linear("large transformer ffn", 11008, 4096),
        Linear("mobilenet pointwise as linear", 512, 512),
        Linear("square 1024", 1024, 1024),
        Linear("1024 from 512", 1024, 512),
        Linear("256 from 2304", 256, 2304),
        Conv("alexnet conv2", 256, 96, 5, 27, groups=2),
        Conv("alexnet conv3", 384, 256, 3, 13),
        Conv("alexnet conv4", 384, 384, 3, 13, groups=2),
        Conv("alexnet conv5", 256, 384, 3, 13, groups=2),
        Conv("vgg16 conv3_1", 256, 128, 3, 56),
        Conv("resnet 64 at 56", 64, 64, 3, 56),
        Conv("resnet 128 at 28", 128, 128, 3, 28),
        Conv("128 at 56", 128, 128, 3, 56),
        Conv("resnet 256 at 14", 256, 256, 3, 14),
        Conv("resnet 512 at 7", 512, 512, 3, 7),
        Conv("squeezenet fire9 expand", 256, 64, 3, 13),
        Conv("squeezenet fire9 squeeze", 64, 512, 1, 13),
        Conv("mobilenet pointwise at 14", 512, 512, 1, 14),
    )
}

FLATS: dict[str, Flat] = {
    f"flat {channels} {kernel}x{kernel} at {size}": Flat(
        f"flat {channels} {kernel}x{kernel} at {size}", channels, channels, kernel, size
    )
    for channels, kernel, size in (
        *((channels, kernel, 14) for kernel in (5, 3) for channels in (96, 128, 256)),
        *((channels, kernel, 56) for kernel in (5, 3) for channels in (96, 128)),
        (128, 5, 32),
        (96, 3, 32),
        (256, 3, 56),
    )
}


def flat_weight(case: Flat) -> Tensor:
    """Random filters under which images keep their size, always the same for the same case."""
    generator = torch.Generator().manual_seed(0)
    channels, kernel = case.in_channels, case.kernel
    weight = torch.randn(case.stages, channels, channels + 2 * kernel + 3, generator=generator)
    weight[:, :, :channels] /= channels**0.5
    weight[:, :, channels : channels + 2 * kernel] /= kernel**0.5
    return weight


def weight_of(case: Case, density: float, pattern: Pattern) -> Tensor:
    """A weight of the case's shape with about that density, always the same for the same arguments.

    The non-zeros are one of 31 values that bfloat16 holds exactly, so that one weight serves every format: formats
    that store a value for each non-zero do not see that values repeat.

    Pattern: random keeps each weight with the probability density; trained with density * r * c, where r of the row
    and c of the column are log-normal of mean 1 and coefficient of variation 0.3 (as the row lengths of trained layers
    pruned by magnitude vary).
    """
    rows, columns = case.shape[0], torch.Size(case.shape[1:]).numel()
    generator = torch.Generator().manual_seed(0)
    probability = torch.full((rows, 1), density)
    if pattern == "trained":
        probability = density * _varying(rows, generator)[:, None] * _varying(columns, generator)
        probability = (probability * (density / probability.clamp(max=1).mean())).clamp(max=1)
    kept = torch.rand(rows, columns, generator=generator) < probability
    values = (torch.randn(ENTRIES, generator=generator) / columns**0.5).bfloat16().float()
    codes = torch.randint(ENTRIES, (int(kept.sum()),), generator=generator)
    weight = torch.zeros(rows, columns)
    weight[kept] = values[codes]
    return weight.reshape(case.shape)


def row_variation(weight: Tensor) -> float:
    """Coefficient of variation of the rows' numbers of non-zeros."""
    lengths = (weight != 0).flatten(1).sum(1).float()
    return (lengths.std(correction=0) / lengths.mean()).item() if len(lengths) else 0.0


def _varying(count: int, generator: torch.Generator) -> Tensor:
    sigma = torch.tensor(1 + TRAINED_VARIATION**2).log().sqrt()
    return torch.exp(sigma * torch.randn(count, generator=generator) - sigma**2 / 2)
