import pytest
import torch

from tersetorch.ops import (
    bitmap_from_rows,
    bitmap_matmul,
    bitmap_matmul_inference,
    bitmap_pack,
    bitmap_to_rows,
    csr_matmul,
)

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows, columns, density, seed=0, entries=None, int8=False):
    """A random weight dense, and as arguments of bitmap_matmul."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=g), 0.0)
    bitmap, row_offsets, values = bitmap_pack(dense)
    weight = {"bitmap": bitmap, "row_offsets": row_offsets, "values": values}
    if entries is not None:
        table = torch.cat([torch.zeros(1), torch.randn(entries - 1, generator=g)])
        codes = torch.randint(1, entries, values.shape, generator=g)
        dense = torch.zeros_like(dense).masked_scatter(kept, table[codes])
        weight |= {"values": codes.to(torch.uint8), "codebook": table}
    if int8:
        scales = torch.rand(rows, generator=g) + 0.01
        whole = torch.randint(-127, 128, values.shape, generator=g)
        dense = torch.zeros_like(dense).masked_scatter(kept, whole.float()) * scales[:, None]
        weight |= {"values": whole.to(torch.int8), "scales": scales}
    return dense, weight


KINDS = [{}, {"entries": 2}, {"entries": 32}, {"entries": 33}, {"entries": 256}, {"int8": True}]


def assert_close_sum(got, left, right, extra=None):
    """got must be left @ right (+ extra) but for what float32 sums may lose: (terms + 3) * 2^-24 * sum |terms|."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    allowed = (left.shape[-1] + 3) * EPSILON * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (90, 784), (64, 64), (65, 65), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 9])
def test_equals_the_dense_product(rows, columns, kind, batch):
    dense, weight = random_weight(rows, columns, 0.3, **kind)
    x, bias = random(batch, columns), random(rows, seed=2)
    y = bitmap_matmul(x, bias=bias, **weight)
    assert y.dtype == torch.float32
    assert_close_sum(y, x, dense.T, bias)
    assert torch.equal(bitmap_matmul_inference(x, bias=bias, **weight), y)
    assert torch.equal(bitmap_matmul(x, bias=bias, relu=True, **weight), y.relu())
    y = bitmap_matmul(x.bfloat16(), **weight)
    assert y.dtype == torch.bfloat16
    assert_close_sum(y, x.bfloat16(), dense.T)
    if not kind:
        y = bitmap_matmul(x, **weight | {"values": weight["values"].bfloat16()})
        assert_close_sum(y, x, dense.bfloat16().T)


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_int8_sums_rounded_numbers_exactly(rows, columns, batch):
    dense, weight = random_weight(rows, columns, 0.3, int8=True)
    x, bias = random(batch, columns), random(rows, seed=2)
    y = bitmap_matmul(x, bias=bias, mode="int8", **weight)
    largest = x.abs().amax(1, keepdim=True) if columns else torch.zeros(batch, 1)
    s = largest / 127
    q = (x * (127 / largest)).round()
    whole = (dense / weight["scales"][:, None]).round()
    want = (q.double() @ whole.double().T) * (s * weight["scales"]).double() + bias.double()
    torch.testing.assert_close(y.double(), want, rtol=3e-7, atol=1e-6)
    # The error that the docstring states.
    allowed = s.double() / 2 * dense.double().abs().sum(1) * 1.001 + 1e-4
    assert ((y.double() - (x.double() @ dense.double().T + bias)).abs() <= allowed).all()
    assert torch.equal(bitmap_matmul_inference(x, bias=bias, mode="int8", relu=True, **weight), y.relu())


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_full_weights(density, kind):
    dense, weight = random_weight(33, 200, density, **kind)
    for batch in (1, 4):
        x = random(batch, 200)
        assert_close_sum(bitmap_matmul(x, **weight), x, dense.T)


def test_one_dense_row_among_empty_ones():
    dense = torch.zeros(600, 500)
    dense[257] = random(500)
    x = random(2, 500)
    assert_close_sum(bitmap_matmul(x, *bitmap_pack(dense)), x, dense.T)


