import pytest
import torch
from torch.nn.functional import conv2d

from tersetorch import _native
from tersetorch.ops import (
    csr_pack,
    sparse_conv2d,
    sparse_conv2d_channel_block,
    sparse_conv2d_inference,
    sparse_conv2d_pack,
    sparse_conv2d_pack_words,
    sparse_conv2d_packed,
)

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32
LAST = torch.channels_last


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(out, channels, kernel, density=0.4, seed=0):
    """A random weight, dense, with some empty filters and a full one."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(out, channels, *kernel, generator=generator) < density
    kept[3::5] = False
    kept[2:3] = density > 0
    return torch.where(kept, torch.randn(out, channels, *kernel, generator=generator), 0.0)


def rows_of_weight(dense):
    """row_offsets, col_indices and values of a dense weight."""
    flat = dense.flatten(1)
    kept = flat != 0
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    return row_offsets, kept.nonzero()[:, 1].int(), flat[kept]


def pair(n):
    return [n, n] if isinstance(n, int) else list(n)


def packed(x, dense, bias=None, codebook=None, values=None, **sizes):
    """The same through the packed weight."""
    row_offsets, col_indices, own = rows_of_weight(dense)
    kernel, stride, padding, dilation = (
        pair(n) for n in (dense.shape[2:], sizes.get("stride", 1), sizes.get("padding", 0), sizes.get("dilation", 1))
    )
    groups = sizes.get("groups", 1)
    block = sparse_conv2d_channel_block(x.shape[1], kernel, stride, dilation)
    *layout, sources = sparse_conv2d_pack(row_offsets, col_indices, x.shape[1], block, kernel, stride, dilation, groups)
    values = (own if values is None else values)[sources.long()]
    rest = (kernel, stride, padding, dilation, groups)
    relu = sizes.get("relu", False)
    return sparse_conv2d_packed(x, *layout, values, bias, codebook, dense.shape[0], block, *rest, relu=relu)


def assert_close_conv(got, x, dense, bias=None, relu=False, **sizes):
    """got must be the convolution but for what float32 sums may lose: (terms + 1) * 2^-24 * sum |terms|."""
    x, dense = x.double(), dense.double()
    bias = torch.zeros(dense.shape[0]).double() if bias is None else bias.double()
    want, size = conv2d(x, dense, bias, **sizes), conv2d(x.abs(), dense.abs(), bias.abs(), **sizes)
    if relu:
        want = want.relu()
    allowed = (dense[0].numel() + 3) * EPSILON * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


# Images, filters, kernel and the rest: around the 8 and 16 lanes of a vector, its halves and quarters, the 8 rows of a
# tile, the channels and filters of a block.
CASES = [
    ((1, 1, 1, 1), 1, (1, 1), {}),
    ((2, 3, 7, 7), 5, (3, 3), {"padding": 1}),
    ((1, 4, 8, 16), 6, (3, 3), {"padding": 1}),
    ((2, 19, 9, 17), 33, (3, 3), {"padding": 1}),
    ((1, 40, 14, 14), 70, (3, 3), {"padding": 1}),
    ((1, 5, 13, 28), 4, (5, 5), {"padding": 2}),
    ((1, 5, 31, 56), 4, (3, 3), {}),
    ((3, 6, 5, 4), 7, (2, 4), {"padding": (0, 3)}),
    ((2, 7, 12, 15), 9, (3, 3), {"stride": 2, "padding": 1}),
    ((1, 3, 33, 35), 6, (11, 11), {"stride": 4, "padding": 2}),
    ((1, 3, 20, 70), 6, (3, 5), {"stride": (1, 2), "padding": (1, 2)}),
    ((1, 3, 25, 17), 6, (3, 3), {"stride": (3, 5)}),
    ((1, 4, 19, 19), 6, (3, 3), {"dilation": 2, "padding": 2}),
    ((1, 2, 40, 40), 3, (3, 3), {"dilation": (10, 9), "padding": 4}),
    ((1, 2, 30, 30), 3, (4, 4), {"dilation": (3, 2), "stride": (2, 3), "padding": (5, 1)}),
    ((2, 12, 9, 9), 8, (3, 3), {"groups": 4, "padding": 1}),
    ((2, 20, 9, 9), 40, (3, 3), {"groups": 20, "padding": 1}),
    ((2, 33, 10, 13), 34, (1, 1), {}),
    ((2, 8, 10, 13), 9, (1, 1), {"stride": 2}),
    ((2, 8, 10, 13), 9, (1, 1), {"padding": 2}),
    ((2, 6, 1, 300), 5, (1, 7), {"padding": (0, 3)}),
    ((2, 6, 1, 77), 5, (1, 3), {"stride": 2}),
    ((2, 6, 1, 77), 5, (1, 3), {"dilation": (1, 4)}),
    ((2, 6, 60, 1), 5, (3, 1), {"padding": (1, 0)}),
    ((1, 2, 3, 3), 3, (3, 3), {"padding": 20}),
    ((0, 3, 7, 7), 5, (3, 3), {}),
    ((1, 1, 1, 700), 2, (1, 600), {}),
]


@pytest.mark.parametrize("shape,out,kernel,sizes", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_equals_the_dense_convolution(shape, out, kernel, sizes, dtype, memory_format):
    dense = random_weight(out, shape[1] // sizes.get("groups", 1), kernel).to(dtype)
    x, bias = random(*shape, dtype=dtype).contiguous(memory_format=memory_format), random(out, seed=2)
    y = sparse_conv2d(x, *rows_of_weight(dense), bias, kernel_size=kernel, **sizes)
    # Where both descriptions fit x, y is contiguous.
    last = memory_format == LAST and not x.is_contiguous()
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    assert_close_conv(y, x, dense, bias, **sizes)
    assert torch.equal(packed(x, dense, bias, **sizes), y)
    rest = [pair(sizes.get(name, n)) for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))]
    y_inference = sparse_conv2d_inference(
        x, *rows_of_weight(dense), bias, None, list(kernel), *rest, sizes.get("groups", 1)
    )
    assert torch.equal(y_inference, y)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_relu_is_fused_and_keeps_nan(memory_format):
    dense, x, bias = random_weight(9, 6, (3, 3)), random(2, 6, 9, 20), random(9, seed=2)
    x = x.contiguous(memory_format=memory_format)
    sizes = {"kernel_size": 3, "padding": 1}
    y = sparse_conv2d(x, *rows_of_weight(dense), bias, **sizes, relu=True)
    assert torch.equal(y, sparse_conv2d(x, *rows_of_weight(dense), bias, **sizes).relu())
    assert torch.equal(packed(x, dense, bias, padding=1, relu=True), y)
    bias[4] = float("nan")
    assert sparse_conv2d(x, *rows_of_weight(dense), bias, **sizes, relu=True)[:, 4].isnan().all()


def test_codes_stand_for_entries_of_the_codebook():
    dense, x, bias = random_weight(20, 7, (3, 3)), random(2, 7, 9, 9), random(20, seed=2)
    row_offsets, col_indices, values = rows_of_weight(dense)
    for entries in (1, 2, 255, 256):
        codebook = random(entries, seed=3)
        codes = torch.arange(values.numel()).remainder(entries).to(torch.uint8)
        y = sparse_conv2d(x, row_offsets, col_indices, codes, bias, codebook, kernel_size=3)
        gathered = codebook[codes.int()]
        assert torch.equal(y, sparse_conv2d(x, row_offsets, col_indices, gathered, bias, kernel_size=3))
        assert torch.equal(packed(x, dense, bias, codebook, codes), y)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(
    "height,kernel,sizes",
    [
        (1, (1, 3), {"stride": (3, 1), "padding": (1, 1)}),
        (1, 1, {"stride": 3, "padding": 1}),
        (2, (1, 3), {"stride": (9, 1), "padding": (2, 0)}),
        (1, (3, 3), {"padding": (1, 1)}),
    ],
)
def test_one_row_of_output_may_lie_in_the_padding(height, kernel, sizes, memory_format):
    dense = torch.nn.Conv2d(2, 4, kernel, **sizes)
    x = torch.randn(3, 2, height, 20, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format)
    weight = csr_pack(dense.weight.detach().flatten(1))
    y = sparse_conv2d(x, *weight, dense.bias, kernel_size=dense.kernel_size, **sizes)
    torch.testing.assert_close(y, dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density):
    dense, x = random_weight(33, 18, (3, 3), density), random(2, 18, 10, 10)
    if density == 1:
        dense = random(33, 18, 3, 3)
    assert_close_conv(sparse_conv2d(x, *rows_of_weight(dense), kernel_size=3), x, dense)


def test_no_filters():
    y = sparse_conv2d(random(2, 3, 7, 7), *rows_of_weight(torch.zeros(0, 3, 3, 3)), kernel_size=3)
    assert y.shape == (2, 0, 5, 5)


def test_one_image_without_a_batch():
    dense, x = random_weight(9, 6, (3, 3)), random(6, 9, 20)
    y = sparse_conv2d(x, *rows_of_weight(dense), kernel_size=3)
    assert torch.equal(y, sparse_conv2d(x[None], *rows_of_weight(dense), kernel_size=3)[0])


def test_accepts_strides():
    dense, x = random_weight(9, 6, (3, 3)), random(4, 12, 20, 22)
    for view in (x[:, ::2], x[:, :6, :, ::2], x[::2, 6:].transpose(2, 3), x[:1, 0:6].expand(3, 6, 20, 22)):
        y = sparse_conv2d(view, *rows_of_weight(dense), kernel_size=3)
        assert torch.equal(y, sparse_conv2d(view.contiguous(), *rows_of_weight(dense), kernel_size=3))


def unaligned(tensor):
    """The same numbers one byte after an aligned address."""
    moved = torch.frombuffer(bytearray(b"?" + tensor.numpy().tobytes()), dtype=tensor.dtype, offset=1).view_as(tensor)
    assert moved.data_ptr() % 4 == 1
    return moved


def test_accepts_unaligned_memory():
    dense, x, bias = random_weight(9, 6, (3, 3)), random(2, 6, 9, 20), random(9, seed=2)
    row_offsets, col_indices, values = rows_of_weight(dense)
    y = sparse_conv2d(x, row_offsets, col_indices, values, bias, kernel_size=3)
    moved = [unaligned(t) for t in (x, row_offsets, col_indices, values, bias)]
    assert torch.equal(sparse_conv2d(*moved, kernel_size=3), y)


def test_non_finite_numbers_reach_exactly_where_a_weight_meets_them():
    dense = torch.zeros(3, 2, 3, 3)
    dense[0, 0, 1, 1], dense[1, 1, 0, 0] = 2, 1  # filter 2 is empty
    x = torch.ones(1, 2, 6, 6)
    x[0, 0, 2, 3], x[0, 1, 4, 4] = float("nan"), float("inf")
    y = sparse_conv2d(x, *rows_of_weight(dense), kernel_size=3, padding=1)[0]
    assert y[0].isnan().nonzero().tolist() == [[2, 3]] and y[1].isinf().nonzero().tolist() == [[5, 5]]
    assert not y[1].isnan().any() and torch.equal(y[2], torch.zeros(6, 6))
    dense[2, 0, 0, 0] = float("inf")
    y = sparse_conv2d(x, *rows_of_weight(dense), kernel_size=3)[0, 2]
    assert y[2, 3].isnan() and y[0, 0] == float("inf")


def test_int64_indices_are_converted():
    dense, x = random_weight(9, 6, (3, 3)), random(2, 6, 9, 20)
    row_offsets, col_indices, values = rows_of_weight(dense)
    wide = sparse_conv2d(x, row_offsets.long(), col_indices.long(), values, kernel_size=3)
    assert torch.equal(wide, sparse_conv2d(x, row_offsets, col_indices, values, kernel_size=3))
    far = col_indices.long()
    far[-1] += 2**32
    with pytest.raises(RuntimeError, match=r"col_indices must lie in \[0, 54\)"):
        sparse_conv2d(x, row_offsets, far, values, kernel_size=3)


LEVELS = """
import torch
from torch.nn.functional import conv2d
from tersetorch.ops import sparse_conv2d
torch.manual_seed(0)
dense = torch.where(torch.rand(40, 19, 3, 3) < 0.3, torch.randn(40, 19, 3, 3), 0.0)
kept = dense.flatten(1) != 0
weight = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int(), kept.nonzero()[:, 1].int(), dense.flatten(1)[kept]
for dtype in (torch.float32, torch.bfloat16):
    for size in ((7, 7), (14, 29), (56, 56)):
        for stride in (1, 2, 3):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(2, 19, *size).to(dtype).contiguous(memory_format=memory_format)
                y = sparse_conv2d(x, *weight, kernel_size=3, stride=stride, padding=1)
                tolerance = dict(rtol=1e-5, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
                torch.testing.assert_close(y, conv2d(x.float(), dense, None, stride, 1).to(dtype), **tolerance)
print(torch.ops.tersetorch.cpu_isa())
"""


@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_level_can_be_forced(run_python, level):
    done = run_python(LEVELS, TERSETORCH_CPU_ISA=level)
    assert done.stdout.split() == [level], done.stderr


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape", [(1, 70, 13, 13), (3, 70, 13, 13), (1, 70, 4, 4), (5, 70, 30, 30)])
def test_threads_do_not_change_a_bit(shape, memory_format):
    dense = random_weight(300, 70, (3, 3))
    x, bias = random(*shape).contiguous(memory_format=memory_format), random(300, seed=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = packed(x, dense, bias, padding=1)
        for several in (2, 3, 7):
            torch.set_num_threads(several)
            assert torch.equal(packed(x, dense, bias, padding=1), alone)
    finally:
        torch.set_num_threads(threads)


# ---- modes


def rounded(x, dense, mode, **sizes):
    """What the mode computes, without the bias, in float64: the formulas of sparse_conv2d."""
    if mode == "bfloat16":
        return conv2d(x.bfloat16().double(), dense.bfloat16().double(), **sizes)
    x, largest, of_rows = x.float(), x.float().abs().amax((1, 2, 3)), dense.float().flatten(1).abs().amax(1)
    # 127 / tensor would round twice.
    inverses = [torch.where(m > 0, torch.full_like(m, 127).div(m), 0.0).view(-1, 1, 1, 1) for m in (largest, of_rows)]
    q, v = inverses[0].mul(x).round(), inverses[1].mul(dense.float()).round()
    scale = (of_rows / 127).double().view(1, -1, 1, 1) * (largest / 127).double().view(-1, 1, 1, 1)
    return conv2d(q.double(), v.double(), **sizes) * scale


def packed_words(x, dense, bias, mode, relu=False, **sizes):
    """The mode through the packed weight."""
    kernel, stride, padding, dilation = (
        pair(n) for n in (dense.shape[2:], sizes.get("stride", 1), sizes.get("padding", 0), sizes.get("dilation", 1))
    )
    groups, channels = sizes.get("groups", 1), x.shape[1]
    block = sparse_conv2d_channel_block(channels, kernel, stride, dilation, groups, mode)
    *layout, row_scales, row_sums = sparse_conv2d_pack_words(
        *rows_of_weight(dense), channels, block, kernel, stride, dilation, groups, mode
    )
    sizes = (kernel, stride, padding, dilation, groups, relu, row_scales, row_sums)
    return sparse_conv2d_packed(x, *layout, bias, None, dense.shape[0], block, *sizes)


@pytest.mark.parametrize("shape,out,kernel,sizes", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
def test_modes_compute_their_formula_within_the_stated_error(shape, out, kernel, sizes, dtype, memory_format, mode):
    dense = random_weight(out, shape[1] // sizes.get("groups", 1), kernel).to(dtype)
    x, bias = random(*shape, dtype=dtype).contiguous(memory_format=memory_format), random(out, seed=2)
    relu = shape[0] == 2
    y = sparse_conv2d(x, *rows_of_weight(dense), bias, kernel_size=kernel, relu=relu, mode=mode, **sizes)
    last = memory_format == LAST and not x.is_contiguous()
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    assert torch.equal(packed_words(x, dense, bias, mode, relu, **sizes), y)

    offset = bias.double().view(1, -1, 1, 1)
    want, size = rounded(x, dense, mode, **sizes), conv2d(x.double().abs(), dense.double().abs(), **sizes)
    want, exact = want + offset, conv2d(x.double(), dense.double(), **sizes) + offset
    if relu:
        want, exact = want.relu(), exact.relu()
    steps = 4 if mode == "int8" else 4 * (dense[0].numel() + 3)
    rounding = steps * EPSILON * (size + offset.abs()) + (2.0**-8 * want.abs() if dtype == torch.bfloat16 else 0)
    assert ((y.double() - want).abs() <= rounding).all()

    if mode == "int8":
        s = x.double().abs().amax((1, 2, 3)).view(-1, 1, 1, 1) / 127
        r = dense.double().flatten(1).abs().amax(1).view(1, -1, 1, 1) / 127
        kept = (dense != 0).double()
        counted = conv2d(torch.ones_like(x).double(), kept, **sizes)
        stated = (conv2d(torch.ones_like(x).double(), dense.double().abs(), **sizes) * s + counted * s * r / 2) / 2
        stated = stated + conv2d(x.double().abs(), kept, **sizes) * r / 2
    else:
        stated = size * 2.0**-7
    assert ((y.double() - exact).abs() <= 1.0001 * stated + rounding).all()


def test_modes_read_codes_through_the_codebook():
    dense, x = random_weight(20, 7, (3, 3)), random(2, 7, 9, 9)
    row_offsets, col_indices, values = rows_of_weight(dense)
    codebook, codes = random(6, seed=3), torch.arange(values.numel()).remainder(6).to(torch.uint8)
    for mode in ("int8", "bfloat16"):
        y = sparse_conv2d(x, row_offsets, col_indices, codes, None, codebook, kernel_size=3, mode=mode)
        gathered = codebook[codes.int()]
        assert torch.equal(y, sparse_conv2d(x, row_offsets, col_indices, gathered, kernel_size=3, mode=mode))
        codes[5] = 6
        with pytest.raises(RuntimeError, match=r"sparse_conv2d: codes must lie in \[0, 6\)"):
            sparse_conv2d(x, row_offsets, col_indices, codes, None, codebook, kernel_size=3, mode=mode)
        codes[5] = 0


def test_int8_gives_an_image_that_is_not_finite_nan_and_leaves_the_others():
    dense, x, bias = random_weight(9, 6, (3, 3)), random(4, 6, 9, 9), random(9, seed=2)
    weight, plain = rows_of_weight(dense), {"kernel_size": 3, "padding": 1, "mode": "int8"}
    want = sparse_conv2d(x, *weight, bias, **plain)
    x[1, 3, 4, 4], x[2, 0, 0, 0] = float("nan"), float("-inf")
    x[3] *= 2.0**-110
    y = sparse_conv2d(x, *weight, bias, **plain)
    assert torch.equal(y[0], want[0]) and y[1:3].isnan().all()
    assert torch.equal(y[3], bias.view(-1, 1, 1).expand(9, 9, 9))
    values = weight[2].clone()
    values[4] = float("inf")
    with pytest.raises(RuntimeError, match='sparse_conv2d: values must be finite in mode "int8"'):
        sparse_conv2d(x, *weight[:2], values, **plain)


MODES = """
import torch
from tersetorch.ops import sparse_conv2d
torch.manual_seed(0)
dense = torch.where(torch.rand(70, 19, 3, 3) < 0.3, torch.randn(70, 19, 3, 3), 0.0)
kept = dense.flatten(1) != 0
weight = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int(), kept.nonzero()[:, 1].int(), dense.flatten(1)[kept]
for size in ((7, 7), (14, 29), (1, 90)):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for stride in (1, 2, 3):
            x = torch.randn(2, 19, *size).contiguous(memory_format=memory_format)
            y = sparse_conv2d(x, *weight, torch.randn(70), kernel_size=3, stride=stride, padding=1, mode="int8")
            print(y.contiguous().view(torch.int32).long().sum().item(), y.double().sum().item())
"""


def test_int8_has_the_same_bits_at_every_level(run_python):
    printed = {run_python(MODES, TERSETORCH_CPU_ISA=level).stdout for level in _native.cpu_levels()}
    assert len(printed) == 1 and printed.pop().count("\n") == 18


@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
def test_threads_do_not_change_a_bit_of_a_mode(mode):
    dense, x, bias = random_weight(300, 70, (3, 3)), random(3, 70, 13, 13), random(300, seed=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = packed_words(x, dense, bias, mode, padding=1)
        for several in (2, 3, 7):
            torch.set_num_threads(several)
            assert torch.equal(packed_words(x, dense, bias, mode, padding=1), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
def test_modes_refuse_gradients(mode):
    x = random(2, 6, 9, 9).requires_grad_()
    y = sparse_conv2d(x, *rows_of_weight(random_weight(8, 6, (3, 3))), kernel_size=3, mode=mode)
    with pytest.raises(RuntimeError, match="sparse_conv2d: mode must be 'exact' to compute gradients"):
        y.sum().backward()


@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_registration_of_modes_is_sound(mode, memory_format):
    weight, sizes = rows_of_weight(random_weight(8, 6, (3, 3))), ([3, 3], [1, 2], [1, 1], [1, 1], 1)
    x, bias = random(2, 6, 7, 9).contiguous(memory_format=memory_format), random(8, seed=2)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op in (OPS.sparse_conv2d, OPS.sparse_conv2d_inference):
        torch.library.opcheck(op.default, (x, *weight, bias, None, *sizes, True, mode), test_utils=utilities)
    block = sparse_conv2d_channel_block(6, *sizes[:2], sizes[3], 1, mode)
    *layout, row_scales, row_sums = sparse_conv2d_pack_words(*weight, 6, block, *sizes[:2], sizes[3], 1, mode)
    torch.library.opcheck(
        OPS.sparse_conv2d_packed.default, (x, *layout, bias, None, 8, block, *sizes, True, row_scales, row_sums)
    )


@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
def test_modes_compile_export_and_follow_autocast(mode):
    class Run(torch.nn.Module):
        def forward(self, x):
            return sparse_conv2d(x, *weight, kernel_size=3, padding=1, mode=mode).relu()

    weight, run, x = rows_of_weight(random_weight(8, 6, (3, 3))), Run(), random(2, 6, 9, 10)
    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, dynamic=True)(x), run(x))
        exported = torch.export.export(run, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
        assert torch.equal(exported.module()(random(3, 6, 9, 10)), run(random(3, 6, 9, 10)))
        with torch.autocast("cpu"):
            y = run(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, run(x).bfloat16())


def test_bad_modes_and_words_are_refused():
    dense, x = random_weight(8, 6, (3, 3)), random(2, 6, 9, 9)
    weight, sizes = rows_of_weight(dense), ([3, 3], [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match=r"sparse_conv2d: mode must be one of .* got 'int4'"):
        sparse_conv2d(x, *weight, kernel_size=3, mode="int4")
    with pytest.raises(RuntimeError, match='sparse_conv2d: mode must be "exact", "bfloat16" or "int8", got "int4"'):
        sparse_conv2d_inference(x, *weight, None, None, [3, 3], [1, 1], [0, 0], [1, 1], 1, False, "int4")
    with pytest.raises(ValueError, match="sparse_conv2d_pack_words: mode must be one of"):
        sparse_conv2d_pack_words(*weight, 6, 1, *sizes, "exact")
    with pytest.raises(ValueError, match="sparse_conv2d_pack_words: values must be finite in mode 'int8'"):
        sparse_conv2d_pack_words(*weight[:2], weight[2] / 0, 6, 1, *sizes, "int8")
    many = rows_of_weight(torch.ones(1, 15000, 3, 3))
    with pytest.raises(ValueError, match="a filter must have at most 131072 weights in mode 'int8', got 135000"):
        sparse_conv2d(torch.ones(1, 15000, 3, 3), *many, kernel_size=3, mode="int8")
    with pytest.raises(ValueError, match="a filter must have at most 131072 weights"):
        sparse_conv2d_pack_words(*many, 15000, 1, *sizes, "int8")

    blocks, segments, indices, words, row_scales, row_sums = sparse_conv2d_pack_words(*weight, 6, 2, *sizes, "int8")
    rest = ([3, 3], [1, 1], [0, 0], [1, 1], 1, False)

    def run(words=words, codebook=None, row_scales=row_scales, row_sums=row_sums, indices=indices):
        scales = (row_scales, row_sums)
        return sparse_conv2d_packed(x, blocks, segments, indices, words, None, codebook, 8, 2, *rest, *scales)

    assert torch.equal(run(), sparse_conv2d(x, *weight, kernel_size=3, mode="int8"))
    for match, arguments in (
        ("row_scales and row_sums must come with int8 words", {"row_scales": None}),
        ("row_scales and row_sums must come with int8 words", {"row_sums": None}),
        ("row_scales and row_sums must come with int8 words", {"words": words.bfloat16()}),
        (r"words must be bfloat16 \[n, 2\] or int8 \[n, 4\]", {"words": words.float()}),
        ("words must come without a codebook", {"codebook": torch.ones(2)}),
        (r"values must be \[\d+, 4\]", {"words": words[:, :2]}),
        (r"row_scales and row_sums must be \[8\]", {"row_scales": row_scales[:7]}),
        ("row_sums must be Int", {"row_sums": row_sums.float()}),
        ("indices must lie inside their block", {"indices": torch.full_like(indices, -1)}),
    ):
        with pytest.raises(RuntimeError, match=match):
            run(**arguments)


@pytest.mark.parametrize(
    "sizes,match",
    [
        ({"padding": 2**31 - 1}, "an image of y must have at most 2147483647 pixels, got 4294967301 x 4294967301"),
        ({"padding": (0, 2**30), "stride": (1, 2**29)}, "stride and dilation must be smaller for several columns"),
        ({"padding": (0, 2**30), "dilation": (1, 2**29), "stride": (1, 2**28)}, "stride and dilation must be smaller"),
    ],
)
def test_sizes_whose_scratch_would_not_fit_are_refused(sizes, match):
    weight, x = rows_of_weight(random_weight(8, 6, (3, 3))), random(2, 6, 9, 9)
    with pytest.raises(RuntimeError, match=f"sparse_conv2d: {match}"):
        sparse_conv2d(x, *weight, kernel_size=3, **sizes)


@pytest.mark.parametrize("stride", [100, 2**20, 2**31 - 1, (1, 2**31 - 1), (2**31 - 1, 1)])
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_any_stride_may_leave_one_output(stride, mode):
    dense, x = random_weight(8, 6, (3, 3)), random(2, 6, 19, 21)
    y = sparse_conv2d(x, *rows_of_weight(dense), kernel_size=3, stride=stride, padding=1, mode=mode)
    every = sparse_conv2d(x, *rows_of_weight(dense), kernel_size=3, padding=1, mode=mode)
    rows, columns = pair(stride)
    torch.testing.assert_close(y, every[:, :, ::rows, ::columns], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "kernel_size"])
@pytest.mark.parametrize("size", [2**31, 2**40, 2**63 - 1])
def test_sizes_whose_products_would_not_fit_are_refused(name, size):
    weight, x = rows_of_weight(random_weight(8, 6, (3, 3))), random(2, 6, 9, 9)
    with pytest.raises(ValueError, match=f"sparse_conv2d: {name} must be at most 2147483647"):
        sparse_conv2d(x, *weight, **{"kernel_size": 3, name: size})
    sizes = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]} | {name: [1, size]}
    with pytest.raises(RuntimeError, match=f"sparse_conv2d: {name} must be"):
        sparse_conv2d_inference(x, *weight, None, None, *sizes.values(), 1)


# ---- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"padding": (1, 2), "stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2, "padding": 1}]
)
def test_gradients_are_those_of_the_dense_convolution(dtype, relu, sizes):
    dense = random_weight(8, 6 // sizes.get("groups", 1), (3, 3)).to(dtype)
    row_offsets, col_indices, values = rows_of_weight(dense)
    x, bias = random(2, 6, 9, 11, dtype=dtype), random(8, seed=2, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    y = sparse_conv2d(x, row_offsets, col_indices, values, bias, kernel_size=3, relu=relu, **sizes)
    grad_y = random(*y.shape, seed=4, dtype=dtype)
    grads = torch.autograd.grad(y, leaves, grad_y)
    assert [g.dtype for g in grads] == [dtype] * 3
    weight = dense.float().requires_grad_()
    dense_leaves = [x.detach().float().requires_grad_(), weight, bias.detach().float().requires_grad_()]
    want_y = conv2d(*dense_leaves, **sizes)
    upstream = torch.where(y > 0, grad_y, 0).float() if relu else grad_y.float()
    want = list(torch.autograd.grad(want_y, dense_leaves, upstream))
    want[1] = want[1].flatten(1)[dense.flatten(1) != 0]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close([g.float() for g in grads], want, **tolerance)


def test_codebook_gradient_sums_its_members():
    row_offsets, col_indices, values = rows_of_weight(random_weight(8, 6, (3, 3)))
    codes = torch.randint(0, 6, values.shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    codebook = random(7, seed=3).requires_grad_()
    x = random(2, 6, 9, 9).requires_grad_()
    gathered = codebook.detach()[codes.int()].requires_grad_()
    grad_y = random(2, 8, 7, 7, seed=4)
    y = sparse_conv2d(x, row_offsets, col_indices, codes, None, codebook, kernel_size=3)
    got = torch.autograd.grad(y, (x, codebook), grad_y)
    want = torch.autograd.grad(
        sparse_conv2d(x, row_offsets, col_indices, gathered, kernel_size=3), (x, gathered), grad_y
    )
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], torch.zeros(7).index_add(0, codes.int(), want[1]))
    assert got[1][6] == 0


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "codebook"])
def test_each_gradient_comes_alone(wanted):
    row_offsets, col_indices, values = rows_of_weight(random_weight(8, 6, (3, 3)))
    arguments = {"x": random(2, 6, 9, 9), "values": values, "bias": random(8)}
    if wanted == "codebook":
        arguments |= {"values": (values > 0).to(torch.uint8), "codebook": random(2)}
    arguments[wanted].requires_grad_()
    y = sparse_conv2d(row_offsets=row_offsets, col_indices=col_indices, kernel_size=3, **arguments)
    y.sum().backward()
    assert [name for name, t in arguments.items() if t.grad is not None] == [wanted]


def test_second_derivatives_are_those_of_the_dense_convolution():
    dense = random_weight(4, 3, (3, 3))
    row_offsets, col_indices, values = rows_of_weight(dense)
    position = (dense.flatten(1) != 0).nonzero(as_tuple=True)

    def penalty(y, x, weight):
        """A loss on first derivatives, as gradient penalties are."""
        grad_x, grad_weight = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(grad_x.pow(2).sum() + grad_weight.pow(2).sum(), (x, weight))

    x, weight = random(2, 3, 5, 6).requires_grad_(), values.clone().requires_grad_()
    got = penalty(sparse_conv2d(x, row_offsets, col_indices, weight, kernel_size=3, padding=1), x, weight)
    same = torch.zeros(4, 27).index_put(position, weight).view(4, 3, 3, 3)
    torch.testing.assert_close(got, penalty(conv2d(x, same, padding=1), x, weight), rtol=1e-3, atol=1e-1)


def test_forward_mode_is_refused_instead_of_returning_zero():
    weight, x = rows_of_weight(random_weight(8, 6, (3, 3))), random(2, 6, 9, 9)
    with pytest.raises(RuntimeError, match="sparse_conv2d: x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: sparse_conv2d(x, *weight, kernel_size=3), (x,), (x,))


# ---- PyTorch


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_registration_is_sound(codes, dtype, memory_format):
    row_offsets, col_indices, values = rows_of_weight(random_weight(8, 6, (3, 3)))
    x = random(2, 6, 7, 9, dtype=dtype).contiguous(memory_format=memory_format)
    numbers = (values > 0).to(torch.uint8) if codes else values
    bias, codebook = random(8, seed=2), random(2, seed=3) if codes else None
    sizes = ([3, 3], [1, 2], [1, 1], [1, 1], 1)
    block = sparse_conv2d_channel_block(6, *sizes[:2], sizes[3])
    *layout, sources = sparse_conv2d_pack(row_offsets, col_indices, 6, block, *sizes[:2], sizes[3], 1)
    torch.library.opcheck(
        OPS.sparse_conv2d_packed.default,
        (x, *layout, numbers[sources.long()], bias, codebook, 8, block, *sizes, True),
    )
    torch.library.opcheck(
        OPS.sparse_conv2d_inference.default, (x, row_offsets, col_indices, numbers, bias, codebook, *sizes)
    )
    for leaf in (x, bias, codebook if codes else numbers):
        leaf.requires_grad_()
    for relu in (False, True):
        torch.library.opcheck(
            OPS.sparse_conv2d.default, (x, row_offsets, col_indices, numbers, bias, codebook, *sizes, relu)
        )


@pytest.mark.parametrize("codes", [False, True])
def test_compiles_without_a_graph_break_for_any_size(codes):
    row_offsets, col_indices, values = rows_of_weight(random_weight(8, 6, (3, 3)))
    bias, codebook = random(8, seed=2).requires_grad_(), random(2, seed=3).requires_grad_() if codes else None
    numbers = (values > 0).to(torch.uint8) if codes else values.requires_grad_()
    leaves = [codebook if codes else numbers, bias]

    def run(x):
        return sparse_conv2d(x, row_offsets, col_indices, numbers, bias, codebook, kernel_size=3, padding=1).relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch, height in ((2, 9), (3, 9), (3, 17)):
        x = random(batch, 6, height, 10).requires_grad_()
        assert torch.equal(compiled(x), run(x))
        got = torch.autograd.grad(compiled(x).pow(2).sum(), [x, *leaves])
        torch.testing.assert_close(got, torch.autograd.grad(run(x).pow(2).sum(), [x, *leaves]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32_and_casts_the_result(dtype):
    weight, x = rows_of_weight(random_weight(8, 6, (3, 3))), random(2, 6, 9, 9)
    want = sparse_conv2d(x, *weight, kernel_size=3).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(sparse_conv2d(x, *weight, kernel_size=3), want)
        half = sparse_conv2d(x.to(dtype), *weight, kernel_size=3)
        inferred = sparse_conv2d_inference(x, *weight, None, None, [3, 3], [1, 1], [0, 0], [1, 1], 1)
    assert half.dtype == dtype and torch.equal(inferred, want)


# ---- bad input


GOOD = {
    "x": torch.zeros(2, 4, 5, 6),
    "row_offsets": torch.tensor([0, 1, 1, 3], dtype=torch.int32),
    "col_indices": torch.tensor([35, 0, 2], dtype=torch.int32),
    "values": torch.ones(3),
    "bias": torch.zeros(3),
    "kernel_size": 3,
}
CODES = {"values": torch.zeros(3, dtype=torch.uint8), "codebook": torch.ones(2)}


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list; pass a torch.Tensor"),
        ({"x": GOOD["x"].double()}, TypeError, r"x must be float32 or bfloat16, got torch\.float64; convert it"),
        ({"x": torch.zeros(5, 6)}, ValueError, r"x must be \[N, C, H, W\] or \[C, H, W\], got shape \(5, 6\)"),
        ({"row_offsets": torch.zeros(4)}, TypeError, r"row_offsets must be int32 or int64, got torch\.float32"),
        ({"row_offsets": torch.zeros(0).int()}, ValueError, r"row_offsets must be \[O \+ 1\], got shape \(0,\)"),
        ({"col_indices": torch.zeros(3, 1).int()}, ValueError, r"col_indices must be \[nnz\], got shape \(3, 1\)"),
        ({"values": torch.ones(4)}, ValueError, r"values must be \[3\] like col_indices, got shape \(4,\)"),
        ({"codebook": torch.ones(2)}, TypeError, r"values must be uint8, got torch\.float32; pass codes, or no"),
        (CODES | {"codebook": torch.ones(257)}, ValueError, r"codebook must be .* at most 256.*, got shape \(257,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[3\], got shape \(2,\)"),
        ({"values": torch.ones(3, device="meta")}, ValueError, "values must be on the device of x, cpu, got meta"),
        ({"kernel_size": (3, 3, 3)}, TypeError, r"kernel_size must be an int or two ints, got \(3, 3, 3\)"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"stride": 1.5}, TypeError, "stride must be an int or two ints, got 1.5"),
        ({"stride": (1, 0)}, ValueError, r"stride must be at least 1, got \(1, 0\)"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"dilation": 3}, ValueError, "x must be at least 7 high for this kernel and padding, got 5"),
        ({"kernel_size": (1, 7)}, ValueError, "x must be at least 7 wide for this kernel and padding, got 6"),
        ({"groups": 2}, ValueError, "groups must divide the channels, got 2 groups of 4 channels in and 3 out"),
    ],
)
def test_rejects(bad, error, match):
    with pytest.raises(error, match=f"sparse_conv2d: {match}"):
        sparse_conv2d(**GOOD | bad)


@pytest.mark.parametrize(
    "bad,match",
    [
        ({"col_indices": torch.tensor([36, 0, 2], dtype=torch.int32)}, r"col_indices must lie in \[0, 36\)"),
        ({"col_indices": torch.tensor([35, -1, 2], dtype=torch.int32)}, r"col_indices must lie in \[0, 36\)"),
        ({"col_indices": torch.tensor([35, 2, 2], dtype=torch.int32)}, "col_indices must rise strictly within a row"),
        ({"row_offsets": torch.tensor([0, 3, 1, 3], dtype=torch.int32)}, "row_offsets must rise from 0 to 3"),
        ({"row_offsets": torch.tensor([0, -5, 1, 3], dtype=torch.int32)}, "row_offsets must rise from 0 to 3"),
        ({"row_offsets": torch.tensor([1, 1, 2, 3], dtype=torch.int32)}, "row_offsets must rise from 0 to 3"),
        ({"row_offsets": torch.tensor([0, 1, 9, 3], dtype=torch.int32)}, "row_offsets must rise from 0 to 3"),
        (CODES | {"values": torch.tensor([0, 2, 1], dtype=torch.uint8)}, r"codes must lie in \[0, 2\)"),
    ],
)
def test_damaged_weights_are_refused(bad, match):
    with pytest.raises(RuntimeError, match=f"sparse_conv2d: {match}"):
        sparse_conv2d(**GOOD | bad)


@pytest.mark.parametrize("position,damage", [(0, -1), (0, 10**9), (1, -1), (1, 10**9), (2, -1), (3, 255)])
def test_damaged_layouts_are_refused(position, damage):
    """Block offsets, segments, indices and codes, each first and last."""
    dense, x = random_weight(40, 20, (3, 3)), random(1, 20, 9, 9)
    row_offsets, col_indices, values = rows_of_weight(dense)
    sizes = ([3, 3], [1, 1], [1, 1])
    *layout, sources = sparse_conv2d_pack(row_offsets, col_indices, 20, 8, *sizes, 1)
    layout.append((values > 0).to(torch.uint8)[sources.long()])
    rest = (None, torch.ones(2), 40, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    sparse_conv2d_packed(x, *layout, *rest)
    for at in (0, -1):
        damaged = [tensor.clone() for tensor in layout]
        damaged[position].view(-1)[at] = damage
        with pytest.raises(RuntimeError, match=r"sparse_conv2d_packed: .* must .* got"):
            sparse_conv2d_packed(x, *damaged, *rest)
    with pytest.raises(RuntimeError, match=r"blocks must be \[\d+, 2\], got \[\d+, 2\]; pass the weight"):
        sparse_conv2d_packed(random(1, 30, 9, 9), *layout, *rest)
    with pytest.raises(RuntimeError, match="channel_block must be the one"):
        sparse_conv2d_packed(x, *layout, None, torch.ones(2), 40, 0, *rest[4:])


def test_kernels_too_large_for_the_layout_are_refused():
    with pytest.raises(RuntimeError, match="kernel_size must be smaller, got 1 x 65535; keep this layer dense"):
        sparse_conv2d_channel_block(1, [1, 65535], [1, 1], [1, 1])


@pytest.mark.parametrize("name,bad", [(0, [3]), (0, [0, 3]), (1, [1, 2**31]), (2, [-1, 0]), (3, [2**62, 1])])
def test_native_sizes_are_checked(name, bad):
    sizes = [[3, 3], [1, 1], [0, 0], [1, 1]]
    sizes[name] = bad
    weight = (GOOD["row_offsets"], GOOD["col_indices"], GOOD["values"], None, None)
    with pytest.raises(RuntimeError, match=r"sparse_conv2d: \w+ must be two numbers from \d to \d+, got \d of them"):
        sparse_conv2d_inference(GOOD["x"], *weight, *sizes, 1)
