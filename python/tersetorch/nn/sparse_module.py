"""What every layer over a sparse format shares: its tensors, its state and the layouts that it computes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from tersetorch import ops
from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn.dense_form import DenseForm, as_parameter, bias_of, check_bias, check_relu, restore
from tersetorch.nn.layout import PREFIX, Layout

# A tensor's version (None where it counts none) and address: what tells that its numbers are still the same.
State = tuple[int | None, int]
# What packed numbers were made from: names, tensors and their states then.
Origin = tuple[tuple[str, Tensor | None, State], ...]

# A call that needs little looking: the layout's op and its arguments after x. They hold while the rest does: relu, the
# layer's own tensors as the dictionaries hold them, and what packed numbers come from, with its state.
Ready = tuple[
    Callable[..., Tensor],
    tuple[Any, ...],
    bool,
    list[tuple[dict[str, Any], str, Tensor | None]],
    list[tuple[Tensor, int | None, int]],
]

Format = TypeVar("Format", CsrWeight, SparseCodebookWeight)


class SparseModule(DenseForm[Any], Generic[Format]):
    """A layer whose weight, as a matrix, is kept in a sparse format; its tensors have the names of the format's fields.

    What trains (values or a codebook, and the bias) are parameters, the rest are buffers.

    Without gradients the layer may compute from a second layout of its weight: buffers packed_*, which are in no
    state_dict. They cost memory beside the weight itself. Training mode drops them, eval() and load_state_dict() build
    them anew, and so does a call that finds values or codes changed in place, unless it is compiled: compile after the
    last change. A write through .data, or to tensors made in inference mode, leaves no trace: call pack() again, or
    train() and eval(), after it. Layouts are the CPU's: moved to another device the layer has none and computes from
    its weight; eval() after the way back builds it.
    """

    format: ClassVar[type[CsrWeight] | type[SparseCodebookWeight]]
    buffer_fields: ClassVar[tuple[str, ...]]
    parameter_field: ClassVar[str]
    # The field whose numbers a packed layout repeats in another order.
    packed_field: ClassVar[str]
    # What pack() takes besides plain_layout, the one of a layer that pack() was never called on. That one may have no
    # row: the layer then computes from its format's own tensors.
    layouts: ClassVar[Mapping[str, Layout]]
    plain_layout: ClassVar[str]

    row_offsets: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None
    # Whether negative results become 0; of the layer, not of its weight: to_dense() and .weight know nothing of it.
    relu: bool

    def __init__(self, weight: Any, bias: Tensor | None = None, relu: bool = False, **sizes: Any) -> None:
        super().__init__()
        check_relu(type(self).__name__, relu)
        self.relu = relu
        # What pack() was asked for, the options that make the next packing the same, and the packed weight's sizes.
        self._layout = self.plain_layout
        self._options: dict[str, Any] = {}
        self._sizes: dict[str, Any] = {}
        self._packed_kind: type[Any] | None = None
        # What the buffers packed_* come from: name, tensor (None in a copy, until it is called), and its state then.
        # Without such buffers, None.
        self._packed_from: Origin | None = None
        self._ready: Ready | None = None
        # Whether eval(), or another step that must not fail half-way, left it to the next call to pack, or say why not.
        self._pending = False
        if not isinstance(weight, self.format):
            raise TypeError(
                f"{type(self).__name__}: weight must be a {self.format.__name__}, got {type(weight).__name__}; "
                "call from_dense on the layer it comes from"
            )
        weight.validate()
        check_bias(type(self).__name__, bias, weight.shape[0])
        for field in self.buffer_fields:
            self.register_buffer(field, getattr(weight, field))
        self.register_parameter(self.parameter_field, as_parameter(getattr(weight, self.parameter_field)))
        self.register_parameter("bias", None if bias is None else as_parameter(bias))
        self._set_sizes(weight.shape, **sizes)

    @classmethod
    def from_dense(cls, module: Any) -> Self:
        """The layer that computes what module computes, from the non-zeros of its weight.

        Args:
            module: nn.Linear, nn.Conv1d or nn.Conv2d, as the layer is.

        Raises:
            TypeError: module is no such layer, or its weight is neither float32 nor bfloat16.
            ValueError: the format cannot hold the weight.
            RuntimeError: a convolution's kernel is too large for the layout.
        """
        cls._check_source(module)
        weight = cls.format.from_dense(module.weight.detach().flatten(1))
        return cls(weight, bias_of(module), **cls._sizes_of(module)).train(module.training)

    @property
    def sparse_weight(self) -> Format:
        """The weight, as a matrix, in its format; it shares memory with the layer."""
        fields = {field: getattr(self, field) for field in (*self.buffer_fields, self.parameter_field)}
        return cast(Format, self.format(**fields, columns=self._matrix_shape[1]))

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        return self.sparse_weight.to_dense().detach().view(self.weight_shape)

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        """What ops take as values and codebook."""
        raise NotImplementedError

    # ---- layouts

    @property
    def layout(self) -> str:
        """What the layer computes from without gradients: what pack() was given, or plain_layout."""
        return self._layout

    @property
    def layout_options(self) -> dict[str, Any]:
        """The keyword arguments that pack() takes to lay another layer out alike."""
        return dict(self._options)

    def pack(self, layout: str, **options: Any) -> Self:
        """Computes without gradients from another layout of the weight from now on; returns the layer.

        In training mode the layout is remembered, and built by eval().

        Args:
            layout: plain_layout, which undoes an earlier pack(), or a name in layouts.
            options: what that layout takes; plain_layout takes none.

        Raises:
            ValueError: no such layout.
            TypeError, ValueError: options that the layout does not take, or a weight that it cannot hold; nothing has
                changed then.
        """
        plain = layout == self.plain_layout
        if plain and options:
            raise TypeError(
                f"{type(self).__name__}: layout {layout!r} takes no options, got {', '.join(options)}; leave them out"
            )
        if not plain and layout not in self.layouts:
            names = list(dict.fromkeys((self.plain_layout, *self.layouts)))
            raise ValueError(
                f"{type(self).__name__}: layout must be one of {names}, got {layout!r}; choose one of them"
            )
        row = self.layouts.get(layout)
        if row is not None and row.on_cpu and self.row_offsets.device.type != "cpu":
            row = None
        packed = None if row is None else row.pack(self, **options)
        self._drop_packed()
        self._layout, self._options, self._sizes, self._packed_kind = layout, {}, {}, None
        if row is not None:
            self._options = {name: getattr(packed, name) for name in row.options}
            self._hold(packed)
            if self.training:
                self._drop_packed()
        return self

    @property
    def packed_weight(self) -> Any:
        """The weight in the format of the layout in use; it shares memory with the layer. None where it has none."""
        if self._packed_kind is None or self._packed_from is None:
            return None
        fields = {}
        for field in dataclasses.fields(self._packed_kind):
            packed = self._buffers.get(PREFIX + field.name)
            own = self._own(field.name) if packed is None else packed
            fields[field.name] = self._sizes[field.name] if own is None else own
        return self._packed_kind(**fields)

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
        # Where the packed weight has others than the layer's own.
        repeated = {"col_indices": self.col_indices, self.packed_field: getattr(self, self.packed_field)}
        if self.parameter_field not in {field.name for field in dataclasses.fields(packed)}:
            repeated[self.parameter_field] = getattr(self, self.parameter_field)
        self._packed_from = tuple(
            (name, source, state_of(source)) for name, source in repeated.items() if name not in shared
        )
        self._ready = None
        self._pending = False

    def _own(self, name: str) -> Tensor | None:
        """The layer's tensor of this name, also where functional_call has lent it another one."""
        parameter = self._parameters.get(name)
        return self._buffers.get(name) if parameter is None else parameter

    def _drop_packed(self) -> None:
        for name in [name for name in self._buffers if name.startswith(PREFIX)]:
            delattr(self, name)
        self._packed_from = self._ready = None
        self._pending = False

    def _repack(self) -> None:
        """Packs the weight anew.

        Raises:
            ValueError: the layout cannot hold it.
        """
        # A layout is packed again on the CPU only; elsewhere the layer then computes from its rows.
        row = self.layouts.get(self._layout)
        if row is None or self.row_offsets.device.type != "cpu":
            return
        try:
            self._hold(row.pack(self, **self._options))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{type(self).__name__}: weight must be one that its layout {self._layout!r} can hold, got one refused "
                f"as '{error}'; mend it, or call pack() with another layout"
            ) from error

    def _try_repack(self) -> str | None:
        """Packs the weight anew, or leaves that to the next call and returns why it was refused."""
        try:
            self._repack()
        except ValueError as error:
            self._drop_packed()
            self._pending = True
            return str(error)
        return None

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train: training mode drops the packed layout, eval mode builds it anew.

        A weight that the layout cannot hold makes the next call without gradients raise, not this one, which would
        leave a model half-way between the modes.
        """
        super().train(mode)
        if mode:
            self._drop_packed()
        elif not self._is_packed():
            self._try_repack()
        return self

    def _is_packed(self) -> bool:
        """Whether the buffers packed_* hold what the weight holds now."""
        if self._packed_from is None:
            return False
        return all(
            source is not None and source is self._own(name) and state_of(source) == state
            for name, source, state in self._packed_from
        )

    # ---- running

    def _run(self, x: Tensor) -> Tensor:
        """The product: with gradients, or without them from the packed layout where there is one."""
        # The twin drops forward-mode tangents, which no_grad does not switch off; the recorded op refuses them.
        if is_grad_enabled() or forward_ad._current_level >= 0:
            return self._with_gradients(x)
        try:
            return self._unrecorded(x)
        except KeyError:  # a parametrization, or a shallow copy, took a tensor out of the dictionaries
            return self._recorded(x)

    def _with_gradients(self, x: Tensor) -> Tensor:
        """The product with gradients; a layout made from numbers that train is built anew before it is used again.

        An optimizer's step may follow, and a fused one does not count as a change of a tensor.
        """
        if self._packed_from is not None and not is_compiling():
            numbers = self._own(self.parameter_field)
            copied = any(name == self.parameter_field for name, _, _ in self._packed_from)
            if copied and numbers is not None and numbers.requires_grad:
                self._packed_from, self._ready = _unknown(self._packed_from), None
        return self._recorded(x)

    def _unrecorded(self, x: Tensor) -> Tensor:
        """The product without gradients, from the packed layout where there is one."""
        ready = None if is_compiling() else self._ready
        if ready is not None and ready[2] is self.relu:
            call, arguments, _, own, sources = ready
            for held, name, tensor in own:
                if held.get(name) is not tensor:
                    break
            else:
                for source, version, address in sources:
                    if source.data_ptr() != address or (version is not None and source._version != version):
                        break
                else:
                    return call(x, *arguments)
        elif self._packed_from is None and not self._pending:
            return self._from_rows(x)
        if not self._use_packed():
            return self._from_rows(x)
        row = self.layouts[self._layout]
        op, arguments = ops.native_op(row.op), row.arguments(self)
        if arguments[-1] is False:  # relu, whose default is sooner filled in than read
            arguments = arguments[:-1]
        # A trace runs twice and compares what it saw.
        if not is_compiling() and torch._C._get_tracing_state() is None:
            # An op's own _op is what calling it calls.
            self._ready = getattr(op, "_op", op), arguments, self.relu, *self._watched()
        y: Tensor = op(x, *arguments)
        return y

    def _use_packed(self) -> bool:
        """Whether the buffers packed_* stand for the weight; packs anew where its numbers have changed."""
        if self._pending and not is_compiling():
            self._repack()
        if is_compiling() or self._packed_from is None:
            return self._packed_from is not None
        if any(source is not None and source is not self._own(name) for name, source, _ in self._packed_from):
            return False  # functional_call lent another one
        if not self._is_packed():
            self._repack()
        return True

    def _watched(self) -> Any:
        """The layer's own tensors and what packed numbers come from, as Ready has them."""
        own = [
            (held, name, tensor)
            for held in (self._parameters, self._buffers)
            for name, tensor in held.items()
            if not name.startswith(PREFIX)
        ]
        # Positions are exchanged as a whole, never changed in place; numbers are.
        numbers = []
        for name, source, (version, address) in self._packed_from or ():
            if source is not None and name != "col_indices":
                numbers.append((source, version, address))
        codebook = self._own("codebook")
        if codebook is not None:  # its numbers are read at every call, but an argument may be a view of its memory
            numbers.append((codebook, None, codebook.data_ptr()))
        return own, numbers

    def _recorded(self, x: Tensor) -> Tensor:
        """The product with gradients."""
        raise NotImplementedError

    def _from_rows(self, x: Tensor) -> Tensor:
        """The product without gradients, from the format itself."""
        raise NotImplementedError

    def _shown(self) -> list[str]:
        shown = [f"bias={self.bias is not None}", f"nnz={self.col_indices.numel()}"]
        return shown + [f"layout={self._layout}"] * (self._layout != self.plain_layout) + ["relu=True"] * self.relu

    # ---- state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module._apply; a packed layout is built anew, since some of its numbers keep their dtype."""
        packed = self._packed_from is not None or self._pending
        self._drop_packed()
        self._convert(fn, recurse)
        if packed:
            self._try_repack()
        return self

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their versions from 0.
        return {**self.__dict__, "_packed_from": _unknown(self._packed_from), "_ready": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes another sparsity too: the positions come with the state, so their number may differ from today's."""
        errors: list[str] = args[-1]
        rows, columns = self._matrix_shape
        fields = (*self.buffer_fields, self.parameter_field)
        if all(prefix + field in state_dict for field in fields):
            incoming: dict[str, Any] = {field: state_dict[prefix + field] for field in fields}
            try:
                weight = self.format(**incoming, columns=columns)
                weight.validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
            if weight.shape[0] == rows:
                for field, tensor in incoming.items():
                    current = getattr(self, field)
                    if current.shape != tensor.shape:
                        # A parameter stays the same object, so that an optimizer that holds it goes on with it.
                        current.data = current.new_empty(tensor.shape)
        before = len(errors)
        self._drop_packed()
        super()._load_from_state_dict(state_dict, prefix, *args)
        refused = None if self.training else self._try_repack()
        if refused and len(errors) == before:
            errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {refused}")


class ValuesModule(SparseModule[CsrWeight]):
    """A layer over compressed sparse rows, whose values train.

    Kernels multiply inputs of float16 too, but with values of float32 or bfloat16: .half() leaves them as they are.
    """

    format = CsrWeight
    buffer_fields = ("row_offsets", "col_indices")
    parameter_field = packed_field = "values"

    values: nn.Parameter

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        return self.values, None

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        values = self._parameters.get("values")
        kept = None if values is None else (values.data, None if values.grad is None else values.grad.data)
        super()._convert(fn, recurse)
        if kept is not None and self.values.dtype == torch.float16:
            restore(self.values, *kept)

    def __setattr__(self, name: str, value: Any) -> None:
        # So that torch.nn.utils.parametrize takes the name "values".
        super().__setattr__(name, _Parametrizations(dict(value.items())) if type(value) is nn.ModuleDict else value)


class _Parametrizations(nn.ModuleDict):
    """A dictionary of modules in which "values" names one of them, not the method."""

    @property
    def values(self) -> Any:
        return self.__getattr__("values")


class CodebookModule(SparseModule[SparseCodebookWeight]):
    """A layer over codes into a table, which trains and stays float32: rounding it would move every weight."""

    format = SparseCodebookWeight
    buffer_fields = ("row_offsets", "col_indices", "codes")
    parameter_field = "codebook"
    packed_field = "codes"

    codes: Tensor
    codebook: nn.Parameter

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        return self.codes, self.codebook[0]

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        before = self.codebook.data
        grad = None if self.codebook.grad is None else self.codebook.grad.data
        super()._convert(fn, recurse)
        if self.codebook.dtype != before.dtype:
            restore(self.codebook, before, grad)


def _unknown(origin: Origin | None) -> Origin | None:
    """The same names with no tensor: what they hold has to be read anew."""
    return None if origin is None else tuple((name, None, (None, 0)) for name, _, _ in origin)


def state_of(tensor: Tensor) -> State:
    """What changes when a tensor's numbers do, but for writes through .data and in inference mode."""
    return None if tensor.is_inference() else tensor._version, tensor.data_ptr()
