import pytest
import torch

from tersetorch import _native
from tersetorch.ops import blocked_int8_matmul, blocked_int8_matmul_inference, blocked_int8_pack

OPS = torch.ops.tersetorch


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows, columns, density, column_block, seed=0):
    """A random int8 weight dense, in compressed sparse rows and in blocks, as keyword arguments of the op."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randint(-128, 128, (rows, columns), generator=generator), 0)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    csr = (row_offsets, kept.nonzero()[:, 1].int(), dense[kept].to(torch.int8))
    packed = blocked_int8_pack(*csr, columns=columns, column_block=column_block)
    weight = dict(zip(("block_offsets", "segments", "indices", "values", "row_sums"), packed, strict=True))
    weight |= {"row_scales": random(rows, seed=3).abs() / 100, "out_features": rows, "column_block": column_block}
    return dense, csr, weight


def quantised(x):
    """q and the scale of each sample, by the formula."""
    largest = x.float().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1).float()
    # Tensors on both sides: a number over a tensor is a reciprocal first and rounded twice.
    inverse = torch.where(largest == 0, 0, torch.full_like(largest, 127) / largest)
    return (x.float() * inverse).round(), largest / torch.full_like(largest, 127)


def reference(x, dense, weight, bias=None):
    q, scale = quantised(x)
    sums = (q.double() @ dense.double().T).float()
    # float64 holds the product of two float32 exactly, so that only the sum is rounded before float32.
    y = (sums * torch.minimum(scale, weight["row_scales"])).double() * torch.maximum(
        scale, weight["row_scales"]
    ).double()
    return (y if bias is None else y + bias.double()).float()


SHAPES = [(1, 1), (10, 17), (300, 784), (256, 128), (257, 129), (513, 101), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 17, 64, 200])
def test_equals_the_formula(rows, columns, batch):
    for column_block in (4 if columns < 200 else 96, 128, 4096):
        dense, _, weight = random_weight(rows, columns, 0.3, column_block)
        x, bias = random(batch, columns), random(rows, seed=2)
        y = blocked_int8_matmul(x, bias=bias, **weight)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, reference(x, dense, weight, bias), rtol=2**-22, atol=1e-6)
        assert torch.equal(blocked_int8_matmul_inference(x, bias=bias, **weight), y)
        assert torch.equal(blocked_int8_matmul(x, bias=bias, relu=True, **weight), y.relu())
        half = blocked_int8_matmul(x.bfloat16(), **weight)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), reference(x.bfloat16(), dense, weight), rtol=2**-8, atol=1e-6)


def test_error_keeps_to_what_is_stated():
    dense, _, weight = random_weight(300, 500, 0.2, 128)
    x = random(70, 500)
    used = (dense * weight["row_scales"][:, None]).double()
    exact = x.double() @ used.T
    allowed = used.abs().sum(1) * quantised(x)[1].double() / 2 + exact.abs() * 2**-22
    assert ((blocked_int8_matmul(x, **weight).double() - exact).abs() <= allowed).all()


def test_the_largest_sums_do_not_overflow():
    columns = 128 * 1024
    row_offsets = torch.tensor([0, columns], dtype=torch.int32)
    values = torch.full((columns,), -128, dtype=torch.int8)
    *layout, words, row_sums = blocked_int8_pack(
        row_offsets, torch.arange(columns).int(), values, columns=columns, column_block=32768
    )
    y = blocked_int8_matmul(
        torch.full((9, columns), 2.0), *layout, words, torch.ones(1), row_sums, out_features=1, column_block=32768
    )
    assert torch.equal(y, torch.full((9, 1), torch.tensor(-128.0 * 127 * columns) * (2 / torch.tensor(127.0))))


def test_large_scales_overflow_only_where_the_result_does():
    dense, _, weight = random_weight(300, 70, 0.2, 32)
    dense[7, :2], dense[7, 2:] = torch.tensor([3, 0]), 0
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)]).int()
    columns, values = (dense != 0).nonzero()[:, 1].int(), dense[dense != 0].to(torch.int8)
    packed = blocked_int8_pack(row_offsets, columns, values, columns=70, column_block=32)
    weight |= dict(zip(("block_offsets", "segments", "indices", "values", "row_sums"), packed, strict=True))
    x = random(9, 70)
    x[:, 0] = 0  # row 7 sums to nothing, whatever the scales
    for of_x, of_rows in ((1e-10, 1e36), (1e30, 1e-20), (1e30, 1e30)):
        weight["row_scales"] = torch.full((300,), of_rows)
        y = blocked_int8_matmul(x * of_x, **weight)
        want = reference(x * of_x, dense, weight)
        assert (y[:, 7] == 0).all()
        assert bool(y.isfinite().all()) == (of_x * of_rows < 1e30)
        torch.testing.assert_close(y, want, rtol=2**-22, atol=0)
        exact = x.double() * of_x @ (dense.double().T * of_rows)
        bound = (dense.abs() * of_rows).double().sum(1) * quantised(x * of_x)[1].double() / 2 + exact.abs() * 2**-20
        assert ((y.double() - exact).abs() <= bound)[want.isfinite()].all()


def test_samples_that_are_zero_tiny_or_not_finite():
    _, _, weight = random_weight(30, 20, 0.5, 8)
    x = random(9, 20)
    x[1] = 0
    x[2] *= 2.0**-130
    x[3, 4] = torch.nan
    x[4, 5] = -torch.inf
    bias = random(30, seed=2)
    y = blocked_int8_matmul(x, bias=bias, **weight)
    assert torch.equal(y[1], bias) and torch.equal(y[2], bias)
    assert y[3:5].isnan().all()
    assert y[[0, 5, 6, 7, 8]].isfinite().all()


LEVELS = """
import hashlib, torch
from tersetorch.ops import blocked_int8_matmul, blocked_int8_pack
torch.manual_seed(0)
kept = torch.rand(300, 170) < 0.2
values = torch.randint(-128, 128, (int(kept.sum()),)).to(torch.int8)
offsets = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
*layout, words, sums = blocked_int8_pack(offsets, kept.nonzero()[:, 1].int(), values, columns=170, column_block=64)
scales, bias = torch.rand(300), torch.randn(300)
scales[::3] *= 1e36
digest = hashlib.sha256()
for batch in (1, 12, 31, 64, 100):
    x = torch.randn(batch, 170) * 10 ** torch.linspace(-20, 3, batch)[:, None]
    y = blocked_int8_matmul(x, *layout, words, scales, sums, bias, out_features=300, column_block=64, relu=True)
    digest.update(y.numpy().tobytes())
