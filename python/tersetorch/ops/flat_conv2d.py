"""Flattened convolutions: a lateral, a vertical and a horizontal 1-D filter for each map, in stages."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import conv2d, pad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import floats_beside, refusal
from tersetorch.ops._images import MAX_SIZE, Pair, pair_of

# The longest 1-D filter that the op takes.
FLAT_MAX_KERNEL = 63
# The most stages in one call.
FLAT_MAX_STAGES = 8
_LANES = 16
_NUMBERS = 8
_OPS = torch.ops.tersetorch


class FlatFilters(NamedTuple):
    """The numbers of a stage of M = rank * F maps for F channels out; map r * F + f is the rank's r of channel f.

    Attributes:
        lateral: float [M, C].
        vertical: float [M, kh].
        horizontal: float [M, kw].
        lateral_bias, vertical_bias: float [M], or None.
        bias: float [F], or None.
    """

    lateral: Tensor
    vertical: Tensor
    horizontal: Tensor
    lateral_bias: Tensor | None = None
    vertical_bias: Tensor | None = None
    bias: Tensor | None = None


def flat_conv2d(
    x: Tensor,
    lateral: Tensor,
    vertical: Tensor,
    horizontal: Tensor,
    lateral_bias: Tensor | None = None,
    vertical_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    rank: int = 1,
    relu: bool = False,
) -> Tensor:
    """Returns three convolutions of one dimension each, one after the other; at least 0 with relu.

    l = conv2d(x, lateral) + lateral_bias over channels, 1x1; v = conv2d(l, vertical) + vertical_bias and
    h = conv2d(v, horizontal) for each map by itself, kh x 1 and 1 x kw; y[f] = bias[f] + the sum of h[r * F + f] over
    r < rank. l and v are 0 outside their borders, where the biases do not reach. With a rank of 1 and no other bias
    than the last, this is the convolution with the filters lateral[f, c] * vertical[f, i] * horizontal[f, j].
    Accumulated in float32.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [N, C, H, W] or [C, H, W], contiguous or channels_last, which y
            then is too; other strides are made contiguous. Under autocast it is computed in float32 and the result
            cast.
        lateral: float32 or bfloat16 [M, C] with M = rank * F for F channels out; map r * F + f belongs to channel f.
        vertical: the same [M, kh], at most 63 taps.
        horizontal: the same [M, kw], at most 63 taps.
        lateral_bias: the same [M], or None.
        vertical_bias: the same [M], or None.
        bias: the same [F], or None.
        stride: a number, or one for the vertical and one for the horizontal filters.
        padding: zeros on both sides of what these filters take, likewise; kh - 1 and kw - 1 are the paper's full mode.
        rank: filters that add up to one of y's.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [N, F, H', W'] or [F, H', W'] of x's dtype, sized as torch.nn.Conv2d describes. Gradients reach x and all
        filters and biases, and theirs in turn.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes or devices do not fit each other.
        RuntimeError: forward-mode differentiation is asked for.

    Source:
        Jin, Dundar, Culurciello, Flattened convolutional neural networks (2014); csrc/kernels/flat_conv2d for the
        method.
    """
    filters = FlatFilters(lateral, vertical, horizontal, lateral_bias, vertical_bias, bias)
    stage = flat_conv2d_pack(filters, rank=rank)
    return flat_conv2d_packed(x, [stage], flat_conv2d_sizes(filters, stride=stride, padding=padding, rank=rank), relu)


def flat_conv2d_sizes(filters: FlatFilters, *, stride: Pair = 1, padding: Pair = 0, rank: int = 1) -> list[int]:
    """Returns what flat_conv2d_packed takes for a stage of these filters: 8 numbers. Those of a chain are joined.

    Raises:
        TypeError, ValueError: as flat_conv2d.
    """
    op = "flat_conv2d"
    _check_filters(op, filters, rank)
    kernel = [filters.vertical.shape[1], filters.horizontal.shape[1]]
    steps, pads = pair_of(op, "stride", stride, 1), pair_of(op, "padding", padding, 0)
    return [filters.lateral.shape[0] // rank, rank, *kernel, *steps, *pads]


def flat_conv2d_pack(filters: FlatFilters, *, rank: int = 1) -> Tensor:
    """Returns the numbers of a stage in the kernels' layout, float32 [numbers]; differentiable.

    Args:
        filters: as flat_conv2d takes them.
        rank: filters that add up to one channel.

    Raises:
        TypeError, ValueError: as flat_conv2d.
    """
    _check_filters("flat_conv2d_pack", filters, rank)
    return _pack(filters, rank)


def flat_conv2d_unpack(
    stage: Tensor, *, in_channels: int, out_channels: int, kernel_size: Sequence[int], rank: int = 1
) -> FlatFilters:
    """Returns the filters of a stage that flat_conv2d_pack made, float32 and with all biases; differentiable.

    Raises:
        ValueError: stage has not as many numbers as these sizes ask for.
    """
    panels = -(-out_channels // _LANES)
    widths = [in_channels, 1, kernel_size[0], 1, kernel_size[1]]
    lengths = [rank * panels * width * _LANES for width in widths] + [panels * _LANES]
    if stage.dim() != 1 or stage.shape[0] != sum(lengths):
        raise ValueError(
            f"flat_conv2d_unpack: stage must be [{sum(lengths)}] for these sizes, got {tuple(stage.shape)}; pass what "
            "flat_conv2d_pack returned, and its sizes"
        )

    def rows(part: Tensor, ranks: int, width: int) -> Tensor:
        lanes = part.view(ranks, panels, width, _LANES).transpose(2, 3)
        return lanes.reshape(ranks, panels * _LANES, width)[:, :out_channels].reshape(ranks * out_channels, width)

    *parts, bias = stage.split(lengths)
    lateral, lateral_bias, vertical, vertical_bias, horizontal = (
        rows(part, rank, width) for part, width in zip(parts, widths, strict=True)
    )
    return FlatFilters(
        lateral, vertical, horizontal, lateral_bias.squeeze(1), vertical_bias.squeeze(1), bias[:out_channels]
    )


def flat_conv2d_packed(x: Tensor, stages: Sequence[Tensor], sizes: Sequence[int], relu: bool = False) -> Tensor:
    """Returns flat_conv2d of one stage after the other, of which no intermediate image is written to memory.

    Args:
        x: as flat_conv2d takes it.
        stages: 1 to 8 of what flat_conv2d_pack returns.
        sizes: what flat_conv2d_sizes returns, stage after stage.
        relu: whether negative results of the last stage become 0.

    Raises:
        TypeError, ValueError: as flat_conv2d.
    """
    op = "flat_conv2d"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in floats_beside(x) and not torch.is_autocast_enabled(x.device.type):
        raise refusal(op, "x", x, floats_beside(x))
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}; reshape it")
    stages, sizes = list(stages), list(sizes)
    if not 1 <= len(stages) <= FLAT_MAX_STAGES or len(sizes) != _NUMBERS * len(stages):
        raise ValueError(
            f"{op}: stages must be 1 to {FLAT_MAX_STAGES} with {_NUMBERS} sizes each, got {len(stages)} with "
            f"{len(sizes)}; pass what flat_conv2d_pack and flat_conv2d_sizes return"
        )
    channels, size = x.shape[-3], list(x.shape[-2:])
    for i, stage in enumerate(stages):
        out, rank, kh, kw, *steps = sizes[_NUMBERS * i : _NUMBERS * (i + 1)]
        for axis, name, reach in ((0, "high", kh), (1, "wide", kw)):
            if size[axis] + 2 * steps[2 + axis] < reach:
                raise ValueError(
                    f"{op}: x must be at least {reach - 2 * steps[2 + axis]} {name} for this kernel and padding, got "
                    f"{size[axis]}; pass larger images or more padding"
                )
            size[axis] = (size[axis] + 2 * steps[2 + axis] - reach) // steps[axis] + 1
        numbers = _LANES * -(-out // _LANES) * (rank * (channels + kh + kw + 2) + 1)
        if stage.dtype != torch.float32 or tuple(stage.shape) != (numbers,) or stage.device != x.device:
            raise ValueError(
                f"{op}: stage {i} must be float32 [{numbers}] on {x.device} for {channels} channels, got {stage.dtype} "
                f"{list(stage.shape)} on {stage.device}; pack filters of these channels"
            )
        channels = out
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in (x, *stages)):
        raise RuntimeError(
            f"{op}: x and filters must not carry a forward-mode tangent, got one; use reverse mode (backward)"
        )
    y: Tensor = _OPS.flat_conv2d(x if x.dim() == 4 else x.unsqueeze(0), stages, sizes, relu)
    return y if x.dim() == 4 else y.squeeze(0)


def flat_conv2d_inference(x: Tensor, stages: Sequence[Tensor], sizes: Sequence[int], relu: bool = False) -> Tensor:
    """Returns flat_conv2d_packed of the same arguments, without gradients and without the checks in Python.

    x must be [N, C, H, W].

    Raises:
        RuntimeError: an argument does not fit (the native checks remain).
    """
    return cast(Tensor, _OPS.flat_conv2d_inference(x, stages, sizes, relu))


def _check_filters(op: str, filters: FlatFilters, rank: int) -> None:
    if not isinstance(filters, FlatFilters):
        raise TypeError(f"{op}: filters must be FlatFilters, got {type(filters).__name__}; pass FlatFilters(*tensors)")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{op}: rank must be an int, got {type(rank).__name__}; pass a number")
    if not 1 <= rank <= MAX_SIZE:
        raise ValueError(f"{op}: rank must be at least 1, got {rank}; pass how many filters add up to a channel")
    for name, tensor in filters._asdict().items():
        if tensor is None and name.endswith("bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in floats_beside(tensor):
            raise refusal(op, name, tensor, floats_beside(tensor))
        if tensor.device != filters.lateral.device:
            raise ValueError(
                f"{op}: {name} must be on {filters.lateral.device} like lateral, got {tensor.device}; move it"
            )
    if filters.lateral.dim() != 2 or filters.lateral.shape[0] % rank:
        raise ValueError(
            f"{op}: lateral must be [rank * F, C] with rank {rank}, got shape {tuple(filters.lateral.shape)}; pass "
            "a row for each map"
        )
    maps = filters.lateral.shape[0]
    for name in ("vertical", "horizontal"):
        taps = getattr(filters, name)
        if taps.dim() != 2 or taps.shape[0] != maps or not 1 <= taps.shape[1] <= FLAT_MAX_KERNEL:
            raise ValueError(
                f"{op}: {name} must be [{maps}, taps] with 1 to {FLAT_MAX_KERNEL} taps, got shape "
                f"{tuple(taps.shape)}; pass a row for each map"
            )
    for name, count in (("lateral_bias", maps), ("vertical_bias", maps), ("bias", maps // rank)):
        bias = getattr(filters, name)
        if bias is not None and tuple(bias.shape) != (count,):
            raise ValueError(
                f"{op}: {name} must be [{count}], got shape {tuple(bias.shape)}; pass one for each map, or for each "
                "channel out"
            )


def _pack(filters: FlatFilters, rank: int) -> Tensor:
    maps = filters.lateral.shape[0]
    out = maps // rank
    panels = -(-out // _LANES)

    def lanes(rows: Tensor, ranks: int) -> Tensor:
        width = rows.shape[1]
        columns = pad(rows.float().view(ranks, out, width), (0, 0, 0, panels * _LANES - out))
        return columns.view(ranks, panels, _LANES, width).transpose(2, 3).reshape(-1)

    def biases(bias: Tensor | None, ranks: int) -> Tensor:
        return lanes(filters.lateral.new_zeros(ranks * out, 1) if bias is None else bias.unsqueeze(1), ranks)

    return torch.cat(
        [
            lanes(filters.lateral, rank),
            biases(filters.lateral_bias, rank),
            lanes(filters.vertical, rank),
            biases(filters.vertical_bias, rank),
            lanes(filters.horizontal, rank),
            biases(filters.bias, 1),
        ]
    )


@torch.library.register_fake("tersetorch::flat_conv2d")
@torch.library.register_fake("tersetorch::flat_conv2d_inference")
def _fake(x: Tensor, stages: Sequence[Tensor], sizes: Sequence[int], relu: bool) -> Tensor:
    height, width = x.shape[2:]
    for i in range(0, len(sizes), _NUMBERS):
        out, _, kh, kw, sh, sw, ph, pw = sizes[i : i + _NUMBERS]
        height, width = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty((x.shape[0], out, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format)


class _Stage:
    """A stage as three convolutions, whose gradients have gradients."""

    def __init__(self, x: Tensor, stage: Tensor, sizes: Sequence[int]) -> None:
        self.x = x
        self.out, self.rank, *kernel, sh, sw, ph, pw = sizes
        f = flat_conv2d_unpack(stage, in_channels=x.shape[1], out_channels=self.out, kernel_size=kernel, rank=self.rank)
        maps = self.out * self.rank
        # Weight, stride, padding and groups of each.
        self.convs = [
            (f.lateral[:, :, None, None], [1, 1], [0, 0], 1),
            (f.vertical[:, None, :, None], [sh, 1], [ph, 0], maps),
            (f.horizontal[:, None, None, :], [1, sw], [0, pw], maps),
        ]
        biases = (f.lateral_bias, f.vertical_bias, None)
        self.taken = [x]
        for (weight, stride, padding, groups), bias in zip(self.convs, biases, strict=True):
            self.taken.append(conv2d(self.taken[-1], weight, bias, stride, padding, 1, groups))
        maps_of = self.taken.pop()
        self.y = maps_of.unflatten(1, (self.rank, self.out)).sum(1) + f.bias.view(-1, 1, 1)  # type: ignore[union-attr]

    def gradients(self, grad_y: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor]:
        """Of x and of the packed stage."""
        bias = grad_y.sum((0, 2, 3))
        grad = grad_y.unsqueeze(1).expand(-1, self.rank, -1, -1, -1).flatten(1, 2)
        found: list[Tensor] = []
        for i in (2, 1, 0):
            weight, stride, padding, groups = self.convs[i]
            grad, of_weight, of_bias = torch.ops.aten.convolution_backward(
                grad,
                self.taken[i],
                weight,
                [weight.shape[0]],
                stride,
                padding,
                [1, 1],
                False,
                [0, 0],
                groups,
                [i > 0 or wants_x, True, True],
            )
            found += [of_weight.flatten(1), of_bias]
        horizontal, _, vertical, vertical_bias, lateral, lateral_bias = found
        filters = FlatFilters(lateral, vertical, horizontal, lateral_bias, vertical_bias, bias)
        return grad if wants_x else None, _pack(filters, self.rank)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stages, ctx.sizes, relu = inputs
    ctx.save_for_backward(x, output if relu else None, *stages)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, y, *packed = ctx.saved_tensors
    grad = (grad_y if y is None else torch.where(y == 0, 0.0, grad_y)).float()  # as nn.functional.relu has it, NaN too
    stages: list[_Stage] = []
    images = x.float()
    for i, stage in enumerate(packed):
        stages.append(_Stage(images, stage, ctx.sizes[_NUMBERS * i : _NUMBERS * (i + 1)]))
        images = stages[-1].y
    grads: list[Tensor] = []
    of_x: Tensor | None = grad
    for i in range(len(stages) - 1, -1, -1):
        assert of_x is not None
        of_x, of_stage = stages[i].gradients(of_x, i > 0 or ctx.needs_input_grad[0])
        grads.insert(0, of_stage)
    return None if of_x is None else of_x.to(x.dtype), grads, None, None


torch.library.register_autograd("tersetorch::flat_conv2d", _backward, setup_context=_setup_context)


def _vmap(op: Any) -> Any:
    """Mapped images of the same filters are one batch; mapped filters are called one after the other."""

    def run(info: Any, in_dims: Any, x: Tensor, stages: Sequence[Tensor], *rest: Any) -> tuple[Tensor, int]:
        at, stage_dims, *_ = in_dims
        if all(dim is None for dim in stage_dims):
            return op(x.movedim(at, 0).flatten(0, 1), stages, *rest).unflatten(0, (info.batch_size, -1)), 0
        return torch.stack(
            [
                op(
                    x if at is None else x.select(at, i),
                    [t if dim is None else t.select(dim, i) for t, dim in zip(stages, stage_dims, strict=True)],
                    *rest,
                )
                for i in range(info.batch_size)
            ]
        ), 0

    return run


for _name in ("flat_conv2d", "flat_conv2d_inference"):
    torch.library.register_vmap(f"tersetorch::{_name}", _vmap(getattr(_OPS, _name)))

compute_in_float32("flat_conv2d")
compute_in_float32("flat_conv2d_inference")
