"""What every linear layer over a sparse format shares: its dense form, its checks, its state and how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn.layout import LAYOUTS, PREFIX

FLOATS = (torch.float32, torch.bfloat16)

# A tensor's version (None where it counts none) and address: what tells that its numbers are still the same.
State = tuple[int | None, int]

Format = TypeVar("Format", CsrWeight, SparseCodebookWeight)


class SparseLinearBase(nn.Module, Generic[Format]):
    """y = x @ W.T + bias with W kept in a sparse format; the layer's tensors have the names of the format's fields.

    What trains (values or a codebook, and the bias) are parameters, the rest are buffers.

    Without gradients the layer may compute from a second layout of its weight, which pack() derives: buffers
    packed_*, which are in no state_dict. They cost memory beside the weight itself. Training mode drops them, eval()
    and load_state_dict() build them anew, and so does a call that finds values or codes changed in place, unless it
    is compiled: compile after the last change. A write through .data, or to tensors made in inference mode, leaves no
    trace: call pack() again after it.
    """

    format: ClassVar[type[CsrWeight] | type[SparseCodebookWeight]]
    buffer_fields: ClassVar[tuple[str, ...]]
    parameter_field: ClassVar[str]
    # The field whose numbers a packed layout repeats in another order.
    packed_field: ClassVar[str]

    row_offsets: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Format, bias: Tensor | None = None) -> None:
        super().__init__()
        # What pack() was asked for, the options that make the next packing the same, and the packed weight's sizes.
        self._layout: str | None = None
        self._options: dict[str, Any] = {}
        self._sizes: dict[str, Any] = {}
        self._packed_kind: type[Any] | None = None
        # What the buffers packed_* come from: name, tensor (None in a copy, until it is called), and its state then.
        # Without such buffers, None.
        self._packed_from: tuple[tuple[str, Tensor | None, State], ...] | None = None
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

    # ---- layouts

    @property
    def layout(self) -> str:
        """What the layer computes from without gradients: "csr", or the layout that pack() was given."""
        return self._layout or "csr"

    @property
    def layout_options(self) -> dict[str, Any]:
        """The keyword arguments that pack() takes to lay another layer out alike."""
        return dict(self._options)

    def pack(self, layout: str, **options: Any) -> Self:
        """Computes without gradients from another layout of the weight from now on; returns the layer.

        In training mode the layout is remembered, and built by eval().

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
        if layout == "csr":
            if options:
                raise TypeError(
                    f"{type(self).__name__}: layout 'csr' takes no options, got {', '.join(options)}; leave them out"
                )
            self._drop_packed()
            self._layout, self._options, self._sizes, self._packed_kind = None, {}, {}, None
            return self
        if layout not in LAYOUTS:
            raise ValueError(
                f"{type(self).__name__}: layout must be one of {['csr', *LAYOUTS]}, got {layout!r}; choose one of them"
            )
        packed = self._packed_of(layout, options)
        self._layout, self._options = layout, {name: getattr(packed, name) for name in LAYOUTS[layout].options}
        self._hold(packed)
        if self.training:
            self._drop_packed()
        return self

    @property
    def packed_weight(self) -> Any:
        """The weight in the format of the layout in use; it shares memory with the layer. None for "csr"."""
        if self._packed_kind is None or self._packed_from is None:
            return None
        fields = {}
        for field in dataclasses.fields(self._packed_kind):
            packed = self._buffers.get(PREFIX + field.name)
            own = self._own(field.name) if packed is None else packed
            fields[field.name] = self._sizes[field.name] if own is None else own
        return self._packed_kind(**fields)

    def _packed_of(self, layout: str, options: dict[str, Any]) -> Any:
        return LAYOUTS[layout].pack[self.format](self.sparse_weight, **options)

    def _hold(self, packed: Any) -> None:
        """Takes the tensors of a packed weight as buffers, but for those that are the layer's own."""
        self._sizes, self._packed_kind = {}, type(packed)
        shared = set()
        for field in dataclasses.fields(packed):
            value = getattr(packed, field.name)
            if not isinstance(value, Tensor):
                self._sizes[field.name] = value
            elif value is self._own(field.name):
                shared.add(field.name)
            else:
                self.register_buffer(PREFIX + field.name, value, persistent=False)
        # Positions are exchanged as a whole, never changed in place; numbers are, which matters where the packed weight
        # has others than the layer's own.
        repeated = {"col_indices": self.col_indices, self.packed_field: getattr(self, self.packed_field)}
        if self.parameter_field not in {field.name for field in dataclasses.fields(packed)}:
            repeated[self.parameter_field] = getattr(self, self.parameter_field)
        self._packed_from = tuple(
            (name, source, state_of(source)) for name, source in repeated.items() if name not in shared
        )

    def _own(self, name: str) -> Tensor | None:
        """The layer's tensor of this name, also where functional_call has lent it another one."""
        parameter = self._parameters.get(name)
        return self._buffers.get(name) if parameter is None else parameter

    def _drop_packed(self) -> None:
        for name in [name for name in self._buffers if name.startswith(PREFIX)]:
            delattr(self, name)
        self._packed_from = None

    def _repack(self) -> None:
        # Layouts are packed and multiplied on the CPU; elsewhere the layer computes from its rows.
        if self._layout is not None and self.row_offsets.device.type == "cpu":
            self._hold(self._packed_of(self._layout, self._options))

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train: training mode drops the packed layout, eval mode builds it anew."""
        super().train(mode)
        if mode:
            self._drop_packed()
        elif not self._is_packed():
            self._repack()
        return self

    def _is_packed(self) -> bool:
        """Whether the buffers packed_* hold what the weight holds now."""
        if self._packed_from is None:
            return False
        return all(
            source is not None and source is self._own(name) and state_of(source) == state
            for name, source, state in self._packed_from
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module._apply; a packed layout is built anew, since some of its numbers keep their dtype."""
        packed = self._packed_from is not None
        self._drop_packed()
        self._convert(fn, recurse)
        if packed:
            self._repack()
        return self

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their versions from 0.
        packed = self._packed_from
        unknown = None if packed is None else tuple((name, None, (None, 0)) for name, _, _ in packed)
        return {**self.__dict__, "_packed_from": unknown}

    # ---- running

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        # The twin drops forward-mode tangents, which no_grad does not switch off; the recorded op refuses them.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            self._check_input(input)
            return self._recorded(input)
        try:
            if input.size(-1) == self.in_features:
                return self._unrecorded(input)
        except KeyError:  # a parametrization took a tensor out of the dictionaries
            return self._recorded(input)
        except Exception:
            self._check_input(input)  # its sentence comes before the op's
            raise
        self._check_input(input)
        raise AssertionError("unreachable")

    def _recorded(self, x: Tensor) -> Tensor:
        """The product with gradients."""
        raise NotImplementedError

    def _unrecorded(self, x: Tensor) -> Tensor:
        """The product without gradients, from the packed layout where there is one."""
        if self._layout is None or not self._use_packed():
            return self._from_rows(x)
        return LAYOUTS[self._layout].multiply(self, x)

    def _use_packed(self) -> bool:
        """Whether the buffers packed_* stand for the weight; packs anew where its numbers have changed."""
        packed = self._packed_from
        if torch.compiler.is_compiling() or packed is None:
            return packed is not None
        for name, source, state in packed:
            if source is not None:
                if self._own(name) is not source:
                    return False  # functional_call lent another one
                if state_of(source) == state:
                    continue
            self._repack()
            break
        return True

    def _from_rows(self, x: Tensor) -> Tensor:
        """The product without gradients, from the format itself."""
        raise NotImplementedError

    def _check_input(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor"
            )
        if x.dtype not in FLOATS and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{type(self).__name__}: input must be float32 or bfloat16, got {x.dtype}; convert it")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: input must be [..., {self.in_features}], got shape {tuple(x.shape)}; "
                "reshape it"
            )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.col_indices.numel()}" + ("" if self._layout is None else f", layout={self._layout}")
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
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.training and len(errors) == before:
            try:
                self._repack()
            except ValueError as error:  # the layout cannot hold these numbers
                self._drop_packed()
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")


def state_of(tensor: Tensor) -> State:
    """What changes when a tensor's numbers do, but for writes through .data and in inference mode."""
    return None if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied layers stay tied."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
