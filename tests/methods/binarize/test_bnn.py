"""bnn: signs for weights and activations, and that such a network learns."""

import pytest
import torch
from torch import nn

from tersetorch.methods.binarize import BinaryConnect, ShiftAdaMax, ShiftBatchNorm1d, Sign, bnn, squared_hinge


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64, bias=False), norm(64), nn.ReLU(), nn.Linear(64, 64, bias=False), norm(64), nn.Hardtanh(),
        nn.Linear(64, 4, bias=False), norm(4),
    )  # fmt: skip


def test_layers_multiply_signs_by_signs():
    model = network()
    handle = bnn(model)
    assert isinstance(handle, BinaryConnect) and handle.names == ["0", "3", "6"]
    assert isinstance(model[2], Sign) and isinstance(model[5], Sign)
    seen = []
    model[3].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(8, 20))
    assert set(seen[0][0].unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(seen[0][1], seen[0][1].round())


def test_stochastic_activations_and_flags():
    model = network()
    bnn(model, stochastic=True)
    assert model[2].stochastic and model[2].training
    evaluated = network().eval()
    bnn(evaluated)
    assert not evaluated[2].training


def test_a_shared_activation_becomes_one_sign_everywhere():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu, nn.Tanh())
    model.first = model.second = nn.Hardtanh()
    bnn(model)
    assert isinstance(model[1], Sign) and model[3] is model[1]
    assert isinstance(model.first, Sign) and model.second is model.first
    assert isinstance(model[4], Sign) and len({model[1], model[4], model.first}) == 3


@pytest.mark.parametrize("shifts", [False, True])
def test_learns(shifts):
    model = network(ShiftBatchNorm1d if shifts else nn.BatchNorm1d)
    handle = bnn(model)
    optimizer = (ShiftAdaMax if shifts else torch.optim.Adam)(model.parameters(), lr=2**-7)
    x = torch.randn(256, 20, generator=torch.Generator().manual_seed(1))
    y = x[:, :4].argmax(1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = squared_hinge(model(x), y)
        loss.backward()
        optimizer.step()
        handle.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.7


def test_refuses():
    with pytest.raises(ValueError, match="must have activation modules, got none"):
        bnn(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"^binarize\.bnn: model must be a torch\.nn\.Module"):
        bnn(3)
    with pytest.raises(ValueError, match=r"^binarize\.bnn: targets must match weights"):
        bnn(network(), targets="fc9")
    with pytest.raises(ValueError, match="scores must be"):
        squared_hinge(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"squared_hinge: labels must be an int64 tensor, got torch\.float32"):
        squared_hinge(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(TypeError, match="squared_hinge: scores must be a floating-point tensor, got list"):
        squared_hinge([1.0], torch.zeros(3, dtype=torch.int64))
    for label in (-1, 4):
        with pytest.raises(ValueError, match=rf"squared_hinge: labels must lie in \[0, 4\), got {label}"):
            squared_hinge(torch.zeros(3, 4), torch.tensor([0, 3, label]))


def test_squared_hinge_is_the_formula_also_mapped_and_compiled():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 3, 4), torch.tensor([[0, 1, 3], [2, 2, 0]])
    signs = torch.full((2, 3, 4), -1.0).scatter_(2, labels[..., None], 1.0)
    want = (1 - signs * scores).clamp(min=0).square().mean((1, 2))
    assert torch.allclose(squared_hinge(scores[0], labels[0]), want[0])
    assert torch.allclose(torch.func.vmap(squared_hinge)(scores, labels), want)
    assert torch.allclose(torch.compile(squared_hinge, fullgraph=True)(scores[0], labels[0]), want[0])
