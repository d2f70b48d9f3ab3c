"""Weights that were integers times scales: bytes, bits, what is left alone, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import quantization

from tersetorch.nn import CodebookLinear
from tersetorch.storage import TerseFileError, import_quantized, inspect, integers, read_quantized
from tersetorch.storage.entry import Entry
from tersetorch.storage.tensors import decode_tensor, encode_tensor

# What bitsandbytes multiplies by, after its scale.
FACTOR = 7.874015718698502e-3


def gaussian(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 0.5 + torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g)
    return torch.randn(shape, generator=g) * 0.03 * rows


def quantized(weight, run, bits, dtype=torch.float32, asymmetric=False, scale_dtype=None, sign=1):
    """Weight in integers of so many bits, a scale for each run: the tensor as libraries multiply it, the integers."""
    rows = weight.reshape(-1, run)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    top = (1 << bits - 1) - 1
    width = (high - low) / (2 * top + 1) if asymmetric else torch.maximum(high, -low) / top
    scale = (sign * width).to(scale_dtype or dtype)
    zero = (-low / width).round() if asymmetric else -top - 1
    if not asymmetric:
        zero = torch.full_like(width, top + 1)
    codes = (rows / scale.float()).nan_to_num().round().add(zero).clamp(0, 2 * top + 1)
    whole = (codes - zero).to(torch.int16)
    return (whole.to(dtype) * scale).to(dtype).reshape(weight.shape), whole


def round_trip(tensor, same_bits):
    entry, encoded = encode_tensor("w", tensor, True)
    read = Entry.from_json(entry.to_json())
    assert read == entry
    same_bits(decode_tensor(read, [stream.data for stream in encoded]), tensor)
    return entry, [len(stream.data) for stream in encoded]


def entropy(whole):
    """Bytes of integers, each at its frequency."""
    shares = whole.unique(return_counts=True)[1] / whole.numel()
    return float(-(shares * shares.log2()).sum()) * whole.numel() / 8


@pytest.mark.parametrize("dtype", integers.DTYPES, ids=str)
@pytest.mark.parametrize("run,bits", [(512, 8), (128, 4), (64, 4), (32, 4), (512, 2)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_take_the_entropy_of_the_integers_and_the_scales(same_bits, dtype, run, bits, asymmetric):
    weight, whole = quantized(gaussian(256, 512), run, bits, dtype, asymmetric)
    entry, (scales, codes) = round_trip(weight, same_bits)
    assert (entry.form, entry.block, entry.factor) == ("integers", run, 0)
    assert scales <= dtype.itemsize * weight.numel() / run
    assert codes <= 1.01 * entropy(whole) + 300
    assert (entry.least, entry.entries) == (int(whole.min()), int(whole.max() - whole.min()) + 1)


@pytest.mark.parametrize(
    "shape,run",
    [((2, 16), 16), ((1, 96), 96), ((7, 48), 48), ((3, 96), 32), ((13, 17), 17), ((5, 3, 3, 3), 27), ((64, 1), 64)],
)
def test_edge_shapes(same_bits, shape, run):
    weight = quantized(gaussian(*shape), run, 8)[0]
    numbers = weight.reshape(shape[0], -1).numpy().view(np.uint32)
    found = integers.find(numbers, torch.float32, None if run < weight.numel() else np.unique(numbers))
    assert found is not None and found.run == run
    round_trip(weight, same_bits)


def test_a_convolution_keeps_a_scale_for_each_output(same_bits):
    weight = quantized(gaussian(64, 32, 3, 3), 288, 8)[0].contiguous(memory_format=torch.channels_last)
    entry, sizes = round_trip(weight, same_bits)
    assert (entry.form, entry.block) == ("integers", 288)
    assert sum(sizes) < 64 * 288 + 64 * 4


def test_one_scale_for_all(same_bits):
    weight, whole = quantized(gaussian(64, 96), 64 * 96, 8, asymmetric=True)
    entry, (scales, codes) = round_trip(weight, same_bits)
    assert (entry.form, entry.block, scales) == ("integers", 64 * 96, 4)
    assert codes <= 1.05 * entropy(whole)


def test_a_scale_that_is_multiplied_in_two_steps(same_bits):
    weight = gaussian(256, 512).half()
    scale = weight.abs().amax(1, keepdim=True).float()
    whole = (weight.float() * (127 / scale)).round().to(torch.int8)
    entry, (scales, codes) = round_trip(whole * scale * FACTOR, same_bits)
    assert entry.form == "integers" and entry.factor == int(np.float32(FACTOR).view(np.uint32))
    assert scales <= 2 * 256 and codes <= 1.01 * entropy(whole) + 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_float32_scales_that_were_rounded(same_bits, dtype):
    weight, whole = quantized(gaussian(256, 512), 512, 8, dtype, scale_dtype=torch.float32)
    entry, sizes = round_trip(weight, same_bits)
    assert entry.form == "integers" and sum(sizes) <= 1.02 * entropy(whole) + 4 * 256


def test_runs_of_zeros_negative_scales_and_negative_zeros(same_bits):
    weight = quantized(gaussian(64, 256), 32, 4, sign=-1)[0]  # zeros are -0.0
    assert bool((weight.signbit() & (weight == 0)).any())
    weight[3], weight[5, :32] = 0, -0.0
    entry, _ = round_trip(weight, same_bits)
    assert (entry.form, entry.block) == ("integers", 32)
    mixed = weight.clone()
    mixed[7, :8] = torch.tensor([0.0, -0.0] * 4)
    assert round_trip(mixed, same_bits)[0].form != "integers"


def test_other_weights_keep_their_forms(same_bits):
    strange = quantized(gaussian(64, 256), 256, 8)[0]
    for row, value in enumerate((float("nan"), float("inf"), 1e-39, 1 / 3)):
        changed = strange.clone()
        changed[row, 9] = value
        assert round_trip(changed, same_bits)[0].form != "integers"
    random = gaussian(256, 512)
    pruned = torch.where(random.abs() > 0.05, random, 0)
    tiny = quantized(gaussian(64, 256) * 1e-38, 256, 8)[0]
    wide = quantized(gaussian(64, 256), 256, 10)[0]
    for tensor in (random, pruned, random.bfloat16(), pruned.half(), tiny, wide, strange.double(), strange[0]):
        assert round_trip(tensor, same_bits)[0].form != "integers"


def test_never_larger_than_without(same_bits, monkeypatch):
    cases = [(gaussian(64, 64), 64, 8), (gaussian(8, 16), 16, 4), (gaussian(300, 16), 16, 2), (gaussian(40, 48), 48, 1)]
    tensors = [quantized(*case)[0] if case[2] > 1 else case[0].sign() for case in cases]
    tensors += [torch.ones(20, 20), torch.eye(40), tensors[0] * (gaussian(64, 64, seed=1) > 0.03)]
    sizes = [sum(round_trip(tensor, same_bits)[1]) for tensor in tensors]
    monkeypatch.setattr(integers, "find", lambda *args: None)
    without = [sum(round_trip(tensor, same_bits)[1]) for tensor in tensors]
    assert all(size <= other for size, other in zip(sizes, without, strict=True))


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"w": 7}, "runs that divide the weights"),
        ({"w": 1}, "hold 16384 items|hold at most"),
        ({"k": 0}, "integers of at most 255"),
        ({"k": 390}, "integers of at most 255"),
        ({"i": -256}, r"integer in \[-255, 255\] as the least integer"),
        ({"i": 200}, "integers of at most 255"),
        ({"m": 0x7F800000}, "normal, positive number as a factor"),
        ({"m": 0xBF800000}, "normal, positive number as a factor"),
        ({"m": 1}, "normal, positive number as a factor"),
        ({"m": 1 << 32}, "as a bit pattern"),
        ({"s": [64 * 256]}, "matrix of float32 or bfloat16 or float16"),
        ({"d": "f64"}, "matrix of float32 or bfloat16 or float16"),
        ({"f": "codebook"}, "with integers only|blocks of columns"),
        ({"n": 3}, "only the fields of a tensor stored as integers"),
    ],
)
def test_damaged_entries_are_refused(changed, message):
    entry, _ = encode_tensor("w", quantized(gaussian(64, 256), 256, 8)[0], True)
    entry = replace(entry, streams=(replace(entry.streams[0], coder="raw", nbytes=4 * 64), entry.streams[1]))
    assert Entry.from_json(entry.to_json()) == entry
    with pytest.raises(TerseFileError, match=message):
        Entry.from_json(entry.to_json() | changed)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_scales_without_finite_products_are_refused(scale):
    entry, encoded = encode_tensor("w", quantized(gaussian(64, 256), 256, 8)[0], True)
    entry = replace(entry, streams=(replace(entry.streams[0], coder="raw"), entry.streams[1]))
    scales = np.full(64, 0.01, np.float32)
    scales[5] = scale
    with pytest.raises(TerseFileError, match="finite scales, and products that are finite"):
        decode_tensor(entry, [scales.tobytes(), encoded[1].data])


def test_codes_past_the_integers_are_refused():
    entry, encoded = encode_tensor("w", quantized(gaussian(64, 256), 256, 3)[0], True)
    entry = replace(entry, streams=(entry.streams[0], replace(entry.streams[1], coder="packed")), entries=6)
    with pytest.raises(TerseFileError, match="codes below 6"):
        decode_tensor(entry, [encoded[0].data, np.full(64 * 256 * 3 // 8, 255, np.uint8).tobytes()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("qconfig", [quantization.per_channel_dynamic_qconfig, quantization.default_dynamic_qconfig])
def test_an_imported_int8_layer_takes_a_byte_a_weight(tmp_path, round_trip, qconfig):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512))
    model = import_quantized(quantization.quantize_dynamic(model, {nn.Linear: qconfig}))
    round_trip(model)
    found = inspect(tmp_path / "model.terse")
    weight = found.tensors[0]
    scales = 512 if qconfig is quantization.per_channel_dynamic_qconfig else 1
    assert weight.form == "integers" and weight.parts.keys() >= {"codes", "scales", "checksums"}
    assert weight.parts["codes"] <= 256 * 512 and weight.parts["scales"] <= 4 * scales
    assert found.file_bytes <= 256 * 512 + 4 * (512 + scales) + 600


def bitsandbytes(rows, columns):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows, columns), generator=g).to(torch.int8)
    return {"0.weight": codes, "0.SCB": (torch.rand(rows, generator=g) + 0.5).half().float()}


def test_a_layer_of_bitsandbytes_takes_a_byte_a_weight(round_trip, tmp_path):
    round_trip(import_quantized(bitsandbytes(256, 128), nn.Sequential(nn.Linear(128, 256, bias=False))))
    weight = inspect(tmp_path / "model.terse").tensors[0]
    assert weight.form == "integers" and weight.nbytes <= 256 * 128 + 2 * 256 + 100


def test_the_tables_of_a_layer_of_codes_are_integers(round_trip, tmp_path):
    weight = read_quantized(bitsandbytes(256, 128))["0.weight"]
    round_trip(CodebookLinear(weight.to_codebook_weight()))
    tables = next(tensor for tensor in inspect(tmp_path / "model.terse").tensors if tensor.name == "codebook")
    assert tables.form == "integers" and tables.shape == (256, 256) and tables.nbytes < 4 * 256 * 256 / 10
