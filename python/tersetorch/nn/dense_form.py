"""What every layer shares that stands for a plain one: its sizes, and the way from the plain layer and back."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from tersetorch.ops._floats import FLOATS, floats_beside, refusal

Dense = TypeVar("Dense", bound=nn.Module)


class DenseForm(nn.Module, Generic[Dense]):
    """A layer that stands for one of dense_type, with its sizes under the names that it has there.

    LinearSizes and ConvSizes know the sizes, a family of layers its tensors; a layer is both.
    """

    dense_type: ClassVar[type[nn.Module]]

    # ---- sizes

    def _set_sizes(self, *args: Any, **kwargs: Any) -> None:
        """Notes the sizes of a weight as a matrix, [rows, columns], and those that the constructor was given."""
        raise NotImplementedError

    @classmethod
    def _sized(cls, **sizes: Any) -> Self:
        """A layer of sizes as _own_sizes has them, without tensors."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        shape, more = cls._split_sizes(**sizes)
        layer._set_sizes(shape, **more)
        return layer

    @classmethod
    def _split_sizes(cls, *args: Any, **kwargs: Any) -> tuple[tuple[int, int], dict[str, Any]]:
        """What _set_sizes takes, from what _own_sizes has."""
        raise NotImplementedError

    @classmethod
    def _sizes_of(cls, module: Any) -> dict[str, Any]:
        """What the constructor takes of a plain layer's sizes, beside the weight's."""
        raise NotImplementedError

    def _own_sizes(self) -> dict[str, Any]:
        """The sizes under the names that constructors take, where they differ from the defaults."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """What of_sizes takes beside the sizes, where it differs from the defaults."""
        return {}

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes, or without one the constructor, takes to make a layer of the same sizes and options."""
        return {**self._own_sizes(), **self._config()}

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the dense weight."""
        raise NotImplementedError

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as formats have it."""
        shape = self.weight_shape
        return shape[0], shape[1:].numel()

    # ---- the plain layer

    @classmethod
    def _check_source(cls, module: object) -> None:
        """Refuses what is no layer of dense_type."""
        kind = cls.dense_type
        if not isinstance(module, kind):
            raise TypeError(
                f"{cls.__name__}: module must be an nn.{kind.__name__}, got {type(module).__name__}; pass a layer"
            )

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        raise NotImplementedError

    def to_dense(self) -> Dense:
        """The plain layer with the same weight and bias."""
        return cast(Dense, self._filled(self._dense()))

    def _dense(self) -> Any:
        """A plain layer of these sizes, without data."""
        raise NotImplementedError

    def _filled(self, dense: Any) -> Any:
        """It with this one's weight and bias, of one dtype: float32 where they differ and one needs it."""
        of: Any = self
        weight, bias = self.weight, None if of.bias is None else of.bias.detach().clone()
        if bias is not None and bias.dtype != weight.dtype:
            narrow = weight.to(bias.dtype)
            weight, bias = (narrow, bias) if torch.equal(narrow.float(), weight) else (weight, bias.float())
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        return dense.train(self.training)

    # ---- the rest

    def _check_tensor(self, x: object) -> None:
        """Refuses an input that is no tensor of floats."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor"
            )
        if x.dtype not in floats_beside(x) and not torch.is_autocast_enabled(x.device.type):
            raise refusal(type(self).__name__, "input", x, floats_beside(x))

    def _shown_sizes(self) -> list[str]:
        raise NotImplementedError

    def _shown(self) -> list[str]:
        """What extra_repr says beside the sizes."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return ", ".join([*self._shown_sizes(), *self._shown()])


class LinearSizes(DenseForm[nn.Linear]):
    """Sizes under the names that torch.nn.Linear gives them."""

    dense_type = nn.Linear

    in_features: int
    out_features: int

    def _set_sizes(self, shape: tuple[int, int]) -> None:
        self.out_features, self.in_features = shape

    @classmethod
    def _split_sizes(cls, in_features: int, out_features: int) -> tuple[tuple[int, int], dict[str, Any]]:
        return (out_features, in_features), {}

    @classmethod
    def _sizes_of(cls, module: Any) -> dict[str, Any]:
        return {}

    def _own_sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the dense weight, [out_features, in_features]."""
        return torch.Size((self.out_features, self.in_features))

    def _dense(self) -> nn.Linear:
        of: Any = self
        return nn.Linear(self.in_features, self.out_features, of.bias is not None, device="meta")

    def _check_input(self, x: Any) -> None:
        """Refuses what is no float tensor [..., in_features]."""
        self._check_tensor(x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: input must be [..., {self.in_features}], got shape {tuple(x.shape)}; "
                "reshape it"
            )

    def _shown_sizes(self) -> list[str]:
        return [f"{name}={value}" for name, value in self._own_sizes().items()]


def restore(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    """Gives a parameter that changed its dtype these numbers and this gradient again, where it lies now."""
    parameter.grad = None
    parameter.data = data.to(parameter.device)
    parameter.grad = None if grad is None else grad.to(parameter.device)


def changed(layer: nn.Module, usual: dict[str, Any]) -> dict[str, Any]:
    """A layer's attributes of these names, where they differ from these values."""
    return {name: getattr(layer, name) for name, value in usual.items() if getattr(layer, name) != value}


def check_bias(where: str, bias: object, rows: int) -> None:
    """Refuses what is neither None nor floats [rows]."""
    if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in FLOATS):
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{where}: bias must be float32 or bfloat16, got {got}; convert it")
    if isinstance(bias, Tensor) and bias.shape != (rows,):
        raise ValueError(
            f"{where}: bias must be [{rows}], one for each row of the weight, got shape {tuple(bias.shape)}; "
            "pass the bias of the same layer"
        )


def check_relu(where: str, relu: object) -> None:
    """Refuses what is no bool."""
    if not isinstance(relu, bool):
        raise TypeError(f"{where}: relu must be True or False, got {relu!r}; pass a bool")


def check_size(where: str, name: str, value: object, most: int | None = None) -> None:
    """Refuses what is no int of at least 1, and at most that."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}; pass a whole number")
    if value < 1 or (most is not None and value > most):
        limits = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{where}: {name} must be {limits}, got {value}; pass a number in that range")


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied layers stay tied."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def bias_of(module: Any) -> Tensor | None:
    """A copy of a plain layer's bias, or None."""
    return None if module.bias is None else module.bias.detach().clone()
