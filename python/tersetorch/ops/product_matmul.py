"""Product of dense samples with a weight made of shared sub-vectors: tables of partial products, then lookups."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import floats_beside, floats_of, refusal

MAX_ENTRIES = 256
MODES = ("exact", "int8")
# Of the packed codes, as csrc/kernels/product_matmul/product_matmul.h lays them out.
TILE_ROWS = 64
GROUP_TABLES = 8
NARROW_ENTRIES = 16

_product_matmul = torch.ops.tersetorch.product_matmul.default
_product_matmul_inference = torch.ops.tersetorch.product_matmul_inference.default
_product_decode = torch.ops.tersetorch.product_decode.default


def product_matmul(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, for a W of shared sub-vectors.

    W[r, s * width + j] = sum over stages t of codebooks[t, s, j, code[r, t * segments + s]]. For each sample the
    products of every segment of x with every entry are computed once; a row of y then adds up stages * segments of
    them, instead of as many products as W has columns. Sums are float32. A large batch of a weight with short
    sub-vectors is multiplied by the decoded weight instead, some rows at a time.

    In mode "int8" a sample's products are rounded to 256 steps of s = (the largest spread of a table) / 255; y is then
    off by at most stages * segments * s / 2, a hundredth of its size as a rule. A sample with an infinity or NaN gives
    NaN.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        codes: uint8, what product_pack returns; of the number of entries that codebooks have.
        codebooks: float32 [stages, segments, width, entries], at most 256 entries, segments = ceil(in / width), or 1
            for a codebook that all segments share. Entries past the last column are not read.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        out_features: rows of W.
        mode: "exact" or "int8".
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. In mode "exact" gradients reach x, codebooks and bias, to any order; they take the
        decoded weight.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes, devices or the mode do not fit each other.
        RuntimeError: a code names no entry (nothing outside the tensors is read), or forward-mode differentiation is
            asked for, or gradients in mode "int8". On a CUDA device a row with such a code is NaN in y instead.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), sections 3.3 and 3.4;
        Andre, Kermarrec, Le Scouarnec, Cache locality is not enough (2015), for 4-bit codes.
    """
    _check(x, codes, codebooks, bias, out_features, mode)
    if forward_ad._current_level >= 0:
        for name, tensor in (("x", x), ("codebooks", codebooks), ("bias", bias)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"product_matmul: {name} must not carry a forward-mode tangent, got one; use reverse mode "
                    "(backward)"
                )
    return cast(Tensor, _product_matmul(x, codes, codebooks, bias, out_features, mode, relu))


