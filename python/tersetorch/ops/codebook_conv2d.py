"""Convolution of images with a dense weight that is kept as codes into tables of a few values."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._images import Pair, check_filters, conv_gradients, conv_sizes, empty_images
from tersetorch.ops.codebook_matmul import check_coded, codebook_dense

_OPS = torch.ops.tersetorch


def codebook_conv2d(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    column_block: int = 0,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    relu: bool = False,
    mode: str = "exact",
) -> Tensor:
    """Returns conv2d(x, W) + bias, at least 0 with relu, where row o of the coded weight is W[o] flattened.

    W[o, c, i, j] = codebook[t, code[o, k]] with k = (c * kernel_size[0] + i) * kernel_size[1] + j; the table t is 0
    where the codebook has one, o where it has one for each filter, and k // column_block where column_block is not 0.
    x is 0 outside its borders. Accumulated in float32.

    In mode "bfloat16" codebook and x are first rounded to bfloat16; their products are exact in float32. In mode "int8"
    image n is rounded to q * s with s = max |x[n]| / 127 and int8 q, and a table likewise (all of them together where
    blocks of columns have their own); sums of integers are exact, so that every level of the CPU gives the same bits.
    A product is then off by at most |w| s / 2 + |x| m / 254 with m the largest magnitude in the table. An image or
    table that is not finite gives NaN.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [N, C, H, W] or [C, H, W], contiguous or channels_last, which y
            then is too; other strides are made contiguous. Under autocast as sparse_conv2d takes it.
        codes: uint8 [O, bytes], as codebook_pack lays out [O, C / groups * height * width of the kernel] for the
            entries of codebook and column_block.
        codebook: float32 [tables, entries], at most 256 entries.
        bias: float32, bfloat16 or on a CUDA device float16 [O], or None.
        column_block: columns that share a table, or 0.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between outputs.
        padding: zeros on both sides.
        dilation: steps between taps.
        groups: divides C and O; filters of one group see its channels only.
        relu: whether negative results become 0; NaN stays NaN.
        mode: "exact", "bfloat16", or "int8" for filters of at most 131,072 weights.

    Returns:
        [N, O, H', W'] or [O, H', W'] of x's dtype, sized as torch.nn.Conv2d describes. In mode "exact" gradients reach
        x, codebook (an entry gets the sum of its members') and bias, and theirs in turn; they are those of torch's
        dense convolution with the weight, built anew at each call.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes, devices or the mode do not fit each other.
        RuntimeError: a code lies outside its table (found while multiplying; nothing outside the tensors is read; on a
            CUDA device its filter is NaN instead), or forward-mode differentiation is asked for, or gradients in
            another mode than "exact".

    Source:
        Han et al., Deep Compression (2016), section 3, for shared weights; csrc/kernels/codebook_conv2d for the method.
    """
    op = "codebook_conv2d"
    if isinstance(x, Tensor) and x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}; reshape it")
    if not isinstance(x, Tensor) or not isinstance(codes, Tensor) or codes.dim() != 2:
        check_coded(op, x, codes, codebook, bias, column_block, mode, 0, "weights in a filter")
    sizes = conv_sizes(op, x.shape, codes.shape[0], kernel_size, stride, padding, dilation, groups)
    weights = x.shape[-3] // groups * sizes[0][0] * sizes[0][1]
    check_coded(op, x, codes, codebook, bias, column_block, mode, weights, "weights in a filter")
    check_filters(op, mode, weights)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y: Tensor = _OPS.codebook_conv2d(images, codes, codebook, bias, column_block, *sizes, relu, mode)
    return y if x.dim() == 4 else y.squeeze(0)


def codebook_conv2d_inference(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    column_block: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    mode: str = "exact",
) -> Tensor:
    """Returns codebook_conv2d of the same arguments, without gradients and without the checks in Python.

    x must be [N, C, H, W], the sizes two numbers each.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, that of every code included).
    """
    return cast(
        Tensor,
        _OPS.codebook_conv2d_inference(
            x, codes, codebook, bias, column_block, kernel_size, stride, padding, dilation, groups, relu, mode
        ),
    )


@torch.library.register_fake("tersetorch::codebook_conv2d")
@torch.library.register_fake("tersetorch::codebook_conv2d_inference")
def _fake(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    column_block: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    mode: str = "exact",
) -> Tensor:
    return empty_images(x, codes.shape[0], kernel_size, stride, padding, dilation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebook, bias, ctx.column_block, *sizes = inputs
    # The dispatcher leaves trailing defaults out.
    ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, *rest = sizes
    relu, ctx.mode = rest + [False, "exact"][len(rest) :]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, codebook, output if relu else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    # Of torch's convolution with the weight, whose gradients have gradients.
    if ctx.mode != "exact":
        raise RuntimeError(
            f"codebook_conv2d: mode must be 'exact' where gradients are asked for, got {ctx.mode!r}; "
            "its rounding has none"
        )
    x, codes, codebook, y = ctx.saved_tensors
    if y is not None:
        grad_y = torch.where(y == 0, 0.0, grad_y)  # as nn.functional.relu has it, NaN too
    wants_x, _, wants_codebook, wants_bias = ctx.needs_input_grad[:4]
    grad_x = grad_codebook = grad_bias = None
    if wants_x or wants_codebook:
        columns = x.shape[1] // ctx.groups * ctx.kernel_size[0] * ctx.kernel_size[1]
        weight = codebook_dense(codes, codebook, columns=columns, column_block=ctx.column_block)
        grad_x, grad_weight = conv_gradients(ctx, grad_y, x, weight, wants_x, wants_codebook)
        if wants_codebook:
            grad_codebook = _OPS.codebook_reduce(grad_weight, codes, *codebook.shape, ctx.column_block)
    if wants_bias:
        grad_bias = grad_y.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, grad_codebook, grad_bias, None, None, None, None, None, None, None, None


torch.library.register_autograd("tersetorch::codebook_conv2d", _backward, setup_context=_setup_context)

compute_in_float32("codebook_conv2d")
compute_in_float32("codebook_conv2d_inference")
