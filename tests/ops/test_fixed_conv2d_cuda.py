"""fixed_conv2d on a CUDA device: a real one, or that of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import fixed_conv2d, fixed_conv2d_pack


@pytest.mark.parametrize("dtypes", [(torch.int8, torch.int8), (torch.int16, torch.int16), (torch.int8, torch.int16)])
@pytest.mark.parametrize(
    "channels,filters,sizes",
    [
        (3, 18, {"kernel_size": 3, "padding": 1}),
        (6, 9, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (1, 2), "groups": 3}),
        (20, 20, {"kernel_size": 2, "groups": 20}),
    ],
)
def test_equals_the_cpu(device, channels, filters, sizes, dtypes):
    generator = torch.Generator().manual_seed(0)
    kernel = sizes["kernel_size"]
    taps = (kernel, kernel) if isinstance(kernel, int) else kernel
    shapes = (2, channels, 5, 6), (filters, channels // sizes.get("groups", 1), *taps)
    x, weight = (
        torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, shape, generator=generator).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    bias = torch.randint(-(2**20), 2**20, (filters,), generator=generator)
    packed, groups = fixed_conv2d_pack(weight, sizes.get("dilation", 1), sizes.get("groups", 1))
    how = {**sizes, "groups": groups, "out_channels": filters}
    how |= {"sum_fraction_bits": 14, "integer_bits": 14, "fraction_bits": 2}
    for images in (x, x.to(memory_format=torch.channels_last)):
        for of_filters in (None, bias):
            want = fixed_conv2d(images, packed, of_filters, **how, dtype=torch.float32)
            moved = [None if t is None else t.to(device) for t in (images, packed, of_filters)]
            got = fixed_conv2d(*moved, **how, dtype=torch.float32)
            assert got.device.type == "cuda" and got.stride() == want.stride() and torch.equal(got.cpu(), want)


def test_tensors_elsewhere_are_refused(device):
    x = torch.zeros(2, 3, 4, 4, dtype=torch.int8)
    packed, _ = fixed_conv2d_pack(torch.zeros(3, 3, 1, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="packed must be on the device of x"):
        fixed_conv2d(
            x.to(device), packed, out_channels=3, kernel_size=1, sum_fraction_bits=9, integer_bits=6, fraction_bits=9
        )
