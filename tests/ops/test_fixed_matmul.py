"""fixed_matmul: exact sums, their conversion, the compiler, and what it refuses."""

import pytest
import torch

from tersetorch import ops
from tersetorch.ops import fixed_pack, fixed_round, fixed_round_whole

FORMAT = {"integer_bits": 6, "fraction_bits": 10}


def problem(rows, columns, batch, dtypes=(torch.int16, torch.int16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, (n, columns), generator=generator).to(dtype)
        for n, dtype in zip((batch, rows), dtypes, strict=True)
    )
    return x, weight, torch.randint(-(2**40), 2**40, (rows,), generator=generator)


def fixed_matmul(x, weight, *args, **how):
    return ops.fixed_matmul(x, fixed_pack(weight), *args, rows=weight.shape[0], **how)


def whole_sums(x, weight, bias):
    return x.long() @ weight.long().T + (0 if bias is None else bias)


@pytest.mark.parametrize(
    "rows,columns,batch", [(1, 1, 1), (5, 70, 3), (37, 300, 1), (130, 43, 70), (4, 0, 2), (0, 9, 3), (6, 33, 0)]
)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.int8, torch.int8), (torch.int16, torch.int16), (torch.int8, torch.int16)],
)
def test_sums_are_exact(rows, columns, batch, dtypes):
    x, weight, bias = problem(rows, columns, batch, dtypes)
    weight[: rows // 2] = torch.iinfo(weight.dtype).min  # pairs of the largest products
    x[:1] = torch.iinfo(x.dtype).min
    for of_rows in (None, bias):
        exact = whole_sums(x, weight, of_rows)
        for down in (0, 1, 16, 20):
            y = fixed_matmul(x, weight, of_rows, sum_fraction_bits=down, integer_bits=24, fraction_bits=0)
            half = 1 << down - 1 if down else 0
            assert y.dtype == torch.int32 and torch.equal(y, (exact + half >> down).clamp(-(2**23), 2**23 - 1).int())


def test_is_the_rounded_product_of_the_numbers():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(7, 90, generator=generator), torch.randn(11, 90, generator=generator) / 40
    whole_x, whole_weight = fixed_round_whole(x, 6, 10), fixed_round_whole(weight, 2, 12)
    bias = torch.randint(-(2**20), 2**20, (11,), generator=generator)
    exact = whole_sums(whole_x, whole_weight, bias).double() / 2**22
    assert exact.abs().max() < 4  # so that float32 has it
    for how in ({}, {"rounding": "stochastic", "seed": 3, "offset": 77}):
        got = fixed_matmul(whole_x, whole_weight, bias, sum_fraction_bits=22, **FORMAT, **how, dtype=torch.float32)
        assert got.dtype == torch.float32 and torch.equal(got, fixed_round(exact.float(), 6, 10, **how))
        steps = fixed_matmul(whole_x, whole_weight, bias, sum_fraction_bits=22, **FORMAT, **how)
        assert steps.dtype == torch.int16 and torch.equal(steps.float() / 2**10, got)
        positive = fixed_matmul(whole_x, whole_weight, bias, sum_fraction_bits=22, **FORMAT, **how, relu=True)
        assert torch.equal(positive, steps.clamp(min=0))


def test_stochastic_rounding_has_the_sum_as_its_mean():
    x, weight = torch.full((5000, 1), 3, dtype=torch.int8), torch.full((16, 1), 7, dtype=torch.int8)
    y = fixed_matmul(x, weight, sum_fraction_bits=4, integer_bits=4, fraction_bits=0, rounding="stochastic", seed=2)
    assert set(y.unique().tolist()) == {1, 2}
    assert abs(float(y.double().mean()) - 21 / 16) < 4 * (5 / 16 * 11 / 16 / y.numel()) ** 0.5


def test_parts_and_threads_give_the_same_bits():
    x, weight, bias = problem(33, 65, 4000)
    how = {"sum_fraction_bits": 24, **FORMAT, "rounding": "stochastic", "seed": 5}
    whole = fixed_matmul(x, weight, bias, **how, offset=9)
    late = fixed_matmul(x[1234:], weight, bias, **how, offset=9 + 1234 * 33)
    assert torch.equal(whole[1234:], late)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(fixed_matmul(x, weight, bias, **how, offset=9), whole)
    finally:
        torch.set_num_threads(threads)


def test_takes_any_leading_dimensions_and_strides():
    x, weight, bias = problem(5, 12, 6)
    y = fixed_matmul(x, weight, bias, sum_fraction_bits=20, **FORMAT)
    assert torch.equal(fixed_matmul(x.view(2, 3, 12), weight, bias, sum_fraction_bits=20, **FORMAT), y.view(2, 3, 5))
    assert torch.equal(fixed_matmul(x[0], weight, bias, sum_fraction_bits=20, **FORMAT), y[0])
    strided = x.T.contiguous().T, weight.T.contiguous().T
    assert torch.equal(fixed_matmul(*strided, bias, sum_fraction_bits=20, **FORMAT), y)


def test_registration_is_sound():
    x, weight, bias = problem(5, 12, 6)
    op, packed = torch.ops.tersetorch.fixed_matmul.default, fixed_pack(weight)
    torch.library.opcheck(op, (x, packed, bias, 5, 20, 6, 10, torch.int16, "stochastic", 1, 2, True))
    torch.library.opcheck(op, (x, packed, None, 5, 20, 6, 10, torch.float32))
    torch.library.opcheck(torch.ops.tersetorch.fixed_pack.default, (weight, 3))

    def run(x):
        return fixed_matmul(x, weight, bias, sum_fraction_bits=20, **FORMAT)

    assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))


