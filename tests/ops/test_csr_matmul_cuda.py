"""csr_matmul on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch.nn import SparseLinear
from tersetorch.ops import csr_matmul, csr_matmul_inference

OPS = torch.ops.tersetorch


def problem(rows=10, columns=70, batch=9, dtype=torch.float32, codes=False, seed=0):
    """Tensors of a random product on the CPU; row 3 is empty and row 4 full."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < 0.3
    kept[3:4], kept[4:5] = False, True
    row_offsets = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
    nnz = int(kept.sum())
    tensors = {
        "x": torch.randn(batch, columns, generator=generator).to(dtype),
        "row_offsets": row_offsets,
        "col_indices": kept.nonzero()[:, 1].int(),
        "values": torch.randn(nnz, generator=generator).to(dtype),
        "bias": torch.randn(rows, generator=generator).to(dtype),
    }
    if codes:
        tensors["values"] = torch.randint(0, 7, (nnz,), generator=generator, dtype=torch.uint8)
        tensors["codebook"] = torch.randn(7, generator=generator)
    return tensors


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def assert_close(got, want):
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if want.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu(), want, **tolerance)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", [(10, 70, 9), (5, 1, 1), (1, 300, 2), (0, 5, 3), (6, 0, 2), (6, 9, 0)])
def test_equals_the_cpu(device, rows, columns, batch, dtype, codes):
    tensors = problem(rows, columns, batch, dtype, codes)
    for relu in (False, True):
        want = csr_matmul(**tensors, relu=relu)
        for op in (csr_matmul, csr_matmul_inference):
            assert_close(op(**on(device, tensors), relu=relu), want)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_the_cpu(device, dtype, codes):
    tensors = problem(dtype=dtype, codes=codes)
    names = ["x", "bias", "codebook" if codes else "values"]

    def gradients(tensors):
        leaves = [tensors[name].requires_grad_() for name in names]
        y = csr_matmul(**tensors)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    for got, want in zip(gradients(on(device, tensors)), gradients(tensors), strict=True):
        assert_close(got, want)


def test_second_derivatives_equal_those_of_the_cpu(device):
    def penalty(tensors):
        x, values = tensors["x"].requires_grad_(), tensors["values"].requires_grad_()
        grads = torch.autograd.grad(csr_matmul(**tensors).pow(3).sum(), (x, values), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, values))

    tensors = problem(4, 20, 3)
    got = penalty(on(device, tensors))
    for a, b in zip(got, penalty(tensors), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-1)


def test_layers_move_to_the_device(device):
    torch.manual_seed(0)
    dense = torch.nn.Linear(30, 12)
    dense.weight.data *= torch.rand(12, 30) < 0.3
    layer = SparseLinear.from_dense(dense)
    x = torch.randn(2, 5, 30)
    want = layer(x).detach()
    layer.to(device)
    assert_close(layer(x.to(device)).detach(), want)
    with torch.no_grad():
        assert_close(layer(x.to(device)), want)


def test_accepts_strides_and_other_indices(device):
    tensors = problem()
    want = csr_matmul(**tensors)
    moved = on(device, tensors)
    moved["x"] = moved["x"].t().contiguous().t()
    assert_close(csr_matmul(**moved | {"col_indices": moved["col_indices"].to(torch.int16)}), want)
    moved |= {name: moved[name].long() for name in ("row_offsets", "col_indices")}
    assert_close(csr_matmul(**moved), want)


@pytest.mark.parametrize("codes", [False, True])
def test_accepts_unaligned_memory(emulator, codes):
    tensors = problem(codes=codes)
    want = csr_matmul(**tensors)
    moved = {name: emulator.unaligned(tensor.to("cuda")) for name, tensor in tensors.items()}
    assert moved["x"].data_ptr() % 4 == 1
    assert_close(csr_matmul(**moved), want)


def test_runs_on_the_current_stream_of_its_device(emulator):
    moved = {name: tensor.to("cuda:1") for name, tensor in problem().items()}
    emulator.use_stream(1, 0x20)
    before = emulator.launches()
    y = csr_matmul(**moved)
    emulator.use_stream(1, 0)
    assert y.device == torch.device("cuda:1")
    assert emulator.launches() == before + 2  # panels, product
    assert emulator.stream() == 0x2020
    moved["bias"] = moved["bias"].to("cuda:0")
    with pytest.raises(RuntimeError, match="csr_matmul: bias must be on cuda:1 like the other tensors, got cuda:0"):
        csr_matmul_inference(**moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [csr_matmul, csr_matmul_inference])
