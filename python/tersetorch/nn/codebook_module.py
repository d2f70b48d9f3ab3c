"""What layers share whose weights are codes into tables: tensors, dense weight, layouts, state."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import CodebookWeight
from tersetorch.nn.dense_form import bias_of
from tersetorch.nn.shared_module import SharedProduct

# What pack() takes, and the op's mode for it.
LAYOUTS = {"codebook": "exact", "codebook_bfloat16": "bfloat16", "codebook_int8": "int8"}
MAX_INT8_WEIGHTS = 128 * 1024


class CodedModule(SharedProduct):
    """A layer with a buffer codes, packed, and parameters codebook float32 [tables, entries] and bias, or None."""

    format = CodebookWeight
    parameter_field = "codebook"
    plain_layout = "codebook"

    codebook: nn.Parameter

    def _hold(self, weight: CodebookWeight, bias: Tensor | None, relu: bool) -> None:
        self.column_block = weight.column_block
        self._layout = self.plain_layout
        super()._hold(weight, bias, relu)

    def _weight_of(self, codes: Tensor, values: Tensor) -> CodebookWeight:
        return CodebookWeight(codes, values, self._matrix_shape[1], self.column_block)

    @classmethod
    def from_dense(cls, module: Any) -> Self:
        """The layer that computes what module computes.

        A module that quantize.kmeans has made share keeps its codes and its tables; another one gets a table of its
        distinct values.

        Args:
            module: nn.Linear or nn.Conv2d, as the layer is.

        Raises:
            TypeError: module is no such layer, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more than 256 distinct values and is not shared.
        """
        cls._check_source(module)
        return cls(weight_of(module), bias_of(module), **cls._sizes_of(module)).train(module.training)

    @classmethod
    def of_sizes(
        cls,
        *,
        tables: int,
        entries: int,
        column_block: int = 0,
        bias: bool = True,
        layout: str = plain_layout,
        relu: bool = False,
        **sizes: Any,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere; sizes are the plain layer's."""
        layer = cls._sized(**sizes)
        weight = zero_weight(*layer._matrix_shape, tables, entries, column_block)
        layer._hold(weight, weight.codebook.new_zeros(weight.shape[0]) if bias else None, relu)
        return layer.pack(layout)

    @property
    def codebook_weight(self) -> CodebookWeight:
        """The weight in its format; it shares memory with the layer."""
        return self._weight_of(self.codes, self.codebook)

    @property
    def packed_weight(self) -> CodebookWeight:
        """The same: every layout computes from the one format."""
        return self.codebook_weight

    @property
    def layout(self) -> str:
        """What pack() was given, or "codebook"."""
        return self._layout

    @property
    def layout_options(self) -> dict[str, Any]:
        """The keyword arguments of pack() beside the layout: none."""
        return {}

    def pack(self, layout: str) -> Self:
        """Computes in this way from now on while gradients are off; returns the layer.

        Args:
            layout: "codebook", exact; "codebook_bfloat16" or "codebook_int8", with tables and inputs rounded as
                ops.codebook_matmul or ops.codebook_conv2d says of its modes. .weight stays exact.

        Raises:
            ValueError: no such layout, or rows with more weights than it can hold.
        """
        if layout not in LAYOUTS:
            raise ValueError(
                f"{type(self).__name__}: layout must be one of {list(LAYOUTS)}, got {layout!r}; choose one of them"
            )
        if layout == "codebook_int8" and self._matrix_shape[1] > MAX_INT8_WEIGHTS:
            raise ValueError(
                f"{type(self).__name__}: a row must have at most {MAX_INT8_WEIGHTS} weights in layout "
                f"'codebook_int8', got {self._matrix_shape[1]}; choose another layout"
            )
        self._layout = layout
        return self

    @property
    def _mode(self) -> str:
        """The op's mode while gradients are off."""
        return LAYOUTS[self._layout]

    def _config(self) -> dict[str, Any]:
        tables, entries = self.codebook.shape
        return {
            "tables": tables,
            "entries": entries,
            **({"column_block": self.column_block} if self.column_block else {}),
            **({} if self.bias is not None else {"bias": False}),
            **({"layout": self._layout} if self._layout != self.plain_layout else {}),
            **({"relu": True} if self.relu else {}),
        }

    def _shown(self) -> list[str]:
        tables, entries = self.codebook.shape
        shown = [f"bias={self.bias is not None}", f"tables={tables}", f"entries={entries}"]
        shown += [f"column_block={self.column_block}"] * bool(self.column_block)
        return shown + [f"layout={self._layout}"] * (self._layout != self.plain_layout) + ["relu=True"] * self.relu


def zero_weight(rows: int, columns: int, tables: int, entries: int, column_block: int) -> CodebookWeight:
    """A weight of zeros, for tensors that come from elsewhere."""
    codes = torch.zeros(rows, ops.codebook_row_bytes(entries, columns, column_block), dtype=torch.uint8)
    return CodebookWeight(codes, torch.zeros(tables, entries), columns, column_block)


def weight_of(module: Any) -> CodebookWeight:
    """The weight of a dense layer: its codes and tables where it is shared, else those that CodebookWeight.find finds.

    Raises:
        TypeError: the weight is neither float32 nor bfloat16.
        ValueError: nothing in it is shared.
    """
    weight = _shared_weight(module)
    return CodebookWeight.from_dense(module.weight.detach().flatten(1)) if weight is None else weight


def _shared_weight(module: nn.Module) -> CodebookWeight | None:
    """The weight of a module whose parametrization has codes and tables, or None for another."""
    lists: Any = getattr(module, "parametrizations", None)
    held: Any = None if lists is None or "weight" not in lists else lists["weight"][0]
    codes, codebook = getattr(held, "codes", None), getattr(held, "codebook", None)
    if not (isinstance(codes, Tensor) and isinstance(codebook, Tensor) and codebook.dim() == 2):
        return None
    dense: Any = module.weight
    # The values as the weight has them: codebook trains unrounded.
    values = codebook.detach().to(torch.bfloat16) if getattr(held, "rounded", False) else codebook.detach()
    weight = CodebookWeight.from_codes(
        codes.reshape(codes.shape[0], -1),
        values.to(dense.dtype).float().clone(),
        column_block=getattr(held, "column_block", 0),
    )
    # Where the mask hides a value that is not 0, the tables do not say all.
    return weight if torch.equal(weight.to_dense(), dense.detach().float().reshape(weight.shape)) else None
