"""Weights that were codes into a known table, times a scale: bytes, bits, what is left alone, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tersetorch.storage import TerseFileError
from tersetorch.storage.entry import Entry
from tersetorch.storage.importers.bitsandbytes import TABLES
from tersetorch.storage.tensors import decode_tensor, encode_tensor


def quantized(rows, columns, run=64, kind="nf4", dtype=torch.float32):
    """A weight as bitsandbytes' 4-bit layers compute with it."""
    table = torch.tensor(TABLES[kind])
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).reshape(-1, run)
    scale = weight.abs().amax(1, keepdim=True)
    codes = ((weight / scale)[..., None] - table).abs().argmin(-1)
    return (table[codes] * scale).to(dtype).reshape(rows, columns)


def round_trip(tensor, same_bits):
    entry, encoded = encode_tensor("w", tensor, True)
    assert Entry.from_json(entry.to_json()) == entry
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), tensor)
    return entry, [len(stream.data) for stream in encoded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "run"), [(128, 256, 64), (100, 96, 32), (64, 512, 256), (1, 4096, 64)])
def test_nf4_takes_half_a_byte_and_the_scales(same_bits, dtype, rows, columns, run):
    entry, (codebook, scales, codes) = round_trip(quantized(rows, columns, run, dtype=dtype), same_bits)
    assert (entry.form, entry.block, entry.entries) == ("scaled", run, 16)
    assert codes <= rows * columns / 2 and scales <= 4 * rows * columns / run and codebook <= 64


def test_fp4_and_both_its_zeros(same_bits):
    weight = quantized(128, 256, kind="fp4")
    assert round_trip(weight, same_bits)[0].form == "scaled"
    weight[weight == 0] = torch.tensor([0.0, -0.0]).repeat(int((weight == 0).sum() + 1) // 2)[
        : int((weight == 0).sum())
    ]
    assert round_trip(weight, same_bits)[0].form == "scaled"


def test_runs_of_zeros_and_other_weights(same_bits):
    weight = quantized(128, 256)
    weight[3], weight[5, 64:128] = 0, 0
    assert round_trip(weight, same_bits)[0].form == "scaled"
    for value in (float("nan"), float("inf"), 1e-40, -0.0, 0.123456789):
        changed = weight.clone()
        changed[7, 9] = value
        assert round_trip(changed, same_bits)[0].form != "scaled"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": 7}, "runs that divide the weights"),
        ({"k": 0}, "integers of at most 255"),
        ({"k": 257}, "codebook of at most 256 numbers"),
        ({"k": 17}, "hold 17 items in a stream of codebook"),
        ({"i": -1}, "with integers only"),
        ({"d": "f64"}, "matrix of float32 or bfloat16 or float16 as scaled"),
    ],
)
def test_damaged_entries_are_refused(changed, message):
    entry = encode_tensor("w", quantized(128, 256), True)[0]
    entry = replace(entry, streams=(replace(entry.streams[0], coder="raw", nbytes=64), *entry.streams[1:]))
    assert Entry.from_json(entry.to_json()) == entry
    with pytest.raises(TerseFileError, match=message):
        Entry.from_json(entry.to_json() | changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("which", [0, 1])
def test_numbers_without_finite_products_are_refused(value, which):
    entry, encoded = encode_tensor("w", quantized(128, 256), True)
    parts = [np.full(count, 100, np.float32) for count in (16, 512)]
    parts[which][5] = value
    raw = [replace(spec, coder="raw", nbytes=part.nbytes) for spec, part in zip(entry.streams, parts, strict=False)]
    data = [*(part.tobytes() for part in parts), encoded[2].data]
    with pytest.raises(TerseFileError, match="finite scales and numbers in its table, and products that are finite"):
        decode_tensor(replace(entry, streams=(*raw, entry.streams[2])), data)
