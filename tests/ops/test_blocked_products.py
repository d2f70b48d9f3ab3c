"""What blocked_matmul and its two modes have in common; the rest stands in the test file of each."""

import pytest
import torch

from tersetorch import _native, ops

OPS = torch.ops.tersetorch
GROUPS = {"blocked": 1, "blocked_bfloat16": 2, "blocked_int8": 4}
DTYPES = {"blocked": torch.float32, "blocked_bfloat16": torch.bfloat16, "blocked_int8": torch.int8}
TWINS = ["_matmul", "_matmul_inference"]

pytestmark = pytest.mark.parametrize("way", GROUPS)


def op_of(way, name="_matmul"):
    return getattr(ops, way + name)


def whole_samples(*shape, seed=1):
    """Samples of whole numbers, the largest of each 127, so that the modes round none of them."""
    x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[..., :1] = 127
    return x


def rows_of(way, dense):
    """A weight of whole numbers in compressed sparse rows, of the dtype that packing takes."""
    kept = dense != 0
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    return row_offsets, kept.nonzero()[:, 1].int(), dense[kept].to(DTYPES[way])


def weight_of(way, dense, column_block=32):
    """The same in blocks, as keyword arguments of the op."""
    rows, columns = dense.shape
    row_offsets, col_indices, values = rows_of(way, dense)
    sizes = {"columns": columns, "column_block": column_block}
    if way == "blocked":
        *layout, sources = ops.blocked_pack(row_offsets, col_indices, **sizes)
        layout = (*layout, values[sources])
    else:
        layout = op_of(way, "_pack")(row_offsets, col_indices, values, **sizes)
    weight = dict(zip(("block_offsets", "segments", "indices", "values", "row_sums"), layout, strict=False))
    if way == "blocked_int8":
        row_sums = weight.pop("row_sums")
        weight |= {"row_scales": torch.ones(rows), "row_sums": row_sums}
    return weight | {"out_features": rows, "column_block": column_block}


def random_dense(rows, columns, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (rows, columns), generator=generator).float()
    return torch.where(torch.rand(rows, columns, generator=generator) < density, values, 0)


def positional(way, relu=True):
    weight = weight_of(way, random_dense(300, 12), 8)
    sizes = weight.pop("out_features"), weight.pop("column_block")
    codebook = (None,) if way == "blocked" else ()
    return whole_samples(5, 12), *weight.values(), torch.ones(300), *codebook, *sizes, relu


@pytest.mark.parametrize("kind", ["random", "empty", "full", "one dense row"])
@pytest.mark.parametrize("batch", [1, 40, 70])
def test_products_of_whole_numbers_are_exact(way, kind, batch):
    dense = random_dense(600, 71, {"random": 0.2, "empty": 0.0}.get(kind, 1.0))
    if kind == "one dense row":
        dense[torch.arange(600) != 257] = 0
    x, weight = whole_samples(batch, 71), weight_of(way, dense)
    for twin in TWINS:
        assert torch.equal(op_of(way, twin)(x, **weight), x @ dense.T)
        assert torch.equal(op_of(way, twin)(x, relu=True, **weight), (x @ dense.T).relu())


