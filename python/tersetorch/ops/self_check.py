"""Runs every op on small awkward shapes against a float64 reference; what tersetorch doctor shows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad

from tersetorch.ops.bitmap_columns_matmul import bitmap_columns_matmul
from tersetorch.ops.bitmap_matmul import bitmap_from_rows, bitmap_matmul
from tersetorch.ops.bitplane_matmul import bitplane_conv2d, bitplane_matmul
from tersetorch.ops.blocked_bfloat16_matmul import blocked_bfloat16_matmul, blocked_bfloat16_pack
from tersetorch.ops.blocked_int8_matmul import blocked_int8_matmul, blocked_int8_pack
from tersetorch.ops.blocked_matmul import blocked_matmul, blocked_pack
from tersetorch.ops.codebook_conv2d import codebook_conv2d
from tersetorch.ops.codebook_embedding import codebook_embedding
from tersetorch.ops.codebook_matmul import CODEBOOK_MODES, codebook_dense, codebook_matmul, codebook_pack
from tersetorch.ops.csr_matmul import csr_matmul
from tersetorch.ops.fixed_matmul import fixed_matmul, fixed_pack
from tersetorch.ops.fixed_round import fixed_round
from tersetorch.ops.flat_conv2d import flat_conv2d
from tersetorch.ops.product_conv2d import product_conv2d
from tersetorch.ops.product_matmul import product_decode, product_matmul, product_pack
from tersetorch.ops.sign_matmul import sign_matmul
from tersetorch.ops.sign_max_pool2d import sign_max_pool2d
from tersetorch.ops.sign_pack import sign_pack, sign_pack_images, sign_unpack
from tersetorch.ops.sparse_conv2d import sparse_conv2d
from tersetorch.ops.xnor_conv2d import xnor_conv2d, xnor_conv2d_pack
from tersetorch.ops.xnor_matmul import xnor_matmul, xnor_pack

ROWS, COLUMNS, ENTRIES = 37, 53, 16
COLUMN_BLOCK = 16
# One, around each width of the batched kernels, and a prime.
BATCHES = [1, 2, 7, 9, 31, 65]
# Height, width, stride: around the widths and heights of a convolution's tiles.
IMAGES = [(1, 1, 1), (7, 7, 1), (14, 29, 1), (16, 8, 1), (13, 33, 2), (12, 31, 3)]
CHANNELS, KERNEL = 19, 3
EPSILON = torch.finfo(torch.float32).eps
BFLOAT16_ROUNDING = torch.finfo(torch.bfloat16).eps / 2


def check_ops() -> list[dict[str, Any]]:
    """Each op and case with its largest error, the error that float32 sums may have, and whether it kept to it.

    An error is |y - reference| as a multiple of sum |w x|, the size that rounding errors grow with; largest over all
    elements and batches.
    """
    products = {
        "csr_matmul": csr_matmul,
        "blocked_matmul": _blocked,
        "bitmap_matmul": _bitmap,
        "bitmap_columns_matmul": _bitmap_columns,
    }
    cases = (("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False), ("codebook", torch.float32, True))
    checked = [_check(op, product, *case) for op, product in products.items() for case in cases]
    checked += [_check_conv(*case) for case in cases]
    checked += [_check_int8("bitmap_matmul", _bitmap_int8), _check_int8("blocked_int8_matmul", _blocked_int8)]
    checked += _check_product()
    checked.append(_check_product_conv())
    checked += [_check_codebook(mode, entries) for mode in CODEBOOK_MODES for entries in (4, ENTRIES, 32, 256)]
    checked += [
        _check_embedding(dtype, entries)
        for dtype in (torch.float32, torch.bfloat16)
        for entries in (4, ENTRIES, 32, 256)
    ]
    checked += [_check_codebook_conv(mode) for mode in CODEBOOK_MODES]
    checked += [_check_flat_conv(torch.float32), _check_flat_conv(torch.bfloat16)]
    checked += _check_signs()
    checked += [_check_sign_matmul(torch.float32), _check_sign_matmul(torch.bfloat16), *_check_bitplanes()]
    checked += [_check_fixed_round(), _check_fixed_matmul(torch.int8), _check_fixed_matmul(torch.int16)]
    return [*checked, _check_bfloat16_mode(), *_check_conv_modes(), *_check_gradients()]


def _check_fixed_round() -> dict[str, Any]:
    """Nearest against the formula, to every bit; stochastic to a neighbour, and the same in parts."""
    worst = 0.0
    for bits in (8, 16, 20):
        x = torch.randn(1003, generator=torch.Generator().manual_seed(9))
        step = 2.0 ** (3 - bits)
        exact = x.double().clamp(-4, 4 - step)
        nearest = ((x.double() / step + 0.5).floor() * step).clamp(-4, 4 - step)
        worst = max(worst, float((fixed_round(x, 3, bits - 3).double() - nearest).abs().max()))
        drawn = fixed_round(x, 3, bits - 3, "stochastic", seed=bits)
        parts = [fixed_round(x[i : i + 100], 3, bits - 3, "stochastic", bits, i) for i in range(0, 1003, 100)]
        worst = max(worst, float((drawn - torch.cat(parts)).abs().max()))
        worst = max(worst, float(((drawn.double() - exact).abs() >= step).double().max()))
    return _result("fixed_round", "8, 16 and 20 bits", worst, 0.0)


def _check_fixed_matmul(dtype: torch.dtype) -> dict[str, Any]:
    """Whole numbers, which every level has exactly; sums of two of the largest products overflow 32 bits."""
    generator, info, worst = torch.Generator().manual_seed(10), torch.iinfo(dtype), 0.0
    weight = torch.randint(info.min, info.max + 1, (ROWS, COLUMNS), generator=generator).to(dtype)
    bias = torch.randint(-(2**20), 2**20, (ROWS,), generator=generator)
    weight[:, ::2] = info.min
    fraction_bits = 2 * info.bits - 13
    for batch in BATCHES:
        x = torch.randint(info.min, info.max + 1, (batch, COLUMNS), generator=generator).to(dtype)
        x[0] = info.min
        exact = x.long() @ weight.long().T + bias
        nearest = (exact + (1 << fraction_bits - 1) >> fraction_bits).clamp(-(2**15), 2**15 - 1)
        y = fixed_matmul(
            x,
            fixed_pack(weight),
            bias,
            rows=ROWS,
            sum_fraction_bits=fraction_bits,
            integer_bits=16,
            fraction_bits=0,
        )
        worst = max(worst, float((y.long() - nearest).abs().max()))
    return _result("fixed_matmul", str(dtype).removeprefix("torch."), worst, 0.0)


def _check_signs() -> list[dict[str, Any]]:
    """The products of signs and the largest of windows, whole numbers that every level has exactly."""
    generator = torch.Generator().manual_seed(8)

    def signs(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).sign()

    worst = {"xnor_matmul": 0.0, "xnor_conv2d": 0.0, "sign_max_pool2d": 0.0}

    def compare(op: str, y: Tensor, reference: Tensor) -> None:
        worst[op] = max(worst[op], float((y.double() - reference.double()).abs().max()))

    for terms in (COLUMNS, 5 * COLUMNS):
        weight = signs(ROWS, terms)
        sizes: dict[str, Any] = {"in_features": terms, "out_features": ROWS}
        for batch in BATCHES:
            x = signs(batch, terms)
            compare("xnor_matmul", xnor_matmul(x, xnor_pack(sign_pack(weight)), **sizes), x @ weight.T)
    for channels in (CHANNELS, 5 * CHANNELS):
        filters = signs(ROWS, channels, KERNEL, KERNEL)
        stored, thresholds = xnor_conv2d_pack(sign_pack_images(filters)), torch.arange(ROWS, dtype=torch.int32)
        for height, width, stride in IMAGES:
            x = signs(2, channels, height, width)
            for padding_value in (0, 1, -1):
                how: dict[str, Any] = {"kernel_size": KERNEL, "stride": stride, "padding": 1}
                how.update(in_channels=channels, out_channels=ROWS, padding_value=padding_value)
                reference = conv2d(pad(x, (1, 1, 1, 1), value=padding_value), filters, None, stride)
                compare("xnor_conv2d", xnor_conv2d(x, stored, **how), reference)
                bits = xnor_conv2d(sign_pack_images(x), stored, **how, thresholds=thresholds)
                largest = torch.where(reference >= thresholds.view(-1, 1, 1), 1.0, -1.0)
                compare("xnor_conv2d", sign_unpack(bits, ROWS).permute(0, 3, 1, 2), largest)
                pooled = sign_unpack(sign_max_pool2d(bits, 2, 1, 1), ROWS).permute(0, 3, 1, 2)
                compare("sign_max_pool2d", pooled, max_pool2d(largest, 2, 1, 1))
    return [_result(op, "signs", error, 0.0) for op, error in worst.items()]


def _check_codebook(mode: str, entries: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(entries, (ROWS, COLUMNS), generator=generator).to(torch.uint8)
    table = torch.randn(ROWS, entries, generator=generator)
    packed, bias = codebook_pack(codes, entries=entries), torch.randn(ROWS, generator=generator)
    dense = codebook_dense(packed, table, columns=COLUMNS)
    # Both numbers of a product are rounded, to bfloat16 or to a 254th of the largest.
    bound = (COLUMNS + 2) * EPSILON + {"exact": 0.0, "bfloat16": 3 * BFLOAT16_ROUNDING, "int8": 0.03}[mode]
    worst = 0.0
    for batch in BATCHES:
        x = torch.randn(batch, COLUMNS, generator=generator)
        y = codebook_matmul(x, packed, table, bias, mode=mode)
        reference = x.double() @ dense.double().T + bias.double()
        size = x.double().abs() @ dense.double().abs().T + bias.double().abs()
        worst = max(worst, _largest(y, reference, size))
    return _result("codebook_matmul", f"{mode}, {entries} entries", worst, bound)


def _check_embedding(dtype: torch.dtype, entries: int) -> dict[str, Any]:
    """Rows are the entries themselves, rounded once to bfloat16."""
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(entries, (ROWS, COLUMNS), generator=generator).to(torch.uint8)
    table = torch.randn(ROWS, entries, generator=generator)
    indices = torch.randint(ROWS, (max(BATCHES),), generator=generator)
    rows = codebook_embedding(indices, codebook_pack(codes, entries=entries), table, columns=COLUMNS, dtype=dtype)
    reference = table.double().gather(1, codes.long())[indices]
    bound = 0.0 if dtype == torch.float32 else BFLOAT16_ROUNDING
    case = f"{str(dtype).removeprefix('torch.')}, {entries} entries"
    return _result("codebook_embedding", case, _largest(rows, reference, reference.abs()), bound)


def _check_codebook_conv(mode: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    terms = CHANNELS * KERNEL**2
    codes = torch.randint(ENTRIES, (ROWS, terms), generator=generator).to(torch.uint8)
    table, bias = torch.randn(1, ENTRIES, generator=generator), torch.randn(ROWS, generator=generator)
    packed = codebook_pack(codes, entries=ENTRIES)
    weight = codebook_dense(packed, table, columns=terms).double().view(ROWS, CHANNELS, KERNEL, KERNEL)
    bound = (terms + 2) * EPSILON + {"exact": 0.0, "bfloat16": 3 * BFLOAT16_ROUNDING, "int8": 0.03}[mode]
    worst = 0.0
    for height, width, stride in IMAGES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, CHANNELS, height, width, generator=generator).contiguous(memory_format=memory_format)
            y = codebook_conv2d(x, packed, table, bias, kernel_size=KERNEL, stride=stride, padding=1, mode=mode)
            reference = conv2d(x.double(), weight, bias.double(), stride, 1)
            size = conv2d(x.double().abs(), weight.abs(), bias.double().abs(), stride, 1)
            worst = max(worst, _largest(y, reference, size))
    return _result("codebook_conv2d", f"{mode}, {ENTRIES} entries", worst, bound)


def _check_sign_matmul(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    signs = torch.randint(2, (ROWS, COLUMNS), generator=generator) * 2.0 - 1.0
    packed, (scale, bias) = xnor_pack(sign_pack(signs)), torch.randn(2, ROWS, generator=generator)
    bound = (COLUMNS + 2) * EPSILON + (0.0 if dtype == torch.float32 else BFLOAT16_ROUNDING)
    worst = 0.0
    for batch in BATCHES:
        x = torch.randn(batch, COLUMNS, generator=generator).to(dtype)
        y = sign_matmul(x, packed, out_features=ROWS, scale=scale, bias=bias)
        reference = x.double() @ signs.double().T * scale + bias
        size = x.double().abs().sum(1, keepdim=True) * scale.abs() + bias.abs()
        worst = max(worst, _largest(y, reference, size))
    return _result("sign_matmul", str(dtype).removeprefix("torch."), worst, bound)


def _check_bitplanes() -> list[dict[str, Any]]:
    """Integer sums, exact."""
    generator = torch.Generator().manual_seed(9)
    signs = torch.randint(2, (ROWS, CHANNELS * KERNEL**2), generator=generator) * 2.0 - 1.0
    packed, filters = xnor_pack(sign_pack(signs)), signs.double().view(ROWS, CHANNELS, KERNEL, KERNEL)
    matmul = conv = 0.0
    for batch in BATCHES:
        x = torch.randint(256, (batch, signs.shape[1]), generator=generator).to(torch.uint8)
        y = bitplane_matmul(x, packed, in_features=signs.shape[1], out_features=ROWS, step=2, zero=255)
        matmul = max(matmul, float((y.double() - (2 * x.double() - 255) @ signs.double().T).abs().max()))
    for height, width, stride in IMAGES:
        x = torch.randint(256, (2, CHANNELS, height, width), generator=generator).to(torch.uint8)
        y = bitplane_conv2d(x, packed, out_channels=ROWS, kernel_size=KERNEL, stride=stride, padding=1)
        conv = max(conv, float((y.double() - conv2d(x.double(), filters, None, stride, 1)).abs().max()))
    return [_result("bitplane_matmul", "uint8", matmul, 0.0), _result("bitplane_conv2d", "uint8", conv, 0.0)]


def _blocked(
    x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, codebook: Tensor | None
) -> Tensor:
    """blocked_matmul of a weight in rows."""
    block_offsets, segments, indices, sources = blocked_pack(
        row_offsets, col_indices, columns=COLUMNS, column_block=COLUMN_BLOCK
    )
    return blocked_matmul(
        x,
        block_offsets,
        segments,
        indices,
        values[sources],
        bias,
        codebook,
        out_features=ROWS,
        column_block=COLUMN_BLOCK,
    )


def _bitmap(
    x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, codebook: Tensor | None
) -> Tensor:
    """bitmap_matmul of a weight in rows; its code 0 is the weight 0."""
    bitmap = bitmap_from_rows(row_offsets, col_indices, columns=COLUMNS)
    if codebook is not None:
        values, codebook = values + 1, torch.cat([codebook.new_zeros(1), codebook])
    return bitmap_matmul(x, bitmap, row_offsets, values, bias, codebook)


def _bitmap_columns(
    x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, codebook: Tensor | None
) -> Tensor:
    """bitmap_columns_matmul of a weight in rows; its code 0 is the weight 0."""
    if codebook is not None:
        values, codebook = values + 1, torch.cat([codebook.new_zeros(1), codebook])
    order = col_indices.argsort(stable=True)
    counts = torch.zeros(COLUMNS + 1, dtype=torch.int64).index_add(0, col_indices + 1, torch.ones_like(order))
    column_offsets, rows = counts.cumsum(0).int(), torch.repeat_interleave(row_offsets.diff())[order].int()
    bitmap = bitmap_from_rows(column_offsets, rows, columns=ROWS)
    return bitmap_columns_matmul(x, bitmap, column_offsets, values[order], bias, codebook, out_features=ROWS)


def _bitmap_int8(
    x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor, scales: Tensor
) -> Tensor:
    bitmap = bitmap_from_rows(row_offsets, col_indices, columns=COLUMNS)
    return bitmap_matmul(x, bitmap, row_offsets, values, bias, None, scales, "int8")


def _blocked_int8(
    x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor, scales: Tensor
) -> Tensor:
    block_offsets, segments, indices, words, sums = blocked_int8_pack(
        row_offsets, col_indices, values, columns=COLUMNS, column_block=COLUMN_BLOCK
    )
    return blocked_int8_matmul(
        x,
        block_offsets,
        segments,
        indices,
        words,
        scales,
        sums,
        bias,
        out_features=ROWS,
        column_block=COLUMN_BLOCK,
    )


def _problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dense weight, its positions and its codes; row 5 is empty."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(ROWS, COLUMNS, generator=generator) < 0.3
    kept[5] = False
    dense = torch.where(kept, torch.randn(ROWS, COLUMNS, generator=generator), 0.0).to(dtype)
    kept = dense != 0
    row_offsets = torch.zeros(ROWS + 1, dtype=torch.int32)
    row_offsets[1:] = kept.sum(1).cumsum(0)
    return dense, row_offsets, kept.nonzero()[:, 1].int(), kept


def _check(op: str, product: Callable[..., Tensor], case: str, dtype: torch.dtype, codebook: bool) -> dict[str, Any]:
    dense, row_offsets, col_indices, kept = _problem(dtype)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(ROWS, generator=generator)
    values, table = dense[kept], None
    if codebook:
        table = torch.randn(ENTRIES, generator=generator)
        values = torch.randint(ENTRIES, (int(kept.sum()),), generator=generator).to(torch.uint8)
        dense = torch.zeros_like(dense).masked_scatter(kept, table[values.int()])
    # A float32 sum of n terms, and one rounding of the output.
    bound = (COLUMNS + 2) * EPSILON + (0.0 if dtype == torch.float32 else BFLOAT16_ROUNDING)
    worst = 0.0
    for batch in BATCHES:
        x = torch.randn(batch, COLUMNS, generator=generator).to(dtype)
        y = product(x, row_offsets, col_indices, values, bias, table)
        reference = x.double() @ dense.double().T + bias.double()
        size = x.double().abs() @ dense.double().abs().T + bias.double().abs()
        worst = max(worst, _largest(y, reference, size))
    return _result(op, case, worst, bound)


def _check_conv(case: str, dtype: torch.dtype, codebook: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    terms = CHANNELS * KERNEL**2
    kept = torch.rand(ROWS, terms, generator=generator) < 0.3
    kept[5] = False
    bias, table = torch.randn(ROWS, generator=generator), None
    values = torch.randn(int(kept.sum()), generator=generator).to(dtype)
    stored = values
    if codebook:
        table = torch.randn(ENTRIES, generator=generator)
        values = torch.randint(ENTRIES, values.shape, generator=generator).to(torch.uint8)
        stored = table[values.int()]
    dense = torch.zeros(ROWS, terms, dtype=torch.float64).masked_scatter(kept, stored.double())
    weight = dense.view(ROWS, CHANNELS, KERNEL, KERNEL)
    row_offsets = torch.zeros(ROWS + 1, dtype=torch.int32)
    row_offsets[1:] = kept.sum(1).cumsum(0)
    worst = 0.0
    for height, width, stride in IMAGES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, CHANNELS, height, width, generator=generator).to(dtype)
            x = x.contiguous(memory_format=memory_format)
            positions = (row_offsets, kept.nonzero()[:, 1].int())
            y = sparse_conv2d(x, *positions, values, bias, table, kernel_size=KERNEL, stride=stride, padding=1)
            reference = conv2d(x.double(), weight, bias.double(), stride, 1)
            size = conv2d(x.double().abs(), weight.abs(), bias.double().abs(), stride, 1)
            worst = max(worst, _largest(y, reference, size))
    bound = (terms + 2) * EPSILON + (0.0 if dtype == torch.float32 else BFLOAT16_ROUNDING)
    return _result("sparse_conv2d", case, worst, bound)


def _check_conv_modes() -> list[dict[str, Any]]:
    """The modes of sparse_conv2d against the same rounding of x and the weight."""
    generator = torch.Generator().manual_seed(5)
    terms = CHANNELS * KERNEL**2
    kept = torch.rand(ROWS, terms, generator=generator) < 0.3
    kept[5] = False
    values, bias = torch.randn(int(kept.sum()), generator=generator), torch.randn(ROWS, generator=generator)
    row_offsets = torch.zeros(ROWS + 1, dtype=torch.int32)
    row_offsets[1:] = kept.sum(1).cumsum(0)
    positions = (row_offsets, kept.nonzero()[:, 1].int())
    weight = torch.zeros(ROWS, terms).masked_scatter(kept, values).view(ROWS, CHANNELS, KERNEL, KERNEL)
    worst = {"bfloat16": 0.0, "int8": 0.0}
    for height, width, stride in IMAGES:
        x = torch.randn(2, CHANNELS, height, width, generator=generator)
        for mode in worst:
            y = sparse_conv2d(x, *positions, values, bias, kernel_size=KERNEL, stride=stride, padding=1, mode=mode)
            (w, of_w), (q, of_x) = (_rounded(t, mode) for t in (weight, x))
            scale = of_w.view(1, -1, 1, 1) * of_x
            reference = conv2d(q, w, None, stride, 1) * scale + bias.double().view(-1, 1, 1)
            size = conv2d(q.abs(), w.abs(), None, stride, 1) * scale + bias.double().abs().view(-1, 1, 1)
            worst[mode] = max(worst[mode], _largest(y, reference, size))
    # bfloat16 instructions may round a sum twice; integer sums are exact.
    bounds = {"bfloat16": 2 * (terms + 2) * EPSILON, "int8": 4 * EPSILON}
    return [_result("sparse_conv2d", mode, worst[mode], bounds[mode]) for mode in worst]


def _rounded(tensor: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """What a mode of sparse_conv2d takes tensor for, and the scale of each of its first dimension, in float64."""
    largest = tensor.abs().amax((1, 2, 3), keepdim=True)
    if mode == "bfloat16":
        return tensor.bfloat16().double(), torch.ones_like(largest).double()
    inverse = torch.where(largest > 0, torch.full_like(largest, 127).div(largest), 0.0)
    return (tensor * inverse).round().double(), largest.div(127).double()


def _check_int8(op: str, product: Callable[..., Tensor]) -> dict[str, Any]:
    """A product in mode int8 against the same rounding of x, where only the last steps round."""
    _, row_offsets, col_indices, kept = _problem(torch.float32)
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-127, 128, (int(kept.sum()),), generator=generator)
    scales, bias = torch.rand(ROWS, generator=generator), torch.randn(ROWS, generator=generator)
    dense = torch.zeros(ROWS, COLUMNS, dtype=torch.float64).masked_scatter(kept, whole.double())
    worst = 0.0
    for batch in BATCHES:
        x = torch.randn(batch, COLUMNS, generator=generator)
        y = product(x, row_offsets, col_indices, whole.to(torch.int8), bias, scales)
        largest = x.abs().amax(1, keepdim=True)
        q, factor = (x * (127 / largest)).round().double(), largest.double() / 127 * scales.double()
        worst = max(worst, _largest(y, (q @ dense.T) * factor + bias, (q @ dense.T).abs() * factor + bias.abs()))
    return _result(op, "int8", worst, 4 * EPSILON)


def _check_bfloat16_mode() -> dict[str, Any]:
    """blocked_bfloat16_matmul against the product of rounded numbers."""
    dense, row_offsets, col_indices, kept = _problem(torch.bfloat16)
    block_offsets, segments, indices, words = blocked_bfloat16_pack(
        row_offsets, col_indices, dense[kept], columns=COLUMNS, column_block=COLUMN_BLOCK
    )
    generator = torch.Generator().manual_seed(5)
    bias, worst = torch.randn(ROWS, generator=generator), 0.0
    for batch in BATCHES:
        x = torch.randn(batch, COLUMNS, generator=generator)
        y = blocked_bfloat16_matmul(
            x, block_offsets, segments, indices, words, bias, out_features=ROWS, column_block=COLUMN_BLOCK
        )
        rounded, w = x.bfloat16().double(), dense.double()
        size = rounded.abs() @ w.abs().T + bias.double().abs()
        worst = max(worst, _largest(y, rounded @ w.T + bias.double(), size))
    # bfloat16 instructions may round a sum twice.
    return _result("blocked_bfloat16_matmul", "bfloat16", worst, 2 * (COLUMNS + 2) * EPSILON)


def _check_product() -> list[dict[str, Any]]:
    """product_matmul with 4-bit and 8-bit codes; in mode int8 the bound is that of the rounded tables."""
    results = []
    for entries, width in ((16, 2), (200, 5)):
        generator = torch.Generator().manual_seed(6)
        segments = -(-COLUMNS // width)
        codes = torch.randint(entries, (ROWS, 2 * segments), generator=generator).to(torch.uint8)
        codebooks = torch.randn(2, segments, width, entries, generator=generator)
        packed, bias = product_pack(codes, entries), torch.randn(ROWS, generator=generator)
        dense = product_decode(packed, codebooks, out_features=ROWS, in_features=COLUMNS).double()
        # Of the products that a row adds up; sums of two entries hide how large they are.
        sizes = product_decode(packed, codebooks.abs(), out_features=ROWS, in_features=COLUMNS).double()
        worst, worst_int8 = 0.0, 0.0
        for batch in BATCHES:
            x = torch.randn(batch, COLUMNS, generator=generator)
            reference, size = x.double() @ dense.T + bias.double(), x.double().abs() @ sizes.T + bias.double().abs()
            y = product_matmul(x, packed, codebooks, bias, out_features=ROWS)
            worst = max(worst, _largest(y, reference, size))
            y = product_matmul(x, packed, codebooks, bias, out_features=ROWS, mode="int8")
            parts = pad(x.double(), (0, segments * width - COLUMNS)).view(batch, 1, segments, width, 1)
            tables = (parts * codebooks.double()).sum(3).flatten(1, 2)
            step = (tables.amax(-1) - tables.amin(-1)).amax(-1, keepdim=True) / 255
            worst_int8 = max(worst_int8, _largest(y, reference, (tables.shape[1] * step).expand_as(reference)))
        results.append(_result("product_matmul", f"{entries} entries", worst, (COLUMNS + 2) * 2 * EPSILON))
        results.append(_result("product_matmul", f"{entries} entries, int8", worst_int8, 0.501))
    return results


def _check_product_conv() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    terms, entries, width = CHANNELS * KERNEL**2, 40, 4
    segments = -(-terms // width)
    codes = torch.randint(entries, (ROWS, segments), generator=generator).to(torch.uint8)
    codebooks = torch.randn(1, segments, width, entries, generator=generator)
    packed, bias = product_pack(codes, entries), torch.randn(ROWS, generator=generator)
    named = codebooks[0].gather(2, codes.T.long()[:, None].expand(-1, width, -1))  # [segments, width, rows]
    weight = named.flatten(0, 1)[:terms].T.double().reshape(ROWS, CHANNELS, KERNEL, KERNEL)
    worst = 0.0
    for height, columns, stride in IMAGES:
        x = torch.randn(2, CHANNELS, height, columns, generator=generator)
        y = product_conv2d(x, packed, codebooks, bias, out_channels=ROWS, kernel_size=KERNEL, stride=stride, padding=1)
        reference = conv2d(x.double(), weight, bias.double(), stride, 1)
        size = conv2d(x.double().abs(), weight.abs(), bias.double().abs(), stride, 1)
        worst = max(worst, _largest(y, reference, size))
    return _result("product_conv2d", f"{entries} entries", worst, (terms + 2) * EPSILON)


def _check_flat_conv(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    lateral, vertical, horizontal = (torch.randn(ROWS, n, generator=generator) for n in (CHANNELS, KERNEL, KERNEL))
    bias, worst = torch.randn(ROWS, generator=generator), 0.0
    weight = torch.einsum("fc,fi,fj->fcij", *(f.double() for f in (lateral, vertical, horizontal)))
    for height, width, stride in IMAGES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, CHANNELS, height, width, generator=generator).to(dtype)
            x = x.contiguous(memory_format=memory_format)
            y = flat_conv2d(x, lateral, vertical, horizontal, bias=bias, stride=stride, padding=1)
            reference = conv2d(x.double(), weight, bias.double(), stride, 1)
            size = conv2d(x.double().abs(), weight.abs(), bias.double().abs(), stride, 1)
            worst = max(worst, _largest(y, reference, size))
    bound = (CHANNELS + 2 * KERNEL + 3) * EPSILON + (0.0 if dtype == torch.float32 else BFLOAT16_ROUNDING)
    return _result("flat_conv2d", str(dtype).removeprefix("torch."), worst, bound)


def _check_gradients() -> list[dict[str, Any]]:
    dense, row_offsets, col_indices, kept = _problem(torch.float32)
    generator = torch.Generator().manual_seed(2)
    worst = {"x": 0.0, "values": 0.0}
    for batch in BATCHES:
        x = torch.randn(batch, COLUMNS, generator=generator, requires_grad=True)
        upstream = torch.randn(batch, ROWS, generator=generator)
        values = dense[kept].requires_grad_()
        grad_x, grad_values = torch.autograd.grad(
            csr_matmul(x, row_offsets, col_indices, values), (x, values), grad_outputs=upstream
        )
        x, up, w = x.detach().double(), upstream.double(), dense.double()
        worst["x"] = max(worst["x"], _largest(grad_x, up @ w, up.abs() @ w.abs()))
        products, sizes = (up.T @ x)[kept], (up.abs().T @ x.abs())[kept]
        worst["values"] = max(worst["values"], _largest(grad_values, products, sizes))
    terms = {"x": ROWS, "values": max(BATCHES)}
    return [_result("csr_matmul", f"gradient of {n}", worst[n], (terms[n] + 2) * EPSILON) for n in worst]


def _largest(got: Tensor, reference: Tensor, size: Tensor) -> float:
    error = (got.double() - reference).abs()
    # An empty row has size 0 without a bias and must be exact.
    relative = torch.where(size > 0, error / size.clamp_min(torch.finfo(torch.float64).tiny), error)
    return float(relative.nan_to_num(nan=torch.inf).max())


def _result(op: str, case: str, max_error: float, bound: float) -> dict[str, Any]:
    return {"op": op, "case": case, "max_error": max_error, "bound": bound, "ok": max_error <= bound}