def test_columns_beyond_16_bits():
    dense = torch.zeros(2, 70_001)
    dense[0, 0], dense[0, 70_000], dense[1, 65_535], dense[1, 65_536] = 1, 2, 3, 4
    x = random(1, 70_001)
    assert_close_sum(bitmap_matmul(x, *bitmap_pack(dense)), x, dense.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_missing_weight_never_meets_x(kind, value):
    dense, weight = random_weight(40, 130, 0.2, **kind)
    x = random(2, 130)
    x[1, 100] = value
    y = bitmap_matmul(x, **weight)
    assert bool(y[0].isfinite().all())
    assert torch.equal(y[1].isfinite(), dense[:, 100] == 0)


def test_infinite_and_nan_weights_reach_their_row_alone():
    dense, _ = random_weight(5, 100, 0.5)
    dense[1, 3], dense[2, 4] = float("inf"), float("nan")
    x = random(1, 100).abs() + 1
    y = bitmap_matmul(x, *bitmap_pack(dense))[0]
    assert y.isfinite().tolist() == [True, False, False, True, True]
    assert y[1] == float("inf") and bool(y[2].isnan())
    assert bool(bitmap_matmul(x, *bitmap_pack(dense), relu=True)[0, 2].isnan())


def test_int8_gives_nan_for_a_sample_that_has_no_scale():
    _, weight = random_weight(9, 70, 0.5, int8=True)
    x = random(3, 70)
    x[1, 5] = float("inf")
    y = bitmap_matmul(x, mode="int8", **weight)
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())


def test_accepts_leading_dimensions_and_strides():
    dense, weight = random_weight(12, 30, 0.4)
    x = random(4, 3, 60)
    for view in (x[..., ::2], x[..., :30].transpose(0, 1), x[:, 0, 30:], x[0, 0, 1::2], x[:, :, :30].permute(1, 0, 2)):
        y = bitmap_matmul(view, **weight)
        assert y.shape == (*view.shape[:-1], 12)
        assert_close_sum(y.reshape(-1, 12), view.reshape(-1, 30), dense.T)


def unaligned(tensor):
    """The same numbers one byte after an aligned address."""
    moved = torch.frombuffer(bytearray(b"?" + tensor.numpy().tobytes()), dtype=tensor.dtype, offset=1).view_as(tensor)
    assert moved.data_ptr() % 4 == 1
    return moved


