import pytest
import torch

from tersetorch import _native
from tersetorch.ops import blocked_matmul, blocked_matmul_inference, blocked_pack, csr_matmul

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows, columns, density, column_block, seed=0, codes=None):
    """A random weight dense, in compressed sparse rows and in blocks, as keyword arguments of the two ops."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    col_indices = kept.nonzero()[:, 1].int()
    block_offsets, segments, indices, sources = blocked_pack(
        row_offsets, col_indices, columns=columns, column_block=column_block
    )
    values = dense[kept]
    if codes is not None:
        values = torch.randint(codes, values.shape, generator=generator).to(torch.uint8)
    csr = {"row_offsets": row_offsets, "col_indices": col_indices, "values": values}
    blocked = {"block_offsets": block_offsets, "segments": segments, "indices": indices}
    blocked |= {"values": values[sources], "out_features": rows, "column_block": column_block}
    return dense, csr, blocked


def assert_close_sum(got, left, right, extra=None):
    """got must be left @ right (+ extra) but for what float32 sums may lose: (terms + 2) * 2^-24 * sum |terms|."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    allowed = (left.shape[-1] + 2) * EPSILON * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (300, 784), (256, 128), (257, 129), (513, 100), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 8, 17, 33, 64, 65, 200])
def test_equals_the_dense_product(rows, columns, batch):
    for column_block in (1 if columns < 200 else 97, 128, 1024):
        dense, _, weight = random_weight(rows, columns, 0.3, column_block)
        x, bias = random(batch, columns), random(rows, seed=2)
        y = blocked_matmul(x, bias=bias, **weight)
        assert y.dtype == torch.float32
        assert_close_sum(y, x, dense.T, bias)
        assert torch.equal(blocked_matmul_inference(x, bias=bias, **weight), y)
        assert torch.equal(blocked_matmul(x, bias=bias, relu=True, **weight), y.relu())
        weight["values"] = weight["values"].bfloat16()
        y = blocked_matmul(x.bfloat16(), **weight)
        assert y.dtype == torch.bfloat16
        assert_close_sum(y, x.bfloat16(), dense.bfloat16().T)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density):
    dense, _, weight = random_weight(300, 70, density, 32)
    x = random(40, 70)
    assert_close_sum(blocked_matmul(x, **weight), x, dense.T)


def test_one_dense_row_among_empty_ones():
    dense = torch.zeros(600, 500)
    dense[257] = random(500)
    row_offsets = torch.zeros(601, dtype=torch.int32)
    row_offsets[258:] = 500
    *layout, sources = blocked_pack(row_offsets, torch.arange(500).int(), columns=500, column_block=128)
    x = random(70, 500)
    y = blocked_matmul(x, *layout, dense[257][sources], out_features=600, column_block=128)
    assert_close_sum(y, x, dense.T)


def test_columns_beyond_16_bits():
    columns = 70_001
    row_offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    col_indices = torch.tensor([0, 70_000, 65_535, 65_536], dtype=torch.int32)
    *layout, sources = blocked_pack(row_offsets, col_indices, columns=columns, column_block=32768)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = random(9, columns)
    y = blocked_matmul(x, *layout, values[sources], out_features=2, column_block=32768)
    torch.testing.assert_close(y, torch.stack([x[:, 0] + 2 * x[:, -1], 3 * x[:, 65535] + 4 * x[:, 65536]], 1))


def test_codes_stand_for_entries_of_the_codebook():
    for entries in (1, 2, 255, 256):
        _, _, weight = random_weight(40, 90, 0.3, 64, codes=entries)
        codebook, bias = random(entries, seed=3), random(40, seed=2)
        for batch in (1, 20, 64):
            x = random(batch, 90)
            y = blocked_matmul(x, bias=bias, codebook=codebook, **weight)
            plain = weight | {"values": codebook[weight["values"].int()]}
            assert torch.equal(y, blocked_matmul(x, bias=bias, **plain))
            assert torch.equal(y, blocked_matmul_inference(x, bias=bias, codebook=codebook, **weight))


