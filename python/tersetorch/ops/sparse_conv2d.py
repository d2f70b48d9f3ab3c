"""Convolution of images with a weight in compressed sparse rows."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import FLOATS, floats_beside, floats_of, refusal
from tersetorch.ops._images import Pair, check_filters, conv_gradients, conv_sizes, empty_images
from tersetorch.ops._packing import pack_on_cpu

MODES = ("exact", "bfloat16", "int8")
MAX_ENTRIES = 256
_INT32 = torch.iinfo(torch.int32)
_OPS = torch.ops.tersetorch


def sparse_conv2d(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    relu: bool = False,
    mode: str = "exact",
) -> Tensor:
    """Returns conv2d(x, W) + bias, at least 0 with relu, where row o of the weight is W[o] flattened.

    Non-zero k of row o, row_offsets[o] <= k < row_offsets[o + 1], is W[o, c, i, j] with
    col_indices[k] = (c * kernel_size[0] + i) * kernel_size[1] + j; its value is values[k], or codebook[values[k]] where
    a codebook is given. x is 0 outside its borders. Accumulated in float32, channel after channel. Weights that are
    not stored count as absent, not as zero.

    On the CPU the weight is laid out anew at each call, which costs some nanoseconds a non-zero; layers do it once and
    call sparse_conv2d_packed; a CUDA device reads the rows as they are. Gradients are those of torch's dense
    convolution with the same weight, read where it is stored: they cost what a dense layer's cost.

    In mode "bfloat16" x and W are rounded to bfloat16, nearest and ties to even; their products are exact in float32,
    in which they are accumulated (bfloat16 instructions take numbers below 2**-126 as 0). Against the exact result, y
    is off by at most sum of |w * x| * 2**-7 over the weights of the filter that meet x there. Channels 2k and 2k + 1 of
    a group are multiplied together where either has a weight: infinity or NaN in the other then gives NaN, as in a
    dense convolution.

    In mode "int8" both are rounded to 8 bits, filter o with the scale r = max |W[o]| / 127 and image n with
    s = max |x[n]| / 127: y = fma(sum of V * q * r, s, bias[o]) with V = round(W / r) and q = round(x / s), ties to
    even. The sum is exact, so that y has the same bits at every level of the CPU. Against the exact result, y is off by
    at most the sum of (|w| * s + |x| * r) / 2 + s * r / 4, and by the few roundings of the formula. A filter or an
    image whose largest number is below 2**-100 counts as 0; an image that holds infinity or NaN gives NaN everywhere.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [N, C, H, W] or [C, H, W], contiguous or channels_last, which y
            then is too; other strides are made contiguous. Under autocast float16 too; it is then taken as float32 and
            y is cast to the autocast dtype, while the weight, codebook and bias keep theirs.
        row_offsets: int32 or int64 [O + 1], from 0 to nnz, never falling.
        col_indices: int32 or int64 [nnz], strictly rising within a row, each in [0, C / groups * height * width of the
            kernel).
        values: float32 or bfloat16 [nnz]; with a codebook, uint8 codes [nnz], each below entries.
        bias: float32, bfloat16 or on a CUDA device float16 [O], or None.
        codebook: float32 [entries], at most 256, or None.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between outputs.
        padding: zeros on both sides.
        dilation: steps between taps.
        groups: divides C and O; filters of one group see its channels only.
        relu: whether negative results become 0; NaN stays NaN.
        mode: "exact", "bfloat16", or "int8" for filters of at most 131,072 weights, zeros counted.

    Returns:
        [N, O, H', W'] or [O, H', W'] of x's dtype, sized as torch.nn.Conv2d describes. In mode "exact" gradients reach
        x, values or codebook, and bias, to any order; the others have none.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes, sizes, devices or the mode do not fit each other.
        RuntimeError: an offset, a column or a code lies outside its range, a weight is not finite in mode "int8", or
            forward-mode differentiation is asked for, or gradients in another mode than "exact". On a CUDA device,
            where finding damage would make every call wait, the filters that it reaches are NaN in y instead, and the
            gradients end in an assertion of PyTorch's own indexing.

    Source:
        Park et al., Faster CNNs with Direct Sparse Convolutions and Guided Pruning (2017), section 2; Jacob et al.,
        Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (2018), section
        2.2, symmetric, for int8.
    """
    _check_mode(mode)
    _check(x, row_offsets, col_indices, values, bias, codebook)
    sizes = conv_sizes(
        "sparse_conv2d", x.shape, row_offsets.shape[0] - 1, kernel_size, stride, padding, dilation, groups
    )
    weights = x.shape[-3] // groups * sizes[0][0] * sizes[0][1]
    check_filters("sparse_conv2d", mode, weights)
    if forward_ad._current_level >= 0:
        for name, tensor in (("x", x), ("values", values), ("bias", bias), ("codebook", codebook)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"sparse_conv2d: {name} must not carry a forward-mode tangent, got one; use reverse mode (backward)"
                )
    row_offsets, col_indices = _as_int32(row_offsets), _as_int32(col_indices)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y: Tensor = _OPS.sparse_conv2d(images, row_offsets, col_indices, values, bias, codebook, *sizes, relu, mode)
    return y if x.dim() == 4 else y.squeeze(0)


def sparse_conv2d_inference(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    mode: str = "exact",
) -> Tensor:
    """Returns sparse_conv2d of the same arguments, without gradients and without the checks in Python.

    x must be [N, C, H, W], the indices int32, the sizes two numbers each.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every index included; on a CUDA
            device a filter with a damaged index is NaN instead).
    """
    return cast(
        Tensor,
        _OPS.sparse_conv2d_inference(
            x,
            row_offsets,
            col_indices,
            values,
            bias,
            codebook,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            relu,
            mode,
        ),
    )


def sparse_conv2d_packed(
    x: Tensor,
    blocks: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    out_channels: int,
    channel_block: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    row_scales: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """Returns sparse_conv2d_inference of a weight that sparse_conv2d_pack or sparse_conv2d_pack_words has laid out.

    On the CPU alone. blocks, segments and indices are what sparse_conv2d_pack returned for the same sizes, values are
    float32 or bfloat16 values[sources], or with a codebook uint8 codes[sources], and channel_block is the one it was
    packed with; the other arguments are those of sparse_conv2d_inference. What sparse_conv2d_pack_words returned is
    passed as it came, words as values and without a codebook; it says the mode, and row_scales and row_sums belong to
    "int8" alone.

    Raises:
        RuntimeError: an argument does not fit (every offset, segment, index and code is checked).
    """
    return cast(
        Tensor,
        _OPS.sparse_conv2d_packed(
            x,
            blocks,
            segments,
            indices,
            values,
            bias,
            codebook,
            out_channels,
            channel_block,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            relu,
            row_scales,
            row_sums,
        ),
    )


def sparse_conv2d_channel_block(
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    mode: str = "exact",
) -> int:
    """The channel_block to pack a weight with, so that what a block reads stays in the first cache level.

    It counts channels, or in another mode than "exact" words of them, which do not cross the borders of groups.

    Raises:
        RuntimeError: the kernel is too large for the layout, or there is no such mode.
    """
    return cast(int, _OPS.sparse_conv2d_channel_block(in_channels, kernel_size, stride, dilation, groups, mode))


def sparse_conv2d_pack(
    row_offsets: Tensor,
    col_indices: Tensor,
    in_channels: int,
    channel_block: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lays a weight in compressed sparse rows out for sparse_conv2d_packed; csrc/kernels/sparse_conv2d describes it.

    row_offsets and col_indices are int32, as sparse_conv2d describes them, in_channels those of x, of all groups,
    channel_block what sparse_conv2d_channel_block returns, or fewer, and the sizes two numbers each.

    Returns:
        blocks int32 [blocks + 1, 2], segments int32, indices int16 [nnz] to be read as uint16, and sources int32 [nnz]:
        which non-zero of the rows each one of the layout is.

    Raises:
        RuntimeError: an argument does not fit, or the positions are not those of such a weight.
    """
    blocks, segments, indices, sources = pack_on_cpu(
        _OPS.sparse_conv2d_pack,
        row_offsets,
        col_indices,
        in_channels,
        channel_block,
        kernel_size,
        stride,
        dilation,
        groups,
    )
    return blocks, segments, indices, sources


