"""What every convolution shares: its sizes, checked, its dense form's, and how images of any rank reach its op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, Required, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tersetorch.nn.dense_form import DenseForm, changed

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

Sizes = int | Sequence[int]
Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d)


class ZeroPadded(TypedDict, total=False):
    """What constructors take of a convolution's sizes, as torch.nn.Conv2d takes them."""

    kernel_size: Required[Sizes]
    stride: Sizes
    padding: Sizes | str
    dilation: Sizes
    groups: int


class ConvOptions(ZeroPadded, total=False):
    """The same, with padding of other kinds."""

    padding_mode: str


# Names and defaults of what a plain convolution has beside its channels and kernel.
_USUAL: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


class ConvSizes(DenseForm[Conv]):
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

    def _set_sizes(
        self,
        shape: tuple[int, int],
        *,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
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

    @classmethod
    def _split_sizes(
        cls, in_channels: int, out_channels: int, kernel_size: Sizes, groups: int = 1, **more: Any
    ) -> tuple[tuple[int, int], dict[str, Any]]:
        taps = prod(cls._checked_sizes("kernel_size", kernel_size, 1))
        columns = in_channels // max(1, groups) * taps
        return (out_channels, columns), {"kernel_size": kernel_size, "groups": groups, **more}

    @classmethod
    def _sizes_of(cls, module: Any) -> dict[str, Any]:
        return {name: getattr(module, name) for name in ("kernel_size", *_USUAL)}

    def _own_sizes(self) -> dict[str, Any]:
        one = (1,) * self.dims
        usual = {**_USUAL, "stride": one, "padding": (0,) * self.dims, "dilation": one}
        own = {name: getattr(self, name) for name in ("in_channels", "out_channels", "kernel_size")}
        return own | changed(self, usual)

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the dense weight, [out_channels, in_channels / groups, *kernel_size]."""
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def _dense(self) -> Any:
        of: Any = self
        sizes = {name: getattr(self, name) for name in ("in_channels", "out_channels", "kernel_size", *_USUAL)}
        return self.dense_type(**sizes, bias=of.bias is not None, device="meta")

    def _convolve(self, input: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """What run makes of input, which it gets as [N, in_channels, H, W], padded unless the op pads."""
        self._check_images(input)
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

    def _check_images(self, input: Tensor) -> None:
        """Refuses what is no tensor, or has other channels or dimensions."""
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(input).__name__}; pass a torch.Tensor"
            )
        if input.dim() not in (self.dims + 1, self.dims + 2) or input.shape[-1 - self.dims] != self.in_channels:
            sizes = ", ".join("LHW"[:1] if self.dims == 1 else "HW")
            raise ValueError(
                f"{type(self).__name__}: input must be [N, {self.in_channels}, {sizes}] or [{self.in_channels}, "
                f"{sizes}], got shape {tuple(input.shape)}; reshape it"
            )

    def _shown_sizes(self) -> list[str]:
        one = (1,) * self.dims
        shown: list[str] = [f"{self.in_channels}, {self.out_channels}"]
        shown += [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if self.padding not in ((0,) * self.dims, "valid"):
            shown.append(f"padding={self.padding!r}")
        shown += [f"dilation={self.dilation}"] * (self.dilation != one) + [f"groups={self.groups}"] * (self.groups != 1)
        return shown + [f"padding_mode={self.padding_mode!r}"] * (self.padding_mode != "zeros")

    # ---- checks

    @classmethod
    def _checked_sizes(cls, name: str, value: Sizes, least: int) -> tuple[int, ...]:
        sizes = tuple(value) if isinstance(value, Sequence) else (value,) * cls.dims
        if len(sizes) != cls.dims or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
            raise TypeError(
                f"{cls.__name__}: {name} must be an int or {cls.dims} of them, got {value!r}; "
                "pass that of the dense layer"
            )
        if min(sizes) < least:
            raise ValueError(
                f"{cls.__name__}: {name} must be at least {least}, got {value!r}; pass that of the dense layer"
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
