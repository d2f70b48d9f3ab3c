"""What holds for every op on a CUDA device: a table with a call of each, and the rules that all of them keep."""

import os

import pytest
import torch

from tersetorch import ops

OPS = torch.ops.tersetorch
PRETEND = "TERSETORCH_PRETEND_CUDA" in os.environ
IN, TAPS, IMAGE = 70, 9, (7, 6)
CONV = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
# Once is enough: the tests of each op run it under every schedule.
pytestmark = pytest.mark.parametrize("device", ["forward"], indirect=True)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def randint(high, *shape, low=0, dtype=torch.uint8):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def positions(rows, columns):
    """row_offsets and col_indices of random rows, the second of which is empty."""
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) < 0.3
    kept[1:2] = False
    return torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int(), kept.nonzero()[:, 1].int()


def codes_of(places):
    """Codes of a sparse weight beside a codebook; the first entry stands for what is not there."""
    values, codebook = randint(7, len(places), low=1), randn(7)
    codebook[0] = 0
    return {"values": values, "codebook": codebook}


def epilogue(rows):
    return {"scale": randn(rows), "bias": randn(rows)}


def thresholds(rows):
    return {"thresholds": randint(5, rows, low=-5, dtype=torch.int32)}


# ---- a call of each op: rows of the weight and a number of samples -> its arguments by name


def csr(rows, batch):
    row_offsets, col_indices = positions(rows, IN)
    weight = {"row_offsets": row_offsets, "col_indices": col_indices, **codes_of(col_indices)}
    return {"x": randn(batch, IN), **weight, "bias": randn(rows)}


def csr_grad_x(rows, batch):
    taken = csr(rows, batch)
    del taken["x"], taken["bias"]
    return {"grad_y": randn(batch, rows), **taken, "in_features": IN}


def csr_grad_values(rows, batch):
    row_offsets, col_indices = positions(rows, IN)
    return {
        "grad_y": randn(batch, rows),
        "x": randn(batch, IN),
        "row_offsets": row_offsets,
        "col_indices": col_indices,
    }


def bitmap(rows, batch, int8=False):
    row_offsets, places = positions(rows, IN)
    weight = {"bitmap": ops.bitmap_from_rows(row_offsets, places, columns=IN), "row_offsets": row_offsets}
    if int8:
        values = randint(127, len(places), low=-127, dtype=torch.int8)
        weight |= {"values": values, "scales": randn(rows), "mode": "int8"}
    else:
        weight |= codes_of(places)
    return {"x": randn(batch, IN), **weight, "bias": randn(rows)}


def bitmap_to_rows(rows, batch):
    taken = bitmap(rows, batch)
    return {name: taken[name] for name in ("bitmap", "row_offsets")} | {"columns": IN, "nnz": len(taken["values"])}


def bitmap_columns(rows, batch):
    column_offsets, places = positions(IN, rows)
    weight = {"bitmap": ops.bitmap_from_rows(column_offsets, places, columns=rows), "column_offsets": column_offsets}
    return {"x": randn(batch, IN), **weight, **codes_of(places), "bias": randn(rows), "out_features": rows}


def blocked(rows, batch, kind=""):
    row_offsets, places = positions(rows, IN)
    sizes, names = {"columns": IN, "column_block": 16}, ("block_offsets", "segments", "indices", "values")
    if kind == "bfloat16":
        values = randn(len(places)).bfloat16()
        weight = dict(
            zip(names, ops.blocked_bfloat16_pack(row_offsets, places, values, **sizes), strict=True), bias=randn(rows)
        )
    elif kind == "int8":
        values = randint(127, len(places), low=-127, dtype=torch.int8)
        packed = ops.blocked_int8_pack(row_offsets, places, values, **sizes)
        weight = dict(zip((*names, "row_sums"), packed, strict=True), row_scales=randn(rows), bias=randn(rows))
    else:
        block_offsets, segments, indices, sources = ops.blocked_pack(row_offsets, places, **sizes)
        weight = dict(zip(names, (block_offsets, segments, indices, sources), strict=True), **codes_of(sources))
        weight["bias"] = randn(rows)
    return {"x": randn(batch, IN), **weight, "out_features": rows, "column_block": 16}


