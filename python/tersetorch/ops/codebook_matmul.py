"""Product of dense samples with a dense weight that is kept as codes into tables of a few values."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import floats_beside, floats_of, refusal
from tersetorch.ops._packing import pack_on_cpu

MAX_ENTRIES = 256
# How products of codes are computed: in float32, or with x rounded to bfloat16 or to int8.
CODEBOOK_MODES = ("exact", "bfloat16", "int8")
CHUNK_BITS = 512

_codebook_matmul = torch.ops.tersetorch.codebook_matmul.default
_codebook_matmul_inference = torch.ops.tersetorch.codebook_matmul_inference.default
_codebook_dense = torch.ops.tersetorch.codebook_dense.default
_codebook_reduce = torch.ops.tersetorch.codebook_reduce.default
_codebook_pack = torch.ops.tersetorch.codebook_pack.default
_codebook_unpack = torch.ops.tersetorch.codebook_unpack.default


def codebook_matmul(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    column_block: int = 0,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, with W[r, c] = codebook[t, code[r, c]].

    The table t is 0 where the codebook has one, r where it has one for each row, and c // column_block where
    column_block is not 0. Accumulated in float32. In mode "bfloat16" codebook and x are first rounded to bfloat16: each
    product is off by at most 2**-7.9 of itself, and exact with a codebook of such values and such x. In mode "int8" x
    is rounded to q * s with s = max |x[n]| / 127 and int8 q, and a table likewise (all of them together where blocks of
    columns have their own); sums of integers are exact, so that every level of the CPU gives the same bits. A product
    is then off by at most |W[r, c]| s / 2 + |x[n, c]| m / 254 with m the largest magnitude in the table. A sample or
    table that is not finite gives NaN.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        codes: uint8 [out, bytes], as codebook_pack lays them out for the entries of codebook and column_block.
        codebook: float32 [tables, entries], at most 256 entries. A code takes 2 bits up to 4 of them, 4 bits up to 16,
            and 8 bits beyond, of which those up to 32 are the fastest.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        column_block: columns that share a table, or 0.
        mode: "exact", "bfloat16", or "int8" for at most 131,072 features.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. In mode "exact" gradients reach x, codebook (an entry gets the sum of its members') and
        bias, and theirs in turn; they take the dense weight, built anew at each call.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes, devices or the mode do not fit each other.
        RuntimeError: a code lies outside its table (found while multiplying; nothing outside the tensors is read; on a
            CUDA device its row is NaN instead), or forward-mode differentiation is asked for, or gradients in another
            mode than "exact".

    Source:
        Han et al., Deep Compression (2016), section 3, whose authors left the kernel as future work.
    """
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError("codebook_matmul: x must be [..., in], got a scalar; reshape it")
    columns = x.shape[-1] if isinstance(x, Tensor) else 0
    check_coded("codebook_matmul", x, codes, codebook, bias, column_block, mode, columns, "features")
    return cast(Tensor, _codebook_matmul(x, codes, codebook, bias, column_block, mode, relu))