def test_autocast_computes_in_float32_and_casts_the_result(device, op, dtype):
    tensors = problem()
    moved = on(device, tensors)
    want = csr_matmul(**tensors).to(dtype)
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        y = op(**moved)
        half = op(**moved | {"x": moved["x"].to(dtype)})
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
    with pytest.raises(ValueError, match=r"csr_matmul: .* must be on the device of x, .* got .*; move one of them"):
        csr_matmul(**moved)
    with pytest.raises(RuntimeError, match=f"csr_matmul: {name} must be on .*(cuda|CUDA).*; move it"):
        csr_matmul_inference(**moved)


@pytest.mark.parametrize(
    "bad",
    [
        {"col_indices": torch.tensor([4, 5, 2], dtype=torch.int32)},
        {"col_indices": torch.tensor([4, -1, 2], dtype=torch.int32)},
        {"row_offsets": torch.tensor([0, 3, 1, 3], dtype=torch.int32)},
        {"row_offsets": torch.tensor([0, -5, 1, 3], dtype=torch.int32)},
        {"row_offsets": torch.tensor([1, 1, 2, 3], dtype=torch.int32)},
        {"row_offsets": torch.tensor([0, 1, 2, 4], dtype=torch.int32)},
        {"values": torch.tensor([0, 2, 1], dtype=torch.uint8)},
        {"codebook": torch.ones(0)},
    ],
)
def test_damaged_weights_become_nan(device, bad):
    good = {
        "x": torch.ones(2, 5),
        "row_offsets": torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        "col_indices": torch.tensor([4, 0, 2], dtype=torch.int32),
        "values": torch.zeros(3, dtype=torch.uint8),
        "codebook": torch.ones(2),
    }
    moved = on(device, good | bad)
    assert csr_matmul(**moved).cpu().isnan().any(1).all()
    grad_y = torch.ones(2, 3).to(device)
    weight = [moved[name] for name in ("row_offsets", "col_indices", "values")]
    assert OPS.csr_matmul_grad_x(grad_y, *weight, 5, moved["codebook"]).cpu().isnan().all()


@pytest.mark.parametrize(
    "error,sentence",
    [
        (35, "a CUDA tensor needs NVIDIA's driver, as new as the nvcc of the build, got an older one or none"),
        (100, "a CUDA tensor needs NVIDIA's driver"),
        (209, "the build must have kernels for this device's architecture, got others"),
        (700, "CUDA must accept the launch, got cudaError_t 700"),
    ],
)
def test_a_launch_that_fails_says_why(emulator, error, sentence):
    moved = {name: tensor.to("cuda") for name, tensor in problem().items()}
    emulator.fail_launches(error)
    try:
        with pytest.raises(RuntimeError, match=f"csr_matmul: {sentence}"):
            csr_matmul(**moved)
    finally:
        emulator.fail_launches(0)


def test_shapes_are_checked(device):
    moved = on(device, problem())
    with pytest.raises(RuntimeError, match=r"csr_matmul: values must be \[.*\], got"):
        csr_matmul_inference(**moved | {"values": moved["values"][1:]})
    with pytest.raises(RuntimeError, match="csr_matmul_grad_x: grad_y must be"):
        weight = [moved[name] for name in ("row_offsets", "col_indices", "values")]
        OPS.csr_matmul_grad_x(moved["x"], *weight, 70)


def test_registration_is_sound(device):
    tensors = on(device, problem(batch=3))
    torch.library.opcheck(OPS.csr_matmul_inference.default, tuple(tensors.values()))
    x, row_offsets, col_indices, values, _ = tensors.values()
    grad_y = torch.ones(3, 10).to(device)
    torch.library.opcheck(OPS.csr_matmul_grad_x.default, (grad_y, row_offsets, col_indices, values, 70))
    torch.library.opcheck(OPS.csr_matmul_grad_values.default, (grad_y, x, row_offsets, col_indices))
