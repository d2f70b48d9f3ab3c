"""product_conv2d on a CUDA device against the same on the CPU."""

import pytest
import torch

from tersetorch import ops

# channels, filters, kernel, stages, whether segments share a codebook, width, entries, and further sizes.
CASES = [
    (6, 70, (3, 3), 1, False, 4, 9, {}),
    (6, 70, (3, 3), 1, True, 5, 40, {"stride": 2, "padding": (1, 2)}),
    (8, 6, (1, 3), 2, False, 7, 16, {"groups": 2, "dilation": (1, 2)}),
]


def problem(channels, filters, kernel, stages, shared, width, entries, options):
    generator = torch.Generator().manual_seed(0)
    segments = ops.product_segments(channels // options.get("groups", 1) * kernel[0] * kernel[1], width)
    codes = torch.randint(entries, (filters, stages * segments), generator=generator, dtype=torch.uint8)
    codebooks = torch.randn(stages, 1 if shared else segments, width, entries, generator=generator)
    x, bias = torch.randn(2, channels, 9, 8, generator=generator), torch.randn(filters, generator=generator)
    sizes = {"out_channels": filters, "kernel_size": kernel, **options}
    return x, ops.product_pack(codes, entries), codebooks, bias, sizes


@pytest.mark.parametrize("case", CASES)
def test_matches_the_cpu(device, case):
    x, codes, codebooks, bias, sizes = problem(*case)
    expected = ops.product_conv2d(x, codes, codebooks, bias, **sizes)
    y = ops.product_conv2d(*(t.to(device) for t in (x, codes, codebooks, bias)), **sizes)
    assert y.device.type == "cuda" and torch.allclose(y.cpu(), expected, atol=1e-4)


def test_a_damaged_filter_is_nan(device):
    x, codes, codebooks, bias, sizes = problem(*CASES[0])
    codes[0, 0] |= 15
    y = ops.product_conv2d(*(t.to(device) for t in (x, codes, codebooks, bias)), **sizes).cpu()
    assert y[:, 0].isnan().all() and not y[:, 1:].isnan().any()
