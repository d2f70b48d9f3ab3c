"""Layers whose weight is a product of two thin factors, each a plain layer that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor, nn

from tersetorch.nn.low_rank_factors import Form, split, unfold, unfolded_shape

Size = int | Sequence[int]


class LowRankModule(nn.Module):
    """y = second(first(input)), whose bias is the second factor's.

    The factors are children, so that whatever works on plain layers works on them: pruning, sharing, conversion,
    counting and files.
    """

    first: Any
    second: Any
    rank: int

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        return cast(Tensor, self.second(self.first(input)))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, a parameter of the second factor."""
        return cast("nn.Parameter | None", self.second.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out anew at every read; its gradient reaches the factors."""
        return self._composed(self.first.weight, self.second.weight)

    def _composed(self, first: Tensor, second: Tensor) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws factors whose product has the variance that the dense layer's weight is drawn with, 1 / (3 fan_in)."""
        # Each of its numbers is a sum of `rank` products, one factor of variance 1 / (3 fan_in), the other of 1 / rank.
        bound = 1 / math.sqrt(self.weight_shape[1:].numel())
        nn.init.uniform_(self.first.weight, -bound, bound)
        nn.init.uniform_(self.second.weight, -math.sqrt(3 / self.rank), math.sqrt(3 / self.rank))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight_shape(self) -> torch.Size:
        """The dense weight's shape."""
        raise NotImplementedError

    @torch.no_grad()
    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Takes left [rows, rank] and right [rank, columns], factors of the weight as a matrix, as the weights."""
        self.first.weight.copy_(self._first_weight(right))
        self.second.weight.copy_(self._second_weight(left))

    def _take(self, module: nn.Linear | nn.Conv2d) -> Self:
        """Made on device meta, takes module's device, bias and flags; the factors have no numbers yet."""
        self.to_empty(device=module.weight.device)
        for factor in (self.first, self.second):
            factor.weight.requires_grad_(module.weight.requires_grad)
        self.second.bias = module.bias
        return self.train(module.training)

    def _nearest(self, weight: Tensor) -> Self:
        """Takes the factors nearest to weight."""
        self.set_factors(*split(unfold(weight.detach(), self._form), self.rank))
        return self

    _form: Form = "filters"

    def _first_weight(self, right: Tensor) -> Tensor:
        return right.view_as(self.first.weight)

    def _second_weight(self, left: Tensor) -> Tensor:
        return left.view_as(self.second.weight)

    def _fill(self, dense: Any) -> Any:
        """Dense with the weight multiplied out in float64, and a copy of the bias."""
        with torch.no_grad():
            factors = self.first.weight.detach(), self.second.weight.detach()
            weight = self._composed(factors[0].double(), factors[1].double()).to(factors[1].dtype)
        dense.weight = nn.Parameter(weight.contiguous(), requires_grad=self.second.weight.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)


class LowRankLinear(LowRankModule):
    """y = (input @ first.weight.T) @ second.weight.T + bias: nn.Linear of weight second.weight @ first.weight.

    Shapes: input [..., in_features] -> y [..., out_features], as nn.Linear; first.weight [rank, in_features],
    second.weight [out_features, rank], second.bias [out_features] or None. It takes rank * (in_features +
    out_features) weights, and as many multiply-accumulates a sample.

    Args:
        in_features: at least 1.
        out_features: at least 1.
        rank: 1 to min(in_features, out_features).
        bias: whether a bias is added.
        device: of the factors.
        dtype: of the factors.

    Raises:
        TypeError: a size is no int.
        ValueError: rank or another size is outside its range.

    Source:
        Denton, Zaremba, Bruna, LeCun, Fergus, Exploiting linear structure within convolutional networks for efficient
        evaluation (2014), section 3.2, which folds the singular values into one factor; here each has their roots.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_size(where, "in_features", in_features)
        check_size(where, "out_features", out_features)
        check_size(where, "rank", rank, min(in_features, out_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, False, device, dtype)
        self.second = nn.Linear(rank, out_features, bias, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, module: nn.Linear, rank: int) -> Self:
        """The layer of that rank nearest to module's in squared error of the weight, with module's own bias.

        Raises:
            TypeError: module is not an nn.Linear, or rank no int.
            ValueError: rank is outside 1 to min(in_features, out_features), or the weight is not finite.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.__name__}: module must be an nn.Linear, got {type(module).__name__}; pass a layer")
        return cls.like(module, rank)._nearest(module.weight)

    @classmethod
    def like(cls, module: nn.Linear, rank: int) -> Self:
        """A layer for the place of module, with its bias and flags, whose factors have no numbers yet."""
        has_bias, dtype = module.bias is not None, module.weight.dtype
        return cls(module.in_features, module.out_features, rank, has_bias, "meta", dtype)._take(module)

    def to_dense(self) -> nn.Linear:
        """The plain layer with the factors multiplied out."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return cast(nn.Linear, self._fill(dense))

    @property
    def weight_shape(self) -> torch.Size:
        """The dense weight's shape, [out_features, in_features]."""
        return torch.Size((self.out_features, self.in_features))

    def _composed(self, first: Tensor, second: Tensor) -> Tensor:
        return second @ first

    def extra_repr(self) -> str:
        """The sizes."""
        shown = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{shown}, bias={self.bias is not None}"

    @property
    def sizes(self) -> dict[str, Any]:
        """What the constructor takes to make a layer of the same sizes."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
        return sizes if self.bias is not None else {**sizes, "bias": False}


class ConvLike(nn.Module):
    """What convolutions of several factors hold under nn.Conv2d's names; groups is 1."""

    groups = 1

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str

    def _set_sizes(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        padding_mode: str,
    ) -> None:
        """Checked as nn.Conv2d checks them, which a layer on device meta does."""
        check_size(type(self).__name__, "in_channels", in_channels)
        check_size(type(self).__name__, "out_channels", out_channels)
        like: Any = nn.Conv2d(
            in_channels,
            out_channels,
            _pair(kernel_size),
            _pair(stride),
            padding if isinstance(padding, str) else _pair(padding),
            _pair(dilation),
            padding_mode=cast(Any, padding_mode),
            device="meta",
        )
        for name in CONV_SIZES:
            setattr(self, name, getattr(like, name))

    @property
    def weight_shape(self) -> torch.Size:
        """The dense weight's shape, [out_channels, in_channels, *kernel_size]."""
        return torch.Size((self.out_channels, self.in_channels, *self.kernel_size))

    def _dense(self, bias: bool) -> nn.Conv2d:
        """A plain convolution of these sizes, without data."""
        sizes: dict[str, Any] = {name: getattr(self, name) for name in CONV_SIZES}
        return nn.Conv2d(**sizes, bias=bias, device="meta")

    def _own_sizes(self) -> dict[str, Any]:
        """The sizes under the names that constructors take, where they differ from the defaults."""
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "padding_mode": "zeros"}
        sizes = {name: getattr(self, name) for name in CONV_SIZES}
        return {name: value for name, value in sizes.items() if name not in usual or value != usual[name]}

    def _shown_sizes(self) -> str:
        sizes = self._own_sizes()
        shown = f"{sizes.pop('in_channels')}, {sizes.pop('out_channels')}"
        return ", ".join([shown, *(f"{name}={value!r}" for name, value in sizes.items())])