def sparse_conv2d_pack_words(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    in_channels: int,
    channel_block: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rounds a weight as sparse_conv2d does in this mode, and lays it out for sparse_conv2d_packed.

    A word is 2 or 4 neighbouring channels at one tap, those with no non-zero filled with 0. values are float32 or
    bfloat16 [nnz], channel_block is what sparse_conv2d_channel_block returns for the mode, "bfloat16" or "int8", and
    the other arguments are those of sparse_conv2d_pack.

    Returns:
        blocks int32 [blocks + 1, 2], segments int32, indices int16 [n] to be read as uint16, words bfloat16 [n, 2] or
        int8 [n, 4], and in mode "int8" row_scales float32 [O] and row_sums int32 [O], the sum of each filter's
        integers; otherwise None for both.

    Raises:
        ValueError: there is no such mode, or values are not finite or filters have more than 131,072 weights in mode
            "int8".
        RuntimeError: another argument does not fit, or the positions are not those of such a weight.
    """
    if mode not in MODES[1:]:
        raise ValueError(
            f"sparse_conv2d_pack_words: mode must be one of {list(MODES[1:])}, got {mode!r}; choose one of them"
        )
    if mode == "int8":
        weights = in_channels // max(1, groups) * kernel_size[0] * kernel_size[1]
        check_filters("sparse_conv2d_pack_words", mode, weights)
        if not bool(values.isfinite().all()):
            raise ValueError(
                "sparse_conv2d_pack_words: values must be finite in mode 'int8', got infinity or NaN; use another mode"
            )
    blocks, segments, indices, words, row_scales, row_sums = pack_on_cpu(
        _OPS.sparse_conv2d_pack_words,
        row_offsets,
        col_indices,
        values,
        in_channels,
        channel_block,
        kernel_size,
        stride,
        dilation,
        groups,
        mode,
    )
    if mode != "int8":
        return blocks, segments, indices, words, None, None
    return blocks, segments, indices, words, row_scales, row_sums


# ---- checks


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"sparse_conv2d: mode must be one of {list(MODES)}, got {mode!r}; choose one of them")


def _check(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
) -> None:
    index_dtypes = (torch.int32, torch.int64)
    for name, tensor, dtypes, hint in (
        ("x", x, floats_of(x), "convert it"),
        ("row_offsets", row_offsets, index_dtypes, "convert it"),
        ("col_indices", col_indices, index_dtypes, "convert it"),
        (
            "values",
            values,
            FLOATS if codebook is None else (torch.uint8,),
            "pass the codebook beside codes" if codebook is None else "pass codes, or no codebook",
        ),
        ("bias", bias, floats_beside(x), "convert it"),
        ("codebook", codebook, (torch.float32,), "convert it"),
    ):
        if tensor is None and name in ("bias", "codebook"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"sparse_conv2d: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise refusal("sparse_conv2d", name, tensor, dtypes, hint)
        if tensor.device != x.device:
            raise ValueError(
                f"sparse_conv2d: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    if x.dim() not in (3, 4):
        raise ValueError(f"sparse_conv2d: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}; reshape it")
    if row_offsets.dim() != 1 or row_offsets.shape[0] == 0:
        raise ValueError(
            f"sparse_conv2d: row_offsets must be [O + 1], got shape {tuple(row_offsets.shape)}; "
            "pass where each filter begins"
        )
    if col_indices.dim() != 1:
        raise ValueError(f"sparse_conv2d: col_indices must be [nnz], got shape {tuple(col_indices.shape)}; flatten it")
    if values.shape != col_indices.shape:
        raise ValueError(
            f"sparse_conv2d: values must be [{col_indices.shape[0]}] like col_indices, got shape "
            f"{tuple(values.shape)}; pass one for each column index"
        )
    filters = row_offsets.shape[0] - 1
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != filters):
        raise ValueError(
            f"sparse_conv2d: bias must be [{filters}], got shape {tuple(bias.shape)}; pass one for each filter"
        )
    if codebook is not None and (codebook.dim() != 1 or codebook.shape[0] > MAX_ENTRIES):
        raise ValueError(
            f"sparse_conv2d: codebook must be [entries] with at most {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebook.shape)}; pass one group of a codebook"
        )


def _as_int32(indices: Tensor) -> Tensor:
    """Indices that no int32 holds become its ends, which the native range check refuses."""
    if indices.dtype == torch.int32:
        return indices
    return indices.clamp(_INT32.min, _INT32.max).to(torch.int32)


# ---- shapes


@torch.library.register_fake("tersetorch::sparse_conv2d")
@torch.library.register_fake("tersetorch::sparse_conv2d_inference")
def _fake(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    mode: str = "exact",
) -> Tensor:
    return empty_images(x, row_offsets.shape[0] - 1, kernel_size, stride, padding, dilation)


@torch.library.register_fake("tersetorch::sparse_conv2d_packed")
def _fake_packed(
    x: Tensor,
    blocks: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    out_channels: int,
    channel_block: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    row_scales: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    return empty_images(x, out_channels, kernel_size, stride, padding, dilation)


# ---- gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, row_offsets, col_indices, values, bias, codebook, *sizes = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The dispatcher leaves trailing defaults out.
    ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, *rest = sizes
    relu, ctx.mode = rest + [False, "exact"][len(rest) :]
    positive = output if relu else None
    ctx.save_for_backward(x, row_offsets, col_indices, values, codebook, positive)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.mode != "exact":
        raise RuntimeError(
            f"sparse_conv2d: mode must be 'exact' to compute gradients, got {ctx.mode!r}; rounding has none"
        )
    x, row_offsets, col_indices, values, codebook, y = ctx.saved_tensors
    wants_x, _, _, wants_values, wants_bias, wants_codebook = ctx.needs_input_grad[:6]
    if y is not None:
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
    grad_x = grad_values = grad_bias = grad_codebook = None
    if wants_x or wants_values or wants_codebook:
        filters, channels = row_offsets.shape[0] - 1, x.shape[1] // ctx.groups
        rows = torch.repeat_interleave(row_offsets.diff(), output_size=col_indices.shape[0])
        position = (rows, col_indices.long())
        stored = values.float() if codebook is None else codebook.index_select(0, values.int())
        taps = ctx.kernel_size[0] * ctx.kernel_size[1]
        weight = stored.new_zeros(filters, channels * taps).index_put(position, stored)
        wants_stored = wants_values or wants_codebook
        grad_x, grad_weight = conv_gradients(ctx, grad_y, x, weight, wants_x, wants_stored)
        if grad_weight is not None:
            at_stored = grad_weight[position]
            if codebook is None:
                grad_values = at_stored.to(values.dtype)
            else:  # Deep Compression, equation 3: an entry sums the gradients of its members
                grad_codebook = torch.zeros_like(codebook).index_add(0, values.int(), at_stored)
    if wants_bias:
        grad_bias = grad_y.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_values, grad_bias, grad_codebook, None, None, None, None, None, None, None


torch.library.register_autograd("tersetorch::sparse_conv2d", _backward, setup_context=_setup_context)

for _name in ("sparse_conv2d", "sparse_conv2d_inference", "sparse_conv2d_packed"):
    compute_in_float32(_name)
