"""blocked_matmul on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import blocked_matmul, blocked_matmul_inference, blocked_pack, csr_pack

OPS = torch.ops.tersetorch
SHAPES = [(10, 70, 9), (300, 40, 1), (1, 300, 2), (0, 5, 3), (6, 0, 2), (6, 9, 0)]


def problem(rows=10, columns=70, batch=9, dtype=torch.float32, way="float32", column_block=32):
    """Arguments of a random product on the CPU; row 3 is empty and row 4 full."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows, columns, generator=generator) < 0.2
    kept[3:4], kept[4:5] = False, True
    row_offsets, col_indices, _ = csr_pack(kept.float())
    packed = blocked_pack(row_offsets, col_indices, columns=columns, column_block=column_block)
    nnz = col_indices.numel()
    arguments = {
        "x": torch.randn(batch, columns, generator=generator).to(dtype),
        **dict(zip(("block_offsets", "segments", "indices"), packed, strict=False)),
        "values": torch.randn(nnz, generator=generator),
        "bias": torch.randn(rows, generator=generator).to(dtype),
    }
    if way == "bfloat16":
        arguments["values"] = arguments["values"].bfloat16()
    if way == "codes":
        arguments["values"] = torch.randint(0, 7, (nnz,), generator=generator, dtype=torch.uint8)
        arguments["codebook"] = torch.randn(7, generator=generator)
    return arguments | {"out_features": rows, "column_block": column_block}


def on(device, arguments):
    return {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


def assert_close(got, want):
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if want.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu(), want, **tolerance)


@pytest.mark.parametrize("way", ["float32", "bfloat16", "codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_equals_the_cpu(device, rows, columns, batch, dtype, way):
    arguments = problem(rows, columns, batch, dtype, way)
    moved = on(device, arguments)
    for relu in (False, True):
        want = blocked_matmul(**arguments, relu=relu)
        for op in (blocked_matmul, blocked_matmul_inference):
            assert_close(op(**moved, relu=relu), want)


@pytest.mark.parametrize("way", ["float32", "codes"])
def test_gradients_equal_those_of_the_cpu(device, way):
    names = ["x", "bias", "codebook" if way == "codes" else "values"]

    def gradients(arguments):
        leaves = [arguments[name].requires_grad_() for name in names]
        y = blocked_matmul(**arguments, relu=True)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    arguments = problem(way=way)
    for got, want in zip(gradients(on(device, arguments)), gradients(arguments), strict=True):
        assert_close(got, want)


def test_packs_where_the_rows_lie(device):
    row_offsets, col_indices, _ = csr_pack(torch.eye(300, 70))
    want = blocked_pack(row_offsets, col_indices, columns=70, column_block=32)
    got = blocked_pack(row_offsets.to(device), col_indices.to(device), columns=70, column_block=32)
    for a, b in zip(got, want, strict=True):
        assert a.device.type == "cuda"
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("way", ["float32", "bfloat16", "codes"])
def test_accepts_unaligned_memory_and_strides(emulator, way):
    arguments = problem(way=way)
    want = blocked_matmul(**arguments)
    moved = on("cuda", arguments)
    for name, argument in moved.items():
        if isinstance(argument, torch.Tensor):
            moved[name] = emulator.unaligned(argument)
    assert moved["segments"].data_ptr() % 4 == 1
    assert_close(blocked_matmul(**moved), want)
    moved["x"] = arguments["x"].to("cuda").t().contiguous().t()
    assert_close(blocked_matmul(**moved), want)


def test_runs_on_the_current_stream_of_its_device(emulator):
    moved = on("cuda:1", problem())
    emulator.use_stream(1, 0x20)
    before = emulator.launches()
    y = blocked_matmul(**moved)
    emulator.use_stream(1, 0)
    assert y.device == torch.device("cuda:1")
    assert emulator.launches() == before + 1
    assert emulator.stream() == 0x2020
    moved["segments"] = moved["segments"].to("cuda:0")
    with pytest.raises(RuntimeError, match="blocked_matmul: segments must be on cuda:1 like the other tensors, got cu"):
        blocked_matmul_inference(**moved)


def test_damaged_weights_give_nan(device):
    arguments = problem(300, 70)
    want = blocked_matmul(**arguments)
    arguments["block_offsets"][1] += 1
    got = blocked_matmul(**on(device, arguments)).cpu()
    assert got[:, :256].isnan().all()
    torch.testing.assert_close(got[:, 256:], want[:, 256:])


def test_failed_launches_are_reported(emulator):
    moved = on("cuda", problem())
    emulator.fail_launches(719)
    try:
        with pytest.raises(RuntimeError, match="blocked_matmul: CUDA must accept the launch, got cudaError_t 719"):
            blocked_matmul(**moved)
    finally:
        emulator.fail_launches(0)


def test_registration_is_sound(device):
    arguments = on(device, problem(batch=3, way="codes"))
    torch.library.opcheck(OPS.blocked_matmul_inference.default, (*arguments.values(), True))
