"""Files made to take memory: what a reader may allocate follows from the file's size and max_bytes."""

import json
import struct
import zlib

import pytest
import torch
from torch import nn

from tersetorch.nn import SparseCodebookLinear, SparseConv2d, SparseLinear
from tersetorch.storage import TerseFileError, container, inspect, load, save
from tersetorch.storage.reader import FREE_BYTES, FREE_RATIO

MIB = 1 << 20
# A process of its own for each measurement: a heap that others have used keeps what it gets back.
MEASURE = """
import ctypes, gc, resource, sys, tempfile
from torch import nn
from tersetorch.nn import SparseLinear
from tersetorch.storage import TerseFileError, inspect, load, save

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))

# What a first load and a first refusal import is nobody's bound.
with tempfile.TemporaryDirectory() as folder:
    save(nn.Sequential(nn.Linear(3, 4), SparseLinear.from_dense(nn.Linear(4, 3))), folder + "/m.terse")
    load(folder + "/m.terse"), inspect(folder + "/m.terse")
    try:
        load(folder + "/m.terse", max_bytes=1)
    except TerseFileError:
        pass
gc.collect()
libc = ctypes.CDLL(None)
libc.mallopt(-3, 64 << 10)  # M_MMAP_THRESHOLD: what is freed goes back
libc.malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is the present size again
before = status("VmRSS")
# Far more address space than any bound leaves no chance to a reader that none of them stops.
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (3 << 30),) * 2)
try:
    {read}({path!r}, **{options!r})
except TerseFileError as error:
    print(error, file=sys.stderr)
print(status("VmHWM") - before)
"""


@pytest.fixture
def peak(run_python):
    """Bytes of memory that a read takes at most, beside what was taken before, and the refusal that ended it."""

    def measure(read, path, **options):
        program = MEASURE.format(read=read.__name__, path=str(path), options=options)
        finished = run_python(program, modules=("tersetorch",))
        assert finished.returncode == 0, finished.stderr
        return int(finished.stdout), finished.stderr or None

    return measure


@pytest.fixture
def check_peak(peak):
    """Asserts that a tensor's file takes at most what docs/guide/files.md says."""

    def check(tensor, path, coders="fast"):
        save(nn.ParameterList([nn.Parameter(tensor, requires_grad=False)]), path, coders=coders)
        taken, refusal = peak(load, path)
        assert refusal is None
        assert taken < 3 * tensor.nbytes + 8 * tensor.numel() + path.stat().st_size + MIB

    return check


def packed(text, data=b""):
    """A file whose header is this text, deflated as well as it goes."""
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    body = deflated.compress(text) + deflated.flush()
    body = struct.pack("<I", zlib.crc32(body)) + body
    return container._head(len(data), len(body)) + data + body


