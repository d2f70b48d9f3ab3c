"""Product of dense samples with a weight in compressed sparse rows."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import FLOATS, floats_beside, floats_of, refusal
from tersetorch.ops._packing import pack_on_cpu

MAX_ENTRIES = 256
_INT32 = torch.iinfo(torch.int32)

_csr_matmul = torch.ops.tersetorch.csr_matmul.default
_csr_matmul_inference = torch.ops.tersetorch.csr_matmul_inference.default
_csr_pack = torch.ops.tersetorch.csr_pack.default
_grad_x = torch.ops.tersetorch.csr_matmul_grad_x.default
_grad_values = torch.ops.tersetorch.csr_matmul_grad_values.default


def csr_matmul(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu: y[..., r] = sum over k of w_k * x[..., col_indices[k]] + bias[r].

    k runs over [row_offsets[r], row_offsets[r + 1]); w_k is values[k], or codebook[values[k]] where a codebook is
    given. Everything is accumulated in float32. Weights that are not stored count as absent, not as zero: an infinite
    or NaN x reaches only the rows that use it.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast float16 too; it is then
            taken as float32 and y is cast to the autocast dtype, while the weight, codebook and bias keep theirs.
        row_offsets: int32 or int64 [out + 1], from 0 to nnz, never falling.
        col_indices: int32, int64 or int16 [nnz], each in [0, in); several in one row and column add up. int16 holds
            16 unsigned bits, for weights of at most 65,536 columns: a third less to read than int32.
        values: float32 or bfloat16 [nnz]; with a codebook, uint8 codes [nnz], each below entries.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        codebook: float32 [entries], at most 256, or None.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. Gradients reach x, values or codebook, and bias, to any order; on a CUDA device that of
        x is summed by atomic additions, so that its last bits may differ from run to run.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other.
        RuntimeError: an offset, a column or a code lies outside its range (found while multiplying; nothing outside
            the tensors is read), or forward-mode differentiation is asked for. On a CUDA device, where finding it
            would make every call wait, a row that holds such damage is NaN in y instead, and NaN in what gradients it
            reaches; formats are validated when they are made and loaded.

    Source:
        Han et al., Deep Compression (2016), section 2 (rows, where the paper stores columns); Elsen et al., Fast
        Sparse ConvNets (2019), section 3, for the loop order.
    """
    _check(x, row_offsets, col_indices, values, bias, codebook)
    if forward_ad._current_level >= 0:
        _refuse_tangents(x=x, values=values, bias=bias, codebook=codebook)
    row_offsets, col_indices = _as_int32(row_offsets), _as_int32(col_indices)
    return cast(Tensor, _csr_matmul(x, row_offsets, col_indices, values, bias, codebook, relu))


def csr_matmul_inference(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns csr_matmul of the same arguments, without gradients and without the checks in Python.

    For layers that checked their tensors when they were built and run while gradients are disabled: it saves some
    microseconds a call. The indices must be int32, col_indices may be int16.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every index included).
    """
    return cast(Tensor, _csr_matmul_inference(x, row_offsets, col_indices, values, bias, codebook, relu))


def csr_pack(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zeros of a dense weight, row after row; 0.0 and -0.0 are left out, NaN is kept.

    Args:
        dense: float32 or bfloat16 [out, in].

    Returns:
        row_offsets int32 [out + 1], col_indices int32 [nnz], rising in each row, and values [nnz] of dense's dtype.

    Raises:
        TypeError: dense is not a float32 or bfloat16 tensor.
        ValueError: dense is not 2-D.
        RuntimeError: 2**31 or more non-zeros or columns.
    """
    if not isinstance(dense, Tensor):
        raise TypeError(f"csr_pack: dense must be a tensor, got {type(dense).__name__}; pass a torch.Tensor")
    if dense.dtype not in FLOATS:
        raise TypeError(f"csr_pack: dense must be float32 or bfloat16, got {dense.dtype}; convert it")
    if dense.dim() != 2:
        raise ValueError(f"csr_pack: dense must be [out, in], got shape {tuple(dense.shape)}; reshape it")
    row_offsets, col_indices, values = pack_on_cpu(_csr_pack, dense)
    return row_offsets, col_indices, values


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
        ("col_indices", col_indices, (*index_dtypes, torch.int16), "convert it"),
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
            raise TypeError(f"csr_matmul: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise refusal("csr_matmul", name, tensor, dtypes, hint)
        if tensor.device != x.device:
            raise ValueError(
                f"csr_matmul: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    if x.dim() == 0:
        raise ValueError("csr_matmul: x must be [..., in], got a scalar; reshape it")
    if row_offsets.dim() != 1 or row_offsets.shape[0] == 0:
        raise ValueError(
            f"csr_matmul: row_offsets must be [out + 1], got shape {tuple(row_offsets.shape)}; "
            "pass where each row begins"
        )
    if col_indices.dim() != 1:
        raise ValueError(f"csr_matmul: col_indices must be [nnz], got shape {tuple(col_indices.shape)}; flatten it")
    if values.shape != col_indices.shape:
        raise ValueError(
            f"csr_matmul: values must be [{col_indices.shape[0]}] like col_indices, got shape {tuple(values.shape)}; "
            "pass one for each column index"
        )
    rows = row_offsets.shape[0] - 1
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != rows):
        raise ValueError(f"csr_matmul: bias must be [{rows}], got shape {tuple(bias.shape)}; pass one for each row")
    if codebook is not None and (codebook.dim() != 1 or codebook.shape[0] > MAX_ENTRIES):
        raise ValueError(
            f"csr_matmul: codebook must be [entries] with at most {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebook.shape)}; pass one group of a codebook"
        )


def _refuse_tangents(**tensors: Tensor | None) -> None:
    """The dispatcher would drop a tangent in silence and return a derivative of zero."""
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"csr_matmul: {name} must not carry a forward-mode tangent, got one; use reverse mode (backward)"
            )


