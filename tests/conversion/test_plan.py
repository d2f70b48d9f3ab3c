import pytest
import torch
from torch import nn

from tersetorch.conversion import convert, report
from tersetorch.nn import SparseCodebookConv2d, SparseCodebookLinear, SparseConv2d, SparseLinear


@pytest.fixture
def model(sparse_linear):
    return nn.ModuleDict(
        {
            "shared": sparse_linear(20, 20, distinct=7),
            "plain": sparse_linear(20, 20, density=0.9),
            "conv": nn.Conv2d(1, 1, 3),
            "other": nn.ConvTranspose2d(1, 1, 3),
        }
    )


def kinds(model):
    return {name: type(module) for name, module in model.items()}


def test_sparse_takes_every_layer_that_can(model):
    fast = convert(model, plan="sparse")
    assert kinds(fast) == {
        "shared": SparseLinear,
        "plain": SparseLinear,
        "conv": SparseConv2d,
        "other": nn.ConvTranspose2d,
    }
    assert report(fast).plan == {"shared": "csr", "plain": "csr", "conv": "sparse_conv2d", "other": "dense"}


def test_codebook_says_what_it_cannot_take(model):
    fast = convert(model, plan="codebook")
    assert kinds(fast) == {
        "shared": SparseCodebookLinear,
        "plain": nn.Linear,
        "conv": SparseCodebookConv2d,
        "other": nn.ConvTranspose2d,
    }
    reasons = {layer.name: layer.reason for layer in report(fast).layers}
    assert reasons["plain"] == (
        "sparse_codebook: more than 255 distinct non-zero values; codebook_linear: more than 256 distinct values"
    )
    assert reasons["other"] == "no format runs a ConvTranspose2d"


@pytest.mark.parametrize(("density", "levels", "chosen"), [(0.05, 3, 0), (0.3, 3, 1), (0.05, 40, 0), (0.3, 40, 1)])
def test_codebook_takes_the_smaller_of_two(density, levels, chosen):
    model = nn.ModuleDict({"linear": nn.Linear(512, 40), "conv": nn.Conv2d(64, 40, 3)})
    for layer in model.values():
        kept = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < density
        with torch.no_grad():
            layer.weight.copy_((layer.weight / layer.weight.abs().max() * levels).round() * kept)
    fast = convert(model, plan="codebook")
    names = [("sparse_codebook", "codebook_linear"), ("sparse_codebook_conv2d", "codebook_conv2d")]
    assert list(report(fast).plan.values()) == [pair[chosen] for pair in names]
    weights = [layer.codebook_weight if chosen else layer.sparse_weight for layer in fast.values()]
    others = convert(model, plan={name: pair[1 - chosen] for name, pair in zip(model, names, strict=True)}).values()
    for weight, other in zip(weights, others, strict=True):
        assert weight.nbytes < (other.sparse_weight if chosen else other.codebook_weight).nbytes


def test_by_name_and_the_others_stay(model):
    fast = convert(model, plan={"shared": "sparse_codebook", "conv": "dense"})
    assert kinds(fast) == kinds(model) | {"shared": SparseCodebookLinear}


def test_the_reports_plan_makes_the_same_choices(model):
    fast = convert(model, plan={"shared": "sparse_codebook", "plain": "csr"})
    again = convert(model, plan=report(fast).plan)
    assert kinds(again) == kinds(fast)
    for name, tensor in fast.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("fast", "plan must be one of 'sparse', 'codebook', 'csr16', .* or a dict of layer names, got 'fast'"),
        ({"nowhere": "csr"}, "plan must name layers that own a weight, got 'nowhere'; this model's are 'shared'"),
        ({"shared": "coo"}, r"plan must give 'shared' one of \['dense', 'csr', .*\], got 'coo'"),
        ({"other": "csr"}, "plan must leave 'other' dense, got 'csr': no format runs a ConvTranspose2d"),
        ({"conv": "csr"}, "plan must give 'conv' a format that can hold it, got 'csr': it runs a Linear, not a Conv2d"),
        ({"plain": "sparse_codebook"}, "plan must give 'plain' a format that can hold it.*more than 255 distinct"),
        ({"shared": "csr", "plain": ["csr"]}, "plan must give 'plain' one of"),
    ],
)
def test_what_does_not_fit_is_refused(model, plan, message):
    before = kinds(model)
    with pytest.raises(ValueError, match=message):
        convert(model, plan=plan)
    assert kinds(model) == before


@pytest.mark.parametrize("plan", [3, ["shared"], True])
def test_other_types_are_refused(model, plan):
    with pytest.raises(TypeError, match="plan must be a string or a dict of layer names to format names"):
        convert(model, plan=plan)


def test_shared_modules_answer_to_all_their_names(sparse_linear):
    layer = sparse_linear(20, 20)
    model = nn.Sequential(layer, layer)
    fast = convert(model, plan={"1": "csr"})
    assert type(fast[0]) is SparseLinear
    assert fast[0] is fast[1]
    with pytest.raises(ValueError, match="plan must give layers that use one weight one format"):
        convert(model, plan={"0": "csr", "1": "dense"})


def test_tied_layers_follow_each_other(sparse_linear):
    model = nn.Sequential(sparse_linear(20, 20), sparse_linear(20, 20))
    model[1].weight = model[0].weight
    fast = convert(model, plan={"0": "csr"})
    assert fast[0].values is fast[1].values
    with pytest.raises(ValueError, match="plan must give layers that use one weight one format"):
        convert(model, plan={"0": "csr", "1": "sparse_codebook"})
