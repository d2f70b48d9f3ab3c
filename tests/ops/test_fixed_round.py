"""fixed_round: its numbers, its random bits, its gradient, the compiler, and what it refuses."""

import numpy as np
import pytest
import torch

from tersetorch.ops import fixed_round, fixed_round_inference, fixed_round_whole

NAN, INFINITY = float("nan"), float("inf")


def random_bits(seed, numbers):
    """What csrc/kernels/common/philox.h says, once more."""
    n = numbers.astype(np.uint64)
    v, lane = n // 16 % 4, n % 16
    counter = n // 64 * 8 + lane // 2
    mask = np.uint64(0xFFFFFFFF)
    c = [counter & mask, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [p1 >> np.uint64(32) ^ c[1] ^ key[0], p1 & mask, p0 >> np.uint64(32) ^ c[3] ^ key[1], p0 & mask]
        key = [key[0] + np.uint64(0x9E3779B9) & mask, key[1] + np.uint64(0xBB67AE85) & mask]
    word = np.choose((v // 2 * 2 + lane % 2).astype(int), c)
    return np.where(v % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16)).astype(np.float64)


def reference(x, integer_bits, fraction_bits, bits=None):
    """The formula in float64, as whole numbers."""
    s = x.double().numpy() * 2.0**fraction_bits
    k = np.floor(s + 0.5) if bits is None else np.floor((np.floor(65536 * s + 0.5) + bits) / 65536)
    end = 2.0 ** (integer_bits - 1 + fraction_bits)
    return torch.from_numpy(np.clip(k, -end, end - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [(2, 14), (1, 1), (6, 10), (4, 16), (2, 0), (1, 23)])
def test_follows_the_formula(format, dtype):
    x = (torch.randn(3, 7, 61, generator=torch.Generator().manual_seed(0)) * 2.0 ** (format[0] - 1)).to(dtype)
    want = reference(x.flatten(), *format)
    assert torch.equal(fixed_round_whole(x, *format).flatten().double(), want)
    assert torch.equal(fixed_round(x, *format).flatten(), (want * 2.0 ** -format[1]).to(dtype))
    seed, offset = -3, 12345
    want = reference(x.flatten(), *format, random_bits(seed, offset + np.arange(x.numel())))
    got = fixed_round(x, *format, "stochastic", seed=seed, offset=offset)
    assert got.dtype == dtype and torch.equal(got.flatten(), (want * 2.0 ** -format[1]).to(dtype))


def test_ties_ends_and_what_is_no_number():
    x = torch.tensor([0.125, -0.125, 0.375, -0.375, 1.9, -2.1, INFINITY, -INFINITY, NAN, -0.0, 1e-40, -1e-40])
    want = torch.tensor([0.25, 0.0, 0.5, -0.25, 1.75, -2.0, 1.75, -2.0, NAN, 0.0, 0.0, 0.0])
    for rounded in (fixed_round(x, 2, 2), fixed_round(x[4:], 2, 2, "stochastic")):
        torch.testing.assert_close(rounded, want[-len(rounded) :], rtol=0, atol=0, equal_nan=True)
        assert not rounded[rounded == 0].signbit().any()


def test_stochastic_rounding_has_the_number_as_its_mean():
    x = torch.full((400_000,), 0.3)
    rounded = fixed_round(x, 1, 2, "stochastic", seed=5)
    assert set(rounded.tolist()) == {0.25, 0.5}
    assert abs(float(rounded.double().mean()) - 0.3) < 4 * 0.25 * (0.2 * 0.8 / 400_000) ** 0.5
    assert torch.equal(fixed_round(rounded, 1, 2, "stochastic", seed=6), rounded)


def test_a_part_with_its_offset_is_a_part_of_the_whole():
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    whole = fixed_round(x, 4, 6, "stochastic", seed=9, offset=11)
    parts = [
        fixed_round(part, 4, 6, "stochastic", seed=9, offset=11 + first)
        for first, part in zip((0, 70, 41_000), x.split([70, 40_930, 59_003]), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(fixed_round(x, 4, 6, "stochastic", seed=9, offset=11), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(fixed_round(x, 4, 6, "stochastic", seed=10, offset=11), whole)


def test_takes_any_strides():
    x = torch.randn(70, 5)
    assert torch.equal(fixed_round(x.T, 2, 6, "stochastic"), fixed_round(x.T.contiguous(), 2, 6, "stochastic"))


def test_the_gradient_passes_inside_the_range():
    x = torch.tensor([-2.1, -2.0, 0.3, 1.75, 1.8, INFINITY, NAN], requires_grad=True)
    for rounding in ("nearest", "stochastic"):
        (gradient,) = torch.autograd.grad(fixed_round(x, 2, 2, rounding), x, torch.full((7,), 3.0))
        assert gradient.tolist() == [0, 3, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_registration_is_sound(rounding):
    x = torch.randn(3, 70)
    ops = torch.ops.tersetorch
    torch.library.opcheck(ops.fixed_round.default, (x.clone().requires_grad_(), 2, 6, rounding, 1, 2))
    torch.library.opcheck(ops.fixed_round_inference.default, (x, 2, 6, rounding, 1, 2))
    torch.library.opcheck(ops.fixed_round_whole.default, (x, 2, 6, torch.int16, rounding, 1, 2))
    assert torch.equal(fixed_round_inference(x, 2, 6, rounding, 1, 2), fixed_round(x, 2, 6, rounding, 1, 2))
    compiled = torch.compile(lambda x: fixed_round(x, 2, 6, rounding, seed=1), fullgraph=True)
    assert torch.equal(compiled(x), fixed_round(x, 2, 6, rounding, seed=1))


def test_whole_numbers_take_the_narrowest_dtype():
    x = torch.randn(5)
    for bits, dtype in ((8, torch.int8), (9, torch.int16), (16, torch.int16), (17, torch.int32)):
        assert fixed_round_whole(x, 2, bits - 2).dtype == dtype
    assert fixed_round_whole(x, 2, 6, dtype=torch.int32).dtype == torch.int32


def test_refuses():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        fixed_round([1.0], 2, 6)
    with pytest.raises(TypeError, match="x must be float32 or bfloat16"):
        fixed_round(x.double(), 2, 6)
    with pytest.raises(TypeError, match=r"integer_bits must be an int, got 2\.0"):
        fixed_round(x, 2.0, 6)
    for format in ((0, 8), (1, 0), (2, -1), (20, 5)):
        with pytest.raises(ValueError, match=f"IL of at least 1, for the sign.*got <{format[0]},{format[1]}>"):
            fixed_round(x, *format)
        with pytest.raises(RuntimeError, match="IL of at least 1, for the sign"):
            fixed_round_inference(x, *format)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        fixed_round(x, 2, 6, "up")
    with pytest.raises(ValueError, match="offset must be in"):
        fixed_round(x, 2, 6, "stochastic", offset=-1)
    with pytest.raises(ValueError, match="seed must be a 64-bit integer"):
        fixed_round(x, 2, 6, "stochastic", seed=2**63)
    with pytest.raises(ValueError, match="dtype must be int8, int16 or int32 and hold 9 bits"):
        fixed_round_whole(x, 2, 7, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="x must not hold NaN, which is no whole number"):
        fixed_round_whole(torch.tensor([1.0, NAN]), 2, 6)
