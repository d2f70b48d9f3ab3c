"""Product of numbers with a weight of signs: additions and subtractions."""

from typing import Any, cast

import torch
from torch import Tensor

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import floats_beside, floats_of, refusal
from tersetorch.ops.sign_pack import sign_unpack, sign_words
from tersetorch.ops.xnor_matmul import TILE_ROWS, xnor_unpack

_sign_matmul = torch.ops.tersetorch.sign_matmul.default
_sign_matmul_inference = torch.ops.tersetorch.sign_matmul_inference.default


def sign_matmul(
    x: Tensor,
    weight: Tensor,
    *,
    out_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns scale * (x @ W.T) + bias, at least 0 with relu, for signs W [out, in].

    Sums are float32, four columns at a time: ((+-x0 +- x1) + (+-x2 +- x3)), one four after the other, the same at every
    level and for every number of samples and threads. y = fma(sum, scale, bias).

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        weight: what xnor_pack returns, int64 [ceil(out / 32), ceil(in / 64), 32]; xnor_matmul takes the same.
        out_features: rows of W.
        scale: float32 [out], or None for 1.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None for 0.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. Gradients reach x, scale and bias, to any order; they take the signs as numbers.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), section 2.1.
    """
    op = "sign_matmul"
    for name, tensor, dtypes in (
        ("x", x, floats_of(x)),
        ("weight", weight, (torch.int64,)),
        ("scale", scale, (torch.float32,)),
        ("bias", bias, floats_beside(x)),
    ):
        if tensor is None and name in ("scale", "bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise refusal(op, name, tensor, dtypes)
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
        if name in ("scale", "bias") and tuple(tensor.shape) != (out_features,):
            raise ValueError(
                f"{op}: {name} must be [{out_features}], got shape {tuple(tensor.shape)}; pass one for each row"
            )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got a scalar; reshape it")
    expected = (-(-out_features // TILE_ROWS), sign_words(x.shape[-1]), TILE_ROWS)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{op}: weight must be {list(expected)} for {out_features} rows of {x.shape[-1]} signs, got shape "
            f"{tuple(weight.shape)}; pass what xnor_pack returns"
        )
    return cast(Tensor, _sign_matmul(x, weight, out_features, scale, bias, relu))


def sign_matmul_inference(
    x: Tensor, weight: Tensor, out_features: int, scale: Tensor | None, bias: Tensor | None, relu: bool = False
) -> Tensor:
    """Returns sign_matmul of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain).
    """
    return cast(Tensor, _sign_matmul_inference(x, weight, out_features, scale, bias, relu))


@torch.library.register_fake("tersetorch::sign_matmul")
@torch.library.register_fake("tersetorch::sign_matmul_inference")
def _fake(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, out_features, scale, bias, relu = inputs + (None, None, False)[len(inputs) - 3 :]
    ctx.out_features = out_features
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, scale, output if relu else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, y = ctx.saved_tensors
    if y is not None:
        grad_y = torch.where(y <= 0, 0, grad_y)
    needs = (*ctx.needs_input_grad, *[False] * 3)
    grads, columns = grad_y.reshape(-1, ctx.out_features).float(), x.shape[-1]
    signs = sign_unpack(xnor_unpack(weight, ctx.out_features), columns)
    grad_x = grad_scale = grad_bias = None
    if needs[0]:
        grad_x = ((grads if scale is None else grads * scale) @ signs).to(x.dtype).reshape(x.shape)
    if needs[3]:
        grad_scale = (grads * (x.reshape(-1, columns).float() @ signs.T)).sum(0)
    if needs[4]:
        grad_bias = grads.sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_scale, grad_bias, None


torch.library.register_autograd("tersetorch::sign_matmul", _backward, setup_context=_setup_context)

compute_in_float32("sign_matmul")
compute_in_float32("sign_matmul_inference")