class LowRankConv2d(ConvLike, LowRankModule):
    """A convolution by two: y = conv2d(input, W) + bias with a weight W of low rank as a matrix; the factors train.

    Two forms, with R = rank, C = in_channels, F = out_channels, kernel_size (kh, kw):

        "filters"    W[f, (c, y, x)] = sum_r second[f, r] first[r, (c, y, x)]: a kh x kw convolution of R filters, then
                     a 1x1 convolution; R (C kh kw + F) weights, R at most min(F, C kh kw).
        "separable"  W[(f, x), (c, y)] = sum_r second[(f, x), r] first[r, (c, y)]: a kh x 1 convolution of R filters,
                     then a 1 x kw convolution; R (C kh + F kw) weights, R at most min(F kw, C kh).

    Stride, padding of any mode and dilation are the dense layer's: in the second form each factor has those of its own
    dimension. Shapes: as nn.Conv2d, with or without the batch dimension.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as
            nn.Conv2d takes them; there are no groups.
        rank: as above.
        form: "filters" or "separable".

    Raises:
        TypeError: a size is no int.
        ValueError: rank or another size is outside its range, or form or padding_mode is none of those there are.

    Source:
        Denton et al., Exploiting linear structure within convolutional networks (2014), section 3.2; the second form:
        Jaderberg, Vedaldi, Zisserman, Speeding up convolutional neural networks with low rank expansions (2014),
        scheme 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        form: Form = "filters",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if form not in get_args(Form):
            raise ValueError(f"{where}: form must be one of {list(get_args(Form))}, got {form!r}; choose one of them")
        self._set_sizes(in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode)
        self.form: Form = form
        check_size(where, "rank", rank, min(unfolded_shape(self.weight_shape, form)))
        self.rank = rank
        made = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        # Typed loosely: torch's own stubs ask for pairs of known length.
        make: Any = nn.Conv2d
        if form == "filters":
            sizes = self.kernel_size, self.stride, self.padding, self.dilation
            self.first = make(in_channels, rank, *sizes, bias=False, **made)
            self.second = make(rank, out_channels, 1, bias=bias, device=device, dtype=dtype)
        else:
            down, across = (
                (self.padding,) * 2 if isinstance(self.padding, str) else ((self.padding[0], 0), (0, self.padding[1]))
            )
            self.first = make(in_channels, rank, (kh, 1), (sh, 1), down, (dh, 1), bias=False, **made)
            self.second = make(rank, out_channels, (1, kw), (1, sw), across, (1, dw), bias=bias, **made)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, module: nn.Conv2d, rank: int, form: Form = "filters") -> Self:
        """The layer of that rank nearest to module's in squared error of the weight, with module's own bias.

        Raises:
            TypeError: module is not an nn.Conv2d, or rank no int.
            ValueError: module has groups, rank is outside its range, the weight is not finite, or there is no such
                form.
        """
        check_conv(cls.__name__, module)
        return cls.like(module, rank, form)._nearest(module.weight)

    @classmethod
    def like(cls, module: nn.Conv2d, rank: int, form: Form = "filters") -> Self:
        """A layer for the place of module, with its bias and flags, whose factors have no numbers yet."""
        sizes: Any = {"kernel_size": module.kernel_size, "bias": module.bias is not None, **sizes_of(module)}
        return cls(module.in_channels, module.out_channels, rank=rank, form=form, **sizes)._take(module)

    def to_dense(self) -> nn.Conv2d:
        """The plain layer with the factors multiplied out."""
        return cast(nn.Conv2d, self._fill(self._dense(self.bias is not None)))

    @property
    def _form(self) -> Form:  # type: ignore[override]
        return self.form

    def _composed(self, first: Tensor, second: Tensor) -> Tensor:
        if self.form == "filters":
            return (second.flatten(1) @ first.flatten(1)).view(self.weight_shape)
        weight: Tensor = torch.einsum("frx,rcy->fcyx", second.squeeze(2), first.squeeze(3))
        return weight

    def _second_weight(self, left: Tensor) -> Tensor:
        if self.form == "filters":
            return super()._second_weight(left)
        # [(F, kw), R] -> [F, R, 1, kw]
        return left.view(self.out_channels, -1, left.shape[1]).transpose(1, 2).unsqueeze(2)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self._shown_sizes()}, rank={self.rank}, form={self.form!r}, bias={self.bias is not None}"

    @property
    def sizes(self) -> dict[str, Any]:
        """What the constructor takes to make a layer of the same sizes."""
        more = {} if self.form == "filters" else {"form": self.form}
        return {**self._own_sizes(), "rank": self.rank, **more, **({} if self.bias is not None else {"bias": False})}


CONV_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")


def sizes_of(module: nn.Conv2d) -> dict[str, Any]:
    """What a factored convolution, made on device meta, takes from the dense one beside channels and kernel."""
    sizes = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    return {**sizes, "device": "meta", "dtype": module.weight.dtype}


def check_conv(where: str, module: object) -> None:
    """Refuses what is no nn.Conv2d of one group."""
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"{where}: module must be an nn.Conv2d, got {type(module).__name__}; pass a layer")
    if module.groups != 1:
        raise ValueError(f"{where}: module must have one group, got {module.groups}; leave it dense")


def check_size(where: str, name: str, value: object, most: int | None = None) -> None:
    """Refuses what is no int of at least 1, and at most that."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}; pass a whole number")
    if value < 1 or (most is not None and value > most):
        limits = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{where}: {name} must be {limits}, got {value}; pass a number in that range")


def _pair(value: Size) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value)