def _as_int32(indices: Tensor) -> Tensor:
    """Indices that no int32 holds become its ends, which the native range check refuses."""
    if indices.dtype != torch.int64:
        return indices
    return indices.clamp(_INT32.min, _INT32.max).to(torch.int32)


@torch.library.register_fake("tersetorch::csr_matmul")
@torch.library.register_fake("tersetorch::csr_matmul_inference")
def _fake(
    x: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_offsets.shape[0] - 1))


@torch.library.register_fake("tersetorch::csr_pack")
def _fake_pack(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    row_offsets = dense.new_empty((dense.shape[0] + 1,), dtype=torch.int32)
    return row_offsets, dense.new_empty((nnz,), dtype=torch.int32), dense.new_empty((nnz,))


@torch.library.register_fake("tersetorch::csr_matmul_grad_x")
def _fake_grad_x(
    grad_y: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    in_features: int,
    codebook: Tensor | None = None,
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], in_features))


@torch.library.register_fake("tersetorch::csr_matmul_grad_values")
def _fake_grad_values(grad_y: Tensor, x: Tensor, row_offsets: Tensor, col_indices: Tensor) -> Tensor:
    return x.new_empty((col_indices.shape[0],), dtype=torch.float32)


def _grad_of_weight(
    grad_y: Tensor, x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, codebook: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values and of codebook (Deep Compression, equation 3: an entry sums those of its members)."""
    grad_values = _grad_values(grad_y, x, row_offsets, col_indices)
    if codebook is None:
        return grad_values.to(values.dtype), None
    return None, torch.zeros_like(codebook).index_add(0, values.int(), grad_values)


def _needs(ctx: Any, argument: int) -> bool:
    """Whether autograd wants this argument's gradient; trailing arguments left at their default are not listed."""
    return argument < len(ctx.needs_input_grad) and bool(ctx.needs_input_grad[argument])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, row_offsets, col_indices, values, bias, codebook, *relu = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept = output if relu and relu[0] else None
    ctx.save_for_backward(x, row_offsets, col_indices, values, codebook, kept)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, row_offsets, col_indices, values, codebook, y = ctx.saved_tensors
    if y is not None:
        grad_y = torch.where(y <= 0, 0, grad_y)
    grad_x = grad_values = grad_bias = grad_codebook = None
    if _needs(ctx, 0):
        grad_x = _grad_x(grad_y, row_offsets, col_indices, values, x.shape[-1], codebook)
    if _needs(ctx, 3) or _needs(ctx, 5):
        grad_values, grad_codebook = _grad_of_weight(grad_y, x, row_offsets, col_indices, values, codebook)
    if _needs(ctx, 4):
        leading = tuple(range(grad_y.dim()))  # of a batch dimension put in front, so that there always is one
        grad_bias = grad_y.unsqueeze(0).sum(leading, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_values, grad_bias, grad_codebook, None


torch.library.register_autograd("tersetorch::csr_matmul", _backward, setup_context=_setup_context)


# grad_x = grad_y @ W is linear in both, and its gradients are products that exist already; so are those of grad_values.


def _setup_grad_x_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_y, row_offsets, col_indices, values, _, codebook = inputs
    ctx.save_for_backward(grad_y, row_offsets, col_indices, values, codebook)


def _backward_of_grad_x(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_y, row_offsets, col_indices, values, codebook = ctx.saved_tensors
    grad_grad_y = grad_values = grad_codebook = None
    if _needs(ctx, 0):
        grad_grad_y = _csr_matmul(grad, row_offsets, col_indices, values, None, codebook)
    if _needs(ctx, 3) or _needs(ctx, 5):
        grad_values, grad_codebook = _grad_of_weight(grad_y, grad, row_offsets, col_indices, values, codebook)
    return grad_grad_y, None, None, grad_values, None, grad_codebook


torch.library.register_autograd(
    "tersetorch::csr_matmul_grad_x", _backward_of_grad_x, setup_context=_setup_grad_x_context
)


def _setup_grad_values_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_grad_values(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_y, x, row_offsets, col_indices = ctx.saved_tensors
    grad_grad_y = grad_x = None
    if _needs(ctx, 0):
        grad_grad_y = _csr_matmul(x, row_offsets, col_indices, grad).to(grad_y.dtype)
    if _needs(ctx, 1):
        grad_x = _grad_x(grad_y, row_offsets, col_indices, grad, x.shape[-1]).to(x.dtype)
    return grad_grad_y, grad_x, None, None


torch.library.register_autograd(
    "tersetorch::csr_matmul_grad_values", _backward_of_grad_values, setup_context=_setup_grad_values_context
)


compute_in_float32("csr_matmul")
compute_in_float32("csr_matmul_inference")
