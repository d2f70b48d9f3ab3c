"""Weights that were codes times a scale, and an offset: bytes, bits, what is left alone, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tersetorch.storage import TerseFileError
from tersetorch.storage.entry import Entry
from tersetorch.storage.tensors import decode_tensor, encode_tensor


def quantized(rows, columns, bits=4, run=32, seed=0):
    """Numbers as a GGUF file's Q4_1 holds them: codes, float16 scales and least values of runs."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=g) * 0.03).reshape(-1, run)
    least = weight.amin(1, keepdim=True).half().float()
    scale = ((weight.amax(1, keepdim=True) - least) / (2**bits - 1)).half().float()
    codes = ((weight - least) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + least).reshape(rows, columns), codes


def round_trip(tensor, same_bits):
    entry, encoded = encode_tensor("w", tensor, True)
    assert Entry.from_json(entry.to_json()) == entry
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), tensor)
    return entry, [len(stream.data) for stream in encoded]


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "run"),
    [(128, 256, 4, 32), (64, 256, 5, 32), (64, 512, 8, 128), (48, 96, 2, 48), (1, 640, 4, 32), (50, 64, 3, 64)],
)
def test_take_the_bytes_of_codes_scales_and_offsets(same_bits, rows, columns, bits, run):
    weight, _ = quantized(rows, columns, bits, run)
    entry, (scales, offsets, codes) = round_trip(weight, same_bits)
    assert (entry.form, entry.block, entry.entries) == ("affine", run, 2**bits)
    assert codes <= rows * columns * bits / 8 and max(scales, offsets) <= 2.6 * rows * columns / run + 30


def test_a_two_step_scale_and_runs_of_one_number(same_bits):
    # As in Q4_K: a float16 scale times 6 bits, for each run.
    g = torch.Generator().manual_seed(1)
    steps = torch.randint(1, 64, (8 * 64, 1), generator=g) * torch.tensor(0.00071).half().float()
    least = torch.randint(0, 64, (8 * 64, 1), generator=g) * torch.tensor(0.0032).half().float()
    weight = torch.randint(1, 16, (8 * 64, 32), generator=g) * steps - least
    weight[3], weight[5] = 0, 0.25
    entry, sizes = round_trip(weight.reshape(64, 256), same_bits)
    assert (entry.form, entry.block) == ("affine", 32) and sum(sizes) < weight.numel() * 0.8


def test_other_weights_keep_their_forms(same_bits):
    weight = quantized(64, 256)[0]
    cases = [torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), weight.double(), weight * (1 / 3)]
    for value in (float("nan"), float("-inf"), 1e-40, 0.123456789):
        cases.append(weight.clone())
        cases[-1][7, 9] = value
    for tensor in cases:
        assert round_trip(tensor, same_bits)[0].form != "affine"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": 7}, "runs that divide the weights"),
        ({"k": 257}, "integers of at most 255"),
        ({"i": -1}, "with integers only"),
        ({"m": 0x3F800000}, "with integers only"),
        ({"d": "f16"}, "matrix of float32 as affine"),
        ({"s": [64 * 256]}, "matrix of float32 as affine"),
        ({"w": 64}, "hold 256 items in a stream of scales"),
    ],
)
def test_damaged_entries_are_refused(changed, message):
    entry = encode_tensor("w", quantized(64, 256)[0], True)[0]
    raw = [replace(spec, coder="raw", nbytes=4 * 512) for spec in entry.streams[:2]]
    entry = replace(entry, streams=(*raw, entry.streams[2]))
    assert Entry.from_json(entry.to_json()) == entry
    with pytest.raises(TerseFileError, match=message):
        Entry.from_json(entry.to_json() | changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("which", [0, 1])
def test_numbers_without_finite_sums_are_refused(value, which):
    entry, encoded = encode_tensor("w", quantized(64, 256)[0], True)
    parts = [np.full(512, 3e38 if value == 3e38 else 0.01, np.float32) for _ in range(2)]
    parts[which][5] = value
    raw = [replace(spec, coder="raw", nbytes=4 * 512) for spec in entry.streams[:2]]
    with pytest.raises(TerseFileError, match="finite scales and offsets, and sums that are finite"):
        decode_tensor(
            replace(entry, streams=(*raw, entry.streams[2])), [*map(np.ndarray.tobytes, parts), encoded[2].data]
        )
