"""A linear layer whose weights are codes into tables of a few values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad

from tersetorch import ops
from tersetorch.formats import CodebookWeight

FLOATS = (torch.float32, torch.bfloat16)
# What pack() takes, and the op's mode for it.
LAYOUTS = {"codebook": "exact", "codebook_bfloat16": "bfloat16", "codebook_int8": "int8"}


class CodebookLinear(nn.Module):
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

    format = CodebookWeight
    parameter_field = "codebook"
    plain_layout = "codebook"

    codes: Tensor
    codebook: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: CodebookWeight, bias: Tensor | None = None, *, relu: bool = False) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(weight, CodebookWeight):
            raise TypeError(f"{name}: weight must be a CodebookWeight, got {type(weight).__name__}; call from_dense")
        weight.validate()
        if not isinstance(relu, bool):
            raise TypeError(f"{name}: relu must be True or False, got {relu!r}; pass a bool")
        if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in FLOATS):
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"{name}: bias must be float32 or bfloat16, got {got}; convert it")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: bias must be [{weight.shape[0]}], one for each row of the weight, got shape "
                f"{tuple(bias.shape)}; pass the bias of the same layer"
            )
        self._hold(weight, bias, relu)

    def _hold(self, weight: CodebookWeight, bias: Tensor | None, relu: bool) -> None:
        self.out_features, self.in_features = weight.shape
        self.column_block, self.relu = weight.column_block, relu
        self._layout = self.plain_layout
        self.register_buffer("codes", weight.codes)
        self.codebook = _as_parameter(weight.codebook)
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))

    @classmethod
    def from_dense(cls, module: nn.Linear) -> Self:
        """The layer that computes what module computes.

        A module that quantize.kmeans has made share keeps its codes and its tables; another one gets a table of its
        distinct values.

        Raises:
            TypeError: module is not an nn.Linear, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more than 256 distinct values and is not shared.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.__name__}: module must be an nn.Linear, got {type(module).__name__}; pass a layer")
        bias = None if module.bias is None else module.bias.detach().clone()
        weight = shared_weight(module)
        return cls(CodebookWeight.from_dense(module.weight) if weight is None else weight, bias).train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_features: int,
        out_features: int,
        tables: int,
        entries: int,
        column_block: int = 0,
        bias: bool = True,
        layout: str = plain_layout,
        relu: bool = False,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        codes = torch.zeros(out_features, ops.codebook_row_bytes(entries, in_features, column_block), dtype=torch.uint8)
        weight = CodebookWeight(codes, torch.zeros(tables, entries), in_features, column_block)
        layer._hold(weight, torch.zeros(out_features) if bias else None, relu)
        return layer.pack(layout)

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        tables, entries = self.codebook.shape
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "tables": tables,
            "entries": entries,
            **({"column_block": self.column_block} if self.column_block else {}),
            **({} if self.bias is not None else {"bias": False}),
            **({"layout": self._layout} if self._layout != self.plain_layout else {}),
            **({"relu": True} if self.relu else {}),
        }

    def to_dense(self) -> nn.Linear:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        weight, bias = self.weight, None if self.bias is None else self.bias.detach().clone()
        if bias is not None and bias.dtype != weight.dtype:
            narrow = weight.to(bias.dtype)
            weight, bias = (narrow, bias) if torch.equal(narrow.float(), weight) else (weight, bias.float())
        dense = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        return dense.train(self.training)

    @property
    def codebook_weight(self) -> CodebookWeight:
        """The weight in its format; it shares memory with the layer."""
        return CodebookWeight(self.codes, self.codebook, self.in_features, self.column_block)

    @property
    def packed_weight(self) -> CodebookWeight:
        """The same: every layout computes from the one format."""
        return self.codebook_weight

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        return self.codebook_weight.to_dense().detach()

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
            layout: "codebook", exact; "codebook_bfloat16" or "codebook_int8", with tables and samples rounded as
                ops.codebook_matmul says of its modes. .weight stays exact.

        Raises:
            ValueError: no such layout, or more features than it can hold.
        """
        if layout not in LAYOUTS:
            raise ValueError(
                f"{type(self).__name__}: layout must be one of {list(LAYOUTS)}, got {layout!r}; choose one of them"
            )
        if layout == "codebook_int8" and self.in_features > 128 * 1024:
            raise ValueError(
                f"{type(self).__name__}: in_features must be at most 131072 in layout 'codebook_int8', got "
                f"{self.in_features}; choose another layout"
            )
        self._layout = layout
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(input).__name__}; pass a torch.Tensor"
            )
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: input must be [..., {self.in_features}], got shape {tuple(input.shape)}; "
                "reshape it"
            )
        if input.dtype not in FLOATS and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"{type(self).__name__}: input must be float32 or bfloat16, got {input.dtype}; convert it")
        if is_grad_enabled() or forward_ad._current_level >= 0:
            return ops.codebook_matmul(
                input, self.codes, self.codebook, self.bias, self.column_block, "exact", self.relu
            )
        return ops.codebook_matmul_inference(
            input, self.codes, self.codebook, self.bias, self.column_block, LAYOUTS[self._layout], self.relu
        )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        tables, entries = self.codebook.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tables={tables}, entries={entries}"
            + (f", column_block={self.column_block}" if self.column_block else "")
            + ("" if self._layout == self.plain_layout else f", layout={self._layout}")
            + ", relu=True" * self.relu
        )

    # ---- state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.codebook.data
        grad = None if self.codebook.grad is None else self.codebook.grad.data
        super()._apply(fn, recurse)
        if self.codebook.dtype != before.dtype:
            self.codebook.grad = None
            self.codebook.data = before.to(self.codebook.device)
            self.codebook.grad = None if grad is None else grad.to(self.codebook.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes other tables and entries too: they come with the state."""
        errors: list[str] = args[-1]
        incoming = {field: state_dict.get(prefix + field) for field in ("codes", "codebook")}
        if all(isinstance(tensor, Tensor) for tensor in incoming.values()):
            try:
                weight = CodebookWeight(columns=self.in_features, column_block=self.column_block, **incoming)  # type: ignore[arg-type]
                weight.validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
            for field, tensor in incoming.items():
                current = getattr(self, field)
                if tensor is not None and weight.shape[0] == self.out_features and current.shape != tensor.shape:
                    # A parameter stays the same object, so that an optimizer that holds it goes on with it.
                    current.data = current.new_empty(tensor.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def shared_weight(module: nn.Module) -> CodebookWeight | None:
    """The weight of a module whose parametrization has codes and tables, or None for another."""
    lists: Any = getattr(module, "parametrizations", None)
    held: Any = None if lists is None or "weight" not in lists else lists["weight"][0]
    codes, codebook = getattr(held, "codes", None), getattr(held, "codebook", None)
    if not (isinstance(codes, Tensor) and isinstance(codebook, Tensor) and codebook.dim() == 2):
        return None
    weight = CodebookWeight.from_codes(
        codes.reshape(codes.shape[0], -1),
        codebook.detach().float().clone(),
        column_block=getattr(held, "column_block", 0),
    )
    dense: Any = module.weight
    # Where the mask hides a value that is not 0, or the dtype rounds one, the tables do not say all.
    return weight if torch.equal(weight.to_dense(), dense.detach().float().reshape(weight.shape)) else None


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied layers stay tied."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