def test_packs_panels_of_16_rows():
    weight = torch.arange(-60, 66, dtype=torch.int8).view(18, 7)
    packed = fixed_pack(weight)
    assert packed.shape == (2, 3, 16, 4) and packed.dtype == torch.int8
    numbers = packed[:, :2].permute(0, 2, 1, 3).reshape(32, 8)
    assert torch.equal(numbers[:18, :7], weight) and not numbers[18:].any() and not numbers[:, 7].any()
    assert torch.equal(packed[:, 2].reshape(32, 4).view(torch.int32)[:18, 0], weight.sum(1, dtype=torch.int32))
    wide = fixed_pack(weight.short().T.contiguous().T, 7)
    assert wide.shape == (2, 8, 16, 2) and torch.equal(wide[0, :7, :, 0].T, weight[:16]) and not wide[:, :7, :, 1].any()
    assert torch.equal(wide[0, 7].view(torch.int32)[:, 0], weight[:16].abs().amax(1).int())


def test_refuses():
    x, weight, bias = problem(5, 12, 6)
    how = {"sum_fraction_bits": 20, **FORMAT}
    with pytest.raises(TypeError, match="x must be int8 or int16"):
        fixed_matmul(x.float(), weight, **how)
    with pytest.raises(TypeError, match="bias must be int64"):
        fixed_matmul(x, weight, bias.int(), **how)
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        fixed_pack([[1]])
    with pytest.raises(TypeError, match="packed must be int16 like x"):
        fixed_matmul(x, weight.char(), **how)
    with pytest.raises(ValueError, match="segments must divide the columns of weight, 12, got 5"):
        fixed_pack(weight, 5)
    with pytest.raises(ValueError, match=r"weight must be \[out, in\]"):
        fixed_pack(weight[0])
    with pytest.raises(ValueError, match="packed must be what packing returns for 17 rows"):
        ops.fixed_matmul(x, fixed_pack(weight), rows=17, **how)
    with pytest.raises(ValueError, match="pass x with as many features as the weight has columns"):
        fixed_matmul(x[:, :3], weight, **how)
    with pytest.raises(ValueError, match=r"bias must be \[5\], got shape \(4,\)"):
        fixed_matmul(x, weight, bias[:4], **how)
    with pytest.raises(ValueError, match="got <0,8>"):
        fixed_matmul(x, weight, sum_fraction_bits=20, integer_bits=0, fraction_bits=8)
    with pytest.raises(ValueError, match=r"sum_fraction_bits must lie in \[0, 30\], got 31"):
        fixed_matmul(x, weight, sum_fraction_bits=31, **FORMAT)
    with pytest.raises(ValueError, match="and hold 16 bits"):
        fixed_matmul(x, weight, **how, dtype=torch.int8)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic'"):
        fixed_matmul(x, weight, **how, rounding="up")
    op, packed = torch.ops.tersetorch.fixed_matmul.default, fixed_pack(weight)
    fine = {"rows": 5, **how}
    for bad, sentence in (
        ({"rows": "5"}, "rows must be an int, got '5'"),
        ({"sum_fraction_bits": 2.5}, "sum_fraction_bits must be an int, got 2.5"),
        ({"relu": "no"}, "relu must be True or False, got 'no'"),
    ):
        with pytest.raises(TypeError, match=sentence):
            ops.fixed_matmul(x, packed, **{**fine, **bad})
    with pytest.raises(ValueError, match=r"dtype must be float32, int8, int16 or int32 and hold 16 bits, got \[8\]"):
        ops.fixed_matmul(x, packed, **fine, dtype=[8])
    with pytest.raises(TypeError, match="segments must be an int"):
        ops.fixed_pack(weight, 1.0)
    for rows, bad in ((5, packed[:, 1:]), (17, packed), (-1, packed), (5, packed[0]), (5, packed.char())):
        with pytest.raises(RuntimeError, match="fixed_matmul: "):
            op(x, bad, None, rows, 20, 6, 10, torch.int16)
    with pytest.raises(RuntimeError, match="x with as many features as the weight has columns"):
        op(x[:, :3], packed, None, 5, 20, 6, 10, torch.int16)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^24 columns, got 16777216"):
        op(x[:1, :1].expand(1, 2**24), packed, None, 5, 20, 6, 10, torch.int16)
    with pytest.raises(RuntimeError, match=r"sum_fraction_bits must lie in"):
        op(x, packed, None, 5, -1, 6, 10, torch.int16)
    with pytest.raises(RuntimeError, match="segments must be at least 1"):
        torch.ops.tersetorch.fixed_pack(weight, 0)
