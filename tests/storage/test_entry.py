import pytest
import torch

from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import TerseFileError

SPARSE = {
    "s": [8, 8],
    "d": "f32",
    "f": "sparse-codebook",
    "n": 9,
    "k": 4,
    "x": [["gaps", 5, 3], ["raw", 16], ["packed", 3]],
}
RAW = {"s": [2, 3], "d": "f32", "f": "raw", "x": [["raw", 24]]}


ALL = {"s": [8, 8], "d": "f32", "f": "sparse", "n": 64, "c": True, "x": [["all", 0], ["raw", 256]]}
SIGNS = {"s": [8, 9], "d": "f32", "f": "signs", "x": [["raw", 32], ["packed", 9]]}
CONSTANT = {"s": [8, 8], "d": "f32", "f": "codebook", "k": 1, "x": [["raw", 4], ["constant", 0]]}


@pytest.mark.parametrize(
    "data",
    [SPARSE, RAW, CONSTANT, ALL, SIGNS, SPARSE | {"t": True, "g": False, "c": True}, SPARSE | {"b": (1 << 32) - 1}],
)
def test_json_round_trips(data):
    assert Entry.from_json(data).to_json() == data


def test_sizes_of_what_will_be_decoded():
    assert Entry.from_json(RAW).decoded_bytes == 24
    assert Entry.from_json(SPARSE).decoded_bytes == 256
    assert Entry.from_json(SPARSE | {"c": True}).decoded_bytes == 4 * 9 + 9 * 4 + 9 + 4 * 4
    assert Entry((3,), torch.complex128, "raw", 6).decoded_bytes == 48


@pytest.mark.parametrize(
    "data,match",
    [
        (3, "have an object as a tensor, got int"),
        (RAW | {"y": 1}, "have only known fields in a tensor, got y"),
        (RAW | {"s": 3}, "have a list as a shape, got 3"),
        (RAW | {"s": [-1]}, r"have an integer in \[0, .*\] as a dimension, got -1"),
        (RAW | {"s": [True]}, "as a dimension, got True"),
        (RAW | {"s": [1 << 40, 1 << 40]}, r"fewer than 2\*\*47 numbers"),
        (RAW | {"s": [1] * 65}, "at most 64 dimensions"),
        (RAW | {"d": "f31"}, "as a dtype, got 'f31'"),
        (
            RAW | {"f": "zip"},
            "vectors, sparse, sparse-codebook, signs, integers, affine, scaled as a form, got 'zip'",
        ),
        (RAW | {"n": 6}, "only the fields of a tensor stored as raw"),
        (RAW | {"k": 6}, "only the fields of a tensor stored as raw"),
        (RAW | {"t": True}, "only the fields of a tensor stored as raw"),
        (RAW | {"c": True}, "keep a layer's weight as a sparse float32 or bfloat16 matrix"),
        (RAW | {"o": [0, 0]}, "have an order of 2 dimensions"),
        (RAW | {"g": 1}, "have true or false as g, got 1"),
        (RAW | {"x": []}, "have 1 streams for a tensor stored as raw, got 0"),
        (RAW | {"x": [["raw", 23]]}, "hold 6 items in a stream of values, got 23 bytes"),
        (RAW | {"x": [["raw"]]}, r"have \[coder, bytes\] or"),
        (RAW | {"x": [["raw", 24, 3]]}, "give a width to gaps and to nothing else"),
        (RAW | {"x": [["bitmap", 24]]}, "have one of raw, numbers, planes as the coder of values, got 'bitmap'"),
        (SPARSE | {"n": 65}, "as a count, got 65"),
        (SPARSE | {"k": 65537}, "as codebook entries, got 65537"),
        (SPARSE | {"n": 41}, "hold 41 items in a stream of positions, got 5 bytes"),
        (SPARSE | {"k": 5}, "hold 5 items in a stream of codebook, got 16 bytes"),
        (SPARSE | {"x": [["gaps", 5, 16], ["raw", 16], ["packed", 3]]}, r"in \[1, 15\] as a width, got 16"),
        (SPARSE | {"s": [64], "t": True}, "run down the columns of tensors with two dimensions or more, got 1"),
        (RAW | {"b": 6}, "only the fields of a tensor stored as raw"),
        (SPARSE | {"b": 1 << 32}, r"in \[0, 4294967295\] as a bit pattern, got 4294967296"),
        (SPARSE | {"b": 1, "c": True}, "keep a layer's weight as a sparse float32 or bfloat16 matrix"),
        (
            CONSTANT | {"k": 2, "x": [["raw", 8], ["constant", 0]]},
            "one entry and no bytes for constant codes, got 2, 0",
        ),
        (ALL | {"n": 63, "x": [["all", 0], ["raw", 252]]}, "every position and no bytes for them, got 63, 0 bytes"),
        (ALL | {"x": [["all", 1], ["raw", 256]]}, "every position and no bytes for them, got 64, 1 bytes"),
        (CONSTANT | {"x": [["raw", 4], ["constant", 1]]}, "one entry and no bytes for constant codes, got 1, 1 bytes"),
        (SPARSE | {"k": 1, "n": 41, "x": [["gaps", 5, 3], ["raw", 4], ["constant", 0]]}, "hold 41 items in a stream"),
        (SIGNS | {"k": 2}, "only the fields of a tensor stored as signs"),
        (SIGNS | {"s": [72]}, "keep floating-point rows as signs"),
        (SIGNS | {"d": "i32"}, "keep floating-point rows as signs"),
        (SIGNS | {"x": [["raw", 28], ["packed", 9]]}, "hold 8 items in a stream of scales, got 28 bytes"),
        (SIGNS | {"x": [["raw", 32], ["packed", 8]]}, "hold 72 items in a stream of signs, got 8 bytes"),
        (SIGNS | {"x": [["numbers", 0], ["packed", 9]]}, "hold 8 items in a stream of scales, got 0 bytes"),
        (SIGNS | {"x": [["raw", 32], ["constant", 0]]}, "as the coder of signs, got 'constant'"),
        (SPARSE | {"s": [64], "c": True}, "keep a layer's weight as a sparse float32 or bfloat16 matrix"),
    ],
)
def test_contradictions_are_refused(data, match):
    with pytest.raises(TerseFileError, match=match):
        Entry.from_json(data)


@pytest.mark.parametrize(("stream", "places"), [(["gaps-rans", 9, 4], 1 << 36), (["gaps", 9, 4], 0)])
def test_steps_over_gaps_that_take_no_bits_count(stream, places):
    entry = Entry.from_json({"s": [15, 1 << 36], "d": "f32", "f": "sparse", "n": 1, "x": [stream, ["raw", 4]]})
    assert entry.places_read == places
