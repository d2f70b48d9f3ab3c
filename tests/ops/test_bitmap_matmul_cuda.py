"""bitmap_matmul and bitmap_columns_matmul on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import (
    bitmap_columns_matmul,
    bitmap_columns_matmul_inference,
    bitmap_from_rows,
    bitmap_matmul,
    bitmap_matmul_inference,
    bitmap_pack,
    bitmap_to_rows,
)

OPS = torch.ops.tersetorch
WAYS = ["float32", "bfloat16", "codes", "int8"]


def problem(rows=10, columns=70, batch=9, dtype=torch.float32, way="float32", seed=0):
    """Tensors of a random product on the CPU; row 3 is empty and row 4 full."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < 0.3
    kept[3:4], kept[4:5] = False, True
    bitmap, row_offsets, _ = bitmap_pack(kept.float())
    nnz = int(kept.sum())
    tensors = {
        "x": torch.randn(batch, columns, generator=generator).to(dtype),
        "bitmap": bitmap,
        "row_offsets": row_offsets,
        "values": torch.randn(nnz, generator=generator),
        "bias": torch.randn(rows, generator=generator).to(dtype),
    }
    if way == "bfloat16":
        tensors["values"] = tensors["values"].bfloat16()
    if way == "codes":
        tensors["values"] = torch.randint(1, 7, (nnz,), generator=generator, dtype=torch.uint8)
        tensors["codebook"] = torch.cat([torch.zeros(1), torch.randn(6, generator=generator)])
    if way == "int8":
        tensors["values"] = torch.randint(-127, 128, (nnz,), generator=generator, dtype=torch.int8)
        tensors["scales"] = torch.rand(rows, generator=generator) / 64
    return tensors


def by_columns(rows=10, columns=70, batch=3, dtype=torch.float32, way="float32"):
    """Arguments of bitmap_columns_matmul: the weight of a problem, transposed; half of x is 0."""
    tensors = problem(columns, rows, batch, dtype, way)
    tensors["column_offsets"] = tensors.pop("row_offsets")
    tensors["x"] = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).relu().to(dtype)
    tensors["bias"] = torch.linspace(-1, 1, rows).to(dtype)
    return tensors


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def assert_close(got, want):
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if want.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu(), want, **tolerance)


