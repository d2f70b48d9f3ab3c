"""Weights with a table for each row or block of columns: sizes, bits, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.nn import CodebookLinear
from tersetorch.storage import TerseFileError
from tersetorch.storage.entry import Entry
from tersetorch.storage.tensors import decode_tensor, encode_tensor


def shared(rows, columns, entries, block=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(entries, (rows, columns), generator=g)
    tables = torch.randn(-(-columns // block) if block else rows, entries, generator=g).to(dtype)
    at = (torch.arange(columns) // block).expand(rows, -1) if block else torch.arange(rows)[:, None]
    return tables[at, codes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "entries", "block"),
    [(60, 256, 16, 0), (61, 192, 5, 0), (128, 96, 16, 32), (128, 144, 16, 48), (200, 100, 9, 30), (300, 43, 7, 1)],
)
def test_come_back_to_the_bit_in_the_bytes_of_codes_and_tables(same_bits, rows, columns, entries, block, dtype):
    weight = shared(rows, columns, entries, block, dtype)
    entry, encoded = encode_tensor("w", weight, True)
    assert (entry.form, entry.block, entry.entries) == ("codebooks", block, entries)
    tables = (-(-columns // block) if block else rows) * entries * dtype.itemsize
    assert sum(len(stream.data) for stream in encoded) <= rows * columns * (entries - 1).bit_length() / 8 + tables
    assert Entry.from_json(entry.to_json()) == entry
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), weight)


def test_other_shapes_layouts_and_bit_patterns_come_back(same_bits):
    weight = shared(64, 256, 8).reshape(64, 16, 4, 4).to(memory_format=torch.channels_last)
    strange = shared(40, 300, 8)
    strange[3, :9], strange[4, 5], strange[5] = float("nan"), -0.0, 1.0
    constant = torch.randn(40, 1).expand(40, 50).contiguous()
    for tensor in (weight, strange, constant):
        entry, encoded = encode_tensor("w", tensor, True)
        assert entry.form == "codebooks"
        same_bits(decode_tensor(entry, [stream.data for stream in encoded]), tensor)


def test_other_weights_keep_their_forms():
    for tensor, form in ((torch.randn(64, 64), "raw"), (shared(1, 4096, 16).reshape(64, 64), "codebook")):
        assert encode_tensor("w", tensor, True)[0].form == form


@pytest.mark.parametrize(("per", "nbytes"), [("row", 163_000), (32, 134_000), (16, 136_000), (48, 134_000)])
def test_shared_weights_take_what_their_layers_do(tmp_path, round_trip, per, nbytes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    tt.quantize.kmeans(model, 4, per=per)
    model = tt.finalize(model)
    round_trip(model)
    found = tt.inspect(tmp_path / "model.terse")
    assert found.tensors[0].form == "codebooks" and found.file_bytes < nbytes
    assert found.parts["codes"] <= 512 * 512 / 2 and 0 < found.parts["codebooks"] <= 4 * 16 * 512
    before = (tmp_path / "model.terse").read_bytes()
    tt.save(model, tmp_path / "model.terse")
    assert (tmp_path / "model.terse").read_bytes() == before


@pytest.mark.parametrize(("columns", "per"), [(256, 16), (192, 48), (512, 64), (512, 16)])
def test_codes_of_a_converted_layer_are_told_apart_by_the_blocks_it_was_shared_in(tmp_path, round_trip, columns, per):
    """Its kernel has one table, or one for 64 columns, with more entries than a block uses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 512, bias=False))
    model = tt.finalize(tt.quantize.kmeans(model, 4, per=per)).eval()
    layer = CodebookLinear.from_dense(model[0])
    assert layer.codebook.shape[1] > 16
    sizes = []
    for each in (model, nn.Sequential(layer)):
        round_trip(each)
        sizes.append((tmp_path / "model.terse").stat().st_size)
    assert sizes[1] <= 1.01 * sizes[0] + 600


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": 256}, "blocks of fewer than 256 columns"),
        ({"w": 1, "k": 256}, "codebooks of at most"),
        ({"k": 0}, "codebooks of at most"),
        ({"s": [60 * 256]}, "floating-point or uint8 matrix"),
        ({"d": "i32"}, "floating-point or uint8 matrix"),
        ({"k": 15}, "hold 900 items|hold at most"),
        ({"f": "codebook", "w": 4}, "blocks of columns"),
    ],
)
def test_damaged_entries_are_refused(changed, message):
    entry = encode_tensor("w", shared(60, 256, 16), True)[0]
    entry = replace(entry, streams=(replace(entry.streams[0], coder="raw", nbytes=60 * 16 * 4), entry.streams[1]))
    with pytest.raises(TerseFileError, match=message):
        Entry.from_json(entry.to_json() | changed)


def test_codes_past_the_entries_are_refused():
    entry, encoded = encode_tensor("w", shared(60, 256, 5), True)
    entry = replace(entry, streams=(entry.streams[0], replace(entry.streams[1], coder="packed")))
    with pytest.raises(TerseFileError, match="codes below 5"):
        decode_tensor(entry, [encoded[0].data, np.full(60 * 256 * 3 // 8, 255, np.uint8).tobytes()])
