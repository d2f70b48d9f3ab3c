"""Every method that prunes: bad input gets its sentence and changes nothing."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersetorch.methods import prune
from tersetorch.recipes import prune_to_budget

INPUTS = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
BATCHES = [(x, torch.arange(6) % 3) for x in INPUTS]


def magnitude(model, sparsity=0.5, **selection):
    return prune.magnitude(model, sparsity, **selection)


def obs(solver):
    def method(model, sparsity=0.5, data=INPUTS, **selection):
        return prune.obs(model, data, sparsity, solver=solver, **selection)

    return method


def obd(model, sparsity=0.5, data=BATCHES, **selection):
    return prune.obd(model, data, "cross_entropy", sparsity, **selection)


def gradual(model, sparsity=0.5, **selection):
    return prune.GradualPruner(model, sparsity, end_step=2, **selection)


def iterative(model, sparsity=0.5, **selection):
    return prune.iterative(model, [sparsity], lambda model, index: 1 / 0, **selection)


def surgery(model, sparsity=0.5, **selection):
    return prune.DynamicSurgery(model, sparsity, **selection)  # in the place of the sparsity its c_rate


def sensitivity(model, sparsity=0.5, **selection):
    return prune.sensitivity(model, lambda model: 1 / 0, [sparsity], **selection)


def to_budget(model, sparsity=0.5, **selection):
    return prune_to_budget(model, lambda model: 1 / 0, max_drop=0.1, sparsities=[sparsity], **selection)


METHODS = {
    "prune.magnitude": magnitude,
    "prune.GradualPruner": gradual,
    "prune.iterative": iterative,
    "prune.sensitivity": sensitivity,
    "prune_to_budget": to_budget,
    "prune.DynamicSurgery": surgery,
    "prune.obd": obd,
    "prune.obs full": obs("full"),
    "prune.obs layerwise": obs("layerwise"),
    "prune.obs exactobs": obs("exactobs"),
    "prune.obs blocked": obs("blocked"),
}
CALIBRATED = [name for name in METHODS if "obs" in name or "obd" in name]
PATTERNED = [name for name in METHODS if name not in ("prune.DynamicSurgery", "prune.obs full")]
GROUPED = ["prune.magnitude", "prune.obd", "prune.obs layerwise", "prune.obs exactobs", "prune.obs blocked"]
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[2].eval()
    model[3].bias.requires_grad_(False)
    model(INPUTS[0]).sum().backward()
    return model


def facts(model):
    """All that must be as it was."""
    return {
        "tensors": {
            name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()
        },
        "gradients": {
            name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        },
        "modules": [
            (
                type(module),
                module.training,
                parametrize.is_parametrized(module),
                len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
            )
            for module in model.modules()
        ],
        "generator": torch.get_rng_state(),
    }


def same(one, other):
    assert one["modules"] == other["modules"]
    assert torch.equal(one["generator"], other["generator"])
    for part in ("tensors", "gradients"):
        assert list(one[part]) == list(other[part])
    for name, (tensor, values) in one["tensors"].items():
        assert other["tensors"][name][0] is tensor
        assert torch.equal(other["tensors"][name][1].nan_to_num(7), values.nan_to_num(7))
    for name, (trains, gradient) in one["gradients"].items():
        again = other["gradients"][name]
        assert again[0] is trains
        assert (again[1] is None) is (gradient is None) and (gradient is None or torch.equal(again[1], gradient))


def refused(name, model, error, message, **kwargs):
    before = facts(model)
    with pytest.raises(error, match=message) as raised:
        METHODS[name](model, **kwargs)
    assert str(raised.value).startswith(f"{name.split(' ')[0]}: ")
    same(facts(model), before)


@every_method
@pytest.mark.parametrize("frozen", ["one", "all"])
def test_a_frozen_layer(model, name, frozen):
    for parameter in [model[3].weight] if frozen == "one" else model.parameters():
        parameter.requires_grad_(False)
    layer = "3" if frozen == "one" else "0"
    sentence = (
        f"the weight of '{layer}' must not be frozen, got one that this would change; call requires_grad_\\(True\\) on "
        f"it, or pass ignore=\\['{layer}'\\]"
    )
    refused(name, model, ValueError, sentence)
    refused(name, model, ValueError, sentence, targets=layer)


@every_method
def test_a_frozen_layer_may_be_ignored(model, name):
    model[3].weight.requires_grad_(False)
    before = model[3].weight.detach().clone()
    with suppress(ZeroDivisionError):  # what retrains and scores here
        METHODS[name](model, ignore="3")
    assert torch.equal(model[3].weight, before) and not parametrize.is_parametrized(model[3])


def test_what_changes_no_weight_takes_frozen_ones(model):
    model.requires_grad_(False)
    model[3].weight[0] = 0
    x = INPUTS[0]
    before = model.eval()(x)
    assert prune.density(model)["3"].kept == 12
    assert prune.keep_zeros(model) is model
    assert set(prune.saliencies(model, BATCHES, "cross_entropy").saliency) == {"0", "3"}
    assert torch.equal(model(x), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prune.DynamicSurgery"])
@pytest.mark.parametrize("sparsity", [1.2, 1.0, -0.1, float("nan"), float("inf")])
def test_a_sparsity_out_of_range(model, name, sparsity):
    refused(name, model, ValueError, rf"must be in \[0.*, 1.*\), got {sparsity}; pass a number", sparsity=sparsity)


@every_method
@pytest.mark.parametrize("sparsity", [True, "0.5", [0.5]])
def test_a_sparsity_that_is_no_number(model, name, sparsity):
    refused(name, model, TypeError, "must be a number, got", sparsity=sparsity)


def test_a_rate_that_is_no_number(model):
    for rate in (float("nan"), float("inf")):
        refused("prune.DynamicSurgery", model, ValueError, "c_rate must be finite, got", sparsity=rate)


@every_method
def test_patterns_that_match_nothing(model, name):
    refused(name, model, ValueError, "targets must match weights of two or more dimensions, got 'fc'", targets="fc")
    refused(name, model, ValueError, "ignore must match a module, got 'fc'", ignore="fc")
    refused(name, model, ValueError, "model must have a Linear or Conv layer that ignore leaves", ignore="*")
    refused(name, model, ValueError, "targets must match weights", targets=nn.Conv2d)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, name, value):
    with torch.no_grad():
        model[3].weight[1, 2] = value
    refused(name, model, ValueError, "the weight of '3' must be finite, got NaN or infinity; repair the training")


@every_method
def test_models_without_layers_and_what_is_no_model(name):
    refused(name, nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), ValueError, "model must have a Linear or Conv layer")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        METHODS[name]("model")


@pytest.mark.parametrize("name", CALIBRATED)
def test_no_calibration_data(model, name):
    used = (batch for batch in (BATCHES if name == "prune.obd" else INPUTS))
    list(used)
    refused(name, model, ValueError, "data must hold at least one", data=[])
    refused(name, model, TypeError, "data must be an iterable of batches, got NoneType", data=None)
    refused(name, model, (TypeError, ValueError), "data must (hold at least one|be iterable)", data=used)
    refused(name, model, TypeError, "data must be an iterable of batches, got Tensor", data=INPUTS[0])


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_data_that_is_not_finite(model, name):
    bad = torch.full((6, 8), float("nan"))
    data = [(bad, BATCHES[0][1])] if name == "prune.obd" else [bad]
    refused(name, model, ValueError, "must (give finite|be finite)", data=data)


@pytest.mark.parametrize("name", PATTERNED)
@pytest.mark.parametrize("pattern", ["2of4", "4:2", "0x1", 3])
def test_a_pattern_that_is_none(model, name, pattern):
    refused(name, model, (TypeError, ValueError), "pattern must", pattern=pattern)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_do_not_fit(model, name):
    refused(
        name,
        model,
        ValueError,
        "pattern 2:4 must divide the input channels, got 6 of '3'",
        sparsity=None,
        pattern="2:4",
    )


def test_the_state_of_a_pruned_model_is_kept_too(model):
    prune.magnitude(model, 0.5)
    pruned = copy.deepcopy(model)
    pruned[3].parametrizations.weight.original.requires_grad_(False)
    for name in METHODS:
        refused(name, pruned, ValueError, "the weight of '3' must not be frozen", sparsity=0.8)
