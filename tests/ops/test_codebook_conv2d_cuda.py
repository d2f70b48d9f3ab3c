"""codebook_conv2d on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch import ops
from tersetorch.nn import CodebookConv2d

KINDS = ["tensor", "rows", "blocks"]
LAST = torch.channels_last
CASES = [
    ((2, 6, 7, 9), 5, (3, 3), {"padding": 1}),
    ((1, 4, 9, 8), 7, (3, 2), {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}),
    ((1, 8, 6, 6), 6, (3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    ((3, 5, 12, 4), 4, (1, 1), {}),
    ((0, 3, 5, 5), 4, (3, 3), {}),
]


def problem(shape=(2, 6, 7, 9), filters=5, kernel=(3, 3), groups=1, entries=11, kind="tensor", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    columns, block = shape[1] // groups * kernel[0] * kernel[1], 20 if kind == "blocks" else 0
    tables = {"tensor": 1, "rows": filters, "blocks": -(-columns // 20)}[kind]
    codes = torch.randint(entries, (filters, columns), dtype=torch.uint8, generator=g)
    return {
        "x": torch.randn(shape, generator=g).to(dtype),
        "codes": ops.codebook_pack(codes, entries=entries, column_block=block),
        "codebook": torch.randn(tables, entries, generator=g),
        "bias": torch.randn(filters, generator=g),
        "column_block": block,
    }


def on(device, tensors):
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}


@pytest.mark.parametrize("mode", ops.CODEBOOK_MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape,filters,kernel,sizes", CASES)
def test_equals_the_cpu(device, shape, filters, kernel, sizes, memory_format, kind, mode):
    for dtype, entries in ((torch.float32, 200), (torch.bfloat16, 16)):
        tensors = problem(shape, filters, kernel, sizes.get("groups", 1), entries, kind, dtype)
        tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
        for relu in (False, True):
            want = ops.codebook_conv2d(**tensors, kernel_size=kernel, **sizes, mode=mode, relu=relu)
            got = ops.codebook_conv2d(**on(device, tensors), kernel_size=kernel, **sizes, mode=mode, relu=relu)
            exact = {"rtol": 0, "atol": 0} if mode == "int8" else {}
            assert got.device.type == "cuda" and got.stride() == want.stride()
            torch.testing.assert_close(got.cpu(), want, **exact)


@pytest.mark.parametrize("mode", ops.CODEBOOK_MODES)
def test_many_filters_equal_the_cpu(device, mode):
    """Windows as samples of codebook_matmul, which few filters do not get; in parts, as the columns are many."""
    for dtype, kind, groups in ((torch.float32, "tensor", 2), (torch.bfloat16, "rows", 1)):
        tensors = problem((2, 120, 3, 4), 66 * groups, groups=groups, kind=kind, dtype=dtype)
        tensors["x"] = tensors["x"].contiguous(memory_format=LAST if groups == 1 else torch.contiguous_format)
        how = {"kernel_size": 3, "padding": 1, "groups": groups, "mode": mode}
        want = ops.codebook_conv2d(**tensors, **how)
        got = ops.codebook_conv2d(**on(device, tensors), **how)
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-3}
        assert got.stride() == want.stride()
        torch.testing.assert_close(got.cpu(), want, **({"rtol": 0, "atol": 0} if mode == "int8" else near))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_cpu(device, kind):
    def gradients(tensors):
        leaves = [tensors[name].requires_grad_() for name in ("x", "codebook", "bias")]
        y = ops.codebook_conv2d(**tensors, kernel_size=3, padding=1, stride=2, relu=True)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    tensors = problem(kind=kind)
    for got, want in zip(gradients(on(device, tensors)), gradients(tensors), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_damage_and_what_is_not_finite_give_nan(device):
    tensors = problem()
    tensors["codes"][3, 20] = 255
    tensors["x"][1, 2, 3, 4] = torch.inf
    for mode in ops.CODEBOOK_MODES:
        bad = ops.codebook_conv2d(**on(device, tensors), kernel_size=3, mode=mode).cpu().isnan()
        assert bad[:, 3].all() and bad[0].sum() == bad[0, 3].numel()
        assert bad[1].all() == (mode == "int8")


def test_layers_move_to_the_device_and_back(device):
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(6, 8, 3, padding=1)
    dense.weight.data = torch.randint(9, dense.weight.shape).float()
    layer = CodebookConv2d.from_dense(dense).eval()
    x = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        for layout in ("codebook", "codebook_int8"):
            want = layer.cpu().pack(layout)(x)
            torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), want)


def test_accepts_unaligned_memory(emulator):
    tensors = problem()
    moved = {n: emulator.unaligned(t.to("cuda")) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    for mode in ops.CODEBOOK_MODES:
        torch.testing.assert_close(
            ops.codebook_conv2d(**moved, kernel_size=3, mode=mode).cpu(),
            ops.codebook_conv2d(**tensors, kernel_size=3, mode=mode),
        )