SHAPES = [(10, 70, 9), (5, 1, 1), (1, 300, 2), (0, 5, 3), (6, 0, 2), (6, 9, 0)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_equals_the_cpu(device, rows, columns, batch, dtype, way):
    tensors = problem(rows, columns, batch, dtype, way)
    moved = on(device, tensors)
    for relu in (False, True):
        want = bitmap_matmul(**tensors, relu=relu)
        for op in (bitmap_matmul, bitmap_matmul_inference):
            assert_close(op(**moved, relu=relu), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_mode_int8_has_the_bits_of_the_cpu(device, rows, columns, batch, dtype):
    tensors = problem(rows, columns, batch, dtype, "int8")
    if batch > 1 and columns:
        tensors["x"][1, 0] = torch.inf
    want = bitmap_matmul(**tensors, mode="int8")
    got = bitmap_matmul(**on(device, tensors), mode="int8").cpu()
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_columns_equal_the_cpu(device, rows, columns, batch, dtype, way):
    tensors = by_columns(rows, columns, batch, dtype, way)
    moved = on(device, tensors)
    for relu in (False, True):
        want = bitmap_columns_matmul(**tensors, out_features=rows, relu=relu)
        for op in (bitmap_columns_matmul, bitmap_columns_matmul_inference):
            assert_close(op(**moved, out_features=rows, relu=relu), want)


@pytest.mark.parametrize("way", ["float32", "codes"])
@pytest.mark.parametrize("columns", [False, True])
def test_gradients_equal_those_of_the_cpu(device, columns, way):
    names = ["x", "bias", "codebook" if way == "codes" else "values"]

    def gradients(tensors):
        leaves = [tensors[name].requires_grad_() for name in names]
        y = bitmap_columns_matmul(**tensors, out_features=10) if columns else bitmap_matmul(**tensors, relu=True)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    tensors = by_columns(way=way) if columns else problem(way=way)
    for got, want in zip(gradients(on(device, tensors)), gradients(tensors), strict=True):
        assert_close(got, want)


def test_packs_where_the_weight_lies(device):
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).relu()
    want = bitmap_pack(weight)
    got = bitmap_pack(weight.to(device))
    columns = bitmap_to_rows(*got[:2], columns=100, nnz=got[2].numel())
    again = bitmap_from_rows(got[1], columns, columns=100)
    for a, b in zip((*got, again), (*want, want[0]), strict=True):
        assert a.device.type == "cuda"
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("way", WAYS)
def test_accepts_unaligned_memory_and_strides(emulator, way):
    tensors = problem(way=way)
    moved = {name: emulator.unaligned(tensor.to("cuda")) for name, tensor in tensors.items()}
    assert moved["bitmap"].data_ptr() % 8 == 1
    assert_close(bitmap_matmul(**moved), bitmap_matmul(**tensors))
    moved["x"] = tensors["x"].to("cuda").t().contiguous().t()
    assert_close(bitmap_matmul(**moved), bitmap_matmul(**tensors))
    if way != "int8":
        tensors = by_columns(way=way)
        moved = {name: emulator.unaligned(tensor.to("cuda")) for name, tensor in tensors.items()}
        want = bitmap_columns_matmul(**tensors, out_features=10)
        assert_close(bitmap_columns_matmul(**moved, out_features=10), want)


def test_runs_on_the_current_stream_of_its_device(emulator):
    moved = {name: tensor.to("cuda:1") for name, tensor in problem(way="int8").items()}
    emulator.use_stream(1, 0x20)
    before = emulator.launches()
    y = bitmap_matmul(**moved, mode="int8")
    emulator.use_stream(1, 0)
    assert y.device == torch.device("cuda:1")
    assert emulator.launches() == before + 3  # rounding, panels, product
    assert emulator.stream() == 0x2020
    moved["bias"] = moved["bias"].to("cuda:0")
    with pytest.raises(RuntimeError, match="bitmap_matmul: bias must be on cuda:1 like the other tensors, got cuda:0"):
        bitmap_matmul_inference(**moved)


def test_autocast_computes_in_float32_and_casts_the_result(device):
    tensors = problem()
    moved = on(device, tensors)
    want = bitmap_matmul(**tensors).bfloat16()
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        assert_close(bitmap_matmul(**moved), want)
        assert bitmap_matmul(**moved | {"x": moved["x"].half()}).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)


def test_damaged_weights_give_nan(device):
    tensors = problem(way="codes")
    want = bitmap_matmul(**tensors)
    tensors["values"][0] = 7
    got = bitmap_matmul(**on(device, tensors)).cpu()
    assert got[:, 0].isnan().all()
    torch.testing.assert_close(got[:, 1:], want[:, 1:])
    tensors = by_columns()
    tensors["bitmap"][5, 0] ^= 1
    tensors["x"][:, 5] = torch.tensor([1, 0, 1])
    got = bitmap_columns_matmul(**on(device, tensors), out_features=10).cpu()
    assert got.isnan().all(1).tolist() == [True, False, True]


def test_failed_launches_are_reported(emulator):
    moved = on("cuda", problem())
    emulator.fail_launches(719)
    try:
        with pytest.raises(RuntimeError, match="bitmap_matmul: CUDA must accept the launch, got cudaError_t 719"):
            bitmap_matmul(**moved)
    finally:
        emulator.fail_launches(0)


def test_shapes_are_checked(device):
    moved = on(device, problem(way="int8"))
    with pytest.raises(RuntimeError, match=r"bitmap_matmul: scales must be \[10\], got 9"):
        bitmap_matmul_inference(**moved | {"scales": moved["scales"][1:]})
    with pytest.raises(RuntimeError, match="bitmap_matmul: mode must be"):
        bitmap_matmul_inference(**moved, mode="int4")


def test_registration_is_sound(device):
    tensors = on(device, problem(batch=3, way="int8"))
    arguments = (*tensors.values(),)[:5]
    for mode in ("exact", "int8"):
        torch.library.opcheck(OPS.bitmap_matmul_inference.default, (*arguments, None, tensors["scales"], mode, True))
    columns = (*on(device, by_columns()).values(),)
    x, bitmap, values, bias, column_offsets = columns
    torch.library.opcheck(
        OPS.bitmap_columns_matmul_inference.default, (x, bitmap, column_offsets, values, bias, None, 10, True)
    )
