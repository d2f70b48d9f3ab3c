import pytest
import torch

from tersetorch import _native
from tersetorch.ops import csr_matmul, csr_matmul_inference

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random_weight(rows, columns, density, seed=0):
    """Offsets, columns and values of a random weight, and the same weight dense."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0)
    counts = kept.sum(1)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return row_offsets, kept.nonzero()[:, 1].int(), dense[kept], dense


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(row_offsets):
    return torch.repeat_interleave(torch.arange(row_offsets.numel() - 1), row_offsets.diff().long())


def assert_close_sum(got, left, right, extra=None):
    """got must be left @ right (+ extra) but for what float32 sums may lose: (terms + 1) * 2^-24 * sum |terms|."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    allowed = (left.shape[-1] + 2) * EPSILON * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (300, 784), (64, 8), (65, 100), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 8, 9, 33, 64, 65, 130])
def test_equals_the_dense_product(rows, columns, batch):
    row_offsets, col_indices, values, dense = random_weight(rows, columns, 0.3)
    x, bias = random(batch, columns), random(rows, seed=2)
    y = csr_matmul(x, row_offsets, col_indices, values, bias)
    assert y.dtype == torch.float32
    assert_close_sum(y, x, dense.T, bias)
    assert torch.equal(csr_matmul_inference(x, row_offsets, col_indices, values, bias), y)
    floored = csr_matmul(x, row_offsets, col_indices, values, bias, relu=True)
    assert torch.equal(floored, y.relu())
    assert torch.equal(csr_matmul_inference(x, row_offsets, col_indices, values, bias, None, True), floored)
    x, values = x.bfloat16(), values.bfloat16()
    y = csr_matmul(x, row_offsets, col_indices, values)
    assert y.dtype == torch.bfloat16
    assert_close_sum(y, x, dense.bfloat16().T)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density):
    row_offsets, col_indices, values, dense = random_weight(33, 70, density)
    x = random(5, 70)
    assert_close_sum(csr_matmul(x, row_offsets, col_indices, values), x, dense.T)


def test_codes_stand_for_entries_of_the_codebook():
    row_offsets, col_indices, _, _ = random_weight(40, 90, 0.3)
    for entries in (1, 2, 255, 256):
        codebook = random(entries, seed=3)
        codes = torch.arange(col_indices.numel()).remainder(entries).to(torch.uint8)
        for batch in (1, 3, 20):
            x, bias = random(batch, 90), random(40, seed=2)
            y = csr_matmul(x, row_offsets, col_indices, codes, bias, codebook)
            assert torch.equal(y, csr_matmul(x, row_offsets, col_indices, codebook[codes.int()], bias))
            assert torch.equal(y, csr_matmul_inference(x, row_offsets, col_indices, codes, bias, codebook))


def test_accepts_leading_dimensions_and_strides():
    row_offsets, col_indices, values, dense = random_weight(12, 30, 0.4)
    x = random(4, 3, 60)
    for view in (x[..., ::2], x[..., :30].transpose(0, 1), x[:, 0, 30:], x[0, 0, 1::2], x[:, :, :30].permute(1, 0, 2)):
        y = csr_matmul(view, row_offsets, col_indices, values)
        assert y.shape == (*view.shape[:-1], 12)
        assert_close_sum(y.reshape(-1, 12), view.reshape(-1, 30), dense.T)


def unaligned(tensor):
    """The same numbers one byte after an aligned address."""
    moved = torch.frombuffer(bytearray(b"?" + tensor.numpy().tobytes()), dtype=tensor.dtype, offset=1).view_as(tensor)
    assert moved.data_ptr() % 4 == 1
    return moved


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_accepts_unaligned_memory(batch):
    row_offsets, col_indices, values, _ = random_weight(12, 300, 0.4)
    x, bias = random(batch, 300), random(12, seed=2)
    y = csr_matmul(x, row_offsets, col_indices, values, bias)
    moved = [unaligned(t) for t in (x, row_offsets, col_indices, values, bias)]
    assert torch.equal(csr_matmul(*moved), y)
    codes, codebook = (values > 0).to(torch.uint8), torch.tensor([-1.5, 2.0])
    y = csr_matmul(x, row_offsets, col_indices, codes, bias, codebook)
    assert torch.equal(csr_matmul(x, row_offsets, col_indices, unaligned(codes), bias, unaligned(codebook)), y)


