import pytest
import torch

from tersetorch import _native
from tersetorch.ops import blocked_bfloat16_matmul, blocked_bfloat16_matmul_inference, blocked_bfloat16_pack

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows, columns, density, column_block, seed=0):
    """A random bfloat16 weight dense, in compressed sparse rows and in blocks, as keyword arguments of the op."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0).bfloat16()
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    csr = (row_offsets, kept.nonzero()[:, 1].int(), dense[kept])
    packed = blocked_bfloat16_pack(*csr, columns=columns, column_block=column_block)
    weight = dict(zip(("block_offsets", "segments", "indices", "values"), packed, strict=True))
    return dense, csr, weight | {"out_features": rows, "column_block": column_block}


def assert_close_sum(got, left, right, extra=None, of_x=0.0):
    """got must be left @ right (+ extra) but for what sums and, as a part of each term, x's rounding may lose."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    # A bfloat16 instruction may round a product and a sum apart.
    allowed = (2 * (left.shape[-1] + 2) * EPSILON + of_x) * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (300, 784), (256, 128), (257, 129), (513, 101), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 17, 64, 200])
def test_equals_the_product_of_rounded_numbers(rows, columns, batch):
    for column_block in (2 if columns < 200 else 98, 128, 2048):
        dense, _, weight = random_weight(rows, columns, 0.3, column_block)
        x, bias = random(batch, columns), random(rows, seed=2)
        y = blocked_bfloat16_matmul(x, bias=bias, **weight)
        assert y.dtype == torch.float32
        assert_close_sum(y, x.bfloat16(), dense.T, bias)
        assert_close_sum(y, x, dense.T, bias, of_x=2.0**-8)
        assert torch.equal(blocked_bfloat16_matmul_inference(x, bias=bias, **weight), y)
        assert torch.equal(blocked_bfloat16_matmul(x, bias=bias, relu=True, **weight), y.relu())
        half = blocked_bfloat16_matmul(x.bfloat16(), **weight)
        assert half.dtype == torch.bfloat16
        assert_close_sum(half, x.bfloat16(), dense.T)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density):
    dense, _, weight = random_weight(300, 70, density, 32)
    x = random(40, 70)
    assert_close_sum(blocked_bfloat16_matmul(x, **weight), x.bfloat16(), dense.T)


def test_one_dense_row_among_empty_ones():
    dense = torch.zeros(600, 501, dtype=torch.bfloat16)
    dense[257] = random(501)
    row_offsets = torch.zeros(601, dtype=torch.int32)
    row_offsets[258:] = 501
    packed = blocked_bfloat16_pack(row_offsets, torch.arange(501).int(), dense[257], columns=501, column_block=128)
    x = random(70, 501)
    assert_close_sum(blocked_bfloat16_matmul(x, *packed, out_features=600, column_block=128), x.bfloat16(), dense.T)


def test_what_is_not_finite_stays_in_its_samples_and_words():
    row_offsets, col_indices = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    packed = blocked_bfloat16_pack(
        row_offsets, col_indices, torch.ones(2, dtype=torch.bfloat16), columns=4, column_block=4
    )
    x = torch.ones(3, 4)
    x[0, 0], x[1, 3], x[2, 1] = torch.nan, torch.inf, -torch.inf
    y = blocked_bfloat16_matmul(x, *packed, out_features=2, column_block=4)
    assert y[0, 0].isnan() and y[0, 1] == 1
    assert y[1, 0] == 1 and y[1, 1] == torch.inf
    assert y[2, 0].isnan() and y[2, 1] == 1  # column 1 shares its word with a stored weight


LEVELS = """
import torch
from tersetorch.ops import blocked_bfloat16_matmul, blocked_bfloat16_pack
torch.manual_seed(0)
kept = torch.rand(300, 171) < 0.2
dense = torch.where(kept, torch.randn(300, 171), 0.0).bfloat16()
offsets = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
packed = blocked_bfloat16_pack(offsets, kept.nonzero()[:, 1].int(), dense[kept], columns=171, column_block=64)
for batch in (1, 12, 31, 64, 100):
    x = torch.randn(batch, 171)
    y = blocked_bfloat16_matmul(x, *packed, out_features=300, column_block=64, relu=True)
    torch.testing.assert_close(y, (x.bfloat16().float() @ dense.float().T).relu(), rtol=1e-5, atol=1e-4)
print(torch.ops.tersetorch.cpu_isa())
"""


