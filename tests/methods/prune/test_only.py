import copy

import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune, quantize


def test_the_others_stand_still_momentum_and_decay_included(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def step():
        mlp(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    prune.magnitude(mlp, 0.5)
    step()
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    mlp(torch.randn(8, 20)).square().sum().backward()  # gradients that were there
    with prune.only(mlp, "2") as same:
        assert same is mlp
        step()
    changed = {name for name, tensor in mlp.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.parametrizations.weight.original", "2.bias"}
    step()
    changed = {name for name, tensor in mlp.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"0.parametrizations.weight.original", "0.bias"} <= changed


def test_what_was_frozen_stays_frozen_and_an_error_thaws_the_rest(mlp):
    mlp[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), prune.only(mlp, "2"):
        assert not mlp[0].weight.requires_grad
        raise RuntimeError
    assert [parameter.requires_grad for parameter in mlp.parameters()] == [True, False, True, True]


def test_a_tied_layer_trains_with_all_that_hold_its_weight(tied):
    weight = next(tied.parameters())
    holders = [module for module in tied.modules() if getattr(module, "weight", None) is weight]
    name = next(name for name, module in tied.named_modules() if module is holders[-1])
    with prune.only(tied, name):
        assert len(holders) == 3
        assert all(parameter.requires_grad for module in holders for parameter in module.parameters())


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    ("make", "targets", "training"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "attention.in_proj_weight", {"in_proj_weight", "in_proj_bias"}),
        (lambda: nn.MultiheadAttention(8, 2), nn.MultiheadAttention, {"in_proj_weight", "in_proj_bias"}),
        (lambda: nn.MultiheadAttention(8, 2), "attention.out_proj", {"out_proj.weight", "out_proj.bias"}),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "*.k_proj_weight", {"k_proj_weight", "in_proj_bias"}),
        (lambda: nn.LSTM(4, 8), "attention.weight_hh_l0", {"weight_hh_l0", "bias_hh_l0"}),
    ],
)
def test_the_other_weights_of_a_module_stand_still(make, targets, training, pruned):
    model = nn.ModuleDict({"attention": make(), "last": nn.Linear(8, 8)})
    if pruned:
        prune.magnitude(model, 0.5, targets=["attention", "attention.*", "last"])
    with prune.only(model, targets):
        found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.replace("parametrizations.", "").replace(".original", "") for name in found} == {
        f"attention.{name}" for name in training
    }
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_trains_can_be_pruned_and_the_rest_is_refused(mlp):
    with prune.only(mlp, "2"):
        prune.magnitude(mlp, 0.5, targets="2")
        with pytest.raises(ValueError, match=r"prune.magnitude: the weight of '0' must not be frozen"):
            prune.magnitude(mlp, 0.5)
    assert [name for name, layer in prune.density(mlp).items() if layer.kept < layer.total] == ["2"]


def test_a_pattern_that_matches_nothing_freezes_nothing(mlp):
    with pytest.raises(ValueError, match=r"prune.only: targets must match"), prune.only(mlp, "fc"):
        pass
    assert all(parameter.requires_grad for parameter in mlp.parameters())


def test_what_is_shared_inside_trains_by_its_codebook_afterwards(mlp):
    prune.magnitude(mlp, 0.5)
    shared = quantize.kmeans(copy.deepcopy(mlp), bits=2).state_dict()
    with prune.only(mlp, "0"):
        with pytest.raises(ValueError, match="the weight of '2' must not be frozen"):
            quantize.kmeans(mlp, bits=2)
        quantize.kmeans(mlp, bits=2, targets="0")
        mlp.load_state_dict(shared)
        assert not mlp[2].parametrizations.weight[0].codebook.requires_grad
    for layer in (mlp[0], mlp[2]):
        held = layer.parametrizations.weight
        assert held[0].codebook.requires_grad and not held.original.requires_grad


def test_what_is_finalized_or_shared_anew_inside_trains_afterwards(mlp):
    quantize.kmeans(mlp, bits=2)
    fewer = copy.deepcopy(mlp)
    quantize.kmeans(fewer, bits=1)
    with prune.only(mlp, "0"):
        mlp.load_state_dict(fewer.state_dict())
    assert mlp[2].parametrizations.weight[0].codebook.requires_grad
    with prune.only(mlp, "0"):
        finalize(mlp)
    assert all(parameter.requires_grad for parameter in mlp.parameters())
