"""A linear layer whose weights are codes into tables of a few values."""

from __future__ import annotations

from torch import Tensor

from tersetorch import ops
from tersetorch.formats import CodebookWeight
from tersetorch.nn.codebook_module import CodedModule
from tersetorch.nn.dense_form import LinearSizes
from tersetorch.nn.shared_module import records


class CodebookLinear(LinearSizes, CodedModule):
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

    def __init__(self, weight: CodebookWeight, bias: Tensor | None = None, *, relu: bool = False) -> None:
        super().__init__(weight, bias, relu)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        self._check_input(input)
        parts = (input, self.codes, self.codebook, self.bias, self.column_block)
        if records():
            return ops.codebook_matmul(*parts, "exact", self.relu)
        return ops.codebook_matmul_inference(*parts, self._mode, self.relu)
