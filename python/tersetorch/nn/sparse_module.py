"""What every linear layer over a sparse format shares: its dense form, its checks and its state."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tersetorch import ops
from tersetorch.formats import CsrWeight, SparseCodebookWeight

FLOATS = (torch.float32, torch.bfloat16)

Format = TypeVar("Format", CsrWeight, SparseCodebookWeight)


class SparseLinearBase(nn.Module, Generic[Format]):
    """y = x @ W.T + bias with W kept in a sparse format; the layer's tensors have the names of the format's fields.

    What trains (values or a codebook, and the bias) are parameters, the rest are buffers.
    """

    format: ClassVar[type[CsrWeight] | type[SparseCodebookWeight]]
    buffer_fields: ClassVar[tuple[str, ...]]
    parameter_field: ClassVar[str]

    row_offsets: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Format, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, self.format):
            raise TypeError(
                f"{type(self).__name__}: weight must be a {self.format.__name__}, got {type(weight).__name__}; "
                "call from_dense on the layer it comes from"
            )
        weight.validate()
        self.out_features, self.in_features = weight.shape
        if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in FLOATS):
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"{type(self).__name__}: bias must be float32 or bfloat16, got {got}; convert it")
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"{type(self).__name__}: bias must be [{self.out_features}], one for each row of the weight, "
                f"got shape {tuple(bias.shape)}; pass the bias of the same layer"
            )
        for field in self.buffer_fields:
            self.register_buffer(field, getattr(weight, field))
        self.register_parameter(self.parameter_field, _as_parameter(getattr(weight, self.parameter_field)))
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))

    @classmethod
    def from_dense(cls, module: nn.Linear) -> Self:
        """The layer that computes what module computes, from the non-zeros of its weight.

        Raises:
            TypeError: module is not an nn.Linear, or its weight is neither float32 nor bfloat16.
            ValueError: the format cannot hold the weight.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.__name__}: module must be an nn.Linear, got {type(module).__name__}; pass a layer")
        bias = None if module.bias is None else module.bias.detach().clone()
        return cls(cast(Format, cls.format.from_dense(module.weight)), bias).train(module.training)

    def to_dense(self) -> nn.Linear:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        weight, bias = self.weight, None if self.bias is None else self.bias.detach().clone()
        if bias is not None and bias.dtype != weight.dtype:
            narrow = weight.to(bias.dtype)
            weight, bias = (narrow, bias) if torch.equal(narrow.float(), weight) else (weight, bias.float())
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        return dense.train(self.training)

    @property
    def sparse_weight(self) -> Format:
        """The weight in its format; it shares memory with the layer."""
        fields = {field: getattr(self, field) for field in (*self.buffer_fields, self.parameter_field)}
        return cast(Format, self.format(**fields, columns=self.in_features))

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], built anew at every read; writing to it changes nothing."""
        return self.sparse_weight.to_dense().detach()

    def _multiply(self, x: Tensor, values: Tensor, codebook: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor"
            )
        if x.dtype not in FLOATS and not torch.is_autocast_enabled("cpu"):
            raise TypeError(f"{type(self).__name__}: input must be float32 or bfloat16, got {x.dtype}; convert it")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: input must be [..., {self.in_features}], got shape {tuple(x.shape)}; "
                "reshape it"
            )
        # The twin drops forward-mode tangents, which no_grad does not switch off; csr_matmul refuses them.
        recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
        multiply = ops.csr_matmul if recorded else ops.csr_matmul_inference
        return multiply(x, self.row_offsets, self.col_indices, values, self.bias, codebook)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.col_indices.numel()}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes another sparsity too: the positions come with the state, so their number may differ from today's."""
        errors: list[str] = args[-1]
        fields = (*self.buffer_fields, self.parameter_field)
        if all(prefix + field in state_dict for field in fields):
            incoming: dict[str, Any] = {field: state_dict[prefix + field] for field in fields}
            try:
                weight = self.format(**incoming, columns=self.in_features)
                weight.validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
            if weight.shape[0] == self.out_features:
                for field, tensor in incoming.items():
                    current = getattr(self, field)
                    if current.shape != tensor.shape:
                        # A parameter stays the same object, so that an optimizer that holds it goes on with it.
                        current.data = current.new_empty(tensor.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied layers stay tied."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
