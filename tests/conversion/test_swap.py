import copy

import pytest
import torch
from torch import nn

from tersetorch.conversion.candidates import CANDIDATES
from tersetorch.conversion.swap import build, swapped_copy
from tersetorch.nn import SparseLinear


def swap(model, *layers, name="csr"):
    return swapped_copy(model, {layer: build(CANDIDATES[name], [layer])[0] for layer in layers})


def test_every_reference_is_replaced_and_the_model_left_alone(sparse_linear):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = sparse_linear()
            self.again = nn.Sequential(self.fc)
            self.hidden = [self.fc]

    model = Net()
    before = model.fc
    fast = swap(model, model.fc)
    assert type(fast.fc) is SparseLinear
    assert fast.again[0] is fast.fc
    assert fast.hidden[0] is fast.fc
    assert model.fc is before
    assert type(model.fc) is nn.Linear


def test_model_that_is_a_layer(sparse_linear):
    layer = sparse_linear()
    fast = swap(layer, layer)
    assert type(fast) is SparseLinear
    assert torch.equal(fast.weight, layer.weight)


def test_flags_and_biases_carry_over(sparse_linear):
    model = nn.Sequential(sparse_linear(30, 30), sparse_linear(30, 30), nn.BatchNorm1d(30))
    model[1].bias = model[0].bias
    model[2].bias = model[0].bias
    model[0].weight.requires_grad_(False)
    model[1].eval()
    fast = swap(model, model[0], model[1])
    assert fast[0].bias is fast[1].bias is fast[2].bias
    assert fast[0].bias is not model[0].bias
    assert torch.equal(fast[0].bias, model[0].bias)
    assert not fast[0].values.requires_grad
    assert fast[1].values.requires_grad
    assert (fast[0].training, fast[1].training) == (True, False)


@pytest.mark.parametrize(("name", "parameter"), [("csr", "values"), ("sparse_codebook", "codebook")])
def test_tied_layers_share_what_comes_from_the_weight(sparse_linear, name, parameter):
    first, second = sparse_linear(20, 20, distinct=5), sparse_linear(20, 20)
    second.weight = first.weight
    one, two = build(CANDIDATES[name], [first, second])
    assert getattr(one, parameter) is getattr(two, parameter)
    assert one.row_offsets is two.row_offsets
    assert one.col_indices is two.col_indices
    assert torch.equal(two.bias, second.bias)
    assert one.bias is not two.bias


def test_fast_paths_are_switched_off_where_it_swaps_and_only_there():
    model = nn.ModuleDict(
        {
            name: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            for name in ("one", "other")
        }
    )
    fast = swap(model, model["one"].layers[1].linear2)
    assert [layer.activation_relu_or_gelu for layer in fast["one"].layers] == [1, 0]
    assert not fast["one"].use_nested_tensor
    assert not fast["one"].enable_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in fast["other"].layers] == [1, 1]
    assert fast["other"].use_nested_tensor
    assert model["one"].layers[1].activation_relu_or_gelu == 1
    assert model["one"].use_nested_tensor


def test_what_cannot_be_copied_is_refused(sparse_linear):
    model = nn.Sequential(sparse_linear())
    model.kept = model(torch.zeros(1, 40))
    with pytest.raises(ValueError, match=r"model must be copyable with copy\.deepcopy, got RuntimeError: "):
        swap(model, model[0])


def test_a_copy_that_ignores_the_memo_is_refused(sparse_linear):
    class Stubborn(nn.Sequential):
        def __deepcopy__(self, memo):
            return Stubborn(*(copy.deepcopy(layer) for layer in self))

    model = Stubborn(sparse_linear())
    with pytest.raises(ValueError, match=r"model must hand copy\.deepcopy's memo to its layers, got a Stubborn"):
        swap(model, model[0])
