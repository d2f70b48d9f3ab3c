"""Layers whose weight is a product of two thin factors, each a plain layer that trains."""

from __future__ import annotations

import math
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor, nn

from tersetorch.nn.conv_sizes import ConvSizes, Sizes
from tersetorch.nn.dense_form import DenseForm, LinearSizes, check_size
from tersetorch.nn.low_rank_factors import Form, split, unfold, unfolded_shape


class LowRankModule(DenseForm[Any]):
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

    def _filled(self, dense: Any) -> Any:
        """It with the weight multiplied out in float64, and a copy of the bias."""
        with torch.no_grad():
            factors = self.first.weight.detach(), self.second.weight.detach()
            weight = self._composed(factors[0].double(), factors[1].double()).to(factors[1].dtype)
        dense.weight = nn.Parameter(weight.contiguous(), requires_grad=self.second.weight.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def _config(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            **({"form": self._form} if self._form != "filters" else {}),
            **({} if self.bias is not None else {"bias": False}),
        }

    def _shown(self) -> list[str]:
        return [f"rank={self.rank}", f"bias={self.bias is not None}"]


class LowRankLinear(LinearSizes, LowRankModule):
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
        self._set_sizes((out_features, in_features))
        self.rank = rank
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
        cls._check_source(module)
        return cls.like(module, rank)._nearest(module.weight)

    @classmethod
    def like(cls, module: nn.Linear, rank: int) -> Self:
        """A layer for the place of module, with its bias and flags, whose factors have no numbers yet."""
        has_bias, dtype = module.bias is not None, module.weight.dtype
        return cls(module.in_features, module.out_features, rank, has_bias, "meta", dtype)._take(module)

    def _composed(self, first: Tensor, second: Tensor) -> Tensor:
        return second @ first


class ConvOfFactors(ConvSizes[nn.Conv2d]):
    """A convolution of several factors; groups is 1."""

    dense_type = nn.Conv2d
    dims = 2

    def _set_channels(self, in_channels: int, out_channels: int, kernel_size: Sizes, **sizes: Any) -> None:
        check_size(type(self).__name__, "in_channels", in_channels)
        check_size(type(self).__name__, "out_channels", out_channels)
        shape, more = self._split_sizes(in_channels, out_channels, kernel_size, **sizes)
        self._set_sizes(shape, **more)

    @classmethod
    def _check_source(cls, module: Any) -> None:
        """Refuses what is no nn.Conv2d of one group."""
        super()._check_source(module)
        if module.groups != 1:
            raise ValueError(f"{cls.__name__}: module must have one group, got {module.groups}; leave it dense")

    @classmethod
    def _made_as(cls, module: nn.Conv2d) -> dict[str, Any]:
        """What the constructor takes to make a layer on device meta for the place of module."""
        own = {name: getattr(module, name) for name in ("in_channels", "out_channels")}
        own |= {name: size for name, size in cls._sizes_of(module).items() if name != "groups"}
        return {**own, "bias": module.bias is not None, "device": "meta", "dtype": module.weight.dtype}

    def _shown_sizes(self) -> list[str]:
        sizes = self._own_sizes()
        shown = f"{sizes.pop('in_channels')}, {sizes.pop('out_channels')}"
        return [shown, *(f"{name}={value!r}" for name, value in sizes.items())]


class LowRankConv2d(ConvOfFactors, LowRankModule):
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
        kernel_size: Sizes,
        rank: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
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
        sizes = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        self._set_channels(in_channels, out_channels, kernel_size, **sizes)
        self.form: Form = form
        check_size(where, "rank", rank, min(unfolded_shape(self.weight_shape, form)))
        self.rank = rank
        made = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        # Typed loosely: torch's own stubs ask for pairs of known length.
        make: Any = nn.Conv2d
        if form == "filters":
            own = self.kernel_size, self.stride, self.padding, self.dilation
            self.first = make(in_channels, rank, *own, bias=False, **made)
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
        cls._check_source(module)
        return cls.like(module, rank, form)._nearest(module.weight)

    @classmethod
    def like(cls, module: nn.Conv2d, rank: int, form: Form = "filters") -> Self:
        """A layer for the place of module, with its bias and flags, whose factors have no numbers yet."""
        return cls(**cls._made_as(module), rank=rank, form=form)._take(module)

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

    def _shown(self) -> list[str]:
        return [f"rank={self.rank}", f"form={self.form!r}", f"bias={self.bias is not None}"]
