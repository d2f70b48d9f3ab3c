"""What every convolution shares: its sizes, checked, its dense form's, and how images of any rank reach its op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

Sizes = int | Sequence[int]


class ConvSizes:
    """Sizes under the names that torch.nn.Conv2d gives them, for a convolution of `dims` dimensions."""

    dims: ClassVar[int]

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    in_channels: int
    out_channels: int
    groups: int
    bias: Any

    def _set_sizes(
        self,
        shape: tuple[int, int],
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes | str,
        dilation: Sizes,
        groups: int,
        padding_mode: str,
    ) -> None:
        """Of a weight of this shape, [out_channels, in_channels / groups * taps]."""
        self.kernel_size = self._checked_sizes("kernel_size", kernel_size, 1)
        self.stride = self._checked_sizes("stride", stride, 1)
        self.dilation = self._checked_sizes("dilation", dilation, 1)
        self.padding = self._check_padding(padding)
        self.padding_mode = self._check_padding_mode(padding_mode)
        self.out_channels, columns = shape
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
        self._geometry = (self._kernel, self._stride, self._padding, self._dilation, self.groups)

    def _own_sizes(self) -> dict[str, Any]:
        """The sizes under the names that constructors take, where they differ from the defaults."""
        usual = {
            "stride": (1,) * self.dims,
            "padding": (0,) * self.dims,
            "dilation": (1,) * self.dims,
            "groups": 1,
            "padding_mode": "zeros",
        }
        own = {name: getattr(self, name) for name in ("in_channels", "out_channels", "kernel_size")}
        return own | {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}

    def _dense(self, make: Any) -> Any:
        """A plain convolution of these sizes, without data."""
        return make(
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

    def _convolve(self, input: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """What run makes of input, which it gets as [N, in_channels, H, W], padded unless the op pads."""
        if input.dim() not in (self.dims + 1, self.dims + 2) or input.shape[-1 - self.dims] != self.in_channels:
            sizes = ", ".join("LHW"[:1] if self.dims == 1 else "HW")
            raise ValueError(
                f"{type(self).__name__}: input must be [N, {self.in_channels}, {sizes}] or [{self.in_channels}, "
                f"{sizes}], got shape {tuple(input.shape)}; reshape it"
            )
        x = pad(input, self._pad_first, PADDING_MODES[self.padding_mode]) if self._pad_first else input
        batched = input.dim() == self.dims + 2
        if not batched:
            x = x.unsqueeze(0)
        if self.dims == 1:
            x = x.unsqueeze(2)
        y = run(x)
        if self.dims == 1:
            y = y.squeeze(2)
        return y if batched else y.squeeze(0)

    def _shown_sizes(self) -> list[str]:
        """For extra_repr."""
        one = (1,) * self.dims
        shown: list[str] = [f"{self.in_channels}, {self.out_channels}"]
        shown += [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if self.padding not in ((0,) * self.dims, "valid"):
            shown.append(f"padding={self.padding!r}")
        shown += [f"dilation={self.dilation}"] * (self.dilation != one) + [f"groups={self.groups}"] * (self.groups != 1)
        return shown + [f"padding_mode={self.padding_mode!r}"] * (self.padding_mode != "zeros")

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
