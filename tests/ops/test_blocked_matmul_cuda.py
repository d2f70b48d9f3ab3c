"""blocked_matmul and its two modes on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch import ops
from tersetorch.ops import blocked_matmul, blocked_pack, csr_pack

OPS = torch.ops.tersetorch
SHAPES = [(10, 70, 9), (300, 40, 1), (1, 301, 2), (0, 5, 3), (6, 0, 2), (6, 9, 0)]
WAYS = ["float32", "bfloat16", "codes", "blocked_bfloat16", "blocked_int8"]
MODES = {"blocked_bfloat16": torch.bfloat16, "blocked_int8": torch.int8}


def op_of(way, twin=""):
    return getattr(ops, f"{way if way in MODES else 'blocked'}_matmul{twin}")


def rows_of(rows, columns):
    """Where the non-zeros of a random weight lie; row 3 is empty and row 4 full."""
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.2
    kept[3:4], kept[4:5] = False, True
    return csr_pack(kept.float())[:2]


def problem(rows=10, columns=70, batch=9, dtype=torch.float32, way="float32", column_block=32):
    """Arguments of a random product on the CPU."""
    generator = torch.Generator().manual_seed(1)
    row_offsets, col_indices = rows_of(rows, columns)
    nnz = col_indices.numel()
    values = torch.randn(nnz, generator=generator)
    arguments = {"x": torch.randn(batch, columns, generator=generator).to(dtype)}
    bias = torch.randn(rows, generator=generator).to(dtype)
    sizes = {"out_features": rows, "column_block": column_block}
    if way in MODES:
        values = (values if way == "blocked_bfloat16" else (values * 40).clamp(-127, 127)).to(MODES[way])
        pack = getattr(ops, f"{way}_pack")
        layout = pack(row_offsets, col_indices, values, columns=columns, column_block=column_block)
        names = ("block_offsets", "segments", "indices", "values", "row_scales", "row_sums")
        if way == "blocked_int8":
            layout = (*layout[:4], torch.rand(rows, generator=generator), layout[4])
        return arguments | dict(zip(names, layout, strict=False)) | {"bias": bias} | sizes
    *layout, _ = blocked_pack(row_offsets, col_indices, columns=columns, column_block=column_block)
    arguments |= dict(zip(("block_offsets", "segments", "indices"), layout, strict=True))
    if way == "bfloat16":
        values = values.bfloat16()
    if way == "codes":
        values = torch.randint(0, 7, (nnz,), generator=generator, dtype=torch.uint8)
    arguments |= {"values": values, "bias": bias}
    if way == "codes":
        arguments["codebook"] = torch.randn(7, generator=generator)
    return arguments | sizes


def on(device, arguments):
    return {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


def assert_close(got, want, way=None):
    """Integer sums have the same bits on every device."""
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if want.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    if way == "blocked_int8":
        tolerance = {"rtol": 0, "atol": 0, "equal_nan": True}
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu(), want, **tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_equals_the_cpu(device, rows, columns, batch, dtype, way):
    arguments = problem(rows, columns, batch, dtype, way)
    moved = on(device, arguments)
    for relu in (False, True):
        want = op_of(way)(**arguments, relu=relu)
        for op in (op_of(way), op_of(way, "_inference")):
            assert_close(op(**moved, relu=relu), want, way)


@pytest.mark.parametrize("way", MODES)
def test_samples_that_are_zero_tiny_or_not_finite_equal_the_cpu(device, way):
    arguments = problem(way=way)
    x = arguments["x"]
    x[1], x[2], x[3, 4], x[4, 5], x[5] = 0, x[2] * 2.0**-130, torch.nan, -torch.inf, x[5] * 2.0**100
    want = op_of(way)(**arguments)
    got = op_of(way)(**on(device, arguments))
    if way == "blocked_int8":
        assert_close(got, want, way)
    else:
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


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
    row_offsets, col_indices = rows_of(300, 70)
    for way in ("blocked", *MODES):
        rows = [row_offsets, col_indices]
        if way in MODES:
            rows.append(torch.arange(col_indices.numel()).to(MODES[way]))
        pack = getattr(ops, f"{way}_pack")
        want = pack(*rows, columns=70, column_block=32)
        got = pack(*(t.to(device) for t in rows), columns=70, column_block=32)
        for a, b in zip(got, want, strict=True):
            assert a.device.type == "cuda"
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("way", WAYS)
def test_accepts_unaligned_memory_and_strides(emulator, way):
    arguments = problem(way=way)
    want = op_of(way)(**arguments)
    moved = on("cuda", arguments)
    for name, argument in moved.items():
        if isinstance(argument, torch.Tensor):
            moved[name] = emulator.unaligned(argument)
    assert moved["segments"].data_ptr() % 4 == 1
    assert_close(op_of(way)(**moved), want, way)
    moved["x"] = arguments["x"].to("cuda").t().contiguous().t()
    assert_close(op_of(way)(**moved), want, way)


@pytest.mark.parametrize("way,kernels", [("float32", 2), ("blocked_bfloat16", 3), ("blocked_int8", 3)])
def test_runs_on_the_current_stream_of_its_device(emulator, way, kernels):
    moved = on("cuda:1", problem(way=way))
    emulator.use_stream(1, 0x20)
    before = emulator.launches()
    y = op_of(way)(**moved)
    emulator.use_stream(1, 0)
    assert y.device == torch.device("cuda:1")
    assert emulator.launches() == before + kernels
    assert emulator.stream() == 0x2020
    moved["segments"] = moved["segments"].to("cuda:0")
    with pytest.raises(RuntimeError, match=r"_matmul: segments must be on cuda:1 like the other tensors, got cuda:0"):
        op_of(way, "_inference")(**moved)


@pytest.mark.parametrize("way", WAYS)
def test_damaged_weights_give_nan(device, way):
    arguments = problem(300, 70, way=way)
    want = op_of(way)(**arguments)
    arguments["block_offsets"][1] += 1
    got = op_of(way)(**on(device, arguments)).cpu()
    assert got[:, :256].isnan().all()
    torch.testing.assert_close(got[:, 256:], want[:, 256:])


@pytest.mark.parametrize("way", MODES)
def test_backward_is_refused(device, way):
    moved = on(device, problem(way=way))
    y = op_of(way)(**moved | {"x": moved["x"].requires_grad_()})
    with pytest.raises(RuntimeError, match=f"{way}_matmul: must not be differentiated"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["float32", *MODES])
def test_failed_launches_are_reported(emulator, way):
    moved = on("cuda", problem(way=way))
    emulator.fail_launches(719)
    try:
        with pytest.raises(RuntimeError, match="_matmul: CUDA must accept the launch, got cudaError_t 719"):
            op_of(way)(**moved)
    finally:
        emulator.fail_launches(0)


@pytest.mark.parametrize("way", ["codes", *MODES])
def test_registration_is_sound(device, way):
    arguments = on(device, problem(batch=3, way=way))
    name = f"{way if way in MODES else 'blocked'}_matmul_inference"
    torch.library.opcheck(getattr(OPS, name).default, (*arguments.values(), True))
