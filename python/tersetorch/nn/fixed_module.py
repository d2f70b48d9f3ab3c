"""What layers in fixed point share: whole numbers, their formats, state."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tersetorch import ops
from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.formats.fixed_format import FixedFormats, as_fixed, noted_formats
from tersetorch.nn.dense_form import DenseForm
from tersetorch.nn.sparse_module import State, state_of
from tersetorch.ops._floats import FLOATS, computable, floats_beside, refusal

NARROW, WIDE = 8, 16

_round_whole = ops.native_op("fixed_round_whole")


class FixedPointModule(DenseForm[Any]):
    """A layer that rounds its input to <IL,FL>, multiplies whole numbers exactly and rounds each sum once.

    It has no gradients: train with tt.quantize.fixed_point. Its tensors are buffers: steps int8 or int16, the weight
    in whole steps, int8 where weight and input have at most 8 bits; bias int64 [rows], in units of the sums, 2^-F with
    F the fraction bits of input and weight together, or None. No .half() or .double() changes them.

    packed_steps repeats steps in the order in which the product reads them, in no state_dict; of_sizes leaves it to the
    first call. A call that finds steps changed in place packs them anew, unless it is compiled: compile after the last
    change. A write through .data, or to tensors made in inference mode, leaves no trace: call load_state_dict() after
    it.

    Attributes:
        weight_format, input_format: of at most 16 bits.
        output_format: of at most 24 bits.
    """

    layout = plain_layout = "fixed"  # how it computes, as other layers name it

    steps: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: FixedWeight,
        bias: Tensor | None,
        input_format: str | FixedFormat,
        output_format: str | FixedFormat,
        **sizes: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(weight, FixedWeight):
            raise TypeError(f"{name}: weight must be a FixedWeight, got {type(weight).__name__}; call from_dense")
        weight.validate()
        self._take_formats(weight.format, input_format, output_format)
        self._set_sizes(weight.shape, **sizes)
        _check_bias(name, bias, weight.shape[0])
        self._hold(weight.steps.to(self._whole), bias)

        self._repack()

    def _hold(self, steps: Tensor, bias: Tensor | None) -> None:
        self.register_buffer("steps", steps)
        self.register_buffer("bias", bias)
        self._packed_from: State | None = None

    def _repack(self) -> None:
        self._packed_from = state_of(self.steps)
        self._buffers.pop("packed_steps", None)
        if not self.steps.is_meta:
            self.register_buffer("packed_steps", self._pack(), persistent=False)

    def _pack(self) -> Tensor:
        """The steps as the op takes them."""
        raise NotImplementedError

    def _packed(self) -> Tensor:
        """The same, packed before unless steps have changed since."""
        if not is_compiling() and self._packed_from != state_of(self.steps):
            self._repack()
        packed = self._buffers.get("packed_steps")
        return self._pack() if packed is None else packed

    def _take_formats(
        self, weight: FixedFormat, input_format: str | FixedFormat, output_format: str | FixedFormat
    ) -> None:
        name = type(self).__name__
        self.weight_format = weight
        self.input_format = as_fixed(name, "input_format", input_format)
        self.output_format = as_fixed(name, "output_format", output_format)
        if self.input_format.bits > WIDE:
            raise ValueError(
                f"{name}: input_format must have at most {WIDE} bits, got {self.input_format}; pass a narrower one"
            )
        narrow = max(weight.bits, self.input_format.bits) <= NARROW
        self._whole = torch.int8 if narrow else torch.int16

    @classmethod
    def from_dense(
        cls,
        module: Any,
        weight_format: str | FixedFormat | None = None,
        input_format: str | FixedFormat | None = None,
        output_format: str | FixedFormat | None = None,
    ) -> Self:
        """The layer in fixed point, its weight rounded to the nearest and its bias to the nearest unit of the sums.

        Args:
            module: nn.Linear or nn.Conv2d, as the layer is, with a finite weight and bias, float32 or bfloat16.
            weight_format: "<IL,FL>" of at most 16 bits. This and the next two may be left out where fixed_formats, or
                finalize of a model in fixed point, has left formats at module.
            input_format: of at most 16 bits.
            output_format: of at most 24 bits.

        Raises:
            TypeError: module is no such layer, or its weight is neither float32 nor bfloat16.
            ValueError: a format is missing or none, or module holds NaN or infinity.
        """
        cls._check_source(module)
        formats = cls._formats(module, weight_format, input_format, output_format)
        layer = cls(
            FixedWeight.from_dense(cls._as_matrix(module.weight), formats.weight),
            cls._whole_bias(module, formats),
            input_format=formats.input,
            output_format=formats.output,
            **cls._sizes_of(module),
        )
        return layer.train(module.training)

    @classmethod
    def of_sizes(
        cls, *, weight_format: str, input_format: str, output_format: str, bias: bool = True, **sizes: Any
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere; sizes are the plain layer's."""
        layer = cls._sized(**sizes)
        layer._take_formats(as_fixed(cls.__name__, "weight_format", weight_format), input_format, output_format)
        rows, columns = layer._matrix_shape
        steps = torch.zeros(rows, columns, dtype=layer._whole)
        layer._hold(steps, torch.zeros(rows, dtype=torch.int64) if bias else None)
        return layer

    @classmethod
    def _as_matrix(cls, weight: Tensor) -> Tensor:
        """A dense weight as steps have it."""
        return weight

    @property
    def fixed_weight(self) -> FixedWeight:
        """The weight in its format, as the kernel has it."""
        return FixedWeight(self.steps, self.weight_format)

    def validate(self) -> None:
        """Checks what to_dense relies on.

        Raises:
            TypeError, ValueError: a tensor has another dtype or shape than the class names, or no numbers of a format.
        """
        if self.steps.dtype != self._whole:
            raise TypeError(f"{type(self).__name__}: steps must be {self._whole}, got {self.steps.dtype}")
        self.fixed_weight.validate()
        _check_bias(type(self).__name__, self.bias, self.steps.shape[0])

    @property
    def unit(self) -> float:
        """What 1 of a sum, and of the bias, stands for."""
        return self.weight_format.step * self.input_format.step

    def _config(self) -> dict[str, Any]:
        formats = {f"{name}_format": str(getattr(self, f"{name}_format")) for name in ("weight", "input", "output")}
        return {**formats, **({} if self.bias is not None else {"bias": False})}

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why from_dense refuses a layer that brings its own formats, or None."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        formats = noted_formats(module)
        if formats is None:
            return "no formats known; call tt.quantize.fixed_formats, or train with tt.quantize.fixed_point"
        if weight.dtype not in FLOATS:
            return f"weights of {weight.dtype}"
        if max(formats.weight.bits, formats.input.bits) > WIDE:
            return f"formats of more than {WIDE} bits"
        return None if bool(weight.detach().isfinite().all()) else "NaN or infinity in the weight"

    @classmethod
    def _formats(
        cls,
        module: nn.Module,
        weight: str | FixedFormat | None,
        input: str | FixedFormat | None,
        output: str | FixedFormat | None,
    ) -> FixedFormats:
        """Those that were given, else those noted at module."""
        name = cls.__name__
        given: dict[str, str | FixedFormat | None] = {"weight": weight, "input": input, "output": output}
        noted = noted_formats(module)
        found = {}
        for what, format in given.items():
            if format is None and noted is None:
                raise ValueError(
                    f"{name}: {what}_format must be given for a layer without formats, got None; pass one such as "
                    "'<2,14>', or call tt.quantize.fixed_formats(model, data)"
                )
            found[what] = as_fixed(name, f"{what}_format", getattr(noted, what) if format is None else format)
        return FixedFormats(**found)

    @staticmethod
    def _whole_bias(module: nn.Linear | nn.Conv2d, formats: FixedFormats) -> Tensor | None:
        """The bias to the nearest unit of the sums."""
        if module.bias is None:
            return None
        bias = module.bias.detach().double() / (formats.weight.step * formats.input.step)
        if not bool(bias.isfinite().all()):
            raise ValueError("FixedPoint layers: bias must be finite, got NaN or infinity; repair the training")
        return (bias + 0.5).floor().clamp(-(2.0**61), 2.0**61).long()

    def _filled(self, dense: Any) -> Any:
        """It with this one's weight and bias, both float32."""
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter((self.bias.double() * self.unit).float())
        return dense.train(self.training)

    def _rounded(self, x: object) -> Tensor:
        """The input in whole steps."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
        x = computable(x)
        if x.dtype not in floats_beside(x):
            raise refusal(name, "input", x, floats_beside(x))
        f = self.input_format
        whole: Tensor = _round_whole(x.detach(), f.integer_bits, f.fraction_bits, self._whole, "nearest", 0, 0)
        return whole

    @property
    def _conversion(self) -> tuple[int, int, int, torch.dtype]:
        """What ops take for a sum to become a float of output_format."""
        f, fraction_bits = self.output_format, self.input_format.fraction_bits + self.weight_format.fraction_bits
        return fraction_bits, f.integer_bits, f.fraction_bits, torch.float32

    def _shown(self) -> list[str]:
        formats = [f"{name}={getattr(self, name + '_format')}" for name in ("weight", "input", "output")]
        return [f"bias={self.bias is not None}", *formats]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As nn.Module's, but that steps must be numbers of the format."""
        errors: list[str] = args[-1]
        steps = state_dict.get(prefix + "steps")
        if isinstance(steps, Tensor) and steps.shape == self.steps.shape:
            try:
                FixedWeight(steps, self.weight_format).validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._repack()


def _check_bias(name: str, bias: object, rows: int) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype != torch.int64:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{name}: bias must be int64, in units of the sums, got {got}; call from_dense")
    if tuple(bias.shape) != (rows,):
        raise ValueError(f"{name}: bias must be [{rows}], got shape {tuple(bias.shape)}; pass that of the same layer")
