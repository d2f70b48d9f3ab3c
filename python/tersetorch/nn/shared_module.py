"""What layers share whose weight is codes into values that train: tensors, dense weight, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad

from tersetorch.formats import CodebookWeight, ProductWeight
from tersetorch.nn.dense_form import DenseForm, as_parameter, check_bias, check_relu, restore
from tersetorch.nn.resized import resize


class SharedModule(nn.Module):
    """A layer with a buffer codes, packed, and a parameter of float32 values, both fields of its format.

    Values stay float32 under .half(), .bfloat16() and .double(): rounding them would move every weight.
    """

    format: ClassVar[type[CodebookWeight] | type[ProductWeight]]
    parameter_field: ClassVar[str]

    codes: Tensor

    def _weight_of(self, codes: Tensor, values: Tensor) -> Any:
        """The weight of this layer's sizes that has these tensors, unchecked."""
        raise NotImplementedError

    def _check_form(self, weight: Any) -> None:
        """Refuses, with ValueError, a valid weight that this layer does not hold."""

    def _check_weight(self, weight: Any) -> None:
        name, kind = type(self).__name__, self.format.__name__
        if not isinstance(weight, self.format):
            raise TypeError(f"{name}: weight must be a {kind}, got {type(weight).__name__}; call from_dense")
        weight.validate()
        self._check_form(weight)

    def _hold_weight(self, weight: Any) -> None:
        self.register_buffer("codes", weight.codes)
        self.register_parameter(self.parameter_field, as_parameter(getattr(weight, self.parameter_field)))

    @property
    def shared_weight(self) -> Any:
        """The weight in its format; it shares memory with the layer."""
        return self._weight_of(self.codes, getattr(self, self.parameter_field))

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        dense: Tensor = self.shared_weight.to_dense().detach()
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        values: nn.Parameter = getattr(self, self.parameter_field)
        before, grad = values.data, None if values.grad is None else values.grad.data
        super()._apply(fn, recurse)
        values = getattr(self, self.parameter_field)
        if values.dtype != before.dtype:
            restore(values, before, grad)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside torch's version numbers, so that the names in a state stay those of the tensors.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and hasattr(self, "column_block"):
            metadata["column_block"] = self.column_block

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes other numbers of values too: they come with the state."""
        errors: list[str] = args[-1]
        # Tables of rows and of blocks may have the same shapes; older states and plain dicts do not say which they are.
        mine = getattr(self, "column_block", None)
        theirs = args[0].get("column_block", mine)
        values = state_dict.get(prefix + self.parameter_field)
        if theirs != mine and isinstance(values, Tensor) and values.shape[:1] != (1,):
            errors.append(
                f"{prefix.removesuffix('.') or type(self).__name__}: column_block must be {mine}, as the layer's, got "
                f"a state of {theirs}; load it into a layer of that column_block"
            )
            return
        incoming = {field: state_dict.get(prefix + field) for field in ("codes", self.parameter_field)}
        codes, values = incoming.values()
        if isinstance(codes, Tensor) and isinstance(values, Tensor):
            try:
                weight = self._weight_of(codes, values)
                weight.validate()
                self._check_form(weight)
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
            same = weight.shape == self.shared_weight.shape
            for field, tensor in incoming.items():
                current = getattr(self, field)
                if tensor is not None and same and current.shape != tensor.shape:
                    # A parameter stays the same object, so that an optimizer that holds it goes on with it.
                    resize(current, tensor.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharedProduct(SharedModule, DenseForm[Any]):
    """One of them that multiplies by its weight, with a bias [rows] or None, and a ReLU of its own where it is told."""

    bias: nn.Parameter | None

    def __init__(self, weight: Any, bias: Tensor | None = None, relu: bool = False, **sizes: Any) -> None:
        super().__init__()
        name = type(self).__name__
        self._check_weight(weight)
        check_relu(name, relu)
        check_bias(name, bias, weight.shape[0])
        self._hold(weight, bias, relu)
        self._set_sizes(weight.shape, **sizes)

    def _hold(self, weight: Any, bias: Tensor | None, relu: bool) -> None:
        self.relu = relu
        self._hold_weight(weight)
        self.register_parameter("bias", None if bias is None else as_parameter(bias))

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        return super().weight.view(self.weight_shape)


def records() -> bool:
    """Whether a call must be seen by autograd."""
    return is_grad_enabled() or forward_ad._current_level >= 0