def filled(start, item, end, size):
    """A header of about this size of one item again and again."""
    return (start + b",".join([item] * ((size - len(start) - len(end)) // (len(item) + 1))) + end)[:size]


def terse(path, header, streams=()):
    """Writes a forged file and returns its size."""
    path.write_bytes(container.pack(header, list(streams)))
    return path.stat().st_size


ITEMS = {
    "lists": (b'{"t":[],"p":{"x":[', b"[]", b"]}}"),
    "objects": (b'{"t":[],"p":{"x":[', b"{}", b"]}}"),
    "pairs": (b'{"t":[],"p":{"x":[', b'{"":0}', b"]}}"),
    "numbers": (b'{"t":[],"p":{"x":[', b"1e9", b"]}}"),
    "wide characters": (b'{"t":[],"p":{"x":[', '"\U0001f600"'.encode(), b"]}}"),
    "tensors": (b'{"m":{},"t":[', b'{"s":[0],"d":"u8","f":"raw","x":[["raw",0]]}', b"]}"),
}


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("size", [container.FREE_HEADER, pytest.param(container.HEADER_CAP, marks=pytest.mark.slow)])
def test_what_a_header_may_take_follows_from_the_size_of_the_file(tmp_path, item, size, peak):
    path = tmp_path / "m.terse"
    start, text, end = ITEMS[item]
    count = (size - len(start) - len(end)) // (len(text) + 1)
    data = bytes(4 * count) if item == "tensors" and size == container.FREE_HEADER else b""  # checksums of nothing
    path.write_bytes(packed(start + b",".join([text] * count) + end, data))
    file_bytes = path.stat().st_size
    for read in (inspect, load):
        taken, refusal = peak(read, path)
        if size > container.header_cap(file_bytes):
            assert "inflate to a header of at most" in refusal
        assert taken < container.OBJECT_BYTES * container.header_cap(file_bytes) + 2 * file_bytes + 4 * MIB


def test_a_header_that_deflates_too_well_is_written_as_it_is(tmp_path):
    path = tmp_path / "m.terse"
    shared = nn.ReLU()
    header = {"m": {"k": "Sequential", "m": {"": None}}, "t": [], "p": {"x": "x" * (2 * container.FREE_HEADER)}}
    assert terse(path, header) > 2 * container.FREE_HEADER
    assert inspect(path).provenance == header["p"]
    save(nn.Sequential(*[shared] * 50_000), path)
    assert len(load(path)) == 50_000


def test_long_names_are_not_kept_for_every_tensor(tmp_path, peak):
    path = tmp_path / "m.terse"
    tensors = 1500
    leaf = {"k": "ParameterList", "t": {str(number): number for number in range(tensors)}}
    header = {"m": {"k": "Sequential", "m": {"n" * 150_000: leaf}}, "t": []}
    header["t"] = [{"s": [0], "d": "u8", "f": "raw", "x": [["raw", 0]]}] * tensors
    terse(path, header, [b""] * tensors)
    for read in (inspect, load):
        taken, refusal = peak(read, path)
        assert "paths of modules of fewer than 4096 characters" in refusal
        assert taken < 24 * MIB
    with pytest.raises(ValueError, match="fewer than 4096 characters"):
        save(nn.Sequential(nn.ModuleDict({"n" * 5000: nn.Linear(2, 2)})), path)


def parts_of(model, path):
    """Header and streams of a model's file, to be forged."""
    save(model, path)
    header, data, _, _ = container.unpack(path.read_bytes())
    return header, container.split(data, [stream[1] for entry in header["t"] for stream in entry["x"]])


@pytest.mark.parametrize(
    "layout,options",
    [
        ("csr", {}),
        ("csr16", {}),
        ("bitmap", {}),
        ("bitmap_int8", {}),
        ("bitmap_columns", {}),
        ("blocked", {"column_block": 1}),
        ("blocked", {"column_block": 4}),
        ("blocked", {}),
        ("blocked_int8", {"column_block": 4}),
        ("blocked_bfloat16", {"column_block": 2}),
    ],
)
def test_a_layout_of_far_more_columns_than_the_file_has_numbers(tmp_path, layout, options, peak):
    path = tmp_path / "m.terse"
    header, _ = parts_of(SparseLinear.from_dense(nn.Linear(4, 3, bias=False)).eval(), path)
    header["t"][0] |= {"s": [64, (1 << 31) - 1], "f": "sparse", "n": 0, "x": [["gaps", 0, 8], ["raw", 0]]}
    header["t"][0].pop("k", None)
    header["m"]["c"] = {"layout": layout, **options}
    file_bytes = terse(path, header, [b"", b""])
    assert file_bytes < 500
    taken, refusal = peak(load, path)
    assert taken < 2 * FREE_BYTES
    assert refusal is None or "decode to at most 67108864 bytes" in refusal or "for 16-bit indices" in refusal


def test_a_convolution_of_far_more_channels_than_the_file_has_numbers(tmp_path, peak):
    path = tmp_path / "m.terse"
    header, _ = parts_of(SparseConv2d.from_dense(nn.Conv2d(4, 3, 3, bias=False)).eval(), path)
    header["t"][0] |= {"s": [1024, 9 << 25], "f": "sparse", "n": 0, "x": [["gaps", 0, 8], ["raw", 0]]}
    header["t"][0].pop("k", None)
    for layout in ({}, {"layout": "direct_int8"}, {"layout": "direct_bfloat16"}):
        header["m"]["c"] = {"kernel_size": [3, 3], **layout}
        assert terse(path, header, [b"", b""]) < 500
        taken, refusal = peak(load, path)
        assert taken < 2 * FREE_BYTES
        assert "decode to at most 67108864 bytes" in refusal


def test_layers_that_share_a_weight_pay_for_each_of_its_layouts(tmp_path, peak):
    path = tmp_path / "m.terse"
    layer = SparseLinear.from_dense(nn.Linear(64, 4000, bias=False)).eval().pack("blocked")
    header, _ = parts_of(nn.Sequential(layer), path)
    header["m"]["m"] = {str(number): header["m"]["m"]["0"] for number in range(2000)}
    header["t"][0] |= {"f": "sparse-codebook", "k": 1, "x": [["all", 0], ["raw", 4], ["constant", 0]]}
    file_bytes = terse(path, header, [b"", b"\0\0\x80\x3f", b""])
    assert file_bytes < 12_000
    taken, refusal = peak(load, path)
    assert "decode to at most" in refusal
    assert taken < 2 * max(FREE_BYTES, FREE_RATIO * file_bytes)


def test_modules_count(tmp_path, peak):
    path = tmp_path / "m.terse"
    node = {"k": "TransformerEncoderLayer", "c": {"d_model": 1, "nhead": 1}}
    header = {"t": [], "m": {"k": "Sequential", "m": {str(number): node for number in range(5000)}}}
    assert terse(path, header) < 20_000
    taken, refusal = peak(load, path)
    assert taken < 2 * FREE_BYTES
    assert "decode to at most" in refusal


def test_places_that_are_read_one_by_one_count(tmp_path):
    path = tmp_path / "m.terse"
    layer = SparseLinear.from_dense(nn.Linear(64, 64, bias=False)).eval()
    header, _ = parts_of(nn.Sequential(layer), path)
    entry = header["t"][0] | {"s": [1, 1 << 23], "f": "sparse", "n": 1, "x": [["contexts", 2], ["raw", 4]]}
    entry.pop("k", None)
    header["t"] = [entry] * 1000
    node = header["m"]["m"]["0"]
    header["m"]["m"] = {str(number): node | {"t": {"weight": number}} for number in range(1000)}
    file_bytes = terse(path, header, [b"\0\0", b"1234"] * 1000)
    assert FREE_RATIO * file_bytes < 1000 << 23
    with pytest.raises(TerseFileError, match="decode to at most"):
        load(path)


def sparse_tensor(shape, dtype, density):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) < density
    return torch.where(kept, torch.randint(1, 100, shape, generator=generator), 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 0.95])
def test_decoding_takes_at_most_what_the_guide_says(tmp_path, dtype, density, check_peak):
    path = tmp_path / "m.terse"
    tensor = sparse_tensor((1000, 1500), dtype, density)
    check_peak(tensor, path)


@pytest.mark.parametrize("density", [0.1, 0.95, 1.0])
def test_real_weights_take_no_more(tmp_path, density, check_peak):
    check_peak(
        sparse_tensor((1000, 1500), torch.float32, density).sign() * torch.randn(1000, 1500), tmp_path / "m.terse"
    )


def test_whole_columns_of_zeros_take_no_more(tmp_path, check_peak):
    columns = sparse_tensor((1500,), torch.float32, 0.9).sign()
    check_peak(columns * sparse_tensor((1000, 1500), torch.float32, 0.95), tmp_path / "m.terse")


@pytest.mark.parametrize("density", [0.5, 0.95])
@pytest.mark.parametrize("cls", [SparseLinear, SparseCodebookLinear])
def test_a_sparse_layer_takes_at_most_what_the_guide_says(tmp_path, cls, density, peak):
    path = tmp_path / "m.terse"
    layer = nn.Linear(1500, 1000, bias=False)
    layer.weight = nn.Parameter(sparse_tensor((1000, 1500), torch.float32, density))
    sparse = cls.from_dense(layer).eval()
    save(sparse, path, coders="fast")
    taken, refusal = peak(load, path)
    assert refusal is None
    assert taken < 48 * sparse.sparse_weight.nnz + path.stat().st_size + MIB


def test_a_sparse_layer_far_larger_dense_than_its_file_loads(tmp_path, peak):
    path = tmp_path / "m.terse"
    weight = torch.zeros(4096, 9216)
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(weight.numel(), (30_000,), generator=generator)
    weight.view(-1)[at] = torch.randn(len(at), generator=generator)
    layer = nn.Linear(1, 1, bias=False)
    layer.in_features, layer.out_features, layer.weight = 9216, 4096, nn.Parameter(weight)
    sparse = SparseLinear.from_dense(layer).eval().pack("blocked")
    save(sparse, path, coders="fast")
    taken, refusal = peak(load, path)
    assert refusal is None
    assert taken < 40 * path.stat().st_size + 8 * MIB
    assert torch.equal(load(path).col_indices, sparse.col_indices)


def repeated(values, shape, dtype):
    return torch.tensor(values).repeat(shape[0] * shape[1] // len(values)).view(shape).to(dtype)


SHAPE = (500, 1500)
STEPS = torch.arange(1500).repeat(500, 1)
# Tensors whose streams say least for each number, in every form of a tensor.
THIN = {
    "zeros": lambda dtype: torch.zeros(SHAPE, dtype=dtype),
    "one value": lambda dtype: torch.full(SHAPE, 7, dtype=dtype),
    "one other": lambda dtype: torch.where(STEPS == 700, 5, 1).to(dtype),
    "runs": lambda dtype: (STEPS // 400).to(dtype),
    "rising": lambda dtype: (STEPS % 100).to(dtype),
    "rows of two values": lambda dtype: repeated([3.0, -3.0], SHAPE, dtype),
    "all codes": lambda dtype: torch.arange(750_000).view(SHAPE).remainder(256).to(dtype),
    "scaled integers": lambda dtype: (STEPS % 15 - 7).float().mul(torch.rand(500, 1)).to(dtype),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("coders", ["fast", "smallest"])
@pytest.mark.slow
def test_streams_that_say_least_take_no_more(tmp_path, dtype, coders, check_peak):
    path = tmp_path / "m.terse"
    forms = set()
    for make in THIN.values():
        check_peak(make(dtype), path, coders)
        forms |= {(one.form, *one.coders) for one in inspect(path).tensors}
    assert len(forms) > 4


@pytest.mark.parametrize("form", ["sparse", "codebook", "raw"])
def test_a_tensor_of_nothing_but_zeros_may_be_larger_only_by_max_bytes(tmp_path, form, peak):
    """A few bytes may stand for any number of zeros: the limit is that of what they become."""
    path = tmp_path / "m.terse"
    spec = {
        "sparse": {"f": "sparse", "n": 0, "x": [["gaps", 0, 8], ["raw", 0]]},
        "codebook": {"f": "codebook", "k": 1, "x": [["raw", 4], ["constant", 0]]},
        "raw": {"f": "raw", "x": [["planes", 36]]},
    }[form]
    tensors = nn.ParameterList([nn.Parameter(torch.zeros(2), requires_grad=False)])
    for size, refused in ((1 << 22, form == "raw"), (1 << 30, True)):
        header, _ = parts_of(tensors, path)
        header["m"] = json.loads(json.dumps(header["m"]).replace("[2]", f"[{size}]"))
        header["t"][0] = {"s": [size], "d": header["t"][0]["d"], **spec}
        streams = [bytes(stream[1]) for stream in header["t"][0]["x"]]
        assert terse(path, header, streams) < 400
        taken, refusal = peak(load, path)
        assert (refusal is not None) == refused
        assert taken < (17 << 24) + 4 * MIB
        if size == 1 << 30:
            assert "decode to at most 67108864 bytes" in refusal or "must hold 1073741824 items in a stream" in refusal
        elif not refused:
            assert "decode to at most" in peak(load, path, max_bytes=(1 << 24) - 1)[1]
