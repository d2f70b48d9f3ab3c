import pytest
import torch
from torch import nn

from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn import SparseCodebookLinear, SparseLinear
from tersetorch.storage import streams
from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import TerseFileError
from tersetorch.storage.layers import KINDS, config_of, decode_layer, encode_layer


def round_trip(layer):
    entry, streams = encode_layer("layer", layer)
    read = Entry.from_json(entry.to_json())
    assert read == entry
    return entry, decode_layer(
        KINDS[type(layer)], read, [stream.data for stream in streams], layer.bias, config_of(layer), layer.training
    )


def sparse(rows, columns, density, levels=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    if levels:
        weight = (weight.clamp(-2, 2) * levels / 2).round() / levels
    return torch.where(torch.rand(rows, columns, generator=generator) < density, weight, 0).to(dtype)


@pytest.mark.parametrize(
    "rows,columns,density", [(0, 5, 0), (5, 0, 0), (1, 1, 1), (1, 1, 0), (31, 1, 0.5), (37, 41, 0.2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [None, 3])
def test_sparse_layers_round_trip(rows, columns, density, dtype, levels, same_state):
    layer = SparseLinear(CsrWeight.from_dense(sparse(rows, columns, density, levels, dtype)), torch.randn(rows))
    same_state(layer, round_trip(layer)[1])


@pytest.mark.parametrize("rows,columns,density", [(0, 5, 0), (5, 0, 0), (1, 1, 1), (37, 41, 0.2), (64, 200, 0.1)])
def test_codebook_layers_round_trip(rows, columns, density, same_state):
    layer = SparseCodebookLinear(SparseCodebookWeight.from_dense(sparse(rows, columns, density, 3)), None)
    same_state(layer, round_trip(layer)[1])


def test_a_layer_without_zeros_spends_no_bytes_on_positions(same_state):
    layer = SparseLinear(CsrWeight.from_dense(torch.rand(20, 30) + 1))
    entry, found = round_trip(layer)
    same_state(layer, found)
    assert entry.streams[0].coder == "all"
    assert sum(spec.nbytes for spec in entry.streams) < layer.weight.nbytes


def test_the_order_of_a_codebook_and_its_unused_entries_are_kept(same_state):
    weight = SparseCodebookWeight.from_dense(sparse(20, 30, 0.3, 2))
    codebook = torch.tensor([[0.0, 7.0, *weight.codebook[0, 1:].flip(0).tolist(), 7.0, float("nan")]])
    codes = (codebook.shape[1] - 2 - weight.codes.int()).to(torch.uint8)
    layer = SparseCodebookLinear(
        SparseCodebookWeight(weight.row_offsets, weight.col_indices, codes, codebook, 30), torch.zeros(20)
    )
    same_state(layer, round_trip(layer)[1])


def test_stored_zeros_and_negative_zeros_are_kept(same_state):
    layer = SparseLinear(CsrWeight.from_dense(sparse(20, 30, 0.3)))
    with torch.no_grad():
        layer.values[:5] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 0.0])
    same_state(layer, round_trip(layer)[1])


def test_column_order_is_undone(same_state, monkeypatch):
    monkeypatch.setattr(streams, "MAX_CONTEXT_BITS", 0)
    dense = sparse(300, 400, 0.15)
    dense[:, torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    entry, found = round_trip(layer := SparseLinear(CsrWeight.from_dense(dense)))
    assert entry.down_columns
    same_state(layer, found)


def test_frozen_values_stay_frozen():
    layer = SparseLinear(CsrWeight.from_dense(sparse(4, 4, 0.5)))
    layer.values.requires_grad_(False)
    assert not round_trip(layer)[1].values.requires_grad


def test_a_layer_whose_tensors_were_broken_is_not_written():
    layer = SparseLinear.from_dense(nn.Linear(4, 3))
    layer.row_offsets[1] = 99
    with pytest.raises(ValueError, match="save: layer must hold a valid sparse weight"):
        encode_layer("layer", layer)


def test_another_layers_entry_is_refused():
    entry, streams = encode_layer("layer", SparseLinear(CsrWeight.from_dense(sparse(8, 8, 0.5))))
    with pytest.raises(TerseFileError, match=r"float32 codebook and codes for a tersetorch\.SparseCodebookLinear"):
        decode_layer("tersetorch.SparseCodebookLinear", entry, [stream.data for stream in streams], None, {}, False)


def test_code_zero_is_refused():
    layer = SparseCodebookLinear(SparseCodebookWeight.from_dense(sparse(8, 8, 0.5, 2)))
    entry, streams = encode_layer("layer", layer)
    entry = Entry.from_json(entry.to_json() | {"k": entry.entries, "x": [*entry.to_json()["x"][:2], ["packed", 20]]})
    data = [streams[0].data, streams[1].data, bytes(20)]
    with pytest.raises(TerseFileError, match="must hold"):
        decode_layer("tersetorch.SparseCodebookLinear", entry, data, None, {}, False)
