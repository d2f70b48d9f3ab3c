import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import live_weight


def codebooks(model):
    return [live_weight(model[index], "weight").compressed.codebook for index in (0, 2)]


def held_by(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def holds(optimizer, parameter):
    return sum(one is parameter for one in held_by(optimizer))


@pytest.mark.parametrize("stepped", [False, True])
def test_an_older_optimizer_trains_the_codebooks_from_its_first_step(mlp, train, stepped):
    slow, fast = {"params": mlp[0].parameters(), "lr": 0.01}, {"params": mlp[2].parameters(), "lr": 0.1}
    optimizer = torch.optim.SGD([slow, fast], lr=1.0, momentum=0.9)
    if stepped:
        train(mlp, optimizer, steps=1)
    quantize.kmeans(prune.magnitude(mlp, 0.5), 3)
    before = [codebook.detach().clone() for codebook in codebooks(mlp)]
    train(mlp, optimizer, steps=1)
    for group, codebook, former in zip(optimizer.param_groups, codebooks(mlp), before, strict=True):
        assert group["params"][-1] is codebook
        torch.testing.assert_close(codebook, former - group["lr"] * codebook.grad)
        assert not torch.equal(codebook, former)
    optimizer.zero_grad()
    assert all(codebook.grad is None for codebook in codebooks(mlp))


def test_no_codebook_is_adopted_twice_and_schedulers_go_on(mlp, train):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(mlp, optimizer, scheduler=scheduler)
    quantize.kmeans(mlp, 3)
    train(mlp, optimizer, scheduler=scheduler)
    quantize.adopt(optimizer)
    assert len(optimizer.param_groups) == 1
    assert [holds(optimizer, codebook) for codebook in codebooks(mlp)] == [1, 1]
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**6


def test_a_later_optimizer_has_them_already(mlp, train):
    quantize.kmeans(mlp, 3)
    optimizer = train(mlp)
    assert [holds(optimizer, codebook) for codebook in codebooks(mlp)] == [1, 1]
    assert len(held_by(optimizer)) == 6


def test_it_trains_as_an_optimizer_that_was_built_afterwards(make_mlp, train):
    one, two = make_mlp(), make_mlp()
    older = torch.optim.Adam(one.parameters(), lr=0.01)
    quantize.kmeans(one, 3)
    quantize.kmeans(two, 3)
    train(one, older)
    train(two, torch.optim.Adam(two.parameters(), lr=0.01))
    assert all(torch.equal(a, b) for a, b in zip(codebooks(one), codebooks(two), strict=True))


def test_optimizers_of_other_models_and_of_copies_are_left_alone(make_mlp, train):
    mlp, other = make_mlp(), make_mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    older = torch.optim.SGD(mlp.parameters(), lr=0.1)
    quantize.kmeans(mlp, 3)
    replica = copy.deepcopy(mlp)
    train(other, optimizer)
    train(mlp, older)
    assert len(held_by(optimizer)) == 4
    assert [holds(older, codebook) for codebook in codebooks(replica)] == [0, 0]


def test_only_the_weights_that_an_optimizer_holds(mlp, train):
    optimizer = torch.optim.SGD(mlp[2].parameters(), lr=0.1)
    quantize.kmeans(mlp, 3)
    train(mlp, optimizer)
    assert [holds(optimizer, codebook) for codebook in codebooks(mlp)] == [0, 1]


def test_sharing_again_and_finalizing_leave_no_dead_codebook_behind(mlp, train):
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.01)
    quantize.kmeans(mlp, 3)
    train(mlp, optimizer)
    former = codebooks(mlp)
    quantize.kmeans(mlp, 2)
    assert [holds(optimizer, codebook) for codebook in former] == [0, 0]
    assert [holds(optimizer, codebook) for codebook in codebooks(mlp)] == [1, 1]
    assert not any(codebook in optimizer.state for codebook in former)
    train(mlp, optimizer)
    finalize(mlp)
    assert len(held_by(optimizer)) == 4
    assert len(optimizer.state) == 2  # the biases: the frozen weights have never stepped
    train(mlp, optimizer)


def test_a_resumed_run_loads_the_state_of_an_older_optimizer(make_mlp, train):
    def begin():
        model = make_mlp()
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = begin()
    quantize.kmeans(prune.magnitude(model, 0.5), 3)
    train(model, optimizer, seed=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, seed=2)

    resumed, resumed_optimizer = begin()
    quantize.kmeans(prune.magnitude(resumed, 0.5), 3)
    resumed.load_state_dict(saved[0])
    quantize.adopt(resumed_optimizer)
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, seed=2)
    assert torch.equal(resumed[0].weight, model[0].weight)
    assert torch.equal(resumed[2].weight, model[2].weight)


def test_named_parameters_keep_their_names(mlp, train):
    optimizer = torch.optim.SGD(mlp.named_parameters(), lr=0.1)
    quantize.kmeans(mlp, 3)
    train(mlp, optimizer)
    assert optimizer.param_groups[0]["param_names"][4:] == ["0.weight.codebook", "2.weight.codebook"]
    finalize(mlp)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_neither_models_nor_optimizers_are_kept_alive():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize.kmeans(model, 2)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"adopt: optimizer must be a torch.optim.Optimizer, got list"):
        quantize.adopt([])


def test_loading_a_shared_state_reaches_an_older_optimizer(make_mlp, train):
    source = quantize.kmeans(make_mlp(), 3)
    model = prune.magnitude(make_mlp(seed=1), 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(source.state_dict())
    before = model[0].weight.detach().clone()
    train(model, optimizer, steps=1)
    assert not torch.equal(model[0].weight, before)
    assert [holds(optimizer, codebook) for codebook in codebooks(model)] == [1, 1]