def product_matmul_inference(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    bias: Tensor | None,
    out_features: int,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    """Returns product_matmul of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every code included).
    """
    return cast(Tensor, _product_matmul_inference(x, codes, codebooks, bias, out_features, mode, relu))


def product_decode(codes: Tensor, codebooks: Tensor, *, out_features: int, in_features: int) -> Tensor:
    """The weight that product_matmul multiplies with, float32 [out, in]; differentiable in codebooks.

    Raises:
        TypeError: a tensor has another dtype than product_matmul names.
        RuntimeError: sizes do not fit each other, or a code names no entry (on a CUDA device such a row is NaN).
    """
    for name, tensor, dtype in (("codes", codes, torch.uint8), ("codebooks", codebooks, torch.float32)):
        _check_tensor("product_decode", name, tensor, (dtype,))
    return cast(Tensor, _product_decode(codes, codebooks, out_features, in_features))


def product_pack(codes: Tensor, entries: int) -> Tensor:
    """Packs codes for product_matmul: uint8 [tiles of 64 rows, bytes], 4 bits a code up to 16 entries, else 8.

    Args:
        codes: uint8 [rows, tables], each below entries; table t * segments + s is segment s of stage t.
        entries: of the codebooks, 1 to 256.

    Raises:
        TypeError: codes is no uint8 tensor.
        ValueError: codes is not 2-D.
    """
    _check_tensor("product_pack", "codes", codes, (torch.uint8,))
    if codes.dim() != 2:
        raise ValueError(f"product_pack: codes must be [rows, tables], got shape {tuple(codes.shape)}; reshape it")
    rows, tables = codes.shape
    tiles = -(-rows // TILE_ROWS)
    if entries > NARROW_ENTRIES:
        whole = pad(codes, (0, 0, 0, tiles * TILE_ROWS - rows)).view(tiles, TILE_ROWS, tables)
        return whole.transpose(1, 2).reshape(tiles, tables * TILE_ROWS)
    groups = -(-tables // GROUP_TABLES)
    whole = pad(codes, (0, groups * GROUP_TABLES - tables, 0, tiles * TILE_ROWS - rows))
    pairs = whole.view(tiles, TILE_ROWS, groups, GROUP_TABLES // 2, 2).transpose(1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).reshape(tiles, groups * TILE_ROWS * (GROUP_TABLES // 2))


def product_unpack(packed: Tensor, entries: int, *, rows: int, tables: int) -> Tensor:
    """The codes uint8 [rows, tables] that product_pack packed."""
    tiles = -(-rows // TILE_ROWS)
    if entries > NARROW_ENTRIES:
        return packed.view(tiles, tables, TILE_ROWS).transpose(1, 2).reshape(tiles * TILE_ROWS, tables)[:rows]
    groups = -(-tables // GROUP_TABLES)
    pairs = packed.view(tiles, groups, TILE_ROWS, GROUP_TABLES // 2)
    codes = torch.stack([pairs & 15, pairs >> 4], -1).transpose(1, 2)
    return codes.reshape(tiles * TILE_ROWS, groups * GROUP_TABLES)[:rows, :tables]


def product_segments(columns: int, width: int) -> int:
    """How many segments of this width the columns take."""
    return -(-columns // width)


def product_bytes(rows: int, tables: int, entries: int) -> int:
    """Bytes of packed codes."""
    if entries <= NARROW_ENTRIES:
        tables = -(-tables // GROUP_TABLES) * GROUP_TABLES // 2
    return -(-rows // TILE_ROWS) * TILE_ROWS * tables


def _check_tensor(op: str, name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise refusal(op, name, tensor, dtypes)


def _check(x: Tensor, codes: Tensor, codebooks: Tensor, bias: Tensor | None, out_features: int, mode: str) -> None:
    op = "product_matmul"
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {list(MODES)}, got {mode!r}; choose one of them")
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got a scalar; reshape it")
    columns = x.shape[-1] if isinstance(x, Tensor) else 0
    check_product(op, x, codes, codebooks, bias, out_features, columns, "features")


def check_product(
    op: str,
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    columns_are: str,
) -> None:
    """Refuses tensors that do not stand for a weight [rows, columns] with a bias, on the device of x.

    Raises:
        TypeError, ValueError: with the sentence, which calls columns what columns_are says.
    """
    for name, tensor, dtypes in (
        ("x", x, floats_of(x)),
        ("codes", codes, (torch.uint8,)),
        ("codebooks", codebooks, (torch.float32,)),
        ("bias", bias, floats_beside(x)),
    ):
        if tensor is None and name == "bias":
            continue
        _check_tensor(op, name, tensor, dtypes)
        assert tensor is not None
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    if rows < 0:
        raise ValueError(f"{op}: out_features must be at least 0, got {rows}; pass the rows of W")
    if codebooks.dim() != 4 or not all(codebooks.shape) or codebooks.shape[3] > MAX_ENTRIES:
        raise ValueError(
            f"{op}: codebooks must be [stages, segments, width, entries] with at most {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebooks.shape)}; pass those of a ProductWeight"
        )
    stages, books, width, entries = codebooks.shape
    segments = product_segments(columns, width)
    if books not in (1, segments):
        raise ValueError(
            f"{op}: codebooks must have 1 segment or the {segments} that {columns} {columns_are} have at width "
            f"{width}, got {books}; pass x with as many {columns_are} as W has columns"
        )
    expected = product_bytes(rows, stages * segments, entries)
    if codes.numel() != expected:
        raise ValueError(
            f"{op}: codes must have {expected} bytes for {rows} rows of {stages * segments} codes below "
            f"{entries}, got {codes.numel()}; pass what product_pack returns"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"{op}: bias must be [{rows}], got shape {tuple(bias.shape)}; pass one for each row")


@torch.library.register_fake("tersetorch::product_matmul")
@torch.library.register_fake("tersetorch::product_matmul_inference")
def _fake(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    bias: Tensor | None,
    out_features: int,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("tersetorch::product_decode")
def _fake_decode(codes: Tensor, codebooks: Tensor, out_features: int, in_features: int) -> Tensor:
    return codebooks.new_empty((out_features, in_features))


def _grad_codebooks(grad_weight: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Each entry sums the gradients of the sub-vectors that are it."""
    (rows, columns), (stages, books, width, entries) = grad_weight.shape, codebooks.shape
    segments = product_segments(columns, width)
    named = product_unpack(codes, entries, rows=rows, tables=stages * segments)
    places = named.T.reshape(stages, segments, 1, rows).long().expand(-1, -1, width, -1)
    whole = pad(grad_weight.float(), (0, segments * width - columns))
    parts = whole.T.reshape(1, segments, width, rows).expand(stages, -1, -1, -1)
    summed = parts.new_zeros((stages, segments, width, entries)).scatter_add(3, places, parts)
    return summed if books == segments else summed.sum(1, keepdim=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    defaults: tuple[Any, ...] = ("exact", False)
    x, codes, codebooks, bias, out_features, mode, relu = inputs + defaults[len(inputs) - 5 :]
    ctx.mode = mode
    ctx.out_features = out_features
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, codebooks, output if relu else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebooks, y = ctx.saved_tensors
    if ctx.mode != "exact":
        raise RuntimeError(
            f"product_matmul: mode must be 'exact' to compute gradients, got {ctx.mode!r}; rounding has none"
        )
    if y is not None:
        grad_y = torch.where(y <= 0, 0, grad_y)
    needs = (*ctx.needs_input_grad, *[False] * 2)
    grads = grad_y.reshape(-1, ctx.out_features).float()
    grad_x = grad_codebooks = grad_bias = None
    if needs[0]:
        weight = _product_decode(codes, codebooks, ctx.out_features, x.shape[-1])
        grad_x = (grads @ weight).to(x.dtype).reshape(x.shape)
    if needs[2]:
        grad_codebooks = _grad_codebooks(grads.T @ x.reshape(-1, x.shape[-1]).float(), codes, codebooks)
    if needs[3]:
        grad_bias = grads.sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_codebooks, grad_bias, None, None, None


torch.library.register_autograd("tersetorch::product_matmul", _backward, setup_context=_setup_context)


def _setup_decode_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward_of_decode(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebooks = ctx.saved_tensors
    return None, _grad_codebooks(grad, codes, codebooks), None, None


torch.library.register_autograd("tersetorch::product_decode", _backward_of_decode, setup_context=_setup_decode_context)

compute_in_float32("product_matmul")
compute_in_float32("product_matmul_inference")