def test_infinity_and_nan_reach_only_the_rows_that_use_them():
    row_offsets, col_indices = torch.tensor([0, 1, 2, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    *layout, sources = blocked_pack(row_offsets, col_indices, columns=2, column_block=8)
    values = torch.tensor([2.0, 3.0])[sources]
    x = torch.tensor([[torch.inf, torch.nan]]).expand(10, 2)
    y = blocked_matmul(x, *layout, values, out_features=3, column_block=8, relu=True)
    assert (y[:, 0] == torch.inf).all() and y[:, 1].isnan().all() and (y[:, 2] == 0).all()


def test_accepts_leading_dimensions_and_strides():
    dense, _, weight = random_weight(12, 30, 0.4, 16)
    x = random(4, 3, 60)
    for view in (x[..., ::2], x[..., :30].transpose(0, 1), x[:, 0, 30:], x[0, 0, 1::2]):
        y = blocked_matmul(view, **weight)
        assert y.shape == (*view.shape[:-1], 12)
        assert_close_sum(y.reshape(-1, 12), view.reshape(-1, 30), dense.T)


def unaligned(tensor):
    """The same numbers one byte after an aligned address."""
    moved = torch.frombuffer(bytearray(b"?" + tensor.numpy().tobytes()), dtype=tensor.dtype, offset=1).view_as(tensor)
    assert moved.data_ptr() % 2 == 1
    return moved


def test_accepts_unaligned_memory():
    _, _, weight = random_weight(300, 300, 0.4, 64)
    moved = {name: unaligned(t) if isinstance(t, torch.Tensor) else t for name, t in weight.items()}
    for batch in (1, 40):
        x, bias = random(batch, 300), random(300, seed=2)
        y = blocked_matmul(unaligned(x), bias=unaligned(bias), **moved)
        assert torch.equal(y, blocked_matmul(x, bias=bias, **weight))


def test_threads_do_not_change_a_bit():
    _, _, weight = random_weight(801, 1000, 0.3, 128)
    x = random(200, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = blocked_matmul(x, **weight)
        for several in (2, 3):
            torch.set_num_threads(several)
            assert torch.equal(blocked_matmul(x, **weight), alone)
    finally:
        torch.set_num_threads(threads)


LEVELS = """
import torch
from tersetorch.ops import blocked_matmul, blocked_pack
torch.manual_seed(0)
kept = torch.rand(300, 170) < 0.2
dense = torch.where(kept, torch.randn(300, 170), 0.0)
offsets = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
*layout, sources = blocked_pack(offsets, kept.nonzero()[:, 1].int(), columns=170, column_block=64)
for batch in (1, 12, 31, 64, 100):
    x = torch.randn(batch, 170)
    y = blocked_matmul(x, *layout, dense[kept][sources], out_features=300, column_block=64, relu=True)
    torch.testing.assert_close(y, (x @ dense.T).relu(), rtol=1e-5, atol=1e-4)
print(torch.ops.tersetorch.cpu_isa())
"""


@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_level_can_be_forced(run_python, level):
    done = run_python(LEVELS, TERSETORCH_CPU_ISA=level)
    assert done.stdout.split() == [level], done.stderr


# ---- gradients


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("codes", [None, 7])
@pytest.mark.parametrize("rows,columns,batch", [(1, 1, 1), (300, 100, 9), (20, 70, 64), (0, 5, 3), (64, 0, 2)])
def test_gradients_are_those_of_csr_matmul(rows, columns, batch, codes, relu):
    _, csr, blocked = random_weight(rows, columns, 0.3, 32, codes=codes)
    *_, sources = blocked_pack(csr["row_offsets"], csr["col_indices"], columns=columns, column_block=32)
    x, bias = random(batch, columns).requires_grad_(), random(rows, seed=2).requires_grad_()
    learned = random(codes, seed=3) if codes else csr["values"]
    learned.requires_grad_()
    if codes:
        ours = {"codebook": learned}
    else:
        csr["values"], blocked["values"], ours = learned, learned[sources], {}
    grad_y = random(batch, rows, seed=4)
    want = csr_matmul(x, bias=bias, **csr, **ours)
    want = want.relu() if relu else want
    got = blocked_matmul(x, bias=bias, relu=relu, **blocked, **ours)
    for a, b in zip(
        torch.autograd.grad(got, (x, learned, bias), grad_y),
        torch.autograd.grad(want, (x, learned, bias), grad_y),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_csr_matmul():
    _, csr, blocked = random_weight(20, 30, 0.3, 8)
    *_, sources = blocked_pack(csr["row_offsets"], csr["col_indices"], columns=30, column_block=8)
    x, values = random(5, 30).requires_grad_(), csr["values"].requires_grad_()

    def penalty(y):
        grads = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, values))

    got = penalty(blocked_matmul(x, **blocked | {"values": values[sources]}))
    torch.testing.assert_close(got, penalty(csr_matmul(x, **csr)), rtol=1e-4, atol=1e-2)


def test_forward_mode_is_refused_instead_of_returning_zero():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    with pytest.raises(RuntimeError, match="blocked_matmul: x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: blocked_matmul(x, **weight), (random(5, 12),), (random(5, 12),))


# ---- PyTorch


def positional(codes=None, dtype=torch.float32):
    _, _, weight = random_weight(300, 12, 0.4, 8, codes=codes)
    layout = [weight[name] for name in ("block_offsets", "segments", "indices", "values")]
    x, bias = random(5, 12, dtype=dtype), random(300, seed=2)
    return x, *layout, bias, random(codes, seed=3) if codes else None, 300, 8, True


@pytest.mark.parametrize("codes", [None, 2])
def test_registration_is_sound(codes):
    args = positional(codes)
    torch.library.opcheck(OPS.blocked_matmul_inference.default, args)
    for leaf in (args[0], args[5], args[6] if codes else args[4]):
        leaf.requires_grad_()
    torch.library.opcheck(OPS.blocked_matmul.default, args)
    _, csr, _ = random_weight(300, 12, 0.4, 8)
    torch.library.opcheck(OPS.blocked_pack.default, (csr["row_offsets"], csr["col_indices"], 12, 8))


def test_compiles_without_a_graph_break_for_any_batch():
    _, _, weight = random_weight(300, 12, 0.4, 8)
    weight["values"].requires_grad_()

    def run(x):
        return blocked_matmul(x, **weight).relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        x = random(batch, 12).requires_grad_()
        assert torch.equal(compiled(x), run(x))
        leaves = [x, weight["values"]]
        got = torch.autograd.grad(compiled(x).pow(2).sum(), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(run(x).pow(2).sum(), leaves))


def test_exports_with_a_dynamic_batch():
    _, _, weight = random_weight(300, 12, 0.4, 8)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return blocked_matmul(x, **weight)

    exported = torch.export.export(Layer(), (random(5, 12),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    x = random(11, 12)
    assert torch.equal(exported.module()(x), blocked_matmul(x, **weight))


@pytest.mark.parametrize("op", [blocked_matmul, blocked_matmul_inference])
def test_autocast_computes_in_float32_and_casts_the_result(op):
    _, _, weight = random_weight(300, 12, 0.4, 8)
    x = random(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, **weight)
    assert torch.equal(y, op(x, **weight).bfloat16())


# ---- bad input

_, CSR, GOOD = random_weight(300, 12, 0.4, 8)
GOOD = {"x": torch.zeros(2, 12), "bias": torch.zeros(300)} | GOOD


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list; pass a torch.Tensor"),
        ({"x": torch.zeros(2, 12).double()}, TypeError, r"x must be float32 or bfloat16, got torch\.float64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., in\], got a scalar"),
        ({"indices": GOOD["indices"].int()}, TypeError, r"indices must be int16, got torch\.int32"),
        ({"segments": GOOD["segments"][1:]}, ValueError, r"segments must be \[600\], got shape \(599,\)"),
        ({"x": torch.zeros(2, 20)}, ValueError, r"block_offsets must be \[7\], got shape \(5,\)"),
        ({"values": GOOD["values"][1:]}, ValueError, r"values must be \["),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[300\], got shape \(2,\)"),
        ({"column_block": 0}, ValueError, "column_block must be 1 to 32768, got 0"),
        ({"out_features": -1}, ValueError, "out_features must be at least 0, got -1"),
        ({"codebook": torch.ones(2)}, TypeError, r"values must be uint8, got torch\.float32; pass codes, or no"),
    ],
)
def test_rejects(bad, error, match):
    with pytest.raises(error, match=f"blocked_matmul: {match}"):
        blocked_matmul(**GOOD | bad)


def changed(name, place, value):
    tensor = GOOD[name].clone()
    tensor[place] = value
    return {name: tensor}


@pytest.mark.parametrize(
    "bad,match",
    [
        (changed("block_offsets", 1, 10**6), "block_offsets must never fall"),
        (changed("block_offsets", 1, -1), "block_offsets must never fall"),
        (changed("segments", 3, -1), "segments must name rows"),
        (changed("segments", 3, 300 << 16), "segments must name rows"),
        (changed("segments", 0, 0), "segments must name rows"),
        (changed("indices", 0, 8), r"indices must lie in \[0, 8\)"),
        (changed("indices", 0, -1), r"indices must lie in \[0, 8\)"),
        (changed("indices", -1, 4), r"indices must lie in \[0, 8\) and inside x's features"),
    ],
)
@pytest.mark.parametrize("batch", [1, 20, 70])
def test_damaged_weights_are_refused(bad, match, batch):
    for op in (blocked_matmul, blocked_matmul_inference):
        with pytest.raises(RuntimeError, match=f"blocked_matmul: {match}"):
            op(**GOOD | {"x": torch.zeros(batch, 12)} | bad)


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"row_offsets": CSR["row_offsets"].long()}, TypeError, r"row_offsets must be int32, got torch\.int64"),
        ({"col_indices": 3}, TypeError, "col_indices must be a tensor, got int"),
        ({"column_block": 32769}, ValueError, "column_block must be 1 to 32768, got 32769"),
        ({"columns": 3}, RuntimeError, r"col_indices must lie in \[0, 3\)"),
        ({"row_offsets": CSR["row_offsets"].flip(0)}, RuntimeError, "row_offsets must rise from 0 to"),
        ({"col_indices": torch.zeros_like(CSR["col_indices"])}, RuntimeError, "col_indices must rise strictly"),
    ],
)
def test_packing_refuses(bad, error, match):
    good = {"row_offsets": CSR["row_offsets"], "col_indices": CSR["col_indices"], "columns": 12, "column_block": 8}
    with pytest.raises(error, match=f"blocked_pack: {match}"):
        blocked_pack(**good | bad)