@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_level_can_be_forced(run_python, level):
    done = run_python(LEVELS, TERSETORCH_CPU_ISA=level)
    assert done.stdout.split() == [level], done.stderr


def test_backward_is_refused():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    y = blocked_bfloat16_matmul(random(5, 12).requires_grad_(), **weight)
    with pytest.raises(RuntimeError, match="blocked_bfloat16_matmul: must not be differentiated"):
        y.sum().backward()


# ---- PyTorch


def test_registration_is_sound():
    _, csr, weight = random_weight(300, 12, 0.4, 8)
    names = ("block_offsets", "segments", "indices", "values")
    args = (random(5, 12), *(weight[name] for name in names), random(300, seed=2), 300, 8, True)
    torch.library.opcheck(OPS.blocked_bfloat16_matmul_inference.default, args)
    torch.library.opcheck(OPS.blocked_bfloat16_matmul.default, args)
    torch.library.opcheck(OPS.blocked_bfloat16_pack.default, (*csr, 12, 8))


def test_compiles_without_a_graph_break_for_any_batch():
    _, _, weight = random_weight(300, 12, 0.4, 8)

    def run(x):
        return blocked_bfloat16_matmul(x, **weight).relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        assert torch.equal(compiled(random(batch, 12)), run(random(batch, 12)))


def test_exports_with_a_dynamic_batch():
    _, _, weight = random_weight(300, 12, 0.4, 8)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return blocked_bfloat16_matmul(x, **weight)

    exported = torch.export.export(Layer(), (random(5, 12),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    x = random(11, 12)
    assert torch.equal(exported.module()(x), blocked_bfloat16_matmul(x, **weight))


@pytest.mark.parametrize("op", [blocked_bfloat16_matmul, blocked_bfloat16_matmul_inference])
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
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 12).double()}, TypeError, r"x must be float32 or bfloat16, got torch\.float64"),
        ({"values": GOOD["values"].float()}, TypeError, r"values must be bfloat16, got torch\.float32"),
        ({"values": GOOD["values"][1:]}, ValueError, r"values must be \["),
        ({"segments": GOOD["segments"][1:]}, ValueError, r"segments must be \[600\], got shape \(599,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[300\], got shape \(2,\)"),
        ({"column_block": 7}, ValueError, "column_block must be a multiple of 2 up to 32768, got 7"),
    ],
)
def test_rejects(bad, error, match):
    with pytest.raises(error, match=f"blocked_bfloat16_matmul: {match}"):
        blocked_bfloat16_matmul(**GOOD | bad)


def changed(name, place, value):
    tensor = GOOD[name].clone()
    tensor[place] = value
    return {name: tensor}


@pytest.mark.parametrize(
    "bad,match",
    [
        (changed("block_offsets", 1, 10**6), "block_offsets must never fall"),
        (changed("segments", 0, 0), "segments must name rows"),
        (changed("indices", 0, 4), r"indices must lie in \[0, 4\)"),
        (changed("indices", -1, 2), r"indices must lie in \[0, 4\) and inside x's features"),
        ({"values": GOOD["values"].view(torch.int16)}, "values must be BFloat16"),
    ],
)
@pytest.mark.parametrize("batch", [1, 20, 70])
def test_damaged_weights_are_refused(bad, match, batch):
    with pytest.raises(RuntimeError, match=f"blocked_bfloat16_matmul: {match}"):
        blocked_bfloat16_matmul_inference(**GOOD | {"x": torch.zeros(batch, 12)} | bad)


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"values": CSR[2].float()}, TypeError, r"values must be bfloat16, got torch\.float32"),
        ({"values": CSR[2][1:]}, ValueError, r"values must be \["),
        ({"column_block": 3}, ValueError, "column_block must be a multiple of 2 up to 32768, got 3"),
        ({"columns": 3}, RuntimeError, r"col_indices must lie in \[0, 3\)"),
    ],
)
def test_packing_refuses(bad, error, match):
    good = {"row_offsets": CSR[0], "col_indices": CSR[1], "values": CSR[2], "columns": 12, "column_block": 8}
    with pytest.raises(error, match=f"blocked_bfloat16_pack: {match}"):
        blocked_bfloat16_pack(**good | bad)
