"""fixed_matmul on a CUDA device: a real one, or that of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import fixed_matmul, fixed_pack


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("rows,columns,batch", [(1, 1, 1), (9, 70, 5), (4, 0, 2), (0, 9, 3), (6, 33, 0)])
def test_equals_the_cpu(device, rows, columns, batch, dtype):
    generator = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
    x, weight = (torch.randint(low, high, (n, columns), generator=generator).to(dtype) for n in (batch, rows))
    packed = fixed_pack(weight)
    assert torch.equal(fixed_pack(weight.to(device)).cpu(), packed)
    bias = torch.randint(-(2**30), 2**30, (rows,), generator=generator)
    for how in ({}, {"rounding": "stochastic", "seed": 4, "offset": 50}, {"dtype": torch.float32, "relu": True}):
        how = {"rows": rows, "sum_fraction_bits": 20, "integer_bits": 6, "fraction_bits": 10, **how}
        for of_rows in (None, bias):
            want = fixed_matmul(x, packed, of_rows, **how)
            moved = [None if t is None else t.to(device) for t in (x, packed, of_rows)]
            got = fixed_matmul(*moved, **how)
            assert got.device.type == "cuda" and torch.equal(got.cpu(), want)


def test_accepts_unaligned_memory(emulator):
    x, packed = torch.randint(-99, 99, (4, 70)).short(), fixed_pack(torch.randint(-99, 99, (3, 70)).short())
    how = {"rows": 3, "sum_fraction_bits": 10, "integer_bits": 6, "fraction_bits": 10}
    got = fixed_matmul(*(emulator.unaligned(t.to("cuda")) for t in (x, packed)), **how)
    assert torch.equal(got.cpu(), fixed_matmul(x, packed, **how))


def test_tensors_elsewhere_are_refused(device):
    x = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="packed must be on the device of x"):
        fixed_matmul(x.to(device), fixed_pack(x), rows=2, sum_fraction_bits=10, integer_bits=6, fraction_bits=10)
