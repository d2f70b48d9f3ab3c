"""What every convolution over a sparse format shares: its dense form, its checks, its state and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import pad

from tersetorch import ops
from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn.sparse_module import State, state_of

FLOATS = (torch.float32, torch.bfloat16)
PREFIX = "packed_"
PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

Format = TypeVar("Format", CsrWeight, SparseCodebookWeight)
Sizes = int | Sequence[int]


class SparseConvBase(nn.Module, Generic[Format]):
    """A convolution whose weight, flattened to [out_channels, in_channels / groups * taps], is kept in a sparse format.

    The layer's tensors have the names of the format's fields: what trains (values or a codebook, and the bias) are
    parameters, the rest are buffers; the sizes have the names that torch.nn.Conv2d gives them.

    Without gradients the layer computes from a second layout of its weight, buffers packed_*, which are in no
    state_dict and cost memory beside the weight itself. Training mode drops them; eval(), load_state_dict() and a call
    that finds values or codes changed in place build them anew, the latter unless it is compiled: compile after the
    last change. A write through .data, or to tensors made in inference mode, leaves no trace: call train() and eval()
    after it. In training mode a call without gradients lays the weight out for itself. The layout is the CPU's:
    moved to another device the layer has none and computes from its weight; eval() after the way back builds it.
    """

    format: ClassVar[type[CsrWeight] | type[SparseCodebookWeight]]
    buffer_fields: ClassVar[tuple[str, ...]]
    parameter_field: ClassVar[str]
    # The field whose numbers the packed layout repeats in another order.
    packed_field: ClassVar[str]
    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]
    dims: ClassVar[int]

    row_offsets: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    in_channels: int
    out_channels: int
    groups: int

    def __init__(
        self,
        weight: Format,
        bias: Tensor | None = None,
        *,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        # What the buffers packed_* come from: name, tensor (None in a copy, until it is called), and its state then.
        # Without such buffers, None.
        self._packed_from: tuple[tuple[str, Tensor | None, State], ...] | None = None
        if not isinstance(weight, self.format):
            raise TypeError(
                f"{type(self).__name__}: weight must be a {self.format.__name__}, got {type(weight).__name__}; "
                "call from_dense on the layer it comes from"
            )
        weight.validate()
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.padding = self._check_padding(padding)
        self.padding_mode = self._check_padding_mode(padding_mode)
        self.out_channels, columns = weight.shape
        self.groups = self._check_groups(groups, columns)
        self.in_channels = columns // prod(self.kernel_size) * self.groups
        if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in FLOATS):
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"{type(self).__name__}: bias must be float32 or bfloat16, got {got}; convert it")
        if bias is not None and bias.shape != (self.out_channels,):
            raise ValueError(
                f"{type(self).__name__}: bias must be [{self.out_channels}], one for each row of the weight, "
                f"got shape {tuple(bias.shape)}; pass the bias of the same layer"
            )
        # As the op takes them: always two-dimensional, the padding the same on both sides and of zeros. Where the
        # layer's is not, forward pads first.
        self._kernel = self._as_pair(self.kernel_size)
        self._stride = self._as_pair(self.stride)
        self._dilation = self._as_pair(self.dilation)
        sides = self._pad_sides()
        native = self.padding_mode == "zeros" and sides[0::2] == sides[1::2]
        self._padding = [0] * (2 - self.dims) + (sides[-1::-2] if native else [0] * self.dims)
        self._pad_first = [] if native or not any(sides) else sides
        self._channel_block = ops.sparse_conv2d_channel_block(
            self.in_channels, self._kernel, self._stride, self._dilation
        )
        for field in self.buffer_fields:
            self.register_buffer(field, getattr(weight, field))
        self.register_parameter(self.parameter_field, _as_parameter(getattr(weight, self.parameter_field)))
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))

    @classmethod
    def from_dense(cls, module: nn.Conv1d | nn.Conv2d) -> Self:
        """The layer that computes what module computes, from the non-zeros of its weight.

        Raises:
            TypeError: module is not of the layer's dense type, or its weight is neither float32 nor bfloat16.
            ValueError: the format cannot hold the weight.
            RuntimeError: the kernel is too large for the layout.
        """
        if not isinstance(module, cls.dense_type):
            raise TypeError(
                f"{cls.__name__}: module must be an nn.{cls.dense_type.__name__}, got {type(module).__name__}; "
                "pass a layer"
            )
        bias = None if module.bias is None else module.bias.detach().clone()
        layer = cls(
            cast(Format, cls.format.from_dense(module.weight.detach().flatten(1))),
            bias,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
        )
        return layer.train(module.training)

    def to_dense(self) -> nn.Conv1d | nn.Conv2d:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        weight, bias = self.weight, None if self.bias is None else self.bias.detach().clone()
        if bias is not None and bias.dtype != weight.dtype:
            narrow = weight.to(bias.dtype)
            weight, bias = (narrow, bias) if torch.equal(narrow.float(), weight) else (weight, bias.float())
        make: Any = self.dense_type
        dense: nn.Conv1d | nn.Conv2d = make(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias is not None,
            self.padding_mode,
            device="meta",
        )
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        return dense.train(self.training)

    @property
    def sparse_weight(self) -> Format:
        """The flattened weight in its format; it shares memory with the layer."""
        fields = {field: getattr(self, field) for field in (*self.buffer_fields, self.parameter_field)}
        return cast(Format, self.format(**fields, columns=self._columns))

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_channels, in_channels / groups, *kernel_size], built anew at every read."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return self.sparse_weight.to_dense().detach().view(shape)

    @property
    def _columns(self) -> int:
        return self.in_channels // self.groups * prod(self.kernel_size)

    # ---- the packed layout

    @property
    def _on_cpu(self) -> bool:
        return self.row_offsets.device.type == "cpu"

    def _pack(self) -> None:
        if not self._on_cpu:
            self._drop_packed()
            return
        weight = self.sparse_weight
        blocks, segments, indices, sources = ops.sparse_conv2d_pack(
            weight.row_offsets,
            weight.col_indices,
            self.in_channels,
            self._channel_block,
            self._kernel,
            self._stride,
            self._dilation,
            self.groups,
        )
        source: Tensor = getattr(self, self.packed_field)
        numbers = source.detach().index_select(0, sources)
        for name, tensor in (("blocks", blocks), ("segments", segments), ("indices", indices), ("numbers", numbers)):
            self.register_buffer(PREFIX + name, tensor, persistent=False)
        repeated = {"col_indices": self.col_indices, self.packed_field: source}
        self._packed_from = tuple((name, tensor, state_of(tensor)) for name, tensor in repeated.items())

    def _drop_packed(self) -> None:
        for name in [name for name in self._buffers if name.startswith(PREFIX)]:
            delattr(self, name)
        self._packed_from = None

    def _is_packed(self) -> bool:
        """Whether the buffers packed_* hold what the weight holds now."""
        if self._packed_from is None:
            return False
        return all(
            source is not None and source is getattr(self, name) and state_of(source) == state
            for name, source, state in self._packed_from
        )

    def _use_packed(self) -> bool:
        """Whether the buffers packed_* stand for the weight; packs anew where its numbers have changed."""
        if not self._on_cpu:
            return False
        packed = self._packed_from
        if torch.compiler.is_compiling() or packed is None:
            return packed is not None
        for name, source, state in packed:
            if source is not None:
                if getattr(self, name) is not source:
                    return False  # functional_call lent another one
                if state_of(source) == state:
                    continue
            self._pack()
            break
        return True

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train: training mode drops the packed layout, eval mode builds it anew."""
        super().train(mode)
        if mode:
            self._drop_packed()
        elif not self._is_packed():
            self._pack()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if not self._on_cpu:
            self._drop_packed()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their versions from 0.
        packed = self._packed_from
        unknown = None if packed is None else tuple((name, None, (None, 0)) for name, _, _ in packed)
        return {**self.__dict__, "_packed_from": unknown}

    # ---- running

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, *sizes] or [in_channels, *sizes]."""
        self._check_input(input)
        x = pad(input, self._pad_first, PADDING_MODES[self.padding_mode]) if self._pad_first else input
        batched = input.dim() == self.dims + 2
        if not batched:
            x = x.unsqueeze(0)
        if self.dims == 1:
            x = x.unsqueeze(2)
        y = self._convolve(x)
        if self.dims == 1:
            y = y.squeeze(2)
        return y if batched else y.squeeze(0)

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        """What the op takes as values and codebook."""
        raise NotImplementedError

    def _convolve(self, x: Tensor) -> Tensor:
        values, codebook = self._numbers()
        sizes = (self._kernel, self._stride, self._padding, self._dilation, self.groups)
        # The twin drops forward-mode tangents, which no_grad does not switch off; the recorded op refuses them.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            kernel_size, stride, padding, dilation, groups = sizes
            return ops.sparse_conv2d(
                x,
                self.row_offsets,
                self.col_indices,
                values,
                self.bias,
                codebook,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
            )
        # A shallow copy shares the buffers, and may have dropped them.
        if not self._use_packed() or "packed_blocks" not in self._buffers:
            return ops.sparse_conv2d_inference(
                x, self.row_offsets, self.col_indices, values, self.bias, codebook, *sizes
            )
        buffers: Any = self._buffers
        return ops.sparse_conv2d_packed(
            x,
            buffers["packed_blocks"],
            buffers["packed_segments"],
            buffers["packed_indices"],
            buffers["packed_numbers"],
            self.bias,
            codebook,
            self.out_channels,
            self._channel_block,
            *sizes,
        )

    # ---- checks

    def _sizes(self, name: str, value: Sizes, least: int) -> tuple[int, ...]:
        sizes = (value,) * self.dims if isinstance(value, int) else tuple(value)
        if len(sizes) != self.dims or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
            raise TypeError(
                f"{type(self).__name__}: {name} must be an int or {self.dims} of them, got {value!r}; "
                "pass that of the dense layer"
            )
        if min(sizes) < least:
            raise ValueError(
                f"{type(self).__name__}: {name} must be at least {least}, got {value!r}; pass that of the dense layer"
            )
        return sizes

    def _as_pair(self, sizes: Sequence[int]) -> list[int]:
        return [1] * (2 - self.dims) + list(sizes)

    def _check_padding(self, padding: Sizes | str) -> tuple[int, ...] | str:
        if not isinstance(padding, str):
            return self._sizes("padding", padding, 0)
        if padding not in ("same", "valid") or (padding == "same" and any(n != 1 for n in self.stride)):
            raise ValueError(
                f"{type(self).__name__}: padding must be numbers, 'valid', or 'same' for a stride of 1, got "
                f"{padding!r} with stride {self.stride}; pass that of the dense layer"
            )
        return padding

    def _check_padding_mode(self, mode: str) -> str:
        if mode not in PADDING_MODES:
            raise ValueError(
                f"{type(self).__name__}: padding_mode must be one of {list(PADDING_MODES)}, got {mode!r}; choose one"
            )
        return mode

    def _check_groups(self, groups: int, columns: int) -> int:
        taps = prod(self.kernel_size)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or self.out_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: groups must divide out_channels, got {groups!r} for {self.out_channels}; "
                "pass that of the dense layer"
            )
        if columns % taps:
            raise ValueError(
                f"{type(self).__name__}: weight must have a multiple of {taps} columns, the taps of kernel_size "
                f"{self.kernel_size}, got {columns}; flatten the dense weight from its second dimension on"
            )
        return groups

    def _pad_sides(self) -> list[int]:
        """Padding on both sides of each dimension, the last dimension first, as F.pad takes it."""
        sides: list[int] = []
        for i in reversed(range(self.dims)):
            if isinstance(self.padding, tuple):
                sides += [self.padding[i]] * 2
            else:
                total = self.dilation[i] * (self.kernel_size[i] - 1) if self.padding == "same" else 0
                sides += [total // 2, total - total // 2]
        return sides

    def _check_input(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor"
            )
        if x.dtype not in FLOATS and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{type(self).__name__}: input must be float32 or bfloat16, got {x.dtype}; convert it")
        if x.dim() not in (self.dims + 1, self.dims + 2) or x.shape[-1 - self.dims] != self.in_channels:
            sizes = ", ".join("LHW"[:1] if self.dims == 1 else "HW")
            raise ValueError(
                f"{type(self).__name__}: input must be [N, {self.in_channels}, {sizes}] or [{self.in_channels}, "
                f"{sizes}], got shape {tuple(x.shape)}; reshape it"
            )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        one = (1,) * self.dims
        shown: list[str] = [f"{self.in_channels}, {self.out_channels}"]
        shown += [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if self.padding not in ((0,) * self.dims, "valid"):
            shown.append(f"padding={self.padding!r}")
        shown += [f"dilation={self.dilation}"] * (self.dilation != one) + [f"groups={self.groups}"] * (self.groups != 1)
        if self.padding_mode != "zeros":
            shown.append(f"padding_mode={self.padding_mode!r}")
        return ", ".join([*shown, f"bias={self.bias is not None}", f"nnz={self.col_indices.numel()}"])

    # ---- state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes another sparsity too: the positions come with the state, so their number may differ from today's."""
        errors: list[str] = args[-1]
        fields = (*self.buffer_fields, self.parameter_field)
        if all(prefix + field in state_dict for field in fields):
            incoming: dict[str, Any] = {field: state_dict[prefix + field] for field in fields}
            try:
                weight = self.format(**incoming, columns=self._columns)
                weight.validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
            if weight.shape[0] == self.out_channels:
                for field, tensor in incoming.items():
                    current = getattr(self, field)
                    if current.shape != tensor.shape:
                        # A parameter stays the same object, so that an optimizer that holds it goes on with it.
                        current.data = current.new_empty(tensor.shape)
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.training and len(errors) == before:
            self._pack()


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied layers stay tied."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
