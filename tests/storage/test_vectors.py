"""Weights of shared sub-vectors, and of sums of them: sizes, bits, notes, and what is refused."""

import copy
import pickle
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats.vector_codes import VectorCodes, decode, noted_codes
from tersetorch.nn import ProductLinear, ResidualLinear
from tersetorch.storage import TerseFileError, streams
from tersetorch.storage.entry import Entry
from tersetorch.storage.tensors import decode_tensor, encode_tensor


def made(rows, columns, stages, width, entries, one_book=False, dtype=torch.float32):
    """A weight and the codes that it has."""
    g = torch.Generator().manual_seed(0)
    segments = -(-columns // width)
    books = torch.randn(stages, 1 if one_book else segments, width, entries, generator=g)
    codes = torch.randint(entries, (rows, stages * segments), generator=g).to(torch.uint8)
    return decode(codes, books, columns).to(dtype), VectorCodes(codes, books)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "width", "entries", "one_book"),
    [(120, 64, 4, 16, False), (120, 65, 4, 16, True), (90, 30, 30, 7, False), (500, 30, 7, 200, True)],
)
def test_sub_vectors_come_back_to_the_bit_in_the_bytes_of_codes_and_codebooks(
    same_bits, rows, columns, width, entries, one_book, dtype
):
    weight = made(rows, columns, 1, width, entries, one_book, dtype)[0]
    entry, encoded = encode_tensor("w", weight, True)
    segments = -(-columns // width)
    assert (entry.form, entry.block, entry.stages, entry.one_book) == ("vectors", width, 1, one_book and segments > 1)
    assert entry.entries <= entries and entry.stored == rows * segments
    bits = rows * segments * (entries - 1).bit_length()
    codebooks = (1 if one_book else segments) * width * entries * dtype.itemsize
    assert sum(len(stream.data) for stream in encoded) <= bits / 8 + codebooks
    assert Entry.from_json(entry.to_json()) == entry
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_nan_keeps_its_bits(same_bits, dtype):
    weight = made(64, 100, 1, 2, 4, dtype=dtype)[0]
    for row, pattern in enumerate((0x7FC0, 0x7FC5, 0x7FFF, -1)):
        weight.view(torch.int16)[row] = pattern
    entry, encoded = encode_tensor("w", weight, True)
    assert entry.form == "vectors"
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("stages", "width"), [(2, 48), (6, 48), (2, 12)])
def test_sums_come_back_to_the_bit_where_their_codes_are_known(same_bits, dtype, stages, width):
    weight, found = made(200, 48, stages, width, 9, dtype=dtype)
    entry, encoded = encode_tensor("w", weight, True, sums=found)
    assert (entry.form, entry.stages, entry.block, entry.dtype) == ("vectors", stages, width, dtype)
    assert sum(len(stream.data) for stream in encoded) <= 200 * stages * 48 // width / 2 + 4 * found.codebooks.numel()
    assert Entry.from_json(entry.to_json()) == entry
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), weight)
    # Codebooks of another dtype than a reader will take would add up to other numbers.
    assert encode_tensor("w", weight, True, sums=VectorCodes(found.codes, found.codebooks.double()))[0].stages == 1


def test_other_bit_patterns_and_memory_orders_come_back(same_bits):
    weight = made(64, 96, 1, 6, 5)[0].view(64, 24, 2, 2).to(memory_format=torch.channels_last)
    strange = made(64, 96, 1, 6, 5)[0]
    strange[3, :6], strange[4, :6], strange[5] = float("nan"), -0.0, float("inf")
    for tensor in (weight, strange):
        entry, encoded = encode_tensor("w", tensor, True)
        assert entry.form == "vectors"
        same_bits(decode_tensor(entry, [stream.data for stream in encoded]), tensor)


def test_other_weights_keep_their_forms():
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(300, 64, generator=g) < 0.1
    random = torch.randn(300, 64, generator=g)
    values = torch.randn(8, generator=g)[torch.randint(8, (300, 64), generator=g)]
    for tensor in (random, random * kept, values, random.sign(), random[:40]):
        assert encode_tensor("w", tensor, True)[0].form != "vectors"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(72, 300), lambda: nn.Conv2d(9, 300, 3), lambda: nn.Embedding(400, 30)]
)
def test_products_take_what_their_layers_do(tmp_path, round_trip, make, shared):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    tt.quantize.product(model, 32, shared=shared, targets=["0"])
    tt.save(model, tmp_path / "live.terse")
    tt.finalize(model)
    loaded = round_trip(model)
    path = tmp_path / "model.terse"
    assert path.read_bytes() == (tmp_path / "live.terse").read_bytes()
    found = tt.inspect(path).tensors[0]
    columns = model[0].weight[0].numel()
    segments = -(-columns // 4)
    assert (found.form, found.entries, found.stored) == ("vectors", 32, len(model[0].weight) * segments)
    assert found.parts["codes"] + found.parts.get("code tables", 0) <= len(model[0].weight) * segments * 5 / 8 + 1
    assert found.parts["codebooks"] <= (1 if shared else segments) * 4 * 32 * 4
    if type(model[0]) is nn.Linear:
        tt.save(nn.Sequential(ProductLinear.from_dense(model[0])), tmp_path / "layer.terse")
        assert path.stat().st_size <= (tmp_path / "layer.terse").stat().st_size
    tt.save(loaded, path)
    assert path.read_bytes() == (tmp_path / "live.terse").read_bytes()


@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 300), lambda: nn.Conv2d(5, 300, 3)])
def test_sums_are_stored_by_their_codes_until_the_weight_changes(tmp_path, round_trip, make):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    tt.quantize.residual(model, 3, 16)
    tt.save(model, tmp_path / "live.terse")
    tt.finalize(model)
    twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), round_trip(model)]
    for twin in twins:
        tt.save(twin, tmp_path / "model.terse")
        assert (tmp_path / "model.terse").read_bytes() == (tmp_path / "live.terse").read_bytes()
    found = tt.inspect(tmp_path / "model.terse").tensors[0]
    assert (found.form, found.entries, found.stored) == ("vectors", 16, 900)
    assert found.nbytes <= 900 / 2 + 3 * 16 * model[0].weight[0].numel() * 4 + 8
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    changed = round_trip(model)
    assert tt.inspect(tmp_path / "model.terse").tensors[0].form == "raw"
    assert noted_codes(changed[0], "weight") is None