def coded(rows, columns=IN):
    return {
        "codes": ops.codebook_pack(randint(11, rows, columns), entries=11, column_block=20),
        "codebook": randn(-(-columns // 20), 11),
        "column_block": 20,
    }


def codebook(rows, batch, mode="exact"):
    return {"x": randn(batch, IN), **coded(rows), "bias": randn(rows), "mode": mode}


def codebook_reduce(rows, batch):
    weight = coded(rows)
    tables, entries = weight.pop("codebook").shape
    return {"grad": randn(rows, IN), **weight, "tables": tables, "entries": entries}


def embedding(rows, batch):
    indices = randint(max(1, rows), batch if rows else 0, dtype=torch.int64)
    return {"indices": indices, **coded(rows), "columns": IN, "padding_idx": 2}


def embedding_reduce(rows, batch):
    taken = embedding(rows, batch)
    del taken["columns"]
    tables, entries = taken.pop("codebook").shape
    return {"grad": randn(len(taken["indices"]), IN), **taken, "tables": tables, "entries": entries}


def codebook_conv(rows, batch, mode="exact"):
    weight = coded(rows, 3 * TAPS)
    return {"x": randn(batch, 3, *IMAGE), **weight, "bias": randn(rows), **CONV, "groups": 1, "mode": mode}


def sparse_conv(rows, batch, mode="exact"):
    row_offsets, places = positions(rows, 3 * TAPS)
    stored = codes_of(places) if mode == "exact" else {"values": randn(len(places)), "codebook": None}
    weight = {"row_offsets": row_offsets, "col_indices": places, **stored, "bias": randn(rows)}
    return {"x": randn(batch, 3, *IMAGE), **weight, **CONV, "groups": 1, "mode": mode}


def flat_conv(rows, batch):
    filters = ops.FlatFilters(randn(rows, 3), randn(rows, 3), randn(rows, 3), bias=randn(rows))
    sizes = ops.flat_conv2d_sizes(filters, padding=1)
    return {"x": randn(batch, 3, *IMAGE), "stages": [ops.flat_conv2d_pack(filters)], "sizes": sizes, "relu": True}


def product(rows, batch, mode="exact", entries=11):
    codes = ops.product_pack(randint(entries, rows, 2 * 18), entries)
    weight = {"codes": codes, "codebooks": randn(2, 18, 4, entries)}
    return {"x": randn(batch, IN), **weight, "bias": randn(rows), "out_features": rows, "mode": mode}


def product_decode(rows, batch):
    taken = product(rows, batch)
    return {name: taken[name] for name in ("codes", "codebooks", "out_features")} | {"in_features": IN}


def signs(rows):
    return {"weight": ops.xnor_pack(ops.sign_pack(randn(rows, IN))), "out_features": rows}


def xnor(rows, batch):
    return {"x": randn(batch, IN), **signs(rows), "in_features": IN, **epilogue(rows)}


def xnor_thresholds(rows, batch):
    return {"x": ops.sign_pack(randn(batch, IN)), **signs(rows), "in_features": IN, **thresholds(rows)}


def sign_matmul(rows, batch):
    return {"x": randn(batch, IN), **signs(rows), **epilogue(rows)}


def bitplane(rows, batch):
    return {"x": randint(256, batch, IN), **signs(rows), "in_features": IN, **epilogue(rows)}


def bitplane_conv(rows, batch):
    weight = ops.xnor_pack(ops.sign_pack(randn(rows, 3 * TAPS)))
    return {"x": randint(256, batch, 3, *IMAGE), "weight": weight, "out_channels": rows, **CONV, **thresholds(rows)}


def xnor_conv(rows, batch, groups=1):
    weight = ops.xnor_conv2d_pack(ops.sign_pack_images(randn(rows, 6 // groups, 3, 3)), groups)
    sizes = {"in_channels": 6, "out_channels": rows, **CONV, "groups": groups}
    return {"x": randn(batch, 6, *IMAGE), "weight": weight, **sizes, **epilogue(rows)}


def xnor_conv_thresholds(rows, batch):
    """Packed images of groups that begin amid words."""
    taken = xnor_conv(rows, batch, groups=2) | {"scale": None, "bias": None} | thresholds(rows)
    return taken | {"x": ops.sign_pack_images(taken["x"])}


def sign_pool(rows, batch):
    bits = ops.sign_pack_images(randn(batch, 70, *IMAGE))
    return {"x": bits, **CONV, "ceil_mode": True, "flips": randint(99, bits.shape[-1], dtype=torch.int64)}


def rounded(rows, batch):
    return {"x": randn(batch, IN), "integer_bits": 2, "fraction_bits": 5, "rounding": "stochastic", "seed": 3}


FORMAT = {"sum_fraction_bits": 9, "integer_bits": 6, "fraction_bits": 2, "dtype": torch.int8, "relu": True}


def fixed(rows, batch, dtype=torch.int8):
    x, weight = randint(128, batch, IN, low=-128, dtype=dtype), randint(128, rows, IN, low=-128, dtype=dtype)
    bias = randint(99, rows, dtype=torch.int64)
    return {"x": x, "packed": ops.fixed_pack(weight), "bias": bias, "rows": rows, **FORMAT}


def fixed_conv(rows, batch):
    x, weight = (randint(128, *shape, low=-128, dtype=torch.int8) for shape in ((batch, 3, *IMAGE), (rows, 3, 3, 3)))
    packed, groups = ops.fixed_conv2d_pack(weight)
    bias = randint(99, rows, dtype=torch.int64)
    return {"x": x, "packed": packed, "bias": bias, "rows": rows, **CONV, "groups": groups, **FORMAT}


# An op's name, and after a space what is special about this call of it.
CALLS = {
    "csr_matmul": csr,
    "csr_matmul_grad_x": csr_grad_x,
    "csr_matmul_grad_values": csr_grad_values,
    "bitmap_matmul": bitmap,
    "bitmap_matmul int8": lambda rows, batch: bitmap(rows, batch, True),
    "bitmap_columns_matmul": bitmap_columns,
    "bitmap_to_rows": bitmap_to_rows,
    "blocked_matmul": blocked,
    "blocked_bfloat16_matmul": lambda rows, batch: blocked(rows, batch, "bfloat16"),
    "blocked_int8_matmul": lambda rows, batch: blocked(rows, batch, "int8"),
    "codebook_matmul": codebook,
    "codebook_matmul bfloat16": lambda rows, batch: codebook(rows, batch, "bfloat16"),
    "codebook_matmul int8": lambda rows, batch: codebook(rows, batch, "int8"),
    "codebook_matmul many bfloat16": lambda rows, batch: codebook(rows, 8 * batch, "bfloat16"),
    "codebook_matmul many int8": lambda rows, batch: codebook(rows, 8 * batch, "int8"),
    "codebook_dense": lambda rows, batch: {**coded(rows), "columns": IN},
    "codebook_reduce": codebook_reduce,
    "codebook_embedding": embedding,
    "codebook_embedding_reduce": embedding_reduce,
    "codebook_conv2d": codebook_conv,
    "codebook_conv2d int8": lambda rows, batch: codebook_conv(rows, batch, "int8"),
    "sparse_conv2d": sparse_conv,
    "sparse_conv2d int8": lambda rows, batch: sparse_conv(rows, batch, "int8"),
    "flat_conv2d": flat_conv,
    "product_matmul": product,
    "product_matmul int8": lambda rows, batch: product(rows, batch, "int8"),
    "product_matmul 8 bits": lambda rows, batch: product(rows, batch, entries=40),
    "product_decode": product_decode,
    "sign_pack": lambda rows, batch: {"x": randn(batch, IN)},
    "sign_pack_images": lambda rows, batch: {"x": randn(batch, IN, *IMAGE)},
    "sign_max_pool2d": sign_pool,
    "xnor_matmul": xnor,
    "xnor_matmul thresholds": xnor_thresholds,
    "xnor_conv2d": xnor_conv,
    "xnor_conv2d thresholds": xnor_conv_thresholds,
    "sign_matmul": sign_matmul,
    "bitplane_matmul": bitplane,
    "bitplane_conv2d": bitplane_conv,
    "fixed_round": rounded,
    "fixed_round_whole": lambda rows, batch: rounded(rows, batch) | {"dtype": torch.int8},
    "fixed_matmul": fixed,
    "fixed_matmul int16": lambda rows, batch: fixed(rows, batch, torch.int16),
    "fixed_conv2d": fixed_conv,
}
CALLS |= {f"{op}_inference": CALLS[op] for op in list(CALLS) if hasattr(OPS, f"{op}_inference")}

# How many arrays a call takes from PyTorch beside its output; a graph keeps them in its own pool.
SCRATCH = {
    "csr_matmul": 1,  # samples in panels
    "bitmap_matmul": 1,  # likewise
    "bitmap_matmul int8": 3,  # and rounded samples, their scales
    "blocked_matmul": 1,
    "blocked_bfloat16_matmul": 2,  # and rounded samples
    "blocked_int8_matmul": 3,  # and their scales
    "codebook_matmul int8": 4,  # and those of the tables
    "codebook_matmul many int8": 4,
    "codebook_conv2d int8": 4,
    "codebook_reduce": 1,  # sums of parts of the rows
    "sparse_conv2d int8": 1,  # scales
    "flat_conv2d": 1,  # what the lateral filters give
    "product_matmul": 1,  # sums of parts of the columns
    "product_matmul int8": 3,  # and what the tables' scales are made from
    "product_matmul 8 bits": 1,
    "xnor_matmul": 1,  # packed samples
    "xnor_conv2d": 1,
    "xnor_conv2d thresholds": 1,  # groups of channels in words of their own
    "fixed_matmul": 1,  # whole sums
    "fixed_matmul int16": 1,
    "fixed_conv2d": 1,
}
each_call = pytest.mark.parametrize("call", CALLS)


def run(call, arguments):
    return getattr(OPS, call.split()[0])(**arguments)


def each_tensor(arguments, change):
    """The arguments with each of their tensors changed."""

    def changed(value):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [change(t) for t in value]
        return change(value) if isinstance(value, torch.Tensor) else value

    return {name: changed(value) for name, value in arguments.items()}


def to(device, arguments):
    return each_tensor(arguments, lambda t: t.to(device))


def assert_close(got, want):
    torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=1e-2)


def test_every_op_has_a_call(device):
    names = [name.removeprefix("tersetorch::") for name in torch._C._dispatch_get_all_op_names()]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ours = {n for n in names if n in dir(OPS) and has_kernel(f"tersetorch::{n}", "CUDA")}
    assert ours == {call.split()[0] for call in CALLS}


def recorded(device, call, arguments):
    """What a graph gives that recorded the call; on the pretend device, where it would refuse to, the call raises."""
    if PRETEND:
        with device.forbid_waiting():
            return run(call, arguments)
    run(call, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(call, arguments)
    y.zero_()
    graph.replay()
    return y


@each_call
def test_a_graph_can_record_it(request, device, call):
    arguments = CALLS[call](10, 9)
    place = request.getfixturevalue("emulator") if PRETEND else device
    assert_close(recorded(place, call, to(device, arguments)), run(call, arguments))


@each_call
def test_it_runs_on_the_current_stream_of_its_device(emulator, call):
    """It takes no more memory than said, and the caller's device is current again."""
    moved, op = to("cuda:1", CALLS[call](10, 9)), call.replace("_inference", "")
    emulator.use_stream(1, 0x20)
    allocated, launched = emulator.allocations(), emulator.launches()
    y = run(call, moved)
    emulator.use_stream(1, 0)
    assert emulator.allocations() == allocated + 1 + SCRATCH.get(op, 0)
    assert emulator.launches() > launched and emulator.stream() == 0x2020 and emulator.device() == 1
    assert torch.accelerator.current_device_index() == 0 and y.device == torch.device("cuda:1")


@each_call
def test_nothing_to_do_is_done(device, call):
    for rows, batch in ((10, 0), (0, 9)):
        arguments = CALLS[call](rows, batch)
        assert_close(run(call, to(device, arguments)), run(call, arguments))


@each_call
def test_memory_may_lie_anyhow(emulator, call):
    arguments = CALLS[call](10, 9)
    want = run(call, arguments)
    moved = to("cuda", arguments)
    assert_close(run(call, each_tensor(moved, emulator.unaligned)), want)
    apart = each_tensor(moved, lambda t: torch.stack([t, t.flip(0)], -1)[..., 0])
    assert_close(run(call, apart), want)


@each_call
def test_tensors_elsewhere_are_refused_by_name(emulator, call):
    """Each tensor in turn on the CPU and on another GPU; where the first one strayed, the second is named."""
    arguments, op = CALLS[call](10, 9), call.split()[0].replace("_inference", "")
    moved = to("cuda:0", arguments)
    tensors = [name for name, value in moved.items() if each_tensor({"": value}, lambda t: None)[""] is not value]
    for i, name in enumerate(tensors):
        strayed = "|".join(tensors) if i == 0 else name
        for place in ("cpu", "cuda:1"):
            if len(tensors) == 1:
                continue
            with pytest.raises(RuntimeError, match=rf"{op}: ({strayed}) must be on .*, got .*; move it"):
                run(call, moved | to(place, {name: arguments[name]}))


def gradients(call, arguments):
    """Those of every number that has one."""
    leaves = [value.requires_grad_() for value in arguments.values() if is_float(value)]
    y = run(call, arguments)
    found = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    return [grad for grad in found if grad is not None]


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# Those that autograd knows, but for flat_conv2d's, whose depthwise convolutions the pretend device lacks.
DIFFERENTIABLE = [
    "csr_matmul",
    "csr_matmul_grad_x",
    "csr_matmul_grad_values",
    "bitmap_matmul",
    "bitmap_columns_matmul",
    "blocked_matmul",
    "codebook_matmul",
    "codebook_dense",
    "codebook_reduce",
    "codebook_embedding",
    "codebook_conv2d",
    "sparse_conv2d",
    "product_matmul",
    "product_decode",
    "sign_matmul",
    "fixed_round",
]


@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_a_graph_can_record_its_gradients(emulator, call):
    want = gradients(call, CALLS[call](10, 9))
    moved = to("cuda:1", CALLS[call](10, 9))
    with emulator.forbid_waiting():
        got = gradients(call, moved)
    assert torch.accelerator.current_device_index() == 0 and emulator.device() == 1
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("cuda:1")
        assert_close(a, b)


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.ones(3).to(t.device),
        lambda t: t.new_tensor(5),
        lambda t: torch.repeat_interleave(t),
    ],
)
def test_the_pretend_device_refuses_to_wait(emulator, wait):
    t = torch.tensor([1, 0, 2]).to("cuda")
    wait(t)
    with emulator.forbid_waiting(), pytest.raises(RuntimeError, match="waits, which no CUDA graph can record"):
        wait(t)
    wait(t)


def test_an_op_for_the_cpu_is_refused(device):
    with pytest.raises(NotImplementedError, match="Could not run 'tersetorch::csr_pack' with arguments from the 'CUDA"):
        OPS.csr_pack(torch.ones(2, 3).to(device))
