"""float16, which only CUDA devices take: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch import nn, ops

ROWS, COLUMNS = 10, 71
IMAGES, FILTERS, KERNEL = (2, 6, 7, 9), 5, (3, 3)


def numbers(*shape, seed=0):
    """Random float16 as float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float()


def kept(rows, columns):
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.4).float() * numbers(
        rows, columns, seed=2
    )


def codes(entries, *shape):
    return torch.randint(entries, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def blocked(pack, dtype):
    row_offsets, col_indices, values = ops.csr_pack(kept(ROWS, COLUMNS))
    if dtype == torch.int8:
        values = (values * 20).clamp(-127, 127)
    layout = pack(row_offsets, col_indices, values.to(dtype), columns=COLUMNS, column_block=32)
    return dict(zip(("block_offsets", "segments", "indices", "values"), layout, strict=False)), layout[4:]


def of_blocked():
    row_offsets, col_indices, values = ops.csr_pack(kept(ROWS, COLUMNS))
    *layout, positions = ops.blocked_pack(row_offsets, col_indices, columns=COLUMNS, column_block=32)
    return dict(zip(("block_offsets", "segments", "indices"), layout, strict=True)) | {"values": values[positions]}


def coded(entries, rows, columns):
    return {
        "codes": ops.codebook_pack(codes(entries, rows, columns), entries=entries),
        "codebook": numbers(1, entries, seed=4),
    }


def products(entries, columns, width=3):
    packed = ops.product_pack(codes(entries, ROWS, -(-columns // width)), entries)
    return {"codes": packed, "codebooks": numbers(1, -(-columns // width), width, entries, seed=4)}


def csr(rows, columns):
    return dict(zip(("row_offsets", "col_indices", "values"), ops.csr_pack(kept(rows, columns)), strict=True))


def problems():
    """Op, samples, tensors and other arguments of every op that takes float16."""
    bias, wide, of_images = numbers(ROWS, seed=5), numbers(9, COLUMNS), numbers(*IMAGES)
    out, blocks = {"out_features": ROWS}, {"out_features": ROWS, "column_block": 32}
    taps = IMAGES[1] * KERNEL[0] * KERNEL[1]
    bitmap = dict(zip(("bitmap", "row_offsets", "values"), ops.bitmap_pack(kept(ROWS, COLUMNS)), strict=True))
    quads = bitmap | {"values": (bitmap["values"] * 20).clamp(-127, 127).to(torch.int8), "scales": torch.ones(ROWS)}
    columns = dict(zip(("bitmap", "column_offsets", "values"), ops.bitmap_pack(kept(COLUMNS, ROWS)), strict=True))
    of_int8, (row_sums, *_) = blocked(ops.blocked_int8_pack, torch.int8)
    of_int8 |= {"row_scales": torch.ones(ROWS), "row_sums": row_sums}
    of_bfloat16, _ = blocked(ops.blocked_bfloat16_pack, torch.bfloat16)
    signs = {"weight": ops.xnor_pack(ops.sign_pack(numbers(ROWS, COLUMNS, seed=6)))}
    of_sizes = {"in_features": COLUMNS, "out_features": ROWS}
    for samples in (1, 9):
        x = wide[:samples]
        name = f"{samples} of "
        yield name + "csr", ops.csr_matmul, x, csr(ROWS, COLUMNS) | {"bias": bias}, {}
        yield name + "bitmap", ops.bitmap_matmul, x, bitmap | {"bias": bias}, {}
        yield name + "codebook exact", ops.codebook_matmul, x[:, :68], coded(11, ROWS, 68) | {"bias": bias}, {}
    yield "relu", ops.csr_matmul, wide, csr(ROWS, COLUMNS), {"relu": True}
    yield "bitmap int8", ops.bitmap_matmul, wide, quads | {"bias": bias}, {"mode": "int8"}
    yield "bitmap columns", ops.bitmap_columns_matmul, wide, columns | {"bias": bias}, out
    yield "blocked", ops.blocked_matmul, wide, of_blocked() | {"bias": bias}, blocks
    yield "blocked bfloat16", ops.blocked_bfloat16_matmul, wide, of_bfloat16 | {"bias": bias}, blocks
    yield "blocked int8", ops.blocked_int8_matmul, wide, of_int8 | {"bias": bias}, blocks
    for mode in ("bfloat16", "int8"):
        for samples in (4, 9):
            name, x = f"codebook {mode} {samples}", numbers(samples, 72)
            yield name, ops.codebook_matmul, x, coded(11, ROWS, 72) | {"bias": bias}, {"mode": mode}
    yield "codebook tiles", ops.codebook_matmul, numbers(33, 72), coded(11, ROWS, 72), {}
    yield "codebook columns", ops.codebook_matmul, numbers(3, 71), coded(11, ROWS, 71), {}
    for name, samples, entries, mode in (("few", 5, 16, "exact"), ("one", 1, 30, "exact"), ("int8", 2, 30, "int8")):
        some = products(entries, COLUMNS) | {"bias": bias}
        yield f"product {name}", ops.product_matmul, wide[:samples], some, out | {"mode": mode}
    yield "signs of reals", ops.sign_matmul, wide, signs | {"bias": bias}, out
    yield "signs", ops.xnor_matmul, wide, signs, of_sizes
    yield "sign_pack", ops.sign_pack, wide, {}, {}
    yield "sign_pack_images", ops.sign_pack_images, of_images, {}, {}
    fixed = {"integer_bits": 4, "fraction_bits": 6}
    yield "fixed_round", ops.fixed_round, wide * 4, {}, fixed | {"seed": 7}
    yield "fixed_round_whole", ops.fixed_round_whole, wide, {}, fixed | {"seed": 7}
    conv = {"kernel_size": KERNEL, "padding": 1}
    for mode in ("exact", "bfloat16", "int8"):
        some = csr(FILTERS, taps) | {"bias": bias[:FILTERS]}
        yield f"sparse_conv2d {mode}", ops.sparse_conv2d, of_images, some, conv | {"mode": mode}
        some = coded(11, FILTERS, taps) | {"bias": bias[:FILTERS]}
        yield f"codebook_conv2d {mode}", ops.codebook_conv2d, of_images, some, conv | {"mode": mode}
    some = products(30, taps) | {"bias": bias}
    yield "product_conv2d", ops.product_conv2d, of_images, some, conv | {"out_channels": ROWS}
    some = {"lateral": numbers(FILTERS, 6, seed=7), "vertical": numbers(FILTERS, 3, seed=8)}
    some |= {"horizontal": numbers(FILTERS, 3, seed=9), "bias": bias[:FILTERS]}
    yield "flat_conv2d", ops.flat_conv2d, of_images, some, {"padding": 1}
    weight = ops.xnor_conv2d_pack(ops.sign_pack_images(numbers(FILTERS, 6, *KERNEL, seed=6)))
    yield "xnor_conv2d", ops.xnor_conv2d, of_images, {"weight": weight}, conv | {"in_channels": 6, "out_channels": 5}


CASES = {name: rest for name, *rest in problems()}


@pytest.mark.parametrize("case", CASES)
def test_is_what_float32_makes_of_the_same_numbers(device, case):
    op, x, tensors, rest = CASES[case]
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    x = x.to(device)
    want, got = op(x, **moved, **rest), op(x.half(), **moved, **rest)
    assert got.device.type == "cuda" and got.dtype == (torch.float16 if want.dtype == torch.float32 else want.dtype)
    assert torch.equal(got.cpu(), want.to(got.dtype).cpu())
    if moved.get("bias") is not None:
        assert torch.equal(got.cpu(), op(x.half(), **moved | {"bias": moved["bias"].half()}, **rest).cpu())


def gradients(op, x, leaves, rest):
    """Of x and of the tensors, by name."""
    given = {"x": x} | leaves
    trained = {name: t.requires_grad_() for name, t in given.items() if t.is_floating_point()}
    y = op(**given, **rest)
    return dict(zip(trained, torch.autograd.grad(y.float().square().sum(), trained.values()), strict=True))


DIFFERENTIABLE = ("9 of csr", "9 of bitmap", "blocked", "9 of codebook exact", "product few", "signs of reals")
DIFFERENTIABLE += ("sparse_conv2d exact", "codebook_conv2d exact", "product_conv2d")


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradients_are_those_of_float32(device, case):
    op, x, tensors, rest = CASES[case]
    want, got = (
        gradients(op, x.to(device).to(dtype), {name: t.to(device) for name, t in tensors.items()}, rest)
        for dtype in (torch.float32, torch.float16)
    )
    assert got["x"].dtype == torch.float16
    for name, grad in got.items():
        scale = want[name].abs().max().item()
        # y, and what comes back through it, is rounded to 11 bits.
        torch.testing.assert_close(grad.float().cpu(), want[name].cpu(), rtol=2e-3, atol=4e-3 * scale)


def test_gradients_of_gradients(device):
    op, x, tensors, rest = CASES["1 of csr"]
    moved = {name: t.to(device) for name, t in tensors.items()}

    def twice(x):
        x = x.requires_grad_()
        values = moved["values"].clone().requires_grad_()
        y = op(x, **moved | {"values": values}, **rest)
        of_x, of_values = torch.autograd.grad(y.float().square().sum(), (x, values), create_graph=True)
        return torch.autograd.grad(of_x.float().square().sum() + of_values.square().sum(), (x, values))

    want, got = twice(x.to(device)), twice(x.to(device).half())
    assert [t.dtype for t in got] == [torch.float16, torch.float32]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float().cpu(), b.cpu(), rtol=5e-3, atol=5e-3 * b.abs().max().item())


def test_codebook_embedding(device):
    tensors = coded(11, ROWS, COLUMNS) | {"indices": torch.tensor([[3, 0], [9, 3]])}
    moved = {name: t.to(device) for name, t in tensors.items()}
    want = ops.codebook_embedding(**tensors, columns=COLUMNS)
    got = ops.codebook_embedding(**moved, columns=COLUMNS, dtype=torch.float16)
    assert torch.equal(got.cpu(), want.half())
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16 or float16, got torch\.float64"):
        ops.codebook_embedding(**moved, columns=COLUMNS, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"dtype must be float32 or bfloat16, got torch\.float16"):
        ops.codebook_embedding(**tensors, columns=COLUMNS, dtype=torch.float16)


def test_large_and_small_numbers(device):
    """Sums past 65,504 are infinite, those below the least normal number keep fewer bits, NaN stays."""
    x = torch.tensor([[60000.0, 2.0**-24, 3 * 2.0**-24, float("nan"), -float("inf"), 1.0]]).half()
    one = torch.eye(6)
    for scale, bias in ((2.0, None), (0.5, None), (1.0, torch.full((6,), 5519.0)), (1.0, torch.full((6,), 5520.0))):
        weight = dict(zip(("row_offsets", "col_indices", "values"), ops.csr_pack(one * scale), strict=True))
        moved = {name: t.to(device) for name, t in weight.items()}
        want = (x.double() * scale + (0 if bias is None else bias.double())).half()
        got = ops.csr_matmul(x.to(device), **moved, bias=None if bias is None else bias.to(device))
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_ops_know_what_comes_out_without_running(device):
    for case in (
        "9 of csr",
        "bitmap columns",
        "blocked int8",
        "codebook int8 9",
        "signs of reals",
        "sparse_conv2d exact",
    ):
        op, x, tensors, rest = CASES[case]
        moved = {name: t.to(device) for name, t in (tensors | {"x": x.half()}).items()}
        with torch._subclasses.FakeTensorMode() as fakes:
            y = op(**{name: fakes.from_tensor(t) for name, t in moved.items()}, **rest)
        assert y.dtype == torch.float16 and y.device.type == "cuda"


def test_autocast_to_float16(device):
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    for case in ("9 of csr", "codebook tiles", "product few", "blocked", "sparse_conv2d exact", "flat_conv2d"):
        op, x, tensors, rest = CASES[case]
        moved = {name: t.to(device) for name, t in tensors.items()}
        want = op(x.to(device), **moved, **rest).half()
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.float16)
            got = [op(given.to(device), **moved, **rest) for given in (x, x.half())]
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", before)
        assert all(torch.equal(y.cpu(), want.cpu()) for y in got), case


def plain(kind=torch.nn.Linear, *sizes, signs=False):
    """A plain layer of few numbers, all of float16."""
    layer = kind(*(sizes or (20, 6)))
    with torch.no_grad():
        few = (numbers(*layer.weight.shape, seed=2) * 2).round() / 4
        layer.weight.copy_(few.sign() + (few == 0) if signs else few)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(numbers(*layer.bias.shape, seed=5))
    return layer.requires_grad_(False).eval()


def flattened():
    layer = nn.FlattenedConv2d(6, 5, 3)
    for parameter in layer.parameters():
        parameter.data = parameter.data.half().float()
    return layer.pack("fused").eval()


IMAGE = numbers(1, 6, 7, 9)
LAYERS = {
    "SparseLinear": (lambda: nn.SparseLinear.from_dense(plain()), numbers(3, 20)),
    "SparseCodebookLinear": (lambda: nn.SparseCodebookLinear.from_dense(plain()), numbers(3, 20)),
    "CodebookLinear": (lambda: nn.CodebookLinear.from_dense(plain()), numbers(3, 20)),
    "FixedPointLinear": (lambda: nn.FixedPointLinear.from_dense(plain(), "<4,4>", "<4,4>", "<8,4>"), numbers(3, 20)),
    "BinaryLinear": (lambda: nn.BinaryLinear.from_dense(plain(signs=True), inputs="real"), numbers(3, 20)),
    "SparseConv2d": (lambda: nn.SparseConv2d.from_dense(plain(torch.nn.Conv2d, 6, 5, 3)), IMAGE),
    "BinaryConv2d": (lambda: nn.BinaryConv2d.from_dense(plain(torch.nn.Conv2d, 6, 5, 3, signs=True)), IMAGE),
    "FlattenedConv2d": (flattened, IMAGE),
    "CodebookEmbedding": (
        lambda: nn.CodebookEmbedding.from_dense(plain(torch.nn.Embedding, 10, 20)),
        torch.tensor([3, 9]),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_half_precision(device, name):
    """Weights keep their numbers; inputs, bias and results are float16."""
    make, x = LAYERS[name]
    layer = make().to(device)
    given = x.to(device)
    half = given.half() if x.is_floating_point() else given
    with torch.no_grad():
        want = layer(given)
        y = layer.half()(half)
    assert y.dtype == torch.float16 and y.device.type == "cuda"
    assert torch.equal(y.cpu(), want.half().cpu())
    if x.is_floating_point():
        sentence = r"input must be float32(,| or) bfloat16.*got torch\.float16; convert it"
        with torch.no_grad(), pytest.raises(TypeError, match=sentence):
            make()(x.half())


def test_weights_in_half_precision_are_refused(device):
    for case, name in (("9 of csr", "values"), ("bitmap columns", "values"), ("blocked", "values")):
        op, x, tensors, rest = CASES[case]
        moved = {n: t.to(device) for n, t in (tensors | {name: tensors[name].half()}).items()}
        with pytest.raises(TypeError, match=r"values must be float32 or bfloat16, got torch\.float16; pass"):
            op(x.half().to(device), **moved, **rest)
    _, x, tensors, _ = CASES["sparse_conv2d exact"]
    offsets, columns, values = (tensors[n].to(device) for n in ("row_offsets", "col_indices", "values"))
    with pytest.raises(RuntimeError, match="values must be float32 or bfloat16, got Half; convert it"):
        ops.sparse_conv2d_inference(
            x.half().to(device), offsets, columns, values.half(), None, None, [3, 3], [1, 1], [1, 1], [1, 1], 1
        )