print(torch.ops.tersetorch.cpu_isa(), digest.hexdigest())
"""


def test_every_level_gives_the_same_bits(run_python):
    digests = set()
    for level in _native.cpu_levels():
        done = run_python(LEVELS, TERSETORCH_CPU_ISA=level)
        assert done.stdout.split()[:1] == [level], done.stderr
        digests.add(done.stdout.split()[1])
    assert len(digests) == 1


def test_backward_is_refused():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    y = blocked_int8_matmul(random(5, 12).requires_grad_(), **weight)
    with pytest.raises(RuntimeError, match="blocked_int8_matmul: must not be differentiated"):
        y.sum().backward()


_, _, GOOD = random_weight(300, 12, 0.4, 8)
GOOD = {"x": torch.zeros(2, 12)} | GOOD


@pytest.mark.parametrize(
    "op,bad,error,match",
    [
        ("", {"row_sums": GOOD["row_sums"].long()}, TypeError, r"row_sums must be int32, got torch\.int64"),
        ("", {"row_scales": GOOD["row_scales"][1:]}, ValueError, r"row_scales must be \[300\], got shape \(299,\)"),
        ("_inference", {"row_sums": GOOD["row_sums"][1:]}, RuntimeError, "row_scales and row_sums must be"),
        ("_inference", {"values": GOOD["values"].view(torch.uint8)}, RuntimeError, "values must be Char"),
    ],
)
def test_rejects(op, bad, error, match):
    with pytest.raises(error, match=f"blocked_int8_matmul: {match}"):
        (blocked_int8_matmul_inference if op else blocked_int8_matmul)(**GOOD | bad)
