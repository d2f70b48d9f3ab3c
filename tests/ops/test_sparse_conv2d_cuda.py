"""sparse_conv2d on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch.nn import SparseCodebookConv2d, SparseConv1d, SparseConv2d
from tersetorch.ops import sparse_conv2d, sparse_conv2d_inference

OPS = torch.ops.tersetorch
LAST = torch.channels_last
SIZES = ("kernel_size", "stride", "padding", "dilation")


def problem(shape=(2, 6, 7, 9), out=5, kernel=(3, 3), groups=1, dtype=torch.float32, codes=False, seed=0, density=0.3):
    """Tensors of a random convolution on the CPU; filter 3 is empty and filter 2 full."""
    generator = torch.Generator().manual_seed(seed)
    columns = shape[1] // groups * kernel[0] * kernel[1]
    kept = torch.rand(out, columns, generator=generator) < density
    kept[3:4], kept[2:3] = False, True
    nnz = int(kept.sum())
    tensors = {
        "x": torch.randn(*shape, generator=generator).to(dtype),
        "row_offsets": torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int(),
        "col_indices": kept.nonzero()[:, 1].int(),
        "values": torch.randn(nnz, generator=generator).to(dtype),
        "bias": torch.randn(out, generator=generator).to(dtype),
    }
    if codes:
        tensors["values"] = torch.randint(0, 7, (nnz,), generator=generator, dtype=torch.uint8)
        tensors["codebook"] = torch.randn(7, generator=generator)
    return tensors


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def pair(n):
    return [n, n] if isinstance(n, int) else list(n)


def inference(
    kernel_size,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    relu=False,
    mode="exact",
    codebook=None,
    bias=None,
    **tensors,
):
    sizes = dict(zip(SIZES, map(pair, (kernel_size, stride, padding, dilation)), strict=True))
    rest = {"groups": groups, "relu": relu, "mode": mode}
    return sparse_conv2d_inference(**tensors, bias=bias, codebook=codebook, **sizes, **rest)


def assert_close(got, want):
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if want.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu(), want, **tolerance)


CASES = [
    ((2, 6, 7, 9), 5, (3, 3), {"padding": 1, "relu": True}),
    ((1, 4, 9, 8), 7, (3, 2), {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}),
    ((1, 8, 6, 6), 6, (3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    ((3, 5, 12, 4), 4, (1, 1), {"relu": True}),
    ((0, 3, 5, 5), 4, (3, 3), {}),
    ((2, 3, 5, 5), 0, (3, 3), {}),
]


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape,out,kernel,sizes", CASES)
def test_equals_the_cpu(device, shape, out, kernel, sizes, memory_format, dtype, codes):
    tensors = problem(shape, out, kernel, sizes.get("groups", 1), dtype, codes)
    tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
    want = sparse_conv2d(**tensors, kernel_size=kernel, **sizes)
    moved = on(device, tensors)
    for op in (sparse_conv2d, inference):
        y = op(**moved, kernel_size=kernel, **sizes)
        assert_close(y, want)
        assert y.stride() == want.stride()


# So much work that tensor cores take it, zeros and all.
@pytest.mark.parametrize(
    "mode,dtype,memory_format",
    [("int8", torch.float32, torch.contiguous_format), ("bfloat16", torch.bfloat16, LAST)],
)
def test_batches_of_images_equal_those_of_the_cpu(device, mode, dtype, memory_format):
    tensors = problem((13, 32, 7, 7), 64, dtype=dtype, density=0.9)
    tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
    want = sparse_conv2d(**tensors, kernel_size=3, padding=1, relu=True, mode=mode)
    y = sparse_conv2d(**on(device, tensors), kernel_size=3, padding=1, relu=True, mode=mode)
    # Sums of 288 products, of numbers up to 4, in another order, rounded to bfloat16.
    torch.testing.assert_close(y.cpu(), want, rtol=0 if mode == "int8" else 2**-7, atol=0 if mode == "int8" else 1e-3)
    assert y.stride() == want.stride()


@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape,out,kernel,sizes", CASES)
def test_modes_equal_those_of_the_cpu(device, shape, out, kernel, sizes, memory_format, dtype, mode):
    tensors = problem(shape, out, kernel, sizes.get("groups", 1), dtype, codes=shape[0] == 2)
    tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
    want = sparse_conv2d(**tensors, kernel_size=kernel, **sizes, mode=mode)
    for op in (sparse_conv2d, inference):
        y = op(**on(device, tensors), kernel_size=kernel, **sizes, mode=mode)
        assert_close(y, want)
        assert y.stride() == want.stride()
        if mode == "int8":
            assert torch.equal(y.cpu(), want)


def test_int8_makes_what_is_not_finite_nan(device):
    tensors = problem()
    tensors["x"][1, 2, 3, 4] = float("inf")
    tensors["values"][0] = float("nan")
    y = sparse_conv2d(**on(device, tensors), kernel_size=3, mode="int8").cpu()
    assert y[1].isnan().all() and y[0, 0].isnan().all() and not y[0, 1:].isnan().any()


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_the_cpu(device, dtype, codes):
    tensors = problem(dtype=dtype, codes=codes)
    names = ["x", "bias", "codebook" if codes else "values"]

    def gradients(tensors):
        leaves = [tensors[name].requires_grad_() for name in names]
        y = sparse_conv2d(**tensors, kernel_size=3, padding=1, stride=2, relu=True)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    for got, want in zip(gradients(on(device, tensors)), gradients(tensors), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("kind", [SparseConv2d, SparseConv1d, SparseCodebookConv2d])
def test_layers_move_to_the_device_and_back(device, kind):
    torch.manual_seed(0)
    dense = kind.dense_type(6, 8, 3, padding=1)
    kept = torch.rand(dense.weight.shape) < 0.3
    dense.weight.data = torch.where(kept, torch.randint(1, 9, kept.shape).float(), 0.0)
    layer = kind.from_dense(dense).eval()
    x = torch.randn(2, 6, *[9] * kind.dims)
    want = layer(x).detach()
    layer.to(device)
    assert not any(name.startswith("packed") for name, _ in layer.named_buffers())
    for training in (True, False):
        layer.train(training)
        assert_close(layer(x.to(device)).detach(), want)
        with torch.no_grad():
            assert_close(layer(x.to(device)), want)
        assert not any(name.startswith("packed") for name, _ in layer.named_buffers())
    layer.load_state_dict(layer.state_dict())
    layer.cpu()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer.eval()(x), want)
    assert any(name.startswith("packed") for name, _ in layer.named_buffers())


def test_accepts_strides_and_other_indices(device):
    tensors = problem()
    want = sparse_conv2d(**tensors, kernel_size=3)
    moved = on(device, tensors)
    moved["x"] = moved["x"].transpose(2, 3).contiguous().transpose(2, 3)
    moved |= {name: moved[name].long() for name in ("row_offsets", "col_indices")}
    assert_close(sparse_conv2d(**moved, kernel_size=3), want)
    assert_close(sparse_conv2d(**moved | {"x": moved["x"][0]}, kernel_size=3), want[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_accepts_unaligned_memory(emulator, memory_format):
    tensors = problem(codes=True)
    want = sparse_conv2d(**tensors, kernel_size=3)
    x = emulator.unaligned(tensors["x"].to("cuda"))
    if memory_format == LAST:
        last = tensors["x"].permute(0, 2, 3, 1).contiguous()
        x = emulator.unaligned(last.to("cuda")).permute(0, 3, 1, 2)
    moved = {name: emulator.unaligned(tensor.to("cuda")) for name, tensor in tensors.items()} | {"x": x}
    assert x.data_ptr() % 4 == 1 and x.is_contiguous(memory_format=memory_format)
    y = sparse_conv2d(**moved, kernel_size=3)
    assert y.is_contiguous(memory_format=memory_format)
    assert_close(y, want)


def test_runs_on_the_current_stream_of_its_device(emulator):
    moved = {name: tensor.to("cuda:1") for name, tensor in problem().items()}
    emulator.use_stream(1, 0x20)
    before = emulator.launches()
    y = sparse_conv2d(**moved, kernel_size=3)
    emulator.use_stream(1, 0)
    assert y.device == torch.device("cuda:1")
    assert emulator.launches() == before + 1
    assert emulator.stream() == 0x2020


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [sparse_conv2d, inference])
def test_autocast_computes_in_float32_and_casts_the_result(device, op, dtype):
    tensors = problem()
    moved = on(device, tensors)
    want = sparse_conv2d(**tensors, kernel_size=3).to(dtype)
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        y = op(**moved, kernel_size=3)
        half = op(**moved | {"x": moved["x"].to(dtype)}, kernel_size=3)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)
    assert y.dtype == half.dtype == dtype
    torch.testing.assert_close(y.cpu(), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half.cpu(), want, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["x", "row_offsets", "col_indices", "values", "bias", "codebook"])
def test_tensors_on_two_devices_are_refused(device, name):
    tensors = problem(codes=True)
    moved = on(device, tensors)
    moved[name] = tensors[name]
    with pytest.raises(ValueError, match=r"sparse_conv2d: .* must be on the device of x, .* got .*; move one of them"):
        sparse_conv2d(**moved, kernel_size=3)
    with pytest.raises(RuntimeError, match=f"sparse_conv2d: {name} must be on .*(cuda|CUDA).*; move it"):
        inference(**moved, kernel_size=3)


@pytest.mark.parametrize(
    "bad,filters",
    [
        ({"col_indices": torch.tensor([4, 8, 2], dtype=torch.int32)}, [1]),
        ({"col_indices": torch.tensor([4, 0, -1], dtype=torch.int32)}, [2]),
        ({"row_offsets": torch.tensor([0, 3, 1, 3], dtype=torch.int32)}, [1]),
        ({"row_offsets": torch.tensor([0, -5, 1, 3], dtype=torch.int32)}, [0, 1]),
        ({"row_offsets": torch.tensor([1, 1, 2, 3], dtype=torch.int32)}, [0]),
        ({"row_offsets": torch.tensor([0, 1, 2, 4], dtype=torch.int32)}, [2]),
        ({"values": torch.tensor([0, 2, 1], dtype=torch.uint8)}, [1]),
        ({"codebook": torch.ones(0)}, [0, 1, 2]),
    ],
)
def test_damaged_weights_become_nan(device, bad, filters):
    good = {
        "x": torch.ones(2, 2, 3, 3),
        "row_offsets": torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        "col_indices": torch.tensor([4, 0, 2], dtype=torch.int32),
        "values": torch.zeros(3, dtype=torch.uint8),
        "codebook": torch.ones(2),
    }
    y = sparse_conv2d(**on(device, good | bad), kernel_size=2, padding=1, relu=True).cpu()
    assert y.isnan().all((0, 2, 3)).tolist() == y.isnan().any(3).any(2).any(0).tolist()
    assert y.isnan().any(3).any(2).any(0).nonzero().flatten().tolist() == filters


def test_a_launch_that_fails_says_why(emulator):
    moved = {name: tensor.to("cuda") for name, tensor in problem().items()}
    emulator.fail_launches(700)
    try:
        with pytest.raises(RuntimeError, match="sparse_conv2d: CUDA must accept the launch, got cudaError_t 700"):
            sparse_conv2d(**moved, kernel_size=3)
    finally:
        emulator.fail_launches(0)


@pytest.mark.parametrize(
    "bad,sentence",
    [
        ({"values": torch.ones(3)}, r"values must be \[.*\], .* got"),
        ({"bias": torch.ones(4)}, r"bias must be \[5\], got"),
        ({"codebook": torch.ones(7)}, r"values must be \[.*\], uint8 codes beside a codebook, got"),
        ({"x": torch.ones(6, 7, 9)}, r"x must be \[N, C, H, W\], got 3-D"),
        ({"x": torch.ones(1, 6, 2, 9)}, "x must be as large as the kernel, got 2 x 9"),
    ],
)
def test_arguments_are_checked(device, bad, sentence):
    with pytest.raises(RuntimeError, match=f"sparse_conv2d: {sentence}"):
        inference(**on(device, problem() | bad), kernel_size=3)


def test_registration_is_sound(device):
    tensors = on(device, problem((1, 3, 5, 5)))
    rest = (None, [3, 3], [1, 1], [1, 1], [1, 1], 1, True)
    torch.library.opcheck(OPS.sparse_conv2d_inference.default, (*tensors.values(), *rest))