def unaligned(tensor):
    """The same numbers one byte after an aligned address."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    moved = torch.frombuffer(bytearray(b"?" + data), dtype=tensor.dtype, offset=1).view_as(tensor)
    assert moved.data_ptr() % 2 == 1
    return moved


def test_accepts_leading_dimensions_strides_and_unaligned_memory(way):
    dense = random_dense(300, 70)
    weight, x = weight_of(way, dense), whole_samples(2, 3, 4, 140)
    for view in (x[..., ::2], x[..., :70].transpose(0, 1), x[:, 0, 0, :70], x[0, 0, 0, :70]):
        y = op_of(way)(view, **weight)
        assert y.shape == (*view.shape[:-1], 300)
        assert torch.equal(y.reshape(-1, 300), view.reshape(-1, 70) @ dense.T)
    moved = {name: unaligned(t) if isinstance(t, torch.Tensor) else t for name, t in weight.items()}
    for batch in (1, 40):
        x, bias = whole_samples(batch, 70), torch.arange(300.0)
        assert torch.equal(op_of(way)(unaligned(x), bias=unaligned(bias), **moved), x @ dense.T + bias)


def test_threads_do_not_change_a_bit(way):
    weight = weight_of(way, random_dense(801, 1000, 0.3), 128)
    x = torch.randn(200, 1000, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = op_of(way)(x, **weight)
        for several in (2, 3):
            torch.set_num_threads(several)
            assert torch.equal(op_of(way)(x, **weight), alone)
    finally:
        torch.set_num_threads(threads)


LEVELS = """
import runpy, torch
shared = runpy.run_path({file!r})
dense = shared["random_dense"](300, 171, 0.2)
weight = shared["weight_of"]({way!r}, dense, 64)
for batch in (1, 12, 31, 64, 100):
    x = shared["whole_samples"](batch, 171)
    assert torch.equal(shared["op_of"]({way!r})(x, relu=True, **weight), (x @ dense.T).relu())
