"""product_conv2d: right, gradients right, seen by compilers, and bad input refused with the sentence."""

import pytest
import torch
from torch.nn import functional

from tersetorch import ops

# channels, filters, kernel, stages, whether segments share a codebook, width, entries, and further sizes.
CASES = [
    (6, 70, (3, 3), 1, False, 4, 9, {}),
    (6, 70, (3, 3), 1, True, 5, 40, {"stride": 2, "padding": (1, 2)}),
    (8, 6, (1, 3), 2, False, 7, 16, {"groups": 2, "dilation": (1, 2)}),
    (4, 4, (2, 2), 3, True, 16, 3, {"groups": 1, "padding": 1}),
    (4, 4, (3, 3), 1, False, 9, 4, {"groups": 4}),
]


def problem(channels, filters, kernel, stages, shared, width, entries, options, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = channels // options.get("groups", 1) * kernel[0] * kernel[1]
    segments = ops.product_segments(columns, width)
    codes = torch.randint(entries, (filters, stages * segments), generator=generator, dtype=torch.uint8)
    codebooks = torch.randn(stages, 1 if shared else segments, width, entries, generator=generator)
    x = torch.randn(2, channels, 9, 8, generator=generator)
    bias = torch.randn(filters, generator=generator)
    # Decoded by the formula.
    dense = torch.zeros(filters, segments * width)
    for stage in range(stages):
        for s in range(segments):
            book = codebooks[stage, 0 if shared else s]
            dense[:, s * width : (s + 1) * width] += book[:, codes[:, stage * segments + s].long()].T
    weight = dense[:, :columns].view(filters, -1, *kernel)
    sizes = {"out_channels": filters, "kernel_size": kernel, **options}
    return x, ops.product_pack(codes, entries), codebooks, bias, weight, sizes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_the_convolution_with_the_decoded_weight(case, layout):
    x, codes, codebooks, bias, weight, sizes = problem(*case)
    x = x.to(memory_format=layout)
    expected = functional.conv2d(x.double(), weight.double(), bias.double(), **case[-1])
    y = ops.product_conv2d(x, codes, codebooks, bias, **sizes)
    assert y.dtype == torch.float32 and torch.allclose(y.double(), expected, atol=1e-4)
    assert torch.equal(ops.product_conv2d(x, codes, codebooks, bias, relu=True, **sizes), y.relu())
    assert torch.allclose(ops.product_conv2d(x[0], codes, codebooks, bias, **sizes), y[0], atol=1e-5)
    half = ops.product_conv2d(x.bfloat16(), codes, codebooks, None, **sizes)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES[1:4])
def test_gradients_are_those_of_the_decoded_weight(case):
    x, codes, codebooks, bias, _, sizes = problem(*case)
    columns = x.shape[1] // sizes.get("groups", 1) * sizes["kernel_size"][0] * sizes["kernel_size"][1]
    leaves = [t.clone().requires_grad_() for t in (x, codebooks, bias)]
    y = ops.product_conv2d(leaves[0], codes, leaves[1], leaves[2], **sizes)
    seed = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, seed, create_graph=True)
    again = [t.clone().requires_grad_() for t in (x, codebooks, bias)]
    filters = sizes["out_channels"]
    weight = ops.product_decode(codes, again[1], out_features=filters, in_features=columns)
    weight = weight.view(filters, -1, *sizes["kernel_size"])
    z = functional.conv2d(again[0], weight, again[2], **case[-1])
    expected = torch.autograd.grad(z, again, seed)
    for name, got, wanted in zip(("x", "codebooks", "bias"), found, expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-4), name
    (second,) = torch.autograd.grad(found[0].square().sum(), leaves[1])
    assert second.isfinite().all() and second.abs().sum() > 0


def test_compiles_and_exports():
    x, codes, codebooks, bias, _, sizes = problem(*CASES[0])

    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.product_conv2d(x, codes, codebooks, bias, padding=1, **sizes)

    net = Net()
    assert torch.allclose(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x), atol=1e-6)
    with torch.no_grad():
        assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


def test_autocast_computes_in_float32():
    x, codes, codebooks, bias, _, sizes = problem(*CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.product_conv2d(x, codes, codebooks, bias, **sizes)
    assert torch.equal(y, ops.product_conv2d(x, codes, codebooks, bias, **sizes).bfloat16())


def test_bad_input_is_refused():
    x, codes, codebooks, bias, _, sizes = problem(*CASES[0])

    def call(x=x, codes=codes, codebooks=codebooks, bias=bias, **more):
        return ops.product_conv2d(x, codes, codebooks, bias, **{**sizes, **more})

    with pytest.raises(TypeError, match="product_conv2d: x must be a tensor, got list"):
        call(x=[1.0])
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\] or \[C, H, W\], got shape \(2, 6\)"):
        call(x=torch.ones(2, 6))
    with pytest.raises(TypeError, match="codes must be"):
        call(codes=codes.long())
    with pytest.raises(ValueError, match="1 segment or the 5 that 18 weights in a filter have at width 4, got 14"):
        call(x=torch.ones(2, 2, 9, 9))
    with pytest.raises(ValueError, match=r"bias must be \[70\]"):
        call(bias=bias[:3])
    with pytest.raises(ValueError, match="codes must have"):
        call(codes=codes[:1])
    with pytest.raises(ValueError, match="groups must divide the channels"):
        call(groups=4)
    damaged = codes.clone()
    damaged[0, 0] = 255
    with pytest.raises(RuntimeError, match="codes must lie in"):
        call(codes=damaged)
