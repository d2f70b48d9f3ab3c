"""A linear layer whose weights are codes into tables of a few values."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import CodebookWeight
from tersetorch.nn.codebook_module import CodedModule, zero_weight
from tersetorch.nn.shared_module import records


class CodebookLinear(CodedModule):
    """y = input @ W.T + bias, at least 0 with relu, with every weight of W a code into a table, which trains.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffer codes, packed; parameters codebook float32 [tables, entries], bias [out_features] or None. An entry's
    gradient is the sum of its members'. The codebook stays float32 under .half(), .bfloat16() and .double(): rounding
    it would move every weight. There is one table, one for each row, or one for each block of columns.

    Args:
        weight: the weight; its tensors are used, not copied.
        bias: float [out_features], or None.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a CodebookWeight, or an argument has another type than named here.
        ValueError: weight is not valid, or bias does not fit it.

    Source:
        Han et al., Deep Compression (2016), section 3 (trained shared weights), eq. 3 for the gradient.
    """

    dense_type = nn.Linear

    def __init__(self, weight: CodebookWeight, bias: Tensor | None = None, *, relu: bool = False) -> None:
        super().__init__(weight, bias, relu)

    def _hold(self, weight: CodebookWeight, bias: Tensor | None, relu: bool) -> None:
        super()._hold(weight, bias, relu)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_dense(cls, module: nn.Linear) -> Self:
        """The layer that computes what module computes.

        A module that quantize.kmeans has made share keeps its codes and its tables; another one gets a table of its
        distinct values.

        Raises:
            TypeError: module is not an nn.Linear, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more than 256 distinct values and is not shared.
        """
        return cls(*cls._parts_of(module)).train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_features: int,
        out_features: int,
        tables: int,
        entries: int,
        column_block: int = 0,
        bias: bool = True,
        layout: str = CodedModule.plain_layout,
        relu: bool = False,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = zero_weight(out_features, in_features, tables, entries, column_block)
        layer._hold(weight, weight.codebook.new_zeros(out_features) if bias else None, relu)
        return layer.pack(layout)

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        return {"in_features": self.in_features, "out_features": self.out_features, **self._config()}

    def to_dense(self) -> nn.Linear:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        return self._filled(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        self._check_features(input, self.in_features)
        parts = (input, self.codes, self.codebook, self.bias, self.column_block)
        if records():
            return ops.codebook_matmul(*parts, "exact", self.relu)
        return ops.codebook_matmul_inference(*parts, self._mode, self.relu)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return ", ".join([f"in_features={self.in_features}, out_features={self.out_features}", *self._shown()])
