"""Convolutions whose channels are clustered, each pair of clusters having filters of its own of low rank."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from tersetorch.nn.conv_sizes import Sizes
from tersetorch.nn.dense_form import changed, check_size
from tersetorch.nn.low_rank import ConvOfFactors

BlockForm = Literal["outer_product", "svd", "monochromatic"]


class ClusteredConv2d(ConvOfFactors):
    """y = conv2d(input, W) + bias, with W made of blocks, each the sum of few products; the factors train.

    The C input channels are in G clusters of C / G, the F filters in H clusters of F / H. The block of W of clusters g
    and h is a tensor [F / H, C / G, kh, kw]; with c, f counted inside the clusters, in three forms:

        "outer_product"  sum_k a[k, c] b[k, y, x] c[f, k]: K = rank terms; G H K (C / G + kh kw + F / H) weights.
        "svd"            sum_jk a[j, c] b[k, j, y, x] c[f, k]: ranks (J, K); G H (J C / G + J K kh kw +
                         K F / H) weights.
        "monochromatic"  a[c] b[f, y, x] with G = 1: each filter sees one of H mixtures ("colours") of all channels;
                         H C + F kh kw weights.

    Computed as first, a 1x1 convolution of G groups; middle, a kh x kw convolution of G H K groups ("outer_product") or
    G H, which has stride, padding and dilation; last, a 1x1 convolution of H groups, which "monochromatic" lacks.
    Where there are several clusters on both sides their channels are transposed between first and middle.

    Shapes: as nn.Conv2d, with or without the batch dimension. Buffers input_order int64 [C], the channels in the order
    of their clusters, None where G is 1; output_order int64 [F], where each filter stands in the order of the clusters,
    None where H is 1.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as
            nn.Conv2d takes them; there are no groups.
        rank: K, or (J, K); left out for "monochromatic".
        in_clusters: G, a divisor of in_channels.
        out_clusters: H, a divisor of out_channels.
        form: "outer_product", "svd" or "monochromatic".

    Raises:
        TypeError: a size is no int.
        ValueError: a size is outside its range, clusters do not divide the channels, or form is none of those there
            are.

    Source:
        Denton et al., Exploiting linear structure within convolutional networks (2014), section 3.3.
    """

    input_order: Tensor | None
    output_order: Tensor | None
    last: nn.Conv2d | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        rank: int | tuple[int, int] = 1,
        in_clusters: int = 1,
        out_clusters: int = 1,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        form: BlockForm = "outer_product",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        sizes["padding_mode"] = padding_mode
        self._set_channels(in_channels, out_channels, kernel_size, **sizes)
        self._set_form(form, rank, in_clusters, out_clusters)
        g, h, (j, k) = in_clusters, out_clusters, self._ranks
        made = {"device": device, "dtype": dtype}
        make: Any = nn.Conv2d
        groups = g * h * (k if form == "outer_product" else 1)
        flat = form == "monochromatic"
        self.first = make(in_channels, g * h * j, 1, groups=g, bias=False, **made)
        self.middle = make(g * h * j, g * h * k, kernel_size, groups=groups, bias=bias and flat, **sizes, **made)
        self.last = None if flat else make(g * h * k, out_channels, 1, groups=h, bias=bias, **made)
        for name, clusters, channels in (
            ("input_order", g, in_channels),
            ("output_order", h, out_channels),
        ):
            self.register_buffer(name, torch.arange(channels, device=device) if clusters > 1 else None)

    def _set_form(self, form: BlockForm, rank: int | tuple[int, int], in_clusters: int, out_clusters: int) -> None:
        where = type(self).__name__
        if form not in get_args(BlockForm):
            raise ValueError(
                f"{where}: form must be one of {list(get_args(BlockForm))}, got {form!r}; choose one of them"
            )
        for name, clusters, side, channels in (
            ("in_clusters", in_clusters, "in_channels", self.in_channels),
            ("out_clusters", out_clusters, "out_channels", self.out_channels),
        ):
            check_size(where, name, clusters)
            if channels % clusters:
                raise ValueError(f"{where}: {name} must divide {side}={channels}, got {clusters}; pass a divisor")
        self.form: BlockForm = form
        self.in_clusters, self.out_clusters = in_clusters, out_clusters
        per_in, per_out = self.in_channels // in_clusters, self.out_channels // out_clusters
        taps = math.prod(self.kernel_size)
        if form == "monochromatic":
            if in_clusters != 1 or rank != 1:
                raise ValueError(
                    f"{where}: in_clusters and rank must be 1 for monochromatic, got {in_clusters} and {rank}; "
                    "leave them out"
                )
            self.rank: int | tuple[int, int] = 1
            self._ranks = (1, per_out)
            return
        if form == "outer_product":
            # More terms than this, and the two largest dimensions would do.
            sizes = sorted((per_in, taps, per_out))
            check_size(where, "rank", rank, sizes[0] * sizes[1])
            assert isinstance(rank, int)
            self.rank, self._ranks = rank, (rank, rank)
            return
        if not isinstance(rank, tuple | list) or len(rank) != 2:
            raise TypeError(f"{where}: rank must be two ints for svd, got {rank!r}; pass (of channels, of filters)")
        check_size(where, "rank[0]", rank[0], min(per_in, taps * per_out))
        check_size(where, "rank[1]", rank[1], min(per_out, taps * rank[0]))
        self.rank = self._ranks = (rank[0], rank[1])

    @classmethod
    def from_factors(
        cls,
        module: nn.Conv2d,
        first: Tensor,
        middle: Tensor,
        last: Tensor | None = None,
        *,
        form: BlockForm = "outer_product",
        in_labels: Tensor | None = None,
        out_labels: Tensor | None = None,
    ) -> Self:
        """A layer for the place of module with these factors and module's bias; tersetorch.factorize finds them.

        Args:
            module: the dense layer.
            first: [G, H, J, C / G].
            middle: [G, H, K, J, kh, kw], with one in the place of J for "outer_product".
            last: [G, H, F / H, K]; None for "monochromatic".
            form: as the constructor takes it.
            in_labels: int64 [C], the cluster of each channel, all of one size; None where G is 1.
            out_labels: int64 [F], the cluster of each filter, all of one size; None where H is 1.

        Raises:
            TypeError: module is not an nn.Conv2d.
            ValueError: module has groups, or factors or labels do not fit it.
        """
        cls._check_source(module)
        g, h, j = first.shape[:3]
        k = middle.shape[2]
        layer = cls(
            **cls._made_as(module),
            rank=(j, k) if form == "svd" else k if form == "outer_product" else 1,
            in_clusters=g,
            out_clusters=h,
            form=form,
        ).to_empty(device=module.weight.device)
        order = _order(cls.__name__, "out_labels", out_labels, layer.output_order)
        inputs = _order(cls.__name__, "in_labels", in_labels, layer.input_order)
        with torch.no_grad():
            layer.first.weight.copy_(first.flatten(0, 2)[:, :, None, None])
            layer.middle.weight.copy_(middle.transpose(0, 1).flatten(0, 2))
            if layer.last is not None and last is not None:
                # [G, H, F / H, K] -> [H, F / H, G, K]
                layer.last.weight.copy_(last.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[:, :, None, None])
            if layer.input_order is not None and inputs is not None:
                layer.input_order.copy_(inputs)
            if layer.output_order is not None and order is not None:
                layer.output_order.copy_(order.argsort())
            if module.bias is not None:
                bias = module.bias.detach() if order is None else module.bias.detach()[order.to(module.bias.device)]
                layer._final.bias = nn.Parameter(bias.clone(), requires_grad=module.bias.requires_grad)
        for factor in layer._factors:
            factor.weight.requires_grad_(module.weight.requires_grad)
        return layer.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        ordered = input if self.input_order is None else input.index_select(-3, self.input_order)
        x: Tensor = self.first(ordered)
        if self.in_clusters > 1 and self.out_clusters > 1:
            x = x.unflatten(-3, (self.in_clusters, self.out_clusters, -1)).transpose(-5, -4).flatten(-5, -3)
        x = self.middle(x)
        if self.last is not None:
            x = self.last(x)
        return x if self.output_order is None else x.index_select(-3, self.output_order)

    @property
    def _factors(self) -> list[Any]:
        return list(self.children())

    @property
    def _final(self) -> Any:
        return self.middle if self.last is None else self.last

    @property
    def bias(self) -> Tensor | None:
        """The bias in the order of the filters; what trains is that of the last factor, in the order of clusters."""
        bias: Tensor | None = self._final.bias
        return bias if bias is None or self.output_order is None else bias.index_select(0, self.output_order)

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out anew at every read; its gradient reaches the factors."""
        return self._composed([factor.weight for factor in self._factors])

    def _composed(self, factors: list[Tensor]) -> Tensor:
        g, h, (j, k) = self.in_clusters, self.out_clusters, self._ranks
        first = factors[0].reshape(g, h, j, -1)
        middle = factors[1].reshape(h, g, k, -1, *self.kernel_size)
        if self.form == "outer_product":
            wide = torch.einsum("ghkc,hgkyx->hgkcyx", first, middle.squeeze(3))
        else:
            wide = torch.einsum("ghjc,hgkjyx->hgkcyx", first, middle)
        if self.last is None:
            weight = wide.transpose(1, 2).flatten(2, 3)
        else:
            weight = torch.einsum("hfgk,hgkcyx->hfgcyx", factors[2].reshape(h, -1, g, k), wide).flatten(2, 3)
        weight = weight.flatten(0, 1)
        if self.input_order is not None:
            weight = weight.index_select(1, self.input_order.argsort())
        return weight if self.output_order is None else weight.index_select(0, self.output_order)

    def _filled(self, dense: Any) -> Any:
        """It with the factors multiplied out in float64, and a copy of the bias."""
        bias = self.bias
        factors = [factor.weight for factor in self._factors]
        with torch.no_grad():
            weight = self._composed([factor.detach().double() for factor in factors]).to(factors[0].dtype)
        dense.weight = nn.Parameter(weight.contiguous(), requires_grad=factors[0].requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=self._final.bias.requires_grad)
        return dense.train(self.training)

    def validate(self) -> None:
        """Refuses orders that are none.

        Raises:
            ValueError: a buffer does not hold each number from 0 on once.
        """
        for name in ("input_order", "output_order"):
            order: Tensor | None = getattr(self, name)
            if order is None:
                continue
            if order.dtype != torch.int64 or order.sort().values.tolist() != list(range(len(order))):
                raise ValueError(
                    f"{type(self).__name__}: {name} must hold each int below {len(order)} once; rebuild the layer"
                )

    def _shown(self) -> list[str]:
        shown = [f"form={self.form!r}"]
        shown += [f"rank={self.rank}", f"in_clusters={self.in_clusters}"] * (self.form != "monochromatic")
        return [*shown, f"out_clusters={self.out_clusters}", f"bias={self._final.bias is not None}"]

    def _config(self) -> dict[str, Any]:
        own = changed(self, {"rank": 1, "in_clusters": 1, "out_clusters": 1, "form": "outer_product"})
        return {**own, **({} if self._final.bias is not None else {"bias": False})}


def _order(where: str, name: str, labels: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The channels in the order of their clusters."""
    if labels is None and like is None:
        return None
    if labels is None or like is None or labels.shape != like.shape:
        raise ValueError(f"{where}: {name} must hold one cluster for each channel where there are several; pass them")
    return labels.argsort(stable=True)
