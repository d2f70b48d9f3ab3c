"""sign_pack: the bits, the compiler, and what it refuses."""

import pytest
import torch

from tersetorch.ops import sign_pack, sign_pack_images, sign_unpack, sign_words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 64), (2, 3, 65), (5, 0), (0, 7), (40, 1000)])
def test_packs_the_signs(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = sign_pack(x)
    assert bits.shape == (*shape[:-1], sign_words(shape[-1])) and bits.dtype == torch.int64
    assert torch.equal(sign_unpack(bits, shape[-1]), torch.where(x >= 0, 1.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_0_is_plus_and_bit_1_minus_the_first_one_lowest(dtype):
    x = torch.tensor([1.0, -1.0, 1.0, 1.0, -0.0, float("nan")], dtype=dtype)
    assert sign_pack(x).item() == sign_pack_images(x.view(1, -1, 1, 1)).item() == 0b100010
    assert sign_unpack(torch.tensor([0b100010]), 6).tolist() == [1, -1, 1, 1, 1, -1]
    x = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40], dtype=dtype)
    for times in range(1, 8):  # with and without whole vectors before the last
        assert sign_pack(x.repeat(times)).item() >> 8 * (times - 1) == 0b10101100


def test_bits_past_the_last_are_zero():
    assert sign_pack(-torch.ones(3)).item() == 7
    assert sign_pack(-torch.ones(64)).item() == -1
    assert sign_pack(torch.ones(64)).item() == 0


def test_takes_any_strides():
    x = torch.randn(70, 5)
    assert torch.equal(sign_pack(x.T), sign_pack(x.T.contiguous()))


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.tersetorch.sign_pack.default, (torch.randn(3, 70),))
    x = torch.randn(4, 100)
    assert torch.equal(torch.compile(sign_pack, fullgraph=True)(x), sign_pack(x))


def test_refuses():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        sign_pack([1.0])
    with pytest.raises(TypeError, match="x must be float32 or bfloat16"):
        sign_pack(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="got a scalar"):
        sign_pack(torch.tensor(1.0))
