import json

import pytest
import torch
from torch import nn

from tersetorch.storage import TerseFileError, inspect, save


@pytest.fixture
def inspection(tmp_path, small_model):
    path = tmp_path / "m.terse"
    save(small_model, path, provenance={"error": 1.5})
    return inspect(path)


def test_the_parts_add_up_to_the_file(inspection, tmp_path):
    size = (tmp_path / "m.terse").stat().st_size
    assert inspection.file_bytes == size
    assert sum(inspection.parts.values()) == size
    assert size == inspection.header_bytes + inspection.container_bytes + sum(t.nbytes for t in inspection.tensors)


def test_every_tensor_is_itemised(inspection, small_model):
    first, bias, second, _, third, _ = inspection.tensors
    assert [tensor.name for tensor in inspection.tensors] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
        "4.weight",
        "4.bias",
    ]
    assert first.form == "sparse"
    assert first.stored == small_model[0].values.numel()
    assert 3 * first.stored < first.parts["values"] < 4 * first.stored
    assert first.parts["checksums"] == 8
    assert bias.parts.keys() == {"biases", "checksums"} and bias.parts["biases"] <= 64
    assert 0 < second.parts["codebooks"] <= 4 * second.entries == 4 * small_model[2].codebook.numel()
    assert third.nbytes < 480 * 3 / 8
    for tensor in inspection.tensors:
        assert ("code tables" in tensor.parts) == any(coder.endswith(("huffman", "rans")) for coder in tensor.coders)
        assert sum(tensor.parts.values()) == tensor.nbytes


def test_totals(inspection):
    numbers = 24 * 16 + 16 + 16 * 12 + 12 + 12 * 40 + 40
    assert inspection.parameters == numbers
    assert inspection.dense_bytes == 4 * numbers
    assert inspection.ratio == inspection.dense_bytes / inspection.file_bytes


def test_dense_bytes_count_floats_as_float32_and_integers_as_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3).double(), nn.BatchNorm1d(3))
    save(model, tmp_path / "m.terse")
    assert inspect(tmp_path / "m.terse").dense_bytes == 4 * (12 + 3 + 4 * 3) + 8


def test_the_dict_is_json_and_holds_everything(inspection):
    data = json.loads(json.dumps(inspection.to_dict()))
    assert data["file_bytes"] == sum(data["parts"].values())
    assert data["provenance"] == {"error": 1.5}
    assert [tensor["bytes"] for tensor in data["tensors"]] == [tensor.nbytes for tensor in inspection.tensors]
    assert data["ratio"] == inspection.ratio


def test_the_table_names_every_tensor_and_part(inspection):
    shown = str(inspection)
    for word in (
        "0.weight",
        "16x24",
        "sparse-codebook",
        "positions",
        "header",
        "container",
        str(inspection.file_bytes),
    ):
        assert word in shown


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    save(nn.ModuleDict({"[bold]": nn.Linear(2, 2)}), tmp_path / "m.terse")
    assert "[bold].weight" in str(inspect(tmp_path / "m.terse"))


def test_a_model_without_tensors(tmp_path):
    save(nn.ReLU(), tmp_path / "m.terse")
    found = inspect(tmp_path / "m.terse")
    assert found.tensors == ()
    assert sum(found.parts.values()) == found.file_bytes
    assert "ReLU" not in str(found)


def test_empty_and_scalar_tensors(tmp_path):
    model = nn.Module()
    model.register_buffer("none", torch.empty(0, 3))
    model.register_buffer("one", torch.tensor(1))
    save(model, tmp_path / "m.terse")
    found = inspect(tmp_path / "m.terse")
    assert [tensor.shape for tensor in found.tensors] == [(0, 3), ()]
    assert str(found)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(TypeError, match="inspect: path must be a string or a path, got NoneType"):
        inspect(None)
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "m.terse")
    (tmp_path / "m.terse").write_bytes(b"no terse file at all")
    with pytest.raises(TerseFileError, match=r"inspect: .*m\.terse must begin with the length of a head"):
        inspect(tmp_path / "m.terse")
