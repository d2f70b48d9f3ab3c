import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live


@pytest.fixture(params=["pruned", "shared", "both"])
def live(request, mlp):
    if request.param != "shared":
        prune.magnitude(mlp, 0.7)
    if request.param != "pruned":
        quantize.kmeans(mlp, 3)
    return mlp


def test_outputs_stay_the_same_to_the_bit_and_nothing_of_ours_is_left(live, train):
    train(live)
    x = torch.randn(4, 20)
    expected = live(x)
    assert is_live(live)
    assert finalize(live) is live
    assert not is_live(live)
    assert type(live[0]) is nn.Linear
    assert list(live.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [name for name, _ in live.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(live(x), expected)


def test_it_is_idempotent_and_leaves_plain_models_alone(live):
    finalize(live)
    state = copy.deepcopy(live.state_dict())
    classes = [type(module) for module in live.modules()]
    finalize(live)
    assert [type(module) for module in live.modules()] == classes
    assert all(torch.equal(live.state_dict()[name], state[name]) for name in state)


def test_the_parameter_is_the_same_object_and_an_older_optimizer_goes_on(mlp, train):
    parameters = list(mlp.parameters())
    optimizer = train(mlp)
    prune.magnitude(mlp, 0.7)
    quantize.kmeans(mlp, 3)
    train(mlp, optimizer)
    finalize(mlp)
    assert all(one is other for one, other in zip(mlp.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad for parameter in parameters)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    before = mlp[0].weight.detach().clone()
    train(mlp, optimizer)
    assert not torch.equal(mlp[0].weight, before)


def test_the_masks_end_here(mlp, train):
    prune.magnitude(mlp, 0.7)
    optimizer = train(mlp)
    finalize(mlp)
    zeros = int((mlp[0].weight == 0).sum())
    train(mlp, optimizer)
    assert int((mlp[0].weight == 0).sum()) < zeros


def test_a_finalized_model_pickles_and_loads_plain_checkpoints(live, make_mlp):
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(live)
    finalize(live)
    x = torch.randn(4, 20)
    assert torch.equal(pickle.loads(pickle.dumps(live))(x), live(x))
    stream = io.BytesIO()
    torch.save(live, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), live(x))
    plain = make_mlp(seed=1)
    live.load_state_dict(plain.state_dict())
    assert torch.equal(live(x), plain(x))
    plain.load_state_dict(finalize(live).state_dict())


def test_methods_may_be_applied_again(mlp):
    finalize(quantize.kmeans(prune.magnitude(mlp, 0.5), 4))
    values = mlp[0].weight.detach().unique()
    finalize(quantize.kmeans(prune.magnitude(mlp, 0.8), 4))
    assert int(mlp[0].weight.count_nonzero()) == 68
    assert torch.isin(mlp[0].weight.detach().unique(), values).all()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("share", [False, True])
def test_a_parametrization_registered_on_top_of_ours_stays(mlp, share):
    prune.magnitude(mlp, 0.7)
    if share:
        quantize.kmeans(mlp, 3)
    parametrize.register_parametrization(mlp[0], "weight", Doubled())
    replica = copy.deepcopy(mlp)
    x = torch.randn(4, 20)
    expected = mlp(x)
    finalize(mlp)
    assert not is_live(mlp)
    assert [type(one) for one in mlp[0].parametrizations.weight] == [Doubled]
    assert torch.equal(mlp(x), expected)
    assert mlp[0].parametrizations.weight.original.requires_grad
    assert torch.equal(replica(x), expected)
    parametrize.remove_parametrizations(mlp[0], "weight")
    assert torch.equal(mlp(x), expected)
    assert type(mlp[0]) is nn.Linear


def test_no_module_is_refused():
    with pytest.raises(TypeError, match=r"finalize: model must be a torch\.nn.Module, got dict; pass a network"):
        finalize({})
