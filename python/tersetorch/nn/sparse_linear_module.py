"""What every linear layer over a sparse format shares: its dense form, its checks, its layouts and how it runs."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

from tersetorch import ops
from tersetorch.nn.dense_form import LinearSizes
from tersetorch.nn.layout import LAYOUTS
from tersetorch.nn.sparse_module import Format, SparseModule


class SparseLinearBase(LinearSizes, SparseModule[Format]):
    """y = x @ W.T + bias, at least 0 with relu, with W [out_features, in_features] kept in a sparse format."""

    layouts = LAYOUTS
    plain_layout = "csr"

    def __init__(self, weight: Format, bias: Tensor | None = None, *, relu: bool = False) -> None:
        super().__init__(weight, bias, relu)

    def pack(self, layout: str, **options: Any) -> Self:
        """Computes without gradients from another layout of the weight from now on; returns the layer.

        In training mode the layout is remembered, and built by eval(). Changes in place to what it repeats are noticed
        by the next call; a write through .data, or to tensors made in inference mode, is not: call pack() again.

        Args:
            layout: one of
                "csr16": columns in 16 bits, for weights of at most 65,536 of them;
                "bitmap": for few samples and a fifth or more non-zeros;
                "bitmap_columns": for one sample with many zeros, as ReLU leaves them;
                "blocked": for many samples;
                "bitmap_int8", "blocked_int8": the same with each row of the weight and each sample rounded to 8 bits,
                "blocked_bfloat16": with both rounded to bfloat16; the ops say how far y may then lie off, and .weight
                stays exact;
                "csr": undoes an earlier pack().
            options: for the blocked ones samples (about how many will be multiplied at once) or column_block.

        Raises:
            ValueError: no such layout.
            TypeError, ValueError: options that the layout does not take, or a weight that it cannot hold; nothing has
                changed then.
        """
        return super().pack(layout, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        # As _run, with the checks after the product where it is fast: they would cost a microsecond before it.
        if is_grad_enabled() or forward_ad._current_level >= 0:
            self._check_input(input)
            return self._with_gradients(input)
        try:
            if input.shape[-1] == self.in_features:
                return self._unrecorded(input)
        except KeyError:  # a parametrization, or a shallow copy, took a tensor out of the dictionaries
            return self._recorded(input)
        except Exception:
            self._check_input(input)  # its sentence comes before the op's
            raise
        self._check_input(input)
        raise AssertionError("unreachable")

    def _recorded(self, x: Tensor) -> Tensor:
        values, codebook = self._numbers()
        return ops.csr_matmul(x, self.row_offsets, self.col_indices, values, self.bias, codebook, relu=self.relu)

    def _from_rows(self, x: Tensor) -> Tensor:
        # Straight from the dictionaries: nn.Module looks an attribute up for a third of a microsecond.
        buffers: Any = self._buffers
        parameters: Any = self._parameters
        codes = buffers.get("codes")
        values, codebook = (parameters["values"], None) if codes is None else (codes, parameters["codebook"])
        return ops.csr_matmul_inference(
            x, buffers["row_offsets"], buffers["col_indices"], values, parameters["bias"], codebook, self.relu
        )
