import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from tersetorch.methods import finalize, prune
from tersetorch.methods.parametrization import is_live


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()


def test_zeros_stay_zeros(mlp):
    torch.manual_seed(0)
    finalize(prune.magnitude(mlp, 0.7))
    zeros = [layer.weight == 0 for layer in (mlp[0], mlp[2])]
    assert prune.keep_zeros(mlp) is mlp
    train(mlp, torch.optim.SGD(mlp.parameters(), lr=0.01, momentum=0.9))
    assert [torch.equal(layer.weight == 0, zero) for layer, zero in zip((mlp[0], mlp[2]), zeros, strict=True)] == [
        True
    ] * 2


def test_targets(mlp):
    mlp[0].weight.data[0] = 0
    mlp[2].weight.data[0] = 0
    prune.keep_zeros(mlp, targets="2")
    assert mlp[2].parametrizations.weight[0].mask[0].sum() == 0
    assert not nn.utils.parametrize.is_parametrized(mlp[0])


def test_masks_of_torch_become_ours(mlp):
    torch.manual_seed(0)
    torch_prune.l1_unstructured(mlp[0], "weight", amount=0.5)
    torch_prune.random_unstructured(mlp[0], "weight", amount=0.2)
    torch_prune.l1_unstructured(mlp[2], "bias", amount=2)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.01)
    masks = mlp[0].weight_mask.clone(), mlp[2].bias_mask.clone()
    hidden = mlp[0].weight_orig.detach().clone()
    x = torch.randn(3, 20)
    expected = mlp(x).detach()
    assert prune.from_torch(mlp) is mlp
    assert torch.equal(mlp(x), expected)
    assert torch.equal(mlp[0].parametrizations.weight.original, hidden)
    assert torch.equal(copy.deepcopy(mlp)(x), expected)
    assert not mlp[0]._forward_pre_hooks and not mlp[2]._forward_pre_hooks
    train(mlp, optimizer)
    assert not torch.equal(mlp(x), expected)
    assert torch.equal(mlp[0].weight != 0, masks[0].bool()) and torch.equal(mlp[2].bias != 0, masks[1].bool())
    prune.magnitude(mlp, 0.9)
    finalize(mlp)
    assert int((mlp[0].weight == 0).sum()) == 306
    assert {name for name, _ in mlp.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_model_without_masks_is_left(mlp):
    assert prune.from_torch(mlp) is mlp
    assert not is_live(mlp)


def test_a_mask_that_is_none_is_refused(mlp):
    torch_prune.custom_from_mask(mlp[0], "weight", torch.rand(17, 20))
    with pytest.raises(ValueError, match=r"prune.from_torch: the mask of 0.weight must hold only 0 and 1"):
        prune.from_torch(mlp)
    assert mlp[0]._forward_pre_hooks


def test_a_tensor_that_two_modules_hold_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    model[1].weight = model[0].weight_orig
    with pytest.raises(ValueError, match=r"prune.from_torch: each pruned tensor must belong to one module"):
        prune.from_torch(model)
    assert model[0]._forward_pre_hooks


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"prune.from_torch: model must be a torch.nn.Module, got int"):
        prune.from_torch(3)


def test_a_recurrent_module_deep_copies_afterwards():
    model = nn.LSTM(4, 3)
    torch_prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    x = torch.randn(5, 2, 4)
    expected = model(x)[0].detach()
    prune.from_torch(model)
    assert torch.equal(copy.deepcopy(model)(x)[0], expected)