def test_short_columns_are_unsigned():
    row_offsets, col_indices, values, _ = random_weight(9, 65536, 0.002)
    short = (col_indices - 65536 * (col_indices >= 32768)).short()
    assert bool((short < 0).any())
    for batch in (1, 3, 20):
        x, values = random(batch, 65536).requires_grad_(), values.detach().requires_grad_()
        bias, grad_y = random(9, seed=2), random(batch, 9, seed=4)
        y, same = (csr_matmul(x, row_offsets, columns, values, bias) for columns in (short, col_indices))
        assert torch.equal(y, same)
        for a, b in zip(*(torch.autograd.grad(y, (x, values), grad_y) for y in (y, same)), strict=True):
            assert torch.equal(a, b)
    narrow = torch.zeros(1, 40000)
    with pytest.raises(RuntimeError, match=r"col_indices must lie in \[0, 40000\)"):
        csr_matmul(narrow, row_offsets, short, values)


def test_columns_may_be_unsorted_and_repeated():
    row_offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    col_indices = torch.tensor([2, 0, 2, 1, 1], dtype=torch.int32)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0])
    dense = torch.tensor([[2.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    for batch in (1, 4):
        x = random(batch, 3)
        torch.testing.assert_close(csr_matmul(x, row_offsets, col_indices, values), x @ dense.T)


def test_a_missing_weight_never_meets_x():
    row_offsets, col_indices = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    for batch in (1, 3):
        y = csr_matmul(torch.tensor([[2.0, float("nan")]] * batch), row_offsets, col_indices, torch.tensor([3.0]))
        assert torch.equal(y, torch.tensor([[6.0, 0.0]] * batch))


def test_int64_indices_are_converted():
    row_offsets, col_indices, values, _ = random_weight(12, 30, 0.4)
    x = random(4, 30)
    wide = csr_matmul(x, row_offsets.long(), col_indices.long(), values)
    assert torch.equal(wide, csr_matmul(x, row_offsets, col_indices, values))
    far = col_indices.long()
    far[3] += 2**32
    with pytest.raises(RuntimeError, match=r"col_indices must lie in \[0, 30\)"):
        csr_matmul(x, row_offsets, far, values)


LEVELS = """
import torch
from tersetorch.ops import csr_matmul
torch.manual_seed(0)
kept = torch.rand(150, 70) < 0.2
dense = torch.where(kept, torch.randn(150, 70), 0.0)
offsets = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
columns, values = kept.nonzero()[:, 1].int(), dense[kept].requires_grad_()
for dtype in (torch.float32, torch.bfloat16):
    for batch in (1, 3, 12, 31, 64, 100):
        x = torch.randn(batch, 70).to(dtype).requires_grad_()
        y = csr_matmul(x, offsets, columns, values)
        tolerance = dict(rtol=1e-5, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(y, (x.float() @ dense.T).to(dtype), **tolerance)
        grad_x, grad_values = torch.autograd.grad(y, (x, values), torch.ones_like(y))
        torch.testing.assert_close(grad_x, dense.sum(0).expand_as(x).to(dtype), **tolerance)
        torch.testing.assert_close(grad_values, x.float().sum(0)[columns.long()], **tolerance)
print(torch.ops.tersetorch.cpu_isa())
"""


@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_level_can_be_forced(run_python, level):
    done = run_python(LEVELS, TERSETORCH_CPU_ISA=level)
    assert done.stdout.split() == [level], done.stderr


# ---- gradients


@pytest.mark.parametrize("rows,columns", [(1, 1), (10, 17), (65, 100), (64, 0), (0, 5), (20, 784)])
@pytest.mark.parametrize("batch", [0, 1, 2, 9, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_product(rows, columns, batch, dtype):
    row_offsets, col_indices, values, dense = random_weight(rows, columns, 0.3)
    x, values, bias = random(batch, columns).to(dtype), values.to(dtype), random(rows, seed=2).to(dtype)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    grad_y = random(batch, rows, seed=4).to(dtype)
    y = csr_matmul(x, row_offsets, col_indices, values, bias)
    grads = torch.autograd.grad(y, leaves, grad_y)
    assert [g.dtype for g in grads] == [dtype] * 3
    assert_close_sum(grads[0], grad_y, dense.to(dtype))
    # Row by row, so that each non-zero's sum over the batch is one element of a product.
    of_row = rows_of(row_offsets)
    left, right = grad_y.T[of_row], x.detach().T[col_indices.long()]
    assert_close_sum(grads[1].unsqueeze(-1).unsqueeze(-1), left.unsqueeze(1), right.unsqueeze(2))
    assert_close_sum(grads[2].unsqueeze(0), torch.ones(1, batch), grad_y)


def test_codebook_gradient_sums_its_members():
    row_offsets, col_indices, values, _ = random_weight(20, 50, 0.4)
    codes = torch.randint(0, 6, values.shape, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    codebook = random(7, seed=3).requires_grad_()
    x = random(9, 50).requires_grad_()
    gathered = codebook.detach()[codes.int()].requires_grad_()
    grad_y = random(9, 20, seed=4)
    got = torch.autograd.grad(csr_matmul(x, row_offsets, col_indices, codes, None, codebook), (x, codebook), grad_y)
    want = torch.autograd.grad(csr_matmul(x, row_offsets, col_indices, gathered), (x, gathered), grad_y)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], torch.zeros(7).index_add(0, codes.int(), want[1]))
    assert got[1][6] == 0


@pytest.mark.parametrize("codes", [False, True])
def test_gradients_of_relu_are_those_of_a_relu_after_it(codes):
    x, row_offsets, col_indices, values, bias, *codebook = arguments(codes)
    leaves = [t.requires_grad_() for t in (x, *codebook, bias, *([] if codes else [values]))]
    grad_y = random(5, 8, seed=4)
    fused = csr_matmul(x, row_offsets, col_indices, values, bias, *codebook, relu=True)
    after = csr_matmul(x, row_offsets, col_indices, values, bias, *codebook).relu()
    got, want = (torch.autograd.grad(y, leaves, grad_y, create_graph=True) for y in (fused, after))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got, want = (torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves[:1]) for grads in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "codebook"])
def test_each_gradient_comes_alone(wanted):
    row_offsets, col_indices, values, _ = random_weight(20, 50, 0.4)
    arguments = {"x": random(9, 50), "values": values, "bias": random(20)}
    if wanted == "codebook":
        arguments |= {"values": (values > 0).to(torch.uint8), "codebook": random(2)}
    arguments[wanted].requires_grad_()
    y = csr_matmul(row_offsets=row_offsets, col_indices=col_indices, **arguments)
    y.sum().backward()
    assert [name for name, t in arguments.items() if t.grad is not None] == [wanted]


def test_gradients_take_leading_dimensions_and_expanded_gradients():
    row_offsets, col_indices, values, dense = random_weight(20, 50, 0.4)
    for shape in ((50,), (2, 3, 50)):
        x, bias = random(*shape).requires_grad_(), random(20).requires_grad_()
        values.requires_grad_(False).requires_grad_()
        csr_matmul(x, row_offsets, col_indices, values, bias).sum().backward()
        samples = x.detach().reshape(-1, 50)
        torch.testing.assert_close(x.grad, dense.sum(0).expand(shape))
        torch.testing.assert_close(bias.grad, torch.full((20,), float(len(samples))))
        torch.testing.assert_close(values.grad, samples.sum(0)[col_indices.long()])
        values.grad = None


def test_second_derivatives_are_those_of_the_dense_product():
    row_offsets, col_indices, values, _ = random_weight(8, 12, 0.4)
    position = (rows_of(row_offsets), col_indices.long())

    def penalty(y, x, weight):
        """A loss on first derivatives, as gradient penalties are."""
        grad_x, grad_weight = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(grad_x.pow(2).sum() + grad_weight.pow(2).sum(), (x, weight))

    x, weight = random(5, 12).requires_grad_(), values.clone().requires_grad_()
    got = penalty(csr_matmul(x, row_offsets, col_indices, weight), x, weight)
    dense = torch.zeros(8, 12).index_put(position, weight)
    torch.testing.assert_close(got, penalty(x @ dense.T, x, weight), rtol=1e-4, atol=1e-2)

    codes, codebook = (values > 0).to(torch.uint8), random(2).requires_grad_()
    got = penalty(csr_matmul(x, row_offsets, col_indices, codes, None, codebook), x, codebook)
    dense = torch.zeros(8, 12).index_put(position, codebook[codes.int()])
    torch.testing.assert_close(got, penalty(x @ dense.T, x, codebook), rtol=1e-4, atol=1e-2)


def test_forward_mode_is_refused_instead_of_returning_zero():
    row_offsets, col_indices, values, _ = random_weight(8, 12, 0.4)
    x = random(5, 12)
    with pytest.raises(RuntimeError, match="csr_matmul: x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: csr_matmul(x, row_offsets, col_indices, values), (x,), (x,))


@pytest.mark.parametrize("batch", [1, 9, 16, 200])
def test_threads_do_not_change_a_bit(batch):
    row_offsets, col_indices, values, _ = random_weight(801, 1000, 0.3)
    x, bias = random(batch, 1000).requires_grad_(), random(801, seed=2)
    values.requires_grad_()
    grad_y = random(batch, 801, seed=4)

    def results():
        y = csr_matmul(x, row_offsets, col_indices, values, bias)
        return [y, *torch.autograd.grad(y, (x, values), grad_y)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        for several in (2, 3):
            torch.set_num_threads(several)
            assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_large_batches_pass_in_waves():
    row_offsets, col_indices, values, dense = random_weight(20, 16, 0.3)
    x, grad_y = random(32 * 16 * 2 + 5, 16).requires_grad_(), random(32 * 16 * 2 + 5, 20, seed=4)
    values.requires_grad_()
    y = csr_matmul(x, row_offsets, col_indices, values)
    assert_close_sum(y.detach(), x.detach(), dense.T)
    grad_x, grad_values = torch.autograd.grad(y, (x, values), grad_y)
    assert_close_sum(grad_x, grad_y, dense)
    of_row = rows_of(row_offsets)
    left, right = grad_y.T[of_row], x.detach().T[col_indices.long()]
    assert_close_sum(grad_values.unsqueeze(-1).unsqueeze(-1), left.unsqueeze(1), right.unsqueeze(2))


# ---- PyTorch


def arguments(codes=False, dtype=torch.float32):
    row_offsets, col_indices, values, _ = random_weight(8, 12, 0.4)
    x, bias = random(5, 12, dtype=dtype), random(8, seed=2)
    if codes:
        return x, row_offsets, col_indices, (values > 0).to(torch.uint8), bias, random(2, seed=3)
    return x, row_offsets, col_indices, values, bias


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_is_sound(codes, dtype):
    x, row_offsets, col_indices, values, *rest = arguments(codes, dtype)
    grad_y = random(5, 8, dtype=dtype)
    torch.library.opcheck(OPS.csr_matmul_inference.default, (x, row_offsets, col_indices, values, *rest))
    codebook = rest[1:]
    for leaf in (x, grad_y, *rest, *([] if codes else [values])):
        leaf.requires_grad_()
    torch.library.opcheck(OPS.csr_matmul.default, (x, row_offsets, col_indices, values, *rest))
    with_relu = (*rest, *[None] * (not codes), True)
    torch.library.opcheck(OPS.csr_matmul.default, (x, row_offsets, col_indices, values, *with_relu))
    torch.library.opcheck(OPS.csr_matmul_grad_x.default, (grad_y, row_offsets, col_indices, values, 12, *codebook))
    torch.library.opcheck(OPS.csr_matmul_grad_values.default, (grad_y, x, row_offsets, col_indices))


@pytest.mark.parametrize("codes", [False, True])
def test_compiles_without_a_graph_break_for_any_batch(codes):
    x, row_offsets, col_indices, values, bias, *codebook = arguments(codes)
    learned = codebook[0] if codes else values
    leaves = [learned.requires_grad_(), bias.requires_grad_()]

    def run(x):
        return csr_matmul(x, row_offsets.long(), col_indices, values, bias, *codebook).relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        x = random(batch, 12).requires_grad_()
        assert torch.equal(compiled(x), run(x))
        got = torch.autograd.grad(compiled(x).pow(2).sum(), [x, *leaves])
        torch.testing.assert_close(got, torch.autograd.grad(run(x).pow(2).sum(), [x, *leaves]))


def test_exports_with_a_dynamic_batch():
    x, *weight = arguments()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return csr_matmul(x, *weight)

    exported = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert "csr_matmul" in str(exported.graph)
    x = random(11, 12)
    assert torch.equal(exported.module()(x), csr_matmul(x, *weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [csr_matmul, csr_matmul_inference])
def test_autocast_computes_in_float32_and_casts_the_result(op, dtype):
    x, *weight = arguments()
    want = csr_matmul(x, *weight).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(op(x, *weight), want)
        half = op(x.to(dtype), *weight)
        compiled = torch.compile(lambda x: op(x, *weight), fullgraph=True)
        assert torch.equal(compiled(x), want)
    assert half.dtype == dtype
    assert torch.equal(half, csr_matmul(x.to(dtype).float(), *weight).to(dtype))
    assert op(x, *weight).dtype == torch.float32


def test_gradients_flow_through_autocast():
    x, row_offsets, col_indices, values, bias = arguments()
    leaves = [x.requires_grad_(), values.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = csr_matmul(x, row_offsets, col_indices, values, bias)
    got = torch.autograd.grad(y.float().sum(), leaves)
    want = torch.autograd.grad(csr_matmul(x, row_offsets, col_indices, values, bias).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_the_same_numbers():
    x, *weight = arguments()
    stacked = torch.stack([x, 2 * x])
    assert torch.equal(torch.vmap(lambda x: csr_matmul(x, *weight))(stacked), csr_matmul(stacked, *weight))


# ---- bad input


GOOD = {
    "x": torch.zeros(2, 5),
    "row_offsets": torch.tensor([0, 1, 1, 3], dtype=torch.int32),
    "col_indices": torch.tensor([4, 0, 2], dtype=torch.int32),
    "values": torch.ones(3),
    "bias": torch.zeros(3),
}
CODES = {"values": torch.zeros(3, dtype=torch.uint8), "codebook": torch.ones(2)}


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list; pass a torch.Tensor"),
        (
            {"x": torch.zeros(2, 5).double()},
            TypeError,
            r"x must be float32 or bfloat16, got torch\.float64; convert it",
        ),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., in\], got a scalar"),
        ({"row_offsets": torch.zeros(4)}, TypeError, r"row_offsets must be int32 or int64, got torch\.float32"),
        ({"row_offsets": torch.zeros(0).int()}, ValueError, r"row_offsets must be \[out \+ 1\], got shape \(0,\)"),
        ({"row_offsets": torch.zeros(2, 2).int()}, ValueError, r"row_offsets must be .*, got shape \(2, 2\)"),
        (
            {"col_indices": torch.zeros(3).byte()},
            TypeError,
            r"col_indices must be int32, int64 or int16, got torch\.uint8",
        ),
        ({"col_indices": torch.zeros(3, 1).int()}, ValueError, r"col_indices must be \[nnz\], got shape \(3, 1\)"),
        ({"values": torch.ones(4)}, ValueError, r"values must be \[3\] like col_indices, got shape \(4,\)"),
        (
            {"values": CODES["values"]},
            TypeError,
            r"values must be .*, got torch\.uint8; pass the codebook beside codes",
        ),
        (
            {"codebook": torch.ones(2)},
            TypeError,
            r"values must be uint8, got torch\.float32; pass codes, or no codebook",
        ),
        (CODES | {"codebook": torch.ones(2).bfloat16()}, TypeError, r"codebook must be float32, got torch\.bfloat16"),
        (CODES | {"codebook": torch.ones(257)}, ValueError, r"codebook must be .* at most 256.*, got shape \(257,\)"),
        (CODES | {"codebook": torch.ones(1, 2)}, ValueError, r"codebook must be \[entries\].*, got shape \(1, 2\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[3\], got shape \(2,\)"),
        ({"bias": torch.zeros(3).int()}, TypeError, r"bias must be float32 or bfloat16, got torch\.int32"),
        ({"values": torch.ones(3, device="meta")}, ValueError, "values must be on the device of x, cpu, got meta"),
    ],
)
def test_rejects(bad, error, match):
    with pytest.raises(error, match=f"csr_matmul: {match}"):
        csr_matmul(**GOOD | bad)


DAMAGED = [
    ({"col_indices": torch.tensor([4, 5, 2], dtype=torch.int32)}, r"col_indices must lie in \[0, 5\)"),
    ({"col_indices": torch.tensor([4, -1, 2], dtype=torch.int32)}, r"col_indices must lie in \[0, 5\)"),
    ({"col_indices": torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32)}, r"col_indices must lie in \[0, 5\)"),
    ({"row_offsets": torch.tensor([0, 3, 1, 3], dtype=torch.int32)}, r"row_offsets must never fall"),
    ({"row_offsets": torch.tensor([0, -5, 1, 3], dtype=torch.int32)}, r"row_offsets must never fall"),
    ({"row_offsets": torch.tensor([0, 1, 9, 3], dtype=torch.int32)}, r"row_offsets must never fall"),
    ({"row_offsets": torch.tensor([1, 1, 2, 3], dtype=torch.int32)}, r"row_offsets must run from 0 to 3"),
    ({"row_offsets": torch.tensor([0, 1, 2, 4], dtype=torch.int32)}, r"row_offsets must run from 0 to 3"),
    (CODES | {"values": torch.tensor([0, 2, 1], dtype=torch.uint8)}, r"codes must lie in \[0, 2\)"),
    (CODES | {"codebook": torch.ones(0)}, r"codes must lie in \[0, 0\)"),
]


@pytest.mark.parametrize("bad,match", DAMAGED)
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_damaged_weights_are_refused(bad, match, batch):
    damaged = GOOD | {"x": torch.zeros(batch, 5)} | bad
    for op in (csr_matmul, csr_matmul_inference):
        with pytest.raises(RuntimeError, match=f"csr_matmul: {match}"):
            op(**damaged)
    positions = (damaged["row_offsets"], damaged["col_indices"])
    grad_y = torch.zeros(batch, 3)
    with pytest.raises(RuntimeError, match=f"csr_matmul_grad_x: {match}"):
        OPS.csr_matmul_grad_x(grad_y, *positions, damaged["values"], 5, damaged.get("codebook"))
    if "codes" not in match:
        with pytest.raises(RuntimeError, match=f"csr_matmul_grad_values: {match}"):
            OPS.csr_matmul_grad_values(grad_y, damaged["x"], *positions)


@pytest.mark.parametrize(
    "bad",
    [
        {"x": torch.zeros(2, 5).double()},
        {"x": torch.tensor(1.0)},
        {"row_offsets": torch.tensor([0, 1, 1, 3])},
        {"row_offsets": torch.zeros(0).int()},
        {"col_indices": torch.zeros(3, 1).int()},
        {"values": torch.ones(4)},
        {"values": CODES["values"]},
        {"codebook": torch.ones(2)},
        CODES | {"codebook": torch.ones(257)},
        {"bias": torch.zeros(2)},
        {"bias": torch.zeros(3).int()},
    ],
)
def test_native_checks_are_the_second_line(bad):
    with pytest.raises(RuntimeError, match=r"csr_matmul: .* must .* got"):
        csr_matmul_inference(**GOOD | bad)


def test_native_gradients_check_their_shapes():
    positions = (GOOD["row_offsets"], GOOD["col_indices"])
    with pytest.raises(RuntimeError, match=r"csr_matmul_grad_x: grad_y must be \[\.\.\., 3\], got 2 features"):
        OPS.csr_matmul_grad_x(torch.zeros(2, 2), *positions, GOOD["values"], 5)
    with pytest.raises(RuntimeError, match="csr_matmul_grad_x: the number of columns must fit int32, got -1"):
        OPS.csr_matmul_grad_x(torch.zeros(2, 3), *positions, GOOD["values"], -1)
    with pytest.raises(RuntimeError, match=r"csr_matmul_grad_values: grad_y must be \[2, 3\].*, got \[4, 3\]"):
        OPS.csr_matmul_grad_values(torch.zeros(4, 3), GOOD["x"], *positions)
