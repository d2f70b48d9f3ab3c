"""Linear layers whose weight is made of shared sub-vectors."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import ProductWeight
from tersetorch.nn.product_module import ProductModule, ResidualForm, zero_weight
from tersetorch.nn.shared_module import records

MODES = ("exact", "int8")


class ProductLinear(ProductModule):
    """y = input @ W.T + bias, at least 0 with relu, with W in product-quantised form; the codebooks train.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffer codes, packed; parameters codebooks float32 [stages, segments or 1, width, entries], and bias [out_features]
    or None. An entry's gradient is the sum of those of the sub-vectors that are it. Codebooks stay float32 under
    .half(), .bfloat16() and .double(): rounding them would move every weight.

    Args:
        weight: the product-quantised weight; its tensors are used, not copied.
        bias: float [out_features], or None.
        mode: "exact", or "int8": tables of products are rounded to 8 bits while gradients are off (see
            ops.product_matmul).
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a ProductWeight, or an argument has another type than named here.
        ValueError: weight is not valid, bias does not fit it, or there is no such mode.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.3.
    """

    def __init__(
        self, weight: ProductWeight, bias: Tensor | None = None, *, mode: str = "exact", relu: bool = False
    ) -> None:
        self._check_mode(mode)
        super().__init__(weight, bias, relu)
        self.mode = mode

    def _check_mode(self, mode: str) -> None:
        if mode not in MODES:
            name = type(self).__name__
            raise ValueError(f"{name}: mode must be one of {list(MODES)}, got {mode!r}; choose one of them")

    def _hold(self, weight: ProductWeight, bias: Tensor | None, relu: bool) -> None:
        self.out_features, self.in_features = weight.shape
        super()._hold(weight, bias, relu)

    def _weight_of(self, codes: Tensor, values: Tensor) -> ProductWeight:
        return ProductWeight(codes, values, self.out_features, self.in_features)

    @classmethod
    def from_codes(cls, codes: Tensor, codebooks: Tensor, bias: Tensor | None = None, *, in_features: int) -> Self:
        """The layer of codes uint8 [out_features, stages * segments], as quantize.product_quantize returns them.

        Raises:
            TypeError, ValueError: as ProductWeight.from_codes.
        """
        return cls(ProductWeight.from_codes(codes, codebooks, in_features), bias)

    @classmethod
    def of_sizes(
        cls,
        in_features: int,
        out_features: int,
        stages: int,
        segments: int,
        width: int,
        entries: int,
        bias: bool = True,
        mode: str = "exact",
        relu: bool = False,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere; only mode and relu are checked."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = zero_weight(out_features, in_features, (stages, segments, width, entries))
        layer._check_mode(mode)
        layer._hold(weight, torch.zeros(out_features) if bias else None, relu)
        layer.mode = mode
        return layer

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        names = ("stages", "segments", "width", "entries")
        options = {"mode": self.mode} if self.mode != "exact" else {}
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            **dict(zip(names, self.codebooks.shape, strict=True)),
            **({} if self.bias is not None else {"bias": False}),
            **options,
            **({"relu": True} if self.relu else {}),
        }

    @classmethod
    def from_dense(cls, module: nn.Linear, sub_vector: int | None = None, *, mode: str = "exact") -> Self:
        """The layer that computes what module computes.

        A module that quantize.product or quantize.residual has made share keeps its codes and codebooks; of sums they
        are still known after finalize, until the weight is changed. Any other weight is searched for the parts that
        its rows share.

        Args:
            module: the layer.
            sub_vector: columns of a segment, where they have to be searched for; None for those that take the fewest
                bytes, see ProductWeight.find.
            mode: of the layer.

        Raises:
            TypeError: module is not an nn.Linear, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more distinct parts than codes can name, or is not what its codes say, since it
                was pruned after, or rounded where rows are sums; or there is no such mode.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.__name__}: module must be an nn.Linear, got {type(module).__name__}; pass a layer")
        return cls(*cls._parts_of(module, sub_vector), mode=mode).train(module.training)

    def to_dense(self) -> nn.Linear:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        return self._filled(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        self._check_features(input, self.in_features)
        if records():
            return ops.product_matmul(
                input, self.codes, self.codebooks, self.bias, out_features=self.out_features, relu=self.relu
            )
        return ops.product_matmul_inference(
            input, self.codes, self.codebooks, self.bias, self.out_features, self.mode, self.relu
        )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        stages, _, width, entries = self.codebooks.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stages={stages}, sub_vector={width}, entries={entries}"
            + ("" if self.mode == "exact" else f", mode={self.mode}")
            + ", relu=True" * self.relu
        )


class ResidualLinear(ResidualForm, ProductLinear):
    """y = input @ W.T + bias, each row of W a sum of shared rows, one of each stage; the codebooks train.

    As ProductLinear, with one segment as wide as W: codebooks [stages, 1, in_features, entries].

    Raises:
        TypeError, ValueError: as ProductLinear, and for a weight of several segments.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.4.
    """
