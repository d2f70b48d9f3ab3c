"""What every convolution over a sparse format shares: its dense form, its checks, its layouts and how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self, Unpack

from torch import Tensor

from tersetorch import ops
from tersetorch.nn.conv_sizes import Conv, ConvOptions, ConvSizes
from tersetorch.nn.layout import Layout
from tersetorch.nn.sparse_module import Format, SparseModule


@dataclass(frozen=True)
class DirectWeight:
    """A weight as ops.sparse_conv2d_packed takes it: numbers are values, or codes where there is a codebook."""

    blocks: Tensor
    segments: Tensor
    indices: Tensor
    numbers: Tensor
    codebook: Tensor | None


def _pack_direct(layer: SparseConvBase[Any, Any]) -> DirectWeight:
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


def _direct(layer: SparseConvBase[Any, Any]) -> tuple[Any, ...]:
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


def _pack_words(mode: str, layer: SparseConvBase[Any, Any]) -> WordsWeight:
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


def _words(layer: SparseConvBase[Any, Any]) -> tuple[Any, ...]:
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
    "direct": Layout(_pack_direct, "sparse_conv2d_packed", _direct, on_cpu=True),
    "direct_int8": Layout(partial(_pack_words, "int8"), "sparse_conv2d_packed", _words, on_cpu=True),
    "direct_bfloat16": Layout(partial(_pack_words, "bfloat16"), "sparse_conv2d_packed", _words, on_cpu=True),
}


class SparseConvBase(ConvSizes[Conv], SparseModule[Format]):
    """A convolution whose weight, flattened to [out_channels, in_channels / groups * taps], is kept in a sparse format.

    Its sizes have the names that torch.nn.Conv2d gives them. In evaluation mode it computes without gradients from the
    layout "direct"; in training mode a call without gradients lays the weight out for itself.
    """

    layouts = LAYOUTS
    plain_layout = "direct"

    def __init__(
        self, weight: Format, bias: Tensor | None = None, *, relu: bool = False, **sizes: Unpack[ConvOptions]
    ) -> None:
        super().__init__(weight, bias, relu, **sizes)
        self._channel_block = ops.sparse_conv2d_channel_block(
            self.in_channels, self._kernel, self._stride, self._dilation
        )

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
        self._check_tensor(input)
        return self._convolve(input, self._run)

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
