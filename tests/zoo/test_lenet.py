import copy
import pickle

import pytest
import torch

from tersetorch.storage import load, save
from tersetorch.zoo import LeNet300100


def test_has_the_papers_parameters():
    model = LeNet300100()
    assert sum(parameter.numel() for parameter in model.parameters()) == 266_610
    assert [layer.weight.numel() for layer in (model.fc1, model.fc2, model.fc3)] == [235_200, 30_000, 1_000]


def test_computes_the_formula():
    model = LeNet300100(dropout=0.4).eval()
    x = torch.rand(3, 1, 28, 28)
    h = torch.relu(x.reshape(3, 784) @ model.fc1.weight.T + model.fc1.bias)
    h = torch.relu(h @ model.fc2.weight.T + model.fc2.bias)
    torch.testing.assert_close(model(x), h @ model.fc3.weight.T + model.fc3.bias)
    assert torch.equal(model(x), model(x.flatten(1)))


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_and_size(batch):
    assert LeNet300100(in_features=64, classes=3)(torch.rand(batch, 8, 8)).shape == (batch, 3)


def test_dropout_acts_in_training_only():
    model = LeNet300100(dropout=0.5)
    x = torch.rand(2, 784)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_state_travels():
    model = LeNet300100(64)
    x = torch.rand(2, 64)
    other = LeNet300100(64)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_comes_back_from_a_file_without_its_class_at_hand(tmp_path):
    model = LeNet300100(64, classes=7, dropout=0.25)
    save(model, tmp_path / "m.terse")
    twin = load(tmp_path / "m.terse")
    assert type(twin) is LeNet300100
    assert (twin.in_features, twin.classes, twin.dropout, twin.dropout2.p) == (64, 7, 0.25, 0.25)
    x = torch.rand(3, 64)
    assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"in_features": 784.0}, TypeError, "in_features must be an int, got 784.0"),
        ({"classes": -1}, ValueError, "classes must be at least 1, got -1"),
        ({"classes": True}, TypeError, "classes must be an int, got True"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"dropout": "0.5"}, TypeError, "dropout must be a number, got '0.5'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        LeNet300100(**arguments)


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match=r"images must have 784 values each, got shape \(2, 64\)"):
        LeNet300100()(torch.rand(2, 64))