print(torch.ops.tersetorch.cpu_isa())
"""


@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_level_can_be_forced(run_python, way, level):
    done = run_python(LEVELS.format(file=__file__, way=way), TERSETORCH_CPU_ISA=level)
    assert done.stdout.split() == [level], done.stderr


# ---- PyTorch


def test_registration_is_sound(way):
    args = positional(way)
    torch.library.opcheck(getattr(OPS, f"{way}_matmul_inference").default, args)
    torch.library.opcheck(getattr(OPS, f"{way}_matmul").default, args)
    rows = rows_of(way, random_dense(300, 12))
    torch.library.opcheck(getattr(OPS, f"{way}_pack").default, (*rows[: 2 if way == "blocked" else 3], 12, 8))


def test_compiles_and_exports_for_any_batch(way):
    weight = weight_of(way, random_dense(300, 12), 8)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return op_of(way)(x, **weight).relu()

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        x = whole_samples(batch, 12)
        assert torch.equal(compiled(x), layer(x))
    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(layer, (whole_samples(5, 12),), dynamic_shapes=batch)
    x = whole_samples(11, 12)
    assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize("twin", TWINS)
def test_autocast_computes_in_float32_and_casts_the_result(way, twin):
    weight, x = weight_of(way, random_dense(300, 12), 8), torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op_of(way, twin)(x, **weight)
        half = op_of(way, twin)(x.half(), **weight)
    assert torch.equal(y, op_of(way, twin)(x, **weight).bfloat16())
    assert half.dtype == torch.bfloat16


# ---- bad input


def good(way):
    return {"x": torch.zeros(2, 12), "bias": torch.zeros(300)} | weight_of(way, random_dense(300, 12), 8)


REJECTED = [
    (lambda a: {"x": [1.0]}, TypeError, "x must be a tensor, got list; pass a torch.Tensor"),
    (lambda a: {"x": a["x"].double()}, TypeError, r"x must be float32 or bfloat16, got torch\.float64; convert it"),
    (lambda a: {"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., in\], got a scalar; reshape it"),
    (lambda a: {"indices": a["indices"].int()}, TypeError, r"indices must be int16, got torch\.int32; "),
    (lambda a: {"indices": a["indices"][None]}, ValueError, r"indices must be \[(nnz|words)\], got shape \(1, "),
    (lambda a: {"values": a["values"].double()}, TypeError, r"values must be \w+( or bfloat16)?, got torch\.float64; "),
    (lambda a: {"values": a["values"][1:]}, ValueError, r"values must be \["),
    (lambda a: {"segments": a["segments"][1:]}, ValueError, r"segments must be \[600\], got shape \(599,\); pass a w"),
    (lambda a: {"x": torch.zeros(2, 20)}, ValueError, r"block_offsets must be \[7\], got shape \(5,\)"),
    (lambda a: {"bias": torch.zeros(2)}, ValueError, r"bias must be \[300\], got shape \(2,\)"),
    (lambda a: {"x": torch.zeros(2, 12, device="meta")}, ValueError, "block_offsets must be on the device of x, meta"),
    (lambda a: {"out_features": -1}, ValueError, "out_features must be at least 0, got -1; pass the rows of W"),
]


@pytest.mark.parametrize("bad,error,match", REJECTED)
def test_rejects(way, bad, error, match):
    arguments = good(way)
    with pytest.raises(error, match=f"{way}_matmul: {match}"):
        op_of(way)(**arguments | bad(arguments))


@pytest.mark.parametrize("column_block", [0, 7, 32772])
def test_rejects_other_blocks(way, column_block):
    group = GROUPS[way]
    if group == 1 and column_block == 7:
        return
    rule = "1 to 32768" if group == 1 else f"a multiple of {group} up to 32768"
    match = f"column_block must be {rule}, got {column_block}; pass for example {128 * group}"
    with pytest.raises(ValueError, match=f"{way}_matmul: {match}"):
        op_of(way)(**good(way) | {"column_block": column_block})
    rows = rows_of(way, random_dense(300, 12))[: 2 if group == 1 else 3]
    with pytest.raises(ValueError, match=f"{way}_pack: {match}"):
        op_of(way, "_pack")(*rows, columns=12, column_block=column_block)


DAMAGED = [
    ("block_offsets", 1, lambda words: 10**6, "block_offsets must never fall"),
    ("block_offsets", 1, lambda words: -1, "block_offsets must never fall"),
    ("segments", 3, lambda words: -1, "segments must name rows"),
    ("segments", 3, lambda words: 300 << 16, "segments must name rows"),
    ("segments", 0, lambda words: 0, "segments must name rows"),
    ("indices", 0, lambda words: words, r"indices must lie in \[0, {words}\)"),
    ("indices", 0, lambda words: -1, r"indices must lie in \[0, {words}\)"),
    ("indices", -1, lambda words: words // 2, r"indices must lie in \[0, {words}\) and inside x's features"),
]


@pytest.mark.parametrize("name,place,value,match", DAMAGED)
@pytest.mark.parametrize("batch", [1, 20, 70])
def test_damaged_weights_are_refused(way, name, place, value, match, batch):
    words = 8 // GROUPS[way]
    arguments = good(way) | {"x": torch.zeros(batch, 12)}
    arguments[name] = arguments[name].clone()
    arguments[name][place] = value(words)
    for twin in TWINS:
        with pytest.raises(RuntimeError, match=f"{way}_matmul: {match.format(words=words)}"):
            op_of(way, twin)(**arguments)


def test_packing_refuses(way):
    row_offsets, col_indices, values = rows_of(way, random_dense(300, 12))
    arguments = {"row_offsets": row_offsets, "col_indices": col_indices, "columns": 12, "column_block": 8}
    cases = [
        ({"row_offsets": row_offsets.long()}, TypeError, r"row_offsets must be int32, got torch\.int64; "),
        ({"col_indices": 3}, TypeError, "col_indices must be a tensor, got int"),
        ({"columns": 3}, RuntimeError, r"col_indices must lie in \[0, 3\)"),
        ({"row_offsets": row_offsets.flip(0)}, RuntimeError, "row_offsets must rise from 0 to"),
        ({"col_indices": torch.zeros_like(col_indices)}, RuntimeError, "col_indices must rise strictly"),
    ]
    if way != "blocked":
        arguments["values"] = values
        cases += [
            ({"values": values.double()}, TypeError, r"values must be b?\w+, got torch\.float64; convert it"),
            ({"values": values[1:]}, ValueError, r"values must be \[.*like col_indices"),
        ]
    for bad, error, match in cases:
        with pytest.raises(error, match=f"{way}_pack: {match}"):
            op_of(way, "_pack")(**arguments | bad)
