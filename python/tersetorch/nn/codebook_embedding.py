"""An embedding whose weights are codes into tables of a few values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import CodebookWeight
from tersetorch.nn.codebook_module import weight_of, zero_weight
from tersetorch.nn.shared_module import SharedModule, records
from tersetorch.ops._floats import floats_beside


class CodebookEmbedding(SharedModule):
    """y = W[input], with every weight of W a code into a table, which trains.

    Shapes: input int64 or int32, any shape [...], each in [0, num_embeddings) -> y [..., embedding_dim] of dtype.
    Buffer codes, packed; parameter codebook float32 [tables, entries]: one table, one for each row, or one for each
    block of columns. An entry's gradient is the sum of its members', as often as they were looked up. The codebook
    stays float32 under .half(), .bfloat16() and .double(); they change dtype, which y is rounded to.

    Args:
        weight: the weight; its tensors are used, not copied.
        padding_idx: a row that gives no gradient, counted from the end where it is negative, or None. Its entries get
            that of other rows that have them, so that a row of zeros stays one only if no other row has its zeros.
        dtype: of y; nn.Embedding's is that of its weight.

    Raises:
        TypeError: weight is not a CodebookWeight, or dtype no floating-point dtype.
        ValueError: weight is not valid, or padding_idx is none of its rows.

    Source:
        torch.nn.Embedding; Han et al., Deep Compression (2016), section 3 (trained shared weights).
    """

    format = CodebookWeight
    parameter_field = "codebook"
    # It has one layout.
    plain_layout = layout = "codebook"

    codebook: nn.Parameter

    def __init__(
        self, weight: CodebookWeight, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self._check_weight(weight)
        rows = weight.shape[0]
        if padding_idx is not None and not -rows <= padding_idx < rows:
            raise ValueError(
                f"{type(self).__name__}: padding_idx must be a row of {rows}, got {padding_idx}; pass None for none"
            )
        self._hold(weight, padding_idx, dtype)

    def _hold(self, weight: CodebookWeight, padding_idx: int | None, dtype: torch.dtype) -> None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: dtype must be a floating-point dtype, got {dtype}; pass float32")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.column_block, self.dtype = weight.column_block, dtype
        self.padding_idx = None if padding_idx is None else padding_idx % self.num_embeddings
        self._hold_weight(weight)

    def _weight_of(self, codes: Tensor, values: Tensor) -> CodebookWeight:
        return CodebookWeight(codes, values, self.embedding_dim, self.column_block)

    @classmethod
    def from_dense(cls, module: nn.Embedding) -> Self:
        """The layer that looks up what module looks up.

        A module that quantize.kmeans has made share keeps its codes and its tables; another one gets a table of its
        distinct values.

        Raises:
            TypeError: module is not an nn.Embedding, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more than 256 distinct values and is not shared, or module has max_norm, sparse
                or scale_grad_by_freq.
        """
        if not isinstance(module, nn.Embedding):
            raise TypeError(
                f"{cls.__name__}: module must be an nn.Embedding, got {type(module).__name__}; pass an embedding"
            )
        refused = why_not(module)
        if refused is not None:
            raise ValueError(f"{cls.__name__}: module must be one that codes can stand in for, got {refused}")
        layer = cls(weight_of(module), padding_idx=module.padding_idx, dtype=module.weight.dtype)
        return layer.train(module.training)

    @classmethod
    def of_sizes(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        tables: int,
        entries: int,
        column_block: int = 0,
        padding_idx: int | None = None,
        dtype: str = "float32",
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = zero_weight(num_embeddings, embedding_dim, tables, entries, column_block)
        layer._hold(weight, padding_idx, getattr(torch, dtype))
        return layer

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        tables, entries = self.codebook.shape
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "tables": tables,
            "entries": entries,
            **({"column_block": self.column_block} if self.column_block else {}),
            **({} if self.padding_idx is None else {"padding_idx": self.padding_idx}),
            **({} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}),
        }

    def to_dense(self) -> nn.Embedding:
        """The plain embedding with the same weight, of dtype."""
        weight = self.weight.to(self.dtype)
        dense: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)
        return dense.train(self.training)

    @property
    def codebook_weight(self) -> CodebookWeight:
        """The weight in its format; it shares memory with the layer."""
        return self._weight_of(self.codes, self.codebook)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of input, int64 or int32 [...]."""
        name = type(self).__name__
        if not isinstance(input, Tensor):
            raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}; pass a torch.Tensor")
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: input must be int64 or int32, got {input.dtype}; convert it")
        dtype = self.dtype if self.dtype in floats_beside(input) else torch.float32
        sizes = {"columns": self.embedding_dim, "column_block": self.column_block}
        if records():
            rows = ops.codebook_embedding(
                input, self.codes, self.codebook, **sizes, padding_idx=self.padding_idx, dtype=dtype
            )
        else:
            rows = ops.codebook_embedding_inference(input, self.codes, self.codebook, **sizes, dtype=dtype)
        return rows if dtype == self.dtype else rows.to(self.dtype)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        tables, entries = self.codebook.shape
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, tables={tables}, entries={entries}"
            + (f", column_block={self.column_block}" if self.column_block else "")
            + ("" if self.padding_idx is None else f", padding_idx={self.padding_idx}")
            + ("" if self.dtype == torch.float32 else f", dtype={self.dtype}")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codebook.device)).dtype
        return self


def why_not(module: nn.Embedding) -> str | None:
    """What an embedding does that codes cannot do, and the way out, or None."""
    if module.max_norm is not None:
        return f"max_norm={module.max_norm}, which rescales rows while they are looked up; rescale the weight first"
    if module.sparse:
        return "sparse=True, and the gradient of a codebook is dense; pass sparse=False"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True, and rows share their gradients; pass scale_grad_by_freq=False"
    return None
