import pytest
import torch
from torch import nn

from tersetorch.methods import prune
from tersetorch.methods.prune import optimal_brain_surgeon as module
from tersetorch.methods.prune.optimal_brain_surgeon import DeletedWeight, inverse_hessian


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


@pytest.fixture
def data():
    return list(torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(8))


def gradients(net, data):
    """[patterns, outputs, all parameters] by autograd."""
    parameters = dict(net.named_parameters())

    def outputs(values, x):
        return torch.func.functional_call(net, values, (x,))

    one = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, torch.cat(data))
    return torch.cat([one[name].detach().flatten(2) for name in parameters], 2)


def test_the_recursion_gives_the_inverse():
    x = torch.randn(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.inv(1e-2 * torch.eye(20).double() + x.T @ x / 30)
    for sizes in ([60], [1] * 60, [7, 13, 40]):
        torch.testing.assert_close(inverse_hessian(x.split(sizes), 30, 1e-2, 20), expected)


@pytest.mark.parametrize("rows", [1, 5, 256])
def test_each_deletion_is_the_constrained_minimum(monkeypatch, net, data, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    x = gradients(net, data)
    hessian = 1e-3 * torch.eye(x.shape[2]).double() + torch.einsum("pok,pol->kl", x, x) / len(x)
    names = [name for name, _ in net.named_parameters()]
    sizes = [value.numel() for value in net.parameters()]
    w = torch.cat([value.detach().flatten() for value in net.parameters()])
    weight = torch.cat([torch.full((size,), name.endswith("weight")) for name, size in zip(names, sizes, strict=True)])
    gone, log = [], []
    for _ in range(7):
        costs = {}
        for q in weight.nonzero().flatten().tolist():
            if q in gone:
                continue
            # Minimise the quadratic with w_q and all that is gone fixed at zero.
            free = torch.tensor([k for k in range(len(w)) if k not in (*gone, q)])
            fixed = torch.tensor([*gone, q])
            change = torch.zeros_like(w)
            change[fixed] = -w[fixed]
            change[free] = torch.linalg.solve(hessian[free][:, free], -hessian[free][:, fixed] @ change[fixed])
            costs[q] = (float(change @ hessian @ change) / 2, change)
        q = min(costs, key=lambda q: costs[q][0])
        gone.append(q)
        w = w + costs[q][1]
        log.append(costs[q][0])
    history = []
    prune.obs(net, data, 7 / 18, solver="full", damping=1e-3, history=history)
    found = [net[0].weight, net[0].bias, net[2].weight, net[2].bias]
    torch.testing.assert_close(torch.cat([value.detach().flatten() for value in found]), w)
    starts = {"0": 0, "2": 15}
    widths = {"0": 4, "2": 3}
    assert [starts[d.layer] + d.index[0] * widths[d.layer] + d.index[1] for d in history] == gone
    assert [d.increase for d in history] == pytest.approx(log)
    assert all(isinstance(d, DeletedWeight) for d in history)


def test_the_prediction_is_exact_for_a_linear_network():
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3).double(), torch.randn(50, 6).double()
    before = net(x).detach()
    history = []
    prune.obs(net, [x], 0.5, solver="full", damping=1e-9, history=history)
    assert int((net.weight == 0).sum()) == 9 == len(history)
    risen = (net(x) - before).square().sum(1).mean() / 2
    assert sum(d.increase for d in history) == pytest.approx(float(risen.detach()), rel=1e-5)


def test_it_stops_before_the_error_rises_too_far(net, data):
    history = []
    prune.obs(net, data, solver="full", max_increase=1e-3, history=history)
    total = sum(d.increase for d in history)
    assert history and total <= 1e-3
    again, longer = type(net)(*net), []
    assert prune.density(again)["0"].kept + prune.density(again)["2"].kept == 18 - len(history)
    prune.obs(again, data, solver="full", max_increase=0.0, history=longer)
    assert not longer
    prune.obs(again, data, 0.9, solver="full", max_increase=1e9, history=longer)
    assert len(history) + len(longer) == round(0.9 * 18)


def test_masked_weights_stay_out_of_it_and_a_frozen_bias_frozen(net, data):
    prune.magnitude(net, 0.5, targets="0")
    zero = net[0].weight == 0
    net[0].bias.requires_grad_(False)
    bias = net[0].bias.clone()
    prune.obs(net, data, 10 / 18, solver="full")
    assert not net[0].weight[zero].any()
    assert sum(layer.kept for layer in prune.density(net).values()) == 8
    assert torch.equal(net[0].bias, bias)
    assert [parameter.requires_grad for parameter in net.parameters()].count(False) == 1
    assert all(parameter.grad is None for parameter in net.parameters())


def test_tied_weights_and_convolutions():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(1, 2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(self.conv(x).tanh().mean((2, 3))))

    net, x = Net(), torch.randn(9, 1, 3, 3)
    prune.obs(net, [x], 0.5, solver="full")
    assert sum(layer.kept for layer in prune.density(net).values()) == 6
    assert torch.equal(net.one.weight, net.two.weight)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data must hold at least one batch, got none"),
        ([torch.full((2, 4), torch.nan).double()], ValueError, "data must give finite outputs, got NaN or infinity"),
        (iter([torch.ones(2, 4).double()]), TypeError, "data must be iterable 2 times, got list_iterator"),
    ],
)
def test_bad_data_changes_nothing(net, data, error, message):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=f"prune.obs: {message}"):
        prune.obs(net, data, 0.5, solver="full")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_large_networks_are_refused_with_their_bytes(monkeypatch, net, data):
    monkeypatch.setattr(module, "MAX_BYTES", 4000)
    with pytest.raises(ValueError, match=r"at most 4,000 bytes, got 23 weights and biases, which take 4,232; pass"):
        prune.obs(net, data, 0.5, solver="full")


def test_outputs_that_are_no_tensor_are_refused(data):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2).double()

        def forward(self, x):
            return self.fc(x), x

    with pytest.raises(TypeError, match=r"model must give a tensor \[N, ...\] with solver 'full', got tuple"):
        prune.obs(Pair(), data, 0.5, solver="full")
