"""What every convolution over a sparse format shares: its dense form, its checks, its layouts and how it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn
from torch.nn.functional import pad

from tersetorch import ops
from tersetorch.nn.layout import Layout
from tersetorch.nn.sparse_module import Format, SparseModule

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

Sizes = int | Sequence[int]


@dataclass(frozen=True)
class DirectWeight:
    """A weight as ops.sparse_conv2d_packed takes it: numbers are values, or codes where there is a codebook."""

    blocks: Tensor
    segments: Tensor
    indices: Tensor
    numbers: Tensor
    codebook: Tensor | None


def _pack_direct(layer: SparseConvBase[Any]) -> DirectWeight:
    blocks, segments, indices, sources = ops.sparse_conv2d_pack(
        layer.row_offsets,
        layer.col_indices,
        layer.in_channels,
        layer._channel_block,
        layer._kernel,
        layer._stride,
        layer._dilation,
        layer.groups,
    )
    numbers: Tensor = getattr(layer, layer.packed_field)
    codebook = layer._own("codebook")
    return DirectWeight(blocks, segments, indices, numbers.detach().index_select(0, sources), codebook)


def _direct(layer: SparseConvBase[Any]) -> tuple[Any, ...]:
    buffers: Any = layer._buffers
    parameters: Any = layer._parameters
    return (
        buffers["packed_blocks"],
        buffers["packed_segments"],
        buffers["packed_indices"],
        buffers["packed_numbers"],
        parameters["bias"],
        parameters["codebook"][0] if "codes" in buffers else None,
        layer.out_channels,
        layer._channel_block,
        *layer._geometry,
        layer.relu,
    )


@dataclass(frozen=True)
class WordsWeight:
    """A rounded weight as ops.sparse_conv2d_packed takes it, words of channel_block to a block."""

    blocks: Tensor
    segments: Tensor
    indices: Tensor
    words: Tensor
    row_scales: Tensor | None
    row_sums: Tensor | None
    channel_block: int


def _pack_words(mode: str, layer: SparseConvBase[Any]) -> WordsWeight:
    sizes = (layer._kernel, layer._stride, layer._dilation)
    channel_block = ops.sparse_conv2d_channel_block(layer.in_channels, *sizes, layer.groups, mode)
    values, codebook = layer._numbers()
    if codebook is not None:
        values = codebook.detach().index_select(0, values.int())
    packed = ops.sparse_conv2d_pack_words(
        layer.row_offsets,
        layer.col_indices,
        values.detach(),
        layer.in_channels,
        channel_block,
        *sizes,
        layer.groups,
        mode,
    )
    return WordsWeight(*packed, channel_block)


def _words(layer: SparseConvBase[Any]) -> tuple[Any, ...]:
    buffers: Any = layer._buffers
    return (
        buffers["packed_blocks"],
        buffers["packed_segments"],
        buffers["packed_indices"],
        buffers["packed_words"],
        layer._parameters["bias"],
        None,
        layer.out_channels,
        layer._sizes["channel_block"],
        *layer._geometry,
        layer.relu,
        buffers.get("packed_row_scales"),
        buffers.get("packed_row_sums"),
    )


LAYOUTS = {
    "direct": Layout(_pack_direct, "sparse_conv2d_packed", _direct),
    "direct_int8": Layout(partial(_pack_words, "int8"), "sparse_conv2d_packed", _words),
    "direct_bfloat16": Layout(partial(_pack_words, "bfloat16"), "sparse_conv2d_packed", _words),
}


class SparseConvBase(SparseModule[Format]):
    """A convolution whose weight, flattened to [out_channels, in_channels / groups * taps], is kept in a sparse format.

    Its sizes have the names that torch.nn.Conv2d gives them. In evaluation mode it computes without gradients from the
    layout "direct"; in training mode a call without gradients lays the weight out for itself.
    """

    layouts = LAYOUTS
    plain_layout = "direct"
    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]
    dims: ClassVar[int]

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    in_channels: int
    out_channels: int
    groups: int

    def __init__(
        self,
        weight: Format,
        bias: Tensor | None = None,
        *,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        relu: bool = False,
    ) -> None:
        super().__init__(weight, bias, relu)
        self.kernel_size = self._checked_sizes("kernel_size", kernel_size, 1)
        self.stride = self._checked_sizes("stride", stride, 1)
        self.dilation = self._checked_sizes("dilation", dilation, 1)
        self.padding = self._check_padding(padding)
        self.padding_mode = self._check_padding_mode(padding_mode)
        self.out_channels, columns = weight.shape
        self.groups = self._check_groups(groups, columns)
        self.in_channels = columns // prod(self.kernel_size) * self.groups
        # As the op takes them: always two-dimensional, the padding the same on both sides and of zeros. Where the
        # layer's is not, forward pads first.
        self._kernel = self._as_pair(self.kernel_size)
        self._stride = self._as_pair(self.stride)
        self._dilation = self._as_pair(self.dilation)
        sides = self._pad_sides()
        native = self.padding_mode == "zeros" and sides[0::2] == sides[1::2]
        self._padding = [0] * (2 - self.dims) + (sides[-1::-2] if native else [0] * self.dims)
        self._pad_first = [] if native or not any(sides) else sides
        self._channel_block = ops.sparse_conv2d_channel_block(
            self.in_channels, self._kernel, self._stride, self._dilation
        )
        self._geometry = (self._kernel, self._stride, self._padding, self._dilation, self.groups)

    @classmethod
    def from_dense(cls, module: nn.Conv1d | nn.Conv2d) -> Self:
        """The layer that computes what module computes, from the non-zeros of its weight.

        Raises:
            TypeError: module is not of the layer's dense type, or its weight is neither float32 nor bfloat16.
            ValueError: the format cannot hold the weight.
            RuntimeError: the kernel is too large for the layout.
        """
        if not isinstance(module, cls.dense_type):
            raise TypeError(
                f"{cls.__name__}: module must be an nn.{cls.dense_type.__name__}, got {type(module).__name__}; "
                "pass a layer"
            )
        bias = None if module.bias is None else module.bias.detach().clone()
        layer = cls(
            cast(Format, cls.format.from_dense(module.weight.detach().flatten(1))),
            bias,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
        )
        return layer.train(module.training)

    def to_dense(self) -> nn.Conv1d | nn.Conv2d:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        make: Any = self.dense_type
        dense: nn.Conv1d | nn.Conv2d = make(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
        return self._filled(dense)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_channels, in_channels / groups, *kernel_size], built anew at every read."""
        return super().weight.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels // self.groups * prod(self.kernel_size)

    def pack(self, layout: str, **options: Any) -> Self:
        """Computes without gradients from another layout of the weight from now on; returns the layer.

        In training mode the layout is remembered, and built by eval().

        Args:
            layout: one of
                "direct": the weight as it is, which undoes an earlier pack();
                "direct_int8": each filter and each image rounded to 8 bits;
                "direct_bfloat16": both rounded to bfloat16; fast where the CPU multiplies bfloat16 (level avx512bf16).
                ops.sparse_conv2d says how far y may then lie off; .weight stays exact.
            options: none.

        Raises:
            ValueError: no such layout, or a weight that it cannot hold; nothing has changed then.
            TypeError: an option was given.
        """
        if options:
            raise TypeError(
                f"{type(self).__name__}: layout {layout!r} takes no options, got {', '.join(options)}; leave them out"
            )
        return super().pack(layout)

    # ---- running

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, *sizes] or [in_channels, *sizes]."""
        self._check_input(input)
        x = pad(input, self._pad_first, PADDING_MODES[self.padding_mode]) if self._pad_first else input
        batched = input.dim() == self.dims + 2
        if not batched:
            x = x.unsqueeze(0)
        if self.dims == 1:
            x = x.unsqueeze(2)
        y = self._run(x)
        if self.dims == 1:
            y = y.squeeze(2)
        return y if batched else y.squeeze(0)

    def _recorded(self, x: Tensor) -> Tensor:
        values, codebook = self._numbers()
        return ops.sparse_conv2d(
            x,
            self.row_offsets,
            self.col_indices,
            values,
            self.bias,
            codebook,
            kernel_size=self._kernel,
            stride=self._stride,
            padding=self._padding,
            dilation=self._dilation,
            groups=self.groups,
            relu=self.relu,
        )

    def _from_rows(self, x: Tensor) -> Tensor:
        values, codebook = self._numbers()
        return ops.sparse_conv2d_inference(
            x, self.row_offsets, self.col_indices, values, self.bias, codebook, *self._geometry, self.relu
        )

    # ---- checks

    def _checked_sizes(self, name: str, value: Sizes, least: int) -> tuple[int, ...]:
        sizes = (value,) * self.dims if isinstance(value, int) else tuple(value)
        if len(sizes) != self.dims or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
            raise TypeError(
                f"{type(self).__name__}: {name} must be an int or {self.dims} of them, got {value!r}; "
                "pass that of the dense layer"
            )
        if min(sizes) < least:
            raise ValueError(
                f"{type(self).__name__}: {name} must be at least {least}, got {value!r}; pass that of the dense layer"
            )
        return sizes

    def _as_pair(self, sizes: Sequence[int]) -> list[int]:
        return [1] * (2 - self.dims) + list(sizes)

    def _check_padding(self, padding: Sizes | str) -> tuple[int, ...] | str:
        if not isinstance(padding, str):
            return self._checked_sizes("padding", padding, 0)
        if padding not in ("same", "valid") or (padding == "same" and any(n != 1 for n in self.stride)):
            raise ValueError(
                f"{type(self).__name__}: padding must be numbers, 'valid', or 'same' for a stride of 1, got "
                f"{padding!r} with stride {self.stride}; pass that of the dense layer"
            )
        return padding

    def _check_padding_mode(self, mode: str) -> str:
        if mode not in PADDING_MODES:
            raise ValueError(
                f"{type(self).__name__}: padding_mode must be one of {list(PADDING_MODES)}, got {mode!r}; choose one"
            )
        return mode

    def _check_groups(self, groups: int, columns: int) -> int:
        taps = prod(self.kernel_size)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or self.out_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: groups must divide out_channels, got {groups!r} for {self.out_channels}; "
                "pass that of the dense layer"
            )
        if columns % taps:
            raise ValueError(
                f"{type(self).__name__}: weight must have a multiple of {taps} columns, the taps of kernel_size "
                f"{self.kernel_size}, got {columns}; flatten the dense weight from its second dimension on"
            )
        return groups

    def _pad_sides(self) -> list[int]:
        """Padding on both sides of each dimension, the last dimension first, as F.pad takes it."""
        sides: list[int] = []
        for i in reversed(range(self.dims)):
            if isinstance(self.padding, tuple):
                sides += [self.padding[i]] * 2
            else:
                total = self.dilation[i] * (self.kernel_size[i] - 1) if self.padding == "same" else 0
                sides += [total // 2, total - total // 2]
        return sides

    def _check_input(self, x: Any) -> None:
        self._check_tensor(x)
        if x.dim() not in (self.dims + 1, self.dims + 2) or x.shape[-1 - self.dims] != self.in_channels:
            sizes = ", ".join("LHW"[:1] if self.dims == 1 else "HW")
            raise ValueError(
                f"{type(self).__name__}: input must be [N, {self.in_channels}, {sizes}] or [{self.in_channels}, "
                f"{sizes}], got shape {tuple(x.shape)}; reshape it"
            )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        one = (1,) * self.dims
        shown: list[str] = [f"{self.in_channels}, {self.out_channels}"]
        shown += [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if self.padding not in ((0,) * self.dims, "valid"):
            shown.append(f"padding={self.padding!r}")
        shown += [f"dilation={self.dilation}"] * (self.dilation != one) + [f"groups={self.groups}"] * (self.groups != 1)
        if self.padding_mode != "zeros":
            shown.append(f"padding_mode={self.padding_mode!r}")
        shown += [f"bias={self.bias is not None}", f"nnz={self.col_indices.numel()}"]
        if self._layout != self.plain_layout:
            shown.append(f"layout={self._layout}")
        return ", ".join(shown + ["relu=True"] * self.relu)