def test_a_users_instance_takes_them_too(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 300)

    torch.manual_seed(0)
    model = tt.finalize(tt.quantize.residual(Own(), 2, 16))
    tt.save(model, tmp_path / "m.terse")
    loaded = tt.load(tmp_path / "m.terse", model=Own())
    assert torch.equal(ResidualLinear.from_dense(loaded.fc).weight, model.fc.weight)
    other = tt.finalize(tt.quantize.residual(Own(), 3, 8))
    tt.save(tt.finalize(tt.quantize.product(Own(), 8)), tmp_path / "m.terse")
    assert noted_codes(tt.load(tmp_path / "m.terse", model=other).fc, "weight") is None


def test_the_golden_file_of_sub_vectors(same_state, tmp_path, monkeypatch):
    path = Path(__file__).parent / "golden" / "version2_vectors.terse"
    namespace = runpy.run_path(path.parent / "make_golden.py", run_name="golden")
    model = namespace["vectors"]()
    loaded = tt.load(path)
    same_state(model, loaded)
    assert [noted_codes(layer, "weight") is not None for layer in loaded] == [False] * 3 + [True] * 2
    found = tt.inspect(path)
    assert found.version == 2
    assert {tensor.form for tensor in found.tensors if tensor.name.endswith("weight")} == {"vectors"}
    for name, value in namespace["SMALL"].items():
        monkeypatch.setattr(streams, name, value)
    tt.save(loaded, tmp_path / "m.terse")
    assert (tmp_path / "m.terse").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": 65}, "segments of 1 to 64 columns, got 65"),
        ({"w": None}, "segments of 1 to 64 columns, got 0"),
        ({"w": 64, "h": True}, "a codebook among several segments"),
        ({"u": 5}, "at most 7680 codes of sub-vectors, got 9600"),
        ({"u": 0}, "terms"),
        ({"u": 1 << 20}, "terms"),
        ({"h": 1}, "h"),
        ({"k": 0}, "codebooks of at most 7680 numbers, 256 entries each, got 0"),
        ({"k": 200}, "codebooks of at most 7680 numbers"),
        ({"k": 257, "h": True}, "256 entries each, got 257"),
        ({"s": [7680]}, "floating-point matrix"),
        ({"s": [0, 64]}, "floating-point matrix"),
        ({"d": "i32"}, "floating-point matrix"),
        ({"d": "c64"}, "floating-point matrix"),
        ({"k": 15}, "hold 960 items"),
        ({"b": 1}, "only the fields of a tensor stored as vectors"),
        ({"n": 7}, "only the fields of a tensor stored as vectors"),
        ({"t": True}, "only the fields of a tensor stored as vectors"),
        ({"f": "codebooks", "h": True}, "only the fields of a tensor stored as codebooks"),
        ({"f": "codebook", "u": 2}, "only the fields of a tensor stored as codebook"),
        ({"x": [["raw", 4096]]}, "2 streams"),
    ],
)
def test_damaged_entries_are_refused(changed, message):
    entry = encode_tensor("w", made(120, 64, 1, 4, 16)[0], True)[0]
    entry = replace(entry, streams=(replace(entry.streams[0], coder="raw", nbytes=4096), entry.streams[1]))
    data = {name: value for name, value in (entry.to_json() | changed).items() if value is not None}
    assert Entry.from_json(entry.to_json()) == entry
    with pytest.raises(TerseFileError, match=message):
        Entry.from_json(data)


def test_codes_past_the_entries_are_refused():
    entry, encoded = encode_tensor("w", made(120, 64, 1, 4, 13)[0], True)
    entry = replace(entry, streams=(entry.streams[0], replace(entry.streams[1], coder="packed")))
    with pytest.raises(TerseFileError, match="codes below 13"):
        decode_tensor(entry, [encoded[0].data, np.full(120 * 16 // 2, 255, np.uint8).tobytes()])
    with pytest.raises(TerseFileError):
        decode_tensor(entry, [encoded[0].data[:-1], encoded[1].data])