@pytest.mark.parametrize("kind", KINDS)
def test_accepts_unaligned_memory(kind):
    _, weight = random_weight(40, 300, 0.4, **kind)
    x, bias = random(3, 300), random(40, seed=2)
    moved = {name: unaligned(t) for name, t in weight.items()}
    for mode in ("exact", "int8") if "scales" in weight else ("exact",):
        y = bitmap_matmul(x, bias=bias, mode=mode, **weight)
        assert torch.equal(bitmap_matmul(unaligned(x), bias=unaligned(bias), mode=mode, **moved), y)
    columns = bitmap_to_rows(weight["bitmap"], weight["row_offsets"], columns=300, nnz=weight["values"].numel())
    moved_columns = bitmap_to_rows(moved["bitmap"], moved["row_offsets"], columns=300, nnz=weight["values"].numel())
    assert torch.equal(columns, moved_columns)
    assert torch.equal(bitmap_from_rows(moved["row_offsets"], unaligned(columns), columns=300), weight["bitmap"])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_batches_do_not_change_a_bit(kind):
    _, weight = random_weight(801, 1000, 0.3, **kind)
    x = random(4, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bitmap_matmul(x, **weight)
        for several in (2, 3):
            torch.set_num_threads(several)
            assert torch.equal(bitmap_matmul(x, **weight), alone)
    finally:
        torch.set_num_threads(threads)


# ---- packing


def test_rows_and_bitmap_tell_the_same():
    for columns in (1, 63, 64, 65, 300):
        dense, weight = random_weight(21, columns, 0.4)
        rows = dense.to_sparse_csr()
        nnz = weight["values"].numel()
        col_indices = bitmap_to_rows(weight["bitmap"], weight["row_offsets"], columns=columns, nnz=nnz)
        assert torch.equal(col_indices, rows.col_indices().int())
        assert torch.equal(weight["row_offsets"], rows.crow_indices().int())
        assert torch.equal(weight["values"], rows.values())
        bitmap = bitmap_from_rows(weight["row_offsets"], col_indices, columns=columns)
        assert torch.equal(bitmap, weight["bitmap"])


@pytest.mark.parametrize(
    "row_offsets,col_indices,match",
    [
        ([0, 2, 1], [0], "row_offsets must rise from 0 to 1"),
        ([0, 1, 2], [0], "row_offsets must rise from 0 to 1"),
        ([0, 2], [1, 1], r"col_indices must rise within a row and lie in \[0, 5\)"),
        ([0, 2], [1, 0], "col_indices must rise"),
        ([0, 1], [5], "col_indices must rise"),
        ([0, 1], [-1], "col_indices must rise"),
    ],
)
def test_packing_refuses_damaged_rows(row_offsets, col_indices, match):
    with pytest.raises(RuntimeError, match=f"bitmap_from_rows: {match}"):
        bitmap_from_rows(torch.tensor(row_offsets).int(), torch.tensor(col_indices).int(), columns=5)


def test_packing_checks_types():
    with pytest.raises(TypeError, match=r"bitmap_pack: weight must be float32 or bfloat16, got torch.int64"):
        bitmap_pack(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bitmap_pack: weight must be \[out, in\], got shape \(2,\)"):
        bitmap_pack(torch.zeros(2))
    with pytest.raises(TypeError, match=r"bitmap_from_rows: col_indices must be int32, got torch.int64"):
        bitmap_from_rows(torch.zeros(1).int(), torch.zeros(0).long(), columns=5)
    with pytest.raises(TypeError, match=r"bitmap_to_rows: bitmap must be int64, got torch.int32"):
        bitmap_to_rows(torch.zeros(1, 1).int(), torch.zeros(2).int(), columns=5, nnz=0)
    with pytest.raises(RuntimeError, match=r"bitmap_to_rows: bitmap must be \[out, 2\] for 65 columns, got 1 words"):
        bitmap_to_rows(torch.zeros(1, 1).long(), torch.zeros(2).int(), columns=65, nnz=0)


# ---- gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_gradients_are_those_of_rows(kind, relu, leading):
    _, weight = random_weight(20, 50, 0.4, **kind)
    nnz = weight["values"].numel()
    col_indices = bitmap_to_rows(weight["bitmap"], weight["row_offsets"], columns=50, nnz=nnz)
    x, bias, grad_y = random(*leading, 50).requires_grad_(), random(20, seed=2).requires_grad_(), random(*leading, 20)
    learned = weight.get("codebook") if kind else weight["values"]
    values = weight["values"]
    if learned is not None:
        learned.requires_grad_()
    if "scales" in weight:
        values = values * torch.repeat_interleave(weight["scales"], weight["row_offsets"].diff())
    y = bitmap_matmul(x, bias=bias, relu=relu, **weight)
    same = csr_matmul(x, weight["row_offsets"], col_indices, values, bias, weight.get("codebook"))
    same = same.relu() if relu else same
    leaves = [leaf for leaf in (x, bias, learned) if leaf is not None]
    got = torch.autograd.grad(y, leaves, grad_y)
    want = torch.autograd.grad(same, leaves, grad_y)
    torch.testing.assert_close(got, want)


def test_second_derivatives_are_those_of_the_dense_product():
    dense, weight = random_weight(8, 12, 0.4)
    kept = dense != 0

    def penalty(y, x, w):
        grad_x, grad_w = torch.autograd.grad(y.pow(3).sum(), (x, w), create_graph=True)
        return torch.autograd.grad(grad_x.pow(2).sum() + grad_w.pow(2).sum(), (x, w))

    x, values = random(5, 12).requires_grad_(), weight["values"].requires_grad_()
    got = penalty(bitmap_matmul(x, weight["bitmap"], weight["row_offsets"], values), x, values)
    want = penalty(x @ torch.zeros(8, 12).masked_scatter(kept, values).T, x, values)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_rounding_has_no_gradient():
    _, weight = random_weight(8, 12, 0.4, int8=True)
    y = bitmap_matmul(random(2, 12).requires_grad_(), mode="int8", **weight)
    with pytest.raises(RuntimeError, match="bitmap_matmul: mode must be 'exact' to compute gradients, got 'int8'"):
        y.sum().backward()


def test_forward_mode_is_refused_instead_of_returning_zero():
    _, weight = random_weight(8, 12, 0.4)
    x = random(5, 12)
    with pytest.raises(RuntimeError, match="bitmap_matmul: x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: bitmap_matmul(x, **weight), (x,), (x,))


# ---- PyTorch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_is_sound(kind, dtype):
    _, weight = random_weight(8, 12, 0.4, **kind)
    x, bias = random(5, 12, dtype=dtype), random(8, seed=2)
    names = ("bitmap", "row_offsets", "values")
    arguments = (x, *(weight[n] for n in names), bias, weight.get("codebook"), weight.get("scales"))
    torch.library.opcheck(OPS.bitmap_matmul_inference.default, (*arguments, "exact", True))
    if "scales" in weight:
        torch.library.opcheck(OPS.bitmap_matmul_inference.default, (*arguments, "int8"))
    for leaf in (x, bias, weight.get("codebook"), None if kind else weight["values"]):
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(OPS.bitmap_matmul.default, (*arguments, "exact", False))
    torch.library.opcheck(OPS.bitmap_matmul.default, arguments)


def test_packing_is_registered_soundly():
    dense, weight = random_weight(8, 70, 0.4)
    torch.library.opcheck(OPS.bitmap_pack.default, (dense,), test_utils=("test_schema", "test_faketensor"))
    nnz = weight["values"].numel()
    torch.library.opcheck(OPS.bitmap_to_rows.default, (weight["bitmap"], weight["row_offsets"], 70, nnz))
    columns = bitmap_to_rows(weight["bitmap"], weight["row_offsets"], columns=70, nnz=nnz)
    torch.library.opcheck(OPS.bitmap_from_rows.default, (weight["row_offsets"], columns, 70))


@pytest.mark.parametrize("kind", KINDS[::2])
def test_compiles_without_a_graph_break_for_any_batch(kind):
    _, weight = random_weight(8, 12, 0.4, **kind)
    bias = random(8, seed=2).requires_grad_()

    def run(x):
        return bitmap_matmul(x, bias=bias, relu=True, **weight) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        x = random(batch, 12).requires_grad_()
        assert torch.equal(compiled(x), run(x))
        got = torch.autograd.grad(compiled(x).pow(2).sum(), [x, bias])
        torch.testing.assert_close(got, torch.autograd.grad(run(x).pow(2).sum(), [x, bias]))


def test_exports_with_a_dynamic_batch():
    _, weight = random_weight(8, 12, 0.4, int8=True)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return bitmap_matmul(x, mode="int8", **weight)

    exported = torch.export.export(Layer(), (random(5, 12),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert "bitmap_matmul" in str(exported.graph)
    x = random(11, 12)
    assert torch.equal(exported.module()(x), bitmap_matmul(x, mode="int8", **weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [bitmap_matmul, bitmap_matmul_inference])
def test_autocast_computes_in_float32_and_casts_the_result(op, dtype):
    _, weight = random_weight(8, 12, 0.4)
    x = random(5, 12)
    want = bitmap_matmul(x, **weight).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(op(x, **weight), want)
        half = op(x.to(dtype), **weight)
    assert torch.equal(half, bitmap_matmul(x.to(dtype).float(), **weight).to(dtype))


# ---- bad input


_, GOOD = random_weight(3, 70, 0.5)
GOOD["x"] = torch.zeros(2, 70)
NNZ = GOOD["values"].numel()
CODES = {"values": torch.ones(NNZ, dtype=torch.uint8), "codebook": torch.tensor([0.0, 1.0])}
INT8 = {"values": torch.ones(NNZ, dtype=torch.int8), "scales": torch.ones(3)}


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list; pass a torch.Tensor"),
        ({"x": torch.zeros(2, 70).double()}, TypeError, r"x must be float32 or bfloat16, got torch\.float64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., in\], got a scalar"),
        ({"x": torch.zeros(2, 64)}, ValueError, r"bitmap must be \[out, 1\] for 64 features, got shape \(3, 2\)"),
        ({"bitmap": GOOD["bitmap"].int()}, TypeError, r"bitmap must be int64, got torch\.int32"),
        ({"bitmap": GOOD["bitmap"][0]}, ValueError, r"bitmap must be \[out, 2\]"),
        ({"row_offsets": GOOD["row_offsets"].long()}, TypeError, r"row_offsets must be int32, got torch\.int64"),
        ({"row_offsets": GOOD["row_offsets"][1:]}, ValueError, r"row_offsets must be \[4\], got shape \(3,\)"),
        ({"values": torch.ones(NNZ, 1)}, ValueError, r"values must be \[nnz\]"),
        ({"values": CODES["values"]}, TypeError, "values must be float32 or bfloat16, got .*; pass the codebook"),
        ({"values": INT8["values"]}, TypeError, "values must be float32 or bfloat16, got .*; pass the codebook or"),
        ({"codebook": CODES["codebook"]}, TypeError, r"values must be uint8, got torch\.float32; pass codes"),
        ({"scales": INT8["scales"]}, TypeError, r"values must be int8, got torch\.float32; pass int8 values"),
        (INT8 | {"scales": torch.ones(4)}, ValueError, r"scales must be \[3\], got shape \(4,\)"),
        (CODES | {"scales": torch.ones(3)}, ValueError, "scales must be None beside a codebook"),
        (CODES | {"codebook": torch.ones(257)}, ValueError, "codebook must be .* at most 256.*"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[3\], got shape \(2,\)"),
        ({"mode": "fast"}, ValueError, r"mode must be one of \['exact', 'int8'\], got 'fast'"),
        ({"mode": "int8"}, ValueError, "mode 'int8' must come with int8 values and scales"),
        ({"values": torch.ones(NNZ, device="meta")}, ValueError, "values must be on the device of x, cpu, got meta"),
    ],
)
def test_rejects(bad, error, match):
    with pytest.raises(error, match=f"bitmap_matmul: {match}"):
        bitmap_matmul(**GOOD | bad)


def moved(**changes):
    bitmap, row_offsets = GOOD["bitmap"].clone(), GOOD["row_offsets"].clone()
    if "bit" in changes:
        bitmap[1, 1] |= 1 << changes["bit"]
    if "offset" in changes:
        row_offsets[1] = changes["offset"]
    return {"bitmap": bitmap, "row_offsets": row_offsets}


DAMAGED = [
    (moved(bit=6), "bitmap must have a bit for each value of its row"),
    (moved(bit=40), "bitmap must have a bit for each value of its row and none past the last column"),
    ({"bitmap": ~GOOD["bitmap"] & torch.tensor([-1, 63])}, "bitmap must have a bit"),
    ({"values": GOOD["values"][:-1]}, "row_offsets must never fall and stay in"),
    (moved(offset=-1), "row_offsets must never fall"),
    (moved(offset=NNZ + 1), "row_offsets must never fall"),
    (CODES | {"values": torch.full((NNZ,), 2, dtype=torch.uint8)}, r"codes must lie in \[0, 2\)"),
    (CODES | {"codebook": torch.zeros(0)}, r"codes must lie in \[0, 0\)"),
    (CODES | {"codebook": torch.ones(2)}, "codebook must begin with 0, the value of absent weights, got 1"),
]


@pytest.mark.parametrize("bad,match", DAMAGED)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_damaged_weights_are_refused(bad, match, batch):
    for op in (bitmap_matmul, bitmap_matmul_inference):
        with pytest.raises(RuntimeError, match=f"bitmap_matmul: {match}"):
            op(**GOOD | {"x": torch.zeros(batch, 70)} | bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"x": torch.zeros(2, 70).double()},
        {"x": torch.tensor(1.0)},
        {"x": torch.zeros(2, 60)},
        {"bitmap": GOOD["bitmap"].int()},
        {"row_offsets": GOOD["row_offsets"][1:]},
        {"values": CODES["values"]},
        {"values": INT8["values"]},
        {"codebook": torch.zeros(2)},
        CODES | {"codebook": torch.zeros(257)},
        INT8 | {"scales": torch.ones(2)},
        INT8 | {"scales": torch.ones(3).double()},
        {"bias": torch.zeros(2)},
        {"mode": "fast"},
        {"mode": "int8"},
        INT8 | {"mode": "int8", "x": torch.zeros(1, 131_073), "bitmap": torch.zeros(3, 2049, dtype=torch.int64)},
    ],
)
def test_native_checks_are_the_second_line(bad):
    with pytest.raises(RuntimeError, match=r"bitmap_matmul: .* must .* got"):
        bitmap_matmul_inference(**GOOD | bad)
