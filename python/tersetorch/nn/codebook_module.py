"""What layers share whose weights are codes into tables: tensors, dense weight, layouts, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad

from tersetorch import ops
from tersetorch.formats import CodebookWeight

FLOATS = (torch.float32, torch.bfloat16)
# What pack() takes, and the op's mode for it.
LAYOUTS = {"codebook": "exact", "codebook_bfloat16": "bfloat16", "codebook_int8": "int8"}
MAX_INT8_WEIGHTS = 128 * 1024

Dense = TypeVar("Dense", nn.Linear, nn.Conv2d)


class CodedModule(nn.Module):
    """A layer with a buffer codes, packed, and parameters codebook float32 [tables, entries] and bias, or None.

    The codebook stays float32 under .half(), .bfloat16() and .double(): rounding it would move every weight.
    """

    format = CodebookWeight
    parameter_field = "codebook"
    plain_layout = "codebook"
    dense_type: ClassVar[type[nn.Linear] | type[nn.Conv2d]]

    codes: Tensor
    codebook: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: CodebookWeight, bias: Tensor | None, relu: bool) -> None:
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
        self._columns = weight.columns
        self.column_block, self.relu = weight.column_block, relu
        self._layout = self.plain_layout
        self.register_buffer("codes", weight.codes)
        self.codebook = _as_parameter(weight.codebook)
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))

    @classmethod
    def _parts_of(cls, module: Any) -> tuple[CodebookWeight, Tensor | None]:
        """The weight and the bias of a dense layer."""
        kind = cls.dense_type
        if not isinstance(module, kind):
            raise TypeError(
                f"{cls.__name__}: module must be an nn.{kind.__name__}, got {type(module).__name__}; pass a layer"
            )
        weight = shared_weight(module)
        if weight is None:
            weight = CodebookWeight.from_dense(module.weight.detach().flatten(1))
        return weight, None if module.bias is None else module.bias.detach().clone()

    def _filled(self, dense: Dense) -> Dense:
        """A dense layer with this one's weight and bias, of one dtype: float32 where they differ and one needs it."""
        weight, bias = self.weight, None if self.bias is None else self.bias.detach().clone()
        if bias is not None and bias.dtype != weight.dtype:
            narrow = weight.to(bias.dtype)
            weight, bias = (narrow, bias) if torch.equal(narrow.float(), weight) else (weight, bias.float())
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        return dense.train(self.training)

    @property
    def codebook_weight(self) -> CodebookWeight:
        """The weight in its format; it shares memory with the layer."""
        return CodebookWeight(self.codes, self.codebook, self._columns, self.column_block)

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
            layout: "codebook", exact; "codebook_bfloat16" or "codebook_int8", with tables and inputs rounded as
                ops.codebook_matmul or ops.codebook_conv2d says of its modes. .weight stays exact.

        Raises:
            ValueError: no such layout, or rows with more weights than it can hold.
        """
        if layout not in LAYOUTS:
            raise ValueError(
                f"{type(self).__name__}: layout must be one of {list(LAYOUTS)}, got {layout!r}; choose one of them"
            )
        if layout == "codebook_int8" and self._columns > MAX_INT8_WEIGHTS:
            raise ValueError(
                f"{type(self).__name__}: a row must have at most {MAX_INT8_WEIGHTS} weights in layout "
                f"'codebook_int8', got {self._columns}; choose another layout"
            )
        self._layout = layout
        return self

    @property
    def _mode(self) -> str:
        """The op's mode while gradients are off."""
        return LAYOUTS[self._layout]

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """What of_sizes takes besides sizes of its own, where it differs from the defaults."""
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
        """For extra_repr."""
        tables, entries = self.codebook.shape
        shown = [f"bias={self.bias is not None}", f"tables={tables}", f"entries={entries}"]
        shown += [f"column_block={self.column_block}"] * bool(self.column_block)
        return shown + [f"layout={self._layout}"] * (self._layout != self.plain_layout) + ["relu=True"] * self.relu

    def _check_tensor(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor"
            )
        if x.dtype not in FLOATS and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{type(self).__name__}: input must be float32 or bfloat16, got {x.dtype}; convert it")

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
                weight = CodebookWeight(columns=self._columns, column_block=self.column_block, **incoming)  # type: ignore[arg-type]
                weight.validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
            for field, tensor in incoming.items():
                current = getattr(self, field)
                if tensor is not None and weight.shape[0] == self.codes.shape[0] and current.shape != tensor.shape:
                    # A parameter stays the same object, so that an optimizer that holds it goes on with it.
                    current.data = current.new_empty(tensor.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def records() -> bool:
    """Whether a call must be seen by autograd."""
    return is_grad_enabled() or forward_ad._current_level >= 0


def zero_weight(rows: int, columns: int, tables: int, entries: int, column_block: int) -> CodebookWeight:
    """A weight of zeros, for tensors that come from elsewhere."""
    codes = torch.zeros(rows, ops.codebook_row_bytes(entries, columns, column_block), dtype=torch.uint8)
    return CodebookWeight(codes, torch.zeros(tables, entries), columns, column_block)


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