def codebook_matmul_inference(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    column_block: int = 0,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    """Returns codebook_matmul of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, that of every code included).
    """
    return cast(Tensor, _codebook_matmul_inference(x, codes, codebook, bias, column_block, mode, relu))


def codebook_dense(codes: Tensor, codebook: Tensor, *, columns: int, column_block: int = 0) -> Tensor:
    """The weight that codebook_matmul multiplies by, float32 [out, columns]; differentiable in codebook.

    Args:
        codes: as codebook_matmul takes them.
        codebook: likewise.
        columns: width of the weight.
        column_block: as codebook_matmul takes it.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named there.
        RuntimeError: shapes do not fit each other, or a code lies outside its table.
    """
    _check_tensor("codebook_dense", "codes", codes, (torch.uint8,), "take it from codebook_pack")
    _check_tensor("codebook_dense", "codebook", codebook, (torch.float32,), "convert it")
    return cast(Tensor, _codebook_dense(codes, codebook, columns, column_block))


def codebook_pack(codes: Tensor, *, entries: int, column_block: int = 0) -> Tensor:
    """Lays codes out for codebook_matmul: uint8 [out, bytes], in whole chunks of 64 bytes for each row and block.

    Args:
        codes: uint8 [out, in], each below entries.
        entries: of the codebook, 1 to 256; they decide how many bits a code takes.
        column_block: columns that share a table, or 0.

    Raises:
        TypeError: codes is not a uint8 tensor.
        ValueError: codes is not 2-D.
        RuntimeError: a code, entries or column_block is out of range.
    """
    _check_tensor("codebook_pack", "codes", codes, (torch.uint8,), "convert it")
    if codes.dim() != 2:
        raise ValueError(f"codebook_pack: codes must be [out, in], got shape {tuple(codes.shape)}; reshape it")
    (packed,) = pack_on_cpu(_codebook_pack, codes, entries, column_block)
    return packed


def codebook_unpack(packed: Tensor, *, entries: int, columns: int, column_block: int = 0) -> Tensor:
    """The codes, uint8 [out, columns], that codebook_pack laid out with the same numbers.

    Raises:
        TypeError: packed is not a uint8 tensor.
        RuntimeError: its shape does not fit the numbers, or one of them is out of range.
    """
    _check_tensor("codebook_unpack", "packed", packed, (torch.uint8,), "take it from codebook_pack")
    (codes,) = pack_on_cpu(_codebook_unpack, packed, entries, columns, column_block)
    return codes


def codebook_row_bytes(entries: int, columns: int, column_block: int = 0) -> int:
    """Bytes of a row of codes as codebook_pack lays them out."""
    bits = 2 if entries <= 4 else 4 if entries <= 16 else 8
    block = column_block or max(1, columns)
    whole, rest = columns // block, columns % block  # no divmod, which sizes of a trace do not know
    return 64 * (whole * -(-block * bits // CHUNK_BITS) + -(-rest * bits // CHUNK_BITS))


def codebook_tables(rows: int, columns: int, column_block: int = 0) -> tuple[int, ...]:
    """The numbers of tables that a codebook may have."""
    blocks = -(-columns // column_block) if column_block else 1
    return (blocks,) if blocks > 1 else (1, rows)


def _check_tensor(op: str, name: str, tensor: object, dtypes: tuple[torch.dtype, ...], hint: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise refusal(op, name, tensor, dtypes, hint)


def check_coded(
    op: str,
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    column_block: int,
    mode: str,
    columns: int,
    of_row: str,
) -> None:
    """Checks what a product with a weight of so many columns takes; of_row says what a row of it has."""
    if mode not in CODEBOOK_MODES:
        raise ValueError(f"{op}: mode must be one of {list(CODEBOOK_MODES)}, got {mode!r}; choose one of them")
    for name, tensor, dtypes, hint in (
        ("x", x, floats_of(x), "convert it"),
        ("codes", codes, (torch.uint8,), "take it from codebook_pack"),
        ("codebook", codebook, (torch.float32,), "convert it"),
        ("bias", bias, floats_beside(x), "convert it"),
    ):
        if tensor is None and name == "bias":
            continue
        _check_tensor(op, name, tensor, dtypes, hint)
        if cast(Tensor, tensor).device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {cast(Tensor, tensor).device}; "
                "move one of them"
            )
    if codebook.dim() != 2 or not 1 <= codebook.shape[1] <= MAX_ENTRIES:
        raise ValueError(
            f"{op}: codebook must be [tables, entries] with 1 to {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebook.shape)}; share the weight with at most 8 bits"
        )
    if column_block < 0:
        raise ValueError(f"{op}: column_block must be at least 0, got {column_block}; pass 0 for none")
    row_bytes = codebook_row_bytes(codebook.shape[1], columns, column_block)
    if codes.dim() != 2 or codes.shape[1] != row_bytes:
        raise ValueError(
            f"{op}: codes must be [out, {row_bytes}] for {columns} {of_row} and {codebook.shape[1]} entries, got "
            f"shape {tuple(codes.shape)}; pass what codebook_pack made of a weight that x fits"
        )
    tables = codebook_tables(codes.shape[0], columns, column_block)
    if codebook.shape[0] not in tables:
        raise ValueError(
            f"{op}: codebook must have {' or '.join(map(str, dict.fromkeys(tables)))} tables, got {codebook.shape[0]}; "
            "pass the codebook that the codes were made with"
        )
    if bias is not None and bias.shape != codes.shape[:1]:
        raise ValueError(
            f"{op}: bias must be [{codes.shape[0]}], got shape {tuple(bias.shape)}; pass one for each row of the weight"
        )
    if forward_ad._current_level >= 0:
        for name, tensor in (("x", x), ("codebook", codebook), ("bias", bias)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{op}: {name} must not carry a forward-mode tangent, got one; use reverse mode")


@torch.library.register_fake("tersetorch::codebook_matmul")
@torch.library.register_fake("tersetorch::codebook_matmul_inference")
def _fake(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    column_block: int = 0,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("tersetorch::codebook_dense")
def _fake_dense(codes: Tensor, codebook: Tensor, columns: int, column_block: int = 0) -> Tensor:
    return codebook.new_empty((codes.shape[0], columns))


@torch.library.register_fake("tersetorch::codebook_reduce")
def _fake_reduce(grad: Tensor, codes: Tensor, tables: int, entries: int, column_block: int = 0) -> Tensor:
    return grad.new_empty((tables, entries))


@torch.library.register_fake("tersetorch::codebook_pack")
def _fake_pack(codes: Tensor, entries: int, column_block: int = 0) -> Tensor:
    return codes.new_empty((codes.shape[0], codebook_row_bytes(entries, codes.shape[1], column_block)))


@torch.library.register_fake("tersetorch::codebook_unpack")
def _fake_unpack(packed: Tensor, entries: int, columns: int, column_block: int = 0) -> Tensor:
    return packed.new_empty((packed.shape[0], columns))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    defaults: tuple[Any, ...] = (None, 0, "exact", False)
    x, codes, codebook, bias, column_block, mode, relu = inputs + defaults[len(inputs) - 3 :]
    ctx.mode, ctx.column_block = mode, column_block
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, codebook, output if relu else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    # Of the weight as a matrix, whose gradients have gradients.
    if ctx.mode != "exact":
        raise RuntimeError(
            f"codebook_matmul: mode must be 'exact' where gradients are asked for, got {ctx.mode!r}; "
            "its rounding has none"
        )
    x, codes, codebook, y = ctx.saved_tensors
    if y is not None:
        grad_y = torch.where(y == 0, 0.0, grad_y)  # as nn.functional.relu has it, NaN too
    needs = ctx.needs_input_grad
    grad_x = grad_codebook = grad_bias = None
    rows = grad_y.reshape(-1, codes.shape[0]).float()
    if needs[0]:
        weight = _codebook_dense(codes, codebook, x.shape[-1], ctx.column_block)
        grad_x = (rows @ weight).reshape(x.shape).to(x.dtype)
    if needs[2]:
        of_weight = rows.T @ x.reshape(-1, x.shape[-1]).float()
        grad_codebook = _codebook_reduce(of_weight, codes, *codebook.shape, ctx.column_block)
    if needs[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_codebook, grad_bias, None, None, None


def _setup_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebook, _, ctx.column_block = inputs if len(inputs) == 4 else (*inputs, 0)
    ctx.tables = tuple(codebook.shape)
    ctx.save_for_backward(codes)


def _backward_dense(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    return None, _codebook_reduce(grad, codes, *ctx.tables, ctx.column_block), None, None


def _setup_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, codes, _, _, ctx.column_block = inputs if len(inputs) == 5 else (*inputs, 0)
    ctx.columns = grad.shape[1]
    ctx.save_for_backward(codes)


def _backward_reduce(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    return _codebook_dense(codes, grad.contiguous(), ctx.columns, ctx.column_block), None, None, None, None


torch.library.register_autograd("tersetorch::codebook_matmul", _backward, setup_context=_setup_context)
torch.library.register_autograd("tersetorch::codebook_dense", _backward_dense, setup_context=_setup_dense)
torch.library.register_autograd("tersetorch::codebook_reduce", _backward_reduce, setup_context=_setup_reduce)


compute_in_float32("codebook_matmul")
compute_in_float32("codebook_matmul_inference")
