"""A convolution of one-dimensional filters: across channels, down and along each map."""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any, Self

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import conv2d

from tersetorch import ops
from tersetorch.nn.conv_sizes import ConvSizes, Sizes
from tersetorch.nn.dense_form import changed, check_relu, check_size
from tersetorch.ops._autocast import enabled_for
from tersetorch.ops._floats import FLOATS

LAYOUTS = ("chain", "fused")
# Of a filter's norm: what float32 leaves of a filter that is a product.
EXACT = 1e-5
_BIASES = ("lateral_bias", "vertical_bias", "bias")
_FIELDS = ("lateral", "vertical", "horizontal", *_BIASES)

_flat_conv2d = ops.native_op("flat_conv2d_inference")

channels_last = torch.channels_last
convolution_backward = torch.ops.aten.convolution_backward

# The parameters that packed stages come from: name, tensor, its version then and its address.
Origin = list[tuple[str, Tensor, int, int]]


class FlattenedConv2d(ConvSizes[nn.Conv2d]):
    """Stages of lateral, vertical and horizontal 1-D filters in the place of a convolution; all of them train.

    A stage has M = rank * out_channels maps: l = conv2d(x, lateral_s) + lateral_bias_s over channels, then down and
    along each map v = conv2d(l, vertical_s) + vertical_bias_s and h = conv2d(v, horizontal_s), and
    y[f] = bias_s[f] + the sum of h[r * out_channels + f] over r < rank. l and v are padded with zeros. There is no
    nonlinearity inside; with relu what the last stage gives is at least 0. With one stage, a rank of 1 and no other
    bias than the last it is the convolution with lateral[f, c] * vertical[f, i] * horizontal[f, j]: C + kh + kw numbers
    a filter in the place of C * kh * kw.

    Parameters of stage s: lateral_s [M, C], vertical_s [M, kh], horizontal_s [M, kw], lateral_bias_s and
    vertical_bias_s [M], bias_s [out_channels]. They begin so that y has the variance that nn.Conv2d's has.

    Without gradients the layer computes from its layout: "chain", three of torch's convolutions for each stage, or,
    after pack("fused"), ops.flat_conv2d, from buffers packed_s that are in no state_dict. Training mode drops these;
    eval() builds them, and so does a call that finds a parameter changed in place, unless it is compiled: compile after
    the last change.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or [in_channels, H, W] -> [N, out_channels, H', W'] of its
    dtype, sized as torch.nn.Conv2d describes, stage after stage.

    Args:
        in_channels, out_channels: of the layer; later stages have out_channels of both.
        kernel_size: of the vertical and the horizontal filters, a number or two.
        stride: likewise; of the first stage, the others have 1.
        padding: of every stage, zeros on both sides: numbers; "same" for odd kernels and a stride of 1; "full" for
            kernel_size - 1; "valid" for none.
        stages: how many follow each other; the paper takes two.
        rank: filters that add up to one of a stage's channels.
        bias: whether there are any.
        relu: whether negative results become 0; of the layer, not of its weight: to_dense() and .weight leave it out.
        device, dtype: of the parameters.

    Raises:
        TypeError: an argument has another type than named here.
        ValueError: an argument is out of range, or "same" for an even kernel or another stride.

    Source:
        Jin, Dundar, Culurciello, Flattened convolutional neural networks (2014), section 3.
    """

    dense_type = nn.Conv2d
    dims = 2
    layouts = LAYOUTS
    plain_layout = "chain"
    # The parameter that stands for the weight where only one can: its flags, its device, its dtype.
    weight_parameter = "lateral_0"
    # As an nn.Conv2d has them that this layer may stand for.
    dilation = (1, 1)
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        stages: int = 1,
        rank: int = 1,
        bias: bool = True,
        relu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bias, bool):
            raise TypeError(f"FlattenedConv2d: bias must be True or False, got {bias!r}; pass a bool")
        check_relu("FlattenedConv2d", relu)
        self.relu = relu
        most = 2**31 - 1
        for name, value, limit in (
            ("in_channels", in_channels, most),
            ("out_channels", out_channels, most),
            ("stages", stages, ops.FLAT_MAX_STAGES),
            ("rank", rank, most),
        ):
            check_size("FlattenedConv2d", name, value, limit)
        self.in_channels, self.out_channels, self.stages, self.rank = in_channels, out_channels, stages, rank
        self.kernel_size = self._checked_sizes("kernel_size", kernel_size, 1)
        self.stride = self._checked_sizes("stride", stride, 1)
        self.padding = padding if isinstance(padding, str) else self._checked_sizes("padding", padding, 0)
        self._padding = list(self._zeros())
        self._layout = self.plain_layout
        self._packed_from: Origin | None = None
        self._packed_names = [f"packed_{s}" for s in range(self.stages)]
        # As the op takes them.
        self._op_sizes: list[int] = []
        for s in range(self.stages):
            steps = (1, 1) if s else self.stride
            self._op_sizes += [self.out_channels, self.rank, *self.kernel_size, *steps, *self._padding]
        maps = self.rank * self.out_channels
        shapes: dict[str, tuple[int, ...]] = {"lateral_bias": (maps,), "vertical_bias": (maps,)}
        shapes |= {"vertical": (maps, self.kernel_size[0]), "horizontal": (maps, self.kernel_size[1])}
        shapes["bias"] = (self.out_channels,)
        for s in range(self.stages):
            shapes["lateral"] = (maps, self.out_channels if s else self.in_channels)
            for field in _FIELDS:
                made = None
                if bias or field not in _BIASES:
                    made = nn.Parameter(torch.empty(shapes[field], device=device, dtype=dtype))
                self.register_parameter(f"{field}_{s}", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all filters anew.

        What a stage hands on has the variance of what it takes, and a third of it after the last one, as nn.Conv2d has
        it; biases are 0, but the last one, which is as nn.Conv2d's.
        """
        with torch.no_grad():
            for s in range(self.stages):
                last = s + 1 == self.stages
                for field in _FIELDS:
                    parameter = self._parameters[f"{field}_{s}"]
                    if parameter is None:
                        continue
                    if field in _BIASES:
                        fan_in = self.in_channels * prod(self.kernel_size)
                        bound = 1 / sqrt(fan_in) if last and field == "bias" else 0.0
                    else:
                        variance = 1 / parameter.shape[1] / (self.rank if field == "horizontal" else 1)
                        bound = sqrt(variance if last and field == "lateral" else 3 * variance)
                    nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_filters(cls, module: nn.Conv2d, filters: ops.FlatFilters, rank: int) -> Self:
        """A layer of one stage of module's sizes and bias, with filters of a rank; its other biases are 0.

        Raises:
            TypeError, ValueError: module is not an nn.Conv2d that a flattened one can stand for, or filters are not of
                its sizes.
        """
        reason = cls.why_not(module)
        if reason is not None:
            raise ValueError(f"{cls.__name__}: module must be a plain convolution, got {reason}; keep this layer dense")
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            rank=rank,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        with torch.no_grad():
            for field in ("lateral", "vertical", "horizontal"):
                own, given = layer._parameters[f"{field}_0"], getattr(filters, field)
                assert own is not None
                if given.shape != own.shape:
                    raise ValueError(
                        f"{cls.__name__}: {field} must be {list(own.shape)} for this layer and rank {rank}, got "
                        f"{list(given.shape)}; pass filters of its sizes"
                    )
                own.copy_(given)
            if module.bias is not None:
                layer.get_parameter("bias_0").copy_(module.bias)
        return layer.train(module.training)

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> Self:
        """The layer that computes what module does, whose filters are products of three 1-D filters each.

        Raises:
            TypeError: module is not an nn.Conv2d, or its weight is neither float32 nor bfloat16.
            ValueError: a filter is no such product or no finite numbers, or module has groups, dilation or padding of
                other numbers.
        """
        reason = cls.why_not(module)
        if reason is not None:
            raise ValueError(f"{cls.__name__}: module must be a plain convolution, got {reason}; keep this layer dense")
        weight = module.weight.detach().double()
        if weight.is_meta or not bool(weight.isfinite().all()):
            came = "a tensor on meta" if weight.is_meta else "NaN or infinity"
            raise ValueError(f"{cls.__name__}: module.weight must hold finite numbers, got {came}; load or repair it")
        # The first singular vectors of each filter's unfoldings; the lateral one takes the size.
        vertical, horizontal = (
            torch.linalg.svd(weight.movedim(axis, 1).flatten(2), full_matrices=False).U[:, :, 0] for axis in (2, 3)
        )
        lateral = torch.einsum("fcij,fi,fj->fc", weight, vertical, horizontal)
        error = (torch.einsum("fc,fi,fj->fcij", lateral, vertical, horizontal) - weight).flatten(1).norm(dim=1)
        allowed = EXACT if module.weight.dtype == torch.float32 else torch.finfo(torch.bfloat16).eps
        if not bool((error <= allowed * weight.flatten(1).norm(dim=1)).all()):
            raise ValueError(
                f"{cls.__name__}: each filter of module must be a product of three 1-D filters, got one that is not; "
                "call tersetorch.factorize.flatten, which finds the nearest"
            )
        return cls.from_filters(module, ops.FlatFilters(lateral, vertical, horizontal), 1)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why no flattened convolution has the sizes of a layer, or None.

        Raises:
            TypeError: module is not an nn.Conv2d, or its weight is neither float32 nor bfloat16.
        """
        cls._check_source(module)
        if module.weight.dtype not in FLOATS:
            raise TypeError(
                f"FlattenedConv2d: module.weight must be float32 or bfloat16, got {module.weight.dtype}; convert it"
            )
        if module.groups != 1:
            return f"{module.groups} groups"
        if module.dilation != (1, 1):
            return f"dilation {module.dilation}"
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        if module.padding == "same" and any(n % 2 == 0 for n in module.kernel_size):
            return f"padding 'same' for the even kernel {module.kernel_size}"
        return None

    @classmethod
    def of_sizes(
        cls, in_channels: int, out_channels: int, kernel_size: Sizes, layout: str = "chain", **more: Any
    ) -> Self:
        """A layer on any device, for tensors that come from elsewhere; more is what the constructor takes."""
        return cls(in_channels, out_channels, kernel_size, **more).pack(layout)

    def _config(self) -> dict[str, Any]:
        own = changed(self, {"stages": 1, "rank": 1, "layout": self.plain_layout, "relu": False})
        return {**own, **({} if self.biased else {"bias": False})}

    @property
    def biased(self) -> bool:
        """Whether the layer has biases."""
        return self._parameters["bias_0"] is not None

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the last stage."""
        return self._parameters[f"bias_{self.stages - 1}"]

    def filters(self, stage: int) -> ops.FlatFilters:
        """The parameters of a stage, as ops.flat_conv2d takes them."""
        return ops.FlatFilters(*(self._parameters[f"{field}_{stage}"] for field in _FIELDS))  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight of the dense convolution that all stages together are, but for biases and borders inside.

        [out_channels, in_channels, *kernel], built anew at every read; of several stages the kernels add up.
        """
        with torch.no_grad():
            composed = self._stage_weight(0)
            for s in range(1, self.stages):
                composed = _followed(composed, self._stage_weight(s), self.stride)
            return composed.to(self.get_parameter("lateral_0").dtype)

    def _stage_weight(self, stage: int) -> Tensor:
        f = self.filters(stage)
        parts = [t.double().unflatten(0, (self.rank, self.out_channels)) for t in f[:3]]
        return torch.einsum("rfc,rfi,rfj->fcij", *parts)

    def to_dense(self) -> nn.Conv2d:
        """The plain layer that computes the same.

        Raises:
            ValueError: no dense convolution does: zeros are added where a bias reaches, or between stages where a
                stage before has numbers.
        """
        reason = self._why_not_dense()
        if reason is not None:
            raise ValueError(
                f"FlattenedConv2d: to_dense must have a dense convolution that computes the same, got {reason}; take "
                ".weight, which is right but at the borders"
            )
        weight = self.weight
        padding = [(1 + (self.stages - 1) * self.stride[i]) * self._padding[i] for i in range(2)]
        channels, kernel = (self.in_channels, self.out_channels), tuple(weight.shape[2:])
        make: Any = nn.Conv2d
        dense: nn.Conv2d = make(*channels, kernel, self.stride, tuple(padding), bias=self.biased, device="meta")
        dense.weight = nn.Parameter(weight)
        if self.biased:
            dense.bias = nn.Parameter(self._composed_bias().to(weight.dtype))
        return dense.train(self.training)

    def _composed_bias(self) -> Tensor:
        """What comes out of zeros, away from the borders."""
        with torch.no_grad():
            y = torch.zeros(self.in_channels, dtype=torch.float64, device=self.get_parameter("bias_0").device)
            for s in range(self.stages):
                lateral, vertical, horizontal, *biases = (t.double() for t in self.filters(s) if t is not None)
                maps = (lateral @ y + biases[0]) * vertical.sum(1) + biases[1]
                y = (maps * horizontal.sum(1)).view(self.rank, -1).sum(0) + biases[2]
            return y

    def _why_not_dense(self) -> str | None:
        inner = [f"{field}_{s}" for s in range(self.stages) for field in _BIASES[: 3 if s + 1 < self.stages else 2]]
        biased = self.biased and any(bool(self.get_parameter(name).detach().any()) for name in inner)
        padded = any(self._padding)
        if biased and padded:
            return "padding beside biases inside"
        full = all(p >= k - 1 for p, k in zip(self._padding, self.kernel_size, strict=True)) and self.stride == (1, 1)
        if self.stages > 1 and padded and not full:
            return f"padding {tuple(self._padding)} between stages"
        return None

    # ---- layouts

    @property
    def layout(self) -> str:
        """What the layer computes from without gradients: "chain" or "fused"."""
        return self._layout

    @property
    def layout_options(self) -> dict[str, Any]:
        """The keyword arguments that pack() takes to lay another layer out alike: none."""
        return {}

    def pack(self, layout: str) -> Self:
        """Computes without gradients from this layout from now on; returns the layer.

        In training mode the layout is remembered, and built by eval().

        Args:
            layout: "chain" for torch's convolutions, or "fused" for ops.flat_conv2d.

        Raises:
            ValueError: no such layout, or a kernel of more taps than the op takes.
        """
        if layout not in LAYOUTS:
            raise ValueError(
                f"FlattenedConv2d: layout must be one of {list(LAYOUTS)}, got {layout!r}; choose one of them"
            )
        if layout == "fused" and max(self.kernel_size) > ops.FLAT_MAX_KERNEL:
            raise ValueError(
                f"FlattenedConv2d: kernel_size must be at most {ops.FLAT_MAX_KERNEL} in layout 'fused', got "
                f"{self.kernel_size}; keep 'chain'"
            )
        self._layout = layout
        self._drop_packed()
        if not self.training:
            self._repack()
        return self

    def _repack(self) -> None:
        self._drop_packed()
        if self._layout != "fused":
            return
        with torch.no_grad():
            for s, name in enumerate(self._packed_names):
                packed = ops.flat_conv2d_pack(self.filters(s), rank=self.rank)
                self.register_buffer(name, packed, persistent=False)
        self._packed_from = [
            (name, tensor, tensor._version, tensor.data_ptr())
            for name, tensor in self._parameters.items()
            if tensor is not None and not tensor.is_inference()
        ]

    def _drop_packed(self) -> None:
        for name in self._packed_names:
            self._buffers.pop(name, None)
        self._packed_from = None

    def _packed_stages(self) -> list[Tensor] | None:
        """The packed stages as the parameters are now, or None where another one was lent to the layer."""
        if self._packed_from is None:
            if self.training or is_compiling():
                return None
            self._repack()
        elif not is_compiling() and torch._C._get_tracing_state() is None:
            parameters = self._parameters
            for name, tensor, version, address in self._packed_from:
                if parameters[name] is not tensor:
                    return None  # functional_call lent another one
                if tensor._version != version or tensor.data_ptr() != address:
                    self._repack()
                    break
        held: Any = self._buffers
        return [held[name] for name in self._packed_names]

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train: training mode drops what the layout packed, eval mode builds it anew."""
        super().train(mode)
        if mode:
            self._drop_packed()
        elif self._layout == "fused":
            self._repack()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed = self._packed_from is not None
        self._drop_packed()
        super()._apply(fn, recurse)
        if packed:
            self._repack()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._drop_packed()
        super()._load_from_state_dict(*args)

    # ---- running

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, H, W] or [in_channels, H, W]."""
        # The op's twin drops forward-mode tangents, which no_grad does not switch off.
        if self._layout == "fused" and not is_grad_enabled() and forward_ad._current_level < 0:
            stages = self._packed_stages()
            if stages is not None:
                try:
                    if input.dim() == 4:
                        return _flat_conv2d(input, stages, self._op_sizes, self.relu)  # type: ignore[no-any-return]
                    y: Tensor = _flat_conv2d(input.unsqueeze(0), stages, self._op_sizes, self.relu)
                    return y.squeeze(0)
                except (AttributeError, IndexError, RuntimeError, TypeError):
                    self._check(input)  # what nearly every call passes is asked for only here
                    raise
        self._check(input)
        return self._chain(input) if input.dim() == 4 else self._chain(input.unsqueeze(0)).squeeze(0)

    def _check(self, input: Any) -> None:
        self._check_tensor(input)
        self._check_images(input)
        size = list(input.shape[-2:])
        for s in range(self.stages):
            _, _, *kernel, down, across, above, beside = self._op_sizes[8 * s : 8 * (s + 1)]
            for axis, name, step, pad in ((0, "high", down, above), (1, "wide", across, beside)):
                if size[axis] + 2 * pad < kernel[axis]:
                    raise ValueError(
                        f"FlattenedConv2d: input of stage {s} must be at least {kernel[axis] - 2 * pad} {name} for "
                        f"this kernel and padding, got {size[axis]}; pass larger images or more padding"
                    )
                size[axis] = (size[axis] + 2 * pad - kernel[axis]) // step + 1

    def _chain(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        own = self.filters(0).lateral.dtype
        cast = enabled_for(x)
        if not cast:
            x = x.to(own)
        maps, (sh, sw), (ph, pw) = self.rank * self.out_channels, self.stride, self._padding
        trains = _trains(x)
        plain = trains and (x.is_contiguous() or not x.is_contiguous(memory_format=channels_last))
        if trains:
            x = x.contiguous(memory_format=channels_last)
        for s in range(self.stages):
            lateral, vertical, horizontal, lateral_bias, vertical_bias, bias = self.filters(s)
            x = conv2d(x, lateral[:, :, None, None], lateral_bias)
            x = conv2d(x, vertical[:, None, :, None], vertical_bias, (sh, 1), (ph, 0), groups=maps)
            one = bias if self.rank == 1 else None
            x = (_AlongRows.apply if trains else _along_rows)(x, horizontal[:, None, None, :], one, sw, pw)
            if self.rank > 1:
                x = x.unflatten(1, (self.rank, self.out_channels)).sum(1)
                x = x.contiguous(memory_format=channels_last) if trains else x
                x = x if bias is None else x + bias.to(x.dtype).view(-1, 1, 1)
            sh = sw = 1
        x = x.contiguous() if plain else x
        if self.relu:
            x = x.relu_()  # made here, and no gradient needs it
        return x if cast else x.to(dtype)

    def _zeros(self) -> tuple[int, ...]:
        """Of padding on both sides."""
        if not isinstance(self.padding, str):
            return self.padding
        kh, kw = self.kernel_size
        even = kh % 2 == 0 or kw % 2 == 0
        if self.padding not in ("same", "full", "valid") or (
            self.padding == "same" and (even or self.stride != (1, 1))
        ):
            raise ValueError(
                "FlattenedConv2d: padding must be numbers, 'valid', 'full', or 'same' for odd kernels and a stride of "
                f"1, got {self.padding!r} for kernel_size {self.kernel_size} and stride {self.stride}; pass numbers"
            )
        return {"same": (kh // 2, kw // 2), "full": (kh - 1, kw - 1), "valid": (0, 0)}[self.padding]

    def _shown(self) -> list[str]:
        shown = [f"stages={self.stages}", f"rank={self.rank}", f"bias={self.biased}"]
        return shown + [f"layout={self._layout}"] * (self._layout != self.plain_layout) + ["relu=True"] * self.relu


def _trains(x: Tensor) -> bool:
    """Whether reverse gradients of torch's own 1-D convolutions would follow, which a CPU is slow at.

    In channels_last, whatever the input's format, a step takes a half to a third of the time; with the class below
    another half. What differentiates otherwise, or looks at the layer, is left with torch's own.
    """
    return (
        is_grad_enabled()
        and x.is_cpu
        and x.numel() > 0
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled("cpu")
    )


def _along_rows(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """conv2d of each map with its own filter, weight [maps, 1, 1, taps]."""
    return conv2d(x, weight, bias, (1, stride), (0, padding), groups=weight.shape[0])


class _AlongRows(torch.autograd.Function):
    """_along_rows for what lies in channels_last.

    The weight's gradient is that of rows laid down as columns, which are the same memory: oneDNN takes 4 to 10 times
    longer for a depthwise 1x5 weight's gradient than for a 5x1 one's.
    """

    forward = staticmethod(_along_rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=channels_last)
        of_x, of_weight, of_bias = None, None, None
        maps, step, pad = weight.shape[0], ctx.stride, ctx.padding
        same = ([1, 1], False, [0, 0], maps)
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if wants_x:
            wanted = [True, False, False]
            of_x, _, _ = convolution_backward(grad, x, weight, None, [1, step], [0, pad], *same, wanted)
        if wants_weight or wants_bias:
            columns, across, wanted = (_columns(grad), _columns(x)), weight.transpose(2, 3), [False, True, wants_bias]
            _, of_weight, of_bias = convolution_backward(*columns, across, [maps], [step, 1], [pad, 0], *same, wanted)
        return of_x, None if of_weight is None else of_weight.transpose(2, 3), of_bias, None, None


def _columns(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N * H, C, W, 1]."""
    return x.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(2).permute(0, 3, 1, 2)


def _followed(first: Tensor, second: Tensor, step: tuple[int, ...]) -> Tensor:
    """The weight of convolution `first` followed by `second`, whose taps lie `step` of first's inputs apart."""
    taps = second.shape[2:]
    size = [first.shape[2 + i] + (taps[i] - 1) * step[i] for i in range(2)]
    composed = first.new_zeros(second.shape[0], first.shape[1], *size)
    for i in range(taps[0]):
        for j in range(taps[1]):
            part = torch.einsum("fg,gcij->fcij", second[:, :, i, j], first)
            top, left = i * step[0], j * step[1]
            composed[:, :, top : top + first.shape[2], left : left + first.shape[3]] += part
    return composed
